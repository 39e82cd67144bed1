"""Linear regression in frequency space: irrelevant frequencies, risks, gradient descent.

With the orthonormal DCT-II matrix ``C`` (``C C^T = I``), ``x~ = C x`` and ``w~ = C w``, a linear
model is the same in both domains, ``<w, x> = <w~, x~>``. Inputs ``x~ ~ N(0, diag(sigma^2))`` have
independent frequencies, of which those with ``sigma_i^2 = 0`` are *irrelevant*: no input has energy
there, so that training cannot tell what the weight should be, and an attacker can use whatever it
is. With the target ``y = <w~*, x~>`` and the loss ``(<w~, x~> - y)^2 / 2``,

    R_s(w~) = v / 2,    v = sum_i sigma_i^2 (w~_i - w~*_i)^2,
    R_a(w~) = v / 2 + eps sqrt(2 v / pi) ||w|| + eps^2 ||w||^2 / 2

are the risk without and with an attack of norm ``eps``; ``||w||`` is the dual norm of the weights
in space, for l_2 attacks ``||w||_2 = ||w~||_2``. Among the minimisers of ``R_s`` the one without
irrelevant weights is the most robust to l_2 attacks. Gradient descent leaves those weights as they
were initialised; optimizers that act on every weight for itself (signGD, Adam, RMSProp) do not:
see ``robustjax.theory.sign_descent`` and ``simulate``.

Weights are in the frequency domain and inputs in space unless said otherwise. Everything is in the
dtype of its arrays: under ``jax.enable_x64`` exact to rounding. ``sigma_i^2`` are variances.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", section 4.4, equations
(4.4) to (4.13); Ma, Pan and Farahmand (2023), "Understanding the robustness difference between
stochastic gradient descent and adaptive gradient methods". The un-normalised sum printed before
(4.4) is not used.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Key

from robustjax import checks, keys, norms
from robustjax.dct import dct_matrix
from robustjax.norms import L2, Norm


class Population(NamedTuple):
    """The distribution of the inputs and the weights of the target, both per frequency.

    A pytree, so that a whole sweep is one ``vmap``. Functions raise ``ValueError`` for variances
    that are negative or not of the shape of the target.

    Attributes:
      variances: ``sigma_i^2 >= 0``, ``(d,)``; frequency 0 is the mean.
      target: ``w~*``, ``(d,)``.
    """

    variances: Float[Array, "*batch d"]
    target: Float[Array, "*batch d"]


def to_frequency(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """``C x`` for every vector along the last axis: the orthonormal DCT-II."""
    return jnp.matmul(x, _dct(x).T, precision="highest")


def to_space(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """``C^T x``, the inverse of ``to_frequency`` and its adjoint."""
    return jnp.matmul(x, _dct(x), precision="highest")


def covariance(population: Population) -> Float[Array, "d d"]:
    """``Sigma = C^T diag(sigma^2) C`` of the inputs in space; its rank is that of the relevant."""
    variances, target = _checked(population)
    matrix = _dct(target)
    return jnp.matmul(matrix.T * variances, matrix, precision="highest")


def sample(
    key: Key[Array, ""], population: Population, n: int
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Inputs ``x`` in space and their targets ``y = <w~*, C x>``.

    Args:
      key: one key.
      population: to draw from.
      n: number of examples, ``>= 1``.

    Raises:
      ValueError: ``n < 1``.
    """
    spectra, y = _sample_spectra(key, population, n)
    return to_space(spectra), y


def standard_risk(
    population: Population, weights: Float[Array, "*batch d"]
) -> Float[Array, "*batch"]:
    """``R_s = sum_i sigma_i^2 (w~_i - w~*_i)^2 / 2``.

    Source: Ma (2025), section 4.4.1. The authors' public notebook takes standard deviations for
    variances here, and leaves out the 1/2.
    """
    return _squared_residual(population, weights) / 2


def adversarial_risk(
    population: Population,
    weights: Float[Array, "*batch d"],
    eps: ArrayLike,
    norm: Norm = L2(),  # noqa: B008
) -> Float[Array, "*batch"]:
    """The expected loss when each input moves by at most ``eps`` and its target does not.

    ``R_a = v / 2 + eps sqrt(2 v / pi) ||w|| + eps^2 ||w||^2 / 2`` with the dual norm of the weights
    in space. At a minimiser of the standard risk, ``v = 0``, it is ``eps^2 ||w||^2 / 2``.

    Args:
      population: of the inputs.
      weights: in the frequency domain, ``(..., d)``.
      eps: radius of the attack, ``>= 0``.
      norm: of the attack, in space.

    Raises:
      ValueError: ``eps < 0`` or ``norm`` is no norm.

    Source: Ma (2025), equations (4.7), (4.9) and (4.10), there for l_2.
    """
    checks.number("eps", eps, at_least=0)
    norms.check(norm)
    v = _squared_residual(population, weights)
    length = eps * norm.dual.value(to_space(weights), batch_ndim=weights.ndim - 1)
    fits = v == 0
    # The mean of |residual|; its slope at 0 is taken as 0.
    residual = jnp.where(fits, 0, jnp.sqrt(2 / math.pi * jnp.where(fits, 1, v)))
    return v / 2 + residual * length + jnp.square(length) / 2


