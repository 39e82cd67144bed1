"""The state of a training run: arrays only, so that it is checkpointed whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from robustjax import checks, keys
from robustjax.gradients import Oracle, plain


class TrainState(NamedTuple):
    """Everything that the next step depends on, beside the data.

    Attributes:
      step: updates made so far, int32 scalar.
      params: trained parameters.
      model_state: the model's statistics (``{}`` if it has none).
      opt_state: state of the optax transform.
      oracle_state: state of the gradient oracle (``()`` if it has none).
      key: the run's typed key; step ``t`` draws from ``fold_in(key, t)``.
    """

    step: Int[Array, ""]
    params: Any
    model_state: Any
    opt_state: Any
    oracle_state: Any
    key: Key[Array, ""]


def create_state(
    params: Any,
    model_state: Any,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    oracle: Oracle | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: initial parameters.
      model_state: initial statistics, ``{}`` if none.
      optimizer: optax transform.
      key: typed key of the run.
      oracle: gradient oracle; default ``plain()``.

    Raises:
      ValueError: ``key`` is not a single typed key, or ``optimizer`` no optax transform.
    """
    checks.transform("optimizer", optimizer)
    oracle = plain() if oracle is None else oracle
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        oracle_state=oracle.init(params),
        key=keys.check_one(key),
    )


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of parameters (arrays or their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
