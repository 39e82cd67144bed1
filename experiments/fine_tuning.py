"""Training the last layer alone, on features that keep their weights."""

from typing import Any

import jax
import optax

from robustjax import models

HEAD = "head"  # what all networks here call their last layer


def only_head(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for the last layer; nothing else moves, nor has it a state.

    Raises:
      ValueError: later, when the parameters have no last layer of that name.
    """

    def labels(params: Any) -> dict[str, str]:
        _check(params)
        return {name: "trained" if name == HEAD else "frozen" for name in params}

    parts = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optax.with_extra_args_support(optax.partition(parts, labels))


def frozen_encoder(model: models.Model) -> models.Model:
    """The model whose encoder, all but the last layer, has no gradient and no training mode.

    So no backward pass goes through it but for the gradients of inputs, and BatchNorm neither
    takes nor records the statistics of a batch.

    Raises:
      ValueError: later, when the parameters have no last layer of that name.
    """

    def apply(params: Any, model_state: Any, x: Any, train: bool, key: Any) -> tuple[Any, Any]:
        del train
        fixed = jax.lax.stop_gradient(without_head(params))
        return model.apply({**fixed, HEAD: params[HEAD]}, model_state, x, False, key)

    return models.Model(model.init, apply)


def without_head(params: Any) -> dict[str, Any]:
    """The parameters of the encoder."""
    _check(params)
    return {name: value for name, value in params.items() if name != HEAD}


def _check(params: Any) -> None:
    if HEAD not in params:
        raise ValueError(f"params must hold {HEAD!r}, got {', '.join(params)}")
