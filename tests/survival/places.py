"""Where the runs of the survival tests go, and what a run leaves that was left alone."""

import json
import time
from pathlib import Path
from typing import NamedTuple

from survival.runs import Left, Run, network, outcome, wait_until

EXIT_TOLD_TO_END = 75


class Outcome(NamedTuple):
    """What came of a fault.

    Attributes:
      fault: in words.
      tried: how often it was made to happen; each time everything was as it must be.
      lost: steps that had to be made again, at most and in all.
    """

    fault: str
    tried: int
    lost: str


class Place(NamedTuple):
    """Where runs go, and what a run that was left alone has left there.

    Attributes:
      folder: for runs and the compilation cache.
      whole: ``outcome`` of the run that was left alone.
      seconds: that it took with everything compiled.
      starting: seconds of them until it had been built, or restored.
    """

    folder: Path
    whole: Left | None = None
    seconds: float = 0.0
    starting: float = 0.0

    def start(self, workdir, *words, **options):
        cache = f"--compilation_cache={self.folder / 'cache'}"
        return Run(f"--workdir={workdir}", cache, *words, **options)


def prepare(folder: Path) -> Place:
    """Compiles everything and makes the run that is left alone."""
    began = starting = 0.0
    for name in ("first", "whole"):
        began = time.monotonic()
        run = Place(folder).start(folder / name)
        wait_until(lambda run=run: has_begun(run) or not run.running())
        starting = time.monotonic() - began
        assert run.wait() == 0, run.printed()
    assert outcome(folder / "first") == outcome(folder / "whole")
    return Place(folder, outcome(folder / "whole"), time.monotonic() - began, starting)


def has_begun(run):
    """Whether it has been built, or restored, and is about to make its first step."""
    return "parameters" in run.printed()


def assert_ends_as_if_left_alone(place, workdir, *words):
    run = place.start(workdir, "--resume", *words)
    assert run.wait() == 0, run.printed()
    assert outcome(workdir) == place.whole
    return run


def steps_made(workdir):
    path = network(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