def worst_perturbation(
    population: Population,
    weights: Float[Array, " d"],
    x: Float[Array, "n d"],
    eps: ArrayLike,
    norm: Norm = L2(),  # noqa: B008
) -> Float[Array, "n d"]:
    """``eps sign(<x~, w~ - w~*>) steepest(w)``: what an attacker adds to the inputs ``x``.

    Where the residual is 0 both signs are optimal, and the positive one is taken.

    Args:
      population: of the inputs.
      weights: in the frequency domain, ``(d,)``.
      x: inputs in space.
      eps: radius, ``>= 0``.
      norm: of the attack, in space.

    Raises:
      ValueError: ``eps < 0`` or ``norm`` is no norm.

    Source: Ma (2025), equation (4.8), there for l_2: ``steepest(w) = w / ||w||_2``.
    """
    checks.number("eps", eps, at_least=0)
    norms.check(norm)
    _, target = _checked(population, weights)
    residual = x @ to_space(weights - target)
    side = jnp.where(residual < 0, -1, 1).astype(x.dtype)
    return eps * side[:, None] * norm.steepest(to_space(weights))


def robust_minimizer(population: Population) -> Float[Array, "*batch d"]:
    """The target's weights at relevant frequencies, else 0: the least ``R_a`` with ``R_s = 0``.

    It has the smallest Euclidean norm of all minimisers of the standard risk, and is therefore the
    most robust to l_2 attacks of any size.

    Source: Ma (2025), equation (4.6).
    """
    return reached_minimizer(population, jnp.zeros_like(population.target))


def reached_minimizer(
    population: Population, initial: Float[Array, "*batch d"]
) -> Float[Array, "*batch d"]:
    """The target's weights at relevant frequencies, the initial weights at irrelevant ones.

    The minimiser of the standard risk nearest to ``initial``, and the only one that steps in the
    span of the inputs, as those of (stochastic) gradient descent with momentum, can reach.

    Source: Ma (2025), section 4.4.2, equation (4.13) being its ``adversarial_risk``.
    """
    variances, target = _checked(population, initial)
    return jnp.where(variances > 0, target, initial)


def gradient_descent(
    population: Population,
    initial: Float[Array, " d"],
    *,
    steps: float,
    learning_rate: ArrayLike,
    momentum: ArrayLike = 0.0,
    ridge: ArrayLike = 0.0,
) -> Float[Array, " d"]:
    """The weights after ``steps`` steps on ``R_s(w~) + ridge ||w~||^2 / 2``, in closed form.

    Each frequency is on its own. Without momentum its distance from the limit
    ``sigma_i^2 w~*_i / (sigma_i^2 + ridge)`` shrinks by ``1 - learning_rate (sigma_i^2 + ridge)``
    per step; with it distance and velocity are multiplied by a 2 x 2 matrix, whose power this is.
    Without a penalty irrelevant weights stay as they are, bit by bit. It is the same run whether
    space or frequency weights are trained.

    Args:
      population: of the inputs.
      initial: ``w~(0)``, ``(d,)``.
      steps: number of steps, an integer ``>= 0``, or inf for the limit.
      learning_rate: ``> 0``.
      momentum: weight of the old velocity, in ``[0, 1)``, as ``optax.sgd`` has it.
      ridge: weight of the penalty, ``>= 0``.

    Raises:
      ValueError: an argument is out of range, or there is no limit, because
        ``learning_rate (max sigma_i^2 + ridge) >= 2 (1 + momentum)``.

    Source: Ma (2025), equations (4.11) to (4.13), without momentum and ridge.
    """
    variances, target = _checked(population, initial)
    checks.number("learning_rate", learning_rate, above=0)
    checks.number("momentum", momentum, at_least=0, below=1)
    checks.number("ridge", ridge, at_least=0)
    curvature = variances + ridge
    moves = curvature > 0
    limit = jnp.where(moves, variances * target / jnp.where(moves, curvature, 1), initial)
    rate = learning_rate * curvature
    if steps == math.inf:
        excess = rate - 2 * (1 + momentum)
        if not checks.is_traced(excess) and (excess >= 0).any():
            raise ValueError(
                "learning_rate times (variances + ridge) must be < 2 (1 + momentum) for a limit, "
                f"got {rate.max():g}"
            )
        return limit
    checks.integer("steps", steps)
    # (error, velocity) -> (error + velocity', velocity'), velocity' = momentum velocity - rate
    # error: the first column stays (1, 0) where the rate is 0, without rounding.
    keep = jnp.broadcast_to(jnp.asarray(momentum, rate.dtype), rate.shape)
    matrix = jnp.stack([jnp.stack([1 - rate, keep], -1), jnp.stack([-rate, keep], -1)], -2)
    power = jnp.linalg.matrix_power(matrix, steps)[..., 0, 0]
    return jnp.where(moves, limit + power * (initial - limit), initial)


