"""Fast adversarial training: catastrophic overfitting, and what prevents it.

  python -m experiments.fast_adversarial_training                   digits, 4 minutes on two cores
  python -m experiments.fast_adversarial_training --study=weight
  python -m experiments.catalogue      the commands of the published networks

methods   FGSM, FGSM with a shorter step, with a random start, with GradAlign, PGD-2, PGD-10, PGD-10
          pushed to the corners: accuracies and gradient alignment at two radii (Tables 2.1, 2.3,
          2.4; Sec. 2.4)
curves    accuracies, alignment and filter norms over the epochs (Figs. 2.6, 2.11)
weight    the weight of GradAlign (Fig. 2.15)
penalties FGSM with gradient penalty, CURE, and GradAlign at the point of FGSM (Table 2.8, Sec. 2.5)

A convolution of four 3x3 filters and a dense layer, on 8x8 digits: FGSM training finds a network
that withstands FGSM and nothing else, gradually here, within an epoch in large networks.

Source: Andriushchenko and Flammarion (2020), "Understanding and improving fast adversarial
training"; Andriushchenko (2024), "Understanding generalization and robustness in modern deep
learning", chapter 2.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import choices, command_line, fast_figures, noisy_digits, side_by_side
from experiments.claims import Claim, check_claims, print_claims
from experiments.command_line import setting
from robustjax import attacks, checks, data, losses, metrics, models, norms, objectives, training
from robustjax.benchmark.environment import environment
from robustjax.metrics.alignment import gradient_alignment
from robustjax.threat import ThreatModel
from robustjax.training import report

STUDIES = ("methods", "curves", "weight", "penalties")
# Each with its attack in training, as a function of the threat model, and its penalty.
METHODS: Mapping[str, tuple[Callable[[ThreatModel], Any], Callable[[ThreatModel], Any] | None]] = {
    "FGSM": (attacks.fgsm, None),
    "FGSM, step 0.888 eps": (lambda t: attacks.fgsm(t, step_size=0.888 * t.eps), None),
    "FGSM-RS": (attacks.fgsm_rs, None),
    "FGSM + GradAlign": (attacks.fgsm, lambda t: objectives.grad_align(t.eps)),
    "FGSM + GradAlign, FGSM point": (
        attacks.fgsm,
        lambda t: objectives.grad_align(t.eps, point="fgsm"),
    ),
    "FGSM + CURE": (attacks.fgsm, lambda t: objectives.cure(t.eps)),
    "FGSM + gradient penalty": (attacks.fgsm, lambda t: objectives.gradient_penalty()),
    "PGD-2": (
        lambda t: attacks.pgd(t, steps=2, step_size=t.eps / 2, start="zero"),
        None,
    ),
    "PGD-10": (lambda t: attacks.pgd(t, steps=10, step_size=t.eps / 5, start="zero"), None),
    "PGD-10, corners": (
        lambda t: attacks.pgd(t, steps=10, step_size=t.eps / 5, start="zero", corner=True),
        None,
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set."""

    # fmt: off
    study: tuple[str, ...] = setting(STUDIES, "what is run, by commas", "run", choices=STUDIES)
    seeds: int = setting(4, "networks of each kind", "run")
    epochs: int = setting(60, "passes over the training set", "run", unit="epochs")
    evaluations: int = setting(12, "evaluations of a run", "run")
    eps: float = setting(0.25, "radius of the threat model, l_inf", "run", unit="input units")
    large_eps: float = setting(0.3, "a radius at which FGSM fails", "run", unit="input units")
    weight: float = setting(1.0, "weight of GradAlign", "run")
    filters: int = setting(4, "filters of the convolution", "run")
    train_size: int = setting(1437, "digits to train on", "run", unit="examples")
    test_size: int = setting(360, "digits to test on", "run", unit="examples")
    workdir: str = setting("runs/fast/small", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on in workdir", "run")
    dry_run: bool = setting(False, "say what would be run; compute nothing", "run")
    assert_claims: bool = setting(
        True, "end with an error if a claim that should hold does not", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "epochs", "evaluations", "filters", "train_size", "test_size"):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.divisible("epochs", self.epochs, "evaluations", self.evaluations)
        for name in ("eps", "large_eps"):
            checks.number(name, getattr(self, name), above=0)
        checks.number("weight", self.weight, at_least=0)


PRESETS = {"small": Settings()}


class Recipe(NamedTuple):
    """What is the same in all runs of one program."""

    method: str
    filters: int
    epochs: int
    evaluations: int
    batch_size: int = 64


class Knobs(NamedTuple):
    """What may differ from run to run: numbers or arrays ``(runs,)``."""

    seed: Any
    eps: Any
    weight: Any = 0.0


class Runs(NamedTuple):
    """Curves over the evaluations on the test set, ``(runs, t)``.

    Attributes:
      clean, fgsm, pgd: accuracy as it is, under FGSM, under PGD-50 from a random start with steps
        of eps / 4 (shares).
      train_pgd: accuracy under PGD-10 on the first 256 training examples.
      fgsm_loss, pgd_loss: mean losses there.
      alignment: of the gradients at ``x`` and at a uniform point of the ball, mean.
      filter_norm: l_2 norms of the filters, ``(runs, t, filters)``.
    """

    clean: Float[np.ndarray, "runs t"]
    fgsm: Float[np.ndarray, "runs t"]
    pgd: Float[np.ndarray, "runs t"]
    train_pgd: Float[np.ndarray, "runs t"]
    fgsm_loss: Float[np.ndarray, "runs t"]
    pgd_loss: Float[np.ndarray, "runs t"]
    alignment: Float[np.ndarray, "runs t"]
    filter_norm: Float[np.ndarray, "runs t filters"]


def train(settings: Settings, method: str, eps: Any, weight: Any = 0.0, seeds: Any = None) -> Runs:
    """Runs of one method, made once for every set of arguments."""
    seeds = tuple(range(settings.seeds)) if seeds is None else seeds
    recipe = Recipe(method, settings.filters, settings.epochs, settings.evaluations)
    return _train(recipe, Knobs(seeds, eps, weight), settings.train_size, settings.test_size)


@functools.lru_cache
def _task(train_size: int, test_size: int) -> noisy_digits.Task:
    return noisy_digits.load_task(noise=0.0, train_size=train_size, test_size=test_size)


@functools.lru_cache
def _train(recipe: Recipe, knobs: Knobs, train_size: int, test_size: int) -> Runs:
    knobs = Knobs(np.asarray(knobs.seed, np.int32),
                  *(np.asarray(value, np.float32) for value in knobs[1:]))  # fmt: skip
    return Runs(*side_by_side.run(_run, recipe, knobs, _task(train_size, test_size)))


def _run(recipe: Recipe, knobs: Knobs, task: noisy_digits.Task) -> tuple[Array, ...]:
    train_set, test_set = task
    n = train_set["label"].shape[0]
    model = models.from_linen(models.SingleLayerCNN(filters=recipe.filters))
    threat = ThreatModel(norms.LInf(), knobs.eps)
    make_attack, make_penalty = METHODS[recipe.method]
    objective = objectives.madry(make_attack(threat))
    if make_penalty is not None:
        objective = objectives.penalized(objective, make_penalty(threat), weight=knobs.weight)
    per_epoch = data.steps_per_epoch(n, recipe.batch_size)
    rate = choices.make_schedule("cyclic", learning_rate=0.02, epochs=recipe.epochs,
                                 steps_per_epoch=per_epoch, milestones=(), decay=1.0)  # fmt: skip
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(rate))
    step = training.train_step(model.apply, objective, optimizer)
    init_key, run_key, order_key, test_key = jax.random.split(jax.random.key(knobs.seed), 4)
    params, model_state = model.init(init_key, train_set["image"][:1])
    state = training.create_state(params, model_state, optimizer, run_key)

    def one_epoch(state, epoch):
        order = data.epoch_batches(order_key, epoch, n, recipe.batch_size)
        return training.several_resident_steps(step, side_by_side.take)(state, train_set, order)[
            0
        ], None

    def evaluate(params):
        logits_fn = models.eval_logits(model.apply, params, model_state)
        x, y = test_set["image"], test_set["label"]
        pgd = attacks.pgd(threat, steps=50, step_size=threat.eps / 4)
        short = attacks.pgd(threat, steps=10, step_size=threat.eps / 4)
        shown = jax.tree.map(lambda v: v[:256], train_set)
        logits = {
            "clean": logits_fn(x),
            "fgsm": logits_fn(attacks.fgsm(threat)(logits_fn, test_key, x, y)),
            "pgd": logits_fn(pgd(logits_fn, test_key, x, y)),
        }
        found = short(logits_fn, test_key, shown["image"], shown["label"])
        noise = jax.random.uniform(test_key, x.shape, minval=-1, maxval=1) * threat.eps
        return (
            *(metrics.correct(z, y).mean() for z in logits.values()),
            metrics.correct(logits_fn(found), shown["label"]).mean(),
            *(losses.cross_entropy(logits[name], y).mean() for name in ("fgsm", "pgd")),
            gradient_alignment(logits_fn, x, y, noise).mean(),
            jnp.sqrt(jnp.sum(params["conv"]["kernel"] ** 2, axis=(0, 1, 2))),
        )

    def period(state, epochs):
        state, _ = jax.lax.scan(one_epoch, state, epochs)
        return state, evaluate(state.params)

    epochs = jnp.arange(recipe.epochs).reshape(recipe.evaluations, -1)
    return jax.lax.scan(period, state, epochs)[1]


