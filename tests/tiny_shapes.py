"""TensorFlow Datasets builders whose data are a formula: images of 8x8x3 in 3 classes.

``python tiny_shapes.py DATA_DIR`` prepares them, as any other set is prepared:

tiny_shapes   40 training and 20 test images; once more as tfrecord, in ``DATA_DIR/records``
tiny_contest  the same with the test split called validation, and a test split without labels (-1)
tiny_words    texts, not images
tiny_sounds   sounds of 6 to 14 samples of 16 bits, 10 of them a second

The sounds are also read here, by ``robustjax.data``, because that needs TensorFlow; what it gives
goes to ``DATA_DIR/tiny_sounds.npz``.
"""

import sys

import numpy as np


def examples(split):
    """Images and labels of a split, in the order of their ``number``."""
    n, offset = {"train": (40, 0), "test": (20, 100)}[split]
    i, h, w, c = np.ogrid[:n, :8, :8, :3]
    image = (offset + 37 * i + 11 * h + 5 * w + 83 * c) % 256
    return image.astype(np.uint8), np.arange(n) % 3


def sounds(split):
    """Sounds of unequal lengths, and labels, of a split."""
    n, offset = {"train": (9, 0), "test": (6, 100)}[split]
    return [
        (np.arange(6 + i % 9) * 977 - 4000 * i + offset).astype(np.int16) for i in range(n)
    ], np.arange(n) % 3


def main(data_dir):
    import tensorflow_datasets as tfds

    class TinyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
                "number": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split, labelled=True):
            for i, (image, label) in enumerate(zip(*examples(split), strict=True)):
                yield i, {"image": image, "label": int(label) if labelled else -1, "number": i}

    class TinyContest(TinyShapes):
        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples("train"),
                "validation": self._generate_examples("test"),
                "test": self._generate_examples("train", labelled=False),
            }

    class TinyWords(TinyShapes):
        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _generate_examples(self, split):
            for i in range(3):
                yield i, {"text": split, "label": i}

    class TinySounds(TinyShapes):
        def _info(self):
            features = {
                "audio": tfds.features.Audio(sample_rate=10, dtype=np.int16),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("audio", "label"),
            )

        def _generate_examples(self, split):
            for i, (audio, label) in enumerate(zip(*sounds(split), strict=True)):
                yield i, {"audio": audio, "label": int(label)}

    tfds.disable_progress_bar()

    # As in the command that robustjax.data.tfds gives for a set that is not prepared.
    def prepare(name, data_dir, file_format):
        tfds.builder(name, data_dir=data_dir, file_format=file_format).download_and_prepare()

    for name in ("tiny_shapes", "tiny_contest", "tiny_words", "tiny_sounds"):
        prepare(name, data_dir, "array_record")
    prepare("tiny_shapes", f"{data_dir}/records", "tfrecord")

    from robustjax import data

    read = {}
    for split in ("train", "test"):
        found = data.load("tiny_sounds", split, data_dir=data_dir, validation_size=0)
        read |= {f"x_{split}": found.image, f"y_{split}": found.label}
    np.savez(f"{data_dir}/tiny_sounds.npz", **read, num_classes=found.num_classes)


if __name__ == "__main__":
    main(*sys.argv[1:])
