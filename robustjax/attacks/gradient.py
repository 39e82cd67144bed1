"""Gradient attacks: one projected gradient method, whose arguments give the classical ones.

``pgd`` follows, for each example on its own,

    x_{t+1} = Project( x_t + update(gradient of the loss at x_t) )

as a ``jax.lax.scan``. The update is an optax transform, by default steepest ascent in the norm of
the threat model: the sign of the gradient for l_inf, the normalised gradient for l_2, one
coordinate for l_1. It is the map that ``robustjax.optim.steepest_descent`` applies to weights.

| attack | call |
|---|---|
| FGSM, FGM (Goodfellow et al. 2015; l_2: Miyato et al. 2017) | ``fgsm(threat)`` |
| FGSM with a reduced step (Andriushchenko & Flammarion 2020) | ``fgsm(threat, step_size=...)`` |
| FGSM-RS (Wong et al. 2020) | ``fgsm_rs(threat)`` |
| BIM, Iter-FGSM (Kurakin et al. 2017) | ``bim(threat, steps=..., step_size=...)`` |
| PGD-k (Madry et al. 2018), with restarts | ``pgd(threat, steps=k, restarts=r)`` |
| MI-FGSM (Dong et al. 2018), Adam, any optax rule | ``pgd(threat, step_rule=optax...)`` |
| corner-projected PGD (Andriushchenko & Flammarion 2020) | ``pgd(threat, corner=True)`` |
| targeted, Iter-LL-FGSM | ``pgd(threat, targeted=True)``, ``least_likely(...)`` |
| stop on success | ``pgd(threat, early_stop=True)`` |
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from robustjax import checks, keys
from robustjax.attacks.stepwise import rows
from robustjax.attacks.stepwise import select as choose
from robustjax.losses import cross_entropy
from robustjax.optim.steepest import steepest_descent
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat

Attack = Callable[..., Array]
Start = Callable[[Array, Array], Array]


class PGDTrace(NamedTuple):
    """What ``pgd(..., has_aux=True)`` tells beside the adversarial examples.

    Attributes:
      loss: the attack's loss at each iterate of each restart, the start included,
        ``(restarts, steps + 1, n)``. Of a targeted attack, minus the loss of the target: the
        attack raises it in either case.
      prediction: the predicted class at each iterate, ``(restarts, steps + 1, n)`` int32. See
        ``robustjax.metrics.instantaneous_accuracy`` and ``cumulative_accuracy``.
      success: whether the returned example is misclassified (classified as the target), ``(n,)``.
    """

    loss: Float[Array, "restarts iterates n"]
    prediction: Int[Array, "restarts iterates n"]
    success: Bool[Array, " n"]


class _Candidate(NamedTuple):
    """The best iterate so far of each example."""

    x: Array
    score: Float[Array, " n"]
    success: Bool[Array, " n"]


def gaussian_start(scale: float) -> Start:
    """Start at ``x + scale * N(0, I)``, as TRADES does with ``scale=0.001`` (Zhang et al. 2019)."""
    checks.number("scale", scale, at_least=0)

    def start(keys_: Key[Array, " n"], x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        noise = jax.vmap(lambda key, x: jax.random.normal(key, x.shape, x.dtype))(keys_, x)
        return x + scale * noise

    return start


def pgd(
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float | Array | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    step_rule: optax.GradientTransformation | None = None,
    start: str | Start = "uniform",
    clip_start: bool = True,
    restarts: int = 1,
    iterate: str = "last",
    select: str = "loss",
    targeted: bool = False,
    corner: bool = False,
    early_stop: bool = False,
    has_aux: bool = False,
) -> Attack:
    """Projected gradient attack ``attack(logits_fn, key, x, y) -> x_adv``.

    The attack takes ``logits_fn: (n, ...) -> (n, K)``, one key or one per example, inputs
    ``(n, ...)`` in the box of the threat model, and labels ``(n,)`` (the targets if ``targeted``;
    any array with one row per example if the loss wants one, as TRADES' clean logits). Each
    example is attacked on its own: neither batch size nor order matters. The result is feasible,
    has the dtype of ``x`` and carries no derivative.

    Args:
      threat: norm ball and box. ``eps`` may be traced, so a sweep over it does not recompile.
      steps: gradient steps, ``>= 0``.
      step_size: length of a step in the threat's norm, in input units; scalar or ``(n,)``. Default
        ``2.5 * eps / steps`` (Madry et al. 2018), which can cross the ball from any start.
      loss: ``loss(logits, y) -> (n,)``, raised by the attack (lowered if ``targeted``).
      step_rule: an optax transform that minimises minus the loss, run on each example by itself,
        e.g. ``optax.adam(0.01)`` or ``optax.chain(optax.trace(1.0), steepest_descent(...))``; it
        holds its own learning rate, so ``step_size`` must be left out. Default: steepest descent
        in the threat's norm.
      start: ``"zero"`` (at ``x``), ``"uniform"`` (in the ball) or ``start(keys, x)``, projected.
      clip_start: clip the uniform start to the box before the first gradient (Wong et al. 2020).
        ``False``: keep it outside and differentiate through the clip, so that pixels beyond the
        box keep their noise in the first step (Andriushchenko & Flammarion 2020).
      restarts: independent runs, ``>= 1``; restart r draws from ``fold_in(key, r)``, so that more
        restarts only add candidates.
      iterate: keep the ``"last"`` or the ``"best"`` iterate of each run.
      select: what "best" means, among iterates and among restarts: ``"loss"``, the largest loss
        (the reference protocol, under which a success of lower loss may be dropped), or
        ``"any"``, a success before any failure and then the largest loss. Ties go to the later.
      targeted: ``y`` are target classes, whose loss is lowered.
      corner: finally push every perturbation to the corner ``eps * sign(delta)`` (for other norms,
        to the steepest point of the ball), then clip to the box.
      early_stop: an example stops moving as soon as it is misclassified (reaches its target).
      has_aux: return ``(x_adv, PGDTrace)``.

    Raises:
      ValueError: an argument is out of range; of a call: shapes or dtypes do not fit, or inputs or
        labels whose values are known (outside ``jit``) are not finite, in the box or in range.

    Source: Madry et al. (2018), "Towards deep learning models resistant to adversarial attacks",
    section 2; Kurakin et al. (2017). Deviation: ``sign(0) = 0``, so a pixel without gradient
    stays.
    """
    check_threat(threat)
    checks.function("loss", loss)
    checks.integer("steps", steps)
    checks.integer("restarts", restarts, at_least=1)
    checks.choice("iterate", iterate, ("last", "best"))
    checks.choice("select", select, ("loss", "any"))
    if not callable(start):
        checks.choice("start", start, ("zero", "uniform"))
    if step_rule is not None:
        checks.transform("step_rule", step_rule)
    if step_rule is not None and step_size is not None:
        raise ValueError(
            f"step_size must be left out when a step_rule is given, got {step_size}: "
            "the rule holds its own learning rate"
        )
    if step_size is None:
        step_size = 2.5 * threat.eps / max(steps, 1) if step_rule is None else 1.0
    checks.number("step_size", step_size, at_least=0)
    rule = steepest_descent(threat.norm, 1.0) if step_rule is None else step_rule
    sign = -1.0 if targeted else 1.0
    keep_best = iterate == "best"

    def first_iterate(example_keys: Array, x: Array) -> Array:
        if callable(start):
            return threat.project(start(example_keys, x), x)
        if start == "zero":
            return x
        if clip_start:
            return threat.sample(example_keys, x)
        return dataclasses.replace(threat, lower=-jnp.inf, upper=jnp.inf).sample(example_keys, x)

    def judge(logits: Array, y: Array) -> tuple[Array, Array, Array]:
        score = sign * checks.per_example("loss(logits, y)", loss(logits, y), y.shape[0])
        prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        labels = y if y.ndim == 1 else jnp.argmax(y, axis=-1)
        return score, prediction, (prediction == labels) == targeted

    def is_better(new: _Candidate, old: _Candidate) -> Array:
        # NaN never wins: every comparison with it is false.
        higher = new.score >= old.score
        if select == "loss":
            return higher
        return (new.success & ~old.success) | ((new.success == old.success) & higher)

    def better(new: _Candidate, old: _Candidate) -> _Candidate:
        return choose(is_better(new, old), new, old)

    def run(logits_fn: Callable, example_keys: Array, x: Array, y: Array):
        def total(z):
            # Clip, then differentiate: a derivative through the clip would vanish, or be halved,
            # at pixels that are exactly 0 or 1.
            score, prediction, success = judge(logits_fn(z), y)
            return score.sum(), (score, prediction, success)

        def step(carry, _):
            z, rule_state, best, stopped = carry
            # All other iterates are in the box. FGSM's is x itself, at which a penalty may want the
            # same gradient: XLA computes equal expressions once, but knows of no box.
            inside = z if clip_start else threat.clip(z)
            gradient, (score, prediction, success) = jax.grad(total, has_aux=True)(inside)
            if not clip_start:
                gradient = jnp.where(z == inside, gradient, 0)
            updates, rule_state = jax.vmap(rule.update)(-gradient, rule_state, z)
            moved = threat.project(z + rows(jnp.asarray(step_size, z.dtype), z) * updates, x)
            if keep_best:
                best = better(_Candidate(inside, score, success), best)
            if early_stop:
                stopped = stopped | success
                moved = jnp.where(rows(stopped, z), inside, moved)
            return (moved, rule_state, best, stopped), (score, prediction)

        z = first_iterate(example_keys, x)
        n = x.shape[0]
        worst = _Candidate(x, jnp.full(n, -jnp.inf), jnp.zeros(n, bool))
        carry = (
            z,
            jax.vmap(rule.init)(z),
            worst if keep_best else None,
            jnp.zeros(n, bool) if early_stop else None,
        )
        (z, _, best, _), (scores, predictions) = jax.lax.scan(step, carry, length=steps)
        z = threat.clip(z)  # moves only an unclipped start of no steps
        if corner:
            z = threat.corner(z, x)
        if not (keep_best or has_aux or restarts > 1):
            return z, None
        score, prediction, success = judge(logits_fn(z), y)
        last = _Candidate(z, score, success)
        scores = jnp.concatenate([scores, score[None]])
        predictions = jnp.concatenate([predictions, prediction[None]])
        return (better(last, best) if keep_best else last), (scores, predictions)

    def attack(
        logits_fn: Callable[[Array], Array], key: Array, x: ArrayLike, y: ArrayLike
    ) -> Array | tuple[Array, PGDTrace]:
        checks.function("logits_fn", logits_fn)
        checks.batch(x, y)
        if jnp.shape(step_size) not in ((), x.shape[:1]):
            raise ValueError(
                f"step_size must be one number or one per example, {x.shape[:1]}, "
                f"got shape {jnp.shape(step_size)}"
            )
        threat.check_inputs(x)
        x, y = jax.lax.stop_gradient((jnp.asarray(x), jnp.asarray(y)))
        example_keys = keys.as_per_example(key, x.shape[0])
        if restarts == 1 and not keep_best and not has_aux:
            z, _ = run(logits_fn, keys.fold_in(example_keys, 0), x, y)
            return jax.lax.stop_gradient(z)

        def restart(best, r):
            candidate, trace = run(logits_fn, keys.fold_in(example_keys, r), x, y)
            return better(candidate, best), trace

        n = x.shape[0]
        worst = _Candidate(x, jnp.full(n, -jnp.inf), jnp.zeros(n, bool))
        best, (scores, predictions) = jax.lax.scan(restart, worst, jnp.arange(restarts))
        best = jax.lax.stop_gradient(best)
        if not has_aux:
            return best.x
        return best.x, PGDTrace(scores, predictions, best.success)

    return attack


def fgsm(
    threat: ThreatModel,
    *,
    step_size: float | Array | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    targeted: bool = False,
) -> Attack:
    """Fast gradient method: one steepest step from ``x``; FGSM for l_inf, FGM for l_2.

    Args:
      threat: norm ball and box.
      step_size: length of the step, in input units; default ``eps``. A smaller one is the
        reduced-step FGSM of Andriushchenko & Flammarion (2020), section 3.
      loss: ``loss(logits, y) -> (n,)``, raised by the attack.
      targeted: ``y`` are target classes, whose loss is lowered.

    Source: Goodfellow et al. (2015), section 4; Miyato et al. (2017) for l_2.
    """
    step_size = check_threat(threat).eps if step_size is None else step_size
    return pgd(threat, steps=1, step_size=step_size, loss=loss, start="zero", targeted=targeted)


def fgsm_rs(
    threat: ThreatModel,
    *,
    step_size: float | Array | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    clip_start: bool = True,
) -> Attack:
    """FGSM from a uniform start in the ball; ``step_size`` defaults to ``1.25 * eps``.

    ``clip_start=True`` clips the start to the box before the gradient (Wong et al. 2020, "Fast is
    better than free"); ``False`` differentiates through the clip (Andriushchenko & Flammarion
    2020).
    """
    step_size = 1.25 * check_threat(threat).eps if step_size is None else step_size
    return pgd(threat, steps=1, step_size=step_size, loss=loss, clip_start=clip_start)


def bim(
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float | Array,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    targeted: bool = False,
) -> Attack:
    """Basic iterative method, Iter-FGSM: PGD from ``x`` itself. Kurakin et al. (2017)."""
    return pgd(threat, steps=steps, step_size=step_size, loss=loss, start="zero", targeted=targeted)


def least_likely(targeted_attack: Attack) -> Attack:
    """A targeted attack on the least likely class of the clean input; the labels are not used.

    ``least_likely(bim(..., targeted=True))`` is Iter-LL-FGSM (Kurakin et al. 2017). The target is
    computed once, at the clean point.
    """
    checks.function("targeted_attack", targeted_attack)

    def attack(logits_fn, key, x, y):
        del y
        target = jnp.argmin(logits_fn(x), axis=-1).astype(jnp.int32)
        return targeted_attack(logits_fn, key, x, target)

    return attack