COLUMNS = ("clean %", "FGSM %", "PGD-50 %", "of each seed", "alignment", "PGD-50 % stopped early")


def _row(runs: Runs) -> list[str]:
    """Last accuracies, and PGD-50 where the accuracy under PGD on training data was best."""
    last = 100 * runs.pgd[:, -1]
    stopped = np.take_along_axis(runs.pgd, runs.train_pgd.argmax(1)[:, None], 1)[:, 0]
    return [f"{100 * runs.clean[:, -1].mean():.1f}", f"{100 * runs.fgsm[:, -1].mean():.1f}",
            f"{last.mean():.1f}", ", ".join(f"{v:.1f}" for v in last),
            f"{runs.alignment[:, -1].mean():.2f}", f"{100 * stopped.mean():.1f}"]  # fmt: skip


class Study(NamedTuple):
    """Rows of a table, numbers for ``results.json``, claims, and what a figure needs, if any."""

    columns: list[str]
    rows: list[list[str]]
    results: dict[str, Any]
    claims: list[Claim]
    figure: Callable | None = None


def _numbers(runs: Runs) -> dict[str, Any]:
    return {**runs._asdict(), "last_pgd": metrics.bootstrap_mean(runs.pgd[:, -1])._asdict()}


def methods(settings: Settings) -> Study:
    """All methods at both radii."""
    rows, results, last, aligned = [], {}, {}, {}
    for eps in (settings.eps, settings.large_eps):
        for method in METHODS:
            if "penalty" in method or "CURE" in method or "point" in method:
                continue
            weight = settings.weight if "GradAlign" in method else 0.0
            runs = train(settings, method, eps, weight)
            rows.append([f"{eps:g}", method, *_row(runs)])
            results[f"{method}, {eps:g}"] = _numbers(runs)
            last[method, eps] = 100 * runs.pgd[:, -1]
            aligned[method, eps] = runs.alignment[:, -1].mean()
    eps, large = settings.eps, settings.large_eps
    fgsm = np.median(last["FGSM", large])
    grad_align, pgd = last["FGSM + GradAlign", eps].mean(), last["PGD-10", eps].mean()
    gap = aligned["FGSM + GradAlign", large] - aligned["FGSM", large]
    corner = last["PGD-10, corners", large].mean()
    short = last["FGSM, step 0.888 eps", eps].mean()
    claims = [
        Claim(f"FGSM training collapses at {large:g} (median PGD-50)", "< 10 %", f"{fgsm:.1f} %",
              bool(fgsm < 10)),
        Claim(f"with GradAlign it does not at {eps:g}", "> 40 %", f"{grad_align:.1f} %",
              bool(grad_align > 40)),
        Claim(f"PGD-10 training at {eps:g}", "> 45 %", f"{pgd:.1f} %", bool(pgd > 45)),
        Claim(f"gradient alignment: GradAlign over FGSM at {large:g}", "> 0.2", f"{gap:.2f}",
              bool(gap > 0.2)),
        Claim(f"PGD-10 pushed to the corners at {large:g}", "> 30 %", f"{corner:.1f} %",
              bool(corner > 30)),
        Claim(f"a shorter step helps FGSM at {eps:g}", f"> {last['FGSM', eps].mean():.1f} %",
              f"{short:.1f} %", None),
        Claim(f"PGD-2 at {large:g}", "reported", f"{last['PGD-2', large].mean():.1f} %", None),
    ]  # fmt: skip
    return Study(["eps", "method", *COLUMNS], rows, results, claims)


