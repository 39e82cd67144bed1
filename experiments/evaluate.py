"""Evaluates a trained model: AutoAttack, or any other attacks one after the other.

  python -m experiments.evaluate                          trains a small network first, AutoAttack
  python -m experiments.evaluate --checkpoint=runs/adversarial_training/paper/madry --preset=paper
  python -m experiments.evaluate --attack=pgd,square --threat=l2 --eps=0.5 --workdir=runs/l2
  python -m experiments.evaluate --preset=paper --torch_checkpoint=FILE.pt --model=wrn28

Each attack gets the examples that the ones before it left standing. The model is a checkpoint of
experiments.adversarial_training (--checkpoint=WORKDIR/OBJECTIVE), a PyTorch file of the RobustBench
zoo (--torch_checkpoint, with the --model that it is), or, by default in the small preset, a network
that is trained on MNIST-5k on the spot. WORKDIR gets config.json, results.json, adversarial.npz and
panel.png. An interrupted evaluation goes on when it is started again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
    adversarial_training,
    batch_sizes,
    choices,
    command_line,
    trained_models,
)
from experiments.command_line import setting
from experiments.dry_run import misfits
from experiments.training_settings import Settings as TrainingSettings
from robustjax import checks, data, models, parallel, training
from robustjax.benchmark import AttackRecord, BenchmarkResult, benchmark, ensemble, import_torch
from robustjax.benchmark.auto_attack import VERSIONS
from robustjax.threat import ThreatModel
from robustjax.training import figures, report


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set; the defaults are those of ``--preset=paper``.

    Raises:
      ValueError: a setting is out of range or not among its choices.
    """

    # fmt: off
    checkpoint: str | None = setting(
        "runs/adversarial_training/paper/madry",
        "folder WORKDIR/OBJECTIVE of a training run; None: train one on MNIST-5k", "model")
    which: str = setting("best", "its checkpoint", "model", choices=("best", "last"))
    torch_checkpoint: str | None = setting(
        None, "PyTorch file (or .npz) of a RobustBench model, in place of the checkpoint", "model")
    model: str = setting(
        "preact_resnet18", "architecture of the PyTorch file", "model",
        choices=("resnet18", "preact_resnet18", "wrn28", "wrn34"))
    epochs: int = setting(120, "of the training on the spot", "model", unit="epochs")
    dataset: str | None = setting(
        None, "data set; None: that of the checkpoint, cifar10 for a PyTorch file", "data")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "data")
    split: str = setting("test", "split", "data", choices=("test", "validation", "train"))
    examples: int = setting(10_000, "its first examples", "data", unit="examples")
    threat: str = setting(
        "linf", "norm of the threat model", "threat model", choices=tuple(choices.NORMS))
    eps: float = setting(8 / 255, "radius of the threat model", "threat model", unit="input units")
    attack: tuple[str, ...] = setting(
        ("autoattack",), "attacks, by commas, in this order", "attack",
        choices=("autoattack", *choices.EVALUATION_ATTACKS))
    version: str = setting("standard", "version of AutoAttack", "attack", choices=VERSIONS)
    seed: int = setting(0, "seed of everything random", "run")
    batch_size: int = setting(
        1000, "examples at a time, on all devices, filled up to a multiple of them; no result "
        "depends on it", "run", unit="examples")
    workdir: str = setting("runs/evaluate/paper", "folder of the results", "run")
    resume: bool = setting(True, "go on with the evaluation in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("examples", "batch_size", "epochs"):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.integer("seed", self.seed, at_most=2**32 - 1)
        checks.number("eps", self.eps, at_least=0)
        if "autoattack" in self.attack and len(self.attack) > 1:
            raise ValueError(
                f"attack must be autoattack alone or a list without it, got {','.join(self.attack)}"
            )


PRESETS = {
    "small": Settings(
        checkpoint=None,
        epochs=12,
        examples=500,
        eps=0.2,
        batch_size=100,
        workdir="runs/evaluate/small",
    ),
    "paper": Settings(),
}
# What trains the network of the small preset.
DEMO = dataclasses.replace(
    adversarial_training.PRESETS["small"],
    objective=("madry",),
    eps_warmup=5,
    test_steps=10,
    test_restarts=1,
    checkpoint_every=6,
    resume=True,
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, and examples that it has not seen."""

    logits_fn: Any
    name: str
    examples: data.Dataset


def main(settings: Settings) -> dict[str, Any] | None:
    """Runs or resumes the evaluation of these settings; returns what ``results.json`` holds."""
    threat = ThreatModel(choices.NORMS[settings.threat], settings.eps)
    if settings.dry_run:
        dry_run(settings, threat)
        return None
    config = dataclasses.asdict(settings)
    for name in ("workdir", "resume", "dry_run", "data_dir"):
        del config[name]
    workdir = report.open_workdir(settings.workdir, config, resume=settings.resume)
    tested = subject(settings, workdir)
    x = data.as_float(tested.examples.image)
    y = tested.examples.label
    threat = ThreatModel(threat.norm, threat.eps, *data.bounds(x.shape[1:]))
    report.print_lines(
        f"{tested.name}: {len(y)} examples of {tested.examples.name}, {settings.split}; "
        f"{settings.threat} eps = {settings.eps:.4g}"
    )
    result = benchmark(
        tested.logits_fn,
        x,
        y,
        threat,
        _attacks(settings),
        seed=settings.seed,
        batch_size=batch_sizes.for_evaluation(settings.batch_size),
        state_path=workdir / "state.npz",
        on_attack=_print_attack,
        model_name=tested.name,
        dataset=tested.examples.name,
    )
    if report.is_writer():
        report.write_json(workdir / "results.json", result.to_json())
        outcome = result.outcome
        np.savez(workdir / "adversarial.npz", x_adv=outcome.x_adv, robust=outcome.robust, y=y)
        if x.ndim == 4:
            _panel(settings, tested, result, x, y, workdir)
    _print_result(settings, result)
    return result.to_json()


def _attacks(settings: Settings) -> str | dict[str, Any]:
    if settings.attack == ("autoattack",):
        return settings.version
    return {name: choices.EVALUATION_ATTACKS[name] for name in settings.attack}


def subject(settings: Settings, workdir: Path) -> Subject:
    """The model and the examples of these settings; trains the model if that is asked for."""
    if settings.torch_checkpoint:
        return _imported(settings)
    directory = settings.checkpoint or _trained_here(settings, workdir)
    trained = trained_models.load(directory, settings.which, data_dir=settings.data_dir)
    own = trained.settings
    if settings.dataset:
        own = dataclasses.replace(own, dataset=settings.dataset)
    examples = trained_models.evaluation_set(own, settings.split, settings.examples)
    return Subject(trained.logits_fn, trained.name, examples)


def _trained_here(settings: Settings, workdir: Path) -> str:
    """The folder of the small preset's own network, trained if it is not there yet."""
    if settings.dataset not in (None, DEMO.dataset):
        raise ValueError(
            f"dataset must be {DEMO.dataset} when the model is trained here, "
            f"got {settings.dataset}: give a --checkpoint"
        )
    training_settings = _demo(settings, workdir)
    directory = Path(training_settings.workdir) / training_settings.objective[0]
    if not (directory / "results.json").exists():
        adversarial_training.main(training_settings)
    return str(directory)


def _demo(settings: Settings, workdir: Path) -> TrainingSettings:
    # The folder of an evaluation may hold nothing else when it is opened: beside it.
    folder = workdir.with_name(workdir.name + "_model")
    warmup = min(DEMO.eps_warmup, settings.epochs)
    return dataclasses.replace(DEMO, epochs=settings.epochs, eps_warmup=warmup, workdir=str(folder))


def _imported(settings: Settings) -> Subject:
    dataset = settings.dataset or "cifar10"
    own = TrainingSettings(dataset=dataset, data_dir=settings.data_dir)
    examples = trained_models.evaluation_set(own, settings.split, settings.examples)
    module = choices.MODELS[settings.model](examples.num_classes, None, "batch", jnp.float32)
    state_dict = import_torch.read_state_dict(settings.torch_checkpoint)
    channels = examples.image.shape[-1]
    module, params, model_state = import_torch.convert(state_dict, module, image_channels=channels)
    logits_fn = models.eval_logits(models.from_linen(module).apply, params, model_state)
    return Subject(
        logits_fn, f"{Path(settings.torch_checkpoint).name} ({settings.model})", examples
    )


def _panel(settings, subject, result: BenchmarkResult, x, y, workdir: Path) -> None:
    outcome = result.outcome
    broken = np.flatnonzero(outcome.correct & ~outcome.robust)
    shown = broken if len(broken) else np.arange(len(y))
    shown = shown[np.linspace(0, len(shown) - 1, min(8, len(shown))).astype(int)]
    found = jnp.asarray(outcome.x_adv[shown])
    panel = training.adversarial_panel(
        parallel.to_host(subject.logits_fn),
        lambda logits_fn, key, x, y: found,
        jax.random.key(settings.seed),
        jnp.asarray(x[shown]),
        jnp.asarray(y[shown]),
    )
    title = f"{','.join(settings.attack)}, {settings.threat}, eps = {settings.eps:.4g}"
    figures.image_panel(panel, workdir / "panel.png", title=title)


def _print_attack(record: AttackRecord) -> None:
    report.print_lines(
        f"{record.name}: {report.percent(record.robust_accuracy)} robust, "
        f"{record.broken} of {record.attacked} broken, {record.seconds:.1f} s"
    )


def _print_result(settings: Settings, result: BenchmarkResult) -> None:
    rows = [["clean", "", "", report.percent(result.clean_accuracy), "", ""]]
    rows += [
        [
            a.name,
            a.attacked,
            a.broken,
            report.percent(a.robust_accuracy),
            f"{a.seconds:.1f}",
            f"{a.compile_seconds:.1f}",
        ]
        for a in result.attacks
    ]
    rows.append(["verified", "", "", report.percent(result.robust_accuracy), "", ""])
    report.print_table(
        f"{result.model}: {result.examples} examples, {result.norm} eps = {result.eps:.4g}",
        ["attack", "attacked", "broken", "accuracy", "seconds", "of them compiling"],
        rows,
    )
    for flag in result.flags:
        report.print_lines(f"warning ({flag.name}): {flag.message}")
    report.print_lines(f"results, adversarial examples and figure: {settings.workdir}")


def dry_run(settings: Settings, threat: ThreatModel) -> None:
    """Builds the model abstractly and prints what the evaluation costs at most."""
    if settings.torch_checkpoint:
        own = TrainingSettings(dataset=settings.dataset or "cifar10", model=settings.model)
    elif settings.checkpoint is None:
        own = _demo(settings, Path(settings.workdir))
    elif (Path(settings.checkpoint) / report.CONFIG).exists():
        own = trained_models.read_settings(settings.checkpoint)
    else:
        own = TrainingSettings()  # what such a run has if no flag changed it
    dataset = settings.dataset or own.dataset
    facts = choices.DATA_FACTS.get(dataset)
    if facts is None:
        test = data.load(dataset, settings.split, data_dir=settings.data_dir)
        facts = choices.DataFacts(test.image.shape[1:], test.num_classes, len(test))
    make = choices.MODELS[own.model]
    module = make(facts.num_classes, own.width, own.normalization, jnp.float32)
    model = models.from_linen(module)
    n = settings.batch_size
    image = jax.ShapeDtypeStruct((n, *facts.image_shape), jnp.float32)
    params, model_state = jax.eval_shape(model.init, jax.random.key(0), image)

    def forward(params, model_state, x):
        return model.apply(params, model_state, x, False, None)[0]

    gradient = jax.grad(lambda x, p, s: forward(p, s, x).sum())
    costs = {
        "query": training.count_flops(forward, params, model_state, image),
        "gradient": training.count_flops(gradient, image, params, model_state),
    }
    chosen = _attacks(settings)
    makers = ensemble(chosen, facts.num_classes) if isinstance(chosen, str) else chosen
    rows = []
    for attack_name, make in makers.items():
        attack = make(threat)
        rounds = getattr(attack, "rounds", None)
        if rounds is None:
            rows.append([attack_name, "whole", "", "", ""])
            continue
        kind = "query" if attack_name in ("square", "simba") else "gradient"
        flops = costs[kind] / n * rounds * attack.steps * settings.examples
        rows.append([attack_name, rounds, attack.steps, kind, f"{flops:.3e}"])
    report.print_table(
        f"Dry run: {own.model}, {training.parameter_count(params):,} parameters, {dataset}, "
        f"{settings.examples} examples, {settings.threat} eps = {settings.eps:.4g}",
        ["attack", "rounds", "steps", "step", "FLOPs if no example breaks"],
        rows,
    )
    if settings.checkpoint is None and not settings.torch_checkpoint:
        report.print_lines(*misfits([("the network that is trained first", own)]))


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
