"""Tables of SGD against Adam and RMSProp at small size: perceptrons on digits, within minutes.

Every study takes ``Small`` and returns a ``Study``. At the same accuracy the networks of SGD
withstand attacks better, and most of all where data leave frequencies unused: SGD never learns
weights there, and Adam and RMSProp do.

Source: Ma, Pan and Farahmand (2023), "Understanding the robustness difference between stochastic
gradient descent and adaptive gradient methods"; Ma (2025), "Understanding adversarial robustness in
deep learning", chapter 4, whose numbers of tables and figures these are.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments import (
    optimizer_figures,
    optimizer_pictures,
    optimizer_theory,
    optimizer_variants,
)
from experiments.claims import Claim
from experiments.optimizer_networks import (
    OPTIMIZERS,
    TASKS,
    Small,
    evaluate,
    initial,
    load_task,
    logits_fn,
    train,
    train_on,
)
from experiments.studies import Study
from robustjax import attacks, dct, metrics, models
from robustjax.lipschitz import lipschitz_bound
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel

__all__ = ["DEFAULT", "STUDIES", "Small"]

# Standard deviations of the noise, and radii for 8x8 pixels: l_2 ones grow with the height.
NOISE, RADII_L2, RADII_LINF = (0.2, 0.4), (0.4, 0.8), (0.05, 0.1)
COLUMNS = ("clean", *(f"Gaussian {s:g}" for s in NOISE), *(f"l_2 {e:g}" for e in RADII_L2),
           *(f"l_inf {e:g}" for e in RADII_LINF))  # fmt: skip
# One severity of each kind, whose mean is the average robust accuracy.
SEVERITIES = (f"Gaussian {NOISE[1]:g}", f"l_2 {RADII_L2[0]:g}", f"l_inf {RADII_LINF[0]:g}")


def _measure(logits_fn: models.LogitsFn, key: Key[Array, ""], arrays: tuple) -> tuple[Array, ...]:
    """The columns; neither noise nor attacks are clipped to a box."""
    (test_set,) = arrays
    x, y = test_set["image"], test_set["label"]
    noise_key, attack_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x.shape)

    def accuracy(at):
        return metrics.correct(logits_fn(at), y).mean()

    def under_attack(norm, radii):
        def one(eps):
            attack = attacks.pgd(ThreatModel(norm, eps, -jnp.inf, jnp.inf), steps=40)
            return accuracy(attack(logits_fn, attack_key, x, y))

        return jax.lax.map(one, jnp.asarray(radii, x.dtype))

    scale = x.shape[1] / 8
    return (
        accuracy(x),
        *(accuracy(x + std * noise) for std in NOISE),
        *under_attack(L2(), [scale * eps for eps in RADII_L2]),
        *under_attack(LInf(), RADII_LINF),
    )


@functools.lru_cache
def measured(small: Small, task: str, optimizer: str) -> dict[str, np.ndarray]:
    """Percentages by ``COLUMNS``, their average, and the logarithm of the Lipschitz bound."""
    params = train(small, task, optimizer)
    found = evaluate(small, task, _measure, params)
    runs = {name: 100 * np.asarray(v) for name, v in zip(COLUMNS, found, strict=True)}
    runs["average"] = np.mean([runs[name] for name in SEVERITIES], axis=0)
    runs["log Lipschitz"] = np.asarray(_log_lipschitz(TASKS[task], params))
    return runs


@functools.partial(jax.jit, static_argnums=0)
def _log_lipschitz(height: int, params: Any) -> Array:
    like = jax.ShapeDtypeStruct((1, height, height, 1), jnp.float32)
    return jax.lax.map(lambda one: lipschitz_bound(logits_fn(one), like).log_value, params)


def _row(name: str, runs: Mapping[str, np.ndarray]) -> list[str]:
    bound = np.exp(runs["log Lipschitz"]).mean()
    return [name, *(f"{runs[c].mean():.1f}" for c in (*COLUMNS, "average")), f"{bound:.1f}"]


HEADER = (*COLUMNS, "average", "Lipschitz bound")
# Where adaptive methods are not held to small steps.
LARGE_RATE = 3e-3


def robustness(small: Small) -> Study:
    """Accuracy under noise and attacks, and the Lipschitz bound (tables 4.1, 4.3, figure 4.1)."""
    found = {
        task: {optimizer: measured(small, task, optimizer) for optimizer in OPTIMIZERS}
        for task in TASKS
    }
    large = {task: _large_rates(small, task) for task in TASKS}
    rows, claims = [], []
    for task, of_task in found.items():
        rows += [_row(f"{task}: {optimizer}", runs) for optimizer, runs in of_task.items()]
        rows += [[f"{task}: {name}", *[""] * (len(HEADER) - 1), f"{np.exp(log).mean():.1f}"]
                 for name, log in large[task].items()]  # fmt: skip
        claims += _claims(task, of_task)
        bounds = [np.exp(v).mean() for v in (of_task["SGD"]["log Lipschitz"],
                                             *large[task].values())]  # fmt: skip
        claims.append(
            Claim(
                f"{task}: nor do Adam, RMSProp with rates of {LARGE_RATE:g} have a smaller one",
                "the first is least",
                ", ".join(f"{v:.1f}" for v in bounds),
                min(bounds) == bounds[0],
            )
        )
    results = {task: {**of_task, **{name: {"log Lipschitz": log}
                                    for name, log in large[task].items()}}
               for task, of_task in found.items()}  # fmt: skip
    return Study(
        f"Accuracy (%), {small.seeds} seeds; l_2 radii for band-limited digits are twice these",
        ["data: optimizer", *HEADER],
        rows,
        results,
        claims,
        functools.partial(optimizer_figures.robustness, found=found, severities=SEVERITIES),
    )


@functools.lru_cache
def _large_rates(small: Small, task: str) -> dict[str, np.ndarray]:
    """Logarithms of the Lipschitz bounds of Adam and RMSProp with a larger learning rate."""
    return {
        f"{optimizer}, rate {LARGE_RATE:g}": np.asarray(
            _log_lipschitz(TASKS[task], train(small, task, optimizer, LARGE_RATE))
        )
        for optimizer in OPTIMIZERS[1:]
    }


def _claims(task: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> list[Claim]:
    mean = {name: {column: float(v.mean()) for column, v in runs.items()}
            for name, runs in found.items()}  # fmt: skip
    clean = [mean[name]["clean"] for name in OPTIMIZERS]
    claims = [
        Claim(f"{task}: clean accuracies are alike", "within 1 point",
              ", ".join(f"{v:.1f}" for v in clean), max(clean) - min(clean) < 1)
    ]  # fmt: skip
    others = OPTIMIZERS[1:]
    for column in (f"l_2 {RADII_L2[0]:g}", *(f"l_inf {eps:g}" for eps in RADII_LINF), "average"):
        gaps = [mean["SGD"][column] - mean[name][column] for name in others]
        # l_2 radii grow with the height.
        shown = f"l_2 {RADII_L2[0] * TASKS[task] / 8:g}" if column.startswith("l_2") else column
        claims.append(
            Claim(f"{task}: SGD is more robust than Adam, RMSProp, {shown}", ">= 2 points",
                  ", ".join(f"{v:+.1f}" for v in gaps),
                  None if column == "average" else min(gaps) >= 2)
        )  # fmt: skip
    bounds = [float(np.exp(found[name]["log Lipschitz"]).mean()) for name in OPTIMIZERS]
    return [
        *claims,
        Claim(f"{task}: SGD has the smallest Lipschitz bound", "the first is least",
              ", ".join(f"{v:.1f}" for v in bounds), bounds[0] == min(bounds)),
    ]  # fmt: skip


def momentum(small: Small) -> Study:
    """SGD with momentum 0.9 and a tenth of the learning rate, beside SGD (table 4.7)."""
    found = {name: measured(small, "digits", name) for name in ("SGD", "SGD-m")}
    change = {c: float((found["SGD-m"][c] - found["SGD"][c]).mean()) for c in HEADER_NAMES}
    largest = max(change, key=lambda name: abs(change[name]))
    claims = [
        Claim("momentum changes little: clean, average robust accuracy", "< 3 points",
              f"{change['clean']:+.1f}, {change['average']:+.1f}",
              max(abs(change["clean"]), abs(change["average"])) < 3),
        Claim("the largest change of a column", "< 3 points",
              f"{largest}: {change[largest]:+.1f}", None),
    ]  # fmt: skip
    return Study(
        "SGD without and with momentum, on digits: accuracy (%)",
        ["optimizer", *HEADER],
        [_row(name, runs) for name, runs in found.items()],
        found,
        claims,
        functools.partial(optimizer_figures.momentum, found=found, columns=COLUMNS),
    )


HEADER_NAMES = (*COLUMNS, "average")
REMOVED = (10, 30, 50, 70, 90)
FILTERS: Mapping[str, Callable[[Array, float], Array]] = {
    "energy": dct.energy_filter,
    "low-pass": dct.low_pass_filter,
}


def _clean(logits_fn: models.LogitsFn, key: Key[Array, ""], arrays: tuple) -> tuple[Array]:
    (test_set,) = arrays
    return (metrics.correct(logits_fn(test_set["image"]), test_set["label"]).mean(),)


def filters(small: Small) -> Study:
    """Observation I: trained on filtered images, tested on the original ones (figure 4.3)."""
    image = load_task(small, "digits").train["image"]
    versions = [("none", 0), *((name, p) for name in FILTERS for p in REMOVED)]
    images = [image if name == "none" else FILTERS[name](image, p) for name, p in versions]
    params = train_on(small, "digits", "SGD", jnp.stack(images))
    (accuracy,) = evaluate(small, "digits", _clean, params)
    accuracy = 100 * accuracy.reshape(len(versions), small.seeds)
    found = {f"{name}, {p}": values for (name, p), values in zip(versions, accuracy, strict=True)}
    whole = found["none, 0"].mean()
    drop = {name: float(whole - values.mean()) for name, values in found.items()}
    rows = [[name, *(f"{found[f'{name}, {p}'].mean():.1f}" for p in REMOVED)] for name in FILTERS]
    claims = [
        Claim(f"half of the frequencies are of little use: {name}, 50 % removed", "drop < 3 points",
              f"{drop[f'{name}, 50']:.1f}", drop[f"{name}, 50"] < 3 if name == "energy" else None)
        for name in FILTERS
    ]  # fmt: skip
    claims += [
        Claim(f"most of them are: {name}, 70 % removed", "drop < 10 points",
              f"{drop[f'{name}, 70']:.1f}", drop[f"{name}, 70"] < 10 if name == "energy" else None)
        for name in FILTERS
    ]  # fmt: skip
    return Study(
        f"Accuracy (%) on digits, trained with SGD on filtered ones; unfiltered: {whole:.1f}",
        ["filter", *(f"{p} % removed" for p in REMOVED)],
        rows,
        found,
        claims,
        functools.partial(optimizer_figures.filters, found=found, names=tuple(FILTERS),
                          removed=REMOVED),
    )  # fmt: skip


BAND_STD, BANDS = 2.0, 10


def _band_drop(logits_fn: models.LogitsFn, key: Key[Array, ""], arrays: tuple) -> tuple[Array]:
    test_set, noise = arrays
    drop = metrics.accuracy_drop(logits_fn, test_set["image"], test_set["label"], noise)
    return (drop.mean(axis=0),)


def bands(small: Small) -> Study:
    """Observation II: noise in one of ten bands of frequencies (figures 4.5, 4.6).

    The same noise images for all inputs and networks. With it, what training does to the weights
    of the first layer at frequencies that no image uses.
    """
    task, height = "band-limited", TASKS["band-limited"]
    train_images = load_task(small, task).train["image"]
    masks = dct.dct_bands(height, height, BANDS)
    idle = np.asarray(dct.irrelevant_bases(train_images))
    share = np.array([idle[mask].mean() for mask in masks])
    noise = optimizer_pictures.band_noises(
        jax.random.key(2), masks, small.draws, channels=1, std=BAND_STD
    )
    start = _idle_weights(height, idle, initial(small, task))
    found: dict[str, Any] = {"irrelevant": share}
    for optimizer in OPTIMIZERS:
        params = train(small, task, optimizer)
        (drop,) = evaluate(small, task, _band_drop, params, noise)
        end = _idle_weights(height, idle, params)
        found[optimizer] = {
            "drop": 100 * drop,
            "moved": np.abs(end - start).max(axis=(1, 2)),
            "norm": np.linalg.norm(end, axis=(1, 2)),
        }
    rows = [
        [f"{optimizer}: drop in points", *(f"{v:.1f}" for v in found[optimizer]["drop"].mean(0))]
        for optimizer in OPTIMIZERS
    ]
    rows.append(["share of irrelevant bases", *(f"{v:.2f}" for v in share)])
    return Study(
        f"Accuracy lost to noise of standard deviation {BAND_STD:g} in a band, band-limited digits",
        ["optimizer", *(f"band {i}" for i in range(BANDS))],
        rows,
        found,
        _band_claims(found),
        functools.partial(optimizer_figures.bands, found=found, optimizers=OPTIMIZERS, masks=masks,
                          noises=np.asarray(noise[:, 0])),
    )  # fmt: skip


def _idle_weights(height: int, idle: np.ndarray, params: Any) -> np.ndarray:
    """The first layer's weights at the irrelevant frequencies, ``(networks, bases, width)``."""
    kernel = np.asarray(params["dense1"]["kernel"], np.float64)
    c = dct.dct_matrix(height)
    pixels = kernel.reshape(len(kernel), height, height, -1)
    return np.einsum("ki,nijc,lj->nklc", c, pixels, c)[:, idle]


