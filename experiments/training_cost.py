"""What a training run is going to do and what it takes, said before it begins."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import choices
from experiments.training_settings import Settings
from robustjax import objectives, parallel, training
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
    needed = memory(parts, state, (settings.batch_size, *facts.image_shape))
    mesh, hosts = parallel.device_mesh(), jax.process_count()
    steps = settings.epochs * parts.steps_per_epoch
    epochs = f"{settings.epochs} epochs of {parts.steps_per_epoch} steps"
    return [
        f"{objective}: {settings.model}, {training.parameter_count(state.params):,} parameters; "
        f"{facts.train_size:,} training examples {'x'.join(map(str, facts.image_shape))}, "
        f"batch {settings.batch_size}",
        f"  {steps:,} steps ({epochs}), {advance.flops(state, dispatch):.2e} FLOPs a step, about "
        f"{needed / 2**20:,.0f} MiB for the whole batch",
        f"  {mesh.size} x {mesh.devices.flat[0].device_kind}"
        + (f" of {hosts} hosts" if hosts > 1 else "")
        + f", batch split into {mesh.size}, parameters {settings.parameters}",
    ]


def memory(parts: Any, state: training.TrainState, image_shape: tuple[int, ...]) -> int:
    """Bytes of a global batch's outer step, about: state, gradient, what its backward pass keeps.

    Args:
      parts: from ``training_run.build``.
      state: arrays or shapes.
      image_shape: of the batch, ``(n, ...)``.
    """
    loss_fn = objectives.stages(parts.objective(parts.model.apply))

    def mean_loss(params, model_state, key, batch):
        return loss_fn.outer(params, model_state, key, batch)[0].mean()

    integers = jax.ShapeDtypeStruct(image_shape[:1], jnp.int32)
    batch = {
        "image": jax.ShapeDtypeStruct(image_shape, jnp.float32),
        "label": integers,
        "index": integers,
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    state = jax.eval_shape(lambda state: state, state)
    variables = (state.params, state.model_state, state.key)
    attacked = jax.eval_shape(loss_fn.inner, *variables, batch)
    kept = training.residual_bytes(mean_loss, *variables, attacked)
    return training.tree_bytes((state, state.params)) + kept
