"""The nearest point of a hyperplane within a box, in l_inf, l_2 and l_1, for batches.

``displacement`` solves, for every example on its own,

    min ||d||   subject to   <w, d> = gap,   lower <= d <= upper,

with ``lower <= 0 <= upper``. With ``a = |w|``, ``c = |gap|`` and ``room_i`` the distance to the
end of the box on the side where ``d_i`` helps, it is ``d_i = sign(gap w_i) m_i`` with

=========  ==========================  =======================================================
norm       m_i                         the number that makes ``sum a_i m_i = c``
=========  ==========================  =======================================================
``linf``   min(t, room_i)              t; without a box c / ||w||_1
``l2``     min(t a_i, room_i)          t; without a box c / ||w||_2^2
``l1``     room_i where a_i > theta    theta, the last coordinate to be filled, which is filled
                                       in part; without a box it is the largest a_i
=========  ==========================  =======================================================

In the first two rows the sum is concave, increasing and piecewise linear in ``t``, so Newton's
method from the left ends, without sorting, at the exact root after a few passes over the
coordinates. The third is a fractional knapsack: theta is found by bisection.

Source: the linear programmes of Croce and Hein, "Minimally distorted adversarial examples with a
fast adaptive boundary attack" (2020), section 2.2, which solves them by sorting.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, lp


def project(
    norm: Any,
    x: Float[Array, "n ..."],
    w: Float[Array, "n ..."],
    b: ArrayLike,
    lower: ArrayLike = -jnp.inf,
    upper: ArrayLike = jnp.inf,
) -> Float[Array, "n ..."]:
    """The point of ``{u : <w, u> = b, lower <= u <= upper}`` that is nearest to ``x``.

    Where the hyperplane misses the box, the nearest point that comes as close to ``b`` as the box
    allows: a corner in the coordinates with ``w_i != 0``.

    Args:
      norm: ``LInf()``, ``L2()`` or ``L1()``.
      x: points ``(n, ...)`` in the box.
      w: normals ``(n, ...)``; the point stays where ``w`` is 0 or not finite.
      b: offsets, one number or ``(n,)``.
      lower: lower end of the box; broadcasts against ``x``, may be traced or ``-jnp.inf``.
      upper: upper end of the box, likewise.

    Raises:
      ValueError: ``norm`` is another one, or shapes do not fit.
    """
    checks.same_shape("w", w, "x", x)
    wide = lp.wide(x.dtype)
    u, normal = x.astype(wide), w.astype(wide)
    gap = b - jnp.sum(_flat(u * normal), axis=1)
    d = displacement(norm, normal, gap, lower - u, upper - u)
    # The sum may round to just outside the box.
    return jnp.clip(u + d, lower, upper).astype(x.dtype)


def displacement(
    norm: Any,
    w: Float[Array, "n ..."],
    gap: ArrayLike,
    lower: ArrayLike = -jnp.inf,
    upper: ArrayLike = jnp.inf,
) -> Float[Array, "n ..."]:
    """The smallest ``d`` with ``<w, d> = gap`` and ``lower <= d <= upper``.

    This is ``project`` for those who know ``gap = b - <w, x>``, such as a difference of logits,
    to better precision than the difference of two long sums has. Multiplying ``w`` and ``gap`` by
    one power of two does not change a bit of the result.

    Args:
      norm: ``LInf()``, ``L2()`` or ``L1()``.
      w: normals ``(n, ...)``; ``d = 0`` where ``w`` is 0 or not finite.
      gap: one number or ``(n,)``.
      lower: ``<= 0``; broadcasts against ``w``, may be traced or ``-jnp.inf``.
      upper: ``>= 0``, likewise.

    Raises:
      ValueError: ``norm`` is another one, or shapes do not fit.
    """
    name = checks.choice("norm", getattr(norm, "name", norm), tuple(_SOLVERS))
    if jnp.ndim(w) < 1 or jnp.shape(gap) not in ((), w.shape[:1]):
        raise ValueError(
            f"gap must be one number or one per row of w {jnp.shape(w)}, got shape {jnp.shape(gap)}"
        )
    wide = lp.wide(w.dtype)
    rows = _flat(w).astype(wide)
    gap = jnp.broadcast_to(jnp.asarray(gap, wide), rows.shape[:1])[:, None]

    def limit(end: ArrayLike) -> Array:
        # A point that rounding has put just outside the box has no room on that side.
        end = jnp.maximum(jnp.asarray(end, wide), 0)
        return _flat(jnp.broadcast_to(end, w.shape))

    # Units in which the largest |w_i| is about 1: the squares of a gradient of 1e-30 are zero.
    # A power of two changes no digit.
    size = jnp.abs(rows)
    peak = jnp.max(size, axis=1, keepdims=True, initial=0)
    usable = (peak >= jnp.finfo(wide).tiny) & jnp.isfinite(peak) & jnp.isfinite(gap)
    exponent = jnp.frexp(jnp.where(usable, peak, 1))[1]
    unit = jnp.ldexp(jnp.ones_like(peak), jnp.maximum(1 - exponent, -100))  # a normal number
    size = jnp.where(usable, size * unit, 0)
    target = jnp.where(usable, jnp.abs(gap) * unit, 0)
    rising = (rows > 0) == (gap > 0)
    room = jnp.where(rising, limit(upper), limit(-jnp.asarray(lower)))
    room = jnp.where(size > 0, room, 0)
    reachable = jnp.sum(size * room, axis=1, keepdims=True) >= target
    length = jnp.where(reachable, _SOLVERS[name](size, room, target), room)
    length = jnp.where(target > 0, length, 0)
    return jnp.where(rising, length, -length).reshape(w.shape).astype(w.dtype)


def _linf(a: Array, room: Array, c: Array) -> Array:
    """``min(t, room_i)`` with ``sum a_i min(t, room_i) = c``."""
    return jnp.minimum(_newton(a, a, room, room, c), room)


def _l2(a: Array, room: Array, c: Array) -> Array:
    """``min(t a_i, room_i)`` with ``sum a_i min(t a_i, room_i) = c``."""
    kink = jnp.where(a > 0, room / jnp.where(a > 0, a, 1), 0)
    return jnp.minimum(_newton(a, a * a, room, kink, c) * a, room)


def _newton(a: Array, slope: Array, room: Array, kink: Array, c: Array) -> Array:
    """The root of ``sum_{kink > t} slope t + sum_{kink <= t} a room = c``, from the left.

    The tangent of a concave function lies above it, so the iterates rise to the root. Each is a
    function of which kinks lie behind the one before it: when that set stays, so does ``t``, to
    the last bit.
    """

    def solve(t: Array) -> Array:
        behind = kink <= t
        filled = jnp.sum(jnp.where(behind, a * room, 0), axis=1, keepdims=True)
        rate = jnp.sum(jnp.where(behind, 0, slope), axis=1, keepdims=True)
        # No rate: every coordinate is at its end already.
        return jnp.where(rate > 0, (c - filled) / jnp.where(rate > 0, rate, 1), t)

    def rises(state: tuple[Array, Array]) -> Array:
        t, new = state
        return jnp.any(new > t)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        t, new = state
        t = jnp.maximum(t, new)  # rounding must not bring it back
        return t, solve(t)

    # At t = 0 only the coordinates without room are at their end.
    start = jnp.zeros_like(c)
    return jax.lax.while_loop(rises, step, (start, solve(start)))[0]


def _l1(a: Array, room: Array, c: Array) -> Array:
    """Fills the coordinates to their ends, in descending order of ``a``, until the sum is ``c``.

    The last entry to be filled is bracketed. The mean of the entries in the bracket halves their
    number, unless they differ widely; bisecting the bit patterns, by which positive floats are
    ordered, ends after 31 turns in any case. Equal entries are filled alike.
    """
    integer = jnp.int64 if a.dtype == jnp.float64 else jnp.int32
    cost = a * room

    def total(which: Array, values: Array = cost) -> Array:
        return jnp.sum(jnp.where(which, values, 0), axis=1, keepdims=True)

    def bits(value: Array) -> Array:
        return jax.lax.bitcast_convert_type(value, integer)

    def number(pattern: Array) -> Array:
        return jax.lax.bitcast_convert_type(pattern, a.dtype)

    def unsettled(state: tuple[Array, ...]) -> Array:
        low, high, _, found = state
        return jnp.any(~found & (low < high))

    def cut(state: tuple[Array, ...], pivot: Array) -> tuple[Array, ...]:
        # The entry is above low (there, too much is filled) and at most high.
        low, high, theta, found = state
        entry = jnp.max(jnp.where(a <= pivot, a, 0), axis=1, keepdims=True)
        too_low = total(a > entry) > c
        hit = ~too_low & (total(a >= entry) >= c)
        below = number(jnp.maximum(bits(entry) - 1, bits(low)))
        return (
            jnp.where(too_low & ~found, pivot, low),
            jnp.where(too_low | found, high, below),
            jnp.where(hit & ~found, entry, theta),
            found | hit,
        )

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, *_ = state
        inside = (a > low) & (a <= high)
        mean = total(inside, a) / jnp.maximum(total(inside, jnp.ones_like(a)), 1)
        # Rounding must not put it at low, which would cut nothing off.
        state = cut(state, jnp.clip(mean, number(bits(low) + 1), jnp.maximum(high, low)))
        low, high, *_ = state
        return cut(state, number(bits(high) - (bits(high) - bits(low)) // 2))

    top = jnp.max(a, axis=1, keepdims=True, initial=0)
    state = (jnp.zeros_like(top), top, top, total(a >= top) >= c)  # found, if nothing is in the way
    theta = jax.lax.while_loop(unsettled, step, state)[2]
    part = jnp.where(a == theta, a, 0)
    rest = c - total(a > theta)
    return jnp.where(a > theta, room, _linf(part, jnp.where(part > 0, room, 0), rest))


def _flat(v: Array) -> Array:
    return v.reshape(v.shape[0], -1)


_SOLVERS: dict[str, Callable] = {"linf": _linf, "l2": _l2, "l1": _l1}
