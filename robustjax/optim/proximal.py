"""Proximal gradient descent and its acceleration (FISTA), for ``f(w) + h(w)`` with f smooth.

Gradients are those of f alone; h enters as its proximal map, ``prox(v, t)``, the minimiser over w
of ``||w - v||_2^2 / 2 + t h(w)``. From the norms come

===========================  =================================  ===================================
``prox``                     h                                  the method is then called
===========================  =================================  ===================================
``norm_penalty``             ``coefficient ||w||``              ISTA and FISTA, for l_1
``squared_norm_penalty``     ``coefficient ||w||^2 / 2``
``ball_constraint``          0 where ``||w|| <= radius``        projected gradient descent
===========================  =================================  ===================================

Each step is ``prox(w - s g, s)``. A norm has no derivative at 0, where gradient descent would never
arrive; proximal steps do, and stay.

Source: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse
problems" (2009).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, PyTree

from robustjax import checks, norms
from robustjax.norms import Norm

Prox = Callable[[Any, Any], Any]


def norm_penalty(norm: Norm, coefficient: ArrayLike) -> Prox:
    """The proximal map of ``coefficient ||w||``; the whole tree is one vector.

    As the coefficient falls to 0 on separable data, w tends in direction to the largest margin in
    ``norm``, and so to the most robust classifier in its dual.

    Args:
      norm: norm of the penalty.
      coefficient: ``>= 0``; it may be traced.

    Raises:
      ValueError: ``norm`` is no norm, or the coefficient is negative.

    Source: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
    (2021), on explicit regularisation.
    """
    norms.check(norm)
    checks.number("coefficient", coefficient, at_least=0)
    return lambda v, t: norm.prox(v, coefficient * t)


def squared_norm_penalty(norm: Norm, coefficient: ArrayLike) -> Prox:
    """The proximal map of ``coefficient ||w||^2 / 2``. Args and errors as of ``norm_penalty``."""
    norms.check(norm)
    checks.number("coefficient", coefficient, at_least=0)
    return lambda v, t: norm.prox_squared(v, coefficient * t)


def ball_constraint(norm: Norm, radius: ArrayLike) -> Prox:
    """The projection on ``||w|| <= radius``, whatever the step.

    Args:
      norm: norm of the ball.
      radius: ``>= 0``; it may be traced.

    Raises:
      ValueError: ``norm`` is no norm, or the radius is negative.
    """
    norms.check(norm)
    checks.number("radius", radius, at_least=0)
    return lambda v, t: norm.project(v, radius)


class ProximalState(NamedTuple):
    """State of ``proximal_gradient``.

    Attributes:
      step_size: the step accepted last.
    """

    step_size: Float[Array, ""]


class FistaState(NamedTuple):
    """State of ``fista``.

    Attributes:
      step_size: the step accepted last.
      momentum: ``t_k``, which grows like ``k / 2``.
      params: ``x_k``, the result so far.
    """

    step_size: Float[Array, ""]
    momentum: Float[Array, ""]
    params: PyTree


def proximal_gradient(
    prox: Prox,
    step_size: ArrayLike,
    *,
    max_halvings: int = 0,
    increase_factor: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Updates that carry w to ``prox(w - s g, s)``.

    With ``s <= 1 / L``, L the Lipschitz constant of the gradient, ``f + h`` never rises and is
    within ``||w_0 - w*||^2 / (2 s k)`` of its minimum after k steps, if both are convex. It is a
    whole optimizer, not a link before others: the gradient must reach it unscaled.

    Args:
      prox: ``prox(v, t)``, shaped like v: ``norm_penalty(...)`` or another.
      step_size: ``s > 0``; with a line search, the largest step. It may be traced.
      max_halvings: 0 for a fixed step. Otherwise s is halved, at most so often, until
        ``f(x) <= f(w) + <g, x - w> + ||x - w||^2 / (2 s)`` up to rounding at the new point x.
      increase_factor: a search begins at the step accepted last times this number, ``>= 1``, but
        no higher than ``step_size``. Losses of separable data flatten: 2, with a ``step_size`` of
        1e6, keeps up with them. With inf each search begins at ``step_size``.

    Returns:
      A transformation whose ``update`` needs ``params`` and, for a line search, ``value``, which
      is f there, and ``value_fn``, which is f.

    Raises:
      ValueError: an argument is out of range; in ``update``, one is missing.
    """
    step = _step(prox, step_size, max_halvings, increase_factor)

    def init(params: Any) -> ProximalState:
        return ProximalState(_number(step_size, params))

    def update(updates, state, params=None, *, value=None, value_fn=None, **extra):
        del extra
        new, size = step(updates, state.step_size, params, value, value_fn)
        return jax.tree.map(jnp.subtract, new, params), ProximalState(size)

    return optax.GradientTransformationExtraArgs(init, update)


