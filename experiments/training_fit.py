"""The training of one network: saved, resumed, interrupted, recorded on the way."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from experiments.training_settings import Settings
from robustjax import parallel, training
from robustjax.training import checkpoint, interruption, progress, report

# measure(state) -> {name of a split: {name: value}}; it has "validation", which ranks checkpoints.
Measure = Callable[[training.TrainState], Mapping[str, Mapping[str, float]]]


def fit_saved(
    settings: Settings,
    label: str,
    fresh: training.TrainState,
    advance: training.loop.Advance,
    measure: Measure,
    workdir: Path,
    *,
    steps_per_epoch: int,
    best_metric: str,
    announce: Callable[[training.TrainState], None],
) -> tuple[training.TrainState, training.TrainState]:
    """Trains from the newest checkpoint that can be read, or from the start.

    ``WORKDIR/checkpoints`` has the states that were validated, the best and the last ones,
    ``WORKDIR/recovery`` the newest ones in between, ``WORKDIR/nonfinite`` the state before a step
    that failed, with the examples of that step. Where such steps are skipped, it is the state
    before the first one since the run was started or resumed, and ``skipped.jsonl`` beside it has a
    line for each of them, see ``SkippedSteps``.

    Args:
      settings: ``epochs``, ``dispatch``, ``checkpoint_every``, ``save_every``, ``batch_size``,
        ``resume``, ``profile`` are looked at.
      label: of the lines that report progress.
      fresh: the state to start from, placed on the devices.
      advance: from ``training.feed``.
      measure: called at each validation.
      workdir: folder of this network.
      steps_per_epoch: updates in an epoch.
      best_metric: of those of ``"validation"``, by which the best state is chosen.
      announce: called with the state that training goes on from, if there is anything left to do.

    Returns:
      The best state and the last one.

    Raises:
      interruption.Interrupted: the run was told to end; its state is saved.
      ValueError: the loss is not finite, or a checkpoint cannot be written or read.
    """
    total = settings.epochs * steps_per_epoch
    ranked_by = {"checkpoints": best_metric, "recovery": None}
    folders = [checkpoint.make_directory(workdir / name) for name in ranked_by]
    begun = np.array([any(any(folder.iterdir()) for folder in folders)])
    with ExitStack() as stack:
        should_stop = stack.enter_context(interruption.watch())
        managers, opened = stack.enter_context(ExitStack()), {}

        def manager(name: str):
            # Opened when one is wanted: a fresh run comes to its first step sooner.
            if name not in opened:
                opened[name] = managers.enter_context(
                    checkpoint.open_checkpoints(workdir / name, best_metric=ranked_by[name])
                )
            return opened[name]

        state = fresh
        if parallel.gathered(begun).any():  # all processes open them, or none
            restored = checkpoint.restore_latest([manager(name) for name in ranked_by], fresh)
            state = fresh if restored is None else restored
        saved = int(state.step)
        if saved < total:
            announce(state)
        if saved:
            report.print_lines(f"{label}: resumed at step {saved} of {total}")
        shown = progress.Progress(
            total, start=saved, label=label, examples_per_step=settings.batch_size
        )
        writer = stack.enter_context(report.MetricsWriter(workdir, from_step=saved))
        tracing = stack.enter_context(progress.Trace(workdir / "profile", settings.profile))
        nonfinite, told = workdir / "nonfinite", False
        skipped = SkippedSteps(nonfinite, from_step=saved)

        def on_dispatch(step: int, metrics: dict[str, np.ndarray]) -> None:
            if "skipped" in metrics:
                taken = metrics["skipped"] == 0
                rest = {name: values[taken] for name, values in metrics.items() if taken.any()}
                metrics = {**metrics, **rest, "skipped": metrics["skipped"]}
            means = {name: float(values.mean()) for name, values in metrics.items()}
            writer.write(step, "train", means)
            shown(step, {"loss": means["loss"]})

        def wait() -> None:
            for each in opened.values():
                checkpoint.wait(each)

        def save(name: str, state: training.TrainState, metrics=None) -> None:
            nonlocal saved
            if int(state.step) == saved:
                return
            # One manager at a time: the processes of a run meet in the background while they save,
            # and two managers would mistake each other's meetings for their own.
            wait()
            checkpoint.save(manager(name), state, metrics)
            saved = int(state.step)

        def on_epoch(epoch: int, state: training.TrainState) -> None:
            if epoch % settings.checkpoint_every and epoch != settings.epochs:
                return
            step = int(state.step)
            with shown.paused():
                found = measure(state)
            for split, values in found.items():
                writer.write(step, split, values)
            shown(step, found["validation"], keep=True)
            save("checkpoints", state, dict(found["validation"]))

        def saves(step: int) -> bool:
            return bool(settings.save_every) and step - saved >= settings.save_every

        def on_state(step: int, state: training.TrainState) -> None:
            tracing(state)
            if saves(step):
                save("recovery", state)

        def on_halt(error: training.NonFiniteLoss) -> None:
            wait()
            _save_failed(nonfinite, error, advance.indices(error.step))
            report.print_lines(
                f"{label}: {error}; skipped: the state before it and its examples are in "
                f"{nonfinite}"
            )

        def on_skipped(steps: list[int]) -> None:
            own = np.stack([advance.indices(step) for step in steps], axis=1)
            skipped.write(steps, parallel.gathered(own).T)

        def stop(step: int) -> bool:
            nonlocal told
            told = should_stop(step)
            return told

        try:
            last = training.fit(
                state,
                advance,
                epochs=settings.epochs,
                steps_per_epoch=steps_per_epoch,
                dispatch=training.steps_per_dispatch(steps_per_epoch, settings.dispatch),
                on_dispatch=on_dispatch,
                on_epoch=on_epoch,
                on_state=on_state,
                saves=saves,
                should_stop=stop,
                on_halt=on_halt,
                on_skipped=on_skipped,
            )
        except training.NonFiniteLoss as error:
            wait()
            _save_failed(nonfinite, error, advance.indices(error.step))
            raise ValueError(
                f"{error}; the state before it and the examples are in {nonfinite}"
            ) from error
        reached = int(last.step)
        if told:
            save("recovery", last)
        wait()
        if skipped.count:
            report.print_lines(
                f"{label}: {skipped.count} steps skipped, not finite: {skipped.path}"
            )
        # Asked once more, by all processes alike: the signal may have come while saving.
        if told or should_stop(reached):
            raise interruption.Interrupted(
                f"{label}: told to end, saved at step {reached} of {total}; --resume goes on"
            )
        validated = manager("checkpoints")
        if validated.best_step() in (None, reached):
            return last, last
        return checkpoint.restore_best(validated, fresh), last


class SkippedSteps:
    """``skipped.jsonl``: ``{"step": ..., "examples": [...]}`` for each step that was skipped.

    Steps are counted from 0, examples are those of the whole batch. Only the first ``WHOLE`` lines
    have them, so that the file of a run that fails at every step stays small. The writing process
    alone reads and writes it.

    Attributes:
      path: of the file, which is there once a step has been skipped.
      count: its lines.

    Args:
      folder: where it is.
      from_step: the step that the run starts from. Lines of that step and later ones are dropped:
        they are about to be made again.
    """

    WHOLE = 1000

    def __init__(self, folder: Path, *, from_step: int):
        self.path, self.count = folder / "skipped.jsonl", 0
        if not report.is_writer() or not self.path.exists():
            return
        try:
            with self.path.open("r+b") as file:
                kept = 0
                for line in file:
                    # A crash may have cut off the last line; steps only grow.
                    if not line.endswith(b"\n") or self._step(line) >= from_step:
                        break
                    kept += len(line)
                    self.count += 1
                file.truncate(kept)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror}") from error

    def write(self, steps: list[int], examples: np.ndarray) -> None:
        """Adds steps, with their examples ``(steps, batch)``.

        Raises:
          ValueError: the file cannot be written.
        """
        if not report.is_writer():
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a") as file:
                for step, row in zip(steps, examples.tolist(), strict=True):
                    rows = {"examples": row} if self.count < self.WHOLE else {}
                    file.write(json.dumps({"step": step, **rows}) + "\n")
                    self.count += 1
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror}") from error

    def _step(self, line: bytes) -> int:
        try:
            return json.loads(line)["step"]
        except (ValueError, TypeError, KeyError) as error:
            number = self.count + 1
            raise ValueError(f"{self.path} line {number} must be a skipped step") from error


def _save_failed(folder: Path, error: training.NonFiniteLoss, indices: np.ndarray) -> None:
    """The state before a step that failed, and which examples it had on each process."""
    found = parallel.gathered(np.asarray(indices))
    try:
        with checkpoint.open_checkpoints(folder, best_metric=None) as manager:
            for step in manager.all_steps():
                if step >= error.step:  # of an earlier failure
                    manager.delete(step)
            checkpoint.save(manager, error.state)
            checkpoint.wait(manager)
            kept = {f"step-{step}.json" for step in manager.all_steps()}
        if report.is_writer():
            for record in folder.glob("step-*.json"):
                if record.name not in kept:  # its state has gone
                    record.unlink()
            report.write_json(
                folder / f"step-{error.step}.json",
                {"step": error.step, "error": str(error), "examples": found},
            )
    except (ValueError, OSError) as other:
        raise ValueError(f"{error}; the state before it cannot be saved: {other}") from error