def _band_claims(found: Mapping[str, Any]) -> list[Claim]:
    drop = {name: found[name]["drop"].mean(axis=0) for name in OPTIMIZERS}
    moved = {name: float(found[name]["moved"].max()) for name in OPTIMIZERS}
    least = {name: float(found[name]["moved"].min()) for name in OPTIMIZERS}

    def shown(band):
        return ", ".join(f"{drop[name][band]:.1f}" for name in OPTIMIZERS)

    first = [float(drop[name][0]) for name in OPTIMIZERS]
    share = found["irrelevant"]
    return [
        Claim("share of irrelevant bases in bands 0 to 4", "0, 0, 0.6, 0.92, 1",
              ", ".join(f"{v:.2f}" for v in share[:5]),
              bool(np.allclose(share, [0, 0, 0.6, 0.92, *[1] * 6], atol=0.01))),
        Claim("band 0 hurts all alike", "within 10 points", shown(0), max(first) - min(first) < 10),
        Claim("band 2 hurts Adam and RMSProp more than SGD", ">= 2 times", shown(2),
              bool(min(drop[name][2] for name in OPTIMIZERS[1:]) >= 2 * drop["SGD"][2])),
        # A few noise images and seeds leave an error of some points.
        Claim("band 9 hurts all alike", "within noise", shown(BANDS - 1), None),
        Claim("SGD leaves irrelevant weights of the first layer as they were", "<= 1e-5",
              f"{moved['SGD']:.1e}", moved["SGD"] <= 1e-5),
        Claim("Adam and RMSProp do not", ">= 0.01",
              ", ".join(f"{least[name]:.2f}" for name in OPTIMIZERS[1:]),
              min(least[name] for name in OPTIMIZERS[1:]) >= 1e-2),
    ]  # fmt: skip


STUDIES: Mapping[str, Callable[[Small], Study]] = {
    "robustness": robustness,
    "momentum": momentum,
    "filters": filters,
    "energy": optimizer_pictures.energy,
    "bands": bands,
    "dynamics": optimizer_theory.dynamics,
    "regions": optimizer_theory.regions,
    "panels": optimizer_pictures.panels,
    "perturbed": optimizer_pictures.perturbed,
    "batchnorm": optimizer_variants.batchnorm,
    "head": optimizer_variants.head,
    "audio": optimizer_variants.audio,
}
DEFAULT = tuple(STUDIES)
