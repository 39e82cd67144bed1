"""What a labelled set is: arrays in memory, or a source that reads one example at a time.

``Dataset`` holds a set that fits in memory; ``Source`` reads examples when asked, for sets that do
not. Both have a length, give ``{"image", "label"}`` for an index, and can be cut into parts, so
the host pipeline and the hold-out of a validation set take either.

Examples are images ``(h, w, c)`` or waveforms ``(samples, 1)``. What they are tells where they
lie: images in [0, 1], waveforms in [-1, 1] (``bounds``). Stored as integers, uint8 and int16, they
get there by ``as_float``. Either way their name in an example is "image".
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, Int16, Int32, UInt8

from robustjax import checks

Images = UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"]
Waveforms = Int16[np.ndarray, "n t 1"] | Float32[np.ndarray, "n t 1"]
Example = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images or waveforms in host memory, checked when they are made.

    Attributes:
      image: ``(n, h, w, c)``; uint8 in 0 .. 255, or float32 in [0, 1]. Of waveforms ``(n, samples,
        1)``; int16, or float32 in [-1, 1]. ``as_float`` maps the first to the second.
      label: ``(n,)`` int32 in ``0 .. num_classes - 1``.
      num_classes: Number of classes.
      name: Name of the data set.

    Raises:
      ValueError: Wrong shape, dtype, range or label, or no example at all.
    """

    image: Images | Waveforms
    label: Int32[np.ndarray, " n"]
    num_classes: int
    name: str

    def __post_init__(self):
        check_arrays("image", self.image, "label", self.label, num_classes=self.num_classes)
        if self.label.dtype != np.int32:
            raise ValueError(f"label must be int32, got {self.label.dtype}")

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, i: int | np.integer) -> Example:
        """Example ``i``: ``{"image": (h, w, c), "label": ()}``."""
        return {"image": self.image[i], "label": self.label[i]}

    def labels(self) -> Int32[np.ndarray, " n"]:
        """All labels."""
        return self.label

    def subset(self, indices: Int[np.ndarray, " m"]) -> "Dataset":
        """The examples at ``indices``, in that order."""
        return dataclasses.replace(self, image=self.image[indices], label=self.label[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Labelled examples that are read when they are asked for (``source[i]``), for large sets.

    Attributes:
      read: ``read(position)`` gives ``{"image": (h, w, c) array, "label": int32}``. Images may
        differ in size from example to example.
      read_labels: ``read_labels(positions)`` gives their labels without decoding images.
      positions: ``(n,)`` where the source's examples are; ``subset`` changes only these.
      num_classes: Number of classes.
      name: Name of the data set.
    """

    read: Callable[[int], Example]
    read_labels: Callable[[np.ndarray], np.ndarray]
    positions: Int[np.ndarray, " n"]
    num_classes: int
    name: str

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int | np.integer) -> Example:
        """Example ``i``: ``{"image": (h, w, c), "label": ()}``."""
        return self.read(int(self.positions[i]))

    def labels(self) -> Int32[np.ndarray, " n"]:
        """All labels: one pass over the files, in which no image is decoded."""
        return np.asarray(self.read_labels(self.positions), dtype=np.int32)

    def subset(self, indices: Int[np.ndarray, " m"]) -> "Source":
        """The examples at ``indices``, in that order; reads nothing."""
        return dataclasses.replace(self, positions=self.positions[indices])


def bounds(shape: Sequence[int]) -> tuple[float, float]:
    """Where examples lie: images ``(h, w, c)`` in [0, 1], waveforms ``(samples, 1)`` in [-1, 1].

    Args:
      shape: of one example.

    Raises:
      ValueError: It is neither.
    """
    if len(shape) != 3 and (len(shape) != 2 or shape[1] != 1):
        raise ValueError(f"shape must be (h, w, c) or (samples, 1), got {tuple(shape)}")
    return (0.0, 1.0) if len(shape) == 3 else (-1.0, 1.0)


def as_float(images: Any) -> Any:
    """Images in [0, 1] and waveforms in [-1, 1]: uint8 over 255, int16 over 32768, floats pass.

    Multiplies by float32(1/255), which XLA makes of the division anyway, so that NumPy and JAX
    arrays, inside ``jit`` and outside, agree to the last bit; 255 maps to exactly 1.

    Args:
      images: NumPy or JAX array of any shape; uint8 in 0 .. 255, int16, or floating.

    Returns:
      An array of the same kind: float32 for integers, otherwise ``images`` itself.

    Raises:
      ValueError: The dtype is neither uint8 nor int16 nor floating.
    """
    if images.dtype in _SCALES:
        return images.astype(np.float32) * _SCALES[images.dtype]
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8, int16 or floating-point, got {images.dtype}")
    return images


_SCALES = {np.dtype(np.uint8): np.float32(1 / 255), np.dtype(np.int16): np.float32(1 / 32768)}


def check_arrays(
    image_name: str, image: np.ndarray, label_name: str, label: np.ndarray, *, num_classes: int
) -> None:
    """Images ``(n, h, w, c)``, uint8 or float32 in [0, 1], with labels ``(n,)``; ``n >= 1``.

    Or waveforms ``(n, samples, 1)``, int16 or float32 in [-1, 1].

    Raises:
      ValueError: Naming the array, what it holds and what was expected.
    """
    checks.integer("num_classes", num_classes, at_least=1)
    images = image.ndim == 4 and image.dtype in (np.uint8, np.float32)
    waveforms = image.ndim == 3 and image.shape[2] == 1 and image.dtype in (np.int16, np.float32)
    if not images and not waveforms:
        raise ValueError(
            f"{image_name} must be uint8 or float32 of shape (n, h, w, c), or int16 or float32 of "
            f"shape (n, samples, 1), got {image.dtype}{image.shape}"
        )
    if image.size == 0:
        raise ValueError(f"{image_name} must hold at least one image, got shape {image.shape}")
    if image.dtype == np.float32:
        check_values(image_name, image)
    checks.labels(label_name, label, num_classes=num_classes)
    if len(label) != len(image):
        raise ValueError(
            f"{label_name} must have one entry per image, {len(image)}, got {len(label)}"
        )


def check_values(name: str, x: np.ndarray) -> None:
    """Concrete images ``(n, h, w, c)`` or waveforms ``(n, samples, 1)``, finite, within ``bounds``.

    Raises:
      ValueError: Naming what ``x`` holds and what was expected.
    """
    if np.ndim(x) != 3:
        checks.images(name, x)
        return
    lower, upper = bounds(x.shape[1:])
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name} must be floating-point in [{lower:g}, {upper:g}], got {x.dtype}")
    checks.in_box(name, x, lower=lower, upper=upper)


def stack_images(images: list[np.ndarray]) -> np.ndarray:
    """Images of one shape and dtype as one array.

    Raises:
      ValueError: The images differ in shape or dtype.
    """
    kinds = {(image.shape, image.dtype) for image in images}
    if len(kinds) > 1:
        listed = " and ".join(sorted(f"{dtype}{shape}" for shape, dtype in kinds)[:2])
        raise ValueError(
            f"images must have one shape and dtype to be stacked, got {listed}: "
            "read them with load_source and a transform that crops or resizes"
        )
    return np.stack(images)


def materialise(source: Source) -> Dataset:
    """Reads every example of a source into memory.

    Raises:
      ValueError: The images differ in size, or are not valid as a ``Dataset``.
    """
    examples = [source[i] for i in range(len(source))]
    image = stack_images([example["image"] for example in examples])
    label = np.asarray([example["label"] for example in examples], dtype=np.int32)
    return Dataset(image, label, source.num_classes, source.name)


def hold_out(
    label: Int[np.ndarray, " n"], size: int, *, seed: int = 0
) -> tuple[Int[np.ndarray, " rest"], Int[np.ndarray, " size"]]:
    """A stratified random hold-out: indices of what stays and of ``size`` held-out examples.

    Systematic sampling of the examples sorted by class, in random order within each class: the
    held-out count of every class is its exact proportion rounded down or up. The permutation comes
    from NumPy's legacy generator, whose stream is frozen, so a split is the same for ever.

    Args:
      label: ``(n,)`` class of each example.
      size: Number of examples to hold out, 1 .. n-1.
      seed: Seed of the permutation.

    Returns:
      Two disjoint arrays of indices, each ascending, that together cover ``0 .. n-1``.

    Raises:
      ValueError: ``size`` or ``seed`` out of range.
    """
    n = len(label)
    checks.integer("validation_size", size, at_least=1)
    if size >= n:
        raise ValueError(
            f"validation_size must be below the number of training examples, {n}, got {size}"
        )
    checks.integer("seed", seed, at_least=0, at_most=2**32 - 1)
    order = np.random.RandomState(seed).permutation(n)
    order = order[np.argsort(np.asarray(label)[order], kind="stable")]
    marks = np.arange(n + 1) * size // n
    held = marks[1:] > marks[:-1]
    return np.sort(order[~held]), np.sort(order[held])
