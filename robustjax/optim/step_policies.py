"""Step sizes that follow the loss: for steepest descent on separable data in any norm.

The loss of a linear classifier on separable data falls to zero without a minimiser, and its
curvature falls with it, so that the steps may grow as ``1 / loss``.

A line search with halving is ``optax.scale_by_backtracking_linesearch``: with ``slope_rtol=1e-4,
max_backtracking_steps=20, increase_factor=inf, max_learning_rate=1000`` it starts every search at
1000 and stops at the first step that meets Armijo's condition.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from robustjax import checks


def scale_by_loss_bound(
    data_norm: ArrayLike, *, max_step: ArrayLike = math.inf
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by ``min(max_step, 1 / (B^2 L))``, with the loss L as ``value=``.

    After ``scale_by_steepest(norm, scale_by_dual_norm=True)`` and with ``B = max_i ||x_i||_*`` this
    is a step that does not raise the exponential loss ``mean_i exp(-y_i <w, x_i>)``, and with it
    ``w / ||w||`` goes to the classifier of the largest margin in ``norm``, which is the most robust
    one against perturbations measured in the dual norm. The bound is the same for a mean and for a
    sum of losses, whose gradients scale alike.

    Args:
      data_norm: ``B``, the largest norm of an input in the dual of the optimizer's norm, ``> 0``:
        l_2 for gradient descent, l_inf for coordinate descent, l_1 for signGD.
      max_step: the largest factor, ``> 0``; it may be traced.

    Returns:
      A transformation whose ``update`` needs ``value``, the loss at ``params``.

    Raises:
      ValueError: an argument is not positive; in ``update``, ``value`` is missing.

    Source: Gunasekar et al. (2018), "Characterizing implicit bias in terms of optimization
    geometry", theorem 5.
    """
    checks.number("data_norm", data_norm, above=0)
    checks.number("max_step", max_step, above=0, at_most=math.inf)

    def update(updates, state, params=None, *, value=None, **extra):
        del params, extra
        if value is None:
            raise ValueError("value must be the loss at the parameters, got None")
        # At a loss of zero, which only rounding reaches, there is no bound.
        bound = 1 / jnp.maximum(jnp.square(data_norm) * value, jnp.finfo(jnp.float32).tiny)
        factor = jnp.minimum(max_step, bound)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
