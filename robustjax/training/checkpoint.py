"""Checkpoints of the training state with orbax: saved in the background, best and last kept.

A checkpoint holds check sums of its arrays beside them, so that one that was damaged on the disk is
never taken for a good one.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from robustjax import checks, parallel
from robustjax.training.state import TrainState

if TYPE_CHECKING:  # imported where it is used: it takes longer than all else here
    import orbax.checkpoint as ocp


def make_directory(directory: str | os.PathLike) -> Path:
    """Makes the folder of checkpoints, if it is not there.

    Returns:
      Its absolute path.

    Raises:
      ValueError: it cannot be written.
    """
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"directory {directory} cannot be written: {error.strerror}") from error
    return directory


def open_checkpoints(
    directory: str | os.PathLike,
    *,
    best_metric: str | None,
    best_mode: str = "max",
    keep_best: int = 1,
    keep_last: int = 2,
    read_only: bool = False,
) -> ocp.CheckpointManager:
    """An orbax manager that keeps the best checkpoints by a metric and the last ones.

    Args:
      directory: where they live; made if it is not there.
      best_metric: name of the metric that ranks checkpoints, among those given to ``save``; None:
        only the last ones are kept.
      best_mode: ``"max"`` or ``"min"``.
      keep_best: best checkpoints kept, ``>= 1``.
      keep_last: last checkpoints kept, ``>= 1``.
      read_only: nothing is written, moved or tidied up: a run may be writing there.

    A checkpoint whose metric is missing or no JSON is damaged, and set aside as by
    ``restore_latest``, unless ``read_only``.

    Raises:
      ValueError: an argument is out of range, the directory cannot be written, or what is in it
        is damaged.
    """
    checks.choice("best_mode", best_mode, ("max", "min"))
    checks.integer("keep_best", keep_best, at_least=1)
    checks.integer("keep_last", keep_last, at_least=1)
    directory = Path(directory).absolute()
    if read_only:
        if not directory.is_dir():
            raise ValueError(f"directory must hold checkpoints, got {directory}, which is none")
    else:
        make_directory(directory)

    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy

    def score(metrics: dict[str, float]) -> float:
        checks.fields("metrics", metrics, (best_metric,))
        return metrics[best_metric]

    kept = [preservation_policy.LatestN(keep_last)]
    if best_metric is not None:
        if not read_only:
            _set_aside_without_metric(directory)
        kept.append(
            preservation_policy.BestN(get_metric_fn=score, reverse=best_mode == "min", n=keep_best)
        )
    options = ocp.CheckpointManagerOptions(
        best_fn=None if best_metric is None else score,
        best_mode=best_mode,
        preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
    )
    # The handler that reads and writes is named, so that it can also tell what a checkpoint holds.
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = ocp.StandardCheckpointHandler()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        registry.add("default", args, handler)
    try:
        manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)
        # It would ask JAX with the numbers of training steps whether the run has been told to end,
        # and so move the meeting point on which ``interruption.watch`` relies.
        manager.reached_preemption = lambda step: False
        return manager
    except Exception as error:
        raise ValueError(f"checkpoints in {directory} are damaged: {_reason(error)}") from error


class Stored(NamedTuple):
    """What a checkpoint holds: the fields of the state, its key as numbers, and check sums."""

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    oracle_state: Any
    key: Any
    check_sums: Any


def save(
    manager: ocp.CheckpointManager, state: TrainState, metrics: dict[str, float] | None = None
) -> None:
    """Starts to save the state under its step; returns before it is on disk.

    Raises:
      ValueError: it, or the one before it, cannot be written, or there is one of this step or a
        later one; those that are there stay.
    """
    import orbax.checkpoint as ocp

    # A copy, since the background writer may still read when the next step reuses the buffers of
    # its donated state.
    stored = jax.tree.map(jnp.copy, _storable(state))
    with _writing(manager):
        saved = manager.save(int(state.step), args=ocp.args.StandardSave(stored), metrics=metrics)
    if not saved:
        raise ValueError(
            f"step must be after {manager.latest_step()}, which {manager.directory} holds, got "
            f"{int(state.step)}"
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Returns when everything is on disk.

    Raises:
      ValueError: something cannot be written.
    """
    with _writing(manager):
        manager.wait_until_finished()


@contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"checkpoint in {manager.directory} cannot be written: {_reason(error)}"
        ) from error


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
    import orbax.checkpoint as ocp

    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise ValueError(
            f"no checkpoint of step {step} in {manager.directory}, which holds "
            f"{', '.join(map(str, manager.all_steps())) or 'none'}"
        )
    key_data = jax.eval_shape(jax.random.key_data, like.key)
    replicated = like.key.sharding
    template = jax.tree.map(_abstract, like)._replace(
        key=jax.ShapeDtypeStruct(key_data.shape, key_data.dtype, sharding=replicated)
    )
    sums = jax.ShapeDtypeStruct((len(jax.tree.leaves(template)),), jnp.uint32, sharding=replicated)
    template = Stored(*template, sums)
    failed = None
    try:
        stored = manager.restore(step, args=ocp.args.StandardRestore(template))
    except Exception as error:
        failed = error
        _forget_silently()
    # All processes of a run go on, or none.
    if parallel.gathered(np.array([failed is not None])).any():
        why = "another process cannot read it"
        if failed is not None:
            why = _mismatch(manager, step, template) or _reason(failed)
        raise ValueError(
            f"checkpoint {manager.directory}/{step} is damaged or of another model: {why}"
        ) from failed
    *fields, sums = stored
    stored = TrainState(*fields)
    if not np.array_equal(parallel.to_host(sums), parallel.to_host(_check_sums(stored))):
        raise ValueError(
            f"checkpoint {manager.directory}/{step} is damaged: its check sums are not those of "
            "its arrays"
        )
    key = jax.random.wrap_key_data(stored.key, impl=jax.random.key_impl(like.key))
    return stored._replace(key=key)


def restore_latest(
    managers: Sequence[ocp.CheckpointManager], like: TrainState
) -> TrainState | None:
    """The state of the largest step that can be read, over all the managers; None if there is none.

    Newer checkpoints that cannot be read are named on standard error and set aside, next to the
    folder of the checkpoints in one whose name ends in ``-damaged``, so that the run can save at
    their steps again.

    Raises:
      ValueError: there are checkpoints, but none can be read: all are damaged or of another model.
    """
    steps = [(step, number) for number, m in enumerate(managers) for step in m.all_steps()]
    failures = []
    for step, number in sorted(steps, reverse=True):
        try:
            state = restore(managers[number], like, step=step)
        except ValueError as error:
            # Its frames hold the state that was read.
            failures.append((managers[number], step, error.with_traceback(None)))
            continue
        for manager, failed, error in failures:
            _set_aside(manager.directory, failed, str(error))
            manager.reload()
        return state
    if failures:
        raise failures[0][2]
    return None


def restore_best(manager: ocp.CheckpointManager, like: TrainState) -> TrainState:
    """The best state that can be read; better ones that cannot are set aside.

    Raises:
      ValueError: none can be read.
    """
    failures = []
    while (step := manager.best_step()) is not None:
        try:
            return restore(manager, like, step=step)
        except ValueError as error:
            failures.append(error)
            _set_aside(manager.directory, step, str(error))
            manager.reload()
    raise ValueError(f"no checkpoint in {manager.directory} can be read") from (
        failures[0] if failures else None
    )


def _set_aside(directory: os.PathLike, step: int, reason: str) -> None:
    """Moves a damaged checkpoint out of the way and says so; all processes of a run call it."""
    if jax.process_index() == 0:
        _move_away(Path(directory), step, reason)
    _meet(f"set aside {directory}/{step}")


def _set_aside_without_metric(directory: Path) -> None:
    # The first process looks: another one might find the folder before or after the move.
    if jax.process_index() == 0:
        for folder in sorted(directory.iterdir()):
            if not folder.name.isdigit():
                continue
            try:
                json.loads((folder / "metrics" / "metrics").read_text())
            except (FileNotFoundError, ValueError) as error:
                reason = f"checkpoint {folder} is damaged: {_reason(error)}"
                _move_away(directory, int(folder.name), reason)
    _meet(f"looked through {directory}")


def _move_away(directory: Path, step: int, reason: str) -> None:
    target = directory.with_name(directory.name + "-damaged") / str(step)
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    (directory / str(step)).rename(target)
    print(f"warning: {reason}; moved to {target}", file=sys.stderr, flush=True)


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _forget_silently() -> None:
    """Drops what the storage library leaves of a failed read, which would print pages later on."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before


def _reason(error: Exception) -> str:
    """The first line of an error of the storage library, which can run over pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def _mismatch(manager: ocp.CheckpointManager, step: int, template: Stored) -> str | None:
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
    for name in sorted(wanted | got, key=lambda name: (name == "check_sums", name)):
        if got.get(name) != wanted.get(name):
            return f"{name} must be {wanted.get(name, 'absent')}, got {got.get(name, 'nothing')}"
    return None


def _storable(state: TrainState) -> Stored:
    state = state._replace(key=jax.random.key_data(state.key))
    return Stored(*state, _check_sums(state))


@jax.jit
def _check_sums(tree: Any) -> Array:
    """A number for each array that depends on every bit and its place, ``(arrays,)`` uint32."""

    def check_sum(x: Array) -> Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        words = jax.lax.bitcast_convert_type(x, unsigned).reshape(-1).astype(jnp.uint32)
        place = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        return jnp.sum(words * place, dtype=jnp.uint32)

    return jnp.stack([check_sum(leaf) for leaf in jax.tree.leaves(tree)])


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
