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
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Shaped

from robustjax.models.convolution_maps import (
    IMAGES,
    KERNELS,
    Geometry,
    forward,
    input_gradient,
    kernel_gradient,
)


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
    geometry = Geometry(
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
    return numbers(dimension_numbers) == numbers((IMAGES, KERNELS, IMAGES))


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


def _primitive(
    name: str, bilinear_map: Callable[..., Array], *, merges_examples: bool
) -> Primitive:
    """A primitive that is one of the three maps; its transposes are defined below.

    ``merges_examples``: the first operand and the result have the examples as their first axis.
    """
    primitive = Primitive(name)

    def implementation(lhs: Array, rhs: Array, *, geometry: Geometry) -> Array:
        with jax.named_scope(name):  # by which a profile tells the three apart
            return jax.lax.platform_dependent(
                lhs,
                rhs,
                cpu=partial(bilinear_map, geometry=geometry, canonical=True),
                default=partial(bilinear_map, geometry=geometry, canonical=False),
            )

    def abstract(lhs: Any, rhs: Any, *, geometry: Geometry) -> Any:
        shapes = (jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (lhs, rhs))
        result = jax.eval_shape(partial(bilinear_map, geometry=geometry, canonical=False), *shapes)
        return lhs.update(shape=result.shape, dtype=result.dtype, weak_type=False)

    def batch(operands: Sequence[Array], axes: Sequence[int | None], *, geometry: Geometry) -> Any:
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


_conv_p = _primitive("canonical_conv", forward, merges_examples=True)
_input_gradient_p = _primitive(
    "canonical_conv_input_gradient", input_gradient, merges_examples=True
)
_kernel_gradient_p = _primitive(
    "canonical_conv_kernel_gradient", kernel_gradient, merges_examples=False
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
