r"""Robustness to perturbations with bounded Fourier coefficients, for all frequencies or a band.

  python -m experiments.fourier_attack                     trains four small networks on digits
  python -m experiments.fourier_attack --dataset=mnist5k --epochs=8
  python -m experiments.fourier_attack --preset=paper      WRN-28-10 on CIFAR-10, from checkpoints
  python -m experiments.fourier_attack --preset=paper --dry_run      builds all, runs nothing

Networks trained in different ways are attacked within l_inf and Fourier-l_inf balls: the accuracy
over eps, and the largest eps at which it is still within one point of the clean one. The paper
preset evaluates models that were trained before (--checkpoints), as by

  python -m experiments.adversarial_training --preset=paper --model=wrn28 \
      --objective=standard,madry --workdir=runs/fourier_attack/models

and, with --torch_checkpoints, networks of RobustBench as PyTorch saves them:

  python -m experiments.fourier_attack --preset=paper --checkpoints=None --balls=fourier \
      --torch_checkpoints=Standard:FILE.pt,Carmon2019Unlabeled:FILE.pt

The eps of the panels are those of the appendix; --panel_eps_low=50/255 --panel_eps_high=8/255 are
those of figure 5.1.

WORKDIR gets config.json, results.json, curves.png and, for each model, panel_MODEL.png.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
    batch_sizes,
    choices,
    command_line,
    fourier_figures,
    fourier_models,
    fourier_zoo,
)
from experiments.command_line import setting
from robustjax import attacks, checks, data, keys, losses, models, parallel, training
from robustjax.attacks.fourier import project_in_box, violation
from robustjax.benchmark import BatchedFunction
from robustjax.fourier_norms import FourierLInf
from robustjax.metrics import correct
from robustjax.metrics.margins import max_eps, near_clean
from robustjax.norms import LInf, Norm
from robustjax.threat import ThreatModel
from robustjax.training import report

TRAININGS = ("standard", "linf", "l2", "noise")
BALLS = ("linf", "fourier", "fourier_low", "fourier_high")
METHODS: Mapping[str, Callable[..., attacks.Attack]] = {
    "pgd": lambda threat, steps: attacks.pgd(
        threat, steps=steps, step_size=min(1.0, 2.5 / steps) * threat.eps, start="zero"
    ),
    "apgd-ce": lambda threat, steps: attacks.apgd(threat, steps=steps),
    "apgd-dlr": lambda threat, steps: attacks.apgd(threat, loss=losses.dlr, steps=steps),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set; the defaults are those of ``--preset=paper``.

    Raises:
      ValueError: a setting is out of range or not among its choices.
    """

    # fmt: off
    checkpoints: str | None = setting(
        "runs/fourier_attack/models/standard,runs/fourier_attack/models/madry",
        "folders WORKDIR/OBJECTIVE of training runs, by commas; None: train models here", "models")
    torch_checkpoints: str | None = setting(
        None, "PyTorch state dicts NAME:FILE of RobustBench's networks, by commas; NAME is one of "
        "the paper's table B.2, as Carmon2019Unlabeled, or an architecture", "models")
    which: str = setting("best", "their checkpoints", "models", choices=("best", "last"))
    trainings: tuple[str, ...] = setting(
        TRAININGS, "how models are trained here: on clean images, on l_inf or l_2 adversarial "
        "ones, or on noisy ones", "models", choices=TRAININGS)
    model: str = setting("wrn28", "architecture", "models", choices=tuple(choices.MODELS))
    width: int | None = setting(
        None, "its base width (widening factor of wrn); None: the published one", "models",
        unit="channels")
    dataset: str = setting("cifar10", "digits, mnist5k or another one", "data")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "data")
    examples: int = setting(10_000, "first examples of the test set", "data", unit="examples")
    train_eps_linf: float = setting(
        8 / 255, "radius of l_inf adversarial training", "training", unit="input units")
    train_eps_l2: float = setting(
        0.5, "radius of l_2 adversarial training", "training", unit="input units")
    noise: float = setting(
        0.1, "standard deviation of Gaussian noise", "training", unit="input units")
    train_steps: int = setting(10, "steps of PGD in adversarial training", "training")
    learning_rate: float = setting(2e-3, "largest learning rate of Adam", "training")
    epochs: int = setting(30, "passes over the training set", "training", unit="epochs")
    train_batch_size: int = setting(100, "global batch size", "training", unit="examples")
    balls: tuple[str, ...] = setting(
        BALLS, "balls of the attacks: l_inf, Fourier-l_inf with all, low and high frequencies",
        "attacks", choices=BALLS)
    methods: tuple[str, ...] = setting(
        ("apgd-ce", "apgd-dlr"), "attacks in each ball; robust is who withstands all", "attacks",
        choices=tuple(METHODS))
    steps: int = setting(20, "steps of each attack", "attacks")
    projections: int = setting(
        0, "alternating projections of the result on ball and box; 0: only clipped to the box",
        "attacks")
    low: float = setting(
        0.125, "largest of the low frequencies", "attacks", unit="cycles per pixel")
    high: float = setting(
        0.25, "smallest of the high frequencies", "attacks", unit="cycles per pixel")
    eps_max: float = setting(8 / 255, "largest eps of the grid", "attacks", unit="input units")
    eps_count: int = setting(17, "values of eps from 0 to eps_max", "attacks")
    drop: float = setting(0.01, "accuracy that the maximal eps may cost", "attacks")
    panel_eps: float = setting(8 / 255, "eps in the panel", "figures", unit="input units")
    panel_eps_low: float = setting(
        45 / 255, "eps in the panel, low frequencies", "figures", unit="input units")
    panel_eps_high: float = setting(
        15 / 255, "eps in the panel, high frequencies", "figures", unit="input units")
    panel_images: int = setting(2, "images in the panel", "figures")
    seed: int = setting(0, "seed of everything random", "run")
    batch_size: int = setting(500, "examples at a time", "run", unit="examples")
    workdir: str = setting(
        "runs/fourier_attack/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "take the results in workdir, if they are complete", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in (
            "examples", "train_batch_size", "batch_size", "steps", "eps_count", "panel_images",
        ):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        for name in ("train_steps", "epochs", "projections"):
            checks.integer(name, getattr(self, name))
        checks.integer("seed", self.seed, at_most=2**32 - 1)
        if self.width is not None:
            checks.integer("width", self.width, at_least=1)
        for name in (
            "train_eps_linf", "train_eps_l2", "noise", "eps_max", "drop", "panel_eps",
            "panel_eps_low", "panel_eps_high",
        ):  # fmt: skip
            checks.number(name, getattr(self, name), at_least=0)
        checks.number("learning_rate", self.learning_rate, above=0)
        for name in ("low", "high"):
            checks.number(name, getattr(self, name), at_least=0, at_most=0.5)
        for name in self.torch_files:
            fourier_zoo.module_of(name, 10, self.width)

    @property
    def folders(self) -> list[Path]:
        """The folders of the checkpoints."""
        words = (self.checkpoints or "").split(",")
        return [Path(word.strip()) for word in words if word.strip()]

    @property
    def torch_files(self) -> dict[str, str]:
        """Names to files of the PyTorch networks."""
        return fourier_zoo.parse(self.torch_checkpoints or "")


