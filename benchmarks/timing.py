"""Times taken in turn, their ratios, and the load of the machine on which they were taken."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustjax import checks
from robustjax.training import report

Seconds = Mapping[str, Sequence[float]]


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, in turn: A, B, C, A, B, C, ...; after one warm-up each.

    Args:
      runs: name to a function that returns when its work is done.
      rounds: measurements of each, ``>= 1``.
    """
    checks.integer("rounds", rounds, at_least=1)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: Seconds, ratios: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Medians, and ratios of one run's time to another's.

    A ratio is taken in each round, where the two are neighbours in time, so that what else the
    machine does slows both; reported are its median, least and greatest value over the rounds.

    Args:
      seconds: from ``interleaved``.
      ratios: title to ``(run, others)``; the run is compared with the fastest of the others, by
        its median. A ratio without others is left out.

    Returns:
      ``seconds``, ``median_seconds`` and ``ratios``, which name the other run as ``to``.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {}
    for title, (name, others) in ratios.items():
        if others:
            fastest = min(others, key=medians.__getitem__)
            each = [a / b for a, b in zip(seconds[name], seconds[fastest], strict=True)]
            found[title] = {
                "to": fastest,
                "median": statistics.median(each),
                "min": min(each),
                "max": max(each),
            }
    return {"seconds": seconds, "median_seconds": medians, "ratios": found}


def print_summary(title: str, result: Mapping[str, Any], bounds: Mapping[str, str]) -> None:
    """Prints medians, seconds of compilation where known, and ratios with their bounds."""
    compilation = result.get("compile_seconds", {})
    rows = [
        [name, f"{median:.3f}", f"{compilation[name]:.1f}" if name in compilation else ""]
        for name, median in result["median_seconds"].items()
    ]
    report.print_table(title, ["run", "median s", "XLA compilation s"], rows)
    rows = []
    for name, ratio in result["ratios"].items():
        numbers = (f"{ratio[k]:.2f}" for k in ("median", "min", "max"))
        rows.append([name, ratio["to"], *numbers, bounds.get(name, "")])
    if rows:
        columns = ["ratio of times", "to", "median", "least", "greatest", ""]
        report.print_table("", columns, rows)


def load() -> float:
    """Processes that wanted to run, on average over the last minute; ours are among them."""
    return os.getloadavg()[0]
