"""Compares training runs: a table and a figure with confidence intervals over seeds.

  python -m experiments.compare runs/adversarial_training            every run in and below it
  python -m experiments.compare runs/a runs/b --group_by=objective,eps --which=best
  python -m experiments.compare runs --measures=clean,pgd20 --output=runs/pgd20

A run is a folder with config.json and metrics.jsonl, WORKDIR/OBJECTIVE of any entry point that
trains, finished or not. Runs that differ in nothing but the seed, and in what says where and how
they were started, are one group, named by the settings in which groups differ. The table has every
measure at the best and at the last checkpoint: mean over the finished runs (over all, as far as
they are, while none is finished), standard deviation, 95 % bootstrap interval of the mean; and
robust overfitting, (best - last) / best. The robust accuracy that experiments.evaluate found for a
run is among its test measures if the folder of that evaluation is found too. What is damaged or of
another kind is named and left out.

The folder --output gets table.csv, table.md, results.json (accuracies as shares) and curves.png.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import command_line, compare_figures, compare_tables
from experiments.command_line import setting
from experiments.compare_runs import WHICH, Group, Run, differing, find, grouped, shown
from experiments.studies import interval, summary
from robustjax import metrics
from robustjax.training import report

OVERFITTING = "overfitting"
SPLITS = ("test", "validation", "train", "monitor", "gradients")  # in the order of the table
# What is said of all runs if they agree in it.
IN_COMMON = ("dataset", "model", "objective", "norm", "eps", "epochs")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared.

    Raises:
      ValueError: a setting is not among its choices.
    """

    # fmt: off
    dir: tuple[str, ...] = setting(
        (), "folders; the runs in and below them are compared", "runs", positional=True)
    group_by: tuple[str, ...] = setting(
        (), "settings of training, by commas, by which runs are grouped; none: all in which any "
        "two runs differ, but for the seed", "runs")
    split: tuple[str, ...] = setting(
        ("train", "validation", "test"), "whose measures are shown; those of train only as curves, "
        "those of test (and of evaluations) only in the table", "measures",
        choices=SPLITS)
    measures: tuple[str, ...] = setting((), "which measures, by commas; none: all", "measures")
    which: tuple[str, ...] = setting(WHICH, "checkpoints in the table", "measures", choices=WHICH)
    output: str = setting("runs/compare", "folder of the results", "output")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)


