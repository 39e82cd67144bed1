"""SOAR: a penalty on the second-order expansion of the loss, and the point at which it is taken.

``penalized(madry(attack), soar(radius), at="adversarial")`` with ``attack, radius =
evaluation_point(threat)`` is SOAR.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks, keys
from robustjax.attacks import Attack, pgd
from robustjax.losses import cross_entropy
from robustjax.metrics.alignment import input_gradient
from robustjax.norms import L2
from robustjax.objectives.regularized import Penalty
from robustjax.threat import ThreatModel


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
      samples: vectors ``z`` for each example, ``>= 1``; with ``"spectral"``, products with H.
      hessian: ``"difference"``: ``K z_d`` by a forward difference, as published; ``"exact"``: by
        ``jvp`` of the gradient, zero almost everywhere where the network is piecewise linear in
        its second derivative, as ReLU networks are but for the softmax.
      bound: ``"mean"``: the mean of ``||H z||``, as published. It estimates ``E ||H z||``, which
        lies between ``sqrt(2 / pi) ||H||_F`` and ``||H||_F``: the printed inequality with it is no
        upper bound of the loss in the ball. ``"frobenius"``: the root of the mean of ``||H z||^2``,
        an unbiased estimate of ``||H||_F`` squared, with which it is one in expectation.
        ``"spectral"``: ``||H v||_2`` of the unit vector ``v`` to which power iteration from ``z``
        comes, which grows to ``||H||_2`` with ``samples``; derivatives hold ``v`` constant.
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
    checks.choice("bound", bound, ("mean", "frobenius", "spectral"))
    if clip is not None:
        checks.number("clip", clip, above=0)

    def penalty(logits_fn, key, x, y, forward_pass=None):
        example_keys = keys.as_per_example(key, x.shape[0])
        gradient = None  # the exact product has it from its own passes
        if hessian == "difference":
            gradient = input_gradient(logits_fn, x, y, loss, forward_pass)

        def draw(sample):
            def one(key):
                of_x, of_one = jax.random.split(jax.random.fold_in(key, sample))
                return jax.random.normal(of_x, x.shape[1:], x.dtype), jax.random.normal(of_one)

            return jax.vmap(one)(example_keys)

        def times_hessian(z, z_1, gradient=gradient):
            return augmented_hessian_product(
                logits_fn, x, y, z, z_1, h=h, hessian=hessian, loss=loss, gradient=gradient
            )

        def squared(upper, lower):
            return jnp.sum(upper**2, axis=range(1, x.ndim)) + lower**2

        def squared_norm_of(z, z_1):
            return squared(*times_hessian(z, z_1))

        def to_unit(z, z_1):
            inverse = jax.lax.rsqrt(squared(z, z_1) + 1e-30)
            return _times(inverse, z), inverse * z_1

        def largest():
            """Of the vector that all but one of the products have turned to."""
            known = jax.lax.stop_gradient(gradient)
            vector = to_unit(*draw(0))
            if samples > 1:
                vector = jax.lax.fori_loop(
                    1, samples, lambda _, v: to_unit(*times_hessian(*v, known)), vector
                )
            return squared_norm_of(*jax.lax.stop_gradient(vector))

        if bound == "spectral":
            squares = largest()[None]
        elif samples == 1:
            squares = squared_norm_of(*draw(0))[None]
        else:
            squares = jax.lax.map(lambda i: squared_norm_of(*draw(i)), jnp.arange(samples))
        if bound == "frobenius":
            squares = squares.mean(axis=0, keepdims=True)
        # The derivative of the root is not finite at zero.
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
    gradient: Float[Array, "n ..."] | None = None,
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
      gradient: that of the loss at ``x``, if it is known; the exact product makes its own.

    Returns:
      The two parts of the product, shaped like ``z`` and ``z_1``.
    """

    def gradient_at(x):
        return input_gradient(logits_fn, x, y, loss)

    if hessian == "exact":
        gradient, product = jax.jvp(gradient_at, (x,), (z,))
    else:
        gradient = gradient_at(x) if gradient is None else gradient
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
