"""Tables of SOAR and FOAR at small size: a perceptron on digits, within minutes on a laptop.

Every study takes ``Small`` and returns a ``Study``; the networks that several studies need are
trained once. At this size SOAR is not expected to beat PGD-10 training; that its evaluation point
matters is. Zero and random points do not mask gradients here as they do with CIFAR-10: they leave
fewer of them and more confidence, but PGD still finds more than transfer and search do.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", chapter 3.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import soar_diagnostics, soar_figures, soar_theory
from experiments.claims import Claim
from experiments.soar_networks import (
    METHODS,
    PERCEPTRON,
    TUNING_RATE,
    Networks,
    Place,
    Small,
    evaluate,
    load_task,
    standard,
    threat_of,
    train,
)
from experiments.studies import Study
from robustjax import attacks, losses, metrics, models, objectives
from robustjax.metrics.alignment import input_gradient

__all__ = ["DEFAULT", "METHODS", "STUDIES", "Small"]


class Runs(NamedTuple):
    """What became of each network, ``(runs,)``; accuracies are shares of the test set.

    Attributes:
      clean, fgsm: accuracy as it is, and under FGSM.
      pgd, long, restarts: under PGD with steps of eps / 4: 20, 100, and 20 from 5 starts.
      margin: under PGD-20 on the margin.
      transfer: under PGD-20 on another standard network.
      confidence, noise_confidence, pgd_confidence: mean largest probability, as it is, under
        uniform noise, under PGD-1.
      nonzero: entries of the input gradient above 1e-6, mean, of 64.
    """

    clean: np.ndarray
    fgsm: np.ndarray
    pgd: np.ndarray
    long: np.ndarray
    restarts: np.ndarray
    margin: np.ndarray
    transfer: np.ndarray
    confidence: np.ndarray
    noise_confidence: np.ndarray
    pgd_confidence: np.ndarray
    nonzero: np.ndarray


def _measure(module: nn.Module, place: Place, shared: tuple) -> tuple[Array, ...]:
    test_set, networks, sources = shared
    x, y = test_set["image"], test_set["label"]
    logits_fn = networks.logits_fn(module, place.network)
    source_fn = sources.logits_fn(PERCEPTRON, place.seed)
    threat = threat_of(place.eps)
    pgd = functools.partial(attacks.pgd, threat, step_size=threat.eps / 4)

    def accuracy(attack, attacked=logits_fn):
        return metrics.correct(logits_fn(attack(attacked, place.key, x, y)), y).mean()

    def confidence(attack):
        return jax.nn.softmax(logits_fn(attack(logits_fn, place.key, x, y))).max(axis=1).mean()

    nothing = attacks.pgd(threat, steps=0, start="zero")
    gradient = input_gradient(logits_fn, x, y)
    return (
        accuracy(nothing),
        accuracy(attacks.fgsm(threat)),
        accuracy(pgd(steps=20)),
        accuracy(pgd(steps=100)),
        accuracy(pgd(steps=20, restarts=5)),
        accuracy(pgd(steps=20, loss=losses.margin)),
        accuracy(pgd(steps=20), source_fn),
        confidence(nothing),
        confidence(attacks.pgd(threat, steps=0)),
        confidence(attacks.pgd(threat, steps=1, step_size=threat.eps)),
        (jnp.abs(gradient) > 1e-6).reshape(len(y), -1).sum(axis=1).mean(),
    )


def methods(small: Small) -> Study:
    """All methods: accuracies, confidence, non-zero input gradients (tables 3.1, 3.2, 3.7, 3.8)."""
    networks = {method: train(small, method) for method in METHODS}
    source = standard(small, source=True)
    numbers = evaluate(small, _measure, networks, small.eps, source)
    found = {method: Runs(*values) for method, values in numbers.items()}
    mean = {m: {name: float(v.mean()) for name, v in runs._asdict().items()}
            for m, runs in found.items()}  # fmt: skip
    shares = [name for name in Runs._fields if name != "nonzero"]
    rows = [
        [m, *(f"{100 * mean[m][name]:.1f}" for name in shares), f"{mean[m]['nonzero']:.1f}"]
        for m in METHODS
    ]
    return Study(
        f"SOAR on digits, eps = {small.eps:g}, {small.seeds} seeds, in per cent",
        ["method", "clean", "FGSM", "PGD-20", "PGD-100", "PGD-20-5", "margin PGD-20", "transfer",
         "confidence", "on noise", "on PGD-1", "non-zero of 64"],
        rows,
        {m: runs._asdict() for m, runs in found.items()},
        _claims(mean),
        functools.partial(soar_figures.methods, runs=found),
    )  # fmt: skip


def _claims(mean: Mapping[str, Mapping[str, float]]) -> list[Claim]:
    pgd = {m: 100 * values["pgd"] for m, values in mean.items()}
    transfer = {m: 100 * values["transfer"] for m, values in mean.items()}
    points = ("SOAR, zero", "SOAR, random", "SOAR, PGD-1")
    nonzero = {m: mean[m]["nonzero"] for m in points}
    confidence = {m: 100 * mean[m]["confidence"] for m in points}
    at_pgd1 = pgd["SOAR, PGD-1"]
    others = max(pgd["SOAR, zero"], pgd["SOAR, random"])
    elsewhere = max(transfer["SOAR, zero"], transfer["SOAR, random"])

    def listed(values):
        return ", ".join(f"{v:.1f}" for v in values.values())

    return [
        Claim("SOAR with PGD-1 points over the standard network, PGD-20",
              f">= {pgd['standard']:.1f} + 25 %", f"{at_pgd1:.1f} %",
              at_pgd1 >= pgd["standard"] + 25),
        Claim("SOAR with PGD-1 points over zero and random ones, PGD-20", f"> {others:.1f} %",
              f"{at_pgd1:.1f} %", at_pgd1 > others),
        Claim("SOAR with PGD-1 points over zero and random ones, transfer", f"> {elsewhere:.1f} %",
              f"{transfer['SOAR, PGD-1']:.1f} %", transfer["SOAR, PGD-1"] > elsewhere),
        Claim("zero points leave the fewest non-zero input gradients", "SOAR, zero",
              listed(nonzero), min(nonzero, key=nonzero.__getitem__) == "SOAR, zero"),
        Claim("zero points give the highest confidence", "SOAR, zero", listed(confidence),
              max(confidence, key=confidence.__getitem__) == "SOAR, zero"),
        Claim("PGD-1 points give the lowest confidence", "SOAR, PGD-1", listed(confidence),
              min(confidence, key=confidence.__getitem__) == "SOAR, PGD-1"),
        Claim("FOAR with PGD-1 points over zero ones, PGD-20", f"> {pgd['FOAR, zero']:.1f} %",
              f"{pgd['FOAR, PGD-1']:.1f} %", pgd["FOAR, PGD-1"] > pgd["FOAR, zero"]),
        Claim("FOAR with PGD-1 points between standard and SOAR, PGD-20",
              f"{pgd['standard']:.1f} to {at_pgd1:.1f} %", f"{pgd['FOAR, PGD-1']:.1f} %",
              pgd["standard"] < pgd["FOAR, PGD-1"] < at_pgd1),
        Claim("SOAR with PGD-1 points over PGD-10 training, PGD-20", f"> {pgd['PGD-10']:.1f} %",
              f"{at_pgd1:.1f} %", None),
    ]  # fmt: skip


# Numbers of vectors z, and how often each is drawn.
EXAMPLES, COUNTS, DRAWS = 100, (1, 10, 100), (64, 32, 8)


def samples(small: Small) -> Study:
    """The penalised loss over the number of vectors z, before and after fine-tuning."""
    shown = {"start of SOAR": "standard", "end of SOAR": "SOAR, PGD-1"}
    rows, results, claims = [], {}, []
    for name, method in shown.items():
        mean, error = _sampled_losses(small, train(small, method))
        slope = np.polyfit(np.log(COUNTS), np.log(error), 1)[0]
        for count, m, e in zip(COUNTS, mean, error, strict=True):
            rows.append([name, f"{count}", f"{m:.3f}", f"{e:.3f}"])
        results[name] = {"count": COUNTS, "mean": mean, "error": error, "slope": slope}
        # Of the mean over examples and draws, on both sides of the difference.
        noise = error / np.sqrt(EXAMPLES * np.array(DRAWS))
        apart = float(np.max(np.abs(mean - mean[-1]) / (4 * np.hypot(noise, noise[-1]) + 1e-6)))
        claims += [
            Claim(f"{name}: the mean does not depend on how many z", "within 4 standard errors",
                  ", ".join(f"{m:.3f}" for m in mean), bool(apart < 1)),
            Claim(f"{name}: the error falls as the root of their number", "slope -0.5 +- 0.1",
                  f"{slope:.3f}", bool(abs(slope + 0.5) < 0.1)),
        ]  # fmt: skip
    columns = ["network", "vectors z", "loss", "standard error of an example"]
    figure = functools.partial(soar_figures.samples, results=results)
    return Study("SOAR's loss over the number of vectors z", columns, rows, results, claims, figure)


def _sampled_losses(small: Small, networks: Networks) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss, and standard deviation over the draws of z, root mean square over examples."""
    x, y = (load_task(small).test[name][:EXAMPLES] for name in ("image", "label"))
    attack, radius = objectives.evaluation_point(threat_of(small.eps))

    @jax.jit
    def evaluate(networks):
        logits_fn = networks.logits_fn(PERCEPTRON, 0)
        at = attack(logits_fn, jax.random.key(0), x, y)
        loss = losses.cross_entropy(logits_fn(at), y)

        def drawn(count, draws):
            penalty = objectives.soar(radius, samples=count)
            keys = jax.random.split(jax.random.key(count), draws)
            return jax.lax.map(lambda key: loss + penalty(logits_fn, key, at, y), keys)

        found = [drawn(*pair) for pair in zip(COUNTS, DRAWS, strict=True)]
        spread = [jnp.sqrt(values.var(axis=0, ddof=1).mean()) for values in found]
        return jnp.stack([values.mean() for values in found]), jnp.stack(spread)

    mean, error = evaluate(networks)
    return np.asarray(mean, np.float64), np.asarray(error, np.float64)