# The eps of the paper preset's panels are those of the figures of Faghri et al. (2021), "Bridging
# the gap between adversarial robustness and optimization bias".
PRESETS = {
    "small": Settings(
        checkpoints=None,
        model="small_cnn",
        dataset="digits",
        examples=300,
        train_eps_linf=0.1,
        train_eps_l2=0.5,
        noise=0.2,
        train_steps=5,
        methods=("pgd",),
        projections=30,
        eps_max=0.2,
        eps_count=21,
        panel_eps=0.2,
        panel_eps_low=0.2,
        panel_eps_high=0.2,
        batch_size=300,
        train_batch_size=96,
        workdir="runs/fourier_attack/small",
    ),
    "paper": Settings(),
}


def main(settings: Settings) -> dict[str, Any] | None:
    """Runs the experiment of these settings; returns what ``results.json`` holds."""
    if settings.dry_run:
        dry_run(settings)
        return None
    config = dataclasses.asdict(settings)
    for name in ("workdir", "data_dir", "dry_run", "resume"):
        del config[name]
    test = data.load(settings.dataset, "test", data_dir=settings.data_dir)
    checks.integer("examples", settings.examples, at_least=1, at_most=len(test))
    test = test.subset(np.arange(settings.examples))
    workdir = report.open_workdir(settings.workdir, config, resume=settings.resume)
    if (workdir / "results.json").exists():
        return json.loads((workdir / "results.json").read_text())
    subjects = fourier_models.subjects(settings, test)
    grid = [float(eps) for eps in np.linspace(0, settings.eps_max, settings.eps_count)]
    results: dict[str, Any] = {
        "dataset": settings.dataset,
        "examples": len(test),
        "eps": grid,
        "models": {name: {} for name in subjects},
    }
    for ball in settings.balls:
        judge = _judge(settings, norm_of(settings, ball))
        for name, logits_fn in subjects.items():
            results["models"][name][ball] = _curve(settings, judge, logits_fn, test, grid)
    if report.is_writer():
        report.write_json(workdir / "results.json", results)
        fourier_figures.curves(results, workdir / "curves.png")
        for name, logits_fn in subjects.items():
            _panel(settings, name, logits_fn, test, workdir)
    _print(settings, results)
    return results


