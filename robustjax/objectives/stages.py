"""The two stages of a loss function: find the worst input, then measure the loss there.

A gradient oracle that needs more than one derivative of the same losses (per-example norms, weight
perturbation) runs the first stage once and the second one as often as it likes.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from robustjax import checks

# loss_fn(params, model_state, key, batch) -> (losses (n,), (model_state, metrics))
LossFn = Callable[..., tuple[Array, tuple[Any, dict[str, Array]]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """A loss function ``loss_fn(params, model_state, key, batch)`` that can be taken apart.

    Attributes:
      inner: ``inner(params, model_state, key, batch) -> batch``: the inner maximisation. It adds
        what it found to the batch, per example and without derivatives: ``"adversarial"``, the
        inputs ``(n, ...)``.
      outer: ``outer(params, model_state, key, batch, train=True) -> (losses (n,), (model_state,
        metrics))`` at such a batch, which may also be a part of it. ``train=False`` evaluates the
        losses with the model in evaluation mode, where no example sees another one.
    """

    inner: Callable[..., dict[str, Array]]
    outer: LossFn

    def __call__(self, params: Any, model_state: Any, key: Any, batch: dict[str, Array]):
        """The losses at what the inner stage finds."""
        batch = self.inner(params, model_state, key, batch)
        return self.outer(params, model_state, key, batch)


def stages(loss_fn: LossFn) -> Stages:
    """The stages of any loss function; a plain one has no inner stage.

    Args:
      loss_fn: from an objective, or any function with its signature. Only if it has an argument
        ``train`` can its ``outer`` be asked for evaluation mode.

    Raises:
      ValueError: ``loss_fn`` is no function; of ``outer``, evaluation mode of a function that does
        not offer it.
    """
    if isinstance(loss_fn, Stages):
        return loss_fn
    checks.function("loss_fn", loss_fn)
    has_modes = "train" in inspect.signature(loss_fn).parameters

    def outer(params, model_state, key, batch, train=True):
        if has_modes:
            return loss_fn(params, model_state, key, batch, train=train)
        if not train:
            raise ValueError("loss_fn must have an argument train to be run in evaluation mode")
        return loss_fn(params, model_state, key, batch)

    return Stages(lambda params, model_state, key, batch: batch, outer)


def outer_only(loss_fn: LossFn) -> Stages:
    """The second stage alone, for batches that have been through the first."""
    return Stages(lambda params, model_state, key, batch: batch, stages(loss_fn).outer)
