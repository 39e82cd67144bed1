"""Free adversarial training: one backward pass serves the perturbation and the parameters."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robustjax import checks
from robustjax.gradients.plain import Oracle
from robustjax.objectives import LossFn, stages
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat


class FreeState(NamedTuple):
    """What ``free`` carries from step to step, the same on all devices.

    Attributes:
      perturbation: of each place in the global batch, float32, in the ball of the threat model.
      count: steps made, int32.
    """

    perturbation: Float[Array, "n ..."]
    count: Int[Array, ""]


def free(
    threat: ThreatModel,
    batch_shape: Sequence[int],
    *,
    replays: int = 8,
    carried: bool = True,
    shared_backward: bool = True,
    schedule: Callable[[Array], Array] | None = None,
    axis_name: str | None = None,
) -> Oracle:
    """Free adversarial training: the gradient at inputs whose perturbation every step improves.

    Each minibatch is trained on ``replays`` times in a row. A step takes the gradients of the mean
    loss at ``clip(x + delta)`` for the parameters and for the input, and moves the perturbation by
    a steepest step of length eps, ``delta <- project(delta + eps sign(g_x))``. It costs what a step
    of standard training costs.

    The objective is one of clean inputs, such as ``standard()``; its metrics are those at the
    perturbed ones. Replaying is up to the caller, who repeats rows of indices,
    ``numpy.repeat(indices, replays, axis=0)``; an epoch over the data is then ``replays`` times as
    many steps, and published numbers of epochs count replays as epochs. ``delta`` belongs to the
    inputs that it was made on: images that are augmented must be so before they are replayed, while
    ``train_step(augment=...)`` would draw anew in every step.

    Args:
      threat: norm ball and box, one ``eps``, which may be traced.
      batch_shape: shape of the images of a global batch, ``(n, ...)``; all batches are full.
      replays: m, steps on each minibatch, ``>= 1``. Without effect if ``carried``.
      carried: a new minibatch begins with the perturbation that the last one has ended with, place
        by place, as published. ``False``: with zero, every ``replays`` steps.
      shared_backward: both gradients are those of one backward pass, at the perturbation before the
        step (Shafahi et al.). ``False``: the perturbation moves first, by a pass of its own, and
        the parameters' gradient is taken where it has gone, twice the cost.
      schedule: factor of eps at each step, in ``[0, 1]``, for a warm-up; default 1.
      axis_name: mapped axis over which the batch is split in order. Each device moves the
        perturbations of its own rows; all gather them.

    Returns:
      An oracle with ``FreeState``.

    Raises:
      ValueError: an argument is out of range or of another kind; when tracing, images of another
        shape.

    Source: Shafahi et al. (2019), "Adversarial training for free!", algorithm 1;
    ``shared_backward=False`` is the code of Andriushchenko and Flammarion (2020), "Understanding
    and improving fast adversarial training". As there, derivatives run through the clip: where a
    new minibatch takes ``x + delta`` out of the box the perturbation takes no step.
    """
    check_threat(threat)
    if not isinstance(batch_shape, Sequence) or len(batch_shape) < 2:
        raise ValueError(f"batch_shape must be (n, ...), got {checks.shown(batch_shape)}")
    for size in batch_shape:
        checks.integer("batch_shape", size, at_least=1)
    checks.integer("replays", replays, at_least=1)
    if schedule is not None:
        checks.function("schedule", schedule)
    for name, value in (("carried", carried), ("shared_backward", shared_backward)):
        checks.choice(name, value, (True, False))

    def init(params) -> FreeState:
        del params
        return FreeState(jnp.zeros(batch_shape, jnp.float32), jnp.zeros((), jnp.int32))

    def own_rows(perturbation: Array, x: Array) -> Array:
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        came = (x.shape[0] * devices, *x.shape[1:])
        if came != tuple(batch_shape):
            raise ValueError(f"images must be a batch of shape {tuple(batch_shape)}, got {came}")
        if axis_name is None:
            return perturbation
        start = jax.lax.axis_index(axis_name) * x.shape[0]
        return jax.lax.dynamic_slice_in_dim(perturbation, start, x.shape[0])

    def moved(count: Array, x: Array, noisy: Array, inside: Array, gradient: Array) -> Array:
        now = threat
        if schedule is not None:
            eps = schedule(count) * threat.eps
            now = ThreatModel(threat.norm, eps, threat.lower, threat.upper)
        gradient = jnp.where(noisy == inside, gradient, 0)
        return now.step(noisy, x, gradient, now.eps)

    def oracle(loss_fn: LossFn) -> Callable:
        whole = stages(loss_fn)

        def grad_fn(params, model_state, oracle_state: FreeState, key, batch):
            x = batch["image"]
            delta = own_rows(oracle_state.perturbation, x)
            if not carried:
                delta = jnp.where(oracle_state.count % replays == 0, 0, delta)
            noisy = x + delta.astype(x.dtype)
            inside = threat.clip(noisy)

            def mean_loss(params, x):
                losses, aux = whole(params, model_state, key, {**batch, "image": x})
                checks.per_example("losses of the objective", losses, x.shape[0])
                return losses.mean(), aux

            if shared_backward:
                (grads, of_input), aux = jax.grad(mean_loss, argnums=(0, 1), has_aux=True)(
                    params, inside
                )
                x_adv = moved(oracle_state.count, x, noisy, inside, of_input)
            else:
                of_input, _ = jax.grad(mean_loss, argnums=1, has_aux=True)(params, inside)
                x_adv = moved(oracle_state.count, x, noisy, inside, of_input)
                grads, aux = jax.grad(mean_loss, has_aux=True)(params, x_adv)
            delta = (x_adv - x).astype(jnp.float32)
            if axis_name is not None:
                delta = jax.lax.all_gather(delta, axis_name, tiled=True)
            new_model_state, metrics = aux
            return grads, (new_model_state, FreeState(delta, oracle_state.count + 1), metrics)

        return grad_fn

    return Oracle(init, oracle)
