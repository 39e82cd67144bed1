"""FAB, the fast adaptive boundary attack, untargeted and targeted.

A minimum-norm attack for l_inf, l_2 and l_1: it steps onto the linearised decision boundary, by
projections within the box, with a bias towards the clean example.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robustjax import checks, lp
from robustjax.attacks.minimum_norm import (
    check_norm,
    keep_nearest,
    nearest_boundary,
    nothing_found,
)
from robustjax.attacks.stepwise import LogitsFn, StepwiseAttack, rows, select
from robustjax.attacks.targets import likeliest_wrong_classes
from robustjax.hyperplane import displacement
from robustjax.metrics import correct
from robustjax.threat import ThreatModel

# Below this length, in input units, two steps count as equally long.
_SHORTEST = 1e-8


class FABState(NamedTuple):
    """State of ``fab`` and ``fab_targeted``.

    Attributes:
      x_adv: the nearest point found if it lies within eps, else the clean example.
      done: the clean example is misclassified, or the search may stop early.
      x_min: the nearest point found, at whatever distance; else the clean example.
      distance: from ``x_min`` to the clean example; inf if no point was found, 0 if the clean
        example is misclassified.
      iterate: where the model is linearised next.
      classes: classes whose boundary is considered in this round.
      ranking: the wrong classes, in descending order of their logits at the clean example.
    """

    x_adv: Float[Array, "n ..."]
    done: Bool[Array, " n"]
    x_min: Float[Array, "n ..."]
    distance: Float[Array, " n"]
    iterate: Float[Array, "n ..."]
    classes: Int[Array, "n m"]
    ranking: Int[Array, "n targets"]


def fab(
    threat: ThreatModel,
    *,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    backward: float = 0.9,
    early_stop: bool = False,
    has_aux: bool = False,
) -> StepwiseAttack:
    """FAB: minimum-norm attack on the nearest of the boundaries to all other classes.

    With the nearest linearised boundary ``{u : <w, u> = b}`` at the iterate z, and d and d_x the
    shortest steps onto it within the box from z and from the clean x,

        alpha = min( ||d|| / (||d|| + ||d_x||), alpha_max )
        z     = clip( (1 - alpha) (z + overshoot d) + alpha (x + overshoot d_x) )
        if z is adversarial: keep it if it is the nearest so far, and z = x + backward (z - x)

    The first round starts at x, a restart at a random point at half the smaller of eps and the best
    distance. Multiplying the logits by a positive number changes nothing (by a power of two, not
    a bit).

    A step costs one evaluation with ``K - 1`` gradients at z and one without at the new z. The
    evaluation cannot be shared with the next step, which linearises at another point wherever the
    new z is adversarial: in nearly every step, once the boundary is reached. To spend a step with a
    gradient on each of the two points would cost more than this.

    Args:
      threat: norm ``LInf()``, ``L2()`` or ``L1()`` and box. ``x_adv`` is the nearest adversarial
        example found if it lies within ``eps``, else ``x``.
      steps: steps in a round, ``>= 1``.
      restarts: rounds, ``>= 1``.
      alpha_max: largest weight of the step from x, in ``[0, 1]``.
      overshoot: factor of the steps, ``>= 1``. On a linear model the distance found is at most
        this times the true minimum.
      backward: share of the way from x that an adversarial iterate is moved back to, in ``[0, 1]``.
      early_stop: an example is done as soon as a point within ``eps`` is found, as in AutoAttack;
        its distance is then not minimal. Whether one is found does not depend on it.
      has_aux: return ``(x_adv, FABState)``.

    Raises:
      ValueError: an argument is out of range; of a call: as of ``pgd``.

    Source: Croce & Hein (2020), "Minimally distorted adversarial examples with a fast adaptive
    boundary attack", algorithm 1; constants and random starts of the authors' program. Deviations:
    no absolute thresholds on the gradient, so that the result does not depend on the scale of the
    logits; the final search between x and the result is left out, as in AutoAttack.
    """
    return _fab(
        threat,
        targets=None,
        steps=steps,
        restarts=restarts,
        alpha_max=alpha_max,
        overshoot=overshoot,
        backward=backward,
        early_stop=early_stop,
        has_aux=has_aux,
    )


def fab_targeted(
    threat: ThreatModel,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    backward: float = 0.9,
    early_stop: bool = False,
    has_aux: bool = False,
) -> StepwiseAttack:
    """FAB-T: FAB on the boundary to one other class at a time, in ``targets * restarts`` rounds.

    A step needs one gradient instead of ``K - 1``. ``y`` are true labels, and a point that is
    misclassified as any class counts. Croce & Hein (2020), "Reliable evaluation of adversarial
    robustness with an ensemble of diverse parameter-free attacks", section 4.

    Args:
      threat: norm and box, as of ``fab``.
      targets: number of classes to aim at, those with the largest logits at the clean example,
        in descending order; ``1 <= targets <= K - 1``.
      steps: steps in a round, ``>= 1``.
      restarts: rounds for each target, ``>= 1``.
      alpha_max: as of ``fab``.
      overshoot: as of ``fab``.
      backward: as of ``fab``.
      early_stop: as of ``fab``.
      has_aux: return ``(x_adv, FABState)``.

    Raises:
      ValueError: an argument is out of range; of a call: ``targets >= K``, and as of ``pgd``.
    """
    return _fab(
        threat,
        targets=checks.integer("targets", targets, at_least=1),
        steps=steps,
        restarts=restarts,
        alpha_max=alpha_max,
        overshoot=overshoot,
        backward=backward,
        early_stop=early_stop,
        has_aux=has_aux,
    )


def _fab(
    threat: ThreatModel,
    *,
    targets: int | None,
    steps: int,
    restarts: int,
    alpha_max: float,
    overshoot: float,
    backward: float,
    early_stop: bool,
    has_aux: bool,
) -> StepwiseAttack:
    """Both; ``targets=None`` considers all classes at once."""
    check_norm(threat)
    checks.integer("steps", steps, at_least=1)
    checks.integer("restarts", restarts, at_least=1)
    checks.number("alpha_max", alpha_max, at_least=0, at_most=1)
    checks.number("overshoot", overshoot, at_least=1)
    checks.number("backward", backward, at_least=0, at_most=1)
    norm = threat.norm

    def length(d: Array) -> Array:
        return jnp.maximum(norm.value(d, batch_ndim=1), _SHORTEST)

    def init(logits_fn: LogitsFn, example_keys: Array, x: Array, y: Array) -> FABState:
        del example_keys
        logits = logits_fn(x)
        start = nothing_found(x, ~correct(logits, y))
        ranking = likeliest_wrong_classes(logits, y, targets)
        classes = ranking if targets is None else ranking[:, :1]
        return FABState(**start, iterate=x, classes=classes, ranking=ranking)

    def begin(
        logits_fn: LogitsFn, r: int | Array, round_keys: Array, state: Any, x: Array, y: Array
    ):
        del logits_fn, y
        iterate = x
        if restarts > 1:
            radius = jnp.minimum(state.distance, threat.eps) / 2
            away = jax.vmap(norm.sample_sphere)(round_keys, x, radius)
            again = jnp.broadcast_to(r % restarts > 0, radius.shape)
            iterate = select(again, threat.clip(x + away), x)
        classes = state.ranking
        if targets is not None:
            classes = jax.lax.dynamic_slice_in_dim(classes, r // restarts, 1, axis=1)
        return state._replace(iterate=iterate, classes=classes)

    def step(
        logits_fn: LogitsFn, t: int | Array, round_keys: Array, state: Any, x: Array, y: Array
    ):
        del t, round_keys
        wide = lp.wide(x.dtype)
        z, clean = state.iterate.astype(wide), x.astype(wide)
        lower, upper = jnp.asarray(threat.lower, wide), jnp.asarray(threat.upper, wide)
        _, gap, w = nearest_boundary(norm, logits_fn, state.iterate, y, state.classes)
        w = w.astype(wide)
        # b - <w, x> with b = gap + <w, z>, without the difference of two long sums.
        axes = tuple(range(1, x.ndim))
        clean_gap = gap + jnp.sum(w * (z - clean), axis=axes)
        # The steps from z and from x together: one loop to compile instead of two.
        twice = jnp.concatenate([w, w]), jnp.concatenate([gap, clean_gap])
        ends = (
            jnp.concatenate([lower - z, lower - clean]),
            jnp.concatenate([upper - z, upper - clean]),
        )
        both = displacement(norm, *twice, *ends)
        (d, clean_d), (near, far) = jnp.split(both, 2), jnp.split(length(both), 2)
        alpha = rows(jnp.minimum(near / (near + far), alpha_max), z)
        # Relative to x, so that pixels which no step moves keep their value to the last bit.
        away = (1 - alpha) * (z - clean + overshoot * d) + alpha * (overshoot * clean_d)
        z = clean + away
        z = threat.clip(z.astype(x.dtype))
        success = ~correct(logits_fn(z), y)
        state = keep_nearest(threat, state, x, z, success, early_stop=early_stop)
        return state._replace(iterate=select(success, x + backward * (z - x), z))

    return StepwiseAttack(
        init,
        begin,
        step,
        steps,
        restarts * (targets or 1),
        check=threat.check_inputs,
        has_aux=has_aux,
    )