WIDTHS = (32, 64, 128)


def capacity(small: Small) -> Study:
    """SOAR over the width of the perceptron."""
    rows, results = [], {}
    for width in WIDTHS:
        module = models.MLP((width, width), num_classes=10)
        runs = _accuracies(small, train(small, "SOAR, PGD-1", module), module)
        rows.append([f"{width}", *(f"{100 * runs[name].mean():.1f}" for name in _ACCURACIES)])
        results[f"{width}"] = runs
    pgd = [100 * results[f"{width}"]["PGD-20"].mean() for width in WIDTHS]
    # Published for CNN6, CNN8 and ResNet-10; here the differences are those between seeds.
    claims = [Claim("SOAR gains from width, PGD-20 (published: 32.8, 47.3, 56.1)", "rising",
                    ", ".join(f"{v:.1f}" for v in pgd), None)]  # fmt: skip
    title = "SOAR with PGD-1 points over the width"
    return Study(title, ["width", *(f"{name} %" for name in _ACCURACIES)], rows, results, claims)


_ACCURACIES = ("clean", "FGSM", "PGD-20", "PGD-100")


def _accuracies(small: Small, networks: Networks, module: nn.Module) -> dict[str, np.ndarray]:
    """The columns of the smaller tables; a program of its own, which compiles sooner."""
    (found,) = evaluate(small, _few, {"": networks}, small.eps, module=module).values()
    return dict(zip(_ACCURACIES, found, strict=True))


