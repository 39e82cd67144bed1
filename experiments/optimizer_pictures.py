"""Spectra and pictures: what images are made of, what filters leave of them, what attacks add.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", sections 4.2 and 4.3 and
the further figures of appendix 4.E.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments import optimizer_figures
from experiments.claims import Claim
from experiments.optimizer_networks import OPTIMIZERS, TASKS, Small, evaluate, load_task, train
from experiments.studies import Study
from robustjax import attacks, data, dct, models
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel

NOISE_STD, NOISE_IMAGES = 0.2, 2000


def _images(small: Small) -> dict[str, Array]:
    found = {task: load_task(small, task).train["image"] for task in TASKS}
    found["MNIST-5k"] = _mnist()
    shape = (NOISE_IMAGES, 16, 16, 1)
    found["white noise"] = NOISE_STD * jax.random.normal(jax.random.key(0), shape)
    return found


@functools.lru_cache
def _mnist() -> Array:
    return jnp.asarray(data.as_float(data.load("mnist5k", "train").image))


def energy(small: Small) -> Study:
    """The mean magnitude of each frequency, over training images (figures 4.2, 4.10)."""
    found = {name: spectrum([x]) for name, x in _images(small).items()}
    maps = {name: values for name, (values, _) in found.items()}
    results = {name: values for name, (_, values) in found.items()}
    return energy_study(maps, results, _energy_claims(maps, results))


def spectrum(batches: Iterable[Array]) -> tuple[np.ndarray, dict[str, Any]]:
    """Mean magnitudes over all images of the batches, and what the tables say of them."""
    count, total, idle, maps, low, constant = 0, 0.0, True, 0.0, 0.0, 0.0
    for x in batches:
        n, height, width, _ = x.shape
        energy = float(np.square(np.asarray(x, np.float64)).sum())
        maps = maps + n * np.asarray(dct.spectral_energy(x), np.float64)
        low += energy * float(dct.energy_share(x, dct.dct_bands(height, width)[0]))
        idle = idle & np.asarray(dct.irrelevant_bases(x))
        constant += float(np.abs(np.mean(x, axis=(1, 2, 3))).sum()) * math.sqrt(height * width)
        count, total = count + n, total + energy
    maps = maps / count
    diagonal = np.diag(maps)
    # Whether each entry is below the one before, as far as there is any energy.
    falls = np.diff(diagonal[: np.count_nonzero(~np.diag(idle))]) < 0
    return maps, {
        "images": count,
        "lowest tenth": low / max(total, 1e-30),
        "irrelevant": int(idle.sum()),
        "diagonal": diagonal,
        "falling": float(falls.mean()),
        "constant": constant / count,
    }


def energy_study(
    maps: Mapping[str, np.ndarray], results: Mapping[str, Any], claims: Sequence[Claim]
) -> Study:
    """The table and the figure of several sets of images."""
    rows = []
    for name, found in results.items():
        height, width = maps[name].shape
        rows.append([name, f"{height}x{width}", f"{100 * found['lowest tenth']:.1f}",
                     f"{found['irrelevant']}", f"{found['diagonal'][0]:.3g}",
                     f"{found['diagonal'][-1]:.2g}", f"{100 * found['falling']:.0f}"])  # fmt: skip
    return Study(
        "Energy in the cosine frequencies of images",
        ["images", "size", "energy in the lowest tenth %", "irrelevant bases", "first magnitude",
         "last of the diagonal",
         "steps of the diagonal that fall %"],
        rows,
        results,
        claims,
        functools.partial(optimizer_figures.energy, maps=maps),
    )  # fmt: skip


def _energy_claims(maps: Mapping[str, np.ndarray], results: Mapping) -> list[Claim]:
    level = math.sqrt(2 / math.pi) * NOISE_STD
    error = NOISE_STD * math.sqrt((1 - 2 / math.pi) / NOISE_IMAGES)
    apart = float(np.abs(maps["white noise"] - level).max() / error)
    share = results["white noise"]["lowest tenth"]
    bases = float(dct.dct_bands(16, 16)[0].mean())
    constant = max(abs(maps[name][0, 0] / found["constant"] - 1)
                   for name, found in results.items() if name != "white noise")  # fmt: skip
    idle = results["band-limited"]["irrelevant"]
    return [
        Claim("white noise is flat, sqrt(2 / pi) of its deviation", "within 5 standard errors",
              f"{apart:.1f}", apart < 5),
        Claim("share of its energy in the lowest tenth of bases", f"{bases:.3f} +- 0.005",
              f"{share:.4f}", abs(share - bases) < 0.005),
        Claim("the constant basis has the mean of the image", "within 1e-5", f"{constant:.1e}",
              bool(constant < 1e-5)),
        Claim("band-limited digits do not use three quarters of the bases", "192", f"{idle}",
              idle == 192),
        Claim("energy in the lowest tenth: digits, MNIST (natural images: > 90 %)", "> 90 %",
              ", ".join(f"{100 * results[name]['lowest tenth']:.1f} %"
                        for name in ("digits", "MNIST-5k")), None),
        Claim("the diagonal falls at every step: digits, MNIST", "100 %",
              ", ".join(f"{100 * results[name]['falling']:.0f} %"
                        for name in ("digits", "MNIST-5k")), None),
    ]  # fmt: skip


REMOVED = (10, 30, 50, 70, 90)


def panels(small: Small) -> Study:
    """Images after both filters, what they remove, and their masks (figures 4.4, 4.11 to 4.16)."""
    sets = _images(small)
    return panel_study({name: sets[name][:200] for name in ("MNIST-5k", "digits")})


def panel_study(sets: Mapping[str, Array], *, apart: bool = False) -> Study:
    """What the filters leave of sets of images; one figure, or one for each ``apart``."""
    rows, results, pictures, better = [], {}, {}, []
    for name, x in sets.items():
        height, width = x.shape[1:3]
        total = jnp.sum(x**2)
        pictures[name] = {}
        for p in REMOVED:
            found = {"energy": dct.energy_filter(x, p), "low-pass": dct.low_pass_filter(x, p)}
            spectra = {kind: np.abs(dct.dct(out, batch_ndim=1)) for kind, out in found.items()}
            # Bases that are left, beyond rounding; the channels share them.
            left = spectra["energy"].max(axis=3) > 1e-6 * math.sqrt(height * width)
            masks = {"energy": left[0], "low-pass": dct.low_pass_mask(height, width, p)}
            kept = {kind: float(jnp.sum(out**2) / total) for kind, out in found.items()}
            bases = {"energy": float(left.mean()),
                     "low-pass": float(masks["low-pass"].mean())}  # fmt: skip
            results[f"{name}, {p}"] = {"energy kept": kept, "bases kept": bases}
            better.append(kept["energy"] - kept["low-pass"])
            rows.append([name, f"{p}", *(f"{100 * bases[kind]:.1f}" for kind in found),
                         *(f"{100 * kept[kind]:.2f}" for kind in found)])  # fmt: skip
            pictures[name][p] = {
                kind: (np.asarray(out[0]), np.asarray(out[0] - x[0]), masks[kind])
                for kind, out in found.items()
            }
    half = [results[f"{name}, 50"]["energy kept"]["energy"] for name in pictures]
    claims = [
        Claim("the energy filter keeps at least the energy that the low-pass filter keeps",
              ">= 0 points", f"{100 * min(better):+.2f}",
              # Channels share masks, by their mean magnitude: not the largest energy of colours.
              None if any(x.shape[3] > 1 for x in sets.values()) else min(better) >= 0),
        Claim(f"energy left when half of the bases go by energy: {', '.join(pictures)}",
              "nearly all",
              ", ".join(f"{100 * v:.2f} %" for v in half), None),
    ]  # fmt: skip

    def figure(path: Path) -> None:
        if not apart:
            optimizer_figures.panels(path, pictures=pictures)
            return
        for name, of_set in pictures.items():
            optimizer_figures.panels(optimizer_figures.of_name(path, name), pictures={name: of_set})

    return Study(
        f"What the filters leave of {min(map(len, sets.values()))} images",
        ["images", "removed %", "bases kept %, energy", "bases kept %, low-pass",
         "energy kept %, energy", "energy kept %, low-pass"],
        rows,
        results,
        claims,
        figure,
    )  # fmt: skip


def band_noises(
    key: Key[Array, ""], masks: np.ndarray, draws: int, *, channels: int, std: float
) -> Array:
    """Noise in each band, ``(bands, draws, h, w, c)``; the bands share their coefficients."""
    keys = jax.random.split(key, draws)
    return _band_noises(keys, jnp.asarray(masks), channels, std)


@functools.partial(jax.jit, static_argnums=2)
def _band_noises(keys: Array, masks: Array, channels: int, std: Any) -> Array:
    def of_band(mask):
        return jax.vmap(lambda key: dct.band_noise(key, mask, channels, std=std))(keys)

    return jax.lax.map(of_band, masks)


SHOWN = 8
STD, RADIUS_L2, RADIUS_LINF = 0.4, 1.6, 0.1
PERTURBATIONS = (f"Gaussian {STD:g}", f"l_2 {RADIUS_L2:g}", f"l_inf {RADIUS_LINF:g}")


def _perturb(logits_fn: models.LogitsFn, key: Key[Array, ""], arrays: tuple) -> tuple[Array, ...]:
    """Images ``(4, n, 16, 16, 1)``, the first as they are, and what the network takes them for."""
    (test_set,) = arrays
    x, y = test_set["image"], test_set["label"]
    noise_key, attack_key = jax.random.split(key)
    threats = (ThreatModel(norm, eps, -jnp.inf, jnp.inf) for norm, eps in
               ((L2(), RADIUS_L2), (LInf(), RADIUS_LINF)))  # fmt: skip
    found = [x, x + STD * jax.random.normal(noise_key, x.shape)]
    found += [attacks.pgd(threat, steps=40)(logits_fn, attack_key, x, y) for threat in threats]
    images = jnp.stack(found)
    return images, jax.lax.map(lambda at: logits_fn(at).argmax(axis=1), images)


def perturbed(small: Small) -> Study:
    """Perturbed images of the largest severity, for each optimizer (figures 4.18 to 4.20)."""
    task = "band-limited"
    test_set = load_task(small, task).test
    clean = np.asarray(test_set["image"])
    idle = np.asarray(dct.irrelevant_bases(load_task(small, task).train["image"]))
    rows, results, pictures = [], {}, {}
    for optimizer in OPTIMIZERS:
        one = jax.tree.map(lambda leaf: leaf[:1], train(small, task, optimizer))
        images, predicted = (values[0] for values in evaluate(small, task, _perturb, one))
        right = 100 * (predicted == np.asarray(test_set["label"])).mean(axis=1)
        pictures[optimizer] = (images[1:, :SHOWN], predicted[1:, :SHOWN])
        delta = jnp.asarray(images[1:] - clean)
        shares = [float(dct.energy_share(d, idle)) for d in delta]
        largest = {"l_2": float(L2().value(delta[1], batch_ndim=1).max()),
                   "l_inf": float(jnp.abs(delta[2]).max())}  # fmt: skip
        results[optimizer] = {"accuracy": right[1:], "irrelevant": shares, "largest": largest}
        rows.append([optimizer, *(f"{v:.1f}" for v in right),
                     *(f"{100 * v:.1f}" for v in shares)])  # fmt: skip
    sizes = [max(found["largest"][norm] for found in results.values()) for norm in ("l_2", "l_inf")]
    claims = [
        Claim("no perturbation is longer than its radius", f"{RADIUS_L2:g}, {RADIUS_LINF:g}",
              ", ".join(f"{v:.4f}" for v in sizes),
              sizes[0] <= RADIUS_L2 + 1e-4 and sizes[1] <= RADIUS_LINF + 1e-5),
        Claim("attacks on Adam, RMSProp use irrelevant frequencies more than on SGD, l_2",
              f"> {100 * results['SGD']['irrelevant'][1]:.1f} %",
              ", ".join(f"{100 * results[name]['irrelevant'][1]:.1f} %"
                        for name in OPTIMIZERS[1:]), None),
    ]  # fmt: skip
    return Study(
        "Band-limited digits, one network each: accuracy, energy in irrelevant frequencies",
        ["optimizer", "clean %", *(f"{name} %" for name in PERTURBATIONS),
         *(f"irrelevant energy %, {name}" for name in PERTURBATIONS)],
        rows,
        results,
        claims,
        functools.partial(optimizer_figures.perturbed, pictures=pictures, names=PERTURBATIONS,
                          clean=clean[:SHOWN], labels=np.asarray(test_set["label"])[:SHOWN]),
    )  # fmt: skip
