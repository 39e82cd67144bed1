"""What a training run is going to do and what it takes, said before it begins."""

from typing import Any

import jax

from experiments import choices
from experiments.training_settings import Settings
from robustjax import parallel, training
from robustjax.training.loop import Advance


def described(
    settings: Settings,
    objective: str,
    facts: choices.DataFacts,
    parts: Any,
    state: training.TrainState,
    advance: Advance,
) -> list[str]:
    """Lines about a network, its data, its training and the devices.

    Args:
      settings: of the run.
      objective: what this network is trained for.
      facts: about the training set.
      parts: from ``training_run.build``.
      state: to go on from.
      advance: from ``training.feed``; its program is traced, which it would be next.
    """
    dispatch = training.steps_per_dispatch(parts.steps_per_epoch, settings.dispatch)
    cost = advance.cost(state, dispatch)
    mesh, hosts = parallel.device_mesh(), jax.process_count()
    steps = settings.epochs * parts.steps_per_epoch
    epochs = f"{settings.epochs} epochs of {parts.steps_per_epoch} steps"
    return [
        f"{objective}: {settings.model}, {training.parameter_count(state.params):,} parameters; "
        f"{facts.train_size:,} training examples {'x'.join(map(str, facts.image_shape))}, "
        f"batch {settings.batch_size}",
        f"  {steps:,} steps ({epochs}), {cost.flops:.2e} FLOPs a step, about "
        f"{cost.memory / 2**20:,.0f} MiB "
        + ("in all" if settings.parameters == "sharded" else "a device"),
        f"  {mesh.size} x {mesh.devices.flat[0].device_kind}"
        + (f" of {hosts} hosts" if hosts > 1 else "")
        + f", batch split into {mesh.size}, parameters {settings.parameters}"
        + (f", {_statistics(settings)}" if "batch_stats" in state.model_state else ""),
    ]


def _statistics(settings: Settings) -> str:
    """Over what BatchNorm takes its statistics."""
    if settings.frozen == "encoder":
        return "BatchNorm in evaluation mode"
    together = settings.batch_statistics == "synchronised" or settings.parameters == "sharded"
    return f"BatchNorm over {'the whole batch' if together else 'the part of each device'}"
