"""Objectives with a penalty on how the loss behaves around the input.

``penalized(base, penalty)`` adds any penalty to any objective: GradAlign is FGSM training with
``grad_align``, SOAR is training at a point near ``x`` with ``soar``.

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

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, keys, norms
from robustjax.attacks import Attack, pgd
from robustjax.losses import cross_entropy
from robustjax.metrics.alignment import cosine, input_gradient
from robustjax.norms import L2, LInf, Norm
from robustjax.objectives.stages import LossFn, Stages, stages
from robustjax.objectives.standard import ModelFn, Objective, logits_of
from robustjax.threat import ThreatModel

Penalty = Callable[[Callable, Array, Array, Array], Float[Array, " n"]]


def penalized(
    base: Objective, penalty: Penalty, *, weight: ArrayLike = 1.0, at: str = "image"
) -> Objective:
    """``base`` plus ``weight`` times a penalty at the clean or at the attacked inputs.

    Args:
      base: any objective.
      penalty: ``penalty(logits_fn, keys, x, y) -> (n,)``. Its forward passes use the batch
        statistics of training mode, and what they would record is discarded.
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

    def objective(model_fn: ModelFn) -> LossFn:
        parts = stages(base(model_fn))

        def outer(params, model_state, key, batch, train=True):
            losses, (new_state, metrics) = parts.outer(params, model_state, key, batch, train)
            checks.fields("batch", batch, (at,))

            def logits_fn(x):
                return logits_of(model_fn, params, model_state, key, batch, x, train)[0]

            # The attack has fold_in(key, 0), the model fold_in(key, 1).
            example_keys = keys.per_example(jax.random.fold_in(key, 2), batch["index"])
            added = penalty(logits_fn, example_keys, batch[at], batch["label"])
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

    def penalty(logits_fn, key, x, y):
        first = input_gradient(logits_fn, x, y, loss)
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

    def penalty(logits_fn, key, x, y):
        del key
        gradient = input_gradient(logits_fn, x, y, loss)
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
    return lambda logits_fn, key, x, y: eps * size(logits_fn, key, x, y)


def soar(
    eps: ArrayLike,
    *,
    h: float = 0.01,
    samples: int = 1,
    hessian: str = "difference",
    bound: str = "mean",
    clip: float | None = None,
    loss: Callable = cross_entropy,
) -> Penalty:
    """SOAR: ``(d eps^2 + 1) / 2 ||H z||_2`` with ``z ~ N(0, I)`` and the augmented Hessian

        ``H = [[K, g], [g^T, 1]]``,    ``K = Hess_x l``,  ``g = grad_x l``,

    of which ``H z = (K z_d + z_1 g, g^T z_d + z_1)`` is one Hessian-vector product. It never falls
    below ``(d eps^2 + 1) / 2 |z_1|``, its value for a flat loss: a constant without gradient.

    Args:
      eps: radius of l_inf perturbations, ``>= 0``, in input units; it may be traced.
      h: length of the finite difference along ``z_d / ||z_d||``, ``> 0``.
      samples: vectors ``z`` for each example, ``>= 1``.
      hessian: ``"difference"``: ``K z_d`` by a forward difference, as published; ``"exact"``: by
        ``jvp`` of the gradient, zero almost everywhere where the network is piecewise linear in
        its second derivative, as ReLU networks are but for the softmax.
      bound: ``"mean"``: the mean of ``||H z||``, as published. It estimates ``E ||H z||``, which
        lies between ``sqrt(2 / pi) ||H||_F`` and ``||H||_F``: the printed inequality with it is no
        upper bound of the loss in the ball. ``"frobenius"``: the root of the mean of ``||H z||^2``,
        an unbiased estimate of ``||H||_F`` squared, with which it is one in expectation.
      clip: the most that the penalty of an example counts; ``None`` for no limit. The paper clips
        "the regularizer" at 10; a clipped example has no gradient.
      loss: ``loss(logits, y) -> (n,)``.

    Source: Ma (2025), "Understanding adversarial robustness in deep learning", equations (3.7) to
    (3.12); Ma, Faghri, Papernot and Farahmand (2020), "SOAR: second-order adversarial
    regularization". The constant -1/2 of the bound is left out, as there.
    """
    checks.number("eps", eps, at_least=0)
    checks.number("h", h, above=0)
    checks.integer("samples", samples, at_least=1)
    checks.choice("hessian", hessian, ("difference", "exact"))
    checks.choice("bound", bound, ("mean", "frobenius"))
    if clip is not None:
        checks.number("clip", clip, above=0)

    def penalty(logits_fn, key, x, y):
        example_keys = keys.as_per_example(key, x.shape[0])

        def squared_norm(sample):
            def draw(key):
                of_x, of_one = jax.random.split(jax.random.fold_in(key, sample))
                return jax.random.normal(of_x, x.shape[1:], x.dtype), jax.random.normal(of_one)

            z, z_1 = jax.vmap(draw)(example_keys)
            upper, lower = augmented_hessian_product(
                logits_fn, x, y, z, z_1, h=h, hessian=hessian, loss=loss
            )
            return jnp.sum(upper**2, axis=range(1, x.ndim)) + lower**2

        squares = (
            jax.lax.map(squared_norm, jnp.arange(samples)) if samples > 1 else squared_norm(0)[None]
        )
        # The derivative of the root is not finite at zero.
        if bound == "frobenius":
            size = jnp.sqrt(squares.mean(axis=0) + 1e-12)
        else:
            size = jnp.sqrt(squares + 1e-12).mean(axis=0)
        value = (x[0].size * jnp.square(eps) + 1) / 2 * size
        return value if clip is None else jnp.minimum(value, clip)

    return penalty