def curves(settings: Settings) -> Study:
    """Over the epochs, at the larger radius, one seed."""
    shown = {
        method: train(settings, method, settings.large_eps,
                      settings.weight if "GradAlign" in method else 0.0)
        for method in ("FGSM", "FGSM + GradAlign", "PGD-10")
    }  # fmt: skip
    every = settings.epochs // settings.evaluations
    epoch = every * np.arange(1, settings.evaluations + 1)
    ratio = {m: (r.pgd_loss / np.maximum(r.fgsm_loss, 1e-12))[:, -1].mean()
             for m, r in shown.items()}  # fmt: skip
    rows = [[m, f"{ratio[m]:.2f}", f"{r.filter_norm[:, -1].max(1).mean():.2f}"]
            for m, r in shown.items()]  # fmt: skip
    claims = [Claim("the loss under PGD leaves that under FGSM behind in FGSM training",
                    f"> {ratio['PGD-10']:.2f} (PGD-10 training)", f"{ratio['FGSM']:.2f}",
                    bool(ratio["FGSM"] > ratio["PGD-10"]))]  # fmt: skip
    figure = functools.partial(fast_figures.curves, epoch=epoch, runs=shown)
    return Study(["method", "PGD loss / FGSM loss", "largest filter norm"], rows, ratio, claims,
                 figure)  # fmt: skip


