"""One training run from its settings: build the parts, train, validate, evaluate, report."""

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

from experiments import choices
from experiments.training_settings import Settings
from robustjax import (
    attacks,
    checks,
    data,
    gradients,
    losses,
    metrics,
    models,
    objectives,
    parallel,
    training,
)
from robustjax.threat import ThreatModel
from robustjax.training import checkpoint, feed, figures, report

# Norm bounds for which the error of regressed weights is recorded: Dabouei et al. (2022), Fig. 3.
WEIGHT_ERROR_ALPHAS = (0.1, 1.0, 3.0)


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


def build(settings: Settings, objective: str, facts: choices.DataFacts) -> Parts:
    """Turns the names of the settings into functions; computes nothing."""
    threat = ThreatModel(choices.NORMS[settings.norm], settings.eps)

    def model(dtype):
        make = choices.MODELS[settings.model]
        module = make(facts.num_classes, settings.width, settings.normalization, dtype)
        return models.from_linen(module)

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
        ),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        max_norm=settings.max_norm,
    )
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
        axis_name=parallel.AXIS,
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
            now = ThreatModel(threat.norm, scale * settings.eps)
        attack = choices.make_attack(
            settings.attack,
            now,
            steps=settings.attack_steps,
            step_size=size,
            start=settings.attack_start,
        )
        plain = choices.make_objective(
            objective,
            now,
            attack,
            steps=settings.attack_steps,
            step_size=size,
            beta=settings.beta,
            attack_mode=settings.attack_mode,
            max_margin=settings.max_margin,
            point=settings.evaluation_point,
            weight=settings.penalty_weight,
            clip=settings.penalty_bound if settings.penalty_clip == "value" else None,
        )
        return choices.add_penalty(plain, settings.penalty, settings.penalty_weight, now)

    compute_model = model(choices.PRECISIONS[settings.precision])
    final = objective_at(1.0)
    step = training.train_step(
        compute_model.apply,
        objectives.scheduled(objective_at, growth) if warmup and objective != "standard" else final,
        optimizer,
        oracle=oracle,
        augment=choices.make_augmentation(settings.augmentation),
        replays=replays_of(settings),
        axis_name=parallel.AXIS,
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
        **validation_attacks(settings, threat),
        f"pgd{settings.test_steps}-{settings.test_restarts}": restarted,
    }


def validation_attacks(settings: Settings, threat: ThreatModel) -> dict[str, attacks.Attack]:
    """PGD; by default on the margin loss, as in Dabouei et al. (2022), section 4.1."""
    attack = attacks.pgd(
        threat,
        steps=settings.validation_steps,
        step_size=threat.eps * settings.validation_step_size,
        loss=choices.LOSSES[settings.validation_loss],
    )
    return {f"pgd{settings.validation_steps}": attack}