def fista(
    prox: Prox,
    step_size: ArrayLike,
    *,
    max_halvings: int = 0,
    increase_factor: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Accelerated proximal gradient descent: gradients are taken ahead of the result.

    The parameters that optax updates are the points ``y_k`` at which the gradient is wanted; the
    result is ``x_k = prox(y_k - s g, s)``, which ``fista_params(state)`` returns:

        t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2,
        y_{k+1} = x_k + (t_k - 1) / t_{k+1} (x_k - x_{k-1}),    y_1 = x_0,  t_1 = 1.

    With ``s <= 1 / L``, ``f + h`` at ``x_k`` is within ``2 ||x_0 - x*||^2 / (s (k + 1)^2)`` of its
    minimum, if both are convex; it may rise in between.

    Args:
      prox: as in ``proximal_gradient``.
      step_size: as there.
      max_halvings: as there. Faghri et al. (2021) use 20.
      increase_factor: as there. 1 is what the bound assumes; inf is what Faghri et al. (2021) do,
        with ``step_size`` 1 to 1000.

    Returns:
      A transformation whose ``update`` needs what that of ``proximal_gradient`` needs.

    Raises:
      ValueError: an argument is out of range; in ``update``, one is missing.
    """
    step = _step(prox, step_size, max_halvings, increase_factor)

    def init(params: Any) -> FistaState:
        # A copy: params may be donated.
        result = jax.tree.map(jnp.array, params)
        return FistaState(_number(step_size, params), _number(1.0, params), result)

    def update(updates, state, params=None, *, value=None, value_fn=None, **extra):
        del extra
        new, size = step(updates, state.step_size, params, value, value_fn)
        momentum = (1 + jnp.sqrt(1 + 4 * jnp.square(state.momentum))) / 2
        ahead = (state.momentum - 1) / momentum
        point = jax.tree.map(
            lambda x, old: x + ahead.astype(x.dtype) * (x - old), new, state.params
        )
        changes = jax.tree.map(jnp.subtract, point, params)
        return changes, FistaState(size, momentum, new)

    return optax.GradientTransformationExtraArgs(init, update)


def fista_params(state: FistaState) -> PyTree:
    """The result of ``fista``: ``x_k``, where the optimizer's parameters are ``y_{k+1}``."""
    return state.params


def _step(prox: Prox, step_size: Any, max_halvings: int, increase_factor: float) -> Callable:
    """``(g, size, params, value, value_fn)`` to the next point and the step that led there."""
    checks.function("prox", prox)
    checks.number("step_size", step_size, above=0)
    checks.integer("max_halvings", max_halvings)
    checks.number("increase_factor", increase_factor, at_least=1, at_most=float("inf"))

    def step(g, size, params, value, value_fn):
        if params is None:
            raise ValueError("params must be the point of the gradient, got None")

        def candidate(size):
            moved = jax.tree.map(lambda w, g: w - size.astype(w.dtype) * g, params, g)
            return prox(moved, size)

        if not max_halvings:
            return candidate(size), size
        if value is None or value_fn is None:
            raise ValueError("value and value_fn must be given to a line search, got None")

        def too_long(state):
            halvings, size, new = state
            change = jax.tree.map(jnp.subtract, new, params)
            model = (
                value
                + optax.tree.vdot(g, change)
                + optax.tree.norm(change, squared=True) / (2 * size)
            )
            # At the optimum the two sides differ by rounding only.
            rounding = 8 * jnp.finfo(size.dtype).eps * jnp.abs(value)
            # Written so that a value that is not a number is too long a step as well.
            return (halvings < max_halvings) & ~(value_fn(new) <= model + rounding)

        def halve(state):
            halvings, size, _ = state
            return halvings + 1, size / 2, candidate(size / 2)

        start = jnp.minimum(size * increase_factor, jnp.asarray(step_size, size.dtype))
        _, size, new = jax.lax.while_loop(too_long, halve, (0, start, candidate(start)))
        return new, size

    return step


def _number(value: Any, params: Any) -> Float[Array, ""]:
    """A number of the state, in at least float32."""
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    return jnp.asarray(value, dtype)
