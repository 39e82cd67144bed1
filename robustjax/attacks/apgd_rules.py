"""The state of Auto-PGD, and the rules by which it changes its steps. See ``apgd``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robustjax import checks
from robustjax.attacks.stepwise import rows

RHO = 0.75
# l_1 only: divisor of share and step size, least share of the first step size, and what the
# sparsity must fall below, relative to that before, for the step size to start over.
L1_SHRINK, L1_LEAST_STEP, L1_PROGRESS = 1.5, 0.1, 0.95


class APGDState(NamedTuple):
    """The state of each example, ``n`` of them on the first axis.

    Attributes:
      x_adv: a misclassified point if one was found, else that of the largest loss in the ball.
      done: the attack has stopped for this example.
      success: ``x_adv`` is misclassified.
      loss_adv: the attack's loss there.
      targets: wrong classes to aim at, likeliest first, ``(n, targets)``; None if untargeted.
      target: the one of the present round; None if untargeted.
      x, x_before: the iterate and the one before.
      loss, gradient: at ``x``.
      x_max, loss_max, gradient_max: the point of the largest loss in this round.
      step_size: ``eta``.
      rises: steps since the last checkpoint that raised the loss.
      halved: ``eta`` was halved at the last checkpoint.
      loss_max_before: ``loss_max`` at the last checkpoint.
      share: share of the pixels that a step moves; l_1 only, else None.
      sparsity: pixels that ``x_max`` changed at the last checkpoint; l_1 only, else None.
    """

    x_adv: Float[Array, "n ..."]
    done: Bool[Array, " n"]
    success: Bool[Array, " n"]
    loss_adv: Float[Array, " n"]
    targets: Int[Array, "n targets"] | None
    target: Int[Array, " n"] | None
    x: Float[Array, "n ..."]
    x_before: Float[Array, "n ..."]
    loss: Float[Array, " n"]
    gradient: Float[Array, "n ..."]
    x_max: Float[Array, "n ..."]
    loss_max: Float[Array, " n"]
    gradient_max: Float[Array, "n ..."]
    step_size: Float[Array, " n"]
    rises: Int[Array, " n"]
    halved: Bool[Array, " n"]
    loss_max_before: Float[Array, " n"]
    share: Float[Array, " n"] | None
    sparsity: Float[Array, " n"] | None


def checkpoints(steps: int) -> list[int]:
    """Steps after which APGD looks back: 22, 41, 57, 70, 80, 87, 93, 99 of 100.

    The first interval is 22 % of the steps, each following one 3 % shorter, none below 6 %; in
    whole steps, at least one.
    """
    checks.integer("steps", steps, at_least=1)
    interval, least, shrink = (max(steps * percent // 100, 1) for percent in (22, 6, 3))
    found, at = [], interval
    while at <= steps:
        found.append(at)
        interval = max(interval - shrink, least)
        at += interval
    return found


class Plan(NamedTuple):
    """What is known of each step beforehand; step 0 is the start, steps 1, 2, ... are moves."""

    interval: np.ndarray  # moves since the last checkpoint if the step ends at one, else 0
    factor: np.ndarray  # radius of the ball, in eps
    enters: np.ndarray  # the step enters a ball instead of moving
    counts: np.ndarray  # the ball is the one of the threat model: successes count


def plan_of(steps: int, sparse: bool, warm_up: bool) -> Plan:
    """The plan of a run; ``sparse`` for l_1, ``warm_up`` through larger balls."""
    interval, factor = np.zeros(steps + 1, np.int32), np.ones(steps + 1, np.float32)
    enters = np.arange(steps + 1) == 0
    if not sparse:
        ends = checkpoints(steps)
        interval[ends] = np.diff([0, *ends])
        return Plan(interval, factor, enters, factor == 1)
    phases = (0, 3 * steps // 10, 6 * steps // 10, steps + 1) if warm_up else (0, steps + 1)
    radii = (3, 2, 1) if warm_up else (1,)
    for begins, ends, radius in zip(phases[:-1], phases[1:], radii, strict=True):
        factor[begins:ends] = radius
        enters[begins : begins + 1] = True
        every = max((ends - begins) // 25, 1)
        interval[begins + every : ends : every] = every
    return Plan(interval, factor, enters, factor == 1)


def record(
    state: APGDState, z: Array, g: Array, value: Array, success: Array, counts: Any
) -> APGDState:
    """The new iterate ``z``, and the best points if it is better.

    Args:
      state: before.
      z: the iterate, ``(n, ...)``.
      g: gradient there.
      value: loss there, ``(n,)``.
      success: whether it is misclassified.
      counts: whether it lies in the ball of the threat model.
    """
    success = success & counts
    higher = value > state.loss_max
    wins = (success & ~state.success) | ((success == state.success) & (value > state.loss_adv))
    wins &= counts
    return state._replace(
        x=z,
        gradient=g,
        loss=value,
        x_max=jnp.where(rows(higher, z), z, state.x_max),
        gradient_max=jnp.where(rows(higher, z), g, state.gradient_max),
        loss_max=jnp.where(higher, value, state.loss_max),
        x_adv=jnp.where(rows(wins, z), z, state.x_adv),
        loss_adv=jnp.where(wins, value, state.loss_adv),
        success=state.success | success,
    )


def fresh(state: APGDState, step_size: Array, share: Any, x: Array) -> APGDState:
    """As at the start of a run from the iterate ``state.x``."""
    n = x.shape[0]
    return state._replace(
        x_before=state.x,
        x_max=state.x,
        loss_max=state.loss,
        gradient_max=state.gradient,
        step_size=step_size.astype(jnp.float32),
        rises=jnp.zeros(n, jnp.int32),
        halved=jnp.ones(n, bool),  # at the first checkpoint only condition 1 counts
        loss_max_before=state.loss,
        share=None if state.share is None else jnp.broadcast_to(jnp.asarray(share, jnp.float32), n),
        sparsity=None if state.share is None else jnp.full(n, float(x[0].size)),
    )


def _back_to_best(state: APGDState, who: Array) -> APGDState:
    return state._replace(
        x=jnp.where(rows(who, state.x), state.x_max, state.x),
        gradient=jnp.where(rows(who, state.x), state.gradient_max, state.gradient),
        loss=jnp.where(who, state.loss_max, state.loss),
    )


def halve(state: APGDState, interval: Array) -> APGDState:
    """A checkpoint: halves the step size, back at the best point, where one of two rules holds."""
    oscillates = state.rises < RHO * interval
    stuck = ~state.halved & (state.loss_max_before >= state.loss_max)
    halves = oscillates | stuck
    state = _back_to_best(state, halves)
    return state._replace(
        step_size=jnp.where(halves, state.step_size / 2, state.step_size),
        rises=jnp.zeros_like(state.rises),
        halved=halves,
        loss_max_before=state.loss_max,
    )


def adapt_sparsity(state: APGDState, first: Array, x: Array) -> APGDState:
    """A checkpoint of the l_1 attack; ``first`` is the first step size."""
    now = changed(state.x_max, x)
    sparser = now < L1_PROGRESS * state.sparsity
    state = _back_to_best(state, sparser)
    shorter = jnp.maximum(state.step_size / L1_SHRINK, L1_LEAST_STEP * first)
    return state._replace(
        step_size=jnp.where(sparser, first, shorter).astype(jnp.float32),
        share=now / (x[0].size * L1_SHRINK),
        sparsity=now,
    )


def changed(z: Array, x: Array) -> Float[Array, " n"]:
    """How many entries of each example differ."""
    return jnp.sum(z != x, axis=tuple(range(1, x.ndim)), dtype=jnp.float32)


def sparse_sign(gradient: Float[Array, "n ..."], share: Float[Array, " n"]) -> Array:
    """Signs of the largest ``share`` of the entries, scaled to unit l_1 norm."""
    magnitude = jnp.abs(gradient).astype(jnp.float32)
    axes = tuple(range(1, gradient.ndim))
    wanted = jnp.clip(jnp.floor(share * gradient[0].size), 1, gradient[0].size)

    # The bits of floats >= 0 are ordered like the floats: bisection finds the wanted order
    # statistic exactly, and needs no sort.
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)

    def narrow(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        enough = jnp.sum(bits >= rows(middle, bits), axis=axes) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    n = len(gradient)
    ends = (jnp.zeros(n, jnp.int32), jnp.full(n, np.iinfo(np.int32).max, jnp.int32))
    level, _ = jax.lax.fori_loop(0, 31, narrow, ends)
    sign = jnp.where(bits >= rows(level, bits), jnp.sign(gradient), 0)
    count = jnp.sum(jnp.abs(sign), axis=axes)
    return sign / rows(jnp.maximum(count, 1), sign)
