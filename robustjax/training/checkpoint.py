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
      ValueError: an argument is out of range, the directory cannot be written, or what is in it
        is damaged.
    """
    checks.choice("best_mode", best_mode, ("max", "min"))
    checks.integer("keep_best", keep_best, at_least=1)
    checks.integer("keep_last", keep_last, at_least=1)
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"directory {directory} cannot be written: {error.strerror}") from error

    def score(metrics: dict[str, float]) -> float:
        checks.fields("metrics", metrics, (best_metric,))
        return metrics[best_metric]

    options = ocp.CheckpointManagerOptions(
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
    )
    # The handler that reads and writes is named, so that it can also tell what a checkpoint holds.
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = ocp.StandardCheckpointHandler()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        registry.add("default", args, handler)
    try:
        return ocp.CheckpointManager(directory, options=options, handler_registry=registry)
    except Exception as error:
        raise ValueError(f"checkpoints in {directory} are damaged: {_reason(error)}") from error


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
      like: a state of the same structure, as the run would start from. Its arrays may have been
        donated: only their shapes, dtypes and shardings are read.
      step: which checkpoint; default the latest.

    Raises:
      ValueError: there is none, or it is damaged or of another structure.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise ValueError(
            f"no checkpoint of step {step} in {manager.directory}, which holds "
            f"{', '.join(map(str, manager.all_steps())) or 'none'}"
        )
    key_data = jax.eval_shape(jax.random.key_data, like.key)
    template = jax.tree.map(_abstract, like)._replace(
        key=jax.ShapeDtypeStruct(key_data.shape, key_data.dtype, sharding=like.key.sharding)
    )
    try:
        stored = manager.restore(step, args=ocp.args.StandardRestore(template))
    except Exception as error:
        raise ValueError(
            f"checkpoint {manager.directory}/{step} is damaged or of another model: "
            f"{_mismatch(manager, step, template) or _reason(error)}"
        ) from error
    key = jax.random.wrap_key_data(stored.key, impl=jax.random.key_impl(like.key))
    return stored._replace(key=key)


def _reason(error: Exception) -> str:
    """The first line of an error of the storage library, which can run over pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def _mismatch(manager: ocp.CheckpointManager, step: int, template: TrainState) -> str | None:
    """The first array that a checkpoint does not hold as the template has it, in words."""
    try:
        held = jax.tree.leaves(manager.item_metadata(step).tree)
    except Exception:  # damaged as well; the caller reports its own error
        return None
    got = {leaf.name: f"{leaf.dtype}{leaf.shape}" for leaf in held}
    wanted = {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{leaf.shape}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    for name in sorted(wanted | got):
        if got.get(name) != wanted.get(name):
            return f"{name} must be {wanted.get(name, 'absent')}, got {got.get(name, 'nothing')}"
    return None


def _storable(state: TrainState) -> TrainState:
    return state._replace(key=jax.random.key_data(state.key))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
