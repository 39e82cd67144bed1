"""Steepest descent with respect to a norm: GD, signGD and coordinate descent are one transform.

FGSM on the input and signGD on the weights are the same map, ``LInf().steepest``, applied to the
gradient with respect to one or the other; this module is that map as an optax transform, and PGD
uses it as its step rule.

=========================  ===========  ======================================================
optimizer                  norm         update / learning rate, with ``scale_by_dual_norm``
=========================  ===========  ======================================================
gradient descent           ``L2()``     -g
signGD                     ``LInf()``   -||g||_1 sign(g)
greedy coordinate descent  ``L1()``     -g_i e_i at the first largest ``|g_i|`` of the whole tree
l_p steepest descent       ``Lp(p)``    -||g||_q^(2-q) |g|^(q-1) sign(g), 1/p + 1/q = 1
=========================  ===========  ======================================================
"""

import jax
import optax
from jaxtyping import ArrayLike

from robustjax import checks, norms
from robustjax.norms import LInf, Norm


def scale_by_steepest(
    norm: Norm, *, scale_by_dual_norm: bool = False
) -> optax.GradientTransformation:
    """Replaces updates g by ``norm.steepest(g)``, the direction of steepest ascent in the norm.

    The link of ``steepest_descent`` that needs no learning rate. The tree is one vector: its norm,
    and the one coordinate that l_1 picks, are global. A zero gradient gives a zero direction.

    Args:
      norm: the norm in which the ascent is steepest; the direction has length 1 in it.
      scale_by_dual_norm: multiply by the dual norm ``||g||_*``; with ``L2()`` this gives g back.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: ``norm`` is no norm.
    """
    norms.check(norm)

    def direction(g, params):
        del params
        d = norm.steepest(g)
        if scale_by_dual_norm:
            length = norm.dual.value(g)
            d = jax.tree.map(lambda leaf: leaf * length.astype(leaf.dtype), d)
        return d

    return optax.stateless(direction)


def steepest_descent(
    norm: Norm,
    learning_rate: ArrayLike | optax.Schedule,
    *,
    scale_by_dual_norm: bool = False,
) -> optax.GradientTransformation:
    """Updates ``-learning_rate * norm.steepest(g)``, of length ``learning_rate`` in the norm.

    The gradient tree is one vector: its norm, and the one coordinate that l_1 picks, are global. A
    zero gradient gives a zero update.

    Args:
      norm: the norm in which the descent is steepest.
      learning_rate: step size >= 0, a number (it may be traced) or an optax schedule.
      scale_by_dual_norm: multiply by the dual norm ``||g||_*``, so that steps shrink with the
        gradient and the update is the minimiser of ``<g, d> + ||d||^2 / 2`` over ``d``, times the
        learning rate; with ``L2()`` this is gradient descent.

    Returns:
      A gradient transformation; its state is a step count.

    Raises:
      ValueError: ``norm`` is no norm, or ``learning_rate`` is negative or not finite.

    Source: Boyd and Vandenberghe, "Convex optimization" (2004), section 9.4; the unscaled form is
    their normalised steepest descent.
    """
    link = scale_by_steepest(norm, scale_by_dual_norm=scale_by_dual_norm)
    if not callable(learning_rate):
        checks.number("learning_rate", learning_rate, at_least=0)
        # A schedule is cast to the dtype of each leaf; a traced number would promote bfloat16.
        learning_rate = optax.constant_schedule(learning_rate)
    return optax.chain(link, optax.scale_by_learning_rate(learning_rate))


def sign_gd(learning_rate: ArrayLike | optax.Schedule) -> optax.GradientTransformation:
    """signGD, ``-learning_rate * sign(g)``: steepest descent in l_inf, the FGSM of the weights."""
    return steepest_descent(LInf(), learning_rate)
