"""Images of any size to squares of one: on the host, an example at a time, for ``host_batches``.

``center_crop`` is a ``transform`` for evaluation, ``random_resized_crop`` a ``random_transform``
for training; both take and give ``{"image": (h, w, c) uint8, "label": ...}``. ``mapped`` puts a
transform in front of a data set.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from robustjax import checks
from robustjax.data.dataset import Dataset, Example, Source


def center_crop(size: int, *, share: float = 0.875) -> Callable[[Example], Example]:
    """The central square that has ``share`` of the shorter side, scaled to ``size`` pixels.

    Args:
      size: side of the result, ``>= 1``, in pixels.
      share: in ``(0, 1]``; 0.875 is the 224 of 256 pixels of ImageNet's usual evaluation.
    """
    checks.integer("size", size, at_least=1)
    checks.number("share", share, above=0, at_most=1)

    def transform(example: Example) -> Example:
        image = _checked(example["image"])
        height, width = image.shape[:2]
        side = max(round(share * min(height, width)), 1)
        box = ((width - side) // 2, (height - side) // 2)
        return {**example, "image": _scaled(image, *box, side, side, size)}

    return transform


def random_resized_crop(
    size: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Callable[[Example, np.random.Generator], Example]:
    """A random rectangle of the image, scaled to a square, and with probability 1/2 mirrored.

    Args:
      size: side of the result, ``>= 1``, in pixels.
      area: smallest and largest share of the image's area, in ``(0, 1]``, uniform between.
      aspect: smallest and largest width over height, ``> 0``, uniform between on a logarithmic
        scale. After ten rectangles that do not fit into the image, the central square is taken.
      flip: mirror left and right.

    Source: Szegedy et al. (2015), "Going deeper with convolutions", section 6.
    """
    checks.integer("size", size, at_least=1)
    for name, (low, high), top in (("area", area, 1.0), ("aspect", aspect, math.inf)):
        checks.number(name, low, above=0)
        checks.number(name, high, at_least=low, at_most=top)

    def transform(example: Example, random: np.random.Generator) -> Example:
        image = _checked(example["image"])
        height, width = image.shape[:2]
        crop = None
        for _ in range(10):
            surface = random.uniform(*area) * height * width
            ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
            w, h = round(math.sqrt(surface * ratio)), round(math.sqrt(surface / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                left, top = random.integers(width - w + 1), random.integers(height - h + 1)
                crop = (int(left), int(top), w, h)
                break
        if crop is None:
            side = min(height, width)
            crop = ((width - side) // 2, (height - side) // 2, side, side)
        image = _scaled(image, *crop, size)
        if flip and random.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        return {**example, "image": image}

    return transform


def mapped(source: Dataset | Source, transform: Callable[[Example], Example]) -> Source:
    """The set whose examples have been through ``transform`` when they are read."""
    checks.function("transform", transform)
    if isinstance(source, Source):
        read = source.read
        return dataclasses.replace(source, read=lambda position: transform(read(position)))
    labels = source.label
    return Source(
        lambda position: transform(source[position]),
        lambda positions: labels[positions],
        np.arange(len(source)),
        source.num_classes,
        source.name,
    )


def _checked(image: np.ndarray) -> UInt8[np.ndarray, "h w c"]:
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] not in (1, 3):
        raise ValueError(
            "image must be (h, w, 1) or (h, w, 3) of uint8, "
            f"got {image.dtype} of shape {image.shape}"
        )
    return image


def _scaled(
    image: np.ndarray, left: int, top: int, width: int, height: int, size: int
) -> UInt8[np.ndarray, "size size c"]:
    """A rectangle of the image as a square, by bilinear interpolation with antialiasing."""
    part = image[top : top + height, left : left + width]
    if part.shape[:2] == (size, size):
        return np.ascontiguousarray(part)
    from PIL import Image  # most runs scale nothing, and start without it

    grey = image.shape[2] == 1
    scaled = Image.fromarray(part[..., 0] if grey else part).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    out = np.asarray(scaled)
    return out[..., None] if grey else out