def weight(settings: Settings) -> Study:
    """The weight of GradAlign at the smaller radius, one seed each."""
    values = (0.0, 0.1, 0.5, 1.0, 2.0, 8.0)
    runs = train(settings, "FGSM + GradAlign", settings.eps, values, seeds=0)
    rows = []
    for i, value in enumerate(values):
        one = jax.tree.map(lambda v, i=i: v[i : i + 1], runs)
        rows.append([f"{value:g}", *_row(one)])
    best = 100 * runs.pgd[:, -1]
    claims = [Claim("a moderate weight is better than none", f"> {best[0]:.1f} %",
                    f"{best[2:5].max():.1f} %", bool(best[2:5].max() > best[0]))]  # fmt: skip
    figure = functools.partial(fast_figures.weight, values=values, runs=runs)
    return Study(["weight", *COLUMNS], rows, {"weights": values, **_numbers(runs)}, claims, figure)


def penalties(settings: Settings) -> Study:
    """Other penalties in place of GradAlign, at the smaller radius."""
    weights = {
        "FGSM": 0.0,
        "FGSM + gradient penalty": 0.3,
        "FGSM + CURE": 0.3,
        "FGSM + GradAlign, FGSM point": 1.0,
        "FGSM + GradAlign": settings.weight,
    }
    rows, results = [], {}
    for method, value in weights.items():
        runs = train(settings, method, settings.eps, value)
        rows.append([method, f"{value:g}", *_row(runs)])
        results[method] = _numbers(runs)
    return Study(["method", "weight", *COLUMNS], rows, results, [])


def main(settings: Settings) -> None:
    """Runs the studies of these settings."""
    if settings.dry_run:
        model = models.from_linen(models.SingleLayerCNN(filters=settings.filters))
        image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        params, _ = jax.eval_shape(model.init, jax.random.key(0), image)
        report.print_lines(
            f"Dry run: {', '.join(settings.study)}: {training.parameter_count(params):,} "
            f"parameters, {settings.seeds} seeds, {settings.epochs} epochs of "
            f"{data.steps_per_epoch(settings.train_size, 64)} steps"
        )
        return
    config = dataclasses.asdict(settings)
    for name in ("workdir", "resume", "dry_run", "study", "assert_claims"):
        del config[name]
    workdir = report.open_workdir(settings.workdir, config, resume=settings.resume)
    results: dict[str, Any] = {"environment": environment()}
    claims: list[Claim] = []
    for name in settings.study:
        began = time.monotonic()
        found = {"methods": methods, "curves": curves, "weight": weight,
                 "penalties": penalties}[name](settings)  # fmt: skip
        report.print_table(f"Study {name}, digits", found.columns, found.rows)
        if found.figure is not None and report.is_writer():
            found.figure(workdir / f"{name}.png")
        claims += found.claims
        results[name] = {
            "results": found.results,
            "claims": [claim._asdict() for claim in found.claims],
            "seconds": round(time.monotonic() - began, 1),
        }
        if report.is_writer():
            report.write_json(workdir / "results.json", results)
    print_claims("Digits, a single-layer CNN: what the paper finds, and what holds here", claims)
    report.print_lines(f"tables and figures: {workdir}")
    if settings.assert_claims:
        check_claims(claims)


if __name__ == "__main__":
    # Two networks side by side are faster than one on two cores.
    jax.config.update("jax_num_cpu_devices", max(1, min(4, len(os.sched_getaffinity(0)))))
    command_line.run(main, Settings, PRESETS, __doc__)
