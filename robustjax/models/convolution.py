"""Convolution whose derivatives XLA:CPU runs at full speed inside loops.

XLA:CPU has a fast convolution for images ``NHWC`` with kernels ``HWIO``. The derivatives that
autodiff writes are convolutions with other axis orders; XLA rewrites them into the fast order, but
not inside the body of a ``lax.scan`` or ``lax.while_loop`` (jax issue 12868), where an attack runs
3 to 30 times slower for it. ``canonical_conv`` has the values of ``jax.lax.conv_general_dilated``,
and derivatives in which the axes are put in the fast order by explicit transposes.

A convolution ``C(x, w)`` is bilinear, so its derivatives are too: the trilinear form
``<C(x, w), g>`` has the three partial maps

- ``C(x, w)``, the convolution,
- ``X(g, w)``, the gradient for the input: ``g`` with ``stride - 1`` zeros between its entries,
  convolved with the flipped kernel, its input and output channels exchanged,
- ``W(x, g)``, the gradient for the kernel: ``x`` convolved with ``g`` as a kernel with
  ``stride - 1`` zeros between its entries, channels and examples exchanged,

and the transposes of each one are the other two. They are three JAX primitives with these rules
and nothing else, so every mode of differentiation works to any order (``grad``, ``jvp``,
forward-over-reverse, reverse-over-reverse), and what comes out is again one of the three.

On other platforms the same three maps are lowered with the axis orders that autodiff writes,
because their compilers put them in order everywhere and recognise a gradient by them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Shaped

_IMAGES, _KERNELS = "NHWC", "HWIO"


class _Geometry(NamedTuple):
    """What the shapes of two of ``x``, ``w``, ``g`` do not tell about the third."""

    input_size: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    precision: Any


def canonical_conv(
    lhs: Shaped[Array, "..."],
    rhs: Shaped[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> Shaped[Array, "..."]:
    """``jax.lax.conv_general_dilated`` with derivatives that are fast inside loops on CPU.

    Takes its place anywhere, for example ``flax.nnx.Conv(conv_general_dilated=canonical_conv)``.

    Covered are two-dimensional convolutions of ``NHWC`` images with ``HWIO`` kernels of the same
    floating dtype: any strides, sizes and padding. Dilations, groups, other axis orders,
    ``preferred_element_type`` and operands or outputs sharded over an *explicit* mesh axis outside
    ``jax.shard_map`` are not: they are handed to ``jax.lax.conv_general_dilated`` as they are.
    ``vmap`` over examples stays covered; ``vmap`` over kernels gives the right values and
    derivatives at the speed of the plain convolution.

    Args:
      lhs: images ``(n, h, w, c_in)``.
      rhs: kernels ``(k_h, k_w, c_in, c_out)``.
      window_strides: two integers >= 1.
      padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"`` or two pairs ``(low, high)``.
      lhs_dilation: ``None`` or ones to be covered.
      rhs_dilation: ``None`` or ones to be covered.
      dimension_numbers: ``("NHWC", "HWIO", "NHWC")``, or its equal, to be covered.
      feature_group_count: 1 to be covered.
      batch_group_count: 1 to be covered.
      precision: as in ``jax.lax.conv_general_dilated``; applies to the derivatives too.
      preferred_element_type: ``None`` to be covered.
      out_sharding: ``None`` to be covered.

    Returns:
      Images ``(n, h', w', c_out)`` of the operands' dtype.

    Raises:
      ValueError: the channels of ``lhs`` and ``rhs`` differ.
    """
    covered = (
        lhs.ndim == rhs.ndim == 4
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and _all_ones(lhs_dilation)
        and _all_ones(rhs_dilation)
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and out_sharding is None
        and _has_canonical_axes(lhs, rhs, dimension_numbers)
        and not _explicitly_sharded(lhs)
        and not _explicitly_sharded(rhs)
    )
    if not covered:
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
            out_sharding,
        )
    if lhs.shape[3] != rhs.shape[2]:
        raise ValueError(f"rhs must have {lhs.shape[3]} input channels, got {rhs.shape[2]}")
    strides = tuple(int(s) for s in window_strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    if precision is None:  # read here: the context may have ended when the primitive is lowered
        precision = jax.config.jax_default_matmul_precision
    geometry = _Geometry(
        input_size=lhs.shape[1:3],
        kernel_size=rhs.shape[:2],
        strides=strides,
        padding=tuple((int(low), int(high)) for low, high in padding),
        precision=precision,
    )
    lhs, rhs = _vary_alike(lhs, rhs)
    return _conv_p.bind(lhs, rhs, geometry=geometry)


def _all_ones(dilation: Sequence[int] | None) -> bool:
    return dilation is None or all(d == 1 for d in dilation)


def _has_canonical_axes(lhs: Array, rhs: Array, dimension_numbers: Any) -> bool:
    numbers = partial(jax.lax.conv_dimension_numbers, lhs.shape, rhs.shape)
    return numbers(dimension_numbers) == numbers((_IMAGES, _KERNELS, _IMAGES))


def _explicitly_sharded(x: Array) -> bool:
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _vary_alike(x: Array, w: Array) -> tuple[Array, Array]:
    """Casts both operands to vary over the union of their mapped axes, as JAX's own operators do.

    The transpose of the cast sums over the devices: inside ``jax.shard_map``, the gradient of
    parameters that all devices share.
    """
    of_x, of_w = (jax.typeof(v).manual_axis_type.varying for v in (x, w))
    if of_w - of_x:
        x = jax.lax.pcast(x, tuple(of_w - of_x), to="varying")
    if of_x - of_w:
        w = jax.lax.pcast(w, tuple(of_x - of_w), to="varying")
    return x, w


# The three maps. `canonical` says whether axes are put in order by transposing the arrays, or by
# relabelling them, which is what autodiff does.


def _forward(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "i j c d"],
    geometry: _Geometry,
    canonical: bool,
) -> Float[Array, "n p q d"]:
    rows, columns, channels, _ = kernel.shape
    if canonical and channels == 1 and rows * columns <= _FEW_TAPS:
        return _forward_by_taps(x, kernel, geometry)
    return _convolve(
        x,
        kernel,
        (_IMAGES, _KERNELS, _IMAGES),
        canonical,
        window_strides=geometry.strides,
        padding=geometry.padding,
        precision=geometry.precision,
    )


def _input_gradient(
    g: Float[Array, "n p q d"],
    kernel: Float[Array, "i j c d"],
    geometry: _Geometry,
    canonical: bool,
) -> Float[Array, "n h w c"]:
    rows, columns, channels, _ = kernel.shape
    if canonical and (channels <= 2 or (channels == 3 and rows * columns <= _FEW_TAPS)):
        return _input_gradient_by_taps(g, kernel, geometry)
    padding = [
        (k - 1 - low, h - _extent(n, s) + low)
        for h, k, n, s, (low, _) in zip(
            geometry.input_size,
            geometry.kernel_size,
            g.shape[1:3],
            geometry.strides,
            geometry.padding,
            strict=True,
        )
    ]
    return _convolve(
        g,
        jnp.flip(kernel, (0, 1)),
        (_IMAGES, "HWOI", _IMAGES),
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
    x: Float[Array, "n h w c"], kernel: Float[Array, "i j c d"], geometry: _Geometry
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
    g: Float[Array, "n p q d"], kernel: Float[Array, "i j c d"], geometry: _Geometry
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


def _kernel_gradient(
    x: Float[Array, "n h w c"], g: Float[Array, "n p q d"], geometry: _Geometry, canonical: bool
) -> Float[Array, "i j c d"]:
    padding = [
        (low, k - 1 + _extent(n, s) - h - low)
        for h, k, n, s, (low, _) in zip(
            geometry.input_size,
            geometry.kernel_size,
            g.shape[1:3],
            geometry.strides,
            geometry.padding,
            strict=True,
        )
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
    lhs = lhs.transpose([axes[0].index(axis) for axis in _IMAGES])
    rhs = rhs.transpose([axes[1].index(axis) for axis in _KERNELS])
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
        dimension_numbers=(_IMAGES, _KERNELS, _IMAGES),
        precision=precision,
    )
    return out.transpose([_IMAGES.index(axis) for axis in axes[2]])


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


def _primitive(
    name: str, bilinear_map: Callable[..., Array], *, merges_examples: bool
) -> Primitive:
    """A primitive that is one of the three maps; its transposes are defined below.

    ``merges_examples``: the first operand and the result have the examples as their first axis.
    """
    primitive = Primitive(name)

    def implementation(lhs: Array, rhs: Array, *, geometry: _Geometry) -> Array:
        with jax.named_scope(name):  # by which a profile tells the three apart
            return jax.lax.platform_dependent(
                lhs,
                rhs,
                cpu=partial(bilinear_map, geometry=geometry, canonical=True),
                default=partial(bilinear_map, geometry=geometry, canonical=False),
            )

    def abstract(lhs: Any, rhs: Any, *, geometry: _Geometry) -> Any:
        shapes = (jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (lhs, rhs))
        result = jax.eval_shape(partial(bilinear_map, geometry=geometry, canonical=False), *shapes)
        return lhs.update(shape=result.shape, dtype=result.dtype, weak_type=False)

    def batch(operands: Sequence[Array], axes: Sequence[int | None], *, geometry: _Geometry) -> Any:
        lhs, rhs = operands
        if merges_examples and axes[1] is None:
            lhs = jnp.moveaxis(lhs, axes[0], 0)
            merged = lhs.reshape(lhs.shape[0] * lhs.shape[1], *lhs.shape[2:])
            out = primitive.bind(merged, rhs, geometry=geometry)
            return out.reshape(*lhs.shape[:2], *out.shape[1:]), 0
        return jax.vmap(partial(implementation, geometry=geometry), axes)(lhs, rhs), 0

    primitive.def_impl(implementation)
    primitive.plain = partial(bilinear_map, canonical=False)  # one convolution, for counting
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    return primitive


_conv_p = _primitive("canonical_conv", _forward, merges_examples=True)
_input_gradient_p = _primitive(
    "canonical_conv_input_gradient", _input_gradient, merges_examples=True
)
_kernel_gradient_p = _primitive(
    "canonical_conv_kernel_gradient", _kernel_gradient, merges_examples=False
)

# ad.defbilinear(map(a, b), cotangent to a, cotangent to b)
ad.defbilinear(
    _conv_p,
    lambda g, x, w, **geometry: _input_gradient_p.bind(g, w, **geometry),
    lambda g, x, w, **geometry: _kernel_gradient_p.bind(x, g, **geometry),
)
ad.defbilinear(
    _input_gradient_p,
    lambda x, g, w, **geometry: _conv_p.bind(x, w, **geometry),
    lambda x, g, w, **geometry: _kernel_gradient_p.bind(x, g, **geometry),
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda w, x, g, **geometry: _input_gradient_p.bind(g, w, **geometry),
    lambda w, x, g, **geometry: _conv_p.bind(x, w, **geometry),
)
