"""Where signGD on three frequencies goes: the states ``(a, b)``, their regions and what follows.

The dynamics of ``robustjax.theory.sign_descent`` in its two relevant errors,

    a' = a - (sign(a + b) + sign(a) + sign(a - b)) / 3,
    b' = b - ratio (sign(a + b) - sign(a - b)) / 2,

with the one parameter ``ratio = s1 / s0``. From any start ``|a|`` falls below 1, and stays there
(lemma 4.D.2: ``x - sign(x) Delta`` with ``0 < Delta <= Delta_max`` ends in ``[-Delta_max,
Delta_max]``). In that band regions tell how it goes on: after at most three steps ``a`` alternates
in sign with period 2, so that its signs never sum to more than 2 in size (corollary 4.D.6, from the
second step in the band on), and in the end ``b`` is constant or alternates too. Outside of it the
start tells how often ``|a| <= |b|``, which is how often the irrelevant weight moves.

``a`` and ``b`` have one shape, to which ``ratio > 0`` broadcasts.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", appendix 4.D.2, with
corrections where they occur: regions that are neither disjoint nor closed (proposition 4.D.4), the
asymptotic bounds (remark 4.D.5), and what ``P_41`` and ``P_42`` lead to.
"""

import enum
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from robustjax import checks


class Region(enum.IntEnum):
    """Where ``(a, b)`` is in the band ``|a| < 1``; ``EDGE`` for points on a boundary."""

    EDGE = -1
    OUTSIDE = 0
    R11 = 11
    R12 = 12
    R21 = 21
    R22 = 22
    R23 = 23
    R31 = 31
    R32 = 32
    R33 = 33
    R34 = 34


class Start(enum.IntEnum):
    """Where ``(|a|, |b|)`` starts; ``EDGE`` for points on a boundary.

    P31, P41 and P42 are parts of P3 and P4.
    """

    EDGE = -1
    P1 = 1
    P2 = 2
    P3 = 3
    P4 = 4
    P5 = 5
    P6 = 6
    P31 = 31
    P41 = 41
    P42 = 42


class Limits(NamedTuple):
    """Bounds of the errors, and of the standard risk, from some step on.

    Attributes:
      a: of ``|a|``.
      b: of ``|b|``.
      error_0: of ``|e~_0|``.
      error_1: of ``|e~_1|``.
      risk: of ``R_s``.
    """

    a: Float[Array, "..."]
    b: Float[Array, "..."]
    error_0: Float[Array, "..."]
    error_1: Float[Array, "..."]
    risk: Float[Array, "..."]


