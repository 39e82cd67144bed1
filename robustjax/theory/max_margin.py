"""The largest margin in any norm: exact reference solvers, and the descent that tends to it.

``max_margin`` solves ``min {||w||_* : y_i (<w, x_i> + b) >= 1}`` in NumPy, float64, for the norm of
the perturbation:

===============  =======================================================  ===============
norm             method                                                   gap / eps up to
===============  =======================================================  ===============
``LInf``         linear program over ``w = sum_j mu_j a_j``, a = ±e_j      1e-11
``L1``           linear program over ``-t <= w <= t``                     1e-11
``L2``           least distance, by non-negative least squares            1e-14
``FourierLInf``  the first, waves as atoms, phases where they are needed  1e-10
``Lp``           sequential quadratic programming of the dual             1e-6
===============  =======================================================  ===============

(gaps as measured for normal inputs, up to 100 examples in 100 dimensions).

``descend`` is what the optimizers of ``robustjax.optim`` are compared with it by: steps on the
logarithm of the exponential risk, whose gradient is that of the risk over the risk. With it the
step ``1 / (B^2 L)``, B the largest dual norm of an input, is the constant step ``1 / B^2``, and
nothing under- or overflows however large the margins grow. Steepest descent in a norm then tends
to the direction of the largest margin in that norm, which is the most robust classifier in the
dual: gradient descent for l_2, coordinate descent for l_inf, signGD for l_1.

Sources: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
(2021), who leave the minimum-norm problem to a general convex solver; Lawson and Hanson,
"Solving least squares problems" (1974), chapter 23, for l_2; Gunasekar et al., "Characterizing
implicit bias in terms of optimization geometry" (2018), theorem 5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, ArrayLike, Float, PyTree

from robustjax import checks, norms
from robustjax.fourier_norms import FourierLInf
from robustjax.norms import L1, L2, LInf, Lp, Norm
from robustjax.theory import robust_classifiers
from robustjax.theory.robust_classifiers import Inputs, Signs


class MaxMargin(NamedTuple):
    """A classifier with the largest margin, and its certificate.

    Attributes:
      w: weights of minimum norm, shaped like one input: ``1 / ||w||_*`` is the margin.
      bias: 0.0 without a bias.
      weights: of the examples, ``(n,)``, ``>= 0`` with sum 1; positive on support vectors only.
      eps: the largest eps that the classifier withstands.
      bound: what the weights prove that no classifier exceeds.
    """

    w: Float[np.ndarray, "..."]
    bias: float
    weights: Float[np.ndarray, " n"]
    eps: float
    bound: float


def max_margin(x: Inputs, y: Signs, norm: Norm, *, bias: bool = False) -> MaxMargin:
    """The linear classifier that withstands the largest perturbation, for small data sets.

    With a bias, the examples become the half differences ``(x_i - x_j) / 2`` of all pairs with
    labels 1 and -1: a classifier of these without a bias, and the bias in the middle, is the
    optimum.

    Args:
      x: inputs.
      y: labels, -1 or 1.
      norm: norm of the perturbation: ``LInf``, ``L2``, ``L1``, ``Lp`` or ``FourierLInf`` for all
        frequencies.
      bias: whether there may be a bias, which no norm measures.

    Raises:
      ValueError: no classifier is right on all examples, a bias has only one class to separate,
        there is no solver for the norm, or an argument is none of these.
    """
    norms.check(norm)
    robust_classifiers.examples(x, y)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    shape = x.shape[1:]
    points = y.reshape(-1, *[1] * len(shape)) * x
    positive, negative = np.flatnonzero(y > 0), np.flatnonzero(y < 0)
    if bias:
        if not (len(positive) and len(negative)):
            raise ValueError("with a bias there must be labels of both classes, got one")
        points = (x[positive][:, None] - x[negative]).reshape(-1, *shape) / 2
    w, weights = _solve(points.reshape(len(points), -1), shape, norm)
    weights = np.maximum(weights, 0) / np.maximum(weights, 0).sum()
    scores, offset = x.reshape(len(x), -1) @ w, 0.0
    if bias:
        pairs = weights.reshape(len(positive), len(negative)) / 2
        weights = np.zeros(len(y))
        weights[positive], weights[negative] = pairs.sum(1), pairs.sum(0)
        offset = -(scores[positive].min() + scores[negative].max()) / 2
    smallest = (y * (scores + offset)).min()
    if smallest <= 0:
        raise ValueError("x must be separable by y, got examples that no classifier separates")
    w, offset = w.reshape(shape) / smallest, float(offset / smallest)
    hull = np.tensordot(weights * y, x, 1)
    with jax.enable_x64(True):
        eps = 1 / float(norm.dual.value(jnp.asarray(w)))
        bound = float(norm.value(jnp.asarray(hull)))
    return MaxMargin(w, offset, weights, eps, bound)


def log_exponential_risk(
    w: Float[ArrayLike, "..."],
    x: Inputs,
    y: Signs,
    *,
    bias: ArrayLike = 0.0,
    shares: Float[ArrayLike, " n"] | None = None,
) -> Float[Array, ""]:
    """``log mean_i exp(-y_i (<w, x_i> + b))``, accurate for margins of any size.

    Its gradient is minus the mean of ``y_i x_i`` with the ``example_weights``.

    Args:
      w: weights, shaped like one input.
      x: inputs.
      y: labels, -1 or 1.
      bias: ``b``.
      shares: of the examples in the mean, ``>= 0`` with sum 1; ``None`` for equal ones. With 0 for
        some, data sets of several sizes fit one compiled program.

    Raises:
      ValueError: shapes do not fit, a label is neither -1 nor 1, or a share is negative.
    """
    scores = robust_classifiers.scores(w, x, y, bias=bias)
    if shares is None:
        return jax.nn.logsumexp(-scores) - jnp.log(jnp.asarray(scores.size, scores.dtype))
    checks.number("shares", shares, at_least=0)
    shares = jnp.asarray(shares, scores.dtype)
    checks.per_example("shares", shares, scores.size)
    return jax.nn.logsumexp(-scores, b=shares)


def example_weights(
    w: Float[ArrayLike, "..."], x: Inputs, y: Signs, *, bias: ArrayLike = 0.0
) -> Float[Array, " n"]:
    """The share of each example in the exponential risk: weights for ``eps_bound``, for free.

    Args and errors as of ``log_exponential_risk``.
    """
    return jax.nn.softmax(-robust_classifiers.scores(w, x, y, bias=bias))


def safe_step(x: Inputs, norm: Norm) -> Float[Array, ""]:
    """``1 / B^2`` with ``B = max_i ||x_i||_*``, a step that never raises ``log_exponential_risk``.

    For ``optim.steepest_descent(norm, safe_step(x, norm), scale_by_dual_norm=True)``.

    Args:
      x: inputs.
      norm: that of the descent.

    Raises:
      ValueError: ``norm`` is no norm.

    Source: Gunasekar et al. (2018), theorem 5.
    """
    return 1 / jnp.square(jnp.max(norms.check(norm).dual.value(jnp.asarray(x), 1)))


def descend(
    transform: optax.GradientTransformation,
    risk: Callable[[Any], Float[Array, ""]],
    params: PyTree,
    steps: int,
) -> tuple[PyTree, Any]:
    """The parameters and the optimizer's state after ``steps`` steps on all data, as one scan.

    Line searches and steps that follow the loss get what they ask for: ``value``, ``grad`` and
    ``value_fn``. Compile it, and ``vmap`` it over data sets, starts and step sizes.

    Args:
      transform: optimizer.
      risk: function of the parameters, such as ``log_exponential_risk`` of linear weights or of
        the ``effective_weight`` of a network.
      params: where to start.
      steps: ``>= 0``.

    Raises:
      ValueError: an argument is none of these.
    """
    checks.transform("transform", transform)
    checks.function("risk", risk)
    checks.integer("steps", steps)
    transform = optax.with_extra_args_support(transform)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(risk)(params)
        updates, state = transform.update(
            grad, state, params, value=value, grad=grad, value_fn=risk
        )
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, transform.init(params)), length=steps)[0]


# Solvers for points z that w is to score >= 1: (n, d) to w and multipliers of the points.

_Solution = tuple[np.ndarray, np.ndarray]


def _solve(z: np.ndarray, shape: tuple[int, ...], norm: Norm) -> _Solution:
    match norm:
        case LInf():
            return _shortest_sum(z, np.concatenate([np.eye(z.shape[1]), -np.eye(z.shape[1])]))
        case L1():
            return _smallest_peak(z)
        case L2():
            return _least_distance(z)
        case Lp():
            return _dual_by_sqp(z, norm)
        case FourierLInf(low=None, high=None):
            return _shortest_sum_of_waves(z, shape)
    raise ValueError(f"norm must be LInf, L2, L1, Lp or FourierLInf of all frequencies, got {norm}")


def _linear_program(*args: Any, **bounds: Any) -> Any:
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    result = scipy.optimize.linprog(*args, **bounds, options=tight)
    if result.status == 2:
        raise ValueError("x must be separable by y, got examples that no classifier separates")
    if result.status != 0:
        raise ArithmeticError(f"the linear program was not solved: {result.message}")
    return result


def _shortest_sum(z: np.ndarray, atoms: np.ndarray) -> _Solution:
    """``min sum_j mu_j`` over ``w = sum_j mu_j a_j``, ``mu >= 0``."""
    result = _linear_program(np.ones(len(atoms)), -z @ atoms.T, -np.ones(len(z)))
    return result.x @ atoms, -result.ineqlin.marginals


def _shortest_sum_of_waves(z: np.ndarray, shape: tuple[int, ...]) -> _Solution:
    """``_shortest_sum`` over all waves, of which there is one per frequency and phase.

    A wave is missing as long as its product with the dual solution is above 1; then it is added.
    Near the optimum the phases converge quadratically.
    """
    axes, size = tuple(range(min(2, len(shape)))), z.shape[1]
    waves = np.fft.ifftn(np.eye(size).reshape(size, *shape), None, [a + 1 for a in axes], "ortho")
    waves = waves.reshape(size, size)
    # Frequency k and its negative have the same waves.
    mirror = np.roll(np.flip(np.arange(size).reshape(shape), axes), 1, axes)
    waves = waves[np.arange(size) <= mirror.ravel()]
    turns = np.exp(2j * np.pi * np.arange(8) / 8)
    atoms = (turns[:, None, None] * waves).real.reshape(-1, size)
    for _ in range(50):
        w, weights = _shortest_sum(z, atoms)
        product = waves.conj() @ (weights @ z)
        missing = np.abs(product) > 1 + 1e-10
        if not missing.any():
            break
        phases = product[missing] / np.abs(product[missing])
        atoms = np.concatenate([atoms, (phases[:, None] * waves[missing]).real])
    return w, weights


def _smallest_peak(z: np.ndarray) -> _Solution:
    """``min t`` over ``-t <= w <= t``."""
    n, d = z.shape
    one = np.ones((d, 1))
    result = _linear_program(
        np.append(np.zeros(d), 1),
        np.block([[-z, np.zeros((n, 1))], [np.eye(d), -one], [-np.eye(d), -one]]),
        np.append(-np.ones(n), np.zeros(2 * d)),
        bounds=(None, None),
    )
    return result.x[:d], -result.ineqlin.marginals[:n]


def _least_distance(z: np.ndarray) -> _Solution:
    """The least-distance problem of Lawson and Hanson: multipliers are ``u / (1 - sum u)``."""
    n, d = z.shape
    u, _ = scipy.optimize.nnls(np.vstack([z.T, np.ones(n)]), np.append(np.zeros(d), 1))
    return z.T @ u, u


def _dual_by_sqp(z: np.ndarray, norm: Lp) -> _Solution:
    """``min ||sum_i lambda_i z_i||_p^2 / 2`` over the simplex; its gradient is ``w``."""
    z = z / np.abs(z).max()
    p = norm.p

    def gradient(weights):
        v = weights @ z
        length = np.linalg.norm(v, p)
        return length**2 / 2, np.sign(v) * np.abs(v) ** (p - 1) * max(length, 1e-300) ** (2 - p)

    result = scipy.optimize.minimize(
        lambda weights: gradient(weights)[0],
        np.full(len(z), 1 / len(z)),
        jac=lambda weights: z @ gradient(weights)[1],
        method="SLSQP",
        bounds=[(0, 1)] * len(z),
        constraints={
            "type": "eq",
            "fun": lambda weights: weights.sum() - 1,
            "jac": lambda weights: np.ones_like(weights),
        },
        options={"maxiter": 1000, "ftol": 1e-16},
    )
    return gradient(result.x)[1], result.x
