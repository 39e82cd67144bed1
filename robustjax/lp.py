"""The formulas of the l_p norms on ONE vector; ``norms`` lifts them to batches and pytrees.

A vector is a pytree where the formula needs nothing but sums (``norm``, ``steepest``) and a flat
array where it sorts or solves. Everything is computed in at least float32, and whatever is not
differentiable at zero has a finite derivative there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def dtype(v: Any) -> Any:
    """The common dtype of the leaves; float32 if there are none."""
    return jnp.result_type(*jax.tree.leaves(v)) if jax.tree.leaves(v) else jnp.dtype(jnp.float32)


def wide(dtype: Any) -> Any:
    """The dtype to compute in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def total(fn: Callable, v: Any) -> Float[Array, ""]:
    """The sum of ``fn(v_i)`` over the coordinates."""
    result = jnp.zeros((), wide(dtype(v)))
    for leaf in jax.tree.leaves(v):
        result += jnp.sum(fn(leaf.astype(result.dtype)))
    return result


def peak(v: Any) -> Float[Array, ""]:
    """``max |v_i|``, 0 for no coordinates."""
    result = jnp.zeros((), wide(dtype(v)))
    for leaf in jax.tree.leaves(v):
        result = jnp.maximum(result, jnp.max(magnitude(leaf), initial=0).astype(result.dtype))
    return result


def scale(v: Any, factor: Float[Array, ""]) -> Any:
    """``factor * v`` in the dtypes of ``v``."""
    return jax.tree.map(lambda leaf: (leaf.astype(factor.dtype) * factor).astype(leaf.dtype), v)


