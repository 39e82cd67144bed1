"""The training loop: dispatches of several steps, a log line each, an evaluation each epoch.

The loop owns no model, data or attack. It counts steps, calls what it is given in the right order
and can start anywhere: its position is the step number in the state.
"""

from collections.abc import Callable

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
    should_stop: Callable[[int], bool] = lambda step: False,
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
      should_stop: ``should_stop(step)`` is asked after each dispatch.

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
    step = int(state.step)
    pending: tuple[int, dict] | None = None

    def pass_on() -> None:
        nonlocal pending
        if pending is None:
            return
        at, metrics = pending
        pending = None
        metrics = {name: np.asarray(v) for name, v in parallel.to_host(metrics).items()}
        on_dispatch(at, metrics)
        if "skipped" in metrics:
            return
        for name in ("loss", "grad_norm"):
            for offset, value in enumerate(metrics.get(name, ())):
                if not np.isfinite(value):
                    number = at - len(metrics[name]) + offset
                    raise NonFiniteLoss(
                        f"{name} at step {number + 1} must be finite, got {value}", number, state
                    )

    while step < epochs * steps_per_epoch:
        epoch, first = divmod(step, steps_per_epoch)
        # Up to the next multiple of `dispatch`, so that a resumed run falls into step.
        count = min(dispatch - first % dispatch, steps_per_epoch - first)
        state, metrics = advance(state, epoch, first, count)
        step += count
        pass_on()
        pending = (step, metrics)
        if step % steps_per_epoch == 0:
            pass_on()
            if int(state.step) != step:
                raise ValueError(
                    f"advance must count steps as fit does, which is at {step}, got {state.step}"
                )
            on_epoch(epoch + 1, state)
        on_state(step, state)
        if should_stop(step):
            break
    pass_on()
    return state
