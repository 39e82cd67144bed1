"""Training runs as they lie in folders: found, read, grouped by their settings."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import trained_models
from experiments.command_line import shown_value
from experiments.training_run import selection_metric
from experiments.training_settings import NOT_OF_THE_RUN, Settings
from robustjax import checks
from robustjax.training import report

RESULTS = "results.json"
WHICH = ("best", "last")
FIELDS = tuple(f.name for f in dataclasses.fields(Settings) if f.name not in NOT_OF_THE_RUN)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is in the folder of one network, ``WORKDIR/OBJECTIVE``.

    Attributes:
      folder: where it is.
      settings: of ``config.json``.
      records: of ``metrics.jsonl``.
      results: of ``results.json``; ``None`` as long as the run is not finished.
      evaluations: ``"best"`` or ``"last"`` to name of attacks to robust accuracy, a share.
    """

    folder: Path
    settings: Settings
    records: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any] | None
    evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        """The training step that has been reached."""
        if self.results is not None:
            return self.results["last"]["step"]
        return max((record["step"] for record in self.records), default=0)

    @property
    def total(self) -> int | None:
        """Training steps of the whole run; ``None`` if it has not even been validated once."""
        if self.results is not None:
            return self.results["last"]["step"]
        validated = self._validated()
        if not validated:
            return None
        first = min(self.settings.checkpoint_every, self.settings.epochs)
        return self.settings.epochs * (validated[0]["step"] // first)

    def values(self, split: str, which: str) -> dict[str, float]:
        """What was measured on a split at the best or the last checkpoint, so far.

        ``"test"`` is in ``results.json`` and in evaluations; the others in ``metrics.jsonl``.
        """
        if split == "test":
            found = {} if self.results is None else _measures(self.results[which])
            return {**found, **self.evaluations.get(which, {})}
        step = self._step_of(which)
        for record in self.records:
            if (record["split"], record["step"]) == (split, step):
                return _measures(record)
        return {}

    def series(self, split: str, name: str) -> dict[int, float]:
        """A curve: step to value, without values that are not finite."""
        found = {
            record["step"]: float(record[name])
            for record in self.records
            if record["split"] == split and name in record
        }
        return {step: value for step, value in found.items() if np.isfinite(value)}

    def _validated(self) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record["split"] == "validation"]

    def _step_of(self, which: str) -> int | None:
        if self.results is not None:
            return self.results[which]["step"]
        validated = self._validated()
        if not validated:
            return None
        metric = selection_metric(self.settings, self.settings.objective[0])
        if which == "last" or metric not in validated[-1]:
            return validated[-1]["step"]
        # Of equals the last, as checkpoints are ranked.
        return max(validated, key=lambda record: (float(record[metric]), record["step"]))["step"]


class Group(NamedTuple):
    """Runs that differ in nothing but the seed, or agree in the settings that were asked for.

    Attributes:
      settings: name to value, of those that tell the groups apart.
      runs: of it, by seed.
    """

    settings: dict[str, Any]
    runs: list[Run]

    @property
    def counted(self) -> list[Run]:
        """The runs that a mean is taken over: the finished ones, or all while there is none."""
        return [run for run in self.runs if run.results is not None] or self.runs

    @property
    def label(self) -> str:
        """The settings as their flags."""
        return ", ".join(f"{name}={shown(name, v)}" for name, v in self.settings.items())


def shown(name: str, value: Any) -> str:
    """The value of a setting, in a few characters."""
    fractions = Settings.__dataclass_fields__[name].metadata["unit"] == "input units"
    return shown_value(value, fractions)


def find(directories: Sequence[str]) -> tuple[list[Run], dict[str, str]]:
    """The runs in and below folders, and why others that look like one were left out.

    A run that is there twice, with the same settings and seed, counts once: a second copy of it
    says nothing about the spread.

    Raises:
      ValueError: a directory is none, or there is no run below any.
    """
    skipped: dict[str, str] = {}
    runs: dict[Path, Run] = {}
    evaluations: dict[Path, Path] = {}
    for directory in directories:
        if not Path(directory).is_dir():
            raise ValueError(f"DIR must be a folder with runs, got {directory!r}")
        for place, below, files in os.walk(directory):
            below.sort()
            folder = Path(place)
            if report.METRICS in files:
                below.clear()
                if folder.resolve() in runs:
                    continue
                try:
                    runs[folder.resolve()] = _read(folder)
                except (ValueError, TypeError) as error:
                    skipped[place] = str(error)
            elif {report.CONFIG, RESULTS} <= {*files}:
                evaluations.setdefault(folder.resolve(), folder)
    for folder in evaluations.values():
        try:
            _add_evaluation(folder, runs)
        except (ValueError, TypeError) as error:
            skipped[str(folder)] = str(error)
    kept = _without_copies(list(runs.values()), skipped)
    if not kept:
        reasons = "".join(f"; {folder}: {reason}" for folder, reason in skipped.items())
        raise ValueError(
            f"DIR must hold runs, folders with {report.CONFIG} and {report.METRICS}, got none in "
            f"{', '.join(directories)}{reasons}"
        )
    return kept, skipped


