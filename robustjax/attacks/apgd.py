"""Auto-PGD: projected gradient ascent that chooses its own step sizes.

A step is a steepest step of the current length followed by an averaging with the step before,

    z = P(x_k + eta s(g_k)),    x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1})),

where ``s`` is the steepest direction of the norm (sign for l_inf, normalised gradient for l_2) and
``P`` the projection of the threat model. ``eta`` starts at ``2 eps``. At checkpoints that grow
denser, an example halves its ``eta`` and goes back to its best point if

1. fewer than ``rho = 0.75`` of the steps since the last checkpoint raised the loss, or
2. ``eta`` was not halved at the last checkpoint and the best loss has not risen since.

For l_1 the step is sparse: it moves the share of pixels with the largest gradients, and share and
length follow the sparsity of the best point; the first six tenths of the steps run in the larger
balls of radius ``3 eps`` and ``2 eps``.

Sources: Croce & Hein (2020), "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", algorithm 1; for l_1 Croce & Hein (2021), "Mind the box: l1-APGD
for sparse adversarial attacks on image classifiers", algorithm 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robustjax import checks, keys
from robustjax.attacks.apgd_rules import (
    L1_SHRINK,
    APGDState,
    adapt_sparsity,
    changed,
    fresh,
    halve,
    plan_of,
    record,
    sparse_sign,
)
from robustjax.attacks.stepwise import StepwiseAttack, rows
from robustjax.attacks.targets import likeliest_wrong_classes
from robustjax.losses import cross_entropy, dlr_targeted
from robustjax.metrics.accuracy import correct
from robustjax.norms import L1
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat

MOMENTUM = 0.75
L1_SHARE = 0.2  # share of the pixels in the first step


def apgd(
    threat: ThreatModel,
    *,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    steps: int = 100,
    restarts: int = 1,
    eot: int | None = None,
    warm_up: bool = True,
    early_stop: bool = True,
    has_aux: bool = False,
) -> StepwiseAttack:
    """Auto-PGD on a loss, ``attack(logits_fn, key, x, y) -> x_adv``.

    Args:
      threat: norm ball and box; any norm. ``eps`` may be traced.
      loss: ``loss(logits, y) -> (n,)``, raised by the attack: ``cross_entropy`` is APGD-CE and
        ``dlr``, which no scaling of the logits can blind, APGD-DLR.
      steps: gradient steps of each restart, ``>= 1``; one more gradient is taken at the start.
      restarts: independent runs, ``>= 1``, from points on the surface of the ball.
      eot: average each gradient over so many draws of a randomised model (expectation over
        transformation). The attack then calls ``logits_fn(x, keys)`` with one key per example, and
        judges by the logits averaged over the draws. ``None``: ``logits_fn(x)``.
      warm_up: for l_1, run 30 % of the steps in the ball of radius ``3 eps`` and 30 % in that of
        ``2 eps`` first. No meaning for other norms.
      early_stop: leave an example alone once it is misclassified. ``False``: go on to the point of
        the largest loss among the misclassified ones.
      has_aux: return ``(x_adv, APGDState)``.

    Raises:
      ValueError: an argument is out of range; of a call: see ``pgd``.

    Source: Croce & Hein (2020), algorithm 1; for l_1 Croce & Hein (2021). Deviations: the first
    checkpoint compares with the loss of the start (the reference code: with 0); condition 1 is
    strict as in the text (the reference code counts equality); ``sign(0) = 0``; the l_1 start is
    uniform on the sphere.
    """
    checks.function("loss", loss)
    judge = _judge(lambda logits, y, target: loss(logits, y), eot)
    return _apgd(threat, judge, None, steps, restarts, eot, warm_up, early_stop, has_aux)


def apgd_targeted(
    threat: ThreatModel,
    *,
    loss: Callable[[Array, Array, Array], Array] = dlr_targeted,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    eot: int | None = None,
    warm_up: bool = True,
    early_stop: bool = True,
    has_aux: bool = False,
) -> StepwiseAttack:
    """Auto-PGD towards each of the likeliest wrong classes in turn: APGD-T.

    An example is broken when it gets any wrong class, not only the one aimed at.

    Args:
      threat: norm ball and box; any norm.
      loss: ``loss(logits, y, target) -> (n,)``, raised by the attack.
      targets: wrong classes to aim at, those with the largest clean logits first; ``<= K - 1``.
      steps: gradient steps for each target and restart, ``>= 1``.
      restarts: independent runs for each target.
      eot: as for ``apgd``.
      warm_up: as for ``apgd``.
      early_stop: as for ``apgd``.
      has_aux: return ``(x_adv, APGDState)``.

    Raises:
      ValueError: an argument is out of range; of a call: fewer than ``targets + 1`` classes, and
        see ``pgd``.

    Source: Croce & Hein (2020), section 4.2; deviations as for ``apgd``.
    """
    checks.function("loss", loss)
    checks.integer("targets", targets, at_least=1)
    judge = _judge(loss, eot)
    return _apgd(threat, judge, targets, steps, restarts, eot, warm_up, early_stop, has_aux)


def _number(values: Array) -> Float[Array, " n"]:
    """In float32, with NaN as -inf: every comparison with NaN is false, and would stay so."""
    values = values.astype(jnp.float32)
    return jnp.where(jnp.isnan(values), -jnp.inf, values)


def _judge(loss: Callable[[Array, Array, Array], Array], eot: int | None) -> Callable:
    """``judge(logits_fn, keys, z, y, target) -> (gradient, loss (n,), misclassified (n,))``."""
    if eot is not None:
        checks.integer("eot", eot, at_least=1)

    def judge(logits_fn, example_keys, z, y, target):
        def total(z, draw):
            logits = logits_fn(z) if eot is None else logits_fn(z, keys.fold_in(example_keys, draw))
            values = checks.per_example("loss(logits, y)", loss(logits, y, target), len(y))
            return values.sum(), (values, logits)

        gradient = jax.grad(total, has_aux=True)
        if eot is None:
            g, (values, logits) = gradient(z, 0)
            return g, _number(values), ~correct(logits, y)

        def add(sums, draw):
            g, aux = gradient(z, draw)
            return jax.tree.map(jnp.add, sums, (g, *aux)), None

        shapes = jax.eval_shape(lambda: (lambda g, aux: (g, *aux))(*gradient(z, 0)))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sums, _ = jax.lax.scan(add, zeros, jnp.arange(eot))
        g, values, logits = jax.tree.map(lambda s: s / eot, sums)
        return g, _number(values), ~correct(logits, y)

    return judge


def _apgd(
    threat: ThreatModel,
    judge: Callable,
    targets: int | None,
    steps: int,
    restarts: int,
    eot: int | None,
    warm_up: bool,
    early_stop: bool,
    has_aux: bool,
) -> StepwiseAttack:
    check_threat(threat)
    checks.integer("restarts", restarts, at_least=1)
    checks.integer("steps", steps, at_least=1)
    sparse = isinstance(threat.norm, L1)
    plan = plan_of(steps, sparse, warm_up)

    def threat_at(t: Any) -> ThreatModel:
        if not sparse:
            return threat
        eps = threat.eps * jnp.asarray(plan.factor)[t]
        return ThreatModel(threat.norm, eps, threat.lower, threat.upper)

    def project(z: Array, x: Array, t: Any) -> Array:
        # Sparse points must stay sparse: with a box only the exact projection does that.
        return threat_at(t).project_exact(z, x) if sparse else threat.project(z, x)

    def init(logits_fn, example_keys, x, y):
        clean = logits_fn(x) if eot is None else logits_fn(x, example_keys)
        n, wrong = x.shape[0], ~correct(clean, y)
        zero = jnp.zeros(n, jnp.float32)
        return APGDState(
            x_adv=x,
            done=wrong,
            success=wrong,
            loss_adv=jnp.full(n, -jnp.inf),
            targets=None if targets is None else likeliest_wrong_classes(clean, y, targets),
            target=None if targets is None else jnp.zeros(n, jnp.int32),
            x=x,
            x_before=x,
            loss=zero,
            gradient=jnp.zeros_like(x),
            x_max=x,
            loss_max=zero,
            gradient_max=jnp.zeros_like(x),
            step_size=zero,
            rises=jnp.zeros(n, jnp.int32),
            halved=jnp.zeros(n, bool),
            loss_max_before=zero,
            share=zero if sparse else None,
            sparsity=zero if sparse else None,
        )

    def begin(logits_fn, r, round_keys, state, x, y):
        if targets is not None:
            state = state._replace(target=state.targets[:, r // restarts])
        radius = jnp.broadcast_to(jnp.asarray(threat_at(0).eps, x.dtype), x.shape[:1])
        noise = jax.vmap(threat.norm.sample_sphere)(keys.fold_in(round_keys, 0), x, radius)
        return state._replace(
            x_max=project(x + noise, x, 0),
            loss_max=jnp.full_like(state.loss_max, -jnp.inf),  # no point of this round yet
        )

    def move(state, t, x):
        size = rows(state.step_size.astype(x.dtype), x)
        if sparse:
            return project(state.x + size * sparse_sign(state.gradient, state.share), x, t)
        z = threat.project(state.x + size * threat.norm.steepest(state.gradient, batch_ndim=1), x)
        weight = jnp.where(t == 1, 1.0, MOMENTUM).astype(x.dtype)
        z = state.x + weight * (z - state.x) + (1 - weight) * (state.x - state.x_before)
        return threat.project(z, x)

    def step(logits_fn, t, round_keys, state, x, y):
        # One network evaluation stands here for the start, for the moves and, for l_1, for the
        # entries into smaller balls: a program of half the size to compile.
        enters, looks_back = jnp.asarray(plan.enters)[t], jnp.asarray(plan.interval)[t]
        # Into a ball: from the random start, or from the best point so far, projected.
        entry = (lambda: project(state.x_max, x, t)) if sparse else (lambda: state.x_max)
        z = jax.lax.cond(enters, entry, lambda: move(state, t, x))
        draw_keys = keys.fold_in(round_keys, t + 1)
        g, value, success = judge(logits_fn, draw_keys, z, y, state.target)
        new = record(state, z, g, value, success, jnp.asarray(plan.counts)[t])
        if early_stop:
            new = new._replace(done=new.success)
        rises = state.rises + (value > state.loss)
        new = new._replace(x_before=state.x, rises=rises)

        first = jnp.broadcast_to(jnp.asarray(threat_at(t).eps, x.dtype), x.shape[:1])
        if sparse:
            share = jnp.where(t == 0, L1_SHARE, changed(z, x) / (x[0].size * L1_SHRINK))
            looked = lambda s: adapt_sparsity(s, first, x)  # noqa: E731
        else:
            share, first = L1_SHARE, 2 * first
            looked = lambda s: halve(s, looks_back)  # noqa: E731
        what = jnp.where(enters, 2, jnp.where(looks_back > 0, 1, 0))
        return jax.lax.switch(what, [lambda s: s, looked, lambda s: fresh(s, first, share, x)], new)

    rounds = restarts * (targets or 1)
    return StepwiseAttack(init, begin, step, steps + 1, rounds, threat.check_inputs, has_aux)
