"""Spectra and pictures of the published data sets and networks.

Noise in bands of frequencies (Observation II), what attacks look like, what images are made of and
what filters leave of them. Source: Ma (2025), "Understanding adversarial robustness in deep
learning", sections 4.2 and 4.3 and appendix 4.E.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import batch_sizes, jobs, optimizer_figures, optimizer_pictures
from experiments.claims import Claim
from experiments.optimizer_evaluation import (
    asked,
    attacked,
    base_of,
    batch_size_of,
    loaded,
    networks_of,
    split_of,
)
from experiments.optimizer_jobs import TASKS
from experiments.optimizer_published import OPTIMIZERS, SEVERITIES
from experiments.studies import Study, interval
from robustjax import data, dct, keys, metrics
from robustjax.benchmark.batches import BatchedFunction

# Of the noise in a band, as in the public code for CIFAR-100; those of the figures are not printed.
VARIANCE, BANDS = 0.01, 10
SHOWN, ENERGY_BATCH, PANEL_IMAGES = 8, 500, 200


def bands(settings: Any, study: str, workdir: Path) -> Study:
    """Accuracy lost to noise in one of ten bands of frequencies, the same for all inputs."""
    found: dict[str, dict[str, Any]] = {}
    rows, drawn = [], {}
    for name in asked(settings, study):
        found[name] = {optimizer: {"drop": []} for optimizer in OPTIMIZERS}
        for job in networks_of(settings, study, name, workdir):
            jobs.trained(job, study)
            x, y = _first(job, settings, "test", settings.examples)
            if name not in drawn:
                drawn[name] = _noise(x.shape[1:], settings.draws)
            measure = _drop(batch_sizes.for_evaluation(batch_size_of(settings, job)))
            fixed = measure.place((loaded(job, settings.data_dir), drawn[name][1]))
            lost = measure(fixed, (), (x, y)).mean(axis=0)
            found[name][job.labels[1]]["drop"].append(100 * lost)
        for runs in found[name].values():
            runs["drop"] = np.stack(runs["drop"])
        images, _ = _first(job, settings, "train", settings.examples)
        idle = np.asarray(dct.irrelevant_bases(jnp.asarray(images)))
        found[name]["irrelevant"] = np.array([idle[mask].mean() for mask in drawn[name][0]])
        rows += [
            [name, optimizer, *(interval(v) for v in found[name][optimizer]["drop"].T)]
            for optimizer in OPTIMIZERS
        ]

    def figure(path: Path) -> None:
        for name, (masks, noise) in drawn.items():
            optimizer_figures.bands(
                optimizer_figures.of_name(path, name), found=found[name], optimizers=OPTIMIZERS,
                masks=masks, noises=np.asarray(noise[:, 0]),
            )  # fmt: skip

    return Study(
        f"Points of accuracy lost to noise of variance {VARIANCE:g} in a band, first "
        f"{settings.examples} test images, {settings.draws} noise images",
        ["data set", "optimizer", *(f"band {i}" for i in range(BANDS))],
        rows,
        found,
        [claim for name in found for claim in _band_claims(name, found[name])],
        figure,
    )


def _noise(shape: tuple[int, ...], draws: int) -> tuple[np.ndarray, jax.Array]:
    """Masks of the bands, and images of noise in each, ``(bands, draws, h, w, c)``."""
    masks = dct.dct_bands(*shape[:2], BANDS)
    key = jax.random.key(0)
    return masks, optimizer_pictures.band_noises(
        key, masks, draws, channels=shape[2], std=VARIANCE**0.5
    )


@functools.lru_cache
def _drop(batch_size: int) -> BatchedFunction:
    def measure(fixed, numbers, rows):
        del numbers
        (logits_fn, noise), (x, y) = fixed, rows
        return metrics.accuracy_drop(logits_fn, x, y, noise)

    return BatchedFunction(measure, batch_size=batch_size)


def _band_claims(name: str, found: Mapping[str, Any]) -> list[Claim]:
    """A figure alone is published, and its bands differ from data set to data set."""

    def shown(first, last):
        return ", ".join(f"{optimizer} {found[optimizer]['drop'][:, first:last].mean():.1f}"
                         for optimizer in OPTIMIZERS)  # fmt: skip

    return [
        Claim(f"{name}: points lost in band 0", "alike", shown(0, 1), None),
        Claim(f"{name}: points lost in bands 2 to 9, mean", "SGD least", shown(2, BANDS), None),
    ]


def _first(job: Any, settings: Any, split: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    own = dataclasses.replace(job.settings, data_dir=settings.data_dir)
    found = split_of(own, split)
    part = found.subset(np.arange(min(examples, len(found))))
    part = part if isinstance(part, data.Dataset) else data.materialise(part)
    return data.as_float(part.image), part.label


def perturbed(settings: Any, study: str, workdir: Path) -> Study:
    """Images under the strongest noise and attacks of the tables, for a network of each kind."""
    rows, results, pictures = [], {}, {}
    for name in asked(settings, study):
        severities = SEVERITIES[name]
        names = [severities.columns[i] for i in (3, 6, 9)]
        std = np.sqrt(severities.gaussian[-1])
        pictures[name] = {"names": names, "of": {}}
        one = dataclasses.replace(settings, seeds=1)
        for job in networks_of(one, study, name, workdir):
            jobs.trained(job, study)
            logits_fn = loaded(job, settings.data_dir)
            x, y = _first(job, settings, "test", settings.examples)
            noise = _gaussian(np.arange(SHOWN, dtype=np.int32), x.shape[1:])
            found = [np.clip(x[:SHOWN] + std * np.asarray(noise), 0, 1)]
            shares = []
            for column in names[1:]:
                saved = attacked(settings, job, severities.radii[column], len(x))
                delta = jnp.asarray(saved["x_adv"][: 10 * SHOWN] - x[: 10 * SHOWN])
                low = dct.energy_share(delta, dct.dct_bands(*x.shape[1:3], BANDS)[0])
                shares.append(100 * float(low))
                found.append(saved["x_adv"][:SHOWN])
            seen = [np.asarray(logits_fn(jnp.asarray(images)).argmax(axis=1)) for images in found]
            optimizer = job.labels[1]
            pictures[name]["of"][optimizer] = (np.stack(found), np.stack(seen))
            pictures[name] |= {"clean": x[:SHOWN], "labels": y[:SHOWN]}
            results[f"{name}, {optimizer}"] = {"energy in the lowest tenth": shares}
            rows.append([name, optimizer, *(f"{v:.1f}" for v in shares)])

    def figure(path: Path) -> None:
        for name, shown in pictures.items():
            optimizer_figures.perturbed(
                optimizer_figures.of_name(path, name), pictures=shown["of"], names=shown["names"],
                clean=shown["clean"], labels=shown["labels"],
            )  # fmt: skip

    return Study(
        "Share (%) of the energy of the strongest attacks' perturbations in the lowest tenth of "
        "frequencies, first seed",
        ["data set", "optimizer", "l_2", "l_inf"],
        rows,
        results,
        figure=figure,
    )


@functools.partial(jax.jit, static_argnums=1)
def _gaussian(index: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    draws = jax.vmap(lambda key: jax.random.normal(key, shape))
    return draws(keys.per_example(jax.random.key(0), index))


def energy(settings: Any, study: str, workdir: Path) -> Study:
    """The mean magnitude of each frequency over all training images."""
    del workdir
    maps, results = {}, {}
    for name in asked(settings, study):
        maps[name], results[name] = optimizer_pictures.spectrum(_training_images(settings, name))
    claims = [
        Claim(f"{name}: energy in the lowest tenth of frequencies", "> 90 %",
              f"{100 * found['lowest tenth']:.1f} %", None)
        for name, found in results.items()
    ]  # fmt: skip
    return optimizer_pictures.energy_study(maps, results, claims)


def _training_images(settings: Any, name: str) -> Iterator[jax.Array]:
    """All of them in batches, none held out; images of several sizes as their middle squares."""
    own = dataclasses.replace(base_of(settings), **TASKS[name].changes)
    if own.validation_size is not None:
        own = dataclasses.replace(own, validation_size=0)
    source = split_of(own, "train")
    for batch in data.eval_batches(source, ENERGY_BATCH):
        yield jnp.asarray(batch["image"][batch["mask"]])


def panels(settings: Any, study: str, workdir: Path) -> Study:
    """Images after both filters, what they remove, and their masks."""
    del workdir
    sets = {}
    for name in asked(settings, study):
        base = base_of(settings)
        own = dataclasses.replace(base, **TASKS[name].changes)
        source = split_of(own, "test")
        chosen = range(min(PANEL_IMAGES, len(source)))
        sets[name] = jnp.asarray(data.as_float(np.stack([source[i]["image"] for i in chosen])))
    return optimizer_pictures.panel_study(sets, apart=True)
