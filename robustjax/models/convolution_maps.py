"""The three maps that a convolution and its derivatives are made of, as XLA programs.

``canonical`` says whether axes are put into the order ``NHWC``, ``HWIO`` by transposing the arrays,
or by relabelling them, which is what autodiff does. On a CPU the first is faster inside loops; what
else is written otherwise there than autodiff writes it is written here, too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

IMAGES, KERNELS = "NHWC", "HWIO"


class Geometry(NamedTuple):
    """What the shapes of two of ``x``, ``w``, ``g`` do not tell about the third."""

    input_size: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    precision: Any


def forward(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "i j c d"],
    geometry: Geometry,
    canonical: bool,
) -> Float[Array, "n p q d"]:
    """The convolution ``C(x, w)``."""
    rows, columns, channels, _ = kernel.shape
    if canonical and channels == 1 and rows * columns <= _FEW_TAPS:
        return _forward_by_taps(x, kernel, geometry)
    return _convolve(
        x,
        kernel,
        (IMAGES, KERNELS, IMAGES),
        canonical,
        window_strides=geometry.strides,
        padding=geometry.padding,
        precision=geometry.precision,
    )


def input_gradient(
    g: Float[Array, "n p q d"],
    kernel: Float[Array, "i j c d"],
    geometry: Geometry,
    canonical: bool,
) -> Float[Array, "n h w c"]:
    """The gradient for the input, ``X(g, w)``."""
    rows, columns, channels, _ = kernel.shape
    if canonical and (channels <= 2 or (channels == 3 and rows * columns <= _FEW_TAPS)):
        return _input_gradient_by_taps(g, kernel, geometry)
    padding = [
        (k - 1 - low, h - _extent(n, s) + low) for h, k, n, s, low in _each_axis(g, geometry)
    ]
    return _convolve(
        g,
        jnp.flip(kernel, (0, 1)),
        (IMAGES, "HWOI", IMAGES),
        canonical,
        window_strides=(1, 1),
        padding=padding,
        lhs_dilation=geometry.strides,
        precision=geometry.precision,
    )


# XLA:CPU's convolution is slow where the images have one to three channels. The product of all taps
# of the kernel with all positions is two to four times as fast there. It holds all these products:
# forward for one channel, and back to three, only up to so many taps are worth it.
_FEW_TAPS = 16


def _forward_by_taps(
    x: Float[Array, "n h w c"], kernel: Float[Array, "i j c d"], geometry: Geometry
) -> Float[Array, "n p q d"]:
    """The convolution as one matrix product, of the patches of the images with the kernel."""
    margins = [(0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), margins)
    (s, t), (rows, columns) = geometry.strides, kernel.shape[:2]
    p, q = max((x.shape[1] - rows) // s + 1, 0), max((x.shape[2] - columns) // t + 1, 0)
    patches = [
        x[:, i : i + p * s : s, j : j + q * t : t][:, :p, :q]
        for i in range(rows)
        for j in range(columns)
    ]
    taps = kernel.reshape(-1, kernel.shape[3])
    return jnp.matmul(jnp.concatenate(patches, axis=-1), taps, precision=geometry.precision)


def _input_gradient_by_taps(
    g: Float[Array, "n p q d"], kernel: Float[Array, "i j c d"], geometry: Geometry
) -> Float[Array, "n h w c"]:
    """One matrix product for the share of every tap, then their sum at each pixel.

    The pixels whose row and column leave the same remainders when divided by the strides get the
    taps that leave these remainders, each moved by whole steps: the sums are of shifted arrays,
    and interleaved at the end.
    """
    n, p, q, _ = g.shape
    (s, t), (rows, columns, c, _) = geometry.strides, kernel.shape
    shares = jnp.einsum("npqd,ijcd->npqijc", g, kernel, precision=geometry.precision)
    height, width = p + (rows - 1) // s, q + (columns - 1) // t

    def pixels(a: int, b: int) -> Array:
        total = jnp.zeros((n, height, width, c), g.dtype)
        for i in range(a, rows, s):
            for j in range(b, columns, t):
                down, right = i // s, j // t
                margins = ((0, 0), (down, height - p - down), (right, width - q - right), (0, 0))
                total += jnp.pad(shares[:, :, :, i, j], margins)
        return total

    lines = [jnp.stack([pixels(a, b) for b in range(t)], axis=3) for a in range(s)]
    image = jnp.stack(lines, axis=2).reshape(n, height * s, width * t, c)
    (top, _), (left, _) = geometry.padding
    h, w = geometry.input_size
    crop = [(0, 0, 0), (-top, h + top - height * s, 0), (-left, w + left - width * t, 0), (0, 0, 0)]
    return jax.lax.pad(image, jnp.zeros((), g.dtype), crop)


def kernel_gradient(
    x: Float[Array, "n h w c"], g: Float[Array, "n p q d"], geometry: Geometry, canonical: bool
) -> Float[Array, "i j c d"]:
    """The gradient for the kernel, ``W(x, g)``."""
    padding = [
        (low, k - 1 + _extent(n, s) - h - low) for h, k, n, s, low in _each_axis(g, geometry)
    ]
    return _convolve(
        x,
        g,
        ("CHWN", "IHWO", "HWNC"),
        canonical,
        window_strides=(1, 1),
        padding=padding,
        rhs_dilation=geometry.strides,
        precision=geometry.precision,
    )


def _each_axis(g: Array, geometry: Geometry) -> list[tuple[int, int, int, int, int]]:
    """Sizes of the image, the kernel and the result, stride and padding before, of both axes."""
    before = [low for low, _ in geometry.padding]
    sizes = (geometry.input_size, geometry.kernel_size, g.shape[1:3], geometry.strides, before)
    return list(zip(*sizes, strict=True))


def _extent(positions: int, stride: int) -> int:
    """Input positions from the first application of the kernel to the last."""
    return (positions - 1) * stride + 1


def _convolve(
    lhs: Array,
    rhs: Array,
    axes: tuple[str, str, str],
    canonical: bool,
    *,
    window_strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: tuple[int, int] = (1, 1),
    rhs_dilation: tuple[int, int] = (1, 1),
    precision: Any,
) -> Array:
    if not canonical:
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers=axes,
            precision=precision,
        )
    lhs = lhs.transpose([axes[0].index(axis) for axis in IMAGES])
    rhs = rhs.transpose([axes[1].index(axis) for axis in KERNELS])
    if _leaves_cores_idle(lhs, rhs, lhs_dilation, padding[0]):
        # Rows of zeros between the rows of both, and steps twice as long: the same sums, which
        # XLA's other convolution skips the zeros of.
        window_strides = (2 * window_strides[0], window_strides[1])
        padding = ((2 * padding[0][0], 2 * padding[0][1]), padding[1])
        lhs_dilation, rhs_dilation = (2, 1), (2 * rhs_dilation[0], rhs_dilation[1])
    out = jax.lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers=(IMAGES, KERNELS, IMAGES),
        precision=precision,
    )
    return out.transpose([IMAGES.index(axis) for axis in axes[2]])


# XLA:CPU (jaxlib 0.10) gives convolutions of more than 16 channels without dilated images to
# YNNPACK, which puts one core to work up to about 96 channels, and the others to Eigen, which uses
# all. With two cores Eigen takes 0.5 to 0.7 times as long there, and as long as YNNPACK beyond;
# with a few channels, as of images, it is the slower one.
_EIGEN_CHANNELS = 16


def _leaves_cores_idle(
    lhs: Array, rhs: Array, lhs_dilation: tuple[int, int], padding: tuple[int, int]
) -> bool:
    channels = (rhs.shape[2], rhs.shape[3])
    return (
        lhs_dilation == (1, 1)
        and lhs.shape[1] + sum(padding) > 0
        and rhs.shape[0] > 0
        and min(channels) >= _EIGEN_CHANNELS
        and max(channels) > _EIGEN_CHANNELS
    )