class Measure(NamedTuple):
    """A number that is measured on a split."""

    split: str
    name: str

    @property
    def unit(self) -> str:
        """``"%"`` for accuracies, ``"nats"`` for losses."""
        if self.split == "test" or self.name.startswith("pgd") or self.name == "clean":
            return "%"
        return "%" if "accuracy" in self.name else "nats" if "loss" in self.name else ""

    @property
    def scale(self) -> float:
        """From the number in the files to the unit."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def robust(self) -> bool:
        """An accuracy under attack."""
        return self.unit == "%" and self.name not in ("clean", "accuracy")

    @property
    def column(self) -> str:
        """Heading in a table."""
        return f"{self.split} {self.name}" + (f" ({self.unit})" if self.unit else "")

    @property
    def axis(self) -> str:
        """Label of an axis, for all splits."""
        words = self.name.replace("_", " ")
        if self.unit == "%" and "accuracy" not in words:
            words = f"accuracy, {words}"
        return words + (f" ({self.unit})" if self.unit else "")


Values = dict[str, dict[Measure, np.ndarray]]  # checkpoint to measure to values over the runs


def main(settings: Settings) -> dict[str, Any]:
    """Compares the runs; returns what ``results.json`` holds."""
    if not settings.dir:
        raise ValueError("DIR must be at least one folder with runs, got none")
    runs, skipped = find(settings.dir)
    groups = grouped(runs, settings.group_by)
    shown_measures = _measures(settings, runs)
    config = dataclasses.asdict(settings)
    output = report.open_workdir(settings.output, config, resume=True, may_change=tuple(config))
    for folder, reason in skipped.items():
        report.print_lines(f"warning: {folder} is left out: {reason}")
    for group in groups:
        if pooled := [name for name in differing(group.runs) if name not in group.settings]:
            report.print_lines(
                f"warning: the runs of {group.label} differ in {', '.join(pooled)} too"
            )
    in_table = [m for m in shown_measures if m.split != "train"]
    values = [_values(group, settings.which, in_table) for group in groups]
    in_table = [m for m in in_table if any(m in found for v in values for found in v.values())]
    columns = ["group", *groups[0].settings, "seeds", "finished", "checkpoint"]
    columns += [measure.column for measure in in_table]
    rows = [
        [str(number), *row]
        for number, (group, found) in enumerate(zip(groups, values, strict=True), start=1)
        for row in _rows(group, found, in_table)
    ]
    if same := _in_common(runs):
        report.print_lines(f"the same in all runs: {same}")
    compare_tables.print_groups(
        f"Runs: {len(runs)}, groups: {len(groups)}; mean ± standard deviation [95 % bootstrap "
        "interval of the mean] over seeds",
        columns,
        rows,
        of_group=columns.index("checkpoint"),
    )
    results = {
        "groups": [_result(group, found) for group, found in zip(groups, values, strict=True)],
        "skipped": skipped,
    }
    if report.is_writer():
        report.write_json(output / "results.json", results)
        (output / "table.md").write_text(compare_tables.markdown(columns, rows))
        _write_csv(output / "table.csv", groups, values, in_table)
        figure = output / "curves.png"
        figure.unlink(missing_ok=True)  # there may be nothing to draw this time
        if panels := _panels(groups, [m for m in shown_measures if m.split != "test"]):
            compare_figures.curves(figure, panels)
    report.print_lines(f"table, results and curves: {output}")
    return results


def _measures(settings: Settings, runs: Sequence[Run]) -> list[Measure]:
    """All that any run has of the splits that are asked for, in the order of the files.

    Raises:
      ValueError: no run has a measure that is asked for by name.
    """
    found: dict[Measure, None] = {}
    for split in (split for split in SPLITS if split in settings.split):
        for run in runs:
            if split == "test":
                names = [name for which in WHICH for name in run.values(split, which)]
            else:
                names = [n for record in run.records if record["split"] == split for n in record]
            found |= {Measure(split, n): None for n in names if n not in ("step", "split")}
    known = {measure.name for measure in found}
    for name in settings.measures:
        if name not in known:
            raise ValueError(
                f"measures must be of {', '.join(sorted(known))} in {','.join(settings.split)}, "
                f"got {name!r}"
            )
    return [m for m in found if not settings.measures or m.name in settings.measures]


def _values(group: Group, which: Sequence[str], measures: Sequence[Measure]) -> Values:
    """Of the runs that count, by checkpoint; the robust overfitting of each run where both are."""
    splits = {measure.split for measure in measures}
    found = [
        {w: {split: run.values(split, w) for split in splits} for w in WHICH}
        for run in group.counted
    ]
    out: Values = {}
    for w in which:
        of_measure = {m: [f[w][m.split][m.name] for f in found if m.name in f[w][m.split]]
                      for m in measures}  # fmt: skip
        out[w] = {m: np.array(values) for m, values in of_measure.items() if values}
    if set(WHICH) <= set(which):
        fallen = {}
        for m in (m for m in measures if m.robust):
            pairs = [[f[w][m.split].get(m.name, np.nan) for w in WHICH] for f in found]
            pairs = [pair for pair in pairs if np.isfinite(pair).all()]
            if pairs:
                fallen[m] = np.array([metrics.robust_overfitting(pair) for pair in pairs])
        if fallen:
            out[OVERFITTING] = fallen
    return out


def _rows(group: Group, values: Values, measures: Sequence[Measure]) -> list[list[str]]:
    names = [shown(name, value) for name, value in group.settings.items()]
    rows = []
    for checkpoint, of_measure in values.items():
        overfitting = checkpoint == OVERFITTING
        cells = []
        for measure in measures:
            scale = 1.0 if overfitting else measure.scale
            cells.append(_cell(of_measure.get(measure), scale, len(group.runs)))
        title = f"{OVERFITTING}, %" if overfitting else checkpoint
        rows.append([*names, str(len(group.runs)), _finished(group), title, *cells])
    return rows


def _cell(values: np.ndarray | None, scale: float, runs: int) -> str:
    if values is None:
        return ""
    text = interval(scale * values) if np.isfinite(values).all() else "not finite"
    return text if len(values) == runs else f"{text} ({len(values)} of {runs})"


def _finished(group: Group) -> str:
    """How many are, and how far the others have come."""
    going = [run for run in group.runs if run.results is None]
    if not going:
        return "all"
    steps = sorted({run.step for run in going})
    reached = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return f"{len(group.runs) - len(going)}; step {reached} of {_total(group) or '?'}"


def _total(group: Group) -> int | None:
    """Steps of a whole run, from any that tells."""
    return next((run.total for run in group.runs if run.total is not None), None)


def _in_common(runs: Sequence[Run]) -> str:
    names = [name for name in IN_COMMON if name not in differing(runs)]
    return ", ".join(f"{name}={shown(name, getattr(runs[0].settings, name))}" for name in names)


def _result(group: Group, values: Values) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for checkpoint, of_measure in values.items():
        for measure, numbers in of_measure.items():
            finite = np.isfinite(numbers).all()
            told = summary({"": numbers})[""] if finite else {"values": numbers}
            found.setdefault(checkpoint, {}).setdefault(measure.split, {})[measure.name] = told
    return {
        "settings": group.settings,
        "runs": [
            {
                "folder": run.folder,
                "seed": run.settings.seed,
                "finished": run.results is not None,
                "step": run.step,
                "steps": run.total or _total(group),
            }
            for run in group.runs
        ],
        **found,
    }


def _write_csv(
    path: Path, groups: Sequence[Group], values: Sequence[Values], measures: Sequence[Measure]
) -> None:
    """The table with a column for each number."""
    head = ["group", *groups[0].settings, "seeds", "finished", "least step", "steps", "checkpoint"]
    for measure in measures:
        head += [
            measure.column,
            *(f"{measure.column} {what}" for what in ("std", "low", "high", "runs")),
        ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for number, (group, found) in enumerate(zip(groups, values, strict=True), start=1):
            finished = sum(run.results is not None for run in group.runs)
            least = min(run.step for run in group.runs)
            names = [shown(name, value) for name, value in group.settings.items()]
            names += [len(group.runs), finished, least, _total(group)]
            for checkpoint, of_measure in found.items():
                cells: list[Any] = []
                for measure in measures:
                    numbers = of_measure.get(measure)
                    if numbers is None or not np.isfinite(numbers).all():
                        cells += ["", "", "", "", 0 if numbers is None else len(numbers)]
                        continue
                    scale = 1.0 if checkpoint == OVERFITTING else measure.scale
                    cells += [*metrics.bootstrap_mean(scale * numbers), len(numbers)]
                writer.writerow([number, *names, checkpoint, *cells])


def _panels(
    groups: Sequence[Group], measures: Sequence[Measure]
) -> dict[str, dict[tuple[str, str], compare_figures.Curve]]:
    """Curves of each group by label of the measure: losses first, then accuracies."""
    names = []
    for number, group in enumerate(groups, start=1):
        seeds = f"{len(group.runs)} seed{'s' * (len(group.runs) > 1)}"
        # What does not fit into a legend is in the table.
        label = f"{number}: {group.label}" if len(group.label) <= 60 else f"group {number}"
        names.append(f"{label} ({seeds})")
    panels: dict[str, dict[tuple[str, str], compare_figures.Curve]] = {}
    units = ["nats", "%", ""]
    for measure in sorted(measures, key=lambda m: units.index(m.unit)):
        for name, group in zip(names, groups, strict=True):
            curve = compare_figures.mean_curve(
                [run.series(measure.split, measure.name) for run in group.runs],
                scale=measure.scale,
            )
            if len(curve.step):
                panels.setdefault(measure.axis, {})[name, measure.split] = curve
    return panels


if __name__ == "__main__":
    command_line.run(main, Settings, {"default": Settings()}, __doc__)
