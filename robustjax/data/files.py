"""Arrays (``.npz``) and folders of images on disk, as published splits: train, validation, test."""

import pathlib
import zipfile

import numpy as np

from robustjax.data.dataset import Dataset, Source, check_arrays

_ARRAYS = {
    "train": ("x_train", "y_train"),
    "validation": ("x_validation", "y_validation"),
    "test": ("x_test", "y_test"),
}
_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_IMAGE_SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


def read_npz(path: str) -> dict[str, Dataset]:
    """The splits in a NumPy archive, which is read without pickle.

    Args:
      path: A file that holds ``x_train`` and ``y_train``, ``x_test`` and ``y_test``, and if wanted
        ``x_validation`` and ``y_validation``; or ``image`` and ``label`` alone, an evaluation set
        that counts as the test split. Images ``(n, h, w, c)`` are uint8, or floating in [0, 1] and
        kept as float32; labels ``(n,)`` are integers from 0. The number of classes is the scalar
        ``num_classes`` if the file has one, else one more than the largest label.

    Raises:
      ValueError: No such file, not an archive, needs pickle, or arrays that are missing or wrong.
    """
    arrays = _read_arrays(path)
    pairs = {
        split: names for split, names in _ARRAYS.items() if names[0] in arrays or names[1] in arrays
    }
    if not pairs and "image" in arrays:
        pairs = {"test": ("image", "label")}
    if not pairs:
        raise ValueError(
            f"{path} must hold the arrays x_train, y_train, x_test and y_test, or image and label, "
            f"got {', '.join(sorted(arrays)) or 'none'}"
        )
    for names in pairs.values():
        for name in names:
            if name not in arrays:
                raise ValueError(f"{path} must hold both {names[0]} and {names[1]}, lacks {name}")

    labels = [arrays[y] for _, y in pairs.values()]
    if "num_classes" in arrays:
        num_classes = _scalar(path, arrays["num_classes"])
    else:
        num_classes = max(
            (int(y.max()) + 1 for y in labels if y.size and np.issubdtype(y.dtype, np.integer)),
            default=1,
        )
    splits = {}
    for split, (x_name, y_name) in pairs.items():
        x, y = arrays[x_name], arrays[y_name]
        if np.issubdtype(x.dtype, np.floating):
            x = x.astype(np.float32)
        where = f" in {path}"
        check_arrays(x_name + where, x, y_name + where, y, num_classes=max(num_classes, 1))
        splits[split] = Dataset(x, y.astype(np.int32), num_classes, pathlib.Path(path).stem)
    return splits


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"npz file must exist, got {path}")
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz archive of plain arrays, but: {error}") from error


def _scalar(path: str, value: np.ndarray) -> int:
    if value.size != 1 or not np.issubdtype(value.dtype, np.integer) or value.item() < 1:
        raise ValueError(f"num_classes in {path} must be one integer >= 1, got {value!r}")
    return int(value.item())


def read_folder(path: str) -> dict[str, Source]:
    """The splits of a folder of images, ``path/{train,val,test}/class/image.png``.

    Classes are numbered in the sorted order of their folders' names under ``train`` (under what
    there is, if there is no ``train``); examples are sorted by class and file name. Images are
    read as RGB uint8 of their own size; ``validation`` is another name for ``val``.

    Raises:
      ValueError: No such folder, no split in it, a class that training lacks, or no image.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"image folder must exist, got {path}")
    folders = {
        split: root / name
        for split, names in _FOLDERS.items()
        for name in names
        if (root / name).is_dir()
    }
    if not folders:
        raise ValueError(
            f"{path} must hold the folders train, val or test, each with one folder per class, "
            f"got {', '.join(sorted(p.name for p in root.iterdir())) or 'nothing'}"
        )
    first = folders.get("train", next(iter(folders.values())))
    classes = _class_names(first)
    return {split: _folder_source(folder, classes, root.name) for split, folder in folders.items()}


def _class_names(folder: pathlib.Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} must hold one folder per class, got none")
    return names


def _folder_source(folder: pathlib.Path, classes: list[str], name: str) -> Source:
    number = {class_name: i for i, class_name in enumerate(classes)}
    files: list[pathlib.Path] = []
    label: list[int] = []
    for class_name in _class_names(folder):
        if class_name not in number:
            raise ValueError(
                f"{folder / class_name} must be one of the {len(classes)} classes of the training "
                f"set, {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
            )
        images = sorted(
            p for p in (folder / class_name).iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES
        )
        files += images
        label += [number[class_name]] * len(images)
    if not files:
        raise ValueError(f"{folder} must hold images ({' '.join(_IMAGE_SUFFIXES)})")
    labels = np.asarray(label, dtype=np.int32)

    def read(i: int) -> dict:
        return {"image": _read_image(files[i]), "label": labels[i]}

    return Source(read, lambda i: labels[i], np.arange(len(files)), len(classes), name)


def _read_image(file: pathlib.Path) -> np.ndarray:
    from PIL import Image  # most runs read no files, and start without it

    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # PIL would clip these to 0 .. 255 without a word
                raise OSError(f"it has more than 8 bits per channel (PIL mode {image.mode})")
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{file} must be a readable 8-bit image, but: {error}") from error
