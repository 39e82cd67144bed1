"""What a training run would cost: built abstractly, counted, nothing computed."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import batch_sizes, choices
from experiments.training_run import build, facts_of, load_split
from experiments.training_settings import Settings
from robustjax import checks, parallel, training
from robustjax.training import report


class Cost(NamedTuple):
    """What one model costs to train.

    Attributes:
      parameters: trained scalars.
      steps: updates in all.
      steps_per_epoch: updates in an epoch.
      flops: of matrix products and convolutions in a step, of the costliest branch where a step
        has several.
      memory: bytes of a step on a global batch, as by ``training.peak_bytes``.
    """

    parameters: int
    steps: int
    steps_per_epoch: int
    flops: int
    memory: int


COLUMNS = ("parameters", "steps", "FLOPs a step", "FLOPs of training", "memory on one device")


def shown(cost: Cost) -> list[str]:
    """The cells of a table under ``COLUMNS``."""
    epochs = cost.steps // max(cost.steps_per_epoch, 1)
    return [
        f"{cost.parameters:,}",
        f"{cost.steps:,} ({epochs} x {cost.steps_per_epoch})",
        f"{cost.flops:.3e}",
        f"{cost.flops * cost.steps:.3e}",
        f"{cost.memory / 2**20:,.0f} MiB",
    ]


def dry_run(settings: Settings) -> None:
    """Builds everything abstractly, checks shapes and prints what a run would cost."""
    facts = data_facts(settings)
    rows = [
        [objective, settings.model, *shown(cost(settings, objective, facts))]
        for objective in settings.objective
    ]
    report.print_table(
        f"Dry run: {settings.dataset}, batch {settings.batch_size}, {settings.norm} "
        f"eps = {settings.eps:.4g}",
        ["objective", "model", *COLUMNS],
        rows,
    )
    report.print_lines(*misfits([(",".join(settings.objective), settings)]))


def misfits(jobs: Sequence[tuple[str, Settings]]) -> list[str]:
    """A line for each batch size that the devices at hand do not divide, with whose it is."""
    names: dict[str, list[str]] = {}
    for name, settings in jobs:
        found = batch_sizes.misfit(settings.batch_size)
        if found is not None:
            names.setdefault(found, []).append(name)
    return [
        f"would be refused here: {found}: {shown[0]}"
        + (f" and {len(shown) - 1} more" if len(shown) > 1 else "")
        for found, shown in names.items()
    ]


def data_facts(settings: Settings) -> choices.DataFacts:
    """Shape and sizes of the training set after the hold-out, known or looked up."""
    if settings.dataset in choices.DATA_FACTS:
        facts = choices.DATA_FACTS[settings.dataset]
        held_out = settings.validation_size or 0
        checks.integer("validation_size", held_out, at_most=facts.train_size - 1)
        if settings.image_size is not None:
            size = settings.image_size
            facts = facts._replace(image_shape=(size, size, *facts.image_shape[2:]))
        return facts._replace(train_size=facts.train_size - held_out)
    train = load_split(settings, "train")
    return facts_of(settings, train)


def cost(settings: Settings, objective: str, facts: choices.DataFacts) -> Cost:
    """Traces one training step of these settings with shapes alone."""
    parts = build(settings, objective, facts)
    n = settings.batch_size
    image = jax.ShapeDtypeStruct((n, *facts.image_shape), jnp.float32)
    integers = jax.ShapeDtypeStruct((n,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, model_state = jax.eval_shape(parts.model.init, key, image)
    state = jax.eval_shape(
        lambda p, s, k: training.create_state(p, s, parts.optimizer, k, oracle=parts.oracle),
        params,
        model_state,
        key,
    )
    batch = {"image": image, "label": integers, "index": integers}
    step = parallel.parallel(  # it may name the axis of the mesh
        parts.step,
        parallel.device_mesh(jax.devices()[:1]),
        in_specs=(parallel.REPLICATED, parallel.SPLIT),
        out_specs=parallel.REPLICATED,
        donate_argnums=0,
    )
    return Cost(
        parameters=training.parameter_count(params),
        steps=settings.epochs * parts.steps_per_epoch,
        steps_per_epoch=parts.steps_per_epoch,
        flops=training.count_flops(step, state, batch),
        memory=training.peak_bytes(step, state, batch),
    )


def costs(jobs: Sequence[tuple[str, Settings]]) -> list[list[str]]:
    """Rows of a table for many runs; what has the same parts is traced once."""
    seen: dict[Settings, Cost] = {}
    rows = []
    for name, settings in jobs:
        # Numbers that no shape depends on.
        alike = dataclasses.replace(
            settings, seed=0, workdir="", eps=0.0, beta=1.0, alpha=1.0, alpha_naive=1.0, tau=1,
            weight_decay=1.0, milestones=(), probe=0, attack_step_size=0.0, epochs=1,
            awp=float(settings.awp > 0), penalty_weight=1.0, start_from=None, monitor=0,
            pretrained=None,
            learning_rate=1.0, eps_warmup=min(settings.eps_warmup, 1), filter_removed=1.0,
            rate_warmup=0,
        )  # fmt: skip
        if alike not in seen:
            seen[alike] = cost(settings, settings.objective[0], data_facts(settings))
        found = seen[alike]._replace(steps=settings.epochs * seen[alike].steps_per_epoch)
        rows.append([name, settings.dataset, settings.model, *shown(found)])
    return rows
