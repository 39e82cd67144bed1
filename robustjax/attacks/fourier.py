"""Fourier attacks: perturbations with bounded Fourier coefficients, ``||F delta||_inf <= eps``.

The iterative attack is ``pgd(ThreatModel(FourierLInf(), eps), ...)``: its step is the unit Fourier
direction ``F^-1(G / |G|)`` of the gradient, and its projection cuts the magnitudes at eps.
``FourierLInf(low=r)`` and ``FourierLInf(high=r)`` restrict it to low and to high frequencies. Here
are the closed form for linear models, and what is peculiar to a Fourier ball and a box: clipping an
image to the box can carry the perturbation out of the ball again. ``violation`` says how far,
``project_in_box`` finds a point that lies in both.

Source: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
(2021).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from robustjax import checks
from robustjax.attacks.gradient import Attack, Start, gaussian_start, pgd
from robustjax.attacks.stepwise import rows
from robustjax.fourier_norms import FourierLInf
from robustjax.frequency import dft, mask_of
from robustjax.losses import cross_entropy
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat


def fourier_linear(
    w: Float[Array, "..."],
    y: Float[ArrayLike, " n"],
    eps: ArrayLike,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Float[Array, "n ..."]:
    """The strongest perturbations of a linear model: ``-y eps F^-1(F w / |F w|)``.

    They change the output ``y (w . x + b)`` of every example by ``-eps ||F w||_1``, the sum being
    over the band.

    Args:
      w: weights, one signal ``(d,)`` or image ``(h, w, c)``.
      y: labels, -1.0 or 1.0.
      eps: largest magnitude of a Fourier coefficient, ``>= 0``; one number or one per example.
      low: perturb the frequencies up to this one, 0 to 0.5 cycles per pixel; None: no upper edge.
      high: perturb the frequencies from this one on; None: no lower edge.

    Raises:
      ValueError: an argument is out of range.

    Source: Faghri et al. (2021).
    """
    checks.number("eps", eps, at_least=0)
    y = jnp.asarray(y, w.dtype)
    if y.ndim != 1 or jnp.shape(eps) not in ((), y.shape):
        raise ValueError(
            f"y must be (n,) and eps one number or (n,), got shapes {y.shape} and {jnp.shape(eps)}"
        )
    size = -y * jnp.asarray(eps, w.dtype)
    return jnp.tensordot(size, FourierLInf(low, high).steepest(w), axes=0)


def fourier_attack(
    threat: ThreatModel | ArrayLike,
    *,
    steps: int = 20,
    step_size: ArrayLike | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    start: str | Start = "zero",
    iterations: int = 0,
) -> Attack:
    """Projected gradient ascent in a Fourier ball, ``attack(logits_fn, key, x, y) -> x_adv``.

    It is ``pgd`` in the threat model; what it adds is the start of the original and the way into
    the box. One step of length eps from ``x`` is the strongest attack on a linear model.

    Args:
      threat: a threat model with norm ``FourierLInf``, or eps for all frequencies and the box
        [0, 1].
      steps: gradient steps.
      step_size: length of a step, in the norm; default ``2.5 * eps / steps``, at most ``eps``.
      loss: ``loss(logits, y) -> (n,)``, raised by the attack.
      start: ``"zero"``, ``"uniform"`` in the ball, ``"gaussian"``: noise ``eps * N(0, I)``
        projected on the ball, as published; or a function as in ``pgd``.
      iterations: alternating projections of the result, see ``project_in_box``; 0: clip to the box
        and leave it at that, as published. The result can then leave the ball: ``violation``.

    Raises:
      ValueError: as of ``pgd``; the norm is not ``FourierLInf``.

    Source: Faghri et al. (2021), algorithm "Fourier-l_inf attack". Deviation: it adds a step of
    length eps each time and never projects, so that it leaves the ball after the first;
    ``unprojected_step`` is its first step.
    """
    threat = _fourier(threat)
    checks.integer("iterations", iterations)
    checks.integer("steps", steps)
    if step_size is None:
        step_size = min(1.0, 2.5 / max(steps, 1)) * threat.eps
    if isinstance(start, str) and start == "gaussian":
        start = _noise_of_size(threat.eps)
    attack = pgd(threat, steps=steps, step_size=step_size, loss=loss, start=start)

    def then_in_box(logits_fn, key, x, y):
        x_adv = attack(logits_fn, key, x, y)
        return project_in_box(threat, x_adv, x, iterations=iterations) if iterations else x_adv

    return then_in_box


def unprojected_step(
    eps: ArrayLike, *, loss: Callable[[Array, Array], Array] = cross_entropy
) -> Attack:
    """One step as published: ``x + eps F^-1(G / |G|)``, neither projected nor clipped to a box.

    For comparison with other implementations. From ``x`` the step ends on the surface of the ball,
    so it equals ``fourier_attack(threat, steps=1)`` but for the box.

    Args:
      eps: magnitude of every Fourier coefficient, ``>= 0``; one number or one per example.
      loss: ``loss(logits, y) -> (n,)``, raised by the attack.

    Source: Faghri et al. (2021), algorithm "Fourier-l_inf attack", with one step.
    """
    threat = ThreatModel(FourierLInf(), eps, -jnp.inf, jnp.inf)
    return pgd(threat, steps=1, step_size=eps, loss=loss, start="zero")


def project_in_box(
    threat: ThreatModel,
    x_adv: Float[Array, "n ..."],
    x: Float[Array, "n ..."],
    *,
    iterations: int = 100,
) -> Float[Array, "n ..."]:
    """A point near ``x_adv`` in the ball and in the box, by alternating projections.

    Projects on the ball and clips to the box in turn. The result lies in the box. For all
    frequencies it is finally drawn towards ``x`` into the ball, so that it lies in both after any
    number of iterations. That would not bring it back into a band: there, what the clip puts
    outside falls with the iterations, to rounding after some hundreds, and ``violation`` says how
    much it is.

    Args:
      threat: a threat model with norm ``FourierLInf``.
      x_adv: points to project.
      x: clean examples, in the box.
      iterations: pairs of projections, ``>= 1``.

    Raises:
      ValueError: the norm is not ``FourierLInf``, or the shapes differ.

    Source: Bregman, "The method of successive projection for finding a common point of convex sets"
    (1965).
    """
    threat = _fourier(threat)
    checks.integer("iterations", iterations, at_least=1)
    checks.same_shape("x_adv", x_adv, "x", x)
    z = jax.lax.fori_loop(0, iterations, lambda _, z: threat.project(z, x), x_adv)
    norm = threat.norm
    if norm.low is not None or norm.high is not None:
        return z
    length = norm.value(z - x, batch_ndim=1)
    scale = jnp.where(length > threat.eps, threat.eps / jnp.where(length > 0, length, 1), 1)
    return threat.clip(x + rows(scale.astype(x.dtype), x) * (z - x))


class Violation(NamedTuple):
    """By how much a point leaves a Fourier threat model, per example; 0 where it does not.

    Attributes:
      ball: largest magnitude of a Fourier coefficient of the band, less eps.
      band: largest magnitude of a Fourier coefficient outside the band.
      box: largest distance of a pixel from the box.
    """

    ball: Float[Array, " n"]
    band: Float[Array, " n"]
    box: Float[Array, " n"]


def violation(
    x_adv: Float[Array, "n ..."], x: Float[Array, "n ..."], threat: ThreatModel
) -> Violation:
    """How far ``x_adv`` is from being feasible, in input units.

    Args:
      x_adv: points to judge.
      x: clean examples.
      threat: a threat model with norm ``FourierLInf``.

    Raises:
      ValueError: the norm is not ``FourierLInf``, or the shapes differ.
    """
    threat = _fourier(threat)
    checks.same_shape("x_adv", x_adv, "x", x)
    size = jnp.abs(dft(x_adv - x, batch_ndim=1))
    mask = mask_of(x.shape[1:], low=threat.norm.low, high=threat.norm.high)
    axes = tuple(range(1, x.ndim))
    inside = jnp.max(jnp.where(mask, size, 0), axis=axes)
    outside = jnp.max(jnp.where(mask, 0, size), axis=axes)
    box = jnp.max(jnp.maximum(threat.lower - x_adv, x_adv - threat.upper), axis=axes)
    return Violation(jnp.maximum(inside - threat.eps, 0), outside, jnp.maximum(box, 0))


def _noise_of_size(eps: ArrayLike) -> Start:
    def start(example_keys: Key[Array, " n"], x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        noise = gaussian_start(1.0)(example_keys, jnp.zeros_like(x))
        return x + rows(jnp.asarray(eps, x.dtype), x) * noise

    return start


def _fourier(threat: ThreatModel | ArrayLike) -> ThreatModel:
    if isinstance(threat, (int, float, jax.Array)):
        return ThreatModel(FourierLInf(), threat)
    if not isinstance(check_threat(threat).norm, FourierLInf):
        raise ValueError(f"threat must have the norm FourierLInf(), got {threat.norm.name}")
    return threat