def _few(module: nn.Module, place: Place, shared: tuple) -> tuple[Array, ...]:
    test_set, networks = shared
    x, y = test_set["image"], test_set["label"]
    logits_fn = networks.logits_fn(module, place.network)
    threat = threat_of(place.eps)
    pgd = functools.partial(attacks.pgd, threat, step_size=threat.eps / 4)
    found = (attack(logits_fn, place.key, x, y)
             for attack in (attacks.fgsm(threat), pgd(steps=20), pgd(steps=100)))  # fmt: skip
    return tuple(metrics.correct(logits_fn(at), y).mean() for at in (x, *found))


# At the rate of the perceptrons SOAR ends near chance level on these, with and without BatchNorm.
CONVOLUTION_RATE = 1e-3


def limitations(small: Small) -> Study:
    """Where SOAR fails: a cold start, a large learning rate, BatchNorm; reported.

    The convolutional networks have two seeds and half the epochs.
    """
    soar = functools.partial(train, small, "SOAR, PGD-1")
    large = 5 * TUNING_RATE
    perceptrons = {
        "from the standard network": soar(),
        "from initial parameters": soar(warm=False),
        f"from initial parameters, rate {large:g}": soar(rate=large, warm=False),
        f"from the standard network, rate {large:g}": soar(rate=large),
    }
    found = {
        name: _accuracies(small, networks, PERCEPTRON) for name, networks in perceptrons.items()
    }
    few = small._replace(seeds=min(2, small.seeds), epochs=max(1, small.epochs // 2))
    for norm in ("none", "batch"):
        module = models.VGG(stages=((1,), (2,)), width=16, norm=norm)
        words = "convolutions" if norm == "none" else "convolutions, BatchNorm"
        found[f"{words}: standard"] = _accuracies(few, standard(few, module), module)
        tuned = train(few, "SOAR, PGD-1", module, rate=CONVOLUTION_RATE)
        found[f"{words}: SOAR"] = _accuracies(few, tuned, module)
    rows = [[name, *(f"{100 * runs[column].mean():.1f}" for column in _ACCURACIES)]
            for name, runs in found.items()]  # fmt: skip
    pgd = {name: 100 * runs["PGD-20"].mean() for name, runs in found.items()}
    names = list(perceptrons)

    def gain(words):
        return pgd[f"{words}: SOAR"] - pgd[f"{words}: standard"]

    claims = [
        Claim("SOAR from initial parameters is worse, PGD-20", f"< {pgd[names[0]]:.1f} %",
              ", ".join(f"{pgd[name]:.1f} %" for name in names[1:3]), None),
        Claim(f"a learning rate of {large:g} makes it collapse, clean", "10 % (chance)",
              f"{100 * found[names[3]]['clean'].mean():.1f} %", None),
        Claim("with BatchNorm SOAR gains less, PGD-20", f"< {gain('convolutions'):.1f} points",
              f"{gain('convolutions, BatchNorm'):.1f} points", None),
    ]  # fmt: skip
    return Study(
        "Limitations of SOAR with PGD-1 points",
        ["training", *(f"{name} %" for name in _ACCURACIES)],
        rows,
        found,
        claims,
    )


STUDIES: Mapping[str, Callable[[Small], Study]] = {
    "methods": methods,
    "samples": samples,
    "masking": soar_diagnostics.masking,
    "transfer": soar_diagnostics.transfer,
    "autoattack": soar_diagnostics.autoattack,
    "l2": soar_diagnostics.l2,
    "capacity": capacity,
    "interpolation": soar_diagnostics.interpolation,
    "limitations": limitations,
    "linear": soar_theory.linear,
    "passes": soar_theory.passes,
}
DEFAULT = tuple(STUDIES)
