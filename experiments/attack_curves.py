r"""Robust accuracy over eps for every attack, and accuracies along the steps of iterative attacks.

  python -m experiments.attack_curves                 MNIST-5k and a small network, 3 minutes
  python -m experiments.attack_curves --threat=l2 --eps_max=3 --workdir=runs/attack_curves/l2 \
      --attacks=pgd,apgd-t,autoattack,fab,deepfool,cw
  python -m experiments.attack_curves --preset=paper --dry_run      builds all, runs nothing

Attacks one model and writes two tables and two figures:

curves.png   robust accuracy over eps. Most attacks run once for each eps; those of least distance
             (FAB, DeepFool, Carlini-Wagner) run once and give the whole curve
traces.png   instantaneous and cumulative accuracy, a_I(k) and a_C(k), over the steps k of
             Iter-FGSM and Iter-LL-FGSM with fixed steps; Sanyal (2021), figure 3.1

The model is a checkpoint of experiments.adversarial_training (--checkpoint=WORKDIR/OBJECTIVE) or,
by default in the small preset, the network that experiments.evaluate trains, which is trained
unless it is there. The paper preset has the setting of the thesis, a ResNet on CIFAR-10 with
eps 0.1 and steps of 0.01 along the traces; its model comes from

  python -m experiments.adversarial_training --preset=paper --model=resnet18 --objective=standard \
      --workdir=runs/attack_curves/models

WORKDIR gets config.json, results.json and the figures.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
    attack_figures,
    batch_sizes,
    choices,
    command_line,
    evaluate,
    trained_models,
)
from experiments.command_line import setting
from experiments.dry_run import misfits
from experiments.training_settings import Settings as TrainingSettings
from robustjax import attacks, checks, data, keys, losses, metrics, models, training
from robustjax.attacks.stepwise import StepwiseAttack
from robustjax.benchmark import BatchedFunction, ChunkedAttack, auto_attack, ensemble
from robustjax.benchmark.auto_attack import TARGETS
from robustjax.benchmark.environment import environment
from robustjax.metrics.minimum_norm import robust_accuracy_curve
from robustjax.threat import ThreatModel
from robustjax.training import report

AT_EACH_EPS = (
    "fgsm", "pgd", "apgd-ce", "apgd-dlr", "apgd-t", "square", "simba", "autoattack",
)  # fmt: skip
AT_ONCE = ("fab", "deepfool", "cw")
TRACES = ("Iter-LL-FGSM", "Iter-FGSM")
# What a dry run takes a checkpoint to be that is not there.
PAPER_MODEL = TrainingSettings(model="resnet18", objective=("standard",))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set; the defaults are those of ``--preset=paper``.

    Raises:
      ValueError: a setting is out of range or not among its choices.
    """

    # fmt: off
    checkpoint: str | None = setting(
        "runs/attack_curves/models/standard",
        "folder WORKDIR/OBJECTIVE of a training run; None: the network of an evaluation", "model")
    which: str = setting("best", "its checkpoint", "model", choices=("best", "last"))
    evaluation: str = setting(
        "runs/evaluate/small", "WORKDIR of experiments.evaluate, whose own network is attacked if "
        "there is no checkpoint, and trained if it is not there", "model")
    epochs: int = setting(12, "of this training", "model", unit="epochs")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "data")
    examples: int = setting(1000, "first examples of the test set", "data", unit="examples")
    threat: str = setting(
        "linf", "norm of the threat model", "curves", choices=tuple(choices.NORMS))
    eps_max: float = setting(8 / 255, "largest eps of the grid", "curves", unit="input units")
    eps_count: int = setting(9, "values of eps from 0 to eps_max", "curves")
    attacks: tuple[str, ...] = setting(
        (*AT_EACH_EPS, "fab", "deepfool"), "attacks, by commas; cw is for l2", "curves",
        choices=(*AT_EACH_EPS, *AT_ONCE))
    steps: int = setting(
        100, "of PGD, APGD and FAB; those of AutoAttack and DeepFool are fixed", "curves")
    queries: int = setting(5000, "of Square and SimBA", "curves")
    cw_steps: int = setting(1000, "of Carlini-Wagner, for each of 9 weights", "curves")
    trace_eps: float = setting(0.1, "l_inf radius", "traces", unit="input units")
    trace_step_size: float = setting(0.01, "length of a step", "traces", unit="input units")
    trace_steps: int = setting(50, "steps", "traces")
    seed: int = setting(0, "seed of everything random", "run")
    batch_size: int = setting(500, "examples at a time, on all devices", "run", unit="examples")
    workdir: str = setting("runs/attack_curves/paper", "folder of the results, new", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in (
            "epochs", "examples", "steps", "queries", "cw_steps", "trace_steps", "batch_size",
        ):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        checks.integer("eps_count", self.eps_count, at_least=2)
        checks.integer("seed", self.seed, at_most=2**32 - 1)
        checks.number("eps_max", self.eps_max, above=0)
        for name in ("trace_eps", "trace_step_size"):
            checks.number(name, getattr(self, name), at_least=0)
        if "cw" in self.attacks and self.threat != "l2":
            raise ValueError(f"attacks must not name cw unless the threat is l2, got {self.threat}")
        if "square" in self.attacks and self.threat == "l1":
            raise ValueError("attacks must not name square if the threat is l1, got it")

    @property
    def norm(self) -> Any:
        """The norm of the curves."""
        return choices.NORMS[self.threat]

    @property
    def grid(self) -> list[float]:
        """The values of eps, the first is 0."""
        return [float(eps) for eps in np.linspace(0, self.eps_max, self.eps_count)]


PRESETS = {
    "small": Settings(
        checkpoint=None,
        examples=100,
        eps_max=0.3,
        eps_count=5,
        steps=40,
        queries=1000,
        cw_steps=100,
        trace_eps=0.3,
        trace_step_size=0.03,
        trace_steps=40,
        batch_size=100,
        workdir="runs/attack_curves/small",
    ),
    "paper": Settings(),
}


def main(settings: Settings) -> dict[str, Any] | None:
    """Runs the experiment of these settings; returns what ``results.json`` holds."""
    if settings.dry_run:
        dry_run(settings)
        return None
    config = dataclasses.asdict(settings)
    for name in ("workdir", "data_dir", "dry_run"):
        del config[name]
    workdir = report.open_workdir(settings.workdir, config, resume=False)
    subject = _subject(settings)
    x, y = data.as_float(subject.examples.image), subject.examples.label
    curves = _curves(settings, subject, x, y)
    results = {
        "model": subject.name,
        "dataset": subject.examples.name,
        "examples": len(y),
        "threat": settings.threat,
        "eps": settings.grid,
        "curves": curves,
        "traces": traces(settings, subject.logits_fn, x, y),
        "trace_setting": {"eps": settings.trace_eps, "step_size": settings.trace_step_size},
        "environment": environment(),
    }
    if report.is_writer():
        report.write_json(workdir / "results.json", results)
        attack_figures.curves(results, workdir / "curves.png")
        attack_figures.traces(results, workdir / "traces.png")
    _print(settings, results)
    return results


def _subject(settings: Settings) -> evaluate.Subject:
    of_evaluation = dataclasses.replace(
        evaluate.PRESETS["small"],
        checkpoint=settings.checkpoint,
        which=settings.which,
        epochs=settings.epochs,
        data_dir=settings.data_dir,
        examples=settings.examples,
    )
    return evaluate.subject(of_evaluation, Path(settings.evaluation))


def attacks_of(settings: Settings, num_classes: int) -> dict[str, Callable[[ThreatModel], Any]]:
    """``make_attack(threat)`` of the attacks of these settings but AutoAttack, by name."""
    steps, queries = settings.steps, settings.queries
    targets = min(TARGETS, num_classes - 1)

    def pgd(threat: ThreatModel) -> attacks.Attack:
        return attacks.pgd(
            threat, steps=steps, step_size=threat.eps / 4, iterate="best", select="any"
        )

    known = {
        "fgsm": attacks.fgsm,
        "pgd": pgd,
        "apgd-ce": functools.partial(attacks.apgd, steps=steps),
        "apgd-dlr": functools.partial(attacks.apgd, loss=losses.dlr, steps=steps),
        "apgd-t": functools.partial(attacks.apgd_targeted, targets=targets, steps=steps),
        "square": functools.partial(attacks.square, queries=queries),
        "simba": functools.partial(attacks.simba, max_queries=queries),
        "fab": functools.partial(attacks.fab, steps=steps),
        "deepfool": attacks.deepfool,
        "cw": functools.partial(attacks.carlini_wagner, steps=settings.cw_steps),
    }
    return {name: known[name] for name in settings.attacks if name in known}


def _curves(
    settings: Settings, subject: evaluate.Subject, x: np.ndarray, y: np.ndarray
) -> dict[str, Any]:
    """Accuracies at each eps of the grid, by attack."""
    makers = attacks_of(settings, subject.examples.num_classes)
    key, curves = jax.random.key(settings.seed), {}
    for name in settings.attacks:
        began = time.monotonic()
        run = _at_once if name in AT_ONCE else _at_each_eps
        of_attack = run(settings, makers.get(name), subject.logits_fn, key, x, y)
        curves[name] = {**of_attack, "seconds": round(time.monotonic() - began, 1)}
        report.print_lines(f"{name}: {curves[name]['seconds']:.0f} s")
    return curves


def _at_each_eps(settings, make, logits_fn, key, x, y) -> dict[str, Any]:
    # The same random numbers at each eps: what changes along the curve is eps alone.
    version = "standard" if make is None else {"attack": make}
    run = auto_attack(version, batch_size=batch_sizes.for_evaluation(settings.batch_size))
    accuracies: list[float] = []
    for eps in settings.grid[1:]:
        outcome = run(logits_fn, ThreatModel(settings.norm, eps), key, x, y)
        if not accuracies:
            accuracies.append(outcome.clean_accuracy)  # at eps = 0
        accuracies.append(outcome.robust_accuracy)
    return {"accuracy": accuracies}


def _at_once(settings, make, logits_fn, key, x, y) -> dict[str, Any]:
    run = ChunkedAttack(make, batch_size=batch_sizes.for_evaluation(settings.batch_size))
    threat, index = ThreatModel(settings.norm, settings.eps_max), np.arange(len(y), dtype=np.int32)
    _, state = run(logits_fn, threat, key, x, y, index)
    return {
        "accuracy": np.asarray(robust_accuracy_curve(state.distance, settings.grid)).tolist(),
        "distance": state.distance.tolist(),
    }


def traces(
    settings: Settings, logits_fn: Callable, x: np.ndarray, y: np.ndarray
) -> dict[str, dict[str, list[float]]]:
    """a_I and a_C after ``0 .. trace_steps`` steps; they count against the clean predictions."""
    key, found = jax.random.key(settings.seed), {}
    index = np.arange(len(y), dtype=np.int32)
    for name in TRACES:

        def predictions(fixed, numbers, rows, name=name):
            (logits_fn, eps, key), (x, y, index) = fixed, rows
            attack = _traced(settings, name, eps)
            _, trace = attack(logits_fn, keys.per_example(key, index), x, y)
            return trace.prediction[0].T

        size = batch_sizes.for_evaluation(settings.batch_size)
        run = BatchedFunction(predictions, batch_size=size)
        fixed = run.place((logits_fn, jnp.float32(settings.trace_eps), key))
        prediction = jnp.asarray(run(fixed, (), (x, y, index))).T
        found[name] = {
            "instantaneous": metrics.instantaneous_accuracy(prediction, prediction[0]).tolist(),
            "cumulative": metrics.cumulative_accuracy(prediction, prediction[0]).tolist(),
        }
    return found


def _traced(settings: Settings, name: str, eps: Any) -> Callable:
    least_likely = name == "Iter-LL-FGSM"
    attack = attacks.pgd(
        ThreatModel(choices.NORMS["linf"], eps),
        steps=settings.trace_steps,
        step_size=settings.trace_step_size,
        start="zero",
        targeted=least_likely,
        has_aux=True,
    )
    return attacks.least_likely(attack) if least_likely else attack


def _print(settings: Settings, results: Mapping[str, Any]) -> None:
    what = f"{results['model']}, {results['examples']} examples of {results['dataset']}"
    report.print_table(
        f"{what}: robust accuracy (%) at eps, {settings.threat}",
        ["attack", *(f"{eps:.3g}" for eps in results["eps"]), "seconds"],
        [
            [name, *(f"{100 * a:.1f}" for a in curve["accuracy"]), f"{curve['seconds']:.0f}"]
            for name, curve in results["curves"].items()
        ],
    )
    shown = np.unique(
        np.linspace(0, settings.trace_steps, min(9, settings.trace_steps + 1)).astype(int)
    )
    report.print_table(
        f"{what}: accuracy (%) after k steps of {settings.trace_step_size:g}, "
        f"l_inf eps = {settings.trace_eps:g}",
        ["attack", "accuracy", *(f"k={k}" for k in shown)],
        [
            [name, kind, *(f"{100 * values[k]:.1f}" for k in shown)]
            for name, trace in results["traces"].items()
            for kind, values in trace.items()
        ],
    )
    report.print_lines(f"results and figures: {settings.workdir}")


def dry_run(settings: Settings) -> None:
    """Builds the model and every attack abstractly and prints what they cost at most."""
    if settings.checkpoint is None:
        own = evaluate.DEMO
    elif (Path(settings.checkpoint) / report.CONFIG).exists():
        own = trained_models.read_settings(settings.checkpoint)
    else:
        own = PAPER_MODEL
    facts = choices.DATA_FACTS.get(own.dataset)
    if facts is None:
        test = data.load(own.dataset, "test", data_dir=settings.data_dir)
        facts = choices.DataFacts(test.image.shape[1:], test.num_classes, len(test))
    module = choices.MODELS[own.model](facts.num_classes, own.width, own.normalization, jnp.float32)
    model = models.from_linen(module)
    image = jax.ShapeDtypeStruct((settings.batch_size, *facts.image_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    example_keys = jax.eval_shape(lambda key: jax.random.split(key, settings.batch_size), key)
    params, model_state = jax.eval_shape(model.init, key, image)
    logits_fn = models.eval_logits(model.apply, params, model_state)
    arguments = (logits_fn, example_keys, image, label)
    rows = []
    for name, runs, parts in _parts(settings, facts.num_classes):
        flops = sum(_flops(attack, arguments) for attack in parts)
        rows.append([name, runs, f"{flops / settings.batch_size * settings.examples * runs:.3e}"])
    report.print_table(
        f"Dry run: {own.model}, {training.parameter_count(params):,} parameters, {own.dataset}, "
        f"{settings.examples} examples, {settings.threat} eps up to {settings.eps_max:.4g}",
        ["attack", "runs", "FLOPs if no example breaks"],
        rows,
    )
    if settings.checkpoint is None:
        report.print_lines(*misfits([("the network that is trained first", own)]))


def _parts(settings: Settings, num_classes: int) -> Iterator[tuple[str, int, list[Any]]]:
    """Name, number of runs, and the attacks in each run."""
    threat = ThreatModel(settings.norm, settings.eps_max)
    makers = attacks_of(settings, num_classes)
    for name in settings.attacks:
        runs = 1 if name in AT_ONCE else settings.eps_count - 1
        chosen = [makers[name]] if name in makers else ensemble("standard", num_classes).values()
        yield name, runs, [make(threat) for make in chosen]
    for name in TRACES:
        yield name, 1, [_traced(settings, name, settings.trace_eps)]


def _flops(attack: Any, arguments: tuple) -> int:
    """Of all steps of an attack on one batch."""
    if not isinstance(attack, StepwiseAttack):
        return training.count_flops(lambda *a: attack(*a), *arguments)

    def one_step(logits_fn, example_keys, x, y):
        state = attack.init(logits_fn, example_keys, x, y)
        return attack.step(logits_fn, 0, example_keys, state, x, y)

    first = training.count_flops(attack.init, *arguments)
    step = training.count_flops(one_step, *arguments) - first
    return first + attack.rounds * attack.steps * step


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
