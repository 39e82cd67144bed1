"""The training loop: dispatches of several steps, a log line each, an evaluation each epoch.

The loop owns no model, data or attack. It counts steps, calls what it is given in the right order
and can start anywhere: its position is the step number in the state.

A feed that skips steps whose loss is not finite halts at the first of them, as one that stops does:
the device has the state before that step then. It is handed out, and the rest of the dispatch is
made by the same program, which skips from there on.
"""

from collections.abc import Callable

import jax
import numpy as np

from robustjax import checks, parallel
from robustjax.training.state import TrainState

# advance(state, epoch, first, count) -> (state, metrics (count,)): runs `count` steps of `epoch`
# from its step `first` on.
Advance = Callable[[TrainState, int, int, int], tuple[TrainState, dict]]


def steps_per_dispatch(steps_per_epoch: int, limit: int) -> int:
    """The largest divisor of ``steps_per_epoch`` up to ``limit``: every dispatch has one shape."""
    checks.integer("steps_per_epoch", steps_per_epoch, at_least=1)
    checks.integer("limit", limit, at_least=1)
    return max(k for k in range(1, min(limit, steps_per_epoch) + 1) if steps_per_epoch % k == 0)


class NonFiniteLoss(ValueError):
    """The loss or the norm of the gradient became NaN or infinite.

    Attributes:
      step: the step, counted from 0, that could not be taken.
      state: before that step, if the steps are guarded (see ``guarded_step``).
    """

    def __init__(self, message: str, step: int, state: TrainState):
        super().__init__(message)
        self.step, self.state = step, state


def fit(
    state: TrainState,
    advance: Advance,
    *,
    epochs: int,
    steps_per_epoch: int,
    dispatch: int,
    on_dispatch: Callable[[int, dict[str, np.ndarray]], None] = lambda step, metrics: None,
    on_epoch: Callable[[int, TrainState], None] = lambda epoch, state: None,
    on_state: Callable[[int, TrainState], None] = lambda step, state: None,
    saves: Callable[[int], bool] = lambda step: False,
    should_stop: Callable[[int], bool] = lambda step: False,
    on_halt: Callable[[NonFiniteLoss], None] = lambda error: None,
    on_skipped: Callable[[list[int]], None] = lambda steps: None,
) -> TrainState:
    """Trains up to ``epochs * steps_per_epoch`` steps, from wherever the state stands.

    Args:
      state: initial or restored state.
      advance: ``advance(state, epoch, first, count) -> (state, metrics)``; metrics ``(count,)``.
      epochs: epochs of the whole run, ``>= 0``.
      steps_per_epoch: updates in an epoch, ``>= 1``.
      dispatch: updates in one dispatch, ``>= 1``; one never crosses the end of an epoch.
      on_dispatch: ``on_dispatch(step, metrics)`` with the step reached and metrics of the
        dispatch's steps as numpy arrays; called while the device works on the next dispatch.
      on_epoch: ``on_epoch(epoch, state)`` after each epoch, counted from 1; all metrics of the
        epoch have been passed on by then.
      on_state: ``on_state(step, state)`` after each dispatch, with the step reached; the arrays of
        the state are given away to the next dispatch.
      saves: ``saves(step)``: whether ``on_state`` is about to save the state. All metrics up to it
        are passed on before: a run that goes on from there will not make them again.
      should_stop: ``should_stop(step)`` is asked after each dispatch.
      on_halt: called with the first step that failed and the state before it, if ``advance`` skips
        steps that fail (see ``feed``).
      on_skipped: called with the steps of a dispatch, counted from 0, that were skipped, before its
        metrics are passed on. Nothing runs on the devices then, nor in ``on_halt``.

    Returns:
      The state reached: the final one, or an earlier one if it was told to stop. All metrics up to
      it have been passed on.

    Raises:
      ValueError: an argument is out of range.
      NonFiniteLoss: loss or gradient norm became NaN or infinite, in a step that was not skipped;
        it is a ``ValueError``. Metrics of the dispatch, its own included, have been passed on.
    """
    checks.integer("epochs", epochs)
    checks.integer("steps_per_epoch", steps_per_epoch, at_least=1)
    checks.integer("dispatch", dispatch, at_least=1)
    step, total, stopping = int(state.step), epochs * steps_per_epoch, False
    pending: tuple[int, dict] | None = None
    halted: dict[str, np.ndarray] | None = None  # metrics of the dispatch that is made again

    def pass_on() -> bool:
        """Passes on what is pending; False if that dispatch halted, and has to be made again."""
        nonlocal pending, halted, state, step
        if pending is None:
            return True
        (at, metrics), pending = pending, None
        metrics = {name: np.asarray(v) for name, v in parallel.to_host(metrics).items()}
        if "skipped" not in metrics:
            on_dispatch(at, metrics)
            if (error := _failure(at, metrics, state)) is not None:
                jax.block_until_ready(state)
                raise error
            return True
        if halted is not None:
            again = ~np.isnan(metrics["skipped"])
            metrics = {name: np.where(again, v, halted[name]) for name, v in metrics.items()}
            halted = None
        first = at - len(metrics["skipped"])
        if skipped := [first + int(i) for i in np.flatnonzero(metrics["skipped"] == 1)]:
            jax.block_until_ready(state)
            if getattr(advance, "halts", False):
                # The device has taken no step since: this is the state before the one that failed.
                on_halt(_failure(at, metrics, state))
                advance.halts = False
                state = _counted_on(state, skipped[0] + 1)
                step, halted = first, metrics
                return False
            on_skipped(skipped)
        on_dispatch(at, metrics)
        return True

    while (step < total and not stopping) or not pass_on():
        epoch, first = divmod(step, steps_per_epoch)
        # Up to the next multiple of `dispatch`, so that a resumed run falls into step.
        count = min(dispatch - first % dispatch, steps_per_epoch - first)
        state, metrics = advance(state, epoch, first, count)
        step += count
        if not pass_on():
            continue
        pending = (step, metrics)
        ends = step % steps_per_epoch == 0
        if (ends or saves(step)) and not pass_on():
            continue
        if ends:
            if int(state.step) != step:
                raise ValueError(
                    f"advance must count steps as fit does, which is at {step}, got {state.step}"
                )
            on_epoch(epoch + 1, state)
        on_state(step, state)
        stopping = stopping or should_stop(step)
    return state


def _counted_on(state: TrainState, step: int) -> TrainState:
    """The state with another step number, placed alike: the same program takes it."""
    number = np.asarray(step, state.step.dtype)
    return state._replace(
        step=jax.make_array_from_callback((), state.step.sharding, lambda _: number)
    )


def _failure(at: int, metrics: dict[str, np.ndarray], state: TrainState) -> NonFiniteLoss | None:
    """The first step of a dispatch up to ``at`` that failed; metrics of later ones are NaN."""
    watched = {name: metrics[name] for name in ("loss", "grad_norm") if name in metrics}
    for offset, values in enumerate(zip(*watched.values(), strict=True)):
        for name, value in zip(watched, values, strict=True):
            if not np.isfinite(value):
                number = at - len(watched[name]) + offset
                message = f"{name} at step {number + 1} must be finite, got {value}"
                return NonFiniteLoss(message, number, state)
    return None
