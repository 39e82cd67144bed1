"""ENGM: momentum SGD in which no example can pull harder than alpha (Dabouei et al., 2022).

Gradients come with a leading example axis on every leaf, as ``jax.vmap(jax.grad(loss), (None,
0))`` returns them. Each example's gradient, one vector over all leaves, is scaled by a weight that
depends on its l_2 norm only; then the mean over the examples goes into ``msgd``.

==========  =======================================  ==========================================
chain       weight of example i                      contribution of example i
==========  =======================================  ==========================================
``msgd``    1                                        g_i
``engm``    min(alpha / (||g_i|| + 1e-12), 1)        norm <= alpha: only ever shrunk
``f_engm``  alpha / (||g_i|| + 1e-12)                norm alpha: small ones are enlarged too
==========  =======================================  ==========================================

What clipping guarantees, with n examples, momentum m and no weight decay, for either chain:

* the mean of the clipped gradients has norm <= min(alpha, mean ||g_i||) (``engm``; alpha for
  ``f_engm``), the buffer after t steps <= alpha (1 - m^t) / (1 - m), and one step <= learning_rate
  alpha / (1 - m);
* one example, added or removed, changes their sum by at most alpha; replaced, by at most 2 alpha;
* the variance of a clipped gradient is at most alpha^2, whatever that of the gradient.

Limits: ``alpha = inf`` is ``msgd`` on the mean gradient, bit for bit, and so is any alpha that no
norm exceeds (up to the order in which a compiler sums); alpha below all norms makes ``engm`` and
``f_engm`` one, with a trajectory that depends on ``learning_rate * alpha`` alone; batches of one
example make ``engm`` one with ``mgnc(max_norm=alpha)``. Losses and alpha times s give updates
times s.

The price is bias. If an example's gradient is distributed symmetrically about its mean, the mean
of the clipped gradients keeps the sign of the mean; if it is skewed, clipping favours the many
small gradients over the few large ones, and no learning rate undoes that.

``clip_per_example`` and ``mean_over_examples`` compute what DP-SGD does before it adds noise, or
``optax.contrib.differentially_private_aggregate`` with ``noise_multiplier=0``: here for the sake
of the optimizer, since without noise there is no privacy. As two links they also run in parallel,
keep the dtypes, and normalise in place of clipping.

Composing with optax. A wrapper that keeps or compares updates shaped like the parameters (to
accumulate them, to replace them by zeros, to leave some alone) goes around what follows
``mean_over_examples``; the ready chains are for everything else.

==========================  =====================================================================
wrapper                     use
==========================  =====================================================================
``inject_hyperparams``      ``optax.inject_hyperparams(engm)(learning_rate=lr, alpha=schedule)``
``MultiSteps``              ``chain(clip_per_example(a), mean_over_examples(),
                            optax.MultiSteps(msgd(lr), k).gradient_transformation())``: k
                            micro-batches are one batch, clipped example by example
``apply_if_finite``         ``chain(clip_per_example(a), mean_over_examples(),
                            optax.apply_if_finite(msgd(lr), k))``
``masked``                  ``chain(clip_per_example(a), mean_over_examples(),
                            optax.masked(msgd(lr), mask))``: norms over all leaves
``partition`` and the like  as ``masked``
other optimizers            ``chain(clip_per_example(a), mean_over_examples(), optax.adam(lr))``
==========================  =====================================================================

Source: Dabouei et al., "Revisiting outer optimization in adversarial training" (2022), section 2.4;
Abadi et al., "Deep learning with differential privacy" (2016), algorithm 1. The guards 1e-12 are
added here.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, lp
from robustjax.norms import L2
from robustjax.optim.normalized import Rate, mean_over_devices, msgd

GUARD = 1e-12


def engm_weights(norms: Float[Array, " n"], alpha: ArrayLike) -> Float[Array, " n"]:
    """``min(alpha / (norm + 1e-12), 1)``: the weights that clip gradients to norm alpha.

    Args:
      norms: norms of the per-example gradients, or estimates of them, >= 0.
      alpha: bound > 0, in units of the norms; it may be traced, and infinite. The weights are
        exactly 1 where it is not below the norm.

    Returns:
      Weights in ``(0, 1]``.

    Raises:
      ValueError: ``alpha`` is not a positive number.

    Source: Dabouei et al. (2022), equation 5.
    """
    checks.number("alpha", alpha, above=0, at_most=math.inf)
    wide = norms.astype(lp.wide(norms.dtype))
    # Not jnp.minimum: the guard would show where alpha is a tiny norm, and an infinite alpha would
    # have no derivative.
    inside = wide <= alpha
    return jnp.where(inside, 1, jnp.where(inside, 1, alpha) / (wide + GUARD)).astype(norms.dtype)


def f_engm_weights(norms: Float[Array, " n"], alpha: ArrayLike = 1.0) -> Float[Array, " n"]:
    """``alpha / (norm + 1e-12)``: the weights that give every gradient the norm alpha.

    Args:
      norms: norms of the per-example gradients, or estimates of them, >= 0.
      alpha: common norm > 0, finite, in units of the norms; it may be traced.

    Raises:
      ValueError: ``alpha`` is not a positive finite number.

    Source: Dabouei et al. (2022), section 3.1 ("F-ENGM"). The text has a constant alpha; the
    formula has 1, which is the default.
    """
    checks.number("alpha", alpha, above=0)
    return (alpha / (norms.astype(lp.wide(norms.dtype)) + GUARD)).astype(norms.dtype)


def clip_per_example(alpha: ArrayLike) -> optax.GradientTransformation:
    """Shrinks the gradient of each example to an l_2 norm of at most alpha, over all leaves.

    This is the projection of each example's gradient on the ball of radius alpha. The example axis
    stays: ``mean_over_examples`` comes next.

    Args:
      alpha: bound > 0, in units of the gradient's norm; it may be traced, and infinite.

    Raises:
      ValueError: ``alpha`` is not a positive number; in ``update``, the leaves disagree about the
        number of examples, or are not shaped ``(n, *shape of the parameter)``.
    """
    checks.number("alpha", alpha, above=0, at_most=math.inf)
    if not checks.is_traced(alpha) and math.isinf(alpha):
        return optax.identity()  # jit sums in another order what it has multiplied by ones
    return _scale_per_example(lambda norms: engm_weights(norms, alpha))


def normalize_per_example(alpha: ArrayLike = 1.0) -> optax.GradientTransformation:
    """Scales the gradient of each example to an l_2 norm of exactly alpha; zero stays zero.

    The result does not change when the loss of any one example is multiplied by a positive number.
    The example axis stays: ``mean_over_examples`` comes next.

    Args:
      alpha: common norm > 0, finite; it may be traced.

    Raises:
      ValueError: ``alpha`` is not a positive finite number; in ``update`` as ``clip_per_example``.
    """
    checks.number("alpha", alpha, above=0)
    return _scale_per_example(lambda norms: f_engm_weights(norms, alpha))


def mean_over_examples(axis_name: Hashable = None) -> optax.GradientTransformation:
    """The mean over the leading axis of every leaf, and then over the devices.

    Args:
      axis_name: mapped axis with an equal share of the batch on each device, or ``None``; see
        ``mean_over_devices`` for what ``shard_map`` needs.

    Raises:
      ValueError: in ``update``, as ``clip_per_example``.
    """

    def mean(updates, params):
        _check_examples(updates, params)
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), updates)

    return optax.chain(optax.stateless(mean), mean_over_devices(axis_name))


def engm(
    learning_rate: Rate,
    alpha: ArrayLike,
    *,
    momentum: ArrayLike = 0.9,
    weight_decay: Rate = 0.0,
    axis_name: Hashable = None,
) -> optax.GradientTransformation:
    """ENGM: clip each example's gradient to norm alpha, average, and take a step of ``msgd``.

    The chain of ``clip_per_example(alpha)``, ``mean_over_examples(axis_name)`` and ``msgd``: weight
    decay is added to the mean of the clipped gradients. The paper uses alpha = 5 for ResNet-18;
    ``scale_alpha`` carries it to another size of network.

    Args:
      learning_rate: step size >= 0, a number (it may be traced) or an optax schedule.
      alpha: bound > 0, in units of an example's gradient norm; it may be traced, and infinite. For
        a schedule, ``optax.inject_hyperparams(engm)(learning_rate=lr, alpha=schedule)``.
      momentum: in ``[0, 1)``.
      weight_decay: >= 0, a number or an optax schedule.
      axis_name: mapped axis that the examples are spread over; the result is that of one device.

    Returns:
      A gradient transformation whose ``update`` takes gradients ``(n, *shape of the parameter)``
      and returns updates shaped like the parameters. A gradient that is not finite makes the
      update NaN; ``optax.apply_if_finite`` around the links after the mean skips such steps.

    Raises:
      ValueError: a hyper-parameter is out of its range; in ``update`` as ``clip_per_example``.

    Source: Dabouei et al. (2022), equation 5.
    """
    return optax.chain(
        clip_per_example(alpha),
        mean_over_examples(axis_name),
        msgd(learning_rate, momentum=momentum, weight_decay=weight_decay),
    )


def f_engm(
    learning_rate: Rate,
    alpha: ArrayLike = 1.0,
    *,
    momentum: ArrayLike = 0.9,
    weight_decay: Rate = 0.0,
    axis_name: Hashable = None,
) -> optax.GradientTransformation:
    """F-ENGM: ``engm`` with every example's gradient scaled to norm alpha, enlarged if need be.

    The paper's baseline: examples that are already fitted pull as hard as the others.

    Args:
      learning_rate: step size >= 0, a number (it may be traced) or an optax schedule.
      alpha: norm of every contribution, > 0 and finite; it may be traced.
      momentum: in ``[0, 1)``.
      weight_decay: >= 0, a number or an optax schedule.
      axis_name: mapped axis that the examples are spread over; the result is that of one device.

    Raises:
      ValueError: a hyper-parameter is out of its range; in ``update`` as ``clip_per_example``.

    Source: Dabouei et al. (2022), section 3.1.
    """
    return optax.chain(
        normalize_per_example(alpha),
        mean_over_examples(axis_name),
        msgd(learning_rate, momentum=momentum, weight_decay=weight_decay),
    )


def scale_alpha(alpha: float, params_from: float, params_to: float) -> float:
    """``alpha sqrt(params_to / params_from)``: alpha for a network with more or fewer parameters.

    The norm of a gradient grows with the square root of the number of its entries: alpha = 5 at
    11.1 million parameters (ResNet-18) becomes 10.4 at 48.2 million (WRN-34-10).

    Args:
      alpha: bound > 0 that suits the one network.
      params_from: its number of parameters, > 0.
      params_to: the number of parameters of the other, > 0.

    Raises:
      ValueError: an argument is not a positive finite number.

    Source: Dabouei et al. (2022), sections 2.4 and 3.3.
    """
    checks.number("alpha", alpha, above=0)
    checks.number("params_from", params_from, above=0)
    checks.number("params_to", params_to, above=0)
    return alpha * math.sqrt(params_to / params_from)


def _scale_per_example(weights_of: Callable) -> optax.GradientTransformation:
    def scale(updates, params):
        _check_examples(updates, params)
        # In at least float32: a norm rounded to bfloat16 would let the bound be passed by 0.4 %.
        wide = jax.tree.map(lambda g: g.astype(lp.wide(g.dtype)), updates)
        weights = weights_of(L2().value(wide, batch_ndim=1))
        scaled = jax.vmap(lp.scale)(wide, weights)
        return optax.tree.cast_like(scaled, updates)

    return optax.stateless(scale)


def _check_examples(updates: Any, params: Any) -> None:
    """Every leaf has the same number of examples in front of the shape of its parameter."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(updates)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            "updates must be per-example gradients, with one leading axis of n >= 1 examples on "
            f"every leaf, got shapes {checks.shown(shapes)}"
        )
    if params is None:
        return
    expected = [leaf.shape for leaf in jax.tree.leaves(params)]
    if [shape[1:] for shape in shapes] != expected:
        raise ValueError(
            "updates must be per-example gradients of shapes (n, *shape of the parameter), got "
            f"shapes {checks.shown(shapes)} for parameters of shapes {checks.shown(expected)}"
        )
