"""What a study finds, and the loop over the studies of an entry point."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.claims import Claim, check_claims, print_claims
from robustjax import metrics
from robustjax.benchmark.environment import environment
from robustjax.training import report

# Settings that say where, how and how much of it is run, not what a study computes.
NOT_OF_A_STUDY = ("workdir", "resume", "dry_run", "study", "data_dir", "assert_claims")


class Study(NamedTuple):
    """What a study found.

    Attributes:
      title: of its table.
      columns: of its table.
      rows: of its table; none for a study that has printed its own.
      results: numbers, for ``results.json``.
      claims: what should hold and does or does not.
      figure: draws into a file, if there is something to draw.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    results: Any
    claims: Sequence[Claim] = ()
    figure: Callable[[Path], None] | None = None


def run_studies(settings: Any, make: Callable[[str, Path], Study], *, title: str) -> dict[str, Any]:
    """Runs studies one after the other; what is done is written before the next one begins.

    Args:
      settings: of the entry point: ``study``, ``workdir``, ``resume`` and ``assert_claims`` are
        looked at, and what is not in ``NOT_OF_A_STUDY`` must be the same when a run is resumed.
      make: ``make(study, workdir)`` runs one.
      title: of the table of claims.

    Returns:
      What ``results.json`` holds: results, claims and seconds of each study, and the environment.
      Studies that an earlier run in the folder has made stay in it.

    Raises:
      ValueError: a claim that should hold does not, after everything has been run and written.
    """
    config = dataclasses.asdict(settings)
    config = {name: value for name, value in config.items() if name not in NOT_OF_A_STUDY}
    workdir = report.open_workdir(settings.workdir, config, resume=settings.resume)
    path = workdir / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    claims: list[Claim] = []
    for name in settings.study:
        began = time.monotonic()
        found = make(name, workdir)
        if found.rows:
            report.print_table(found.title, found.columns, found.rows)
        if found.figure is not None and report.is_writer():
            found.figure(workdir / f"{name}.png")
        claims += found.claims
        results[name] = {
            "results": found.results,
            "claims": [claim._asdict() for claim in found.claims],
            "seconds": round(time.monotonic() - began, 1),
        }
        results["environment"] = environment()
        if report.is_writer():
            report.write_json(path, results)
    if claims:
        print_claims(title, claims)
    report.print_lines(f"tables, figures and results: {workdir}")
    if settings.assert_claims:
        check_claims(claims)
    return results


def interval(values: np.ndarray) -> str:
    """Mean, standard deviation and 95 % bootstrap interval of the mean, for a table."""
    found = metrics.bootstrap_mean(np.asarray(values, np.float64))
    if len(values) == 1:
        return f"{found.mean:.3g}"
    return f"{found.mean:.3g} ± {found.std:.2g} [{found.low:.3g}, {found.high:.3g}]"


def summary(numbers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The values over the seeds with mean, standard deviation and interval, for results.json."""
    out: dict[str, Any] = {}
    for name, values in numbers.items():
        values = np.asarray(values, np.float64)
        out[name] = {"values": values, **metrics.bootstrap_mean(values)._asdict()}
    return out
