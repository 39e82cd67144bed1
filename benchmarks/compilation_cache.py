"""The second start of a run: how much sooner the first step is done with a compilation cache.

  python -m benchmarks.compilation_cache                  some 4 minutes on 2 cores

Starts ``experiments.adversarial_training --preset=small --compilation_cache=DIR`` in a process of
its own, once with an empty DIR and once more with what the first one left there, and ends both when
the first step of training has come back, alone in its dispatch (``--dispatch=1``; those of the demo
have 40 steps). The time is from the start of the process; imports, tracing, lowering to HLO and
compilation (or reading what was compiled) are parts of it. Before the first round the modules are
imported once, untimed: their bytecode is there for either start, as it is after installation.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import start, timing
from experiments import command_line
from experiments.command_line import setting
from robustjax import checks
from robustjax.benchmark import environment as machine
from robustjax.training import report

ROOT = Path(__file__).parent.parent
RUNS = {
    "demo": ("--dispatch=1",),  # standard training comes first
    "demo, madry": ("--objective=madry", "--dispatch=1"),
}
PARTS = ("interpreter", "imports", *start.PHASES.values())


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    rounds: int = setting(9, "pairs of starts", "run")
    only: tuple[str, ...] = setting(tuple(RUNS), "runs that are started", "run")
    flags: str = setting("", "further flags of the run, between blanks", "run")
    out: str | None = setting(
        "benchmarks/results/compilation-cache-cpu.json", "JSON file, or None", "run")
    # fmt: on

    def __post_init__(self):
        checks.integer("rounds", self.rounds, at_least=1)
        for name in self.only:
            checks.choice("only", name, RUNS)


PRESETS = {
    "full": Settings(),
    "quick": Settings(
        rounds=1, only=("demo",), flags="--dataset=digits --batch_size=96 --dispatch=1", out=None
    ),
}


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON file; returns what it holds.

    Raises:
      ValueError: a run did not start.
    """
    results: dict[str, Any] = {
        "environment": machine.environment(),
        "settings": dataclasses.asdict(settings),
        "runs": {},
    }
    _python("-c", "import experiments.adversarial_training")
    for name in settings.only:
        starts: dict[str, list[dict[str, Any]]] = {"empty": [], "filled": []}
        for _ in range(settings.rounds):
            with tempfile.TemporaryDirectory() as folder:
                for number, cache in enumerate(starts):
                    flags = [*RUNS[name], *settings.flags.split(), f"--workdir={folder}/{number}"]
                    starts[cache].append(started([*flags, f"--compilation_cache={folder}/cache"]))
        faster = [
            first["total"] / second["total"] for first, second in zip(*starts.values(), strict=True)
        ]
        medians = [statistics.median(one["total"] for one in made) for made in starts.values()]
        results["runs"][name] = {
            "starts": starts,
            "faster": statistics.median(faster),
            "faster_by_medians": medians[0] / medians[1],
        }
    results["environment"]["load_average_1_minute_after"] = timing.load()
    _print(results)
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        report.write_json(settings.out, results)
        report.print_lines(f"written: {settings.out}")
    return results


def started(flags: list[str]) -> dict[str, Any]:
    """One start: seconds in all and by parts, numbers of programs.

    Raises:
      ValueError: it ended before the first step.
    """
    lines = _python("-m", "benchmarks.start", "--preset=small", *flags).splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise ValueError(f"the run must come to its first step, it printed {lines[-20:]}")
    return json.loads(lines[-1])


def _python(*arguments: str) -> str:
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.run(
        [sys.executable, *arguments],
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            start.BEGAN: repr(time.time()),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise ValueError(f"{arguments} must run, got {process.stderr[-2000:]}")
    return process.stdout


def _print(results: dict[str, Any]) -> None:
    rows = []
    for name, found in results["runs"].items():
        for cache, starts in found["starts"].items():
            medians = {
                part: statistics.median(one[part] for one in starts) for part in ("total", *PARTS)
            }
            rest = medians["total"] - sum(medians[part] for part in PARTS)
            rows.append([
                f"{name}, cache {cache}",
                *(f"{value:.1f}" for value in (*medians.values(), rest)),
                f"{starts[-1]['read']} of {starts[-1]['programs']}",
                *(
                    f"{found[ratio]:.2f}" if cache == "filled" else ""
                    for ratio in ("faster", "faster_by_medians")
                ),
            ])  # fmt: skip
    report.print_table(
        "From the start of the process to the first step, seconds",
        ["start", "all", *PARTS, "rest", "programs read", "times faster", "by medians"],
        rows,
    )
    report.print_lines("aim: 3 times faster with a filled cache")


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
