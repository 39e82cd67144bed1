"""Attacks that look for the nearest adversarial example: Carlini & Wagner, DeepFool.

They and ``fab`` have one signature and one result. ``eps`` of the threat model does not steer the
search; it says which of the points that were found count: ``x_adv`` is the nearest of them if that
lies within ``eps``, else ``x`` itself. The nearest point whatever its distance, and the distance,
are ``x_min`` and ``distance`` of the state that ``has_aux=True`` returns;
``robustjax.metrics.minimum_norm_report`` makes a table of the distances.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from robustjax import checks, lp
from robustjax.attacks.stepwise import LogitsFn, StepwiseAttack, select
from robustjax.attacks.targets import likeliest_wrong_classes
from robustjax.hyperplane import displacement
from robustjax.losses import cw, cw_targeted
from robustjax.metrics import correct
from robustjax.norms import L1, L2, LInf, Norm
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat

_CLASSES_AT_ONCE = 10
# tanh rounds to 1 from 9.1 on. Times this it stays below, and the box open, in float32.
_OPEN = 1 - 2**-20


class DeepFoolState(NamedTuple):
    """State of ``deepfool``.

    Attributes:
      x_adv: the point found if it lies within eps, else the clean example.
      done: a point was found, or the clean example is misclassified.
      x_min: the point found, at whatever distance; else the clean example.
      distance: from ``x_min`` to the clean example; inf if no point was found, 0 if the clean
        example is misclassified.
      iterate: where the model is evaluated next.
      total: sum of the steps, ``r`` of the paper, before overshoot and box.
      classes: classes whose boundary is considered.
    """

    x_adv: Float[Array, "n ..."]
    done: Bool[Array, " n"]
    x_min: Float[Array, "n ..."]
    distance: Float[Array, " n"]
    iterate: Float[Array, "n ..."]
    total: Float[Array, "n ..."]
    classes: Int[Array, "n m"]


class CarliniWagnerState(NamedTuple):
    """State of ``carlini_wagner``.

    Attributes:
      x_adv: the nearest point found if it lies within eps, else the clean example.
      done: the clean example is a success already, or the search may stop early.
      x_min: the nearest point found, at whatever distance; else the clean example.
      distance: from ``x_min`` to the clean example; inf if no point was found, 0 if the clean
        example is a success.
      v: the variables; the point is their tanh.
      rule: Adam's state, one for each example.
      const: the weight c of the logits.
      too_small: the largest c at which a round failed.
      enough: the smallest c at which a round succeeded, inf for none.
      found: whether this round has succeeded.
    """

    x_adv: Float[Array, "n ..."]
    done: Bool[Array, " n"]
    x_min: Float[Array, "n ..."]
    distance: Float[Array, " n"]
    v: Float[Array, "n ..."]
    rule: Any
    const: Float[Array, " n"]
    too_small: Float[Array, " n"]
    enough: Float[Array, " n"]
    found: Bool[Array, " n"]


def deepfool(
    threat: ThreatModel,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
    has_aux: bool = False,
) -> StepwiseAttack:
    """DeepFool: steps onto the nearest of the linearised boundaries until the class changes.

    With ``f_j = z_j - z_y`` and ``w_j`` its gradient at the iterate, both evaluated together,

        l = argmin_j |f_j| / ||w_j||_*,    r <- r + argmin {||d|| : <w_l, d> = -f_l},
        iterate = clip(x + (1 + overshoot) r)

    On an affine model without a box one step reaches the nearest boundary exactly, and
    ``distance`` is ``1 + overshoot`` times the true minimum.

    Args:
      threat: its norm, ``L2()``, ``LInf()`` or ``L1()``, is the one whose ``||r||`` is sought, its
        box clips the iterates, and ``x_adv`` is the point found if it lies within ``eps``.
      steps: the most steps, ``>= 1``.
      overshoot: share by which the sum of the steps is lengthened, ``>= 0``. With 0 an iterate
        lies on the boundary and may count on either side of it.
      classes: consider the label and at most ``classes - 1`` others, those with the largest logits
        at the clean input, ``>= 2``.
      has_aux: return ``(x_adv, DeepFoolState)``.

    Raises:
      ValueError: an argument is out of range; of a call: as of ``pgd``.

    Source: Moosavi-Dezfooli et al. (2016), "DeepFool: a simple and accurate method to fool deep
    neural networks", algorithm 2 and section 3.3; the overshoot and the choice of classes are those
    of the authors' program. Deviations: iterates are clipped to the box, which may be infinite,
    and the attack starts from the label instead of the predicted class, so that misclassified
    examples have distance 0.
    """
    check_norm(threat)
    checks.integer("steps", steps, at_least=1)
    checks.number("overshoot", overshoot, at_least=0)
    checks.integer("classes", classes, at_least=2)

    def init(logits_fn: LogitsFn, example_keys: Array, x: Array, y: Array) -> DeepFoolState:
        del example_keys
        logits = logits_fn(x)
        others = likeliest_wrong_classes(logits, y)[:, : classes - 1]
        start = nothing_found(x, ~correct(logits, y))
        return DeepFoolState(**start, iterate=x, total=jnp.zeros_like(x), classes=others)

    def begin(
        logits_fn: LogitsFn, r: int | Array, round_keys: Array, state: Any, x: Array, y: Array
    ):
        del logits_fn, r, round_keys, x, y
        return state

    def step(
        logits_fn: LogitsFn, t: int | Array, round_keys: Array, state: Any, x: Array, y: Array
    ):
        del round_keys
        logits, gap, w = nearest_boundary(threat.norm, logits_fn, state.iterate, y, state.classes)
        success = ~correct(logits, y)
        state = keep_nearest(threat, state, x, state.iterate, success)
        total = state.total + displacement(threat.norm, w, gap)
        iterate = threat.clip(x + (1 + overshoot) * total)
        # The step after the last only looks where the last one led.
        moved = state._replace(total=total, iterate=iterate)
        state = select(~success & (t < steps), moved, state)
        return state._replace(done=state.done | success)

    return StepwiseAttack(init, begin, step, steps + 1, check=threat.check_inputs, has_aux=has_aux)


def carlini_wagner(
    threat: ThreatModel,
    *,
    steps: int = 1000,
    search_steps: int = 9,
    step_size: float = 0.01,
    initial_const: float = 1e-3,
    confidence: float = 0.0,
    targeted: bool = False,
    early_stop: bool = False,
    has_aux: bool = False,
) -> StepwiseAttack:
    """Carlini & Wagner's l_2 attack: Adam on the tanh variables, binary search on the weight.

    A round minimises ``||z - x||_2^2 - c * margin(z)`` over ``z = tanh(v)``, scaled to the box,
    with the margin capped at ``confidence`` (``losses.cw``, ``losses.cw_targeted``). After a round
    with a success c is lowered, after one without it is raised: tenfold until the first success,
    to the middle of the bracket from then on. The nearest success of all iterates of all rounds
    counts. An example that is a success as it is, is returned as it is.

    Args:
      threat: an l_2 threat model with a finite box; ``x_adv`` is the nearest point found if it
        lies within ``eps``.
      steps: Adam steps in a round, ``>= 1``.
      search_steps: rounds, ``>= 1``.
      step_size: Adam's learning rate, in units of v.
      initial_const: the first c, ``> 0``.
      confidence: the margin, in units of the logits, that a success must have, ``>= 0``.
      targeted: ``y`` are target classes.
      early_stop: an example is done as soon as a point within ``eps`` is found.
      has_aux: return ``(x_adv, CarliniWagnerState)``.

    Raises:
      ValueError: an argument is out of range; of a call: as of ``pgd``.

    Source: Carlini & Wagner (2017), "Towards evaluating the robustness of neural networks",
    sections V and VI, with the constants of the authors' program. Deviations: distances are
    measured from ``x`` itself, rounds are not broken off when the loss stagnates, and the outermost
    5e-7 of the box at each end is left out, for tanh rounds to 1 in float32.
    """
    check_threat(threat)
    if not isinstance(threat.norm, L2):
        raise ValueError(f"the threat model of this attack must be l2, got {threat.norm.name}")
    checks.number("lower", threat.lower)
    checks.number("upper", threat.upper)
    checks.integer("steps", steps, at_least=1)
    checks.integer("search_steps", search_steps, at_least=1)
    checks.number("step_size", step_size, above=0)
    checks.number("initial_const", initial_const, above=0)
    checks.number("confidence", confidence, at_least=0)
    rule = optax.adam(step_size)

    def judge(logits: Array, y: Array) -> tuple[Array, Array]:
        score = (cw_targeted if targeted else cw)(logits, y, confidence)
        wins = correct(logits, y) if targeted else ~correct(logits, y)
        return score, wins & ~(score < confidence)

    def box(x: Array) -> tuple[Array, Array]:
        wide = lp.wide(x.dtype)
        lower, upper = jnp.asarray(threat.lower, wide), jnp.asarray(threat.upper, wide)
        return (lower + upper) / 2, _OPEN * (upper - lower) / 2

    def variables(x: Array) -> Array:
        middle, half = box(x)
        return jnp.arctanh(jnp.clip((x.astype(half.dtype) - middle) / half, -_OPEN, _OPEN))

    def init(logits_fn: LogitsFn, example_keys: Array, x: Array, y: Array) -> CarliniWagnerState:
        del example_keys
        start = nothing_found(x, judge(logits_fn(x), y)[1])
        zero = jnp.zeros_like(start["distance"])
        v = variables(x)
        return CarliniWagnerState(
            **start,
            v=v,
            rule=jax.vmap(rule.init)(v),
            const=zero + initial_const,
            too_small=zero,
            enough=zero + jnp.inf,
            found=zero > 0,
        )

    def begin(
        logits_fn: LogitsFn, r: int | Array, round_keys: Array, state: Any, x: Array, y: Array
    ):
        del logits_fn, round_keys, y
        enough = jnp.where(state.found, jnp.minimum(state.enough, state.const), state.enough)
        too_small = jnp.where(state.found, state.too_small, state.const)
        middle = (too_small + jnp.where(jnp.isinf(enough), 0, enough)) / 2
        const = jnp.where(jnp.isinf(enough), 10 * state.const, middle)
        later = jnp.broadcast_to(jnp.asarray(r) > 0, const.shape)
        searched = state._replace(const=const, too_small=too_small, enough=enough)
        v = variables(x)
        return select(later, searched, state)._replace(
            v=v, rule=jax.vmap(rule.init)(v), found=jnp.zeros_like(state.found)
        )

    def step(
        logits_fn: LogitsFn, t: int | Array, round_keys: Array, state: Any, x: Array, y: Array
    ):
        del t, round_keys
        middle, half = box(x)

        def objective(v: Array) -> tuple[Array, tuple[Array, Array]]:
            z = (middle + half * jnp.tanh(v)).astype(x.dtype)
            score, success = judge(logits_fn(z), y)
            length = jnp.sum(jnp.square(z.astype(v.dtype) - x.astype(v.dtype)))
            return length - jnp.sum(state.const * score), (z, success)

        gradient, (z, success) = jax.grad(objective, has_aux=True)(state.v)
        updates, rule_state = jax.vmap(rule.update)(gradient, state.rule, state.v)
        state = keep_nearest(threat, state, x, z, success, early_stop=early_stop)
        return state._replace(v=state.v + updates, rule=rule_state, found=state.found | success)

    return StepwiseAttack(
        init, begin, step, steps, search_steps, check=threat.check_inputs, has_aux=has_aux
    )


def nothing_found(x: Float[Array, "n ..."], success: Bool[Array, " n"]) -> dict[str, Array]:
    """The fields that all states share, at the start; ``success`` at ``x`` itself is distance 0."""
    wide = lp.wide(x.dtype)
    distance = jnp.where(success, jnp.zeros((), wide), jnp.inf)
    return {"x_adv": x, "done": success, "x_min": x, "distance": distance}


def keep_nearest(
    threat: ThreatModel,
    state: Any,
    x: Float[Array, "n ..."],
    z: Float[Array, "n ..."],
    success: Bool[Array, " n"],
    *,
    early_stop: bool = False,
) -> Any:
    """The state with ``z`` in place of ``x_min`` where it is a success and nearer to ``x``.

    With ``early_stop`` an example is done once its distance is at most eps.
    """
    wide = lp.wide(x.dtype)
    length = threat.norm.value(z.astype(wide) - x.astype(wide), batch_ndim=1)
    nearer = success & (length < state.distance)
    distance = jnp.where(nearer, length, state.distance)
    x_min = select(nearer, z, state.x_min)
    inside = distance <= threat.eps
    return state._replace(
        x_min=x_min,
        distance=distance,
        x_adv=select(inside, x_min, x),
        done=state.done | inside if early_stop else state.done,
    )


def nearest_boundary(
    norm: Norm,
    logits_fn: LogitsFn,
    z: Float[Array, "n ..."],
    y: Int[Array, " n"],
    classes: Int[Array, "n m"],
) -> tuple[Float[Array, "n k"], Float[Array, " n"], Float[Array, "n ..."]]:
    """The nearest of the boundaries between ``y`` and each of ``classes``, linearised at ``z``.

    With ``f_j = z_j - z_y`` and ``w_j`` its gradient, the boundary ``{z + d : <w_j, d> = -f_j}`` is
    at distance ``|f_j| / ||w_j||_*``. One forward pass and, for each class, one backward pass; ten
    gradients are held at a time.

    Returns:
      The logits at ``z``, and ``-f_j`` and ``w_j`` of the nearest boundary; zeros where every
      gradient vanishes.
    """
    logits, pull_back = jax.vjp(logits_fn, z)
    k, wide = logits.shape[-1], lp.wide(logits.dtype)

    def of_class(j: Array) -> Array:
        return jnp.take_along_axis(logits.astype(wide), j[:, None], axis=-1)[:, 0]

    def boundary(j: Array) -> tuple[Array, Array]:
        one_hot = jax.nn.one_hot(j, k, dtype=logits.dtype)
        (w,) = pull_back(one_hot - jax.nn.one_hot(y, k, dtype=logits.dtype))
        return of_class(y) - of_class(j), w

    if classes.shape[1] == 1:
        return logits, *boundary(classes[:, 0])

    def nearer(best: Any, block: Array) -> tuple[Any, None]:
        gap, w = jax.vmap(boundary)(block)
        size = norm.dual.value(w.astype(wide), batch_ndim=2)
        length = jnp.where(size > 0, jnp.abs(gap) / jnp.where(size > 0, size, 1), jnp.inf)
        for candidate in zip(length, gap, w, strict=True):
            best = select(candidate[0] < best[0], candidate, best)
        return best, None

    # The last block is filled up with the first class again.
    at_once = min(_CLASSES_AT_ONCE, classes.shape[1])
    missing = -classes.shape[1] % at_once
    padded = jnp.concatenate([classes, jnp.repeat(classes[:, :1], missing, axis=1)], axis=1)
    blocks = padded.T.reshape(-1, at_once, z.shape[0])
    zero = jnp.zeros(z.shape[0], wide)
    (_, gap, w), _ = jax.lax.scan(nearer, (zero + jnp.inf, zero, jnp.zeros_like(z)), blocks)
    return logits, gap, w


def check_norm(threat: ThreatModel) -> None:
    """Raises ``ValueError`` unless the norm is one that ``hyperplane`` knows."""
    if not isinstance(check_threat(threat).norm, (LInf, L2, L1)):
        raise ValueError(
            f"the norm of threat must be linf, l2 or l1 for this attack, got {threat.norm.name}"
        )
