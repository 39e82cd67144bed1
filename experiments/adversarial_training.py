"""Adversarial training, end to end: trains, selects on validation data, evaluates, reports.

Trains one model for each objective, side by side in one folder. Each is evaluated on the test
set, clean and under PGD-50 with 10 restarts, at the checkpoint that was best on the validation
set and at the last one.

  python -m experiments.adversarial_training                      MNIST-5k on a laptop, 2 minutes
  python -m experiments.adversarial_training --preset=paper       PreAct-ResNet-18 on CIFAR-10
  python -m experiments.adversarial_training --preset=paper --dry_run     builds all, runs nothing

The folder of a run, WORKDIR/OBJECTIVE, holds config.json, metrics.jsonl, tensorboard/,
checkpoints/, results.json, curves.png and panel.png; WORKDIR has config.json and results.json of
all. A run that was interrupted goes on with --resume and ends with the same numbers.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import choices, command_line
from experiments.command_line import setting
from robustjax import attacks, checks, data, losses, models, objectives, training
from robustjax.threat import ThreatModel
from robustjax.training import checkpoint, feed, figures, parallel, report


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set, checked when it is made. The defaults are those of ``--preset=paper``.

    Raises:
      ValueError: a setting is out of range or not among its choices. What depends on the data or
        the devices is checked before a run begins.
    """

    # fmt: off
    dataset: str = setting(
        "cifar10", "digits, mnist5k, npz:FILE, folder:DIR or a TFDS name such as cifar10", "data")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "data")
    validation_size: int | None = setting(
        1000, "examples held out of the training set; None: what comes with the set", "data",
        unit="examples")
    augmentation: str = setting(
        "crop_and_flip", "per-example augmentation", "data", choices=("none", "crop_and_flip"))
    placement: str = setting(
        "device", "where the training set lives", "data", choices=("device", "host"))
    model: str = setting("preact_resnet18", "architecture", "model", choices=tuple(choices.MODELS))
    width: int | None = setting(
        None, "base width (widening factor of wrn); None: the published one", "model",
        unit="channels")
    normalization: str = setting(
        "batch", "normalisation layers of residual networks", "model",
        choices=("batch", "group", "none"))
    precision: str = setting(
        "bfloat16", "computation in training; parameters, statistics and evaluation are float32",
        "model", choices=tuple(choices.PRECISIONS))
    objective: tuple[str, ...] = setting(
        ("madry",), "what is minimised; several, by commas, train side by side", "objective",
        choices=choices.OBJECTIVES)
    beta: float = setting(6.0, "weight of the divergence in TRADES", "objective")
    norm: str = setting(
        "linf", "norm of the threat model", "threat model", choices=tuple(choices.NORMS))
    eps: float = setting(8 / 255, "radius of the threat model", "threat model", unit="input units")
    eps_warmup: int = setting(
        0, "training starts at radius 0, which grows linearly to eps over these", "threat model",
        unit="epochs")
    attack: str = setting("pgd", "attack in training (madry)", "attack", choices=choices.ATTACKS)
    attack_steps: int = setting(10, "steps of the attack in training", "attack")
    attack_step_size: float | None = setting(
        2 / 255, "length of a step; None: that of the attack", "attack", unit="input units")
    attack_start: str = setting(
        "uniform", "where PGD starts in training", "attack", choices=("zero", "uniform"))
    attack_mode: str = setting(
        "eval", "mode of the model during the attack in training", "attack",
        choices=("eval", "train"))
    optimizer: str = setting("sgd", "optimizer", "optimizer", choices=choices.OPTIMIZERS)
    learning_rate: float = setting(0.1, "largest learning rate", "optimizer")
    momentum: float = setting(0.9, "momentum of sgd", "optimizer")
    weight_decay: float = setting(5e-4, "weight decay, coupled (but for adamw)", "optimizer")
    schedule: str = setting(
        "piecewise", "schedule of the learning rate", "optimizer", choices=choices.SCHEDULES)
    milestones: tuple[int, ...] = setting(
        (75, 90), "where a piecewise schedule falls", "optimizer", unit="epochs")
    decay: float = setting(0.1, "factor at a milestone", "optimizer")
    epochs: int = setting(120, "passes over the training set", "run", unit="epochs")
    batch_size: int = setting(128, "global batch size", "run", unit="examples")
    seed: int = setting(0, "seed of everything random", "run")
    workdir: str = setting(
        "runs/adversarial_training/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    dispatch: int = setting(50, "training steps per call of the compiled function, at most", "run")
    checkpoint_every: int = setting(1, "validation and checkpoint", "run", unit="epochs")
    validation_steps: int = setting(
        20, "steps of PGD on the validation set, of length eps/10, on the margin loss",
        "evaluation")
    test_steps: int = setting(
        50, "steps of PGD on the test set, of length eps/4", "evaluation")
    test_restarts: int = setting(10, "restarts of PGD on the test set", "evaluation")
    test_batch_size: int = setting(
        1000, "batch size of evaluation", "evaluation", unit="examples")
    distributed: bool = setting(
        False, "start jax.distributed: one process per host, same flags on each", "hosts")
    coordinator_address: str | None = setting(
        None, "HOST:PORT of the first process; None: found by JAX on TPU and Slurm", "hosts")
    num_processes: int | None = setting(None, "number of processes; None: found by JAX", "hosts")
    process_id: int | None = setting(None, "number of this process; None: found by JAX", "hosts")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        if len(set(self.objective)) < len(self.objective):
            raise ValueError(f"objective must name each one once, got {','.join(self.objective)}")
        for name in ("attack_steps", "validation_steps", "test_steps", "epochs", "eps_warmup"):
            checks.integer(name, getattr(self, name))
        for name in (
            "batch_size", "test_batch_size", "test_restarts", "dispatch", "checkpoint_every",
        ):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        checks.integer("seed", self.seed, at_most=2**32 - 1)
        if self.width is not None:
            checks.integer("width", self.width, at_least=1)
        if self.validation_size is not None:
            checks.integer("validation_size", self.validation_size)
        for name in ("eps", "beta", "weight_decay", "decay"):
            checks.number(name, getattr(self, name), at_least=0)
        if self.attack_step_size is not None:
            checks.number("attack_step_size", self.attack_step_size, at_least=0)
        checks.number("learning_rate", self.learning_rate, above=0)
        checks.number("momentum", self.momentum, at_least=0, below=1)
        for before, epoch in zip((0, *self.milestones), self.milestones, strict=False):
            if checks.integer("milestones", epoch) <= before:
                raise ValueError(f"milestones must rise from 1 on, got {self.milestones}")
        for name in ("coordinator_address", "num_processes", "process_id"):
            if getattr(self, name) is not None and not self.distributed:
                raise ValueError(f"{name} needs distributed, got {getattr(self, name)} without it")


PRESETS = {
    "small": Settings(
        dataset="mnist5k",
        validation_size=None,
        augmentation="none",
        model="small_cnn",
        normalization="none",
        precision="float32",
        objective=("standard", "madry"),
        eps=0.2,
        attack_steps=7,
        attack_step_size=0.05,
        eps_warmup=10,
        optimizer="adam",
        learning_rate=2e-3,
        weight_decay=0.0,
        schedule="cosine",
        milestones=(),
        epochs=30,
        batch_size=100,
        checkpoint_every=3,
        test_batch_size=100,
        workdir="runs/adversarial_training/small",
    ),
    "paper": Settings(),
}

# Vanilla adversarial training with momentum SGD, ResNet-18 on CIFAR-10: Dabouei et al. (2022),
# "Revisiting outer optimization in adversarial training", Table 2, in per cent. "pgd20" is under
# the margin loss, as in validation here.
PUBLISHED = {("madry", "best", "clean"): 84.70, ("madry", "best", "pgd20"): 50.87,
             ("madry", "last", "pgd20"): 44.15}  # fmt: skip


# Settings that say where and how a run is started, not what it computes: they may change when it is
# resumed.
NOT_OF_THE_RUN = ("workdir", "resume", "dry_run", "data_dir", "distributed", "coordinator_address",
                  "num_processes", "process_id")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parts:
    """What settings build: the functions of a run."""

    model: models.Model
    exact_model: models.Model
    optimizer: optax.GradientTransformation
    step: Any
    threat: ThreatModel
    steps_per_epoch: int


def build(settings: Settings, objective: str, train_size: int, num_classes: int) -> Parts:
    """Turns the names of the settings into functions; computes nothing."""
    threat = ThreatModel(choices.NORMS[settings.norm], settings.eps)

    def model(dtype):
        make = choices.MODELS[settings.model]
        return models.from_linen(make(num_classes, settings.width, settings.normalization, dtype))

    steps_per_epoch = data.steps_per_epoch(train_size, settings.batch_size)
    optimizer = choices.make_optimizer(
        settings.optimizer,
        choices.make_schedule(
            settings.schedule,
            learning_rate=settings.learning_rate,
            epochs=settings.epochs,
            steps_per_epoch=steps_per_epoch,
            milestones=settings.milestones,
            decay=settings.decay,
        ),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )

    def objective_at(scale):
        """The objective with radius and step scaled, for the warm-up."""
        size = settings.attack_step_size
        size = None if size is None else scale * size
        now = ThreatModel(threat.norm, scale * settings.eps)
        attack = choices.make_attack(
            settings.attack,
            now,
            steps=settings.attack_steps,
            step_size=size,
            start=settings.attack_start,
        )
        return choices.make_objective(
            objective,
            now,
            attack,
            steps=settings.attack_steps,
            step_size=size,
            beta=settings.beta,
            attack_mode=settings.attack_mode,
        )

    warmup = settings.eps_warmup * steps_per_epoch
    growth = optax.linear_schedule(0.0, 1.0, warmup)
    compute_model = model(choices.PRECISIONS[settings.precision])
    step = training.train_step(
        compute_model.apply,
        objectives.scheduled(objective_at, growth) if warmup else objective_at(1.0),
        optimizer,
        augment=data.crop_and_flip(4) if settings.augmentation == "crop_and_flip" else None,
        axis_name=parallel.AXIS,
    )
    return Parts(compute_model, model(jnp.float32), optimizer, step, threat, steps_per_epoch)


def test_attacks(settings: Settings, threat: ThreatModel) -> dict[str, attacks.Attack]:
    """The attacks of the final evaluation: that of validation, and PGD with restarts.

    An example counts as robust only if it withstands every restart.
    """
    restarted = attacks.pgd(
        threat,
        steps=settings.test_steps,
        step_size=threat.eps / 4,
        restarts=settings.test_restarts,
        select="any",
    )
    return {
        **validation_attacks(settings, threat),
        f"pgd{settings.test_steps}-{settings.test_restarts}": restarted,
    }


def validation_attacks(settings: Settings, threat: ThreatModel) -> dict[str, attacks.Attack]:
    """PGD on the margin loss, as in Dabouei et al. (2022), section 4.1: steps of eps / 10."""
    attack = attacks.pgd(
        threat, steps=settings.validation_steps, step_size=threat.eps / 10, loss=losses.margin
    )
    return {f"pgd{settings.validation_steps}": attack}


def run_objective(
    settings: Settings, objective: str, splits: Mapping[str, data.Dataset], workdir: Path
) -> dict[str, Any]:
    """Trains and evaluates one model; returns what ``results.json`` holds."""
    mesh = parallel.device_mesh()
    train = splits["train"]
    parts = build(settings, objective, len(train), train.num_classes)
    began = time.monotonic()
    init_key, run_key, order_key, test_key = jax.random.split(jax.random.key(settings.seed), 4)
    image_shape = np.asarray(train[0]["image"]).shape
    params, model_state = jax.jit(lambda key: parts.model.init(key, jnp.zeros((1, *image_shape))))(
        init_key
    )
    fresh = training.create_state(params, model_state, parts.optimizer, run_key)
    fresh = parallel.replicate(fresh, mesh)

    report.print_lines(
        f"{objective}: {settings.model}, {training.parameter_count(params):,} parameters; "
        f"{len(train):,} training images, {parts.steps_per_epoch} steps an epoch, "
        f"{settings.epochs} epochs; {mesh.size} x {mesh.devices.flat[0].device_kind}"
    )
    chosen_by = "clean" if objective == "standard" else f"pgd{settings.validation_steps}"
    validate = training.make_evaluator(
        parts.exact_model.apply, validation_attacks(settings, parts.threat), mesh
    )
    total = settings.epochs * parts.steps_per_epoch
    with checkpoint.open_checkpoints(workdir / "checkpoints", best_metric=chosen_by) as manager:
        resumed = settings.resume and manager.latest_step() is not None
        state = checkpoint.restore(manager, fresh) if resumed else fresh
        progress = report.Progress(total, start=int(state.step), label=objective)
        with report.MetricsWriter(workdir, from_step=int(state.step)) as writer:

            def on_dispatch(step: int, metrics: dict[str, np.ndarray]) -> None:
                means = {name: float(values.mean()) for name, values in metrics.items()}
                writer.write(step, "train", means)
                progress(step, {name: means[name] for name in ("loss",)})

            def on_epoch(epoch: int, state: training.TrainState) -> None:
                if epoch % settings.checkpoint_every and epoch != settings.epochs:
                    return
                verdicts = validate(
                    state.params,
                    state.model_state,
                    test_key,
                    data.eval_batches(splits["validation"], settings.test_batch_size),
                )
                accuracies = {name: float(v.mean()) for name, v in verdicts.items()}
                writer.write(int(state.step), "validation", accuracies)
                progress(int(state.step), accuracies, keep=True)
                checkpoint.save(manager, state, accuracies)

            last = training.fit(
                state,
                _advance(settings, parts, train, order_key, mesh),
                epochs=settings.epochs,
                steps_per_epoch=parts.steps_per_epoch,
                dispatch=training.steps_per_dispatch(parts.steps_per_epoch, settings.dispatch),
                on_dispatch=on_dispatch,
                on_epoch=on_epoch,
            )
        manager.wait_until_finished()
        best_step = manager.best_step()
        best = last
        if best_step is not None and best_step != int(last.step):
            best = checkpoint.restore(manager, fresh, step=best_step)

    evaluate = training.make_evaluator(
        parts.exact_model.apply, test_attacks(settings, parts.threat), mesh
    )
    results: dict[str, Any] = {
        "objective": objective,
        "parameters": training.parameter_count(params),
        "chosen_by": chosen_by,
        "test_examples": len(splits["test"]),
    }
    for name, state in {"best": best, "last": last}.items():
        if name == "last" and int(best.step) == int(last.step):
            results["last"] = results["best"]
            continue
        test = data.eval_batches(splits["test"], settings.test_batch_size)
        verdicts = evaluate(state.params, state.model_state, test_key, test)
        results[name] = {
            "step": int(state.step),
            **{attack: float(correct.mean()) for attack, correct in verdicts.items()},
        }
    results["seconds"] = round(time.monotonic() - began, 1)
    results["versions"] = {m.__name__: m.__version__ for m in (jax, flax, optax)}
    results["devices"] = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    if report.is_writer():
        figures.training_curves(
            report.read_metrics(workdir), workdir / "curves.png", title=f"{objective} training"
        )
        _panel(settings, objective, parts, best, splits["test"], test_key, workdir)
        report.write_json(workdir / "results.json", results)
    return results


def _advance(settings, parts, train, key, mesh):
    if settings.placement == "device":
        return feed.resident(parts.step, train, key=key, batch_size=settings.batch_size, mesh=mesh)
    return feed.streamed(
        parts.step,
        lambda start: data.host_batches(
            train, batch_size=settings.batch_size, seed=settings.seed, start_step=start
        ),
        steps_per_epoch=parts.steps_per_epoch,
        mesh=mesh,
    )


def _panel(settings, objective, parts, state, test, key, workdir) -> None:
    params, model_state = parallel.to_host((state.params, state.model_state))
    shown = [test[i] for i in range(min(8, len(test)))]
    images = jnp.asarray(data.as_float(np.stack([example["image"] for example in shown])))
    labels = jnp.asarray([int(example["label"]) for example in shown], jnp.int32)
    attack = attacks.pgd(parts.threat, steps=settings.test_steps, step_size=parts.threat.eps / 4)
    logits_fn = models.eval_logits(parts.exact_model.apply, params, model_state)
    panel = training.adversarial_panel(logits_fn, attack, key, images, labels)
    title = f"{objective}: PGD-{settings.test_steps}, {settings.norm}, eps = {settings.eps:.4g}"
    figures.image_panel(panel, workdir / "panel.png", title=title)


def dry_run(settings: Settings) -> None:
    """Builds everything abstractly, checks shapes and prints what a run would cost."""
    if settings.dataset in choices.DATA_FACTS:
        facts = choices.DATA_FACTS[settings.dataset]
        held_out = settings.validation_size or 0
        checks.integer("validation_size", held_out, at_most=facts.train_size - 1)
        train_size = facts.train_size - held_out
    else:
        train = _load(settings, "train")
        image_shape = np.asarray(train[0]["image"]).shape
        facts = choices.DataFacts(image_shape, train.num_classes, len(train))
        train_size = len(train)
    rows = []
    for objective in settings.objective:
        parts = build(settings, objective, train_size, facts.num_classes)
        n = settings.batch_size
        image = jax.ShapeDtypeStruct((n, *facts.image_shape), jnp.float32)
        integers = jax.ShapeDtypeStruct((n,), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        params, model_state = jax.eval_shape(parts.model.init, key, image)
        state = jax.eval_shape(
            lambda p, s, k, parts=parts: training.create_state(p, s, parts.optimizer, k),
            params,
            model_state,
            key,
        )
        batch = {"image": image, "label": integers, "index": integers}
        # The step names the mesh axis; vmap over one device's share binds it without devices.
        per_device = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
        step = jax.vmap(parts.step, in_axes=(None, 0), axis_name=parallel.AXIS)
        flops = training.count_flops(step, state, per_device)
        total = settings.epochs * parts.steps_per_epoch
        rows.append(
            [
                objective,
                settings.model,
                f"{training.parameter_count(params):,}",
                f"{total:,} ({settings.epochs} x {parts.steps_per_epoch})",
                f"{flops:.3e}",
                f"{flops * total:.3e}",
            ]
        )
    report.print_table(
        f"Dry run: {settings.dataset}, batch {settings.batch_size}, {settings.norm} "
        f"eps = {settings.eps:.4g}",
        ["objective", "model", "parameters", "steps", "FLOPs a step", "FLOPs of training"],
        rows,
    )


def main(settings: Settings) -> None:
    """Runs or resumes the experiment of these settings."""
    if settings.distributed:
        jax.distributed.initialize(
            settings.coordinator_address, settings.num_processes, settings.process_id
        )
    if settings.dry_run:
        dry_run(settings)
        return
    for name in ("batch_size", "test_batch_size"):
        checks.divisible(name, getattr(settings, name), "the number of devices", jax.device_count())
    config = dataclasses.asdict(settings)
    for name in NOT_OF_THE_RUN:
        del config[name]
    splits = {split: _load(settings, split) for split in ("train", "validation", "test")}
    for objective in settings.objective:
        build(settings, objective, len(splits["train"]), splits["train"].num_classes)
    workdir = report.open_workdir(settings.workdir, config, resume=settings.resume)
    results = {}
    for objective in settings.objective:
        own = report.open_workdir(
            workdir / objective, {**config, "objective": [objective]}, resume=settings.resume
        )
        results[objective] = run_objective(settings, objective, splits, own)
    if report.is_writer():
        report.write_json(workdir / "results.json", results)
    _print_results(settings, results)


def _load(settings: Settings, split: str) -> data.Dataset:
    read = data.load if settings.placement == "device" else data.load_source
    return read(
        settings.dataset,
        split,
        data_dir=settings.data_dir,
        validation_size=settings.validation_size,
    )


def _is_published_setting(settings: Settings) -> bool:
    free = ("seed", "test_batch_size", "dispatch", "placement", *NOT_OF_THE_RUN)
    return settings == dataclasses.replace(
        PRESETS["paper"], **{name: getattr(settings, name) for name in free}
    )


def _print_results(settings: Settings, results: Mapping[str, Any]) -> None:
    names = [name for name in next(iter(results.values()))["best"] if name != "step"]
    rows = []
    for objective, result in results.items():
        for which in ("best", "last"):
            shown = []
            for name in names:
                text = report.percent(result[which][name])
                published = PUBLISHED.get((objective, which, name))
                if published and _is_published_setting(settings):
                    text += f" ({published})"
                shown.append(text)
            rows.append([objective, f"{which}, step {result[which]['step']}", *shown])
    test_examples = next(iter(results.values()))["test_examples"]
    note = "; in parentheses: published, %" if _is_published_setting(settings) else ""
    report.print_table(
        f"{settings.dataset}, {test_examples} test examples, {settings.norm} "
        f"eps = {settings.eps:.4g}{note}",
        ["objective", "checkpoint", *names],
        rows,
    )
    report.print_lines(f"figures, metrics and checkpoints: {settings.workdir}/OBJECTIVE")


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
