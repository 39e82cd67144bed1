"""The published networks of SGD, Adam and RMSProp: trained once, measured for every table.

Accuracy on the test set as it is and under Gaussian noise, under AutoAttack on its first examples,
and the bound of the Lipschitz constant. Source: see ``optimizer_jobs``.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
    batch_sizes,
    jobs,
    optimizer_figures,
    optimizer_jobs,
    trained_models,
    training_run,
)
from experiments.claims import Claim
from experiments.jobs import Job
from experiments.optimizer_jobs import COVERED, FILTERS, REMOVED
from experiments.optimizer_published import SEVERITIES, TABLE_4_1, average, top
from experiments.studies import Study, interval
from experiments.training_settings import Settings as Training
from robustjax import data, keys, metrics
from robustjax.benchmark.batches import BatchedFunction
from robustjax.lipschitz import lipschitz_bound
from robustjax.training import report

# Square wants images: waveforms are attacked by the other members of AutoAttack.
AUTO_ATTACK = ("autoattack",)
WHITE_BOX = ("apgd-ce", "apgd-t", "fab-t")


def base_of(settings: Any, seed: int = 0) -> Training:
    """What all runs share, with ``settings`` of ``experiments.optimizer_robustness``."""
    return dataclasses.replace(
        optimizer_jobs.BASE, data_dir=settings.data_dir, seed=settings.seed + seed
    )


def asked(settings: Any, study: str) -> list[str]:
    """The data sets of a study that are asked for."""
    return [name for name in COVERED[study] if name in settings.data]


def networks_of(settings: Any, study: str, name: str, workdir: Path) -> list[Job]:
    """The networks of a study on one data set, from all seeds, in folders that studies share."""
    found = []
    for seed in range(settings.seeds):
        base = base_of(settings, seed)
        found += optimizer_jobs.jobs_of(study, base, name, workdir / "networks")
    more: dict[str, Any] = {}
    if settings.validation_size is not None:
        more["validation_size"] = settings.validation_size
    if study == "head":
        more["pretrained"] = settings.pretrained
    return [job._replace(settings=dataclasses.replace(job.settings, **more)) for job in found]


def tables(settings: Any, study: str, workdir: Path) -> Study:
    """Trains what is missing of the networks of one of ``optimizer_jobs.TABLES``, measures them.

    Args:
      settings: of ``experiments.optimizer_robustness``.
      study: name of the table.
      workdir: the networks go into folders of ``workdir / "networks"``.
    """
    results, numbers = {}, {}
    for name in asked(settings, study):
        networks = networks_of(settings, study, name, workdir)
        outcome = functools.partial(_outcome, settings, study, name)
        table = jobs.tabulated(networks, outcome)
        report.print_table(
            f"{networks[0].labels[0]}: accuracy (%), mean ± std [95 % interval] over seeds; in "
            "parentheses: published",
            ["", *(row[1] for row in table.rows)],
            [[column, *(row[2 + i] for row in table.rows)]
             for i, column in enumerate(table.columns)],
        )  # fmt: skip
        results |= table.results
        numbers[name] = {
            labels[1]: {column: np.array([one[column] for one in found]) for column in found[0]}
            for labels, found in table.outcomes.items()
        }
    claims = [claim for name, found in numbers.items() for claim in _claims(name, found)]
    if study != "robustness":
        return Study(f"Study {study}", [], [], results, claims)
    rows = [
        [name, optimizer,
         f"{runs['average'].mean():.2f} ({TABLE_4_1[name][optimizer][1]:g})",
         f"{runs['Lipschitz bound'].mean():.3g} ({TABLE_4_1[name][optimizer][0]:g})",
         f"{runs['log product of norms'].mean():.2f}"]
        for name, found in numbers.items() for optimizer, runs in found.items()
    ]  # fmt: skip
    return Study(
        "Average robust accuracy (%) and Lipschitz bounds; in parentheses: published, of which "
        "neither norm nor rule for blocks is known, so that only the order compares",
        ["data set", "optimizer", "average", "Lipschitz bound", "log product of norms"],
        rows,
        results,
        claims,
        functools.partial(_figure, numbers),
    )


def _figure(numbers: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], path: Path) -> None:
    kinds = ("Gaussian noise", "l_2 attack", "l_inf attack")
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, of_data in numbers.items():
        severities = SEVERITIES[name]
        chosen = top(("clean", *severities.highlighted), severities.top)
        found[name] = {
            optimizer: {
                **dict(zip(("clean", *kinds), (runs[column] for column in chosen), strict=True)),
                "average": runs["average"],
                "log Lipschitz": np.log(runs["Lipschitz bound"]),
            }
            for optimizer, runs in of_data.items()
        }
    optimizer_figures.robustness(path, found=found, severities=kinds)


def _claims(name: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> list[Claim]:
    """Reported for all data sets: the thesis has exceptions at weak perturbations."""

    def shown(column, form):
        return ", ".join(f"{optimizer} {form.format(runs[column].mean())}"
                         for optimizer, runs in found.items())  # fmt: skip

    if "SGD-m" in found:
        return [Claim(f"{name}: momentum changes little, average robust accuracy", "< 3 points",
                      shown("average", "{:.1f}"), None)]  # fmt: skip
    claims = [Claim(f"{name}: SGD is the most robust, average robust accuracy", "the first is most",
                    shown("average", "{:.1f}"), None)]  # fmt: skip
    if "Lipschitz bound" in found["SGD"]:
        claims.append(Claim(f"{name}: SGD has the smallest Lipschitz bound", "the first is least",
                            shown("Lipschitz bound", "{:.3g}"), None))  # fmt: skip
    return claims


def _outcome(settings: Any, study: str, name: str, job: Job) -> dict[str, float]:
    """The columns of one network, shares in per cent."""
    jobs.trained(job, study)
    severities, tops = SEVERITIES[name], sorted({1, SEVERITIES[name].top})
    logits_fn = loaded(job, settings.data_dir)
    test = test_set(job, settings.data_dir)
    batch_size = batch_sizes.for_evaluation(batch_size_of(settings, job))
    found: dict[str, float] = {}
    key = jax.random.key(0)
    noisy = _under_noise(severities.gaussian, tuple(tops), batch_size)
    fixed = noisy.place((logits_fn, key))
    parts = []
    for batch in data.eval_batches(test, batch_size):
        right = noisy(fixed, (), (batch["image"], batch["label"], batch["index"]))
        parts.append(right[batch["mask"]])
    shares = [np.concatenate(parts).mean(axis=0)]
    plain = _under_noise((), tuple(tops), batch_size)
    fixed = plain.place((logits_fn, key))
    for threat in severities.radii.values():
        saved = attacked(settings, job, threat, min(settings.examples, len(test)))
        index = np.arange(len(saved["y"]), dtype=np.int32)
        shares.append(plain(fixed, (), (saved["x_adv"], saved["y"], index)).mean(axis=0))
    for k, own in zip(tops, 100 * np.concatenate(shares, axis=1), strict=True):
        found |= dict(zip(top(severities.columns, k), map(float, own), strict=True))
    found["average"] = average(name, found)
    if study == "robustness":
        shape = (1, *np.shape(test[0]["image"]))
        value, product = _lipschitz(logits_fn, shape)
        found |= {"Lipschitz bound": float(np.exp(np.float64(value))),
                  "log product of norms": float(product)}  # fmt: skip
    return found


def attacked(
    settings: Any, job: Job, threat: tuple[str, float], examples: int
) -> Mapping[str, np.ndarray]:
    """What AutoAttack finds on the first test examples: ``x_adv``, ``robust`` and ``y``."""
    sound = job.settings.dataset == "speech_commands"
    jobs.auto_attack(
        job, examples, threat=threat, batch_size=batch_size_of(settings, job),
        attack=WHITE_BOX if sound else AUTO_ATTACK,
    )  # fmt: skip
    return np.load(jobs.attack_folder(job, threat) / "adversarial.npz")


def batch_size_of(settings: Any, job: Job) -> int:
    """Examples at a time in the evaluation of a network."""
    return min(settings.batch_size, job.settings.test_batch_size)


@functools.lru_cache(maxsize=32)
def _under_noise(
    variances: tuple[float, ...], tops: tuple[int, ...], batch_size: int
) -> BatchedFunction:
    """Correctness ``(n, tops, 1 + variances)`` of examples as they are and with noise.

    Images are clipped to [0, 1], waveforms are not.
    """

    def measure(fixed, numbers, rows):
        del numbers
        (logits_fn, key), (x, y, index) = fixed, rows
        draws = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))
        noise = draws(keys.per_example(key, index))
        shown = [x, *(x + np.sqrt(variance) * noise for variance in variances)]
        if x.ndim == 4:
            shown = [jnp.clip(images, 0, 1) for images in shown]
        logits = [logits_fn(images) for images in shown]
        return jnp.stack(
            [jnp.stack([metrics.correct(z, y, top=k) for z in logits], axis=1) for k in tops],
            axis=1,
        )

    return BatchedFunction(measure, batch_size=batch_size)


@functools.partial(jax.jit, static_argnums=1)
def _lipschitz(logits_fn: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    found = lipschitz_bound(logits_fn, jax.ShapeDtypeStruct(shape, jnp.float32))
    return found.log_value, found.log_product


def filters(settings: Any, study: str, workdir: Path) -> Study:
    """Observation I: trained with SGD on filtered images, tested on the original ones."""
    found: dict[str, dict[str, np.ndarray]] = {}
    rows = []
    for name in asked(settings, study):
        values: dict[str, list[float]] = {}
        for job in networks_of(settings, study, name, workdir):
            label = job.labels[0].removeprefix(name).removeprefix(", ") or "none 0"
            accuracy = 100 * jobs.trained(job, study)["best"]["clean"]
            values.setdefault(", ".join(label.rsplit(" ", 1)), []).append(accuracy)
        found[name] = {label: np.array(v) for label, v in values.items()}
        rows += [
            [name, kind, interval(found[name]["none, 0"]),
             *(interval(found[name][f"{kind}, {p}"]) for p in REMOVED)]
            for kind in FILTERS
        ]  # fmt: skip

    def figure(path: Path) -> None:
        for name, of_data in found.items():
            optimizer_figures.filters(
                optimizer_figures.of_name(path, name),
                found=of_data,
                names=tuple(FILTERS),
                removed=REMOVED,
            )

    return Study(
        "Accuracy (%) on original images after training with SGD on filtered ones; published as a "
        "figure alone: high while half of the frequencies are left",
        ["data set", "filter", "0 % removed", *(f"{p} %" for p in REMOVED)],
        rows,
        found,
        figure=figure,
    )


def test_set(job: Job, data_dir: str | None) -> data.Dataset | data.Source:
    """The test set of a network, as it is evaluated."""
    return split_of(dataclasses.replace(job.settings, data_dir=data_dir), "test")


def split_of(settings: Training, split: str) -> data.Dataset | data.Source:
    """A split as it is evaluated: images of several sizes as squares of one."""
    return training_run.squared(settings, training_run.load_split(settings, split))


@functools.lru_cache(maxsize=4)
def _read(folder: str, data_dir: str | None) -> Any:
    return trained_models.load(folder, "best", data_dir=data_dir).logits_fn


def loaded(job: Job, data_dir: str | None) -> Any:
    """The network of a job, at the step of best validation accuracy."""
    return _read(str(jobs.model_folder(job)), data_dir)