def step(
    a: Float[Array, "*n"], b: Float[Array, "*n"], ratio: ArrayLike
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """One step of signGD on ``(a, b)``."""
    plus, minus = jnp.sign(a + b), jnp.sign(a - b)
    return a - (plus + jnp.sign(a) + minus) / 3, b - ratio / 2 * (plus - minus)


def memberships(
    a: Float[Array, "*n"], b: Float[Array, "*n"], ratio: ArrayLike
) -> dict[Region, Bool[Array, "*n"]]:
    """Which points lie in which region of the band, as defined in print.

    ========  ==============  =================================================================
    region    ``|a|``         further
    ========  ==============  =================================================================
    R11, R12  2/3 to 1        ``|a| < |b|``; ``|a| > |b|``
    R21       1/3 to 2/3      ``|a| < |b|``
    R22, R23  1/3 to 2/3      ``|a| > |b|``, and ``1 - |a|`` larger than ``|b|``; smaller
    R31       below 1/3       ``|a| > |b|``
    R32       below 1/3       ``|a| > |b + k ratio|`` for an even ``k`` other than 0
    R33       below 1/3       ``|a| + |b + k ratio| < 1/3`` for an odd ``k``
    R34       below 1/3       none of the three
    ========  ==============  =================================================================

    R32 and R33, printed as disjoint, overlap when ``ratio < 1/3``; both can overlap R31 then. R34
    is empty when ``ratio <= 1/3``: the intervals around the multiples then cover the line.

    Source: Ma (2025), appendix 4.D.2.
    """
    checks.number("ratio", ratio, above=0)
    size_a, size_b = jnp.abs(a), jnp.abs(b)
    smaller, larger = size_a < size_b, size_a > size_b
    r1 = (size_a > 2 / 3) & (size_a < 1)
    r2 = (size_a > 1 / 3) & (size_a < 2 / 3)
    r3 = size_a < 1 / 3
    # The nearest even multiple other than 0, and the nearest odd one.
    even = jnp.abs(size_b - 2 * ratio * jnp.maximum(1, jnp.round(size_b / (2 * ratio))))
    odd = jnp.abs(size_b - ratio * (2 * jnp.floor(size_b / (2 * ratio)) + 1))
    found = {
        Region.R11: r1 & smaller,
        Region.R12: r1 & larger,
        Region.R21: r2 & smaller,
        Region.R22: r2 & larger & (1 - size_a > size_b),
        Region.R23: r2 & larger & (1 - size_a < size_b),
        Region.R31: r3 & larger,
        Region.R32: r3 & (size_a > even),
        Region.R33: r3 & (size_a + odd < 1 / 3),
    }
    rest = r3 & ~(found[Region.R31] | found[Region.R32] | found[Region.R33])
    return found | {Region.R34: rest}


def classify(a: Float[Array, "*n"], b: Float[Array, "*n"], ratio: ArrayLike) -> Int[Array, "*n"]:
    """The ``Region`` of each point; where R31, R32 and R33 overlap, the first of them.

    From each, one step leads to a region of

    ========  =========================  =======================================================
    region    next                       then
    ========  =========================  =======================================================
    R11       R21, R22, R23
    R12       R31, R32, R33, R34
    R21       R31, R32, R33, R34
    R22       R22                        for ever, with period 2 in ``a`` and constant ``b``
    R23       R21
    R31       R12                        and back: for ever, likewise
    R32       R31, R32, R33              R31 after ``steps_to_rest``
    R33       R31, R32                   likewise
    R34       R34                        for ever, with period 2 in ``a``, in the end also in ``b``
    ========  =========================  =======================================================

    From R22 and R31 to R34 on, ``a`` alternates in sign, and ``a(t + 2) = a(t)`` except where R32
    or R33 passes to R31: there ``|a(t + 2)| = |a(t)| + 2/3``.

    Source: Ma (2025), proposition 4.D.4. It has the period 2 without the exception, and ``|a|``
    below 2/3 for ever in R31, whose partner is an R12.
    """
    found = memberships(a, b, ratio)
    outside = jnp.abs(a) > 1
    return jnp.select(
        [outside, *found.values()],
        [Region.OUTSIDE.value, *(r.value for r in found)],
        Region.EDGE.value,
    )


def steps_to_rest(
    a: Float[Array, "*n"], b: Float[Array, "*n"], ratio: ArrayLike
) -> Int[Array, "*n"]:
    """Steps from R31, R32 or R33 until R31, in which ``b`` is constant; -1 for all others.

    It is the least ``|k|`` among those of the definitions, which is unique only for
    ``ratio >= 1/3``.

    Source: Ma (2025), proposition 4.D.4, items 1 and 2.
    """
    found = memberships(a, b, ratio)
    size_a, size_b = jnp.abs(a), jnp.abs(b)
    # The first even k with |b| - k ratio < |a|, the first odd one with |b| - k ratio < 1/3 - |a|.
    even = 2 * (jnp.floor((size_b - size_a) / (2 * ratio)) + 1)
    odd = 2 * jnp.floor((size_b - (1 / 3 - size_a)) / (2 * ratio) + 1 / 2) + 1
    even = jnp.where(found[Region.R32], even, jnp.inf)
    odd = jnp.where(found[Region.R33], jnp.maximum(odd, 1), jnp.inf)
    k = jnp.where(found[Region.R31], 0, jnp.minimum(even, odd))
    return jnp.where(jnp.isfinite(k), k, -1).astype(jnp.int32)


def limits(
    variances: Float[Array, "*batch 3"], learning_rate: ArrayLike, *, printed: bool = False
) -> Limits:
    """What the errors stay below in the end.

    ``|a| < 1`` and ``|b| <= max(ratio, 1/2)``: a constant ``b`` is below ``min(|a|, 1 - |a|)``, an
    alternating one below ``ratio``. So ``|e~_0| < sqrt(3) eta``, ``|e~_1| <= sqrt(2) eta
    max(1, s0 / (2 s1))``; the standard risk is ``O((s0 + s1) eta^2)`` for a fixed ratio only.

    Args:
      variances: ``(s0, s1, 0)``, ``s0, s1 > 0``.
      learning_rate: ``eta > 0``.
      printed: the bounds in print, ``|a| <= 2/3`` and ``|b| <= ratio``; the first fails in the
        cycle of R31 and R12, the second for ``ratio < 1/2``.

    Raises:
      ValueError: not three variances, or the first two are not positive.

    Source: Ma (2025), proposition 4.D.4, remark 4.D.5 and equation (4.24).
    """
    if checks.array("variances", variances).shape[-1:] != (3,):
        raise ValueError(f"variances must be of three frequencies, got shape {variances.shape}")
    s0, s1 = variances[..., 0], variances[..., 1]
    checks.number("the first two variances", variances[..., :2], above=0)
    checks.number("learning_rate", learning_rate, above=0)
    ratio = s1 / s0
    a = jnp.full_like(ratio, 2 / 3 if printed else 1)
    b = ratio if printed else jnp.maximum(ratio, 1 / 2)
    error_0 = math.sqrt(3) * learning_rate * a
    error_1 = math.sqrt(2) * learning_rate * b / ratio
    return Limits(a, b, error_0, error_1, (s0 * error_0**2 + s1 * error_1**2) / 2)


def start_memberships(
    a: Float[Array, "*n"], b: Float[Array, "*n"], ratio: ArrayLike
) -> dict[Start, Bool[Array, "*n"]]:
    """Which points lie in which set of starts.

    ======  ===========  ===========================================================  ============
    start   ``ratio``    definition                                                   next
    ======  ===========  ===========================================================  ============
    P1                   ``|a| < 1``                                                  P1
    P2                   ``|a| > 1 > |b|``                                            P1, P2
    P3      above 1/3    ``1 < |a| < (|b| + 3 ratio - 1) / (3 ratio)``                P1, P3
    P4      above 1/3    ``1 < |b| < 3 ratio |a| - (3 ratio - 1)``                    P1 to P4
    P5      below 1/3    ``1 < |a| < |b|``                                            P1, P5
    P6      below 1/3    ``1 < |b| < |a|``                                            P1, P5, P6
    P31                  of P3, ``|a| + 1 > |b|``                                     P1, P3
    P41                  of P4, ``|b| < |a| < 2``                                     P1
    P42                  of P4, ``|b| < |a|``, ``2 < |a| < 1 +`` the bound in P3      P31
    ======  ===========  ===========================================================  ============

    Source: Ma (2025), appendix 4.D.2 and figure 4.9; the proof there has P41 and P42 swapped.
    """
    checks.number("ratio", ratio, above=0)
    a, b = jnp.abs(a), jnp.abs(b)
    outside = (a > 1) & (b > 1)
    steep = ratio > 1 / 3
    bound = (b + 3 * ratio - 1) / (3 * ratio)
    p3, p4 = outside & steep & (a < bound), outside & steep & (a > bound)
    return {
        Start.P1: a < 1,
        Start.P2: (a > 1) & (b < 1),
        Start.P3: p3,
        Start.P4: p4,
        Start.P5: outside & (ratio < 1 / 3) & (a < b),
        Start.P6: outside & (ratio < 1 / 3) & (a > b),
        Start.P31: p3 & (a + 1 > b),
        Start.P41: p4 & (a > b) & (a < 2),
        Start.P42: p4 & (a > b) & (a > 2) & (a < bound + 1),
    }


def classify_start(
    a: Float[Array, "*n"], b: Float[Array, "*n"], ratio: ArrayLike
) -> Int[Array, "*n"]:
    """The ``Start`` of each point, of P1 to P6; those of P3 to P6 are ``EDGE`` at the ratio 1/3."""
    found = start_memberships(a, b, ratio)
    names = [s for s in found if s <= Start.P6]
    return jnp.select([found[s] for s in names], [s.value for s in names], Start.EDGE.value)


def moved_bounds(
    a: Float[Array, "*n"], b: Float[Array, "*n"], ratio: ArrayLike
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Bounds ``low <= n <= high`` of the number ``n`` of steps that move the irrelevant weight.

    These are the steps with ``|a| <= |b|`` among the first ``T``, after which ``|a| < 1``.

    ======  ==============================================================================
    start   ``n``
    ======  ==============================================================================
    P1, P2  0
    P3, P5  ``T = ceil(3 (|a| - 1))``
    P4      from ``(|b| - 2) / ratio`` to ``(|b| - 1) / ratio + 1``
    P4      to ``|b| / ratio + 3 ratio / 2 - 1`` for ``ratio > 7/3``
    P6      from ``3 (|b| - 1) - 3`` to ``3 (|b| - 1) + 1``
    ======  ==============================================================================

    NaN for a start on an edge.

    Source: Ma (2025), proposition 4.D.7, there without ``ceil``, the 1 added in P4 and the slack in
    P6. Its proof has ``|b|`` never grow, but ``|b| < ratio / 2`` becomes ``ratio - |b|``, and for
    ``ratio > 7/3`` the bound of P4 fails; the other one counts at most ``3 (ratio / 2 - 1)`` steps
    of this kind. In P1 it has ``T = 1``; by the definition of ``T``, and here, it is 0.
    """
    start = classify_start(a, b, ratio)
    a, b = jnp.abs(a), jnp.abs(b)
    all_steps = jnp.ceil(3 * (a - 1))
    settled = [(start == Start.P1) | (start == Start.P2), (start == Start.P3) | (start == Start.P5)]
    cases = [*settled, start == Start.P4, start == Start.P6]
    zero = jnp.zeros_like(all_steps)
    low = jnp.select(cases, [zero, all_steps, (b - 2) / ratio, 3 * (b - 1) - 3], jnp.nan)
    slack = jnp.where(ratio > 7 / 3, 3 * ratio / 2 - 1, 1 - 1 / ratio)
    high = jnp.select(cases, [zero, all_steps, b / ratio + slack, 3 * (b - 1) + 1], jnp.nan)
    return low, high
