"""Linear classifiers trained in every way: one compiled program for each optimizer and norm.

A program maps over data sets (seeds and ratios ``d / n``) and over a grid of step sizes or
coefficients at once. Data sets of fewer examples are filled up with repeated ones that have no
share in the risk. Everything is float64 and wants ``jax.enable_x64``.

What is trained, and what it is expected to be the most robust to:

==================  ==========================================  =================================
program             minimises                                   most robust to
==================  ==========================================  =================================
``steepest``        the risk, by steepest descent in a norm     the dual of the norm
``line_search``     the risk, by gradient descent               l_2
``penalised``       logistic risk + coefficient ``||w||``       the dual of the norm
``adversarial``     exponential risk under attack               the attack, for eps below eps*
``convolutional``   exponential risk, two-layer network         Fourier-l_inf
``dense``           exponential risk, fully connected network   l_2
``preconditioned``  exponential risk                            ``delta^T P^-1 delta <= eps^2``
==================  ==========================================  =================================

The exponential risk is minimised by its logarithm, whose gradient is that of the risk over the
risk. Under attack it is the logarithm of the risk plus ``eps ||w||_*``: adversarial training of a
linear classifier is a norm penalty, which proximal steps solve: the norm has no derivative where
weights are 0, and descent with a constant step does not settle there.

Source: Faghri, Gowal, Vasconcelos, Fleet, Pedregosa and Le Roux (2021), "Bridging the gap between
adversarial robustness and optimization bias", sections 5.4 to 5.6, appendix B.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from robustjax import optim
from robustjax.metrics.margins import max_eps
from robustjax.norms import L2, Norm
from robustjax.theory import linear_networks, max_margin, robust_classifiers, saddle_point

# Attack of the linear experiments: steps of this length, then onto the sphere.
INNER_STEPS, INNER_RATE = 10, 0.1
_L2 = L2()
# Radii that are tried, in largest eps of all classifiers.
ATTACK_GRID = np.unique(np.round([*np.arange(0, 2.01, 0.1), *np.arange(0.9, 0.995, 0.01)], 3))


class Examples(NamedTuple):
    """Data sets of one shape; the sets of one size are neighbours.

    Attributes:
      x: inputs ``(sets, n, d)``.
      y: labels ``(sets, n)``, -1.0 or 1.0.
      shares: of the examples in the risk ``(sets, n)``; 0 for what only fills up.
      key: of networks ``(sets,)``, one for each seed.
    """

    x: Any
    y: Any
    shares: Any
    key: Any


def draw(sizes: Sequence[int], seeds: int, d: int = 100) -> Examples:
    """Normal inputs with the labels of a normal teacher, ``len(sizes) * seeds`` data sets.

    The sets of a seed share their first examples, so that fewer are easier. NumPy draws the
    teacher, then the inputs.

    Args:
      sizes: numbers of examples n.
      seeds: sets of each size: 0, 1, ...
      d: dimension.
    """
    rows, sets = max(sizes), []
    for n in sizes:
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            teacher, x = rng.normal(size=d), rng.normal(size=(rows, d))
            kept = np.arange(rows) % n
            shares = np.where(np.arange(rows) < n, 1 / n, 0)
            sets.append((x[kept], np.sign(x @ teacher)[kept], shares))
    x, y, shares = (jnp.asarray(np.stack(part)) for part in zip(*sets, strict=True))
    key = jnp.stack([jax.random.key(100 + seed) for _ in sizes for seed in range(seeds)])
    return Examples(x, y, shares, key)


def abstract(examples: Examples) -> Examples:
    """Shapes alone, for counting."""
    return jax.eval_shape(lambda e: e, examples)


Risk = Callable[[Array], Array]


def log_risk(one: Examples, of: Callable[[Any], Array] = lambda w: w) -> Risk:
    """The logarithm of the exponential risk of one data set, with weights ``of(params)``."""
    return lambda params: max_margin.log_exponential_risk(
        of(params), one.x, one.y, shares=one.shares
    )


def logistic_risk(one: Examples) -> Risk:
    """The logistic risk of one data set."""

    def risk(w):
        scores = robust_classifiers.scores(w, one.x, one.y)
        return jnp.sum(one.shares * saddle_point.logistic(scores))

    return risk


RISKS = {"exponential": log_risk, "logistic": logistic_risk}


def _mapped(one: Callable, examples: Examples, *grid: Any) -> Array:
    """``one(data set, *numbers)``, ``(grid, sets, ...)``; numbers are ``(grid,)`` or with sets."""
    grid = [jnp.asarray(numbers) for numbers in grid]
    in_sets = (0, *(0 if numbers.ndim == 2 else None for numbers in grid))
    over_sets = jax.vmap(one, in_axes=in_sets)
    return jax.vmap(over_sets, in_axes=(None, *[0] * len(grid)))(examples, *grid)


def _start(one: Examples) -> Array:
    return jnp.zeros(one.x.shape[1])


@functools.partial(jax.jit, static_argnames=("norm", "steps", "loss"))
def steepest(examples: Examples, rates: Any, *, norm: Norm, steps: int, loss: str) -> Array:
    """Weights ``(rates, sets, d)`` after steepest descent in a norm.

    Args:
      examples: data sets.
      rates: step sizes: for the exponential risk in units of ``max_margin.safe_step``; for the
        logistic one as they are, but never above the bound ``1 / (B^2 L)``.
      norm: of the descent.
      steps: number of steps.
      loss: ``"exponential"`` or ``"logistic"``.
    """

    def one(examples, rate):
        step = max_margin.safe_step(examples.x, norm)
        direction = optim.scale_by_steepest(norm, scale_by_dual_norm=True)
        if loss == "exponential":
            size = optax.scale(rate * step)
        else:
            size = optim.scale_by_loss_bound(step**-0.5, max_step=rate)
        transform = optax.chain(direction, size, optax.scale(-1.0))
        return max_margin.descend(transform, RISKS[loss](examples), _start(examples), steps)[0]

    return _mapped(one, examples, rates)


@functools.partial(jax.jit, static_argnames=("norm", "steps"))
def line_search(
    examples: Examples, largest: Any, eps: Any = 0.0, *, norm: Norm = _L2, steps: int
) -> Array:
    """Weights ``(grid, sets, d)`` of gradient descent whose steps are halved to Armijo's rule.

    The exponential risk: on the logistic one the largest steps that the rule admits lead astray
    where there are many examples.

    Args:
      examples: data sets.
      largest: steps at which searches begin, ``(grid,)``.
      eps: size of an attack, ``(grid, sets)``; default none.
      norm: of the attack.
      steps: number of steps.
    """

    def one(examples, largest, eps):
        def risk(w):
            return log_risk(examples)(w) + eps * norm.dual.value(w)

        search = optax.scale_by_backtracking_linesearch(
            20, slope_rtol=1e-4, increase_factor=float("inf"), max_learning_rate=largest
        )
        transform = optax.chain(optax.scale(-1.0), search)
        return max_margin.descend(transform, risk, _start(examples), steps)[0]

    eps = eps if np.ndim(eps) else jnp.full(len(largest), eps)
    return _mapped(one, examples, largest, eps)


@functools.partial(jax.jit, static_argnames=("norm", "steps", "increase"))
def penalised(
    examples: Examples,
    coefficients: Any,
    largest: Any,
    *,
    norm: Norm,
    steps: int,
    increase: float = 2.0,
) -> Array:
    """Minimisers ``(grid, sets, d)`` of the logistic risk and ``coefficient ||w||``, by FISTA.

    Args:
      examples: data sets.
      coefficients: ``(grid,)``, or ``(grid, sets)``.
      largest: steps at which searches may begin, ``(grid,)``.
      norm: of the penalty.
      steps: number of steps.
      increase: a search begins at the step found last times this; with inf at the largest.
    """

    def one(examples, coefficient, largest):
        prox = optim.norm_penalty(norm, coefficient)
        transform = optim.fista(prox, largest, max_halvings=30, increase_factor=increase)
        risk = logistic_risk(examples)
        return optim.fista_params(max_margin.descend(transform, risk, _start(examples), steps)[1])

    return _mapped(one, examples, coefficients, largest)


@functools.partial(jax.jit, static_argnames=("norm", "steps"))
def adversarial(examples: Examples, eps: Any, *, norm: Norm, steps: int) -> Array:
    """Weights ``(grid, sets, d)`` trained under attacks of size eps ``(grid, sets)``, by FISTA.

    Below eps* they grow without end, in a direction that tends to a limit; above, they are the
    minimiser, exactly 0 from ``saddle_point.zero_eps`` on.
    """

    def one(examples, eps):
        prox = optim.norm_penalty(norm.dual, eps)
        transform = optim.fista(prox, max_margin.safe_step(examples.x, L2()))
        risk = log_risk(examples)
        return optim.fista_params(max_margin.descend(transform, risk, _start(examples), steps)[1])

    return _mapped(one, examples, eps)


@functools.partial(jax.jit, static_argnames=("norm", "steps", "inner"))
def attacked_descent(examples: Examples, eps: Any, *, norm: Norm, steps: int, inner: bool) -> Array:
    """As ``adversarial`` by gradient descent with falling steps, from weights of 0.001.

    Args:
      examples: data sets.
      eps: size of the attack, ``(grid, sets)``.
      norm: of the attack.
      steps: number of steps.
      inner: find the perturbations by ``directions``; else their closed form.
    """

    def one(examples, eps):
        def closed(w):
            return log_risk(examples)(w) + eps * norm.dual.value(w)

        def attacked(w):
            moved = examples.x + eps * directions(w, examples.x, examples.y, norm)
            return log_risk(examples._replace(x=jax.lax.stop_gradient(moved)))(w)

        transform = optax.sgd(lambda t: INNER_RATE / jnp.sqrt(1 + t / 100))
        start = jnp.full(examples.x.shape[1], 1e-3)
        return max_margin.descend(transform, attacked if inner else closed, start, steps)[0]

    return _mapped(one, examples, eps)


@functools.partial(jax.jit, static_argnames=("every", "times", "dtype"))
def convolutional(
    examples: Examples, rates: Any, scales: Any, *, every: int, times: int, dtype: Any = "float64"
) -> Array:
    """Effective weights ``(grid, sets, times, d)`` of two-layer networks under gradient descent.

    Args:
      examples: data sets.
      rates: step sizes ``(grid,)``.
      scales: l_2 norms of the first layer at the start, ``(grid,)``.
      every: steps between two weights.
      times: number of weights.
      dtype: in which all is computed.
    """

    def one(examples, rate, scale):
        key, d = examples.key, examples.x.shape[1]
        x, y, shares = (v.astype(dtype) for v in examples[:3])
        risk = log_risk(Examples(x, y, shares, key), linear_networks.convolutional_weight)
        first, last = linear_networks.init_convolutional(key, d)
        layers = [(scale * first).astype(dtype), last.astype(dtype)]

        def stretch(layers, _):
            rates = optax.sgd(rate.astype(dtype))
            layers = max_margin.descend(rates, risk, layers, every)[0]
            return layers, linear_networks.convolutional_weight(layers)

        return jax.lax.scan(stretch, layers, length=times)[1]

    return _mapped(one, examples, rates, scales)


@functools.partial(jax.jit, static_argnames=("steps",))
def dense(examples: Examples, rates: Any, *, steps: int) -> Array:
    """Effective weights ``(rates, sets, d)`` of networks with three full layers.

    Gradient descent, whose steps ``linear_networks.scale_by_layers`` shortens as layers grow.
    """

    def one(examples, rate):
        d = examples.x.shape[1]
        layers = linear_networks.init_dense(examples.key, (d, d, d))
        risk = log_risk(examples, linear_networks.dense_weight)
        transform = optax.chain(linear_networks.scale_by_layers(), optax.sgd(rate))
        return linear_networks.dense_weight(max_margin.descend(transform, risk, layers, steps)[0])

    return _mapped(one, examples, rates)


@functools.partial(jax.jit, static_argnames=("steps",))
def preconditioned(examples: Examples, preconditioner: Array, *, steps: int) -> Array:
    """Weights ``(sets, d)`` after steps ``P^-1 g``, with diagonals ``P`` of ``(sets, d)``."""

    def one(examples, p):
        # B is the largest norm of an input in the dual of the norm of the descent.
        step = max_margin.safe_step(examples.x / jnp.sqrt(p), L2())
        transform = optax.chain(optim.scale_by_preconditioner(p), optax.scale(-step))
        return max_margin.descend(transform, log_risk(examples), _start(examples), steps)[0]

    return jax.vmap(one)(examples, preconditioner)


# What the weights withstand.


class Optimum(NamedTuple):
    """The most robust classifiers of the data sets.

    Attributes:
      eps: the largest eps ``(sets,)``.
      gap: what the certificate leaves open, relative to it, ``(sets,)``.
    """

    eps: np.ndarray
    gap: np.ndarray


def optimum(examples: Examples, norm: Norm) -> Optimum:
    """The reference of all: exact solvers, one data set after the other."""
    found = []
    for x, y, shares in zip(*map(np.asarray, examples[:3]), strict=True):
        solved = max_margin.max_margin(x[shares > 0], y[shares > 0], norm)
        found.append((solved.eps, (solved.bound - solved.eps) / solved.eps))
    return Optimum(*np.array(found).T)


@functools.partial(jax.jit, static_argnames=("norm",))
def largest_eps(weights: Array, examples: Examples, *, norm: Norm) -> Array:
    """The largest eps of weights ``(..., sets, d)`` by their margins, ``(..., sets)``."""

    def one(w, x, y):
        return robust_classifiers.largest_eps(w, x, y, norm)

    over = jax.vmap(one)
    for _ in weights.shape[:-2]:
        over = jax.vmap(over, in_axes=(0, None, None))
    return over(weights, examples.x, examples.y)


def directions(w: Array, x: Array, y: Array, norm: Norm, steps: int = INNER_STEPS) -> Array:
    """Perturbations of unit norm by steepest ascent on the logistic loss, ``(n, d)``.

    The weights are scaled to margins of norm 1, so that the loss has a gradient. A linear
    classifier is attacked in the same direction at any size: it remains to scale them.
    """
    size = norm.dual.value(w)
    w = w / jnp.where(size > 0, size, 1)

    def loss(delta):
        return jnp.sum(saddle_point.logistic(y * ((x + delta) @ w)))

    def step(delta, _):
        return delta + INNER_RATE * norm.steepest(jax.grad(loss)(delta), 1), None

    delta = jax.lax.scan(step, jnp.zeros_like(x), length=steps)[0]
    length = norm.value(delta, 1)[:, None]
    return delta / jnp.where(length > 0, length, 1)


@functools.partial(jax.jit, static_argnames=("norm",))
def _accuracies(weights: Array, examples: Examples, radii: Array, *, norm: Norm) -> Array:
    """Accuracy ``(sets, radii)`` on the training sets under attacks."""

    def one(w, x, y, radii):
        moves = y * (directions(w, x, y, norm) @ w)
        scores = robust_classifiers.scores(w, x, y) + radii[:, None] * moves
        return jnp.mean(scores > 0, axis=1)

    return jax.vmap(one)(weights, examples.x, examples.y, radii)


def attacked_eps(weights: Array, examples: Examples, norm: Norm, best: np.ndarray) -> np.ndarray:
    """The largest radius ``(sets,)`` of the grid at which attacks cause no training error.

    Args:
      weights: ``(sets, d)``.
      examples: data sets.
      norm: of the attack.
      best: the largest eps of all classifiers, the unit of the grid, ``(sets,)``.
    """
    radii = best[:, None] * ATTACK_GRID
    accuracies = np.asarray(_accuracies(weights, examples, jnp.asarray(radii), norm=norm))
    found = []
    for radius, accuracy in zip(radii, accuracies, strict=True):
        table = dict(zip(radius.tolist(), accuracy.tolist(), strict=True))
        found.append(max_eps(table.__getitem__, radius) or 0.0)
    return np.array(found)
