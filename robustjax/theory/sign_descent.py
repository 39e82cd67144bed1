"""signGD on three frequencies, one irrelevant: what it does to the weight that no input asks for.

On the risk of ``robustjax.theory.frequency_regression`` signGD moves the errors ``e~ = w~ - w~*``
by ``-eta C sign(C^T Sigma~ e~)``. For ``Sigma~ = diag(s0, s1, 0)`` only three signs matter, those
of ``A``, ``A + B`` and ``A - B`` with

    A = (sqrt(3) / 3) s0 e~_0,    B = (sqrt(2) / 2) s1 e~_1.

``A`` moves towards 0 by ``s0 eta``, ``s0 eta / 3`` or ``2 s0 eta / 3`` when ``|A|`` is larger than,
smaller than or equal to ``|B|``; ``B`` by 0, ``s1 eta`` or ``s1 eta / 2``; and the irrelevant
weight by 0, ``sqrt(6) eta / 3`` or ``sqrt(6) eta / 6`` in the direction of ``sign(A)``, although no
input has energy there. It drifts until ``A`` oscillates around 0, nothing brings it back, and the
model is easier to attack than the one of gradient descent.

In the units ``a = A / (s0 eta)`` and ``b = B / (s0 eta)`` their dynamics have one parameter,
``s1 / s0``; ``robustjax.theory.sign_regions`` follows them. Signs of differences decide here: use
``jax.enable_x64``.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", sections 4.4.3 to 4.4.4
and appendix 4.D, equations (4.14) to (4.29), table 4.9. Corrected from there: the sign of the
drift, which is that of ``e~_0``; its bound after the band is reached (4.22); its size, of which
only the range is printed.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from robustjax import checks
from robustjax.norms import LInf
from robustjax.theory.frequency_regression import Population, to_frequency, to_space

# How far an irrelevant weight moves per step and eta where |A| < |B|; half of it where they tie.
DRIFT = math.sqrt(6) / 3


class SignTable(NamedTuple):
    """Every sign that can occur, and the step it gives.

    Attributes:
      signs: of ``A``, ``A + B`` and ``A - B``, ``(13, 3)``.
      update: the vector subtracted from the errors, in units of eta, ``(13, 3)``.
      relation: the sign of ``|A| - |B|``, ``(13,)``.
    """

    signs: Int[np.ndarray, "rows 3"]
    update: Float[np.ndarray, "rows 3"]
    relation: Int[np.ndarray, " rows"]


class Passage(NamedTuple):
    """The way of signGD into the band ``|A| < s0 eta``.

    Attributes:
      steps: ``T``, the first step at which it is there.
      moved: steps before ``T`` with ``|A| <= |B|``: those in which the irrelevant weight moved.
      ties: steps before ``T`` with ``|A| = |B|``.
      weights: at step ``T``, in the frequency domain, ``(3,)``.
    """

    steps: Int[Array, ""]
    moved: Int[Array, ""]
    ties: Int[Array, ""]
    weights: Float[Array, "3"]


def direction(
    variances: Float[Array, "*#batch d"], errors: Float[Array, "*#batch d"]
) -> Float[Array, "*#batch d"]:
    """``C sign(C^T Sigma~ e~)``: what signGD in space subtracts, times eta; any number ``d``.

    Source: Ma (2025), equations (4.14) and (4.15).
    """
    if checks.array("variances", variances).shape[-1:] != jnp.shape(errors)[-1:]:
        raise ValueError(
            f"errors must have one entry per variance, {variances.shape[-1:]}, "
            f"got shape {jnp.shape(errors)}"
        )
    gradient = to_space(variances * errors)
    return to_frequency(LInf().steepest(gradient, batch_ndim=gradient.ndim - 1))


def table_direction(
    variances: Float[Array, "*#batch 3"], errors: Float[Array, "*#batch 3"]
) -> Float[Array, "*#batch 3"]:
    """``direction`` for three frequencies of which the last is irrelevant, in closed form.

    Source: Ma (2025), equation (4.16).
    """
    a, b = coordinates(variances, errors, 1.0)
    return jnp.stack(_components(jnp.sign(a), jnp.sign(a + b), jnp.sign(a - b)), axis=-1)


def sign_table() -> SignTable:
    """The 13 of 27 triples of signs that real ``A`` and ``B`` can have, with their updates.

    ``2 A = (A + B) + (A - B)``: signs that do not cancel there decide that of ``A``.

    Source: Ma (2025), table 4.9, with its rows from + over 0 to - in every column.
    """
    rows = []
    for a, plus, minus in itertools.product((1, 0, -1), repeat=3):
        total = np.sign(plus + minus)
        opposite = plus == -minus != 0
        if opposite or a == total:
            rows.append((a, plus, minus))
    signs = np.array(rows)
    update = np.stack(_components(*signs.T), axis=-1)
    return SignTable(signs, update, signs[:, 1] * signs[:, 2])


def coordinates(
    variances: Float[Array, "*#batch 3"],
    errors: Float[Array, "*#batch 3"],
    learning_rate: ArrayLike,
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """``(a, b)`` of errors ``w~ - w~*``.

    Args:
      variances: ``(s0, s1, 0)``, ``s0 > 0``.
      errors: in the frequency domain.
      learning_rate: ``eta > 0``.

    Raises:
      ValueError: not three frequencies, or the last one is relevant, or the first is not.
    """
    _check_three(variances)
    checks.number("learning_rate", learning_rate, above=0)
    s0, s1 = variances[..., 0], variances[..., 1]
    a = errors[..., 0] / (math.sqrt(3) * learning_rate)
    b = s1 / s0 * errors[..., 1] / (math.sqrt(2) * learning_rate)
    return a, b


def enter_band(
    population: Population, initial: Float[Array, "3"], learning_rate: ArrayLike
) -> Passage:
    """Runs signGD on the population until ``|A| < s0 eta``, where it stays.

    Until then ``sign(A)`` is constant, and the irrelevant weight drifts by ``sqrt(6) / 3 eta
    (moved - ties / 2)`` in its direction; afterwards it stays within ``sqrt(6) eta`` of where it
    was at ``T``, and within ``(2 sqrt(6) / 3) eta`` of where it was at ``T + 1``. Ties do not occur
    for almost every initial weight.

    Args:
      population: of three frequencies, the last irrelevant.
      initial: weights in the frequency domain, ``(3,)``.
      learning_rate: ``eta > 0``.

    Source: Ma (2025), propositions 4.D.1 and 4.D.3, equations (4.22) and (4.27). In (4.22) the sum
    starts at ``T + 1``, and the bound holds from there.
    """
    coordinates(population.variances, initial - population.target, learning_rate)  # its checks
    return _enter_band(population, initial, learning_rate)


@jax.jit
def _enter_band(population: Population, initial: Array, learning_rate: ArrayLike) -> Passage:
    variances, target = population

    def size(weights: Array) -> tuple[Array, Array]:
        a, b = coordinates(variances, weights - target, learning_rate)
        return jnp.abs(a), jnp.abs(b)

    def outside(state: tuple[Passage, Array]) -> Array:
        # Every step takes something from |a|, unless rounding swallows it: then stop all the same.
        passage, last = state
        now = size(passage.weights)[0]
        return (now >= 1) & (now < last)

    def move(state: tuple[Passage, Array]) -> tuple[Passage, Array]:
        passage, _ = state
        a, b = size(passage.weights)
        update = table_direction(variances, passage.weights - target)
        moved = Passage(
            passage.steps + 1,
            passage.moved + (a <= b),
            passage.ties + (a == b),
            passage.weights - learning_rate * update,
        )
        return moved, a

    zero = jnp.zeros((), jnp.int32)
    start = Passage(zero, zero, zero, initial)
    infinity = jnp.full_like(size(initial)[0], jnp.inf)
    return jax.lax.while_loop(outside, move, (start, infinity))[0]


def drift(
    variances: Float[Array, "*#batch 3"], errors: Float[Array, "*#batch 3"]
) -> Float[Array, "*#batch"]:
    """The way of the irrelevant weight, as ``eta -> 0``, from initial errors; sign of ``e~_0``.

    Its size is ``sqrt(2) |e~_0|`` from P3 and P5, ``sqrt(3) (s1 / s0) |e~_1|`` from P6 and
    ``|e~_1| / sqrt(3)`` from P4.

    Args:
      variances: ``(s0, s1, 0)``, ``s0 > 0``.
      errors: ``w~(0) - w~*``.

    Source: Ma (2025), proposition 4.D.8, for ``s1 < s0 / 3`` and with a factor between
    ``sqrt(6) / 6`` and ``sqrt(6) / 3``. Without ties it is the latter.
    """
    a, b = map(jnp.abs, coordinates(variances, errors, 1.0))
    ratio = variances[..., 1] / variances[..., 0]
    # Steps with |a| < |b| until |a| is down, at 1/3 per step; or until |b| is. Below the ratio 1/3
    # |a| is down before |b|, from where they met.
    size = DRIFT * jnp.minimum(3 * a, b / jnp.maximum(ratio, 1 / 3))
    return jnp.sign(errors[..., 0]) * size


def risk_ratio(
    population: Population, initial: Float[Array, "*#batch 3"]
) -> Float[Array, "*#batch"]:
    """Adversarial risk (l_2) of what signGD finds over that of gradient descent, as ``eta -> 0``.

    ``(w~*_0^2 + w~*_1^2 + (w~_2(0) + drift)^2) / (w~*_0^2 + w~*_1^2 + w~_2(0)^2)``. It is below 1
    where the drift is towards zero and less than twice as far.

    Source: Ma (2025), equations (4.17) to (4.19); "always above 1" neglects ``w~_2(0)``.
    """
    variances, target = population
    fitted = jnp.sum(jnp.square(target[..., :2]), axis=-1)
    moved = initial[..., 2] + drift(variances, initial - target)
    return (fitted + jnp.square(moved)) / (fitted + jnp.square(initial[..., 2]))


def risk_ratio_range(
    population: Population,
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Bounds of ``risk_ratio`` from zero weights, for ties at every step and at none.

    ``1 + C_3 w~*_0^2 / (w~*_0^2 + w~*_1^2)`` with ``C_3`` in ``[1/2, 2]`` if ``|A(0)| < |B(0)|``,
    else ``1 + C_4 w~*_1^2 / (...)``, ``C_4`` in ``[3/4, 3] (s1 / s0)^2``; for ``s1 < s0 / 3``.
    Almost always it is the upper end.

    Source: Ma (2025), equation (4.19).
    """
    excess = risk_ratio(population, jnp.zeros_like(population.target)) - 1
    return 1 + excess / 4, 1 + excess


def _components(a: Any, plus: Any, minus: Any) -> tuple:
    """The step at each frequency, in units of eta, from the signs of A, A + B and A - B."""
    return (plus + a + minus) / 3**0.5, (plus - minus) / 2**0.5, (plus - 2 * a + minus) / 6**0.5


def _check_three(variances: Array) -> None:
    if checks.array("variances", variances).shape[-1:] != (3,):
        raise ValueError(f"variances must be of three frequencies, got shape {variances.shape}")
    checks.number("variances", variances, at_least=0)
    checks.number("the first of variances", variances[..., 0], above=0)
    checks.number("the last of variances", variances[..., 2], at_most=0)
