"""Momentum SGD and its two remedies for large gradients of the batch: clipping and normalising.

All three are short optax chains that end in the same links, ``g + weight_decay theta``,
``v = momentum v + g`` and ``theta = theta - learning_rate v``; what differs is what is done with
the mean gradient of the batch before them.

========  ==================================================  ==================================
chain     mean gradient g of the batch becomes                buffer after t steps, no decay
========  ==================================================  ==================================
``msgd``  g                                                   as large as the gradients make it
``mgnc``  g min(max_norm / ||g||_2, 1)                        <= max_norm (1 - m^t) / (1 - m)
``sngm``  g / ||g||_2                                         <= (1 - m^t) / (1 - m)
========  ==================================================  ==================================

m is the momentum, and no step is longer than the learning rate times the buffer. Norms are of the
whole gradient tree as one vector. With data parallelism the mean over devices comes before the
norm, so that the result is that of one device with the whole batch.
"""

import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from robustjax import checks
from robustjax.norms import L2
from robustjax.optim.steepest import scale_by_steepest

Rate = ArrayLike | optax.Schedule


def msgd(
    learning_rate: Rate, *, momentum: ArrayLike = 0.9, weight_decay: Rate = 0.0
) -> optax.GradientTransformation:
    """SGD with Polyak momentum: ``v = momentum v + g``, ``theta = theta - learning_rate v``.

    There is no dampening and no look-ahead: under a constant gradient g the buffer is
    ``g (1 - momentum^t) / (1 - momentum)`` after t steps. Weight decay is coupled: ``weight_decay
    theta`` is added to the gradient before the buffer.

    Args:
      learning_rate: step size >= 0, a number (it may be traced) or an optax schedule.
      momentum: in ``[0, 1)``.
      weight_decay: >= 0, a number or an optax schedule. Anything but the number 0 needs
        ``params`` in ``update``.

    Returns:
      A gradient transformation on gradients shaped like the parameters. Updates have the dtypes
      of the gradients and the buffer has those of the parameters, whatever the dtypes of the
      hyper-parameters.

    Raises:
      ValueError: a hyper-parameter is out of its range.

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods" (1964);
    Dabouei et al., "Revisiting outer optimization in adversarial training" (2022), equation 3.
    """
    _check_rate("learning_rate", learning_rate)
    checks.number("momentum", momentum, at_least=0, below=1)
    return _keep_dtypes(
        optax.chain(
            *_decay(weight_decay),
            optax.trace(momentum),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def mgnc(
    learning_rate: Rate,
    *,
    max_norm: ArrayLike = 25.0,
    momentum: ArrayLike = 0.9,
    weight_decay: Rate = 0.0,
    axis_name: Hashable = None,
) -> optax.GradientTransformation:
    """Momentum SGD on the mean gradient, clipped in its norm ("MSGD with gradient-norm clipping").

    The gradient goes into ``msgd`` as ``g min(max_norm / ||g||_2, 1)``, with its direction kept
    and a norm of at most ``max_norm``; the clip comes before weight decay. A norm below it leaves
    g as it is, bit for bit; on a batch of one example it is ``engm``. What it computes is
    ``optax.clip_by_global_norm`` before ``msgd``; the norm is taken in at least float32 also of
    bfloat16 gradients, and ``max_norm`` may be traced for them too.

    Args:
      learning_rate: step size >= 0, a number (it may be traced) or an optax schedule.
      max_norm: > 0, in units of the gradient's norm; it may be traced, and infinite.
      momentum: in ``[0, 1)``.
      weight_decay: >= 0, a number or an optax schedule.
      axis_name: mapped axis (of ``shard_map`` or ``pmap``) over which gradients are averaged
        before the norm is taken; see ``mean_over_devices``.

    Raises:
      ValueError: a hyper-parameter is out of its range.

    Source: Dabouei et al. (2022), section 3.1 ("MSGD + GNC", threshold 25); Pascanu et
    al., "On the difficulty of training recurrent neural networks" (2013), algorithm 1.
    """
    checks.number("max_norm", max_norm, above=0, at_most=math.inf)
    # A projection wants a finite radius; the largest one leaves every finite gradient as it is.
    radius = jnp.minimum(max_norm, jnp.finfo(jnp.float32).max)
    return optax.chain(
        mean_over_devices(axis_name),
        optax.stateless(lambda g, params: L2().project(g, radius)),
        msgd(learning_rate, momentum=momentum, weight_decay=weight_decay),
    )


def sngm(
    learning_rate: Rate,
    *,
    momentum: ArrayLike = 0.9,
    weight_decay: Rate = 0.0,
    normalize_after_weight_decay: bool = False,
    axis_name: Hashable = None,
) -> optax.GradientTransformation:
    """Momentum SGD on the normalised mean gradient (stochastic normalised gradient with momentum).

    ``g / ||g||_2``, steepest descent in l_2, goes into ``msgd``. The trajectory does not change
    when the loss is multiplied by a positive constant, and without weight decay no step is longer
    than ``learning_rate / (1 - momentum)``: a learning rate of ``msgd`` does not carry over. A zero
    gradient adds nothing. On a batch of one example it is ``f_engm`` with ``alpha=1``.

    Args:
      learning_rate: step size >= 0, a number (it may be traced) or an optax schedule.
      momentum: in ``[0, 1)``.
      weight_decay: >= 0, a number or an optax schedule.
      normalize_after_weight_decay: normalise ``g + weight_decay theta``, as in the paper that
        introduced the method, in place of g alone; the scale of the loss then matters.
      axis_name: mapped axis over which gradients are averaged before they are normalised; see
        ``mean_over_devices``.

    Raises:
      ValueError: a hyper-parameter is out of its range.

    Source: Zhao et al., "Stochastic normalized gradient descent with momentum for large-batch
    training" (2020); Dabouei et al. (2022), equation 4, which says nothing of weight decay: the
    default is the order of the other optimizers compared there.
    """
    before, after = (weight_decay, 0.0) if normalize_after_weight_decay else (0.0, weight_decay)
    return optax.chain(
        mean_over_devices(axis_name),
        *_decay(before),
        scale_by_steepest(L2()),
        msgd(learning_rate, momentum=momentum, weight_decay=after),
    )


def mean_over_devices(axis_name: Hashable = None) -> optax.GradientTransformation:
    """The mean of the updates over a mapped axis: the link before anything that takes a norm.

    Clipping or normalising each device's own gradient and averaging then is another method, whose
    result changes with the number of devices.

    Each device must bring the gradient of its own examples, equally many on each. Inside
    ``jax.shard_map`` that takes ``check_vma=False``, or parameters that vary over the axis,
    ``jax.lax.pcast(params, axis_name, to="varying")``: otherwise ``jax.grad`` itself sums the
    gradients of replicated parameters over the devices. Under ``pmap`` there is no such trap.

    Args:
      axis_name: name of the axis (or a tuple of names); ``None`` on one device, or when gradients
        come averaged: nothing is done.
    """
    if axis_name is None:
        return optax.identity()
    return optax.stateless(lambda updates, params: jax.lax.pmean(updates, axis_name))


def _check_rate(name: str, value: Any) -> None:
    if not callable(value):
        checks.number(name, value, at_least=0)


def _decay(weight_decay: Any) -> list[optax.GradientTransformation]:
    """The link ``g + weight_decay theta``; none for the number 0, which then needs no params."""
    _check_rate("weight_decay", weight_decay)
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return []
    return [_keep_dtypes(optax.add_decayed_weights(weight_decay))]


def _keep_dtypes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` with updates and state in the dtypes that they had.

    A hyper-parameter that is an array (traced, or from ``optax.inject_hyperparams``) promotes
    bfloat16, and a state that changes its dtype neither scans nor restores.
    """

    def update(updates, state, params=None):
        new_updates, new_state = inner.update(updates, state, params)
        return optax.tree.cast_like(new_updates, updates), optax.tree.cast_like(new_state, state)

    return optax.GradientTransformation(inner.init, update)