def run_objective(
    settings: Settings,
    objective: str,
    splits: Mapping[str, data.Dataset],
    workdir: Path,
    start: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates one model; returns what ``results.json`` holds.

    ``start`` are parameters and statistics to begin with, in place of random ones.
    """
    mesh = parallel.device_mesh()
    train = splits["train"]
    facts = facts_of(settings, train)
    parts = build(settings, objective, facts)
    began = time.monotonic()
    init_key, run_key, order_key, test_key = jax.random.split(jax.random.key(settings.seed), 4)
    example = jnp.zeros((1, *facts.image_shape))
    params, model_state = jax.jit(lambda key: parts.model.init(key, example))(init_key)
    if start is not None:
        params, model_state = start
    fresh = training.create_state(
        params, model_state, parts.optimizer, run_key, oracle=parts.oracle
    )
    fresh = parallel.replicate(fresh, mesh)

    report.print_lines(
        f"{objective}: {settings.model}, {training.parameter_count(params):,} parameters; "
        f"{len(train):,} training images, {parts.steps_per_epoch} steps an epoch, "
        f"{settings.epochs} epochs; {mesh.size} x {mesh.devices.flat[0].device_kind}"
    )
    chosen_by = selection_metric(settings, objective)
    validate = training.make_evaluator(
        parts.exact_model.apply, validation_attacks(settings, parts.threat), mesh
    )
    measure = None
    if settings.probe:
        measure = _gradient_measure(settings, parts, squared(settings, train), test_key)
    monitor = _monitor(settings, parts, splits["test"], test_key) if settings.monitor else None
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
                if settings.monitor:
                    writer.write(int(state.step), "monitor", monitor(state))
                if settings.probe:
                    writer.write(int(state.step), "gradients", measure(state))
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
    attacked = splits["test"]
    if settings.robust_examples is not None:
        attacked = attacked.subset(np.arange(min(settings.robust_examples, len(attacked))))
    evaluate_clean = None
    if len(attacked) < len(splits["test"]):
        evaluate_clean = training.make_evaluator(parts.exact_model.apply, {}, mesh)
    results: dict[str, Any] = {
        "objective": objective,
        "parameters": training.parameter_count(params),
        "chosen_by": chosen_by,
        "test_examples": len(splits["test"]),
        "attacked_examples": len(attacked),
    }
    for name, state in {"best": best, "last": last}.items():
        if name == "last" and int(best.step) == int(last.step):
            results["last"] = results["best"]
            continue
        test = data.eval_batches(attacked, settings.test_batch_size)
        verdicts = evaluate(state.params, state.model_state, test_key, test)
        if evaluate_clean is not None:
            whole = data.eval_batches(splits["test"], settings.test_batch_size)
            verdicts |= evaluate_clean(state.params, state.model_state, test_key, whole)
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
    replays = replays_of(settings)
    if settings.placement == "device":
        return feed.resident(
            parts.step, train, key=key, batch_size=settings.batch_size, mesh=mesh, replays=replays
        )
    size = settings.image_size
    return feed.streamed(
        parts.step,
        lambda start: data.host_batches(
            train,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start_step=start,
            random_transform=None if size is None else data.random_resized_crop(size),
        ),
        steps_per_epoch=parts.steps_per_epoch,
        mesh=mesh,
        replays=replays,
    )


def _gradient_measure(settings, parts, train, key):
    """Norms of the gradients of the first training examples, without augmentation."""
    n = settings.probe
    checks.integer("probe", n, at_most=len(train))
    chunk = max(k for k in range(1, min(n, settings.batch_size) + 1) if n % k == 0)
    shown = [train[i] for i in range(n)]
    batch = {
        "image": jnp.asarray(data.as_float(np.stack([example["image"] for example in shown]))),
        "label": jnp.asarray([int(example["label"]) for example in shown], jnp.int32),
        "index": jnp.arange(n, dtype=jnp.int32),
        "step": jnp.zeros((), jnp.int32),
    }
    loss_fn = parts.objective(parts.exact_model.apply)
    probe = jax.jit(gradients.gradient_probe(loss_fn, chunk=chunk))
    in_training = jax.jit(gradients.gradient_probe(loss_fn, chunk=chunk, mode="train"))

    def measure(state) -> dict[str, float]:
        params, model_state = parallel.to_host((state.params, state.model_state))
        found = probe(params, model_state, key, batch)
        moments = metrics.gradient_moments(found.parameter_norm, found.mean_gradient)
        norms = (found.parameter_norm, found.input_norm)
        more = {}
        if settings.probe_train:
            found = in_training(params, model_state, key, batch)
            more["correlation_train"] = metrics.correlation(found.parameter_norm, found.input_norm)
        return {
            **more,
            "mean_norm": float(moments.mean_norm),
            "variance": float(moments.variance),
            "correlation": metrics.correlation(*norms),
            **{
                f"weight_error_{alpha:g}": metrics.regressed_weight_error(*norms, alpha)
                for alpha in WEIGHT_ERROR_ALPHAS
            },
        }

    return measure


def _monitor(settings, parts, test, key):
    """Signs of catastrophic overfitting, on the first test examples."""
    n = checks.integer("monitor", settings.monitor, at_most=len(test))
    shown = [test[i] for i in range(n)]
    x = jnp.asarray(data.as_float(np.stack([example["image"] for example in shown])))
    y = jnp.asarray([int(example["label"]) for example in shown], jnp.int32)
    threat = parts.threat
    pgd = attacks.pgd(threat, steps=10, step_size=threat.eps / 4)
    at_random = attacks.pgd(threat, steps=0, clip_start=False)

    @jax.jit
    def measured(params, model_state):
        logits_fn = models.eval_logits(parts.exact_model.apply, params, model_state)
        found = {"fgsm": attacks.fgsm(threat)(logits_fn, key, x, y),
                 "pgd": pgd(logits_fn, key, x, y)}  # fmt: skip
        noise = at_random(logits_fn, key, x, y) - x
        out = {"clean": metrics.correct(logits_fn(x), y).mean()}
        for name, x_adv in found.items():
            logits = logits_fn(x_adv)
            out[f"{name}_accuracy"] = metrics.correct(logits, y).mean()
            out[f"{name}_loss"] = losses.cross_entropy(logits, y).mean()
        out["alignment"] = metrics.gradient_alignment(logits_fn, x, y, noise).mean()
        out["cosine_fgsm_pgd"] = metrics.cosine(found["fgsm"] - x, found["pgd"] - x).mean()
        return out

    def measure(state) -> dict[str, float]:
        params, model_state = parallel.to_host((state.params, state.model_state))
        return {name: float(value) for name, value in measured(params, model_state).items()}

    return measure


def _panel(settings, objective, parts, state, test, key, workdir) -> None:
    params, model_state = parallel.to_host((state.params, state.model_state))
    # Spread over the set, which may be sorted by class.
    shown = [test[int(i)] for i in np.linspace(0, len(test) - 1, min(8, len(test)))]
    images = jnp.asarray(data.as_float(np.stack([example["image"] for example in shown])))
    labels = jnp.asarray([int(example["label"]) for example in shown], jnp.int32)
    attack = attacks.pgd(parts.threat, steps=settings.test_steps, step_size=parts.threat.eps / 4)
    logits_fn = models.eval_logits(parts.exact_model.apply, params, model_state)
    panel = training.adversarial_panel(logits_fn, attack, key, images, labels)
    title = f"{objective}: PGD-{settings.test_steps}, {settings.norm}, eps = {settings.eps:.4g}"
    figures.image_panel(panel, workdir / "panel.png", title=title)