def differing(runs: Sequence[Run]) -> tuple[str, ...]:
    """The settings that are not the same in all runs, but for the seed."""
    return tuple(
        name
        for name in FIELDS
        if name != "seed" and any(_of(run, name) != _of(runs[0], name) for run in runs)
    )


def grouped(runs: Sequence[Run], fields: Sequence[str] = ()) -> list[Group]:
    """Groups of runs with the same settings, sorted by these.

    Args:
      runs: at least one.
      fields: settings to tell groups apart by; none: all in which any two runs differ.

    Raises:
      ValueError: there is no such setting.
    """
    for name in fields:
        checks.choice("group_by", name, FIELDS)
    columns = tuple(fields) or differing(runs) or ("objective",)
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(_of(run, name) for name in columns), []).append(run)
    by_value = sorted(found, key=lambda values: [() if v is None else (v,) for v in values])
    return [
        Group(
            dict(zip(columns, values, strict=True)),
            sorted(found[values], key=lambda run: run.settings.seed),
        )
        for values in by_value
    ]


def _of(run: Run, name: str) -> Any:
    return getattr(run.settings, name)


def _read(folder: Path) -> Run:
    settings = trained_models.read_settings(folder)
    records = report.read_metrics(folder)
    for record in records:
        _measures(record)
    path = folder / RESULTS
    if not path.exists():
        return Run(folder, settings, records, None)
    results = _object(path)
    checks.fields(str(path), results, WHICH)
    for which in WHICH:
        where = f"{which} in {path}"
        checks.fields(where, results[which], ("step",))
        checks.integer(f"step of {where}", results[which]["step"])
        _measures(results[which])
    return Run(folder, settings, records, results)


def _add_evaluation(folder: Path, runs: Mapping[Path, Run]) -> None:
    """Puts what ``experiments.evaluate`` found in ``folder`` to the run whose network it is of."""
    config = _object(folder / report.CONFIG)
    if not {"checkpoint", "which", "attack", "threat", "eps"} <= set(config):
        return  # the folder of several runs, or of a study
    if config["checkpoint"] is None:
        raise ValueError("an evaluation of a network that no run here has trained")
    checkpoint = Path(config["checkpoint"])
    # Folders that were moved together are still beside each other.
    places = (checkpoint.resolve(), (folder.parent / checkpoint.name).resolve())
    run = next((runs[place] for place in places if place in runs), None)
    if run is None or config["which"] not in WHICH:
        raise ValueError(f"an evaluation of {checkpoint}, which is not among the runs")
    results = _object(folder / RESULTS)
    checks.fields(str(folder / RESULTS), results, ("robust_accuracy", "examples"))
    accuracy = checks.number("robust_accuracy", results["robust_accuracy"], at_least=0, at_most=1)
    found = run.evaluations.setdefault(config["which"], {})
    name = _attack_name(config, results, run)
    if name in found:
        raise ValueError(f"a second evaluation of {run.folder} under {name}")
    found[name] = float(accuracy)


def _attack_name(config: Mapping[str, Any], results: Mapping[str, Any], run: Run) -> str:
    attack = "+".join(config["attack"])
    if config.get("version", "standard") != "standard" and attack == "autoattack":
        attack += f" {config['version']}"
    name = f"{attack} {config['threat']} {shown('eps', float(config['eps']))}"
    if config.get("split", "test") != "test":
        name += f" {config['split']}"
    if run.results is None or results["examples"] != run.results.get("test_examples"):
        name += f", {results['examples']} examples"
    return name


def _without_copies(runs: Sequence[Run], skipped: dict[str, str]) -> list[Run]:
    """Of each network the run that has come furthest."""
    furthest: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda run: (run.results is None, -run.step)):
        first = furthest.setdefault(tuple(_of(run, name) for name in FIELDS), run)
        if first is not run:
            skipped[str(run.folder)] = f"the same settings and seed as {first.folder}"
    return [run for run in runs if str(run.folder) not in skipped]


def _measures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, but for its step; one that is not finite is a string there."""
    try:
        return {n: float(v) for n, v in record.items() if n not in ("step", "split")}
    except (TypeError, ValueError) as error:
        raise ValueError(f"measures must be numbers, got {checks.shown(dict(record))}") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a readable JSON file") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {checks.shown(value)}")
    return value
