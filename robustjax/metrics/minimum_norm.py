"""The report on a minimum-norm attack: distances, and the robust accuracy that follows from them.

A distance is that of the nearest adversarial example found: 0 for an example that is misclassified
as it is, inf where the attack found none. It is an upper bound of the true one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from robustjax import checks


class MinimumNormReport(NamedTuple):
    """What a minimum-norm attack says about a model. Shares are in ``[0, 1]``.

    Papers differ about the examples that are misclassified as they are: those numbers are over the
    correctly classified ones, and once more, ``..._all``, over all with distance 0 for the others.

    Attributes:
      eps: the radii of the curve, ``(m,)``.
      robust_accuracy: share of all examples without an adversarial example within eps, ``(m,)``.
      accuracy: share that is correctly classified.
      found: share of the correctly classified for which the attack found a point.
      mean: mean distance of the points found.
      median: median distance, inf if fewer than half were found.
      mean_all: as ``mean``, misclassified examples with distance 0.
      median_all: as ``median``, misclassified examples with distance 0.
      relative: mean of distance / size of the points found, DeepFool's rho; NaN without ``size``.
      relative_all: as ``relative``, misclassified examples with distance 0.
    """

    eps: Float[Array, " m"]
    robust_accuracy: Float[Array, " m"]
    accuracy: Float[Array, ""]
    found: Float[Array, ""]
    mean: Float[Array, ""]
    median: Float[Array, ""]
    mean_all: Float[Array, ""]
    median_all: Float[Array, ""]
    relative: Float[Array, ""]
    relative_all: Float[Array, ""]


def robust_accuracy_curve(
    distance: Float[ArrayLike, " n"], eps: ArrayLike | Sequence[float]
) -> Float[Array, " m"]:
    """Share of examples whose distance is larger than each eps; never rising in eps.

    At eps = 0 it is the clean accuracy. For other eps it is an upper bound of the robust accuracy
    from one run of the attack, which does not aim at any of them.

    Args:
      distance: to the nearest adversarial example, ``(n,)``: 0 if misclassified, inf if none.
      eps: radii, ``(m,)``, ``>= 0``.

    Raises:
      ValueError: shapes do not fit, a distance is negative or NaN, or an eps negative.
    """
    distance = _distances(distance)
    checks.number("eps", eps, at_least=0)
    if np.ndim(eps) != 1:
        raise ValueError(f"eps must be a list of radii (m,), got shape {np.shape(eps)}")
    return jnp.mean(distance > jnp.asarray(eps, distance.dtype)[:, None], axis=1)


def relative_perturbation(
    distance: Float[ArrayLike, " n"], size: Float[ArrayLike, " n"]
) -> Float[Array, " n"]:
    """``||r|| / ||x||``, whose mean is DeepFool's rho; 0 / 0 counts as 0.

    Args:
      distance: ``||r||``, ``(n,)``.
      size: ``||x||`` in the same norm, ``(n,)``.

    Raises:
      ValueError: shapes do not fit, or a distance is negative or NaN.

    Source: Moosavi-Dezfooli et al. (2016), "DeepFool", section 4, for l_2.
    """
    distance = _distances(distance)
    checks.same_shape("size", size, "distance", distance)
    return jnp.where(distance > 0, distance / jnp.where(distance > 0, size, 1), 0)


def minimum_norm_report(
    distance: Float[ArrayLike, " n"],
    eps: ArrayLike | Sequence[float],
    *,
    size: Float[ArrayLike, " n"] | None = None,
) -> MinimumNormReport:
    """Report on the distances that ``fab``, ``carlini_wagner`` or ``deepfool`` found.

        x_adv, state = attack(logits_fn, key, x, y)  # has_aux=True
        report = minimum_norm_report(state.distance, eps, size=norm.value(x, batch_ndim=1))

    Averages over no example at all are NaN.

    Args:
      distance: to the nearest adversarial example, ``(n,)``: 0 if misclassified, inf if none.
      eps: radii of the robust-accuracy curve, ``(m,)``, ``>= 0``.
      size: ``||x||`` in the norm of the attack, for the relative distance.

    Raises:
      ValueError: shapes do not fit, a distance is negative or NaN, or an eps negative.
    """
    curve = robust_accuracy_curve(distance, eps)
    distance = _distances(distance)
    right, found = distance > 0, jnp.isfinite(distance)
    ratio = jnp.full_like(distance, jnp.nan)
    if size is not None:
        ratio = relative_perturbation(distance, size)

    def mean(values: Array, which: Array) -> Array:
        return jnp.sum(jnp.where(which, values, 0)) / jnp.sum(which)

    return MinimumNormReport(
        eps=jnp.asarray(eps, distance.dtype),
        robust_accuracy=curve,
        accuracy=jnp.mean(right),
        found=mean(found.astype(distance.dtype), right),
        mean=mean(distance, right & found),
        median=jnp.nanmedian(jnp.where(right, distance, jnp.nan)),
        mean_all=mean(distance, found),
        median_all=jnp.median(distance),
        relative=mean(ratio, right & found),
        relative_all=mean(ratio, found),
    )


def _distances(distance: ArrayLike) -> Float[Array, " n"]:
    checks.number("distance", distance, at_least=0, at_most=jnp.inf)
    if jnp.ndim(distance) != 1 or jnp.size(distance) == 0:
        raise ValueError(
            f"distance must have one entry per example, (n,), got shape {jnp.shape(distance)}"
        )
    distance = jnp.asarray(distance)
    return distance.astype(jnp.promote_types(distance.dtype, jnp.float32))
