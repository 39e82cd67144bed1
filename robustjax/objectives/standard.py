"""Standard training: the loss at the clean input; and the types that all objectives share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from robustjax import checks
from robustjax.losses import cross_entropy
from robustjax.metrics.accuracy import correct
from robustjax.models.adapters import ModelFn

# loss_fn(params, model_state, key, batch) -> (losses (n,), (model_state, metrics))
LossFn = Callable[..., tuple[Array, tuple[Any, dict[str, Array]]]]
Objective = Callable[[ModelFn], LossFn]


def model_key(key: Array, batch: dict[str, Array]) -> Array:
    """The key of the model's own randomness (dropout): another one for every shard of a batch."""
    return jax.random.fold_in(jax.random.fold_in(key, 1), batch["index"][0])


def standard(loss: Callable[[Array, Array], Array] = cross_entropy) -> Objective:
    """Empirical risk: ``loss(f(x), y)`` at the clean inputs.

    Args:
      loss: ``loss(logits, y) -> (n,)``.

    Returns:
      An objective. Its loss function takes batches ``{"image": (n, ...), "label": (n,),
      "index": (n,)}`` and reports ``loss`` and ``accuracy`` per example.
    """
    checks.function("loss", loss)

    def objective(model_fn: ModelFn) -> LossFn:
        def loss_fn(params, model_state, key, batch):
            logits, model_state = model_fn(
                params, model_state, batch["image"], True, model_key(key, batch)
            )
            losses = loss(logits, batch["label"])
            accuracy = correct(logits, batch["label"]).astype(jnp.float32)
            return losses, (model_state, {"loss": losses, "accuracy": accuracy})

        return loss_fn

    return objective
