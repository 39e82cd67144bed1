"""Floating-point operations of a function, counted from its traced program without running it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(fn: Callable, *args: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions that ``fn`` makes.

    Nothing is computed or allocated: the arguments may be ``jax.ShapeDtypeStruct``. Loop bodies
    count as often as they run (``scan``; a ``while_loop`` of unknown length counts once), the
    costliest branch of a ``cond`` counts. Element-wise work is left out; in networks it is a few
    per cent. A product of ``(m, k)`` and ``(k, n)`` has ``2 m k n`` operations.

    Args:
      fn: any traceable function.
      *args: its arguments, arrays or shapes.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name.startswith("canonical_conv"):
        # The library's own primitives: count the convolution that each stands for.
        written = functools.partial(equation.primitive.plain, **params)
        return count_flops(written, *(v.aval for v in equation.invars))
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    return sum(_count(jaxpr) for jaxpr in inner_programs(params))


def _convolution(equation: core.JaxprEqn) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    output = equation.outvars[0].aval
    inputs = equation.invars[0].aval.shape
    taps = 1
    for axis, (low, high) in enumerate(params["padding"]):
        taps *= _real_taps(
            inputs[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            output.shape[numbers.out_spec[2 + axis]],
            params["window_strides"][axis],
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
            (low, high),
        )
    spatial = math.prod(output.shape[i] for i in numbers.out_spec[2:])
    channels = kernel[numbers.rhs_spec[1]]
    return 2 * (output.size // spatial) * taps * channels


def _real_taps(size, kernel, positions, stride, dilation, spacing, padding) -> int:
    """Pairs of output position and kernel tap that fall on data, not on padding or dilation."""
    length = (size - 1) * dilation + 1
    return sum(
        1
        for position in range(positions)
        for tap in range(kernel)
        if 0 <= (at := position * stride + tap * spacing - padding[0]) < length
        and at % dilation == 0
    )


def inner_programs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs inside an equation: of jit, custom derivatives, remat, shard_map and so on."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