def augmented_hessian_product(
    logits_fn: Callable,
    x: Float[Array, "n ..."],
    y: Array,
    z: Float[Array, "n ..."],
    z_1: Float[Array, " n"],
    *,
    h: float = 0.01,
    hessian: str = "difference",
    loss: Callable = cross_entropy,
) -> tuple[Float[Array, "n ..."], Float[Array, " n"]]:
    """``H (z, z_1) = (K z + z_1 g, g^T z + z_1)`` of each example, see ``soar``.

    Args:
      logits_fn: ``(n, ...) -> (n, K)``.
      x: where the loss is expanded.
      y: labels.
      z: the part of the vector that belongs to the input.
      z_1: its last entry.
      h: length of the finite difference.
      hessian: ``"difference"`` or ``"exact"``.
      loss: ``loss(logits, y) -> (n,)``.

    Returns:
      The two parts of the product, shaped like ``z`` and ``z_1``.
    """

    def gradient_at(x):
        return input_gradient(logits_fn, x, y, loss)

    if hessian == "exact":
        gradient, product = jax.jvp(gradient_at, (x,), (z,))
    else:
        gradient = gradient_at(x)
        moved = gradient_at(x + h * L2().steepest(z, batch_ndim=1))
        product = _times(L2().value(z, batch_ndim=1) / h, moved - gradient)
    lower = jnp.sum(gradient * z, axis=range(1, x.ndim)) + z_1
    return product + _times(z_1, gradient), lower


def _times(scalars: Float[Array, " n"], x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    return scalars.reshape(-1, *[1] * (x.ndim - 1)) * x


def evaluation_point(threat: ThreatModel, start: str = "pgd1") -> tuple[Attack, ArrayLike]:
    """Where SOAR and FOAR expand the loss, and the radius that is left there.

    ``"zero"``: at ``x``, all of eps is left; ``"random"``: uniform in the ball, all of eps;
    ``"pgd1"``: one step of PGD of length eps / 2 from a uniform start in the ball of half the
    radius, in which eps / 2 is left.

    Returns:
      ``(attack, radius)``: ``penalized(madry(attack), soar(radius), at="adversarial")`` is SOAR.

    Source: Ma (2025), algorithm 3.1 and section 3.E. The radius left at the zero and random points
    is not printed; all of eps is the consistent choice.
    """
    checks.choice("start", start, ("zero", "random", "pgd1"))
    if start == "zero":
        return pgd(threat, steps=0, start="zero"), threat.eps
    if start == "random":
        return pgd(threat, steps=0), threat.eps
    half = ThreatModel(threat.norm, threat.eps / 2, threat.lower, threat.upper)
    return pgd(half, steps=1, step_size=half.eps), half.eps


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

    def penalty(logits_fn, key, x, y):
        del key
        gradient = input_gradient(logits_fn, x, y, loss)
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
