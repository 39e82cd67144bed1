"""Prepared TensorFlow Datasets, read by random access.

Reading needs ``tensorflow-datasets`` and a set prepared in the ``array_record`` format; it does not
import TensorFlow. Preparing a set (downloading and writing it, once) needs TensorFlow as well:

    python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10',
        data_dir='DIR', file_format='array_record').download_and_prepare()"

(The command ``tfds build`` does the same where ``apache-beam`` is installed.) A set made by one's
own builder is found the same way, by its files: ``DIR/name[/config]/version``. Its code need not be
importable where it is read.

Sets of images are read as they are. Waveforms, as those of ``speech_commands``, come as int16
``(samples, 1)`` of one second: cut at the end, or filled up with silence. Reading these does
import TensorFlow, which the description of their format needs; preparing them needs ``pydub``, too.
"""

import dataclasses
import os
import re
from typing import Any

import numpy as np

from robustjax.data.dataset import Source

_LABEL_CHUNK = 1024


def prepare_command(name: str, data_dir: str | None) -> str:
    """The shell command that downloads and prepares a data set so that it can be read here."""
    where = f"data_dir={data_dir!r}, " if data_dir is not None else ""
    return (
        f'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, {where}file_format='array_record').download_and_prepare()\""
    )


def read_tfds(name: str, data_dir: str | None, *, others: str) -> dict[str, Source]:
    """The labelled splits of a prepared set; nothing is downloaded and no image is decoded yet.

    Args:
      name: ``name[/config][:version]`` as in TensorFlow Datasets.
      data_dir: Where sets are prepared; ``None`` is TensorFlow Datasets' own default,
        ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      others: What else ``name`` could have been, for the message about an unknown name.

    Returns:
      A source for each of train, validation and test that the set has with labels. The test split
      of a competition whose labels are secret (-1), as ImageNet's, is left out.

    Raises:
      ValueError: TensorFlow Datasets is not installed; unknown name; not prepared, or in another
        format than array_record; not a set of images or waveforms with class labels.
    """
    builder = _find(name, data_dir, others)
    info = builder.info
    features = dict(info.features.items()) if hasattr(info.features, "items") else {}
    pair = ("image", "label")
    if not set(pair) <= set(features) and len(info.supervised_keys or ()) == 2:
        pair = info.supervised_keys
    image, label = (features.get(key) if isinstance(key, str) else None for key in pair)
    num_classes = getattr(label, "num_classes", None)
    samples = getattr(image, "sample_rate", None)  # of sound, a second
    shape = getattr(image, "shape", None) or ()
    if num_classes is None or (shape[1:] not in ((), (1,)) if samples else len(shape) != 3):
        raise ValueError(
            f"{name} must be a data set of images or sounds with one class label each, "
            f"got the features {', '.join(sorted(features)) or info.features}"
        )

    splits = {}
    for split in ("train", "validation", "test"):
        if split not in info.splits or info.splits[split].num_examples == 0:
            continue
        source = _source(builder, split, *pair, num_classes, info.name)
        if samples:
            source = _of_length(source, samples)
        if source.read_labels(np.arange(1))[0] >= 0:
            splits[split] = source
    return splits


def _find(name: str, data_dir: str | None, others: str) -> Any:
    """A builder that reads the files of a prepared set; its own code is not needed."""
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorflow_datasets":
            raise
        raise ValueError(
            f"name must be {others}, or a TensorFlow Datasets name, which needs "
            f"'pip install robustjax[tfds]', got {name!r}"
        ) from error

    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    where = data_dir or tfds.core.constants.get_default_data_dir()
    base = re.split("[/:]", name)[0]
    unknown = (
        f"name must be {others}, or a TensorFlow Datasets name such as 'cifar10', or that of a set "
        f"prepared in {where}, got {name!r}"
    )
    if not base.isidentifier():
        raise ValueError(unknown)
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        if base not in tfds.list_builders(with_community_datasets=False):
            raise ValueError(unknown) from error
        raise ValueError(
            f"data set {name!r} is not prepared in {where}: prepare it with "
            f"{prepare_command(name, data_dir)}"
        ) from error
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise ValueError(
            f"data set {name!r} has features, such as sounds, that need TensorFlow to be read: "
            "'pip install robustjax[tfds]'"
        ) from error

    formats = sorted(f.value for f in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(
            f"data set {name!r} in {builder.data_dir} must have the format array_record, "
            f"got {', '.join(formats)}: prepare it in another data_dir with "
            f"{prepare_command(name, '/path/to/another')}"
        )
    return builder


def _of_length(source: Source, samples: int) -> Source:
    """A set of waveforms, cut or filled up to so many samples of 16 bits."""
    read = source.read

    def read_second(position: int) -> dict:
        example = read(position)
        wave = np.asarray(example["image"]).reshape(-1, 1)[:samples]
        if wave.dtype != np.int16:  # version 0.0.2 of Speech Commands stores its 16 bits in 64
            short = wave.astype(np.int16)
            if not np.array_equal(short, wave):
                raise ValueError(f"{source.name} must hold sound of 16 bits, got {wave.dtype}")
            wave = short
        filled = np.zeros((samples, 1), np.int16)
        filled[: len(wave)] = wave
        return {**example, "image": filled}

    return dataclasses.replace(source, read=read_second)


def _source(
    builder: Any, split: str, image_key: str, label_key: str, num_classes: int, name: str
) -> Source:
    import tensorflow_datasets as tfds

    examples = builder.as_data_source(split, file_format="array_record")
    undecoded = builder.as_data_source(
        split, file_format="array_record", decoders={image_key: tfds.decode.SkipDecoding()}
    )

    def read(i: int) -> dict:
        example = examples[i]
        return {"image": example[image_key], "label": np.int32(example[label_key])}

    def read_labels(positions: np.ndarray) -> np.ndarray:
        chunks = np.split(positions, range(_LABEL_CHUNK, len(positions), _LABEL_CHUNK))
        return np.asarray(
            [e[label_key] for c in chunks for e in undecoded.__getitems__(c.tolist())],
            dtype=np.int32,
        )

    return Source(read, read_labels, np.arange(len(examples)), num_classes, name)
