"""The gradient of a penalised loss, with that of the penalty clipped on its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from robustjax import checks
from robustjax.gradients.plain import Oracle
from robustjax.norms import L2
from robustjax.objectives import LossFn, stages


def clip_penalty(max_norm: ArrayLike = 10.0, *, axis_name: str | None = None) -> Oracle:
    """``grad(base) + clip(grad(penalty))``: the penalty cannot pull harder than ``max_norm``.

    The penalty of ``objectives.penalized`` is the part of the loss that is reported as ``penalty``;
    its gradient, the mean over the batch, is projected on the l_2 ball over all parameters. It
    costs a second backward pass.

    Args:
      max_norm: ``> 0``; the 10 of SOAR's "clipping of 10 on the regularizer", of which the value of
        the penalty itself (``soar(..., clip=10)``) is the other reading.
      axis_name: mapped axis over which the batch is split: the norm is that of the whole.

    Raises:
      ValueError: ``max_norm`` is not positive; in a step, the objective reports no penalty.

    Source: Ma (2025), "Understanding adversarial robustness in deep learning", appendix 3.A.
    """
    checks.number("max_norm", max_norm, above=0)

    def oracle(loss_fn: LossFn) -> Callable:
        parts = stages(loss_fn)

        def grad_fn(params, model_state, oracle_state, key, batch):
            batch = parts.inner(params, model_state, key, batch)

            def means(params: Any) -> tuple[tuple[Array, Array], Any]:
                losses, (state, metrics) = parts.outer(params, model_state, key, batch)
                checks.fields("metrics of the objective", metrics, ("penalty",))
                penalty = metrics["penalty"]
                return ((losses - penalty).mean(), penalty.mean()), (state, metrics)

            (base, penalty), pull_back, aux = jax.vjp(means, params, has_aux=True)
            one, zero = jnp.ones_like(base), jnp.zeros_like(penalty)
            (of_base,), (of_penalty,) = pull_back((one, zero)), pull_back((zero, one))
            if axis_name is not None:
                of_penalty = jax.lax.pmean(of_penalty, axis_name)
            clipped = L2().project(of_penalty, max_norm)
            grads = jax.tree.map(jnp.add, of_base, clipped)
            new_state, metrics = aux
            return grads, (new_state, oracle_state, metrics)

        return grad_fn

    return Oracle(lambda params: (), oracle)
