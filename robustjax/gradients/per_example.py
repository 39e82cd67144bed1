"""Norms of per-example gradients, for parameters and for inputs, without (examples x parameters).

``norms(loss_fn, params, model_state, key, batch) -> (n,)`` is the l_2 norm over *all* trainable
parameters (kernels, biases, scales) of the gradient of each example's loss. Batches have been
through the inner stage (``objectives.stages``). Three ways to get them:

=====================  ====================================  ======================================
rule                   cost beside one backward pass         exact for
=====================  ====================================  ======================================
``ghost_norms(m)``     about one more                        Linen layers, no batch statistics
``vmap_norms(m)``      n small ones, m at a time             any model, no batch statistics
``vjp_norms(m)``       n of the whole batch, m at a time     any model, batch statistics included
=====================  ====================================  ======================================

Batch statistics: with BatchNorm in training mode the loss of one example depends on all others.
``vjp_norms`` differentiates the ``i``-th loss through the whole batch. The other two take the norms
in evaluation mode (``mode="eval"``, running statistics), in which example and gradient belong
together; the gradient that is then weighted is that of training mode all the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.gradients.ghost import layer_norms
from robustjax.norms import L2
from robustjax.objectives import LossFn, stages

NormRule = Callable[..., Float[Array, " n"]]
MODES = ("eval", "train")


def ghost_norms(microbatch: int | None = 16, *, mode: str = "eval") -> NormRule:
    """Norms from the activations and output gradients of Linen layers, see ``gradients.ghost``.

    Args:
      microbatch: examples at a time, ``>= 1``, which bounds the memory for what all layers' inputs
        and output gradients need; None: the whole batch at once.
      mode: ``"eval"`` or ``"train"``: the model's mode. ``"train"`` is refused where a BatchNorm
        layer is in training mode; it matters for dropout alone.
    """
    if microbatch is not None:
        checks.integer("microbatch", microbatch, at_least=1)
    train = checks.choice("mode", mode, MODES) == "train"

    def norms(loss_fn: LossFn, params: Any, model_state: Any, key: Array, batch: dict):
        outer = stages(loss_fn).outer
        shared, examples = per_example_fields(batch)

        def of_part(part):
            def losses(params):
                return outer(params, model_state, key, {**shared, **part}, train=train)[0]

            return layer_norms(losses, params, part["label"].shape[0])

        return _in_parts(of_part, examples, microbatch)

    return norms


def vmap_norms(microbatch: int = 16, *, mode: str = "eval") -> NormRule:
    """Norms of the gradients themselves, ``microbatch`` of them at a time.

    Each is that of a batch of one example, so that a loss that compares examples, and randomness of
    the model that depends on the place in the batch, have no meaning here.

    Args:
      microbatch: gradients in memory at once, ``>= 1``.
      mode: ``"eval"`` or ``"train"``; a BatchNorm layer in training mode would use the statistics
        of a single example.
    """
    checks.integer("microbatch", microbatch, at_least=1)
    train = checks.choice("mode", mode, MODES) == "train"

    def norms(loss_fn: LossFn, params: Any, model_state: Any, key: Array, batch: dict):
        outer = stages(loss_fn).outer

        def norm(example):
            def loss(params):
                return outer(params, model_state, key, one_example(example), train=train)[0][0]

            return L2().value(jax.grad(loss)(params))

        shared, examples = per_example_fields(batch)

        def one_example(example):
            return {**shared, **jax.tree.map(lambda x: x[None], example)}

        return jax.lax.map(norm, examples, batch_size=microbatch)

    return norms


def vjp_norms(microbatch: int = 4, *, mode: str = "train") -> NormRule:
    """Norms by pulling back one loss after the other through the whole batch.

    Exact for every model, at the price of one backward pass of the whole batch per example. Over
    several devices it needs BatchNorm statistics of each device (no ``axis_name`` in the model):
    with synchronised ones the loss of one example from each device would be pulled back at once.

    Args:
      microbatch: backward passes, and gradients in memory, at once; ``>= 1``.
      mode: ``"train"`` or ``"eval"``.
    """
    checks.integer("microbatch", microbatch, at_least=1)
    train = checks.choice("mode", mode, MODES) == "train"

    def norms(loss_fn: LossFn, params: Any, model_state: Any, key: Array, batch: dict):
        def losses_fn(params):
            return stages(loss_fn).outer(params, model_state, key, batch, train=train)[0]

        losses, pull_back = jax.vjp(losses_fn, params)

        def norm(i):
            one_hot = jnp.zeros_like(losses).at[i].set(1)
            return L2().value(pull_back(one_hot)[0])

        return jax.lax.map(norm, jnp.arange(losses.shape[0]), batch_size=microbatch)

    return norms


def input_gradient_norms(*, mode: str = "eval", at: str = "adversarial") -> NormRule:
    """The l_2 norms ``||d L_i / d x_i||`` of the input gradients, in input units.

    They come from the *sum* of the losses: the mean would divide each by n. In training mode with
    BatchNorm the derivative for ``x_i`` also holds what ``x_i`` does to the other losses; the
    forward pass is then that of the update and costs nothing more.

    Args:
      mode: ``"eval"`` or ``"train"``, the mode of the model.
      at: ``"adversarial"``: for the attacked inputs (the clean ones where the objective has no
        attack); ``"image"``: for the clean inputs.
    """
    train = checks.choice("mode", mode, MODES) == "train"
    checks.choice("at", at, ("adversarial", "image"))

    def norms(loss_fn: LossFn, params: Any, model_state: Any, key: Array, batch: dict):
        outer = stages(loss_fn).outer
        field = at if at in batch else "image"

        def total(x):
            return outer(params, model_state, key, {**batch, field: x}, train=train)[0].sum()

        return L2().value(jax.grad(total)(batch[field]), batch_ndim=1)

    return norms


def _in_parts(
    fn: Callable[[dict], Float[Array, " m"]], examples: dict, size: int | None
) -> Float[Array, " n"]:
    """``fn`` on ``size`` examples at a time, one part after the other; ``None``: on all at once."""
    n = examples["label"].shape[0]
    if size is None or size >= n:
        return fn(examples)
    whole = n // size * size
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), examples)
    found = jax.lax.map(fn, parts).reshape(whole)
    if whole == n:
        return found
    return jnp.concatenate([found, fn(jax.tree.map(lambda x: x[whole:], examples))])


def per_example_fields(batch: dict) -> tuple[dict, dict]:
    """A batch apart: what all examples share (the number of the step), and what has their axis."""
    shared = {name: value for name, value in batch.items() if jnp.ndim(value) == 0}
    return shared, {name: value for name, value in batch.items() if name not in shared}


class GradientProbe(NamedTuple):
    """Gradients of a set of examples at one moment of training.

    Attributes:
      loss: ``(m,)``.
      parameter_norm: l_2 norms of the gradients for all parameters, ``(m,)``.
      input_norm: l_2 norms of the gradients for the (attacked) inputs, ``(m,)``.
      mean_gradient: gradient of the mean loss, shaped like the parameters.
    """

    loss: Float[Array, " m"]
    parameter_norm: Float[Array, " m"]
    input_norm: Float[Array, " m"]
    mean_gradient: Any


def gradient_probe(
    loss_fn: LossFn, *, chunk: int, norms: NormRule | None = None, mode: str = "eval"
) -> Callable[..., GradientProbe]:
    """Measures the per-example gradients of a loss on a set of any size, chunk by chunk.

    Args:
      loss_fn: from an objective; its attack runs first, on each chunk.
      chunk: examples at a time, which must divide those of the batch.
      norms: rule for the parameter norms; default ``ghost_norms()`` in evaluation mode and
        ``vjp_norms()`` in training mode, where a chunk is a batch of its own to BatchNorm.
      mode: ``"eval"`` or ``"train"``, for the mean gradient and the input norms.

    Returns:
      ``probe(params, model_state, key, batch) -> GradientProbe``; give its numbers to
      ``metrics.gradient_moments`` and ``metrics.correlation``.

    Source: Dabouei et al. (2022), "Revisiting outer optimization in adversarial training", sections
    3.1 and 3.4.
    """
    checks.integer("chunk", chunk, at_least=1)
    train = checks.choice("mode", mode, MODES) == "train"
    if norms is None:
        norms = vjp_norms() if train else ghost_norms()
    parts, input_norms = stages(loss_fn), input_gradient_norms(mode=mode)

    def probe(params: Any, model_state: Any, key: Array, batch: dict) -> GradientProbe:
        shared, examples = per_example_fields(batch)
        m = batch["label"].shape[0]
        checks.divisible("examples of the batch", m, "chunk", chunk)

        def of_chunk(examples):
            part = parts.inner(params, model_state, key, {**shared, **examples})

            def mean(params):
                losses = parts.outer(params, model_state, key, part, train=train)[0]
                return losses.mean(), losses

            gradient, losses = jax.grad(mean, has_aux=True)(params)
            return GradientProbe(
                losses,
                norms(parts, params, model_state, key, part),
                input_norms(parts, params, model_state, key, part),
                gradient,
            )

        split = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), examples)
        each = jax.lax.map(of_chunk, split)
        flat = (x.reshape(m) for x in each[:3])
        return GradientProbe(*flat, jax.tree.map(lambda g: g.mean(axis=0), each.mean_gradient))

    return probe