def magnitude(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``|x|`` with derivative 0 at 0, where that of ``jnp.abs`` is 1."""
    return jnp.sign(x) * x


def power(x: Float[Array, "..."], exponent: float) -> Float[Array, "..."]:
    """``x^exponent`` for ``x >= 0`` and ``exponent >= 0``, with derivative 0 at 0."""
    if exponent == 2:
        return jnp.square(x)
    if exponent == 0:
        return jnp.ones_like(x)
    zero = x == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, x) ** exponent)


def _unit_peak(v: Any) -> tuple[Any, Float[Array, ""]]:
    """``v / max |v_i|`` in the wide dtype, and the divisor (1 for v = 0).

    Powers of the result neither overflow nor underflow to a zero vector: the gradients of a
    confident model are as small as 1e-30. What is computed from the two does not depend on the
    divisor, which therefore needs no derivative.
    """
    divisor = jax.lax.stop_gradient(peak(v))
    usable = (divisor >= jnp.finfo(divisor.dtype).tiny) & jnp.isfinite(divisor)
    divisor = jnp.where(usable, divisor, 1)
    return jax.tree.map(lambda leaf: leaf.astype(divisor.dtype) / divisor, v), divisor


def norm(v: Any, p: float) -> Float[Array, ""]:
    """``(sum |v_i|^p)^(1/p)``, ``1 <= p < inf``."""
    v, divisor = _unit_peak(v)
    powers = total(lambda leaf: power(jnp.abs(leaf), p), v)
    zero = powers == 0
    powers = jnp.where(zero, 1, powers)
    return jnp.where(zero, 0, divisor * (jnp.sqrt(powers) if p == 2 else powers ** (1 / p)))


def steepest(g: Any, q: float) -> Any:
    """``|g|^(q-1) sign(g) / ||g||_q^(q-1)``, ``1 < q < inf``; 0 for g = 0."""
    u, _ = _unit_peak(g)
    powers = total(lambda leaf: power(jnp.abs(leaf), q), u)
    zero = powers == 0
    powers = jnp.where(zero, 1, powers)
    factor = 1 / (jnp.sqrt(powers) if q == 2 else powers ** (1 - 1 / q))
    factor = jnp.where(zero, 0, factor)
    if q != 2:
        u = jax.tree.map(lambda leaf: jnp.sign(leaf) * power(jnp.abs(leaf), q - 1), u)
    return jax.tree.map(lambda leaf, like: (leaf * factor).astype(like.dtype), u, g)


def first_peak(g: Float[Array, " d"]) -> Float[Array, " d"]:
    """``sign(g_i) e_i`` at the first i where ``|g_i|`` is largest; 0 for g = 0."""
    if g.size == 0:
        return g
    chosen = jnp.arange(g.size) == jnp.argmax(jnp.abs(g))
    return jnp.where(chosen, jnp.sign(g), 0)


def soft_threshold(v: Float[Array, " d"], level: Float[Array, ""]) -> Float[Array, " d"]:
    """``sign(v) max(|v| - level, 0)``."""
    return v - jnp.clip(v, -level, level)


def threshold(
    v: Float[Array, " d"], *, weight: ArrayLike = 1, offset: ArrayLike = 0, slope: ArrayLike = 0
) -> Float[Array, ""]:
    """The ``x >= 0`` with ``weight * sum (|v_i| - x)_+ = offset + slope * x``, or 0 if none is.

    With ``S_k`` the sum of the k largest entries, the left side is the largest of the lines
    ``weight (S_k - k x)``, so the root is the largest of the roots of these lines. ``offset`` alone
    is the level of the projection on the l_1 ball of that radius.

    Source: Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions"
    (2008), figure 1.
    """
    v = jnp.sort(jnp.abs(v), descending=True)
    count = jnp.arange(1, v.size + 1, dtype=v.dtype)
    return jnp.max((weight * jnp.cumsum(v) - offset) / (weight * count + slope), initial=0)


def into_ball(w: Float[Array, " d"], radius: ArrayLike, p: float) -> Float[Array, " d"]:
    """Removes the last rounding error by which a projection lies outside its ball."""
    size = jax.lax.stop_gradient(norm(w, p))
    outside = size > radius
    return w * jnp.where(outside, jax.lax.stop_gradient(radius) / jnp.where(outside, size, 1), 1)


def project(v: Float[Array, " d"], radius: Float[Array, ""], p: float) -> Float[Array, " d"]:
    """The projection on the l_p ball, ``1 < p < inf``, from its optimality condition.

    ``w + multiplier |w|^(p-1) sign(w) = v`` and ``||w||_p = radius``: ``shrink`` solves the first
    equation, and the second is solved for the multiplier.
    """

    # ||w||_p^(1-p) is nearly linear in the multiplier, as ||w||^-1 is for p = 2 in trust regions.
    def excess(multiplier, v):
        return norm(shrink(v, multiplier, p), p) ** (1 - p) - 1

    outside = (norm(v, p) > radius) & (radius > 0)
    u = jnp.where(outside, v / jnp.where(outside, radius, 1), 1)
    upper = norm(u, p / (p - 1))  # by Hölder: multiplier = ||u - w||_q
    w = shrink(u, _root(excess, 1e-12 * upper, upper, u), p)
    return jnp.where(radius > 0, jnp.where(outside, into_ball(w, 1, p) * radius, v), 0)


def prox_squared(v: Float[Array, " d"], t: Float[Array, ""], p: float) -> Float[Array, " d"]:
    """The prox of ``t/2 ||.||_p^2``, ``1 < p < inf``.

    It is ``u / s`` with ``||u||_p = 1`` and ``u + t |u|^(p-1) sign(u) = s v``.
    """

    def excess(log_s, v, t):
        return jnp.log(norm(shrink(v * jnp.exp(log_s), t, p), p))

    size = norm(v, p)
    zero = size == 0
    u = jnp.where(zero, 1, v / jnp.where(zero, 1, size))
    lower = -jnp.log(norm(u, p))
    upper = lower + jnp.log1p(t * max(1, u.size) ** max(0, 2 / p - 1))
    s = jnp.exp(_root(excess, lower, upper, u, t))
    return jnp.where(zero, 0, shrink(u * s, t, p) / s * size)


def project_box_l2(
    v: Float[Array, " d"], room: Float[Array, " d"], radius: Float[Array, ""]
) -> Float[Array, " d"]:
    """The projection on ``||w||_2 <= radius`` and ``|w_i| <= room_i``, sides as in ``v``.

    ``w`` is ``s |v|`` capped at the room. Its squared norm is concave and piecewise linear in
    ``s^2``, the smallest of the lines with the first k coordinates to meet their cap at the cap:
    ``s^2`` is the largest of the roots of these lines.
    """
    size = jnp.abs(v)
    room = jnp.minimum(room, size)
    order = jnp.argsort(room / jnp.where(size == 0, 1, size))
    capped = jnp.square(room[order])
    capped = jnp.cumsum(capped) - capped
    free = jnp.cumsum(jnp.square(size[order])[::-1])[::-1]
    empty = free == 0
    roots = jnp.where(empty, 0, (radius**2 - capped) / jnp.where(empty, 1, free))
    # Nothing but caps binds where the whole of them lies in the ball.
    s = jnp.where(norm(room, 2) <= radius, 1, power(jnp.clip(jnp.max(roots), 0, 1), 0.5))
    return _signed(v, jnp.minimum(s * size, room))


def project_box_l1(
    v: Float[Array, " d"], room: Float[Array, " d"], radius: Float[Array, ""]
) -> Float[Array, " d"]:
    """The projection on ``||w||_1 <= radius`` and ``|w_i| <= room_i``, sides as in ``v``.

    ``w`` is ``(|v| - level)_+`` capped at the room. Its norm falls linearly in the level between
    the points where a coordinate becomes zero, ``|v_i|``, or leaves its cap, ``|v_i| - room_i``.
    """
    size = jnp.abs(v)
    room = jnp.minimum(room, size)
    points = jnp.concatenate([size, size - room])
    order = jnp.argsort(points, descending=True)
    points, change = points[order], jnp.where(order < size.size, 1, -1)
    # Between points k and k+1 the norm is sums[k] - slopes[k] * level.
    slopes, sums = jnp.cumsum(change), jnp.cumsum(change * points)
    here = jnp.argmax(sums - slopes * points > radius)
    slope = jnp.maximum(slopes[here - 1], 1)
    level = jnp.where(jnp.sum(room) <= radius, 0, (sums[here - 1] - radius) / slope)
    return _signed(v, jnp.clip(size - level, 0, room))


def _signed(v: Array, size: Array) -> Array:
    return jnp.where(v < 0, -size, size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def shrink(v: Float[Array, " d"], multiplier: Float[Array, ""], p: float) -> Float[Array, " d"]:
    """The ``w`` with ``w + multiplier |w|^(p-1) sign(w) = v``, in each coordinate.

    In ``x = |w|`` for p >= 2 and ``x = |w|^(p-1)`` for p < 2 the equation reads
    ``a x^m + b x = |v|`` with ``m >= 1``: the left side is convex, and Newton's method descends to
    the solution from the upper bound it starts at.
    """
    zero = v == 0
    size = jnp.where(zero, 1, jnp.abs(v))
    m = max(p - 1, 1 / (p - 1))
    a, b = (multiplier, 1) if p >= 2 else (1, multiplier)

    def newton(_, x):
        return (size + (m - 1) * a * x**m) / (m * a * x ** (m - 1) + b)

    x = jax.lax.fori_loop(0, 10, newton, jnp.minimum(size / b, (size / a) ** (1 / m)))
    return jnp.where(zero, 0, jnp.sign(v) * (x if p >= 2 else x**m))


@shrink.defjvp
def _shrink_jvp(p, primals, tangents):
    v, multiplier = primals
    dv, dmultiplier = tangents
    w = shrink(v, multiplier, p)
    size = jnp.abs(w)
    if p >= 2:
        slope = 1 / (1 + multiplier * (p - 1) * power(size, p - 2))
    else:
        inverse = power(size, 2 - p)
        slope = inverse / jnp.where(w == 0, 1, inverse + multiplier * (p - 1))
    return w, slope * (dv - jnp.sign(w) * power(size, p - 1) * dmultiplier)


def _root(fn: Callable, lower: Array, upper: Array, *args: Any) -> Float[Array, ""]:
    """The root in ``[lower, upper]`` of ``fn(x, *args)``, which increases in ``x``.

    Newton's method, with bisection where a step leaves the bracket, until a step is lost in
    rounding. The last step alone is differentiated, and with respect to ``args`` only through the
    value of ``fn``: this is the implicit function theorem.
    """
    lower, upper, fixed = jax.lax.stop_gradient((lower, upper, args))
    scale = upper - lower

    def unsettled(state):
        count, x, previous, *_ = state
        size = jnp.maximum(jnp.abs(x), 1e-3 * scale)
        return (count < 40) & (jnp.abs(x - previous) > 4 * jnp.finfo(x.dtype).eps * size)

    def step(state):
        count, x, _, lower, upper, _ = state
        value, slope = jax.jvp(lambda x: fn(x, *fixed), (x,), (jnp.ones_like(x),))
        lower, upper = jnp.where(value < 0, x, lower), jnp.where(value < 0, upper, x)
        new = x - value / slope
        new = jnp.where((new > lower) & (new < upper), new, (lower + upper) / 2)
        return count + 1, new, x, lower, upper, slope

    start = (0, upper, jnp.full_like(upper, jnp.inf), lower, upper, jnp.ones_like(upper))
    _, x, _, lower, upper, slope = jax.lax.while_loop(unsettled, step, start)
    value = fn(x, *args)
    last = jax.lax.stop_gradient(x - value / slope)
    # Where rounding alone would carry the step out of the bracket, it has only a derivative.
    kept = jnp.where((last >= lower) & (last <= upper), last, x)
    return kept - (value - jax.lax.stop_gradient(value)) / slope
