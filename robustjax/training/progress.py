"""What a run shows on its way: how far it is and how fast, a trace for a profiler."""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console

from robustjax.training import report


class Progress:
    """Progress with speed and time left: one line in place on a terminal, else a line a minute.

    Args:
      total: steps of the run.
      start: steps done before.
      label: what runs.
      examples_per_step: to show the examples per second of the steps since the first report, which
        has the time of compilation, without what was ``paused``.
    """

    EVERY = 60.0  # seconds between lines, where there is no terminal

    def __init__(
        self, total: int, *, start: int = 0, label: str = "train", examples_per_step: int = 0
    ):
        self._total, self._start, self._label = total, start, label
        self._examples = examples_per_step
        self._began = self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._paused = 0.0  # seconds, since the first report
        self._console = Console(quiet=not report.is_writer(), highlight=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The body is no training: its time is not in the examples per second."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._first is not None:
                self._paused += time.monotonic() - began

    def __call__(self, step: int, values: Mapping[str, float], *, keep: bool = False) -> None:
        """Shows the step reached, the values, the speed and the time left.

        Args:
          step: steps done.
          values: name to number.
          keep: leave the line standing; without it a terminal overwrites it with the next one, and
            anything else shows one a minute.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if not (keep or self._console.is_terminal or now - self._shown >= self.EVERY):
            return
        self._shown, elapsed = now, now - self._began
        text = f"{self._label} {step}/{self._total}" + "".join(
            f"  {name} {value:.4g}" for name, value in values.items()
        )
        since, at = self._first if step > self._first[0] else (self._start, self._began)
        left = math.nan
        if step > since:
            left = (now - at) / (step - since) * (self._total - step)
            training = now - at - self._paused
            if self._examples and training > 0:
                text += f"  {self._examples * (step - since) / training:,.0f} examples/s"
        text += f"  {_clock(elapsed)}<{_clock(left)}"
        if self._console.is_terminal:
            self._console.print("\r" + text, end="\n" if keep else "", soft_wrap=True)
        else:
            self._console.print(text, soft_wrap=True)


class Trace:
    """A profiler trace of what happens between the first and the second call; a context manager.

    Args:
      folder: where it goes, for TensorBoard and Perfetto.
      wanted: False does nothing.
    """

    def __init__(self, folder: str | os.PathLike, wanted: bool):
        self._folder, self._calls = os.fspath(folder), 0 if wanted and report.is_writer() else None

    def __call__(self, arrays: Any) -> None:
        """Marks the beginning, then the end, when the arrays have been computed."""
        if self._calls is None:
            return
        jax.block_until_ready(arrays)
        self._calls += 1
        if self._calls == 1:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each call of Python: a hundred times the size
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options
            )
        else:
            self._stop()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._calls == 1:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._calls = None
        report.print_lines(f"trace: {self._folder}")


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
