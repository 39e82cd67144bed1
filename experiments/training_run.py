"""One training run from its settings: build the parts, train, validate, evaluate, report."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import (
    batch_sizes,
    choices,
    fine_tuning,
    training_cost,
    training_fit,
    training_measures,
)
from experiments.training_settings import Settings
from robustjax import (
    attacks,
    data,
    gradients,
    models,
    objectives,
    parallel,
    training,
)
from robustjax.threat import ThreatModel
from robustjax.training import feed, figures, report


def load_split(settings: Settings, split: str) -> data.Dataset | data.Source:
    """A split of the settings' data set: in memory, or read from disk example by example."""
    read = data.load if settings.placement == "device" else data.load_source
    return read(
        settings.dataset,
        split,
        data_dir=settings.data_dir,
        validation_size=settings.validation_size,
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What settings build: the functions of a run."""

    model: models.Model
    exact_model: models.Model
    optimizer: optax.GradientTransformation
    oracle: gradients.Oracle
    objective: objectives.Objective
    step: Any
    threat: ThreatModel
    steps_per_epoch: int


def squared(settings: Settings, source: data.Dataset | data.Source) -> data.Dataset | data.Source:
    """A set as it is evaluated: the middle of its images, if the settings give them a size."""
    if settings.image_size is None:
        return source
    return data.mapped(source, data.center_crop(settings.image_size))


def facts_of(settings: Settings, train: data.Dataset | data.Source) -> choices.DataFacts:
    """What ``build`` must know of the training set."""
    shape = np.asarray(squared(settings, train)[0]["image"]).shape
    return choices.DataFacts(shape, train.num_classes, len(train))


def module_of(
    settings: Settings, facts: choices.DataFacts, dtype: Any, *, axis_name: str | None = None
) -> nn.Module:
    """The network of the settings, computing in ``dtype``.

    In training mode BatchNorm, if it has any, takes its statistics over ``axis_name`` together.
    """
    make = choices.MODELS[settings.model]
    module = make(facts.num_classes, settings.width, settings.normalization, dtype)
    if axis_name is not None and hasattr(module, "axis_name"):  # a field where BatchNorm may be
        module = module.clone(axis_name=axis_name)
    return module


def build(settings: Settings, objective: str, facts: choices.DataFacts) -> Parts:
    """Turns the names of the settings into functions; computes nothing."""
    threat = ThreatModel(
        choices.NORMS[settings.norm], settings.eps, *data.bounds(facts.image_shape)
    )
    # With sharded parameters the step is written for the whole batch, and has no axis.
    axis = parallel.AXIS if settings.parameters == "replicated" else None
    if len(facts.image_shape) == 2 and (settings.augmentation, settings.image_filter) != (
        "none",
        "none",
    ):
        raise ValueError(
            "augmentation and image_filter must be none for waveforms, got "
            f"{settings.augmentation} and {settings.image_filter}"
        )

    def model(dtype, axis_name=None):
        found = models.from_linen(module_of(settings, facts, dtype, axis_name=axis_name))
        return fine_tuning.frozen_encoder(found) if settings.frozen == "encoder" else found

    steps_per_epoch = data.steps_per_epoch(facts.train_size, settings.batch_size)
    optimizer = choices.make_optimizer(
        settings.optimizer,
        choices.make_schedule(
            settings.schedule,
            learning_rate=settings.learning_rate,
            epochs=settings.epochs,
            steps_per_epoch=steps_per_epoch,
            milestones=settings.milestones,
            decay=settings.decay,
            peak=settings.cycle_peak,
            end=settings.cycle_end,
            warmup=settings.rate_warmup,
        ),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        max_norm=settings.max_norm,
    )
    if settings.frozen == "encoder":
        optimizer = fine_tuning.only_head(optimizer)
    warmup = settings.eps_warmup * steps_per_epoch
    growth = optax.linear_schedule(0.0, 1.0, warmup)
    oracle = choices.make_oracle(
        settings.oracle,
        alpha=settings.alpha,
        alpha_naive=settings.alpha_naive,
        tau=settings.tau,
        norm_rule=settings.norm_rule,
        awp=settings.awp,
        awp_warmup=settings.awp_warmup * steps_per_epoch,
        axis_name=axis,
        threat=threat,
        batch_shape=(settings.batch_size, *facts.image_shape),
        replays=settings.replays,
        growth=growth if warmup else None,
        penalty_norm=settings.penalty_bound if settings.penalty_clip == "gradient" else None,
    )

    def objective_at(scale):
        """The objective with radius and step scaled, for the warm-up."""
        size = settings.attack_step_size
        size = None if size is None else scale * size
        now = threat
        if settings.warmup == "radius":
            now = dataclasses.replace(threat, eps=scale * settings.eps)
        attack = choices.make_attack(
            settings.attack,
            now,
            steps=settings.attack_steps,
            step_size=size,
            start=settings.attack_start,
            rule=settings.attack_rule,
        )
        plain = choices.make_objective(
            objective,
            now,
            attack,
            steps=settings.attack_steps,
            step_size=size,
            beta=settings.beta,
            attack_mode=settings.attack_mode,
            rule=settings.attack_rule,
            max_margin=settings.max_margin,
            point=settings.evaluation_point,
            weight=settings.penalty_weight,
            clip=settings.penalty_bound if settings.penalty_clip == "value" else None,
        )
        return choices.add_penalty(plain, settings.penalty, settings.penalty_weight, now)

    together = axis if settings.batch_statistics == "synchronised" else None
    compute_model = model(choices.PRECISIONS[settings.precision], together)
    final = objective_at(1.0)
    step = training.train_step(
        compute_model.apply,
        objectives.scheduled(objective_at, growth) if warmup and objective != "standard" else final,
        optimizer,
        oracle=oracle,
        augment=choices.make_augmentation(
            settings.augmentation,
            image_filter=settings.image_filter,
            removed=settings.filter_removed,
        ),
        replays=replays_of(settings),
        axis_name=axis,
    )
    return Parts(
        compute_model, model(jnp.float32), optimizer, oracle, final, step, threat, steps_per_epoch
    )


def replays_of(settings: Settings) -> int:
    """Steps on each minibatch."""
    return settings.replays if settings.oracle == "free" else 1


def selection_metric(settings: Settings, objective: str) -> str:
    """What the best checkpoint is best at."""
    robust = objective != "standard" or settings.oracle == "free"
    return f"pgd{settings.validation_steps}" if robust else "clean"


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
        **training_measures.validation_attacks(settings, threat),
        f"pgd{settings.test_steps}-{settings.test_restarts}": restarted,
    }


def run_objective(
    settings: Settings,
    objective: str,
    splits: Mapping[str, data.Dataset],
    workdir: Path,
    start: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates one model; returns what ``results.json`` holds.

    ``start`` are parameters and statistics to begin with, in place of random ones; those of a layer
    that is not among them are random.
    """
    mesh = parallel.device_mesh()
    train = splits["train"]
    facts = facts_of(settings, train)
    parts = build(settings, objective, facts)
    began = time.monotonic()

    @jax.jit  # one program: a start would wait for each small one
    def begin(start):
        init_key, run_key, *other_keys = jax.random.split(jax.random.key(settings.seed), 4)
        params, model_state = parts.model.init(init_key, jnp.zeros((1, *facts.image_shape)))
        if start is not None:
            params, model_state = {**params, **start[0]}, {**model_state, **start[1]}
        state = training.create_state(
            params, model_state, parts.optimizer, run_key, oracle=parts.oracle
        )
        return state, other_keys

    fresh, (order_key, test_key) = begin(start)
    specs = parallel.shard_specs(fresh, mesh) if settings.parameters == "sharded" else None
    fresh = parallel.place(fresh, mesh, specs)
    chosen_by = selection_metric(settings, objective)
    advance = _advance(settings, parts, train, order_key, mesh, specs)

    def announce(state: training.TrainState) -> None:
        report.print_lines(
            *training_cost.described(settings, objective, facts, parts, state, advance)
        )

    best, last = training_fit.fit_saved(
        settings,
        objective,
        fresh,
        advance,
        training_measures.make_measure(
            settings,
            parts.objective,
            parts.exact_model,
            parts.threat,
            {**splits, "train": squared(settings, train)},
            test_key,
            mesh,
        ),
        workdir,
        steps_per_epoch=parts.steps_per_epoch,
        best_metric=chosen_by,
        announce=announce,
    )

    evaluate = training.make_evaluator(
        parts.exact_model.apply, test_attacks(settings, parts.threat), mesh
    )
    attacked = splits["test"]
    if settings.robust_examples is not None:
        attacked = attacked.subset(np.arange(min(settings.robust_examples, len(attacked))))
    evaluate_clean = None
    if len(attacked) < len(splits["test"]):
        evaluate_clean = training.make_evaluator(parts.exact_model.apply, {}, mesh)
    results: dict[str, Any] = {
        "objective": objective,
        "parameters": training.parameter_count(best.params),
        "chosen_by": chosen_by,
        "test_examples": len(splits["test"]),
        "attacked_examples": len(attacked),
    }
    batch_size = batch_sizes.for_evaluation(settings.test_batch_size, mesh.size)
    for name, state in {"best": best, "last": last}.items():
        if name == "last" and int(best.step) == int(last.step):
            results["last"] = results["best"]
            continue
        test = data.eval_batches(attacked, batch_size)
        verdicts = evaluate(state.params, state.model_state, test_key, test)
        if evaluate_clean is not None:
            whole = data.eval_batches(splits["test"], batch_size)
            verdicts |= evaluate_clean(state.params, state.model_state, test_key, whole)
        results[name] = {
            "step": int(state.step),
            **{attack: float(correct.mean()) for attack, correct in verdicts.items()},
        }
    results["seconds"] = round(time.monotonic() - began, 1)
    results["versions"] = {m.__name__: m.__version__ for m in (jax, flax, optax)}
    results["devices"] = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    of_images = len(facts.image_shape) == 3
    if of_images:
        variables = parallel.to_host((best.params, best.model_state))  # all processes take part
    if report.is_writer():
        figures.training_curves(
            report.read_metrics(workdir), workdir / "curves.png", title=f"{objective} training"
        )
        if of_images:
            _panel(settings, objective, parts, variables, splits["test"], test_key, workdir)
        report.write_json(workdir / "results.json", results)
    return results


def _advance(settings, parts, train, key, mesh, state_specs):
    how = {
        "mesh": mesh,
        "replays": replays_of(settings),
        "nonfinite": settings.nonfinite,
        "state_specs": state_specs,
    }
    if settings.placement == "device":
        return feed.resident(parts.step, train, key=key, batch_size=settings.batch_size, **how)
    size = settings.image_size
    return feed.streamed(
        parts.step,
        lambda start: data.host_batches(
            train,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start_step=start,
            to_float=False,
            random_transform=None if size is None else data.random_resized_crop(size),
        ),
        steps_per_epoch=parts.steps_per_epoch,
        **how,
    )


def _panel(settings, objective, parts, variables, test, key, workdir) -> None:
    # Spread over the set, which may be sorted by class.
    shown = [test[int(i)] for i in np.linspace(0, len(test) - 1, min(8, len(test)))]
    images = jnp.asarray(data.as_float(np.stack([example["image"] for example in shown])))
    labels = jnp.asarray([int(example["label"]) for example in shown], jnp.int32)
    attack = attacks.pgd(parts.threat, steps=settings.test_steps, step_size=parts.threat.eps / 4)
    logits_fn = models.eval_logits(parts.exact_model.apply, *variables)
    panel = training.adversarial_panel(logits_fn, attack, key, images, labels)
    title = f"{objective}: PGD-{settings.test_steps}, {settings.norm}, eps = {settings.eps:.4g}"
    figures.image_panel(panel, workdir / "panel.png", title=title)
