"""Standard training: the loss at the clean input; and the types that all objectives share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from robustjax import checks
from robustjax.losses import cross_entropy
from robustjax.metrics.accuracy import correct
from robustjax.models.adapters import ModelFn
from robustjax.objectives.stages import LossFn

Objective = Callable[[ModelFn], LossFn]


def model_key(key: Array, batch: dict[str, Array]) -> Array:
    """The key of the model's own randomness (dropout): another one for every shard of a batch."""
    return jax.random.fold_in(jax.random.fold_in(key, 1), batch["index"][0])


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """A model function that ``logits_of`` need not call for the arguments of which it has a result.

    Attributes:
      model_fn: the model itself.
      arguments: of ``logits_of``: params, model state, key, index of the batch, inputs, mode.
      result: what ``logits_of`` returns for them.
    """

    model_fn: ModelFn
    arguments: tuple
    result: tuple[Array, Any]

    def __call__(self, *arguments: Any):
        """The model itself."""
        return self.model_fn(*arguments)

    def knows(self, *arguments: Any) -> bool:
        """Whether these are the very same objects; equal values of others would cost a look."""
        return all(a is b for a, b in zip(self.arguments, arguments, strict=True))


def logits_of(
    model_fn: ModelFn,
    params,
    model_state,
    key: Array,
    batch: dict[str, Array],
    x: Array,
    train: bool,
):
    """Logits at ``x`` and the new state of the model; its own randomness is that of training."""
    if isinstance(model_fn, Evaluated) and model_fn.knows(
        params, model_state, key, batch["index"], x, train
    ):
        return model_fn.result
    return model_fn(params, model_state, x, train, model_key(key, batch) if train else None)


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
        def loss_fn(params, model_state, key, batch, train=True):
            logits, model_state = logits_of(
                model_fn, params, model_state, key, batch, batch["image"], train
            )
            losses = loss(logits, batch["label"])
            accuracy = correct(logits, batch["label"]).astype(jnp.float32)
            return losses, (model_state, {"loss": losses, "accuracy": accuracy})

        return loss_fn

    return objective
