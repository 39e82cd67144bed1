"""The published runs of fast adversarial training: trained, evaluated, tabulated and drawn."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import (
    batch_sizes,
    fast_published_figures,
    fast_theory,
    jobs,
    trained_models,
)
from experiments.fast_jobs import BASE, LABELS, jobs_of
from experiments.jobs import Job
from experiments.studies import Study
from experiments.training_settings import Settings as Training
from robustjax import data, metrics
from robustjax.training import report


def base_of(settings: Any) -> Training:
    """What all runs share, with ``settings`` of ``experiments.fast_adversarial_training``."""
    return dataclasses.replace(BASE, data_dir=settings.data_dir, seed=settings.seed)


def placed_jobs(settings: Any, study: str, workdir: Path) -> list[Job]:
    """The networks of a study, each with a folder of its own; stages follow each other."""
    found = jobs_of(
        study, base_of(settings), settings.seeds, batch_multiple=settings.batch_multiple
    )
    placed = jobs.placed(found, workdir / study)
    if study != "imagenet":
        return placed
    last: dict[Any, Job] = {}
    chained = []
    for job in sorted(placed, key=lambda job: int(job.labels[2])):
        network = (*job.labels[:2], job.settings.seed)
        start = str(jobs.model_folder(last[network])) if network in last else None
        last[network] = job._replace(settings=dataclasses.replace(job.settings, start_from=start))
        chained.append(last[network])
    return chained


def run_study(settings: Any, study: str, workdir: Path) -> Study:
    """Trains and evaluates the networks of a study, one after the other.

    Args:
      settings: of ``experiments.fast_adversarial_training``.
      study: one of ``fast_jobs.STUDIES``.
      workdir: the networks go into folders of ``workdir / study``.

    Raises:
      ValueError: a batch of a network that is yet to be trained does not divide over the devices.
    """
    networks = placed_jobs(settings, study, workdir)
    _check_batches(networks)
    table = jobs.tabulated(networks, functools.partial(_outcome, settings, study))
    return Study(
        f"Study {study}, mean ± std [95 % interval] over seeds; in parentheses: published",
        [*LABELS[study], *table.columns],
        table.rows,
        table.results,
        figure=functools.partial(_figure, study, networks, table.outcomes),
    )


def _check_batches(networks: list[Job]) -> None:
    """Refuses now what would be refused when the stages before it have been trained."""
    for job in networks:
        found = batch_sizes.misfit(
            job.settings.batch_size, name=f"batch_size of {', '.join(job.labels)}"
        )
        if found and not (Path(job.settings.workdir) / "results.json").exists():
            raise ValueError(f"{found}; --batch_multiple rounds it")


def published_linearization(settings: Any, workdir: Path) -> Study:
    """Fig. 2.10 from the last networks of the study of curves, on the first 512 test examples."""
    networks: dict[str, list[Any]] = {}
    for job in placed_jobs(settings, "curves", workdir):
        if job.labels[0] in ("Standard", "PGD-10"):
            jobs.trained(job, "curves")
            trained = trained_models.load(
                jobs.model_folder(job), "last", data_dir=settings.data_dir
            )
            networks.setdefault(job.labels[0], []).append(trained.logits_fn)
            examples = trained_models.evaluation_set(job.settings, "test", 512)
    x = data.as_float(examples.image)
    return fast_theory.linearization_of(networks, x, examples.label, eps=8 / 255)


def _outcome(settings: Any, study: str, job: Job) -> dict[str, float]:
    """The numbers of one network, in per cent."""
    result = jobs.trained(job, study)
    pgd = f"pgd{job.settings.test_steps}-{job.settings.test_restarts}"
    outcome = {}
    for words, which in (("", "last"), ("stopped early ", "best")):
        outcome[f"{words}clean"] = 100 * result[which]["clean"]
        outcome[f"{words}PGD-50-10"] = 100 * result[which][pgd]
    seen = _monitored(job)
    collapsed = metrics.catastrophic_overfitting(
        seen["pgd_accuracy"], seen["fgsm_accuracy"], seen["pgd_loss"], seen["fgsm_loss"]
    )
    outcome["alignment"] = seen["alignment"][-1]
    outcome["collapsed"] = float(collapsed.any())
    if settings.auto_attack and "AutoAttack" in job.published:
        examples = settings.auto_attack
        outcome["AutoAttack"] = 100 * jobs.auto_attack(job, examples, which="last")
    return outcome


def _monitored(job: Job) -> dict[str, np.ndarray]:
    """What was measured on test examples at every validation, in order."""
    records = report.read_metrics(jobs.model_folder(job))
    records = [record for record in records if record["split"] == "monitor"]
    names = [name for name in records[0] if name not in ("step", "split")]
    return {name: np.array([record[name] for record in records]) for name in names}


def _figure(
    study: str,
    networks: list[Job],
    found: Mapping[jobs.Labels, list[dict[str, float]]],
    path: Path,
) -> None:
    """Curves over epochs, eps or weights, where the chapter has a figure."""
    if study in ("curves", "single_layer"):
        # Of each kind, the last seed.
        monitored = {job.labels[0]: _monitored(job) for job in networks}
        fast_published_figures.monitored(path, curves=monitored)
    elif study in ("eps", "steps", "weight", "epochs"):
        # The last label is the value; in study steps it ends the first.
        names = ("clean", "PGD-50-10", "stopped early clean", "stopped early PGD-50-10")
        grouped: dict[str, dict[float, list[dict[str, float]]]] = {}
        for labels, outcomes in found.items():
            method, value = labels[:-1], labels[-1]
            if study == "steps":
                words = labels[0].split(", step ")
                method, value = words[:1], words[1] if len(words) > 1 else "10/255"
            number = float(value.removesuffix("/255"))
            grouped.setdefault(", ".join(method), {})[number] = outcomes
        curves = {
            method: (
                list(rows),
                {n: np.array([[one[n] for one in outcomes] for outcomes in rows.values()])
                 for n in names},
            )
            for method, rows in grouped.items()
        }  # fmt: skip
        xlabel = {"eps": "255 eps", "steps": "255 step", "weight": "weight of GradAlign"}
        fast_published_figures.accuracies(path, xlabel=xlabel.get(study, study), curves=curves)
