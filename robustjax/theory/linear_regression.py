"""Linear regression whose adversary, penalty and training are all known in closed form.

The target ``y = w*_1 x_1`` and the inputs ``x = (x_1, 0, ..., 0)`` use one of ``d`` dimensions, the
model ``<w, x>`` has a weight for each. Gradient descent on ``L(w) = E (<w, x> - y)^2 / 2`` reaches
``L = 0`` and leaves the other weights as they were initialised, which is what an attack uses:
``Delta = eps (0, sign(w_2), ..., sign(w_d))`` costs ``eps^2 ||w_{2:d}||_1^2 / 2``, of order
``eps^2 d^2``. Weight decay removes it, and so does the exact adversarial penalty

    E l(X + Delta; w) = L(w) + eps E[r(X; w)] ||w_{2:d}||_1 + eps^2 ||w_{2:d}||_1^2 / 2,

with ``r = <x, w - w*>``: the second-order expansion of the loss in the input, not the first.

Further down: noise on the input as a Tikhonov penalty; augmented and self-trained minimum-norm
estimators. Everything is in the dtype of its arrays: under ``jax.enable_x64`` exact to 1e-15.

Sources: Ma (2025), "Understanding adversarial robustness in deep learning", sections 2.5 and 3.2,
equations (3.1) and (3.2); Bishop (1995), "Training with noise is equivalent to Tikhonov
regularization"; Raghunathan et al. (2020), "Understanding and mitigating the tradeoff between
robustness and accuracy". Corrected from Ma: the derivative of ``L`` is
``(w_1 - w*_1) E[X_1^2]`` in the first weight and 0 in the others (printed with ``E[X_j]``); the
``mu_1`` of the ridge solution, not defined there, is ``E[X_1^2]``.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, norms
from robustjax.norms import L1, LInf, Norm


@dataclasses.dataclass(frozen=True)
class Population:
    """The distribution of the one input coordinate that varies, and its true weight.

    Args:
      mean: ``E[X_1]``.
      second_moment: ``mu_1 = E[X_1^2] > 0``, at least ``mean^2``.
      target: ``w*_1``.

    Raises:
      ValueError: a moment is not finite, or the two are of no distribution.
    """

    mean: float
    second_moment: float
    target: float = 1.0

    def __post_init__(self):
        checks.number("mean", self.mean)
        checks.number("second_moment", self.second_moment, above=0)
        checks.number("target", self.target)
        if self.second_moment < self.mean**2 * (1 - 1e-12):
            raise ValueError(
                f"second_moment must be >= mean^2 = {self.mean**2:g}, got {self.second_moment}"
            )


class TaylorTerms(NamedTuple):
    """Terms of the expansion of a squared error in the input; their sum is exact.

    Attributes:
      value: the loss at ``x``.
      first: ``<grad l, delta>``.
      second: ``<delta, (Hessian of l) delta> / 2``.
    """

    value: Float[Array, ""]
    first: Float[Array, ""]
    second: Float[Array, ""]


def risk(population: Population, w: Float[Array, " d"]) -> Float[Array, ""]:
    """``L(w) = mu_1 (w_1 - w*_1)^2 / 2``, whatever the other weights are."""
    return population.second_moment * jnp.square(_weights(w)[0] - population.target) / 2


def gradient_descent(
    population: Population,
    w: Float[Array, " d"],
    *,
    steps: float,
    learning_rate: float,
    ridge: float = 0.0,
) -> Float[Array, " d"]:
    """The iterate after ``steps`` steps on ``L(w) + ridge ||w||^2 / 2``, in closed form.

    ``w_1`` minus its limit shrinks by ``1 - learning_rate (mu_1 + ridge)`` per step, every other
    weight by ``1 - learning_rate ridge``: without a penalty those stay as they are, bit by bit.

    Args:
      population: of the inputs.
      w: initial weights ``(d,)``.
      steps: number of steps, ``>= 0``; inf gives the limit.
      learning_rate: ``> 0``.
      ridge: weight of the penalty, ``>= 0``.

    Raises:
      ValueError: an argument is out of range, or there is no limit, because
        ``learning_rate (mu_1 + ridge) >= 2``.
    """
    checks.number("steps", steps, at_least=0, at_most=math.inf)
    checks.number("learning_rate", learning_rate, above=0)
    checks.number("ridge", ridge, at_least=0)
    rate = learning_rate * (population.second_moment + ridge)
    if math.isinf(steps) and rate >= 2:
        raise ValueError(
            f"learning_rate times (second_moment + ridge) must be < 2 for a limit, got {rate:g}"
        )
    w = _weights(w)
    limit = ridge_minimizer(population, ridge, 1)[0].astype(w.dtype)
    first = limit + (1 - rate) ** steps * (w[0] - limit)
    return ((1 - learning_rate * ridge) ** steps * w).at[0].set(first)


def ridge_minimizer(population: Population, ridge: float, dimension: int) -> Float[Array, " d"]:
    """Minimises ``L(w) + ridge ||w||_2^2 / 2``: ``w_1 = mu_1 w*_1 / (mu_1 + ridge)``, else 0.

    With ``ridge = 0`` it is the minimiser of the smallest norm. A small ``ridge`` has a small bias,
    and lets the other weights decay slowly.

    Raises:
      ValueError: ``ridge < 0`` or ``dimension < 1``.
    """
    checks.number("ridge", ridge, at_least=0)
    mu = population.second_moment
    return _first(population.target * (mu / (mu + ridge)), dimension)


def lasso_minimizer(population: Population, lasso: float, dimension: int) -> Float[Array, " d"]:
    """Minimises ``L(w) + lasso ||w||_1``: ``w_1`` is ``w*_1`` shrunk by ``lasso / mu_1``, else 0.

    Raises:
      ValueError: ``lasso < 0`` or ``dimension < 1``.
    """
    checks.number("lasso", lasso, at_least=0)
    target = _first(population.target, dimension)
    return L1().prox(target, lasso / population.second_moment)


def irrelevant_attack(w: Float[Array, " d"], eps: ArrayLike) -> Float[Array, " d"]:
    """``Delta = eps (0, sign(w_2), ..., sign(w_d))``, which leaves the target as it is.

    Args:
      w: weights that the attacker sees.
      eps: l_inf radius, ``>= 0``.

    Raises:
      ValueError: ``eps < 0``.
    """
    checks.number("eps", eps, at_least=0)
    return eps * LInf().steepest(_weights(w).at[0].set(0))


def robust_risk(
    population: Population,
    w: Float[Array, " d"],
    eps: ArrayLike,
    *,
    seen: Float[Array, " d"] | None = None,
) -> Float[Array, ""]:
    """``E l(X + Delta; w) = L(w) + E[r] <w, Delta> + <w, Delta>^2 / 2``.

    At a minimiser of ``L`` it is ``eps^2 ||w_{2:d}||_1^2 / 2``, equation (3.1).

    Args:
      population: of the inputs.
      w: weights ``(d,)``.
      eps: l_inf radius, ``>= 0``.
      seen: weights whose signs the attack has; by default ``w`` itself, so that
        ``<w, Delta> = eps ||w_{2:d}||_1``.

    Source: Ma (2025), equation (3.2). Its attack has the signs of the initial weights, which gives
    the printed penalty only while no weight has changed its sign: for that pass them as ``seen``.
    """
    if seen is not None:
        checks.same_shape("seen", seen, "w", w)
    gain = jnp.vdot(w, irrelevant_attack(w if seen is None else seen, eps))
    mean_residual = (w[0] - population.target) * population.mean
    return risk(population, w) + mean_residual * gain + jnp.square(gain) / 2


def expected_attacked_loss(
    dimension: int, scale: float, eps: float, *, all_dimensions: bool = False
) -> float:
    """``E eps^2 ||w_{2:d}||_1^2 / 2`` for weights ``N(0, scale^2)``: the damage after training.

    ``E ||W||_1^2 = k scale^2 + k (k - 1) (2 / pi) scale^2`` for ``k`` weights.

    Args:
      dimension: ``d >= 1``.
      scale: standard deviation of the initial weights, ``>= 0``.
      eps: l_inf radius, ``>= 0``.
      all_dimensions: the published approximation, with ``k = d``; otherwise ``k = d - 1``.
    """
    checks.integer("dimension", dimension, at_least=1)
    checks.number("scale", scale, at_least=0)
    checks.number("eps", eps, at_least=0)
    k = dimension if all_dimensions else dimension - 1
    return eps**2 * scale**2 * (k + k * (k - 1) * 2 / math.pi) / 2


def taylor_terms(
    w: Float[Array, " d"],
    target: Float[Array, " d"],
    x: Float[Array, " d"],
    delta: Float[Array, " d"],
    *,
    target_moves: bool = True,
) -> TaylorTerms:
    """Expansion of ``l(x + delta) = (<w, x + delta> - y)^2 / 2`` around ``x``, ``y = <w*, x>``.

    The derivatives are ``r v`` and ``v v^T`` with ``r = <w - w*, x>``.

    Args:
      w: weights ``(d,)``.
      target: ``w*``, ``(d,)``.
      x: input ``(d,)``.
      delta: perturbation ``(d,)``.
      target_moves: ``y`` is ``<w*, x + delta>`` at the attacked input, ``v = w - w*``; otherwise it
        stays ``<w*, x>``, ``v = w``. The same for ``irrelevant_attack``, where ``<w*, delta> = 0``.

    Source: Ma (2025), section 3.3.3 (the gradient printed there has ``Delta x`` in the place of
    ``x``).
    """
    residual = jnp.vdot(w - target, x)
    along = jnp.vdot(w - target if target_moves else w, delta)
    return TaylorTerms(jnp.square(residual) / 2, residual * along, jnp.square(along) / 2)


def worst_case_loss(
    w: Float[Array, " d"],
    x: Float[Array, " d"],
    y: ArrayLike,
    eps: ArrayLike,
    norm: Norm | None = None,
) -> Float[Array, ""]:
    """``max (<w, x + delta> - y)^2 / 2 = (|<w, x> - y| + eps ||w||_*)^2 / 2`` over the ball.

    Every dimension may be attacked, and the target stays. The first-order penalty
    ``eps |r| ||w||_*`` misses exactly ``eps^2 ||w||_*^2 / 2``.

    Args:
      w: weights ``(d,)``.
      x: input ``(d,)``.
      y: target.
      eps: radius, ``>= 0``.
      norm: of the ball; default ``LInf()``.
    """
    checks.number("eps", eps, at_least=0)
    norm = LInf() if norm is None else norms.check(norm)
    return jnp.square(jnp.abs(jnp.vdot(w, x) - y) + eps * norm.dual.value(w)) / 2


def noisy_loss(
    w: Float[Array, " d"], x: Float[Array, " d"], y: ArrayLike, scale: ArrayLike
) -> Float[Array, ""]:
    """``E (<w, x + xi> - y)^2 / 2 = (<w, x> - y)^2 / 2 + scale^2 ||w||_2^2 / 2``.

    Noise ``xi ~ N(0, scale^2 I)`` on the input is a Tikhonov penalty on the weights.

    Args:
      w: weights ``(d,)``.
      x: input ``(d,)``.
      y: target.
      scale: standard deviation of the noise, ``>= 0``.

    Raises:
      ValueError: ``scale < 0``.

    Source: Bishop (1995).
    """
    checks.number("scale", scale, at_least=0)
    return jnp.square(jnp.vdot(w, x) - y) / 2 + jnp.square(scale) * jnp.vdot(w, w) / 2


def minimum_norm(x: Float[Array, "n d"], y: Float[Array, " n"]) -> Float[Array, " d"]:
    """``argmin {||w||_2 : x w = y}``; the least squares solution where there is none.

    Standard training is this on the data, augmented training on the data and what was added.

    Args:
      x: data ``(n, d)``.
      y: targets ``(n,)``.

    Source: Raghunathan et al. (2020); Ma (2025), equation (2.8).
    """
    return jnp.linalg.pinv(x) @ y


def standard_error(
    w: Float[Array, " d"], target: Float[Array, " d"], covariance: Float[Array, "d d"]
) -> Float[Array, ""]:
    """``(w - w*)^T Sigma (w - w*)``: the population's squared error with noiseless targets.

    Args:
      w: weights ``(d,)``.
      target: ``w*``, ``(d,)``.
      covariance: ``Sigma = E[X X^T]``, ``(d, d)``.

    Source: Raghunathan et al. (2020).
    """
    return (w - target) @ covariance @ (w - target)


def augmentation_gain(
    x: Float[Array, "n d"],
    added: Float[Array, "m d"],
    target: Float[Array, " d"],
    covariance: Float[Array, "d d"],
) -> Float[Array, ""]:
    """How much lower the standard error is with augmentation than without; negative if it hurts.

    With noiseless targets ``y = x w*``, ``P`` and ``P'`` the projections on the span of the data
    and of the augmented data, ``u = (I - P') w*`` and ``v = (P' - P) w*``, it is
    ``v^T Sigma v + 2 u^T Sigma v``. The first term is not negative, the second has either sign; for
    ``Sigma = I`` it is zero.

    Args:
      x: data ``(n, d)``.
      added: data added by augmentation ``(m, d)``, labelled by the same ``w*``.
      target: ``w*``.
      covariance: ``Sigma``, symmetric and positive semidefinite.

    Source: Raghunathan et al. (2020); Ma (2025), equation (2.8).
    """
    both = jnp.concatenate([x, added])
    without, with_added = (minimum_norm(data, data @ target) for data in (x, both))
    u, v = target - with_added, with_added - without
    return v @ covariance @ v + 2 * u @ covariance @ v


def robust_self_training(
    x: Float[Array, "n d"],
    y: Float[Array, " n"],
    added: Float[Array, "m d"],
    added_y: Float[Array, " m"],
    covariance: Float[Array, "d d"],
) -> Float[Array, " d"]:
    """The interpolator of all data nearest in ``Sigma`` to the standard one, ``w_std``.

    ``argmin {(w - w_std)^T Sigma (w - w_std) : x w = y, added w = added_y}``, of all minimisers the
    one nearest to the augmented minimum-norm estimator. If the targets are noiseless it is a
    ``Sigma``-orthogonal projection on a set that holds ``w*``: its standard error is that of
    ``w_std`` less ``(w - w_std)^T Sigma (w - w_std)``, never higher.

    Args:
      x: data ``(n, d)``.
      y: targets ``(n,)``.
      added: data added by augmentation ``(m, d)``.
      added_y: their targets ``(m,)``.
      covariance: ``Sigma``, as estimated from unlabelled data.

    Source: Raghunathan et al. (2020), robust self-training for linear regression.
    """
    both = jnp.concatenate([x, added])
    augmented = minimum_norm(both, jnp.concatenate([y, added_y]))
    free = jnp.eye(both.shape[1], dtype=both.dtype) - jnp.linalg.pinv(both) @ both
    moved = free @ covariance @ (augmented - minimum_norm(x, y))
    return augmented - jnp.linalg.pinv(free @ covariance @ free, hermitian=True) @ moved


def _weights(w: Array) -> Array:
    if checks.array("w", w).ndim != 1 or w.shape[0] == 0:
        raise ValueError(f"w must be weights of shape (d,) with d >= 1, got shape {w.shape}")
    return jnp.asarray(w)


def _first(value: float, dimension: int) -> Float[Array, " d"]:
    return jnp.zeros(checks.integer("dimension", dimension, at_least=1)).at[0].set(value)