def norm_of(settings: Settings, ball: str) -> Norm:
    """The norm of a ball by its name."""
    return {
        "linf": LInf(),
        "fourier": FourierLInf(),
        "fourier_low": FourierLInf(low=settings.low),
        "fourier_high": FourierLInf(high=settings.high),
    }[ball]


def _attacks(settings: Settings, threat: ThreatModel) -> list[attacks.Attack]:
    """The methods in this threat model, their results projected if that is set."""

    def then_projected(method: str) -> attacks.Attack:
        attack = METHODS[method](threat, settings.steps)
        if not (settings.projections and isinstance(threat.norm, FourierLInf)):
            return attack
        return lambda logits_fn, key, x, y: project_in_box(
            threat, attack(logits_fn, key, x, y), x, iterations=settings.projections
        )

    return [then_projected(method) for method in settings.methods]


def _judge(settings: Settings, norm: Norm) -> BatchedFunction:
    """Which examples withstand all methods, and the largest violation of the ball, compiled once.

    Neither another eps nor another model of the same kind compiles again.
    """

    def judge(fixed: tuple, numbers: tuple, rows: tuple) -> tuple[jax.Array, jax.Array]:
        (logits_fn, key), (eps,), (x, y, index) = fixed, numbers, rows
        threat = ThreatModel(norm, eps)
        example_keys = keys.per_example(key, index)
        robust, worst = jnp.full(y.shape, True), jnp.zeros(y.shape)
        for attack in _attacks(settings, threat):
            x_adv = attack(logits_fn, example_keys, x, y)
            robust &= correct(logits_fn(x_adv), y)
            if isinstance(norm, FourierLInf):
                left = violation(x_adv, x, threat)
                worst = jnp.maximum(worst, jnp.maximum(left.ball, left.band))
        return robust, worst

    one = parallel.device_mesh(jax.devices()[:1])
    return BatchedFunction(judge, batch_size=settings.batch_size, mesh=one)


def _curve(settings: Settings, judge: BatchedFunction, logits_fn, test, grid) -> dict[str, Any]:
    accuracies, violations = [], []
    fixed = judge.place((logits_fn, jax.random.key(settings.seed)))
    examples = (data.as_float(test.image), test.label, np.arange(len(test), dtype=np.int32))
    for eps in grid:
        robust, worst = judge(fixed, (np.float32(eps),), examples)
        accuracies.append(float(robust.mean()))
        violations.append(float(worst.max()))
    table = dict(zip(grid, accuracies, strict=True))
    criterion = near_clean(accuracies[0], settings.drop)  # the grid starts at 0
    return {
        "accuracy": accuracies,
        "violation": violations,
        "max_eps": max_eps(table.__getitem__, grid, criterion),
        "max_eps_strict": max_eps(table.__getitem__, grid, criterion, all_smaller=True),
    }


