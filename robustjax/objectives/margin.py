"""Max-margin adversarial training: move the decision boundary away, up to a distance.

The margin of an example is its distance to the nearest point of another class. Minimising the loss
at that point raises the margin, so each example is attacked with a radius of its own: its margin.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from robustjax import checks, keys, lp
from robustjax.attacks import Attack, pgd
from robustjax.attacks.stepwise import rows, select
from robustjax.losses import cross_entropy, margin, soft_margin
from robustjax.metrics.accuracy import correct
from robustjax.objectives.adversarial import madry
from robustjax.objectives.stages import LossFn, Stages, stages
from robustjax.objectives.standard import ModelFn, Objective, logits_of
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat


def an_pgd(
    threat: ThreatModel,
    *,
    radius: ArrayLike | None = None,
    steps: int = 10,
    search_steps: int = 10,
    rounds: int = 1,
    loss: Callable[[Array, Array], Array] = soft_margin,
    boundary: Callable[[Array, Array], Array] = margin,
    start: str | Callable = "uniform",
) -> Attack:
    """Adaptive-norm PGD: a short perturbation that succeeds, by PGD and a search along its result.

    PGD of a first radius gives a direction. Along it, ``clip(x + t * direction)``, bisection finds
    where the label is lost: in ``[0, radius]`` if PGD succeeded, else in ``[radius, eps]``. What is
    returned is the wrong side of that bracket, whose width is at most ``eps / 2**search_steps``; it
    is ``x`` itself where ``x`` is wrong already or nothing wrong was met within eps.

    Args:
      threat: its norm and box; ``eps``, one number, is the largest length.
      radius: of the first PGD, in input units, above 0 and at most eps; default ``eps / 2``.
      steps: steps of PGD, of size ``2.5 * radius / steps``; ``>= 1``.
      search_steps: bisections, one forward pass each; ``>= 0``.
      rounds: searches, ``>= 1``. Each one after the first runs PGD with the length that the one
        before it found (eps if it found none). The shortest perturbation is kept.
      loss: ``loss(logits, y) -> (n,)``, raised by PGD.
      boundary: ``boundary(logits, y) -> (n,)``, negative where the label is kept. The default is
        the decision boundary; with ``soft_margin`` it is ``p_y = 1/2``, as in the authors' code.
      start: of PGD; see ``robustjax.attacks.pgd``.

    Returns:
      An attack, ``attack(logits_fn, key, x, y) -> x_adv``. As for ``pgd``, an example's result does
      not depend on the batch around it, and carries no derivative.

    Raises:
      ValueError: an argument is out of range; of a call, inputs do not fit, as for ``pgd``.

    Source: Ding et al. (2020), algorithm 1, and public code. Deviations: the first radius of theirs
    is the length found for the same example in the epoch before; an attack has no memory, and
    ``rounds`` takes its place. They return the middle of the last bracket, unclipped, which may be
    on the right side of the boundary.
    """
    eps = _one_radius(threat)
    checks.integer("steps", steps, at_least=1)
    checks.integer("search_steps", search_steps)
    checks.integer("rounds", rounds, at_least=1)
    checks.function("loss", loss)
    checks.function("boundary", boundary)
    if radius is None:
        radius = eps / 2
    elif checks.is_traced(eps):
        checks.number("radius", radius, above=0)
    else:
        checks.number("radius", radius, above=0, at_most=float(eps))
    pgd(threat, steps=steps, start=start)  # refuses a bad start now, not in the first call

    def attack(
        logits_fn: Callable[[Array], Array], key: Array, x: ArrayLike, y: ArrayLike
    ) -> Array:
        checks.function("logits_fn", logits_fn)
        checks.batch(x, y)
        x, y = jax.lax.stop_gradient((jnp.asarray(x), jnp.asarray(y)))
        n = x.shape[0]
        example_keys = keys.as_per_example(key, n)
        wide = lp.wide(x.dtype)

        def lost(z: Array) -> Array:
            value = checks.per_example("boundary(logits, y)", boundary(logits_fn(z), y), n)
            return ~(value < 0)  # what is not a number is no longer right

        def search(carry, r):
            ball, best, shortest = carry
            local = pgd(dataclasses.replace(threat, eps=ball), steps=steps, loss=loss, start=start)
            delta = local(logits_fn, keys.fold_in(example_keys, r), x, y).astype(wide) - x
            reached = threat.norm.value(delta, batch_ndim=1)
            direction = delta / rows(jnp.where(reached > 0, reached, 1), delta)

            def point(t: Array) -> Array:
                return threat.clip((x + rows(t, delta) * direction).astype(x.dtype))

            def halve(_, bracket):
                low, high, found = bracket
                middle = (low + high) / 2
                wrong = lost(point(middle))
                low, high = jnp.where(wrong, low, middle), jnp.where(wrong, middle, high)
                return low, high, found | wrong

            found = lost(point(reached))
            whole = jnp.full(n, eps, wide)
            bracket = jnp.where(found, 0, reached), jnp.where(found, reached, whole), found
            _, high, found = jax.lax.fori_loop(0, search_steps, halve, bracket)
            z = point(high)
            length = threat.norm.value(z.astype(wide) - x, batch_ndim=1)  # the box may shorten it
            shorter = found & (length < shortest)
            best, shortest = select(shorter, (z, length), (best, shortest))
            return (jnp.where(found, length, whole), best, shortest), None

        first = jnp.full(n, radius, wide), x, jnp.full(n, jnp.inf, wide)
        (_, best, _), _ = jax.lax.scan(search, first, jnp.arange(rounds))
        return jax.lax.stop_gradient(select(lost(x), x, best))

    return attack


def mma(
    threat: ThreatModel,
    *,
    attack: Attack | None = None,
    clean_weight: ArrayLike = 1 / 3,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    boundary: Callable[[Array, Array], Array] = margin,
    attack_mode: str = "eval",
) -> Objective:
    """Max-margin adversarial training (MMA): raises each margin that is below ``d_max = eps``.

    ``clean_weight * CE(f(x), y) + (1 - clean_weight) * part``, where ``part`` is, per example,

    - ``CE(f(x), y)`` where ``x`` is misclassified;
    - ``loss(f(x_adv), y)`` at the shortest successful perturbation, if that is within ``d_max``;
    - 0 where the margin is above ``d_max``.

    Which of the three holds is settled in the inner stage, by the model that is attacked.

    Args:
      threat: norm, box and, as ``eps``, one number, the hinge ``d_max``.
      attack: ``attack(logits_fn, keys, x, y) -> x_adv``, the nearest wrong point within eps, and
        ``x`` where there is none, such as ``an_pgd(threat)``, the default, or ``fab(threat)``.
      clean_weight: share of the clean cross-entropy, 0 to 1; 0 is the authors' OMMA.
      loss: ``loss(logits, y) -> (n,)`` at the boundary. The cross-entropy is the softplus of
        ``soft_margin``, the other choice, so that the gradients have one direction.
      boundary: negative where ``x`` counts as correctly classified, as for ``an_pgd``.
      attack_mode: as for ``madry``; the classification of ``x`` is that of the same mode.

    Returns:
      An objective that reports, per example, ``loss``; ``accuracy`` (clean, in training mode);
      ``margin``, the length of what the attack found, in input units: 0 where ``x`` is
      misclassified, and ``d_max`` where nothing was found; ``robust_accuracy``, 1 in the last case.
      Its inner stage adds ``"adversarial"`` and ``"margin"`` to the batch, there infinite where
      nothing was found.

    Raises:
      ValueError: an argument is out of range.

    Source: Ding et al. (2020), "MMA training: direct input space margin maximization through
    adversarial training", algorithm 2, and public code. Clean before adversarial inputs in training
    mode, as for ``trades``. Deviations: examples beyond ``d_max`` pass through the second time
    unperturbed, which only batch normalisation can see; the authors' code tells right from wrong by
    ``soft_margin``, in training mode.
    """
    eps = _one_radius(threat)
    if attack is None:
        attack = an_pgd(threat, boundary=boundary)
    checks.function("attack", attack)
    checks.number("clean_weight", clean_weight, at_least=0, at_most=1)
    checks.function("loss", loss)
    checks.function("boundary", boundary)
    found_by = madry(attack, attack_mode=attack_mode)

    def objective(model_fn: ModelFn) -> LossFn:
        attacked = stages(found_by(model_fn)).inner

        def inner(params, model_state, key, batch):
            params, model_state, batch = jax.lax.stop_gradient((params, model_state, batch))
            batch = attacked(params, model_state, key, batch)
            x, train = batch["image"], attack_mode == "train"
            logits, _ = logits_of(model_fn, params, model_state, key, batch, x, train)
            delta = batch["adversarial"].astype(lp.wide(x.dtype)) - x
            length = threat.norm.value(delta, batch_ndim=1)
            unmoved = jnp.where(boundary(logits, batch["label"]) < 0, jnp.inf, 0.0)
            moved = jnp.any(delta != 0, axis=tuple(range(1, delta.ndim)))
            return {**batch, "margin": jnp.where(moved, length, unmoved)}

        def outer(params, model_state, key, batch, train=True):
            checks.fields("batch", batch, ("adversarial", "margin"))
            y, distance = batch["label"], batch["margin"]
            clean, model_state = logits_of(
                model_fn, params, model_state, key, batch, batch["image"], train
            )
            moved, model_state = logits_of(
                model_fn, params, model_state, key, batch, batch["adversarial"], train
            )
            beyond = jnp.isinf(distance)
            part = jnp.where(distance == 0, cross_entropy(moved, y), loss(moved, y))
            part = jnp.where(beyond, 0, part)
            losses = clean_weight * cross_entropy(clean, y) + (1 - clean_weight) * part
            metrics = {
                "loss": losses,
                "accuracy": correct(clean, y).astype(jnp.float32),
                "robust_accuracy": beyond.astype(jnp.float32),
                "margin": jnp.minimum(distance, jnp.asarray(eps, distance.dtype)),
            }
            return losses, (model_state, metrics)

        return Stages(inner, outer)

    return objective


def _one_radius(threat: ThreatModel) -> ArrayLike:
    eps = check_threat(threat).eps
    if jnp.ndim(eps) != 0:
        raise ValueError(f"eps of threat must be one number, got shape {jnp.shape(eps)}")
    return eps
