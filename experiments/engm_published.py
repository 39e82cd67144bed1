"""The published runs of outer optimizers: networks trained, evaluated, tabulated and drawn."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import (
    adversarial_training,
    engm_figures,
    engm_jobs,
    jobs,
    trained_models,
)
from experiments.engm_jobs import BASE, LABELS, jobs_of
from experiments.engm_studies import deepfool_distance
from experiments.engm_sweeps import landscape_of
from experiments.jobs import Job
from experiments.studies import Study
from experiments.training_measures import WEIGHT_ERROR_ALPHAS
from experiments.training_settings import Settings as Training
from robustjax import metrics
from robustjax.training import report

# MNIST-5k with the network of the demo, but momentum SGD: the pipeline of the published runs.
MNIST = dataclasses.replace(
    adversarial_training.PRESETS["small"], objective=("madry",), optimizer="sgd",
    learning_rate=0.05, weight_decay=5e-4, eps_warmup=2, alpha=3.0, tau=10, checkpoint_every=2,
    test_restarts=1, probe=100,
)  # fmt: skip


def base_of(settings: Any, study: str) -> Training:
    """What the runs of a study share, with ``settings`` of ``experiments.engm``."""
    if study == "mnist":
        return dataclasses.replace(MNIST, epochs=settings.mnist_epochs, seed=settings.seed)
    return dataclasses.replace(
        BASE, data_dir=settings.data_dir, batch_size=settings.batch_size, seed=settings.seed
    )


def placed_jobs(settings: Any, study: str, workdir: Path) -> list[Job]:
    """The networks of a study, each with a folder of its own."""
    placed = jobs.placed(jobs_of(study, base_of(settings, study), settings.seeds), workdir / study)
    if study != "methods":
        return placed
    # The data set of arrays is where the user has it.
    return [
        job._replace(
            settings=dataclasses.replace(job.settings, dataset=f"npz:{settings.tiny_imagenet}")
        )
        if job.settings.dataset == engm_jobs.DATASETS[-1]
        else job
        for job in placed
    ]


def run_study(settings: Any, study: str, workdir: Path) -> Study:
    """Trains and evaluates the networks of a study, one after the other.

    Args:
      settings: of ``experiments.engm``.
      study: one that trains networks.
      workdir: the networks go into folders of ``workdir / study``.
    """
    networks = placed_jobs(settings, study, workdir)
    table = jobs.tabulated(networks, functools.partial(_outcome, settings, study))
    note = "" if study == "mnist" else "; in parentheses: published"
    return Study(
        f"Study {study}, mean ± std [95 % interval] over seeds{note}",
        [*LABELS[study], *table.columns],
        table.rows,
        table.results,
        figure=functools.partial(_figure, study, networks, table.outcomes),
    )


def _outcome(settings: Any, study: str, job: Job) -> dict[str, float]:
    """The numbers of one network, which is trained if that has not been done."""
    result = jobs.trained(job, study)
    pgd = f"pgd{job.settings.validation_steps}"
    best, last = result["best"], result["last"]
    outcome = {"clean": 100 * best["clean"], "best": 100 * best[pgd], "last": 100 * last[pgd]}
    outcome["overfit"] = metrics.robust_overfitting([best[pgd], last[pgd]])
    if settings.auto_attack and study in ("optimizers", "methods", "sota", "l2"):
        outcome["autoattack"] = 100 * jobs.auto_attack(job, settings.auto_attack)
    if job.settings.probe:
        records = report.read_metrics(jobs.model_folder(job))
        measured = [record for record in records if record["split"] == "gradients"]
        for name in ("mean_norm", "variance", "correlation"):
            outcome[name] = float(np.mean([record[name] for record in measured]))
    if study == "eps":
        trained = trained_models.load(jobs.model_folder(job), data_dir=settings.data_dir)
        examples = trained_models.evaluation_set(job.settings, "test", 1000)
        outcome["deepfool"] = deepfool_distance(trained.logits_fn, examples.image, examples.label)
    return outcome


def _figure(
    study: str, networks: Sequence[Job], found: Mapping[tuple, list[dict[str, float]]], path: Path
) -> None:
    """The figure of a study of networks, if it has one."""

    def means(column):
        return {labels: np.mean([o[column] for o in found[labels]]) for labels in found}

    if study in ("optimizers", "mnist"):
        best = means("best")
        bars = {labels[0]: best[labels] - best["MSGD",] for labels in found}
        curves = {}
        for labels in found:
            pgd = f"pgd{networks[0].settings.validation_steps}"
            epoch, accuracy = _curves(networks, labels, "validation", pgd)
            curves[labels[0]] = (epoch, 100 * accuracy)
        engm_figures.robust_curves(path, curves=curves, bars=bars)
    elif study == "eps":
        table = {}
        eps = sorted({job.settings.eps for job in networks})
        for name, column in (("mean norm", "mean_norm"), ("variance", "variance")):
            table[name] = [v for labels, v in means(column).items() if labels[0] == "MSGD"]
        for method in ("MSGD", "ENGM"):
            table[f"rho, {method}"] = [
                v for labels, v in means("deepfool").items() if labels[0] == method
            ]
        engm_figures.over_eps(path, eps=eps, table=table)
    elif study == "gradients":
        for dataset in {labels[0] for labels in found}:
            curves, errors = {}, {}
            for labels in (labels for labels in found if labels[0] == dataset):
                series = {}
                for name in ("mean_norm", "variance", "correlation", "correlation_train"):
                    epoch, values = _curves(networks, labels, "gradients", name)
                    series[name] = values.mean(axis=0)
                curves[labels[2]] = series
                if labels[2] != "natural":
                    errors = {
                        alpha: _curves(networks, labels, "gradients", f"weight_error_{alpha:g}")[1]
                        .mean(axis=0)
                        for alpha in WEIGHT_ERROR_ALPHAS
                    }  # fmt: skip
            engm_figures.gradient_curves(
                path.with_name(f"{path.stem}-{dataset}.png"), epoch=epoch, curves=curves,
                errors=errors,
            )  # fmt: skip
    elif study in ("alpha", "tau", "beta", "weight_decay"):
        kinds: dict[str, dict[str, list[float]]] = {}
        values: dict[str, list[float]] = {}
        for labels in found:
            values.setdefault(labels[0], []).append(float(labels[1].split(" = ")[1]))
            for column in ("clean", "best", "overfit"):
                of_kind = kinds.setdefault(labels[0], {})
                of_kind.setdefault(column, []).append(means(column)[labels])
        # N-ENGM has its own scale; both rise.
        engm_figures.sweep(path, knob=study, values=next(iter(values.values())), found=kinds)


def _curves(
    networks: Sequence[Job], labels: tuple[str, ...], split: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, and a metric there for each seed, ``(seeds, evaluations)``."""
    runs = []
    for job in networks:
        if job.labels == labels:
            records = report.read_metrics(jobs.model_folder(job))
            records = [r for r in records if r["split"] == split]
            runs.append([record[name] for record in records])
    # A validation every so many epochs, and at the last one.
    every, last = networks[0].settings.checkpoint_every, networks[0].settings.epochs
    epoch = np.minimum(every * np.arange(1, len(runs[0]) + 1), last)
    return epoch, np.array(runs)


def published_landscape(settings: Any, workdir: Path) -> Study:
    """Fig. 4 from the best networks of the study of optimizers, with the first seed."""
    logits_fns = {}
    for job in placed_jobs(settings, "optimizers", workdir):
        method = job.labels[0].lower()
        if method in ("msgd", "engm") and method not in logits_fns:
            folder = jobs.model_folder(job)
            logits_fns[method] = trained_models.load(folder, data_dir=settings.data_dir).logits_fn
            examples = trained_models.evaluation_set(job.settings, "test", 4)
    return landscape_of(logits_fns, examples.image, examples.label, eps=8 / 255)