def simulate(
    transform: optax.GradientTransformation,
    population: Population,
    initial: Float[Array, " d"],
    *,
    steps: int,
    every: int = 1,
    batch_size: int | None = None,
    key: Key[Array, ""] | None = None,
    domain: str = "space",
) -> Float[Array, "records d"]:
    """Trains the model with any optax transform; the weights along the way, start included.

    One compiled ``lax.scan``. Gradients are those of the population, or of a fresh batch per step.
    It may run under ``vmap`` over populations, initial weights, keys, or hyper-parameters of the
    transform. Reuse the transform itself: each new one is compiled anew.

    Args:
      transform: learning rate included, such as ``optax.sgd(0.01)``.
      population: of the inputs.
      initial: weights in the frequency domain, ``(d,)``.
      steps: number of steps, ``>= 1``.
      every: record the weights after every so many steps; it divides ``steps``.
      batch_size: examples per step; None for the gradient of the population.
      key: one key for the batches; step ``t`` draws from ``fold_in(key, t)``.
      domain: ``"space"`` trains ``w``, ``"frequency"`` trains ``w~``. To gradient descent, with or
        without momentum, it makes no difference; to signGD, Adam and RMSProp it does.

    Returns:
      ``w~`` after ``0, every, 2 every, ..., steps`` steps.

    Raises:
      ValueError: an argument is out of range, or only one of ``batch_size`` and ``key`` is given.

    Source: Ma (2025), section 4.4.4 and figure 4.7.
    """
    checks.transform("transform", transform)
    _checked(population, initial)
    checks.integer("steps", steps, at_least=1)
    checks.integer("every", every, at_least=1)
    checks.divisible("steps", steps, "every", every)
    checks.choice("domain", domain, ("space", "frequency"))
    if (batch_size is None) != (key is None):
        raise ValueError(
            "batch_size and key must be given together, "
            f"got {batch_size} and {'no key' if key is None else 'a key'}"
        )
    if key is not None:
        keys.check_one(key)
        checks.integer("batch_size", batch_size, at_least=1)
    return _simulate(transform, population, initial, key, steps, every, batch_size, domain)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _simulate(
    transform: optax.GradientTransformation,
    population: Population,
    initial: Array,
    key: Array | None,
    steps: int,
    every: int,
    batch_size: int | None,
    domain: str,
) -> Array:
    inward, outward = (to_space, to_frequency) if domain == "space" else (jnp.asarray,) * 2

    def gradient(weights: Array, t: Array) -> Array:
        if key is None:
            return population.variances * (weights - population.target)
        spectra, y = _sample_spectra(jax.random.fold_in(key, t), population, batch_size)
        return (spectra @ weights - y) @ spectra / batch_size

    def step(carry: tuple, t: Array) -> tuple[tuple, None]:
        w, state = carry
        updates, state = transform.update(inward(gradient(outward(w), t)), state, w)
        return (optax.apply_updates(w, updates), state), None

    def segment(carry: tuple, ts: Array) -> tuple[tuple, Array]:
        carry, _ = jax.lax.scan(step, carry, ts)
        return carry, outward(carry[0])

    start = inward(initial)
    ts = jnp.arange(steps).reshape(-1, every)
    _, records = jax.lax.scan(segment, (start, transform.init(start)), ts)
    return jnp.concatenate([initial[None], records])


def _sample_spectra(key: Array, population: Population, n: int) -> tuple[Array, Array]:
    variances, target = _checked(population)
    keys.check_one(key)
    checks.integer("n", n, at_least=1)
    noise = jax.random.normal(key, (n, target.shape[-1]), target.dtype)
    spectra = jnp.sqrt(variances) * noise
    return spectra, spectra @ target


def _squared_residual(population: Population, weights: Array) -> Array:
    variances, target = _checked(population, weights)
    return jnp.sum(variances * jnp.square(weights - target), axis=-1)


def _dct(like: Array) -> Array:
    return jnp.asarray(dct_matrix(like.shape[-1]), like.dtype)


def _checked(population: Population, weights: Array | None = None) -> tuple[Array, Array]:
    variances, target = population
    checks.same_shape("variances", variances, "target", target)
    checks.number("variances", variances, at_least=0)
    checks.number("target", target)
    if not target.ndim or not target.size:
        raise ValueError(f"target must be weights (d,) with d >= 1, got shape {target.shape}")
    if weights is not None and checks.array("weights", weights).shape[-1:] != target.shape[-1:]:
        raise ValueError(
            f"weights must have one entry per frequency, {target.shape[-1]}, "
            f"got shape {weights.shape}"
        )
    return variances, target
