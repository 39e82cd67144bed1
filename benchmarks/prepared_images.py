"""Prepares a set of TensorFlow Datasets whose images are drawn at random, in ``array_record``.

``python -m benchmarks.prepared_images DATA_DIR NUMBER SIDE`` needs TensorFlow, as preparing any set
does; nothing is downloaded. The set is called ``drawn_images``.
"""

import sys

import numpy as np

NAME = "drawn_images"
NUM_CLASSES = 10


def images(number: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth random images ``(number, side, side, 3)`` uint8, which compress as photographs do.

    Noise of a fourth of the resolution, enlarged, and a little noise of each pixel's own.
    """
    draw = np.random.default_rng(seed)
    coarse = draw.integers(32, 224, (number, -(-side // 4), -(-side // 4), 3))
    fine = draw.integers(-8, 9, (number, side, side, 3))
    return (coarse.repeat(4, 1).repeat(4, 2)[:, :side, :side] + fine).astype(np.uint8)


def main(data_dir: str, number: str, side: str) -> None:
    """Prepares ``number`` training images and as few of a test set as there can be."""
    import tensorflow_datasets as tfds

    class DrawnImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(int(side), int(side), 3)),
                "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(int(number), 0),
                    "test": self._generate_examples(1, 1)}  # fmt: skip

        def _generate_examples(self, count, seed):
            for i, image in enumerate(images(count, int(side), seed)):
                yield i, {"image": image, "label": i % NUM_CLASSES}

    tfds.disable_progress_bar()
    builder = tfds.builder(NAME, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()


if __name__ == "__main__":
    main(*sys.argv[1:])
