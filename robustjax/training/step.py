"""One training step, and several of them in one dispatch.

``step(state, batch) -> (state, metrics)`` holds augmentation, attack, gradient and update. It is
a pure function of one device's share of the batch. With ``axis_name`` it takes the means over the
devices of gradients, statistics and metrics in one all-reduce; map it with
``robustjax.parallel`` or with ``jax.pmap(step, axis_name=...)``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from robustjax import checks, keys
from robustjax.gradients import Oracle, plain
from robustjax.objectives import ModelFn, Objective
from robustjax.training.state import TrainState

Batch = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
NONFINITE = ("stop", "skip")  # what is done about a loss or gradient that is not finite


def train_step(
    model_fn: ModelFn,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    oracle: Oracle | None = None,
    augment: Callable[[Array, Array], Array] | None = None,
    replays: int = 1,
    axis_name: str | None = None,
) -> Step:
    """Builds the training step from its parts.

    Args:
      model_fn: ``model_fn(params, model_state, x, train, key) -> (logits, model_state)``.
      objective: ``objective(model_fn) -> loss_fn``.
      optimizer: optax transform; it is given ``value``, the mean loss, as an extra argument.
      oracle: gradient oracle; default ``plain()``.
      augment: ``augment(keys (n,), images) -> images``, before the attack.
      replays: steps in a row on each minibatch, ``>= 1``: all of them see the same augmentation, as
        free adversarial training needs. The caller repeats the minibatches.
      axis_name: the mapped axis over which the batch is split, if any.

    Returns:
      ``step(state, batch) -> (state, metrics)``. A batch is ``{"image": (n, ...), "label": (n,),
      "index": (n,)}``, to which the step adds its number, ``"step"``. Each example's randomness
      comes from its index, so that the step does not depend on how the batch is split. Metrics are
      float32 scalars: the means of those of the objective, and ``grad_norm``, the l_2 norm of the
      gradient.

    Raises:
      ValueError: a part is of another kind; when tracing, a batch that lacks a field or whose
        shapes or dtypes do not fit.
    """
    checks.function("model_fn", model_fn)
    checks.function("objective", objective)
    checks.transform("optimizer", optimizer)
    checks.integer("replays", replays, at_least=1)
    oracle = plain() if oracle is None else oracle
    if not isinstance(oracle, Oracle):
        raise ValueError(f"oracle must be an Oracle such as plain(), got {checks.shown(oracle)}")
    if augment is not None:
        checks.function("augment", augment)
    grad_fn = oracle.oracle(objective(model_fn))
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        checks.fields("batch", batch, ("image", "label", "index"))
        checks.batch(batch["image"], batch["label"], x_name="image", y_name="label")
        checks.per_example("index", checks.integers("index", batch["index"]), len(batch["label"]))
        key = jax.random.fold_in(state.key, state.step)
        augment_key, loss_key = jax.random.split(key)
        if replays > 1:
            first = state.step - state.step % replays
            augment_key = jax.random.split(jax.random.fold_in(state.key, first))[0]
        batch = {**batch, "step": state.step}
        if augment is not None:
            example_keys = keys.per_example(augment_key, batch["index"])
            batch = {**batch, "image": augment(example_keys, batch["image"])}
        grads, (model_state, oracle_state, metrics) = grad_fn(
            state.params, state.model_state, state.oracle_state, loss_key, batch
        )
        metrics = jax.tree.map(lambda m: jnp.mean(m, dtype=jnp.float32), metrics)
        if axis_name is not None:
            # Together, for XLA to reduce at once: replicas stay equal, statistics included.
            grads, model_state, oracle_state, metrics = _mean_over_devices(
                (grads, model_state, oracle_state, metrics), axis_name
            )
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=metrics.get("loss")
        )
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
            oracle_state=oracle_state,
            key=state.key,
        )
        return new_state, {**metrics, "grad_norm": optax.tree.norm(grads)}

    return step


def _mean_over_devices(tree: Any, axis_name: str) -> Any:
    """The means of floating-point leaves; counts and keys are the same on all devices already."""
    leaves, structure = jax.tree.flatten(tree)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    means = jax.lax.pmean([leaves[i] for i in floating], axis_name)
    for i, mean in zip(floating, means, strict=True):
        leaves[i] = mean
    return jax.tree.unflatten(structure, leaves)


def guarded_step(step: Step, *, nonfinite: str = "stop") -> Step:
    """``step`` for numbered batches, not taken from a loss or gradient that is not finite.

    Args:
      step: one training step; a step is taken if its ``loss`` (where there is one) and its
        ``grad_norm`` are finite.
      nonfinite: ``"stop"``: the state stays what it was before the step that failed, and so it does
        in all later steps, whose numbers it does not reach any more. ``"skip"``: the state stays
        what it was, but is counted on (schedules of the optimizer count the steps taken).

    Returns:
      ``step(state, (number, batch)) -> (state, metrics)``: ``number`` is the step at which the
      batch is due. Metrics of the step that failed are as they came out, those of steps that are
      not due NaN. Metrics have ``skipped`` beside, 0 or 1, if ``nonfinite`` is ``"skip"``.

    Raises:
      ValueError: ``nonfinite`` is neither.
    """
    checks.choice("nonfinite", nonfinite, NONFINITE)

    def guarded(state: TrainState, numbered: tuple[Any, Batch]):
        number, batch = numbered
        due = state.step == number
        new, metrics = step(state, batch)
        finite = jnp.isfinite(metrics["grad_norm"])
        if "loss" in metrics:
            finite &= jnp.isfinite(metrics["loss"])
        kept = jax.tree.map(lambda new, old: jnp.where(due & finite, new, old), new, state)
        if nonfinite == "skip":
            kept = kept._replace(step=state.step + due)
            metrics = {**metrics, "skipped": 1.0 - finite}
        metrics = jax.tree.map(lambda value: jnp.where(due, value, jnp.nan), metrics)
        return kept, metrics

    return guarded


def several_steps(step: Step) -> Step:
    """``step`` over batches stacked on a leading axis ``(k, n, ...)``; metrics come as ``(k,)``."""

    def steps(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(step, state, batches)

    return steps


def several_resident_steps(
    step: Step, take: Callable[[Any, Any], Batch]
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]:
    """``step`` over batches gathered on the device from a data set that is held there.

    Args:
      step: one training step.
      take: ``take(data, indices (n,)) -> batch``, e.g. ``robustjax.data.take``; indices may be a
        tree of arrays.

    Returns:
      ``steps(state, data, indices (k, n)) -> (state, metrics)`` with metrics ``(k,)``.
    """

    def steps(state: TrainState, data: Any, indices: Any):
        return jax.lax.scan(lambda state, row: step(state, take(data, row)), state, indices)

    return steps
