"""How data reach the training step: held on the devices, or streamed from the host.

Both give ``advance(state, epoch, first, count) -> (state, metrics)`` for ``robustjax.training.fit``
and make one global batch of a step the same whatever the number of devices and hosts. The state
that ``advance`` is given is donated: go on with the one that it returns. ``advance`` does not wait
for the devices, and ``fit`` calls it for the next dispatch before it waits for the last one: what
the next steps need is read and on its way while the devices work.

A step whose loss or gradient is not finite is not taken: ``nonfinite="stop"`` leaves the state as
it was before that step for the rest of the run, which ``fit`` then ends. ``"skip"`` goes on without
it; while ``advance.halts`` is true, as it is in the beginning, it leaves the state as ``"stop"``
does, so that ``fit`` gets the one before the first step that fails. ``advance.indices(step)`` are
the examples of this host at a step, ``advance.cost(state, count)`` is what a step takes, a
``Cost``, from the program of ``count`` steps: to have it counted before it runs costs no second
trace.

The state is replicated on all devices, and the step names the axis of the mesh. With
``state_specs``, from ``parallel.shard_specs``, it is split over the devices, and the step is
written for the whole batch, without an axis: the compiler divides it.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from robustjax import checks, data, keys, parallel
from robustjax.training.flops import count_flops
from robustjax.training.loop import Advance
from robustjax.training.memory import peak_bytes
from robustjax.training.step import Step, guarded_step, several_resident_steps, several_steps


class Cost(NamedTuple):
    """What a training step takes, about.

    Attributes:
      flops: floating-point operations on the whole batch, as by ``training.count_flops``.
      memory: bytes on each device, as by ``training.peak_bytes``, of the program of ``count``
        steps with the data that it is given; with a state that is split, of the whole program
        before it is divided over the devices.
    """

    flops: int
    memory: int


def resident(
    step: Step,
    dataset: data.Dataset,
    *,
    key: jax.Array,
    batch_size: int,
    mesh: Mesh,
    replays: int = 1,
    nonfinite: str = "stop",
    state_specs: Any = None,
) -> Advance:
    """Trains on a data set that every device holds whole; batches are gathered under ``jit``.

    Args:
      step: training step built with ``axis_name=parallel.AXIS``.
      dataset: the training set, in its stored dtype (uint8 takes a quarter of float32's memory).
      key: typed key of the order; epoch ``e`` is shuffled with ``fold_in(key, e)``.
      batch_size: examples of a global batch; the rest of an epoch is dropped.
      mesh: devices.
      replays: steps in a row on each minibatch, ``>= 1``. An epoch of the loop stays as many steps
        as there are minibatches: it sees one in ``replays`` of them.
      nonfinite: what is done about a step that fails, see above.
      state_specs: how the state is split, see above; default replicated.

    Raises:
      ValueError: the batch does not divide over the devices or exceeds the data set, or ``key`` is
        not a single typed key.
    """
    keys.check_one(key)
    per_epoch = data.steps_per_epoch(len(dataset.label), batch_size)
    checks.integer("replays", replays, at_least=1)
    parallel.local_batch_size(batch_size, mesh)
    arrays = parallel.replicate({"image": dataset.image, "label": dataset.label}, mesh)
    several = several_resident_steps(
        _guarded(step, nonfinite),
        lambda arrays, row: (row["step"], data.take(arrays, row["index"])),
    )
    steps = _compiled(several, mesh, state_specs, parallel.REPLICATED)
    columns = parallel.own_rows(batch_size, mesh)
    orders: dict[int, np.ndarray] = {}

    def minibatch(number: int) -> np.ndarray:
        """Row ``number`` of all the passes over the data in a row."""
        passes, row = divmod(number, per_epoch)
        if passes not in orders:
            if len(orders) > 1:  # a dispatch may see the end of a pass and the next one
                orders.clear()
            orders[passes] = np.asarray(_order(key, passes, len(dataset.label), batch_size))
        return orders[passes][row, columns]

    def rows(at: int, count: int) -> dict[str, jax.Array]:
        indices = np.stack([minibatch(step // replays) for step in range(at, at + count)])
        return {
            "step": _numbers(at, count, mesh, advance.halts),
            "index": parallel.split(indices, mesh, parallel.SPLIT_SECOND),
        }

    def advance(state, epoch: int, first: int, count: int):
        return steps(state, arrays, rows(epoch * per_epoch + first, count))

    advance.compiled = steps
    advance.halts = True if nonfinite == "skip" else None
    advance.indices = lambda step: minibatch(step // replays)
    advance.cost = lambda state, count: _cost(
        steps, mesh, state_specs, count, state, arrays, rows(int(state.step), count)
    )
    return advance


def streamed(
    step: Step,
    batches_from: Callable[[int], Iterator[dict[str, np.ndarray]]],
    *,
    steps_per_epoch: int,
    mesh: Mesh,
    replays: int = 1,
    nonfinite: str = "stop",
    state_specs: Any = None,
) -> Advance:
    """Trains on batches that the host reads, several of them per dispatch.

    Args:
      step: training step built with ``axis_name=parallel.AXIS``.
      batches_from: ``batches_from(step)`` iterates over this host's shares of the global batches
        from a step on, as ``robustjax.data.host_batches`` does with ``start_step``. Images in
        uint8 take a quarter of float32's way to the device, where they become the same floats.
      steps_per_epoch: to count steps over the run.
      mesh: devices.
      replays: as for ``resident``; ``batches_from`` counts minibatches.
      nonfinite: as for ``resident``.
      state_specs: as for ``resident``.

    Raises:
      ValueError: ``steps_per_epoch < 1``; later, if the batches end before the run does, or one
        does not divide over the devices.
    """
    checks.function("batches_from", batches_from)
    checks.integer("steps_per_epoch", steps_per_epoch, at_least=1)
    checks.integer("replays", replays, at_least=1)
    guarded = _guarded(step, nonfinite)

    def as_floats(state, numbered):
        number, batch = numbered
        batch = {k: data.as_float(v) if k == "image" else v for k, v in batch.items()}
        return guarded(state, (number, batch))

    several = several_steps(as_floats)
    steps = _compiled(
        lambda state, rows: several(state, (rows["step"], rows["batch"])), mesh, state_specs
    )
    stream: dict[str, Any] = {"at": None, "batches": None}
    indices: dict[int, np.ndarray] = {}  # of the steps of the last dispatches

    def replayed(at: int) -> Iterator[dict[str, np.ndarray]]:
        """From a step on: what is left of its minibatch's replays, then those of the next ones."""
        batches = itertools.chain.from_iterable(
            itertools.repeat(batch, replays) for batch in batches_from(at // replays)
        )
        return itertools.islice(batches, at % replays, None)

    def read(at: int, count: int) -> list[dict[str, np.ndarray]]:
        if stream["at"] != at:
            stream["batches"] = replayed(at)
        stream["at"] = at + count
        share = list(itertools.islice(stream["batches"], count))
        if len(share) < count:
            raise ValueError(
                f"batches_from must give batches without end, got only {len(share)} of {count} "
                f"from step {at} on"
            )
        for passed in [number for number in indices if not at - count <= number < at + count]:
            del indices[passed]
        indices.update((at + i, batch["index"]) for i, batch in enumerate(share))
        return share

    def indices_at(at: int) -> np.ndarray:
        if at in indices:
            return indices[at]
        return next(iter(batches_from(at // replays)))["index"]

    def rows(at: int, share: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        stacked = jax.tree.map(lambda *x: np.stack(x), *share)
        return {
            "step": _numbers(at, len(share), mesh, advance.halts),
            "batch": parallel.split(stacked, mesh, parallel.SPLIT_SECOND),
        }

    def advance(state, epoch: int, first: int, count: int):
        at = epoch * steps_per_epoch + first
        return steps(state, rows(at, read(at, count)))

    def cost(state, count: int) -> Cost:
        at = int(state.step)
        share = read(at, 1)
        stream.update(at=at, batches=itertools.chain(share, stream["batches"]))  # to be read again
        several = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=x.sharding),
            rows(at, share),
        )
        return _cost(steps, mesh, state_specs, count, state, several)

    advance.compiled = steps
    advance.halts = True if nonfinite == "skip" else None
    advance.indices = indices_at
    advance.cost = cost
    return advance


def _guarded(step: Step, nonfinite: str) -> Callable:
    """``guarded_step`` for what ``_numbers`` makes; a step that halts is not counted on."""
    guarded = guarded_step(step, nonfinite=nonfinite)
    if nonfinite != "skip":
        return guarded

    def halting(state, numbered):
        (number, halts), batch = numbered
        new, metrics = guarded(state, (number, batch))
        back = halts & (metrics["skipped"] == 1)
        return new._replace(step=new.step - back.astype(new.step.dtype)), metrics

    return halting


def _numbers(at: int, count: int, mesh: Mesh, halts: bool | None) -> Any:
    """The numbers of the steps and, if they may be skipped, whether the first to fail halts."""
    numbers = np.arange(at, at + count, dtype=np.int32)
    return parallel.replicate(numbers if halts is None else (numbers, np.full(count, halts)), mesh)


_order = jax.jit(data.epoch_batches, static_argnums=(2, 3))


def _cost(steps: Callable, mesh: Mesh, state_specs: Any, count: int, *arguments: Any) -> Cost:
    # With a state that is split, the traced program is that of whole arrays, else of one device's.
    devices = mesh.size if state_specs is None else 1
    flops = count_flops(steps, *arguments) * devices // count
    return Cost(flops, peak_bytes(steps, *arguments))


def _compiled(several: Callable, mesh: Mesh, state_specs: Any, *data_specs: Any) -> Callable:
    """``several(state, *data, rows)`` over the mesh; the state is donated."""
    divide = parallel.parallel if state_specs is None else parallel.automatic
    specs = parallel.REPLICATED if state_specs is None else state_specs
    rows = {"step": parallel.REPLICATED, "index" if data_specs else "batch": parallel.SPLIT_SECOND}
    return divide(
        several,
        mesh,
        in_specs=(specs, *data_specs, rows),
        out_specs=(specs, parallel.REPLICATED),
        donate_argnums=0,
    )
