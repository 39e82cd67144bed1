"""Oracles that take the gradient at perturbed weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from robustjax import checks
from robustjax.gradients.plain import Oracle, plain
from robustjax.norms import L2
from robustjax.objectives import LossFn, outer_only, stages


def awp(
    gamma: ArrayLike = 5e-3,
    *,
    oracle: Oracle | None = None,
    warmup: int = 0,
    axis_name: str | None = None,
) -> Oracle:
    """Adversarial weight perturbation: the gradient at the weights that one ascent step worsens.

    ``grad(theta + v)``, with ``v_l = gamma ||theta_l|| d_l / ||d_l||`` for every kernel ``l`` (any
    parameter with more than one axis) and ``d`` the gradient of the batch's mean loss at the
    attacked inputs. The attack runs once, at ``theta``; the update applies to ``theta``.

    Args:
      gamma: size of the perturbation relative to each kernel, ``>= 0``; 0 is ``oracle`` itself.
      oracle: how the gradient at the perturbed weights is taken; default ``plain()``. With
        ``engm(alpha)`` per-example norms are those at the perturbed weights.
      warmup: steps without perturbation, ``>= 0``; then batches need the ``step``, int32 scalar,
        that ``train_step`` puts in.
      axis_name: mapped axis over which the batch is split: the ascent direction is that of the
        whole batch, the same on all devices.

    Raises:
      ValueError: an argument is out of range.

    Source: Wu et al. (2020), "Adversarial weight perturbation helps robust generalization",
    equations (8) to (11), and public code: kernels only, warm-up of 10 epochs. Each kernel's
    direction has its own l_2 norm; statistics that the ascent step would record are discarded.
    """
    checks.number("gamma", gamma, at_least=0)
    checks.integer("warmup", warmup)
    inside = plain() if oracle is None else oracle
    if not isinstance(inside, Oracle):
        raise ValueError(f"oracle must be an Oracle such as plain(), got {checks.shown(oracle)}")

    def wrapped(loss_fn: LossFn) -> Callable:
        parts = stages(loss_fn)
        grad_fn = inside.oracle(outer_only(parts))

        def perturbed_grad_fn(params, model_state, oracle_state, key, batch):
            batch = parts.inner(params, model_state, key, batch)

            def mean_loss(params):
                return parts.outer(params, model_state, key, batch)[0].mean()

            def perturbation():
                ascent = jax.grad(mean_loss)(params)
                if axis_name is not None:
                    ascent = jax.lax.pmean(ascent, axis_name)
                return jax.tree.map(_relative_step, params, ascent)

            def _relative_step(kernel: Array, ascent: Array) -> Array:
                if kernel.ndim < 2:
                    return jnp.zeros_like(kernel)
                size = gamma * L2().value(kernel)
                return (size * L2().steepest(ascent)).astype(kernel.dtype)

            if warmup:
                checks.fields("batch", batch, ("step",))
                v = jax.lax.cond(
                    batch["step"] >= warmup,
                    perturbation,
                    lambda: jax.tree.map(jnp.zeros_like, params),
                )
            else:
                v = perturbation()
            moved: Any = jax.tree.map(jnp.add, params, v)
            return grad_fn(moved, model_state, oracle_state, key, batch)

        return perturbed_grad_fn

    return Oracle(inside.init, wrapped)
