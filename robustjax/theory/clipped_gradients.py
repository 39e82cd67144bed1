"""Why clipping every example's gradient bounds the variance, and what follows for convergence.

``T(a) = min(alpha / ||a||, 1) a`` is the Euclidean projection on the ball of radius ``alpha``. So
it is idempotent, 1-Lipschitz and commutes with orthogonal maps; and whatever the distribution of
``a``, of infinite variance even,

    Var(T(a)) = E ||T(a) - E T(a)||^2 <= min(alpha^2, Var(a)).

Gradient descent ``theta <- theta - eta g_t`` on an L-smooth ``A`` with any ``||g_t|| <= alpha``
satisfies ``A(theta_{t+1}) <= A(theta_t) - eta <grad A(theta_t), g_t> + L eta^2 alpha^2 / 2``.
Summed over ``T`` steps, on every trajectory,

    (1/T) sum_t <grad A(theta_t), g_t> <= (A_0 - A_T) / (eta T) + L eta alpha^2 / 2,

in which no variance appears. The left side is ``||grad A||^2`` on average only where clipping
leaves the direction of the mean alone; under skewed noise it does not.

Source: Dabouei et al. (2022), "Revisiting outer optimization in adversarial training", theorems 1
and 2. The paper gives neither the proofs nor the constants of theorem 2, "convergence of
O(alpha)"; the inequality above is a reconstruction, for descent without momentum.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import checks, keys
from robustjax.norms import L2


class DescentTrace(NamedTuple):
    """Trajectories of ``simulate_descent``, one row per seed.

    Attributes:
      distance: ``||theta_t - theta*||``, the start first, ``(seeds, steps + 1)``.
      correlation: ``<grad A(theta_t), g_t>`` with the step's direction ``g_t``, ``(seeds, steps)``.
    """

    distance: Float[Array, "seeds points"]
    correlation: Float[Array, "seeds steps"]


def clip(a: Float[Array, "*batch d"], alpha: float | Array) -> Float[Array, "*batch d"]:
    """``T(a) = min(alpha / ||a||_2, 1) a`` for every vector: the projection on the ball.

    Args:
      a: vectors along the last axis.
      alpha: radius, ``>= 0``; with inf nothing is clipped.

    Raises:
      ValueError: ``alpha`` is negative.
    """
    checks.number("alpha", alpha, at_least=0, at_most=math.inf)
    if not checks.is_traced(alpha) and math.isinf(alpha):
        return a
    return L2().project(a, alpha, batch_ndim=a.ndim - 1)


def clipped_variance(samples: Float[Array, "m d"], alpha: float | Array) -> Float[Array, ""]:
    """``Var(T(a)) = E ||T(a) - E T(a)||^2`` of the distribution that the samples make up.

    Args:
      samples: vectors of equal probability, ``(m, d)``, ``m >= 1``.
      alpha: norm bound, ``>= 0``; inf gives ``Var(a)``.

    Raises:
      ValueError: ``alpha`` is negative or there are no samples.
    """
    if checks.array("samples", samples).ndim != 2 or samples.shape[0] == 0:
        raise ValueError(f"samples must be (m, d) with m >= 1, got shape {samples.shape}")
    clipped = clip(samples, alpha)
    return jnp.mean(jnp.sum(jnp.square(clipped - clipped.mean(axis=0)), axis=-1))


def variance_bound(alpha: float, *, sharp: bool = False) -> float:
    """Upper bound of ``Var(T(a))`` over all distributions: ``4 alpha^2``, sharply ``alpha^2``.

    The first, of the theorem, is ``||T(a) - E T(a)|| <= 2 alpha``. The second is
    ``E ||T(a)||^2 - ||E T(a)||^2 <= alpha^2``, attained by ``alpha u`` and ``-alpha u`` with equal
    probability.

    Args:
      alpha: norm bound, ``>= 0``.
      sharp: the second bound.

    Source: Dabouei et al. (2022), theorem 1.
    """
    checks.number("alpha", alpha, at_least=0)
    return (1 if sharp else 4) * alpha**2


def descent_bound(
    gap: float, *, smoothness: float, alpha: float, learning_rate: float, steps: int
) -> float:
    """Bound on the mean of ``<grad A(theta_t), g_t>``: ``gap / (eta T) + L eta alpha^2 / 2``.

    With the learning rate of ``best_learning_rate`` it is ``alpha sqrt(2 L gap / T)``: linear in
    alpha, without the variance of the gradients.

    Args:
      gap: ``A_0 - A_T``, or an upper bound such as ``A_0 - min A``.
      smoothness: ``L``, Lipschitz constant of the gradient of ``A``, ``>= 0``.
      alpha: bound of ``||g_t||``, ``>= 0``.
      learning_rate: ``eta > 0``.
      steps: ``T >= 1``.

    Raises:
      ValueError: an argument is out of range.

    Source: Dabouei et al. (2022), theorem 2, as reconstructed above.
    """
    checks.number("gap", gap)
    checks.number("smoothness", smoothness, at_least=0)
    checks.number("alpha", alpha, at_least=0)
    checks.number("learning_rate", learning_rate, above=0)
    checks.integer("steps", steps, at_least=1)
    return gap / (learning_rate * steps) + smoothness * learning_rate * alpha**2 / 2


def best_learning_rate(gap: float, *, smoothness: float, alpha: float, steps: int) -> float:
    """``sqrt(2 gap / (L T)) / alpha``, which minimises ``descent_bound``. All arguments > 0.

    Raises:
      ValueError: an argument is not positive.
    """
    checks.number("gap", gap, above=0)
    checks.number("smoothness", smoothness, above=0)
    checks.number("alpha", alpha, above=0)
    checks.integer("steps", steps, at_least=1)
    return math.sqrt(2 * gap / (smoothness * steps)) / alpha


def simulate_descent(
    key: Key[Array, ""],
    *,
    dimension: int,
    steps: int,
    learning_rate: float | Array,
    alpha: float | Array,
    degrees_of_freedom: float | Array = 1.5,
    curvature: float | Array = 1.0,
    start: float | Array = 1.0,
    seeds: int = 100,
    normalize: bool = False,
) -> DescentTrace:
    """Descent on ``A = curvature ||theta||^2 / 2`` under symmetric heavy-tailed gradient noise.

    The gradient of a step is ``curvature theta`` plus independent Student-t noise in every
    coordinate, and is then clipped to ``alpha``. Below two degrees of freedom the noise has
    infinite variance: then so have the iterates without clipping, while those with it stay near
    the minimum. ``A`` is smooth with ``L = curvature`` exactly.

    All seeds run in one compiled program, in which numbers may vary without another compilation.

    Args:
      key: one key; seed ``i`` draws from ``fold_in(key, i)``, so that runs with and without
        clipping see the same noise.
      dimension: of theta, ``>= 1``.
      steps: ``>= 1``.
      learning_rate: ``eta > 0``.
      alpha: norm bound of the gradients, ``> 0``; inf is stochastic gradient descent.
      degrees_of_freedom: of the noise, ``> 0``; inf is not allowed.
      curvature: ``> 0``.
      start: ``||theta_0||``, ``>= 0``; all coordinates are equal there.
      seeds: independent trajectories, ``>= 1``.
      normalize: scale every gradient to the norm ``alpha`` (finite) instead of clipping it.

    Raises:
      ValueError: an argument is out of range.
    """
    keys.check_one(key)
    checks.integer("dimension", dimension, at_least=1)
    checks.integer("steps", steps, at_least=1)
    checks.integer("seeds", seeds, at_least=1)
    checks.number("learning_rate", learning_rate, above=0)
    checks.number("alpha", alpha, above=0, at_most=None if normalize else math.inf)
    checks.number("degrees_of_freedom", degrees_of_freedom, above=0)
    checks.number("curvature", curvature, above=0)
    checks.number("start", start, at_least=0)
    numbers = (learning_rate, alpha, degrees_of_freedom, curvature, start)
    return _simulate(key, numbers, dimension, steps, seeds, normalize)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _simulate(
    key: Array, numbers: tuple, dimension: int, steps: int, seeds: int, normalize: bool
) -> DescentTrace:
    learning_rate, alpha, degrees_of_freedom, curvature, start = map(jnp.float32, numbers)

    def one(key: Array) -> tuple[Array, Array]:
        def step(theta: Array, t: Array):
            gradient = curvature * theta
            noise = jax.random.t(jax.random.fold_in(key, t), degrees_of_freedom, (dimension,))
            noisy = gradient + noise
            taken = alpha * L2().steepest(noisy) if normalize else clip(noisy, alpha)
            theta = theta - learning_rate * taken
            return theta, (L2().value(theta), jnp.vdot(gradient, taken))

        first = jnp.full(dimension, start / math.sqrt(dimension))
        _, (distance, correlation) = jax.lax.scan(step, first, jnp.arange(steps))
        return jnp.append(start, distance), correlation

    return DescentTrace(*jax.vmap(one)(keys.per_example(key, jnp.arange(seeds))))
