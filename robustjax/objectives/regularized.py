"""Objectives with a penalty on how the loss behaves around the input.

``penalized(base, penalty)`` adds any penalty to any objective: GradAlign is FGSM training with
``grad_align``, SOAR is training at a point near ``x`` with ``second_order.soar``.

A penalty is ``penalty(logits_fn, keys (n,), x, y) -> (n,)``, the signature of an attack, and is
differentiated for the parameters inside ``logits_fn`` (double backpropagation). All are finite, and
so are their derivatives, where the gradients that they compare are zero.

=======================  ===========================================================
penalty                  per example, with ``g(x) = grad_x l(x, y)``
=======================  ===========================================================
``first_order``          ``eps ||g(x)||_*``                                    (FOAR)
``gradient_penalty``     ``||g(x)||_2^2``                          (double backprop)
``soar``                 ``(d eps^2 + 1) / 2 ||H z||_2``, H the augmented Hessian
``grad_align``           ``1 - cos(g(x), g(x + eta))``
``cure``                 ``||g(x + d) - g(x)||_2^2``
``local_linearity``      ``max_d |l(x + d) - l(x) - <d, g(x)>|``                (LLR)
``logit_squeezing``      ``||z(x)||_2^2``
``clean_logit_pairing``  ``||z(x_i) - z(x_j)||_2^2`` for random pairs
=======================  ===========================================================
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, keys, norms
from robustjax.losses import cross_entropy
from robustjax.metrics.alignment import ForwardPass, cosine, input_gradient
from robustjax.norms import L2, LInf, Norm
from robustjax.objectives.stages import LossFn, Stages, stages
from robustjax.objectives.standard import Evaluated, ModelFn, Objective, logits_of

Penalty = Callable[..., Float[Array, " n"]]


def penalized(
    base: Objective, penalty: Penalty, *, weight: ArrayLike = 1.0, at: str = "image"
) -> Objective:
    """``base`` plus ``weight`` times a penalty at the clean or at the attacked inputs.

    Args:
      base: any objective.
      penalty: ``penalty(logits_fn, keys, x, y) -> (n,)``. Its forward passes use the batch
        statistics of training mode, and what they would record is discarded. If it has an argument
        ``forward_pass``, it is given the one at ``x``, a ``metrics.ForwardPass``, and
        where ``base`` measures the loss at ``x`` it shares this pass: values are the same, and
        derivatives go back through it once for both.
      weight: lambda, ``>= 0``; it may be traced.
      at: ``"image"`` or ``"adversarial"``: which inputs of the batch the penalty is taken at.

    Returns:
      An objective that reports what ``base`` does, with ``loss`` the sum and ``penalty`` its
      weighted part.
    """
    checks.function("base", base)
    checks.function("penalty", penalty)
    checks.number("weight", weight, at_least=0)
    checks.choice("at", at, ("image", "adversarial"))
    shares = "forward_pass" in inspect.signature(penalty).parameters

    def objective(model_fn: ModelFn) -> LossFn:
        parts = stages(base(model_fn))

        def outer(params, model_state, key, batch, train=True):
            checks.fields("batch", batch, (at, "index"))
            x = batch[at]

            def forward(x):
                return logits_of(model_fn, params, model_state, key, batch, x, train)

            # The attack has fold_in(key, 0), the model fold_in(key, 1).
            example_keys = keys.per_example(jax.random.fold_in(key, 2), batch["index"])
            arguments = (lambda x: forward(x)[0], example_keys, x, batch["label"])
            if shares:
                logits, pullback, state = jax.vjp(forward, x, has_aux=True)
                added = penalty(*arguments, forward_pass=ForwardPass(logits, pullback))
                known = (params, model_state, key, batch["index"], x, train)
                measure = stages(base(Evaluated(model_fn, known, (logits, state)))).outer
            else:
                added = penalty(*arguments)
                measure = parts.outer
            losses, (new_state, metrics) = measure(params, model_state, key, batch, train)
            added = weight * checks.per_example("penalty", added, losses.shape[0])
            losses = losses + added
            return losses, (new_state, {**metrics, "loss": losses, "penalty": added})

        return Stages(parts.inner, outer)

    return objective


def grad_align(
    eps: ArrayLike,
    *,
    norm: Norm | None = None,
    point: str = "random",
    sides: str = "one",
    loss: Callable = cross_entropy,
) -> Penalty:
    """GradAlign: ``1 - cos(g(x), g(x + eta))``, in [0, 2]; 0 where a gradient is zero.

    Added to FGSM training, ``penalized(madry(fgsm(threat)), grad_align(eps), weight=lam)``, it
    prevents catastrophic overfitting. Zero for a linear binary classifier.

    Args:
      eps: radius of ``eta``, ``>= 0``, in input units; it may be traced.
      norm: of the ball; default ``LInf()``.
      point: ``"random"``: ``eta`` uniform in the ball; ``"fgsm"``: the step of FGSM.
      sides: ``"one"``: the gradient at ``x`` is a constant, as in the authors' code; ``"two"``:
        both are differentiated.
      loss: ``loss(logits, y) -> (n,)``.

    Source: Andriushchenko and Flammarion (2020), "Understanding and improving fast adversarial
    training", equation (6). ``x + eta`` is not clipped to the box, as there. Their code takes the
    mean over the examples with two gradients that are not zero; here the others count as 0.
    """
    checks.number("eps", eps, at_least=0)
    checks.choice("point", point, ("random", "fgsm"))
    checks.choice("sides", sides, ("one", "two"))
    norm = LInf() if norm is None else norms.check(norm)

    def penalty(logits_fn, key, x, y, forward_pass=None):
        first = input_gradient(logits_fn, x, y, loss, forward_pass)
        if point == "fgsm":
            eta = eps * norm.steepest(jax.lax.stop_gradient(first), batch_ndim=1)
        else:
            eta = _in_ball(norm, keys.as_per_example(key, x.shape[0]), x, eps)
        second = input_gradient(logits_fn, x + eta, y, loss)
        return 1 - cosine(jax.lax.stop_gradient(first) if sides == "one" else first, second)

    return penalty


def _in_ball(norm: Norm, example_keys: Array, x: Array, eps: ArrayLike) -> Array:
    return jax.vmap(lambda key, x: norm.sample_ball(key, x, eps))(example_keys, x)


def gradient_penalty(
    *, norm: Norm | None = None, power: int = 2, loss: Callable = cross_entropy
) -> Penalty:
    """``||g(x)||^power``: the size of the input gradient, of each example's own loss.

    Args:
      norm: of the gradient; default ``L2()``.
      power: 1 or 2.
      loss: ``loss(logits, y) -> (n,)``.

    Source: Drucker and LeCun (1992), "Improving generalization performance using double
    backpropagation"; Simon-Gabriel et al. (2019), "First-order adversarial vulnerability of neural
    networks and input dimension".
    """
    checks.choice("power", power, (1, 2))
    norm = L2() if norm is None else norms.check(norm)

    def penalty(logits_fn, key, x, y, forward_pass=None):
        del key
        gradient = input_gradient(logits_fn, x, y, loss, forward_pass)
        if power == 2 and isinstance(norm, L2):
            return jnp.sum(gradient**2, axis=range(1, gradient.ndim))
        return norm.value(gradient, batch_ndim=1) ** power

    return penalty


def first_order(
    eps: ArrayLike, *, norm: Norm | None = None, loss: Callable = cross_entropy
) -> Penalty:
    """FOAR: ``eps ||g(x)||_*``, the most that the linearised loss gains in the ball.

    Args:
      eps: radius, ``>= 0``, in input units; it may be traced.
      norm: of the threat model; default ``LInf()``, whose dual norm is l_1.
      loss: ``loss(logits, y) -> (n,)``.

    Source: Simon-Gabriel et al. (2019), equation (3); Ma (2025), "Understanding adversarial
    robustness in deep learning", equation (3.4).
    """
    checks.number("eps", eps, at_least=0)
    norm = LInf() if norm is None else norms.check(norm)
    size = gradient_penalty(norm=norm.dual, power=1, loss=loss)

    def penalty(logits_fn, key, x, y, forward_pass=None):
        return eps * size(logits_fn, key, x, y, forward_pass)

    return penalty


def cure(eps: ArrayLike, *, point: str = "fgsm", loss: Callable = cross_entropy) -> Penalty:
    """CURE: ``||g(x + d) - g(x)||_2^2``, the curvature along the direction of the gradient's sign.

    Args:
      eps: length of the step, ``>= 0``; it may be traced.
      point: ``"fgsm"``: ``d = eps sign(g)``; ``"unit"``: ``d = eps sign(g) / ||sign(g)||_2``, the
        finite difference of the original.
      loss: ``loss(logits, y) -> (n,)``.

    Source: Moosavi-Dezfooli et al. (2019), "Robustness via curvature regularization, and vice
    versa", equation (9), without its division by the step; Andriushchenko (2024), section 2.E, for
    the FGSM point.
    """
    checks.number("eps", eps, at_least=0)
    checks.choice("point", point, ("fgsm", "unit"))

    def penalty(logits_fn, key, x, y, forward_pass=None):
        del key
        gradient = input_gradient(logits_fn, x, y, loss, forward_pass)
        direction = LInf().steepest(jax.lax.stop_gradient(gradient), batch_ndim=1)
        if point == "unit":
            direction = L2().steepest(direction, batch_ndim=1)
        change = input_gradient(logits_fn, x + eps * direction, y, loss) - gradient
        return jnp.sum(change**2, axis=range(1, x.ndim))

    return penalty


def local_linearity(
    eps: ArrayLike,
    *,
    norm: Norm | None = None,
    steps: int = 2,
    slope_weight: ArrayLike = 0.0,
    loss: Callable = cross_entropy,
) -> Penalty:
    """LLR: ``gamma = |l(x + d) - l(x) - <d, g(x)>|`` at the worst ``d``, and ``|<d, g(x)>|`` there.

    ``d`` is found by steepest ascent on gamma from a uniform start, with steps of ``2 eps / steps``
    projected on the ball, and held constant.

    Args:
      eps: radius of the ball, ``>= 0``; it may be traced.
      norm: of the ball; default ``LInf()``.
      steps: of the search, ``>= 1``; 2 for the published LLR-2.
      slope_weight: mu / lambda, the weight of ``|<d, g>|`` relative to gamma, ``>= 0``.
      loss: ``loss(logits, y) -> (n,)``.

    Source: Qin et al. (2019), "Adversarial robustness through local linearization", equation (8).
    Their search uses Adam.
    """
    checks.number("eps", eps, at_least=0)
    checks.integer("steps", steps, at_least=1)
    checks.number("slope_weight", slope_weight, at_least=0)
    norm = LInf() if norm is None else norms.check(norm)

    def penalty(logits_fn, key, x, y):
        def violation(d):
            """Gamma and the slope of each example, both differentiable for the parameters."""
            value, slope = jax.jvp(lambda x: loss(logits_fn(x), y), (x,), (d,))
            return jnp.abs(loss(logits_fn(x + d), y) - value - slope), jnp.abs(slope)

        def ascend(d, _):
            g = jax.grad(lambda d: violation(d)[0].sum())(d)
            d = d + 2 * eps / steps * norm.steepest(g, batch_ndim=1)
            return norm.project(d, eps, batch_ndim=1), None

        start = _in_ball(norm, keys.as_per_example(key, x.shape[0]), x, eps)
        worst, _ = jax.lax.scan(ascend, start, length=steps)
        gamma, slope = violation(jax.lax.stop_gradient(worst))
        return gamma + slope_weight * slope

    return penalty


def logit_squeezing() -> Penalty:
    """LSQ: ``||z(x)||_2^2``, to be taken at inputs with Gaussian noise.

    Source: Kannan et al. (2018), "Adversarial logit pairing", section 3.3.
    """
    return lambda logits_fn, key, x, y: jnp.sum(logits_fn(x) ** 2, axis=-1)


def clean_logit_pairing() -> Penalty:
    """CLP: ``||z(x_i) - z(x_j)||_2^2`` with ``j`` the example half a batch further.

    Batches are shuffled, so the pairs are random. It couples the examples of a batch.

    Source: Kannan et al. (2018), "Adversarial logit pairing", section 3.3.
    """

    def penalty(logits_fn, key, x, y):
        del key, y
        logits = logits_fn(x)
        return jnp.sum((logits - jnp.roll(logits, logits.shape[0] // 2, axis=0)) ** 2, axis=-1)

    return penalty
