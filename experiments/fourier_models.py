"""The models of the Fourier attacks: trained here, from training runs, or from PyTorch files."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import batch_sizes, choices, fourier_zoo, trained_models
from robustjax import attacks, data, models, objectives, parallel, training
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel
from robustjax.training import feed, progress, report


def subjects(settings: Any, test: data.Dataset) -> dict[str, Any]:
    """Names to ``logits_fn``: the models that the settings of ``fourier_attack`` name or train.

    Raises:
      ValueError: a model cannot be read, or is one of another data set.
    """
    if not (settings.checkpoints or settings.torch_checkpoints):
        return trained(settings)
    found = loaded(settings) if settings.checkpoints else {}
    for name, path in settings.torch_files.items():
        logits_fn = fourier_zoo.load(
            name, path, test.num_classes, channels=test.image.shape[-1], width=settings.width
        )
        found[name.replace("/", "_")] = jax.device_put(logits_fn)
    return found


def planned(settings: Any, num_classes: int) -> list[tuple[str, str, models.Model]]:
    """Name, architecture and network of each model of a run, for a dry run; nothing is read."""
    torch_files = settings.torch_files
    names = settings.trainings
    if settings.checkpoints or torch_files:
        names = tuple(map(str, settings.folders))
    plans = []
    for name in names:
        own = settings
        if settings.checkpoints and (Path(name) / report.CONFIG).exists():
            read = trained_models.read_settings(name)
            own = dataclasses.replace(settings, model=read.model, width=read.width)
        plans.append((name, own.model, model_of(own, num_classes)))
    for name in torch_files:
        kind = fourier_zoo.ZOO[name].architecture if name in fourier_zoo.ZOO else name
        module = fourier_zoo.module_of(name, num_classes, settings.width)
        plans.append((name, kind, models.from_linen(module)))
    return plans


def model_of(settings: Any, num_classes: int) -> models.Model:
    """The architecture of the models that are trained here."""
    make = choices.MODELS[settings.model]
    return models.from_linen(make(num_classes, settings.width, "batch", jnp.float32))


def objective_of(settings: Any, name: str) -> objectives.Objective:
    """What training on clean, noisy, l_inf or l_2 adversarial images minimises."""
    if name == "standard":
        return objectives.standard()
    if name == "noise":
        # Training on the start of an attack that takes no step; the ball is larger than the box.
        start = attacks.gaussian_start(settings.noise)
        return objectives.madry(attacks.pgd(ThreatModel(LInf(), 1.0), steps=0, start=start))
    threat = {
        "linf": ThreatModel(LInf(), settings.train_eps_linf),
        "l2": ThreatModel(L2(), settings.train_eps_l2),
    }[name]
    return objectives.madry(attacks.pgd(threat, steps=settings.train_steps))


def trained(settings: Any) -> dict[str, Any]:
    """Trains a network in each way; they start alike and see the images in the same order."""
    batch_sizes.check_training(settings.train_batch_size, name="train_batch_size")
    train = data.load(settings.dataset, "train", data_dir=settings.data_dir)
    mesh = parallel.device_mesh()
    steps = data.steps_per_epoch(len(train), settings.train_batch_size)
    total = settings.epochs * steps
    schedule = optax.cosine_decay_schedule(settings.learning_rate, max(total, 1))
    model = model_of(settings, train.num_classes)
    init_key, run_key, order_key = jax.random.split(jax.random.key(settings.seed), 3)
    image = jnp.zeros((1, *train.image.shape[1:]))
    found = {}
    for name in settings.trainings:
        optimizer = optax.adam(schedule)
        params, model_state = jax.jit(model.init)(init_key, image)
        state = training.create_state(params, model_state, optimizer, run_key)
        step = training.train_step(
            model.apply, objective_of(settings, name), optimizer, axis_name=parallel.AXIS
        )
        shown = progress.Progress(total, label=name)
        state = training.fit(
            parallel.replicate(state, mesh),
            feed.resident(
                step, train, key=order_key, batch_size=settings.train_batch_size, mesh=mesh
            ),
            epochs=settings.epochs,
            steps_per_epoch=steps,
            dispatch=steps,
            on_dispatch=lambda at, metrics, show=shown: show(
                at, {"loss": float(metrics["loss"].mean())}
            ),
        )
        params, model_state = parallel.to_host((state.params, state.model_state))
        found[name] = jax.device_put(models.eval_logits(model.apply, params, model_state))
    return found


def loaded(settings: Any) -> dict[str, Any]:
    """The models of training runs, by the names of their folders."""
    found = {}
    for folder in settings.folders:
        run = trained_models.load(folder, settings.which, data_dir=settings.data_dir)
        if run.settings.dataset != settings.dataset:
            raise ValueError(
                f"dataset must be that of the models, {run.settings.dataset} in {folder}, "
                f"got {settings.dataset}"
            )
        name = folder.name if folder.name not in found else str(folder).replace("/", "_")
        found[name] = jax.device_put(parallel.to_host(run.logits_fn))
    return found
