"""SGD against Adam and RMSProp on other networks, at small size: what the tables' variants change.

A convolutional network with and without batch normalisation, the last layer on a frozen encoder,
and waveforms. Every study takes ``Small`` and returns a ``Study``.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", tables 4.4 to 4.6.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments.claims import Claim
from experiments.optimizer_networks import OPTIMIZERS, Recipe, Small, fit, load_task, measure
from experiments.studies import Study
from robustjax import attacks, data, metrics, models
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel

# Standard deviations of noise and radii of l_2 and l_inf attacks, for each kind of data.
DIGITS = ((0.2, 0.4), (0.4, 0.8), (0.05, 0.1))
TONES = ((0.3, 0.6), (1.0, 2.0), (0.05, 0.1))
EPOCHS, ATTACK_STEPS, ATTACKED = 30, 20, 200

Sizes = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


def _columns(sizes: Sizes) -> tuple[str, ...]:
    kinds = zip(("Gaussian", "l_2", "l_inf"), sizes, strict=True)
    return ("clean", *(f"{kind} {size:g}" for kind, of_kind in kinds for size in of_kind))


@functools.cache
def _evaluation(sizes: Sizes):
    """A function for ``optimizer_networks.measure``: accuracies by columns, without a box."""

    def evaluate(logits_fn: models.LogitsFn, key: Key[Array, ""], arrays: tuple) -> tuple:
        (test_set,) = arrays
        x, y = test_set["image"], test_set["label"]
        noise_key, attack_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x.shape)
        few = slice(0, ATTACKED)

        def attacked(norm, radii):
            def one(eps):
                threat = ThreatModel(norm, eps, -jnp.inf, jnp.inf)
                attack = attacks.pgd(threat, steps=ATTACK_STEPS)
                found = attack(logits_fn, attack_key, x[few], y[few])
                return metrics.correct(logits_fn(found), y[few]).mean()

            return jax.lax.map(one, jnp.asarray(radii, x.dtype))

        return (
            metrics.correct(logits_fn(x), y).mean(),
            *(metrics.correct(logits_fn(x + std * noise), y).mean() for std in sizes[0]),
            *attacked(L2(), sizes[1]),
            *attacked(LInf(), sizes[2]),
        )

    return evaluate


def _compared(
    small: Small,
    named: Mapping[str, models.Model],
    rates: Mapping[str, float],
    train_set: Mapping[str, Array],
    test_set: Mapping[str, Array],
    sizes: Sizes,
    epochs: int = EPOCHS,
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Percentages by model, optimizer and column, ``(seeds,)`` each."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, model in named.items():
        found[name] = {}
        for optimizer in OPTIMIZERS:
            shape = train_set["image"].shape[1:]
            recipe = Recipe(optimizer, rates[optimizer], shape, min(epochs, small.epochs),
                            model=model)  # fmt: skip
            variables = fit(recipe, small.seeds, train_set["image"][None], train_set["label"])
            values = measure(model, _evaluation(sizes), variables, test_set)
            named_values = zip(_columns(sizes), values, strict=True)
            runs = {column: 100 * np.asarray(v) for column, v in named_values}
            # The mean of what is done at the first severity of each kind.
            runs["average"] = np.mean([runs[_columns(sizes)[i]] for i in (1, 3, 5)], axis=0)
            found[name][optimizer] = runs
    return found


def _study(title: str, found: Mapping[str, Mapping[str, Any]], claims: list[Claim]) -> Study:
    rows = [
        [f"{name}: {optimizer}", *(f"{v.mean():.1f}" for v in runs.values())]
        for name, of_model in found.items()
        for optimizer, runs in of_model.items()
    ]
    columns = next(iter(next(iter(found.values())).values()))
    return Study(title, ["network: optimizer", *columns], rows, found, claims)


def _gaps(found: Mapping[str, Mapping[str, np.ndarray]], column: str) -> str:
    """How far SGD is above the others, in points."""
    others = (found["SGD"][column].mean() - found[name][column].mean() for name in OPTIMIZERS[1:])
    return ", ".join(f"{v:+.1f}" for v in others)


NORMS: Mapping[str, models.Model] = {
    name: models.from_linen(models.VGG(stages=((1,), (2,)), width=16, norm=norm))
    for name, norm in (("no normalisation", "none"), ("batch normalisation", "batch"))
}
CNN_RATES = {"SGD": 0.1, "Adam": 1e-3, "RMSProp": 1e-3}


def batchnorm(small: Small) -> Study:
    """A convolutional network on digits with and without batch normalisation (table 4.4)."""
    task = load_task(small, "digits")
    found = _compared(small, NORMS, CNN_RATES, task.train, task.test, DIGITS)
    claims = [
        Claim(f"{name}: SGD is more robust than Adam, RMSProp, {column}", "more",
              _gaps(of_model, column), None)
        for name, of_model in found.items()
        for column in (f"l_inf {DIGITS[2][0]:g}", "average")
    ]  # fmt: skip
    strong = [f"l_inf {DIGITS[2][1]:g}", f"l_2 {DIGITS[1][1]:g}"]
    plain, normed = (found[name] for name in NORMS)
    claims += [
        Claim(f"batch normalisation costs robustness: SGD, Adam, RMSProp, {column}", "less with it",
              ", ".join(f"{normed[name][column].mean() - plain[name][column].mean():+.1f}"
                        for name in OPTIMIZERS), None)
        for column in strong
    ]  # fmt: skip
    return _study(
        f"Convolutional networks on digits: accuracy (%), {small.seeds} seeds, attacks on the "
        f"first {ATTACKED}",
        found,
        claims,
    )


FEATURES = 512


def _frozen_encoder(head: models.Model) -> models.Model:
    """Random features ``ReLU(V x)``, the same for all seeds, and a layer that is trained."""
    scale = np.sqrt(2 / 64)
    weights = scale * np.random.default_rng(0).standard_normal((64, FEATURES)).astype(np.float32)

    def encode(x: Array) -> Array:
        return jax.nn.relu(x.reshape(len(x), -1) @ weights.astype(x.dtype))

    def init(key: Any, x: Any) -> tuple[Any, Any]:
        return head.init(key, jnp.zeros((len(x), FEATURES)))

    def apply(params: Any, model_state: Any, x: Array, train: bool, key: Any) -> tuple[Array, Any]:
        return head.apply(params, model_state, encode(x), train, key)

    return models.Model(init, apply)


HEAD = _frozen_encoder(models.from_linen(models.Linear(num_classes=10)))


def head(small: Small) -> Study:
    """The last layer on a frozen encoder, random features of digits (table 4.5)."""
    task = load_task(small, "digits")
    rates = {"SGD": 0.1, "Adam": 1e-3, "RMSProp": 1e-3}
    found = _compared(small, {"random features": HEAD}, rates, task.train, task.test, DIGITS)
    return _study(
        f"A linear layer on {FEATURES} frozen features of digits: accuracy (%)", found, []
    )


SAMPLES, CLASSES = 128, 2


def audio(small: Small) -> Study:
    """Noisy tones, their class is the pitch, and a small network for waveforms (table 4.6)."""
    train_set, test_set = _tones(320, 0), _tones(ATTACKED, 1)
    model = models.from_linen(
        models.M5(num_classes=CLASSES, widths=(8, 16), stride=4, first_kernel=16)
    )
    rates = {"SGD": 0.03, "Adam": 1e-3, "RMSProp": 1e-3}
    found = _compared(small, {"M5, small": model}, rates, train_set, test_set, TONES)
    columns = (f"l_2 {TONES[1][0]:g}", f"l_inf {TONES[2][0]:g}", "average")
    claims = [
        Claim(f"tones: SGD is more robust than Adam, RMSProp, {column}", "more",
              _gaps(found["M5, small"], column), None)
        for column in columns
    ]  # fmt: skip
    return _study(f"Tones of {CLASSES} pitches, a small M5: accuracy (%)", found, claims)


def _tones(n: int, seed: int) -> dict[str, Array]:
    found = data.tones(jax.random.key(seed), n, SAMPLES, CLASSES)
    return {"image": jnp.asarray(found.image), "label": jnp.asarray(found.label)}
