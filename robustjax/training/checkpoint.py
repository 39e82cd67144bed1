"""Checkpoints of the training state with orbax: saved in the background, best and last kept."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from robustjax import checks
from robustjax.training.state import TrainState


def open_checkpoints(
    directory: str | os.PathLike,
    *,
    best_metric: str,
    best_mode: str = "max",
    keep_best: int = 1,
    keep_last: int = 2,
) -> ocp.CheckpointManager:
    """An orbax manager that keeps the best checkpoints by a metric and the last ones.

    Args:
      directory: where they live; made if it is not there.
      best_metric: name of the metric that ranks checkpoints, among those given to ``save``.
      best_mode: ``"max"`` or ``"min"``.
      keep_best: best checkpoints kept, ``>= 1``.
      keep_last: last checkpoints kept, ``>= 1``.

    Raises:
      ValueError: an argument is out of range, or the directory cannot be written.
    """
    checks.choice("best_mode", best_mode, ("max", "min"))
    checks.integer("keep_best", keep_best, at_least=1)
    checks.integer("keep_last", keep_last, at_least=1)
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write checkpoints to {directory}: {error}") from error

    def score(metrics: dict[str, float]) -> float:
        return metrics[best_metric]

    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            best_fn=score,
            best_mode=best_mode,
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [
                    preservation_policy.LatestN(keep_last),
                    preservation_policy.BestN(
                        get_metric_fn=score, reverse=best_mode == "min", n=keep_best
                    ),
                ]
            ),
        ),
    )


def save(manager: ocp.CheckpointManager, state: TrainState, metrics: dict[str, float]) -> None:
    """Starts to save the state under its step; returns before it is on disk."""
    # A copy, since the background writer may still read when the next step reuses the buffers of
    # its donated state.
    stored = jax.tree.map(jnp.copy, _storable(state))
    manager.save(int(state.step), args=ocp.args.StandardSave(stored), metrics=metrics)


def restore(
    manager: ocp.CheckpointManager, like: TrainState, *, step: int | None = None
) -> TrainState:
    """Reads a checkpoint into the shapes, dtypes and shardings of ``like``.

    Args:
      manager: from ``open_checkpoints``.
      like: a state of the same structure, as the run would start from.
      step: which checkpoint; default the latest.

    Raises:
      ValueError: there is none, or it is damaged or of another structure.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise ValueError(f"no checkpoint of step {step} in {manager.directory}")
    template = jax.tree.map(_abstract, _storable(like))
    try:
        stored = manager.restore(step, args=ocp.args.StandardRestore(template))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"checkpoint {manager.directory}/{step} is damaged or of another model: "
            f"{type(error).__name__}: {reason[0][:300] if reason else ''}"
        ) from error
    key = jax.random.wrap_key_data(stored.key, impl=jax.random.key_impl(like.key))
    return stored._replace(key=key)


def _storable(state: TrainState) -> TrainState:
    return state._replace(key=jax.random.key_data(state.key))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
