"""The plain gradient oracle: the gradient of the mean loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from robustjax import checks


class Oracle(NamedTuple):
    """How the gradient is computed, as a pair of functions.

    Attributes:
      init: ``init(params) -> oracle_state``, a pytree of arrays.
      oracle: ``oracle(loss_fn) -> grad_fn`` with ``grad_fn(params, model_state, oracle_state, key,
        batch) -> (grads, (model_state, oracle_state, metrics))``. Gradients are those of the
        examples at hand; the mean over devices is taken by the training step. Metrics are per
        example.
    """

    init: Callable[[Any], Any]
    oracle: Callable[[Callable], Callable]


def plain() -> Oracle:
    """The gradient of the mean of the per-example losses, in one backward pass."""

    def init(params: Any) -> tuple:
        del params
        return ()

    def oracle(loss_fn: Callable) -> Callable:
        def grad_fn(params, model_state, oracle_state, key, batch):
            def mean_loss(params) -> tuple[Array, Any]:
                losses, aux = loss_fn(params, model_state, key, batch)
                checks.per_example("losses of the objective", losses, batch["label"].shape[0])
                return losses.mean(), aux

            grads, (new_model_state, metrics) = jax.grad(mean_loss, has_aux=True)(params)
            return grads, (new_model_state, oracle_state, metrics)

        return grad_fn

    return Oracle(init, oracle)
