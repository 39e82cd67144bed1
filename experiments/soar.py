"""Second-order adversarial regularisation: SOAR and FOAR, and how to tell masked gradients.

  python -m experiments.soar                        digits, 3 minutes on two cores
  python -m experiments.soar --study=methods

methods   a standard network, PGD-10 training, FOAR and SOAR at three evaluation points, each
          fine-tuned from the standard network: accuracies as they are, under FGSM, PGD-20, the
          margin-based PGD-20 and PGD-20 on another network, confidence, non-zero input gradients
          (Tables 3.1, 3.2, 3.3, 3.7, 3.8, section 3.F)
samples   the penalty of the trained network over the number of vectors z (Table 3.6)

At this size SOAR is not expected to beat PGD-10 training; that its evaluation point matters, and
that zero and random points leave gradients masked, is.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", chapter 3.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments import command_line, noisy_digits, side_by_side
from experiments.claims import Claim, check_claims, print_claims
from experiments.command_line import setting
from robustjax import attacks, checks, data, losses, metrics, models, norms, objectives, training
from robustjax.benchmark.environment import environment
from robustjax.metrics.alignment import input_gradient
from robustjax.threat import ThreatModel
from robustjax.training import report

STUDIES = ("methods", "samples")
MODEL = models.from_linen(models.MLP((128, 128), num_classes=10))
# Name to penalty and evaluation point; what has none of them is named by its objective.
METHODS: Mapping[str, tuple[str, str]] = {
    "standard": ("standard", ""),
    "PGD-10": ("madry", ""),
    "FOAR, zero": ("foar", "zero"),
    "FOAR, PGD-1": ("foar", "pgd1"),
    "SOAR, zero": ("soar", "zero"),
    "SOAR, random": ("soar", "random"),
    "SOAR, PGD-1": ("soar", "pgd1"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set."""

    # fmt: off
    study: tuple[str, ...] = setting(STUDIES, "what is run, by commas", "run", choices=STUDIES)
    seeds: int = setting(4, "networks of each kind", "run")
    epochs: int = setting(60, "epochs of standard training, and of what follows", "run",
                          unit="epochs")
    eps: float = setting(0.15, "radius of the threat model, l_inf", "run", unit="input units")
    train_size: int = setting(1297, "digits to train on", "run", unit="examples")
    test_size: int = setting(500, "digits to test on", "run", unit="examples")
    workdir: str = setting("runs/soar/small", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on in workdir", "run")
    dry_run: bool = setting(False, "say what would be run; compute nothing", "run")
    assert_claims: bool = setting(
        True, "end with an error if a claim that should hold does not", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "epochs", "train_size", "test_size"):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.number("eps", self.eps, above=0)


PRESETS = {"small": Settings()}


class Recipe(NamedTuple):
    """What is the same in all runs of one program."""

    method: str
    epochs: int
    batch_size: int = 64


class Knobs(NamedTuple):
    """What may differ from run to run: numbers or arrays ``(runs,)``."""

    seed: Any
    eps: Any


class Runs(NamedTuple):
    """What became of each run, ``(runs,)``; accuracies are shares of the test set.

    Attributes:
      clean, fgsm, pgd, margin, transfer: accuracy as it is; under FGSM; under PGD-20 with steps of
        eps / 4 on the cross-entropy and on the margin; under that on another standard network.
      confidence, noise_confidence, pgd_confidence: mean largest probability, as it is, under
        uniform noise, under PGD-1.
      nonzero: entries of the input gradient above 1e-6, mean, of 64.
      loss: penalised loss on the test set with 1, 10 and 100 vectors z, ``(runs, 3)``.
    """

    clean: np.ndarray
    fgsm: np.ndarray
    pgd: np.ndarray
    margin: np.ndarray
    transfer: np.ndarray
    confidence: np.ndarray
    noise_confidence: np.ndarray
    pgd_confidence: np.ndarray
    nonzero: np.ndarray
    loss: np.ndarray


def _objective(method: str, threat: ThreatModel) -> objectives.Objective:
    kind, start = METHODS[method]
    if kind == "standard":
        return objectives.standard()
    if kind == "madry":
        return objectives.madry(attacks.pgd(threat, steps=10, step_size=threat.eps / 4))
    attack, radius = objectives.evaluation_point(threat, start)
    penalty = {"foar": objectives.first_order, "soar": objectives.soar}[kind](radius)
    return objectives.penalized(objectives.madry(attack), penalty, at="adversarial")


@functools.lru_cache
def train(settings: Settings, method: str) -> Runs:
    """Runs of one method over all seeds, made once."""
    task = noisy_digits.load_task(
        noise=0.0, train_size=settings.train_size, test_size=settings.test_size
    )
    knobs = Knobs(np.arange(settings.seeds, dtype=np.int32), np.float32(settings.eps))
    return Runs(*side_by_side.run(_run, Recipe(method, settings.epochs), knobs, task))


def _run(recipe: Recipe, knobs: Knobs, task: noisy_digits.Task) -> tuple[Array, ...]:
    train_set, test_set = task
    threat = ThreatModel(norms.LInf(), knobs.eps)
    key, other, test_key = jax.random.split(jax.random.key(knobs.seed), 3)
    n = train_set["label"].shape[0]
    steps = recipe.epochs * data.steps_per_epoch(n, recipe.batch_size)

    def trained(key, objective, rate, params=None):
        """Trains from ``params``, or from the start; half-way the learning rate falls by 10."""
        init_key, run_key, order_key = jax.random.split(key, 3)
        schedule = optax.piecewise_constant_schedule(rate, {steps // 2: 0.1})
        optimizer = optax.chain(
            optax.clip_by_global_norm(10.0),
            optax.add_decayed_weights(2e-4),
            optax.sgd(schedule, momentum=0.9),
        )
        if params is None:
            params, _ = MODEL.init(init_key, train_set["image"][:1])
        step = training.train_step(MODEL.apply, objective, optimizer)
        state = training.create_state(params, {}, optimizer, run_key)

        def one_epoch(state, epoch):
            order = data.epoch_batches(order_key, epoch, n, recipe.batch_size)
            return training.several_resident_steps(step, side_by_side.take)(
                state, train_set, order
            )[0], None

        return jax.lax.scan(one_epoch, state, jnp.arange(recipe.epochs))[0].params

    standard = objectives.standard()
    source = trained(other, standard, 0.05)
    params = trained(key, standard, 0.05)
    if recipe.method != "standard":
        tune_key = jax.random.fold_in(key, 1)
        params = trained(tune_key, _objective(recipe.method, threat), 0.004, params)
    return _evaluate(recipe, threat, params, source, test_key, test_set)


def _evaluate(recipe, threat, params, source, key, test_set) -> tuple[Array, ...]:
    x, y = test_set["image"], test_set["label"]
    logits_fn, source_fn = (models.eval_logits(MODEL.apply, p, {}) for p in (params, source))
    options = {"steps": 20, "step_size": threat.eps / 4}
    pgd = attacks.pgd(threat, **options)
    margin = attacks.pgd(threat, loss=losses.margin, **options)

    def accuracy(x):
        return metrics.correct(logits_fn(x), y).mean()

    def confidence(x):
        return jax.nn.softmax(logits_fn(x)).max(axis=1).mean()

    found = pgd(logits_fn, key, x, y)
    noise = attacks.pgd(threat, steps=0)(logits_fn, key, x, y)
    single = attacks.pgd(threat, steps=1, step_size=threat.eps)(logits_fn, key, x, y)
    gradient = input_gradient(logits_fn, x, y)
    name = recipe.method if METHODS[recipe.method][0] == "soar" else "SOAR, PGD-1"
    attack, radius = objectives.evaluation_point(threat, METHODS[name][1])
    at = attack(logits_fn, key, x, y)
    values = [
        (losses.cross_entropy(logits_fn(at), y)
         + objectives.soar(radius, samples=samples)(logits_fn, key, at, y)).mean()
        for samples in (1, 10, 100)
    ]  # fmt: skip
    return (
        accuracy(x),
        accuracy(attacks.fgsm(threat)(logits_fn, key, x, y)),
        accuracy(found),
        accuracy(margin(logits_fn, key, x, y)),
        accuracy(pgd(source_fn, key, x, y)),
        confidence(x),
        confidence(noise),
        confidence(single),
        (jnp.abs(gradient) > 1e-6).reshape(len(y), -1).sum(axis=1).mean(),
        jnp.stack(values),
    )


def main(settings: Settings) -> None:
    """Runs the studies of these settings."""
    if settings.dry_run:
        report.print_lines(
            f"Dry run: {', '.join(settings.study)}: {len(METHODS)} methods, {settings.seeds} "
            f"seeds, {2 * settings.epochs} epochs of a perceptron 64-128-128-10"
        )
        return
    config = dataclasses.asdict(settings)
    for name in ("workdir", "resume", "dry_run", "study", "assert_claims"):
        del config[name]
    workdir = report.open_workdir(settings.workdir, config, resume=settings.resume)
    began = time.monotonic()
    found = {method: train(settings, method) for method in METHODS}
    mean = {m: {name: float(v.mean()) for name, v in r._asdict().items()}
            for m, r in found.items()}  # fmt: skip
    claims: list[Claim] = []
    if "methods" in settings.study:
        shares = ("clean", "fgsm", "pgd", "margin", "transfer", "confidence", "noise_confidence",
                  "pgd_confidence")  # fmt: skip
        rows = [
            [m, *(f"{100 * mean[m][name]:.1f}" for name in shares), f"{mean[m]['nonzero']:.1f}"]
            for m in METHODS
        ]
        report.print_table(
            f"SOAR on digits, eps = {settings.eps:g}, {settings.seeds} seeds, in per cent",
            ["method", "clean", "FGSM", "PGD-20", "margin PGD-20", "transfer", "confidence",
             "on noise", "on PGD-1", "non-zero of 64"],
            rows,
        )  # fmt: skip
        claims = _claims(mean)
        print_claims("What the thesis finds, and what holds at this size", claims)
    if "samples" in settings.study:
        rows = [[m, *(f"{v:.3f}" for v in found[m].loss.mean(axis=0))]
                for m in METHODS if METHODS[m][0] in ("standard", "soar")]  # fmt: skip
        title = "SOAR's loss over the number of vectors z"
        report.print_table(title, ["network", "1", "10", "100"], rows)  # fmt: skip
    if report.is_writer():
        report.write_json(workdir / "results.json", {
            "methods": {m: r._asdict() for m, r in found.items()},
            "claims": [claim._asdict() for claim in claims],
            "seconds": round(time.monotonic() - began, 1),
            "environment": environment(),
        })  # fmt: skip
    report.print_lines(f"results: {workdir}")
    if settings.assert_claims:
        check_claims(claims)


def _claims(mean: Mapping[str, Mapping[str, float]]) -> list[Claim]:
    pgd = {m: 100 * values["pgd"] for m, values in mean.items()}
    nonzero = {m: mean[m]["nonzero"] for m in mean if m.startswith("SOAR")}
    confidence = {m: 100 * mean[m]["confidence"] for m in mean if m.startswith("SOAR")}
    at_pgd1 = pgd["SOAR, PGD-1"]
    others = max(pgd["SOAR, zero"], pgd["SOAR, random"])

    def listed(values):
        return ", ".join(f"{v:.1f}" for v in values.values())

    return [
        Claim("SOAR with PGD-1 points over the standard network, PGD-20",
              f">= {pgd['standard']:.1f} + 25 %", f"{at_pgd1:.1f} %",
              at_pgd1 >= pgd["standard"] + 25),
        Claim("SOAR with PGD-1 points over zero and random ones, PGD-20", f"> {others:.1f} %",
              f"{at_pgd1:.1f} %", at_pgd1 > others),
        Claim("zero points leave the fewest non-zero input gradients", "SOAR, zero",
              listed(nonzero), min(nonzero, key=nonzero.__getitem__) == "SOAR, zero"),
        Claim("zero points give the highest confidence", "SOAR, zero", listed(confidence),
              max(confidence, key=confidence.__getitem__) == "SOAR, zero"),
        Claim("PGD-1 points give the lowest confidence", "SOAR, PGD-1", listed(confidence),
              min(confidence, key=confidence.__getitem__) == "SOAR, PGD-1"),
        Claim("FOAR with PGD-1 points over zero ones, PGD-20", f"> {pgd['FOAR, zero']:.1f} %",
              f"{pgd['FOAR, PGD-1']:.1f} %", pgd["FOAR, PGD-1"] > pgd["FOAR, zero"]),
        Claim("SOAR with PGD-1 points over PGD-10 training, PGD-20", f"> {pgd['PGD-10']:.1f} %",
              f"{at_pgd1:.1f} %", None),
    ]  # fmt: skip


if __name__ == "__main__":
    # Two networks side by side are faster than one on two cores.
    jax.config.update("jax_num_cpu_devices", max(1, min(4, len(os.sched_getaffinity(0)))))
    command_line.run(main, Settings, PRESETS, __doc__)