def _panel(settings: Settings, name: str, logits_fn, test, workdir: Path) -> None:
    chosen = np.linspace(0, len(test) - 1, min(settings.panel_images, len(test))).astype(int)
    x = jnp.asarray(data.as_float(test.image[chosen]))
    y = jnp.asarray(test.label[chosen])
    sizes = {"fourier_low": settings.panel_eps_low, "fourier_high": settings.panel_eps_high}
    rows = {}
    for ball in settings.balls:
        eps = sizes.get(ball, settings.panel_eps)
        attack = _attacks(settings, ThreatModel(norm_of(settings, ball), eps))[0]
        x_adv = jax.jit(attack)(logits_fn, jax.random.key(settings.seed), x, y)
        predicted = jnp.argmax(logits_fn(x_adv), axis=-1)
        rows[f"{ball}, {eps:.3g}"] = (np.asarray(x_adv), np.asarray(predicted))
    path = workdir / f"panel_{name}.png"
    fourier_figures.panel(np.asarray(x), np.asarray(y), rows, path, title=name)


def _print(settings: Settings, results: Mapping[str, Any]) -> None:
    grid = results["eps"]
    shown = np.unique(np.linspace(0, len(grid) - 1, min(9, len(grid))).astype(int))
    rows = [
        [
            name,
            ball,
            *(f"{100 * curve['accuracy'][i]:.1f}" for i in shown),
            f"{curve['max_eps']:.4g}",
            f"{max(curve['violation']):.2g}",
        ]
        for name, curves in results["models"].items()
        for ball, curve in curves.items()
    ]
    report.print_table(
        f"{settings.dataset}, {results['examples']} test examples, "
        f"{' and '.join(settings.methods)}, {settings.steps} steps: robust accuracy (%) at eps",
        ["model", "ball", *(f"{grid[i]:.3g}" for i in shown), "max eps", "violation"],
        rows,
    )
    report.print_lines(
        f"max eps: the largest with accuracy within {100 * settings.drop:g} points of the clean "
        "one; violation: by how much Fourier magnitudes exceed eps or the band, after the box",
        f"results and figures: {settings.workdir}",
    )


def dry_run(settings: Settings) -> None:
    """Builds every model abstractly and prints what its evaluation costs."""
    facts = choices.DATA_FACTS.get(settings.dataset)
    if facts is None:
        test = data.load(settings.dataset, "test", data_dir=settings.data_dir)
        facts = choices.DataFacts(test.image.shape[1:], test.num_classes, len(test))
    image = jax.ShapeDtypeStruct((settings.batch_size, *facts.image_shape), jnp.float32)
    integers = jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    eps = jax.ShapeDtypeStruct((), jnp.float32)
    evaluations = len(settings.balls) * len(settings.methods) * settings.steps
    rows, seen = [], {}
    for name, kind, model in fourier_models.planned(settings, facts.num_classes):
        if kind not in seen:  # what has the same parts is traced once
            params, model_state = jax.eval_shape(model.init, key, image)
            logits_fn = models.eval_logits(model.apply, params, model_state)
            for ball in settings.balls:
                judge = _judge(settings, norm_of(settings, ball))
                jax.eval_shape(judge.fn, (logits_fn, key), (eps,), (image, integers, integers))
            gradient = jax.grad(lambda x, logits_fn: logits_fn(x).sum())
            flops = training.count_flops(gradient, image, logits_fn) / settings.batch_size
            seen[kind] = training.parameter_count(params), flops
        parameters, flops = seen[kind]
        total = flops * evaluations * settings.eps_count * settings.examples
        rows.append([name, kind, f"{parameters:,}", f"{total:.3e}"])
    report.print_table(
        f"Dry run: {settings.dataset}, {settings.examples} examples, {settings.eps_count} eps up "
        f"to {settings.eps_max:.4g}, {','.join(settings.balls)}",
        ["model", "architecture", "parameters", "FLOPs of the attacks"],
        rows,
    )
    found = batch_sizes.misfit(settings.train_batch_size, name="train_batch_size")
    if found is not None and not (settings.checkpoints or settings.torch_checkpoints):
        report.print_lines(f"would be refused here: {found}")


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
