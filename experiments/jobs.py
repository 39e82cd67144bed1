"""Published networks as data: which runs a table needs, where they go, what came of them."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import adversarial_training, evaluate
from experiments.dry_run import COLUMNS, costs, misfits
from experiments.studies import interval, summary
from experiments.training_settings import Settings as Training
from robustjax.training import report

Labels = tuple[str, ...]


class Job(NamedTuple):
    """One network of a study.

    Attributes:
      labels: its place in the study's table: what is shown in the first columns. Networks that
        differ in nothing but the seed share them.
      settings: of the training run.
      published: name of a column to the published number.
    """

    labels: Labels
    settings: Training
    published: dict[str, float] = {}  # noqa: RUF012 -- never changed


def over_seeds(jobs: Sequence[Job], seeds: int) -> list[Job]:
    """Each job with each of the seeds that follow its own."""
    return [
        job._replace(settings=dataclasses.replace(job.settings, seed=job.settings.seed + seed))
        for job in jobs
        for seed in range(seeds)
    ]


def placed(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """Each job in a folder of its own in ``folder``, to be resumed there."""
    return [
        job._replace(
            settings=dataclasses.replace(
                job.settings, workdir=str(folder / folder_name(job)), resume=True
            )
        )
        for job in jobs
    ]


def folder_name(job: Job) -> str:
    """From labels and seed."""
    words = "-".join([*job.labels, f"seed{job.settings.seed}"]).lower().replace(" ", "")
    for old, new in (("/", "of"), (":", "_"), (",", "_"), ("+", "_")):
        words = words.replace(old, new)
    return words


def model_folder(job: Job) -> Path:
    """Where the network's checkpoints and metrics are."""
    return Path(job.settings.workdir) / job.settings.objective[0]


def trained(job: Job, study: str) -> dict[str, Any]:
    """What ``results.json`` of a network holds; it is trained if that has not been done."""
    path = Path(job.settings.workdir) / "results.json"
    objective = job.settings.objective[0]
    if path.exists():
        return json.loads(path.read_text())[objective]
    report.print_lines(f"{study}: {', '.join(job.labels)}, seed {job.settings.seed}")
    return adversarial_training.train(job.settings)[objective]


class Table(NamedTuple):
    """Outcomes of the networks of a study, by labels, in the order of the jobs."""

    columns: list[str]
    rows: list[list[str]]
    results: dict[str, Any]
    outcomes: dict[Labels, list[dict[str, float]]]


def tabulated(jobs: Sequence[Job], outcome: Callable[[Job], Mapping[str, float]]) -> Table:
    """Trains, measures, and puts mean, spread and the published number into one table.

    Args:
      jobs: placed networks.
      outcome: numbers of one network; a column that it lacks stays empty.
    """
    outcomes: dict[Labels, list[dict[str, float]]] = {}
    published = {job.labels: job.published for job in jobs}
    for job in jobs:
        outcomes.setdefault(job.labels, []).append(dict(outcome(job)))
    columns = list(dict.fromkeys(c for found in outcomes.values() for one in found for c in one))
    rows, results = [], {}
    for labels, found in outcomes.items():
        values = {c: np.array([one[c] for one in found]) for c in columns if c in found[0]}
        cells = []
        for column in columns:
            known = published[labels].get(column)
            text = interval(values[column]) if column in values else ""
            cells.append(text if known is None else f"{text} ({known:g})")
        rows.append([*labels, *cells])
        results[", ".join(labels)] = summary(values)
    return Table(columns, rows, results, outcomes)


def auto_attack(
    job: Job,
    examples: int,
    *,
    which: str = "best",
    threat: tuple[str, float] | None = None,
    attack: tuple[str, ...] = ("autoattack",),
    batch_size: int | None = None,
) -> float:
    """Robust accuracy of a network under AutoAttack, a share; an interrupted one is resumed.

    Args:
      job: a placed and trained network.
      examples: first test examples.
      which: the ``"best"`` or the ``"last"`` checkpoint.
      threat: norm and radius; ``None`` for those of the training.
      attack: other attacks in its place, for what its members cannot be run on.
      batch_size: examples at a time; ``None`` for that of ``experiments.evaluate``.
    """
    path = attack_folder(job, threat) / "results.json"
    if path.exists():
        return json.loads(path.read_text())["robust_accuracy"]
    norm, eps = threat or (job.settings.norm, job.settings.eps)
    chosen = dataclasses.replace(
        evaluate.PRESETS["paper"],
        checkpoint=str(model_folder(job)),
        which=which,
        examples=examples,
        threat=norm,
        eps=eps,
        attack=attack,
        data_dir=job.settings.data_dir,
        workdir=str(path.parent),
        resume=True,
        **({} if batch_size is None else {"batch_size": batch_size}),
    )
    return evaluate.main(chosen)["robust_accuracy"]


def attack_folder(job: Job, threat: tuple[str, float] | None = None) -> Path:
    """Where ``auto_attack`` leaves ``results.json`` and ``adversarial.npz`` (x_adv, robust, y)."""
    of_threat = "" if threat is None else f"-{threat[0]}-{threat[1]:.6g}"
    return Path(job.settings.workdir) / f"autoattack{of_threat}"


def print_costs(jobs: Sequence[Job], study: str, seeds: int) -> None:
    """Builds the networks abstractly and prints what each would cost."""
    named = [(", ".join(job.labels), job.settings) for job in jobs]
    report.print_table(
        f"Dry run: study {study}, each of {seeds} seeds",
        ["network", "data set", "model", *COLUMNS],
        costs(named),
    )
    report.print_lines(*misfits(named))
