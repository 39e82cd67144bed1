"""Adversarial training: the loss at the worst input that an attack finds in the threat model.

The attack sees the model as it is at this step, with parameters and statistics held constant
(Danskin): no derivative runs through it. By default it sees the model in evaluation mode; what
its forward passes would do to running statistics is discarded.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from robustjax import checks, keys
from robustjax.attacks import Attack, gaussian_start, pgd
from robustjax.losses import boosted_cross_entropy, cross_entropy, kl_divergence
from robustjax.metrics.accuracy import correct
from robustjax.objectives.stages import LossFn, Stages
from robustjax.objectives.standard import ModelFn, Objective, logits_of
from robustjax.threat import ThreatModel


def _inner(
    attack: Attack, model_fn: ModelFn, attack_mode: str, target: Callable | None = None
) -> Callable:
    """The inner stage: ``attack`` at the batch's inputs, each example under the key of its index.

    What is attacked is the loss at the labels, or at ``target(clean logits)``.
    """

    def inner(params, model_state, key, batch):
        # Tangents must not enter the attack: constants before it, not only a stop after it.
        params, model_state, batch = jax.lax.stop_gradient((params, model_state, batch))
        train = attack_mode == "train"

        def logits_fn(x):
            return logits_of(model_fn, params, model_state, key, batch, x, train)[0]

        x = batch["image"]
        y = batch["label"] if target is None else target(logits_fn(x))
        example_keys = keys.per_example(jax.random.fold_in(key, 0), batch["index"])
        x_adv = attack(logits_fn, example_keys, x, y)
        checks.same_shape("x_adv, the result of attack,", x_adv, "image", x)
        return {**batch, "adversarial": jax.lax.stop_gradient(x_adv)}

    return inner


def madry(
    attack: Attack,
    *,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    attack_mode: str = "eval",
) -> Objective:
    """Adversarial training on the examples of any attack: ``loss(f(attack(x)), y)``.

    Args:
      attack: ``attack(logits_fn, keys, x, y) -> x_adv``.
      loss: ``loss(logits, y) -> (n,)``.
      attack_mode: ``"eval"`` or ``"train"``: the mode of the model during the attack. In training
        mode batch normalisation uses the batch's statistics, as much of the early code did; the
        updates of running statistics are discarded either way.

    Returns:
      An objective that reports ``loss`` and ``robust_accuracy`` (under this attack, in training
      mode) per example.

    Source: Madry et al. (2018), equation (2.1). With ``fgsm`` it is FGSM adversarial training,
    with ``fgsm_rs`` that of Wong et al. (2020).
    """
    checks.function("attack", attack)
    checks.function("loss", loss)
    checks.choice("attack_mode", attack_mode, ("eval", "train"))

    def objective(model_fn: ModelFn) -> LossFn:
        def outer(params, model_state, key, batch, train=True):
            checks.fields("batch", batch, ("adversarial",))
            logits, model_state = logits_of(
                model_fn, params, model_state, key, batch, batch["adversarial"], train
            )
            losses = loss(logits, batch["label"])
            robust = correct(logits, batch["label"]).astype(jnp.float32)
            return losses, (model_state, {"loss": losses, "robust_accuracy": robust})

        return Stages(_inner(attack, model_fn, attack_mode), outer)

    return objective


def trades_attack(
    threat: ThreatModel,
    *,
    steps: int = 10,
    step_size: ArrayLike | None = None,
    step_rule: optax.GradientTransformation | None = None,
) -> Attack:
    """The inner attack of TRADES: PGD on the divergence from the clean logits, passed as ``y``.

    Starts at ``x + 0.001 * N(0, I)``, as the divergence has no gradient at ``x``; Zhang et al.
    (2019), section 5 and public code.

    Args:
      threat: norm ball and box.
      steps: gradient steps.
      step_size: length of a step; default 0.007 unless there is a ``step_rule``.
      step_rule: an optax transform in place of steepest steps, as in ``pgd``.
    """
    if step_size is None and step_rule is None:
        step_size = 0.007
    return pgd(
        threat,
        steps=steps,
        step_size=step_size,
        step_rule=step_rule,
        loss=kl_divergence,
        start=gaussian_start(0.001),
    )


def trades(
    attack: Attack,
    *,
    beta: ArrayLike = 6.0,
    kl_direction: str = "clean_to_adversarial",
    attack_mode: str = "eval",
) -> Objective:
    """TRADES: ``cross_entropy(f(x), y) + beta * KL(f(x) || f(x_adv))``.

    Args:
      attack: an attack whose ``y`` are the clean logits, such as ``trades_attack(threat)``.
      beta: weight of the divergence, ``1 / lambda`` of the paper; ``>= 0``.
      kl_direction: ``"clean_to_adversarial"`` is ``KL(f(x) || f(x_adv))``, that of the authors'
        code; ``"adversarial_to_clean"`` is ``KL(f(x_adv) || f(x))``.
      attack_mode: as for ``madry``.

    Returns:
      An objective that reports ``loss``, ``accuracy``, ``robust_accuracy`` and ``divergence`` per
      example.

    Source: Zhang et al. (2019), "Theoretically principled trade-off between robustness and
    accuracy", equation (5). As there, clean and adversarial inputs pass through the training-mode
    model one after the other, and both update its running statistics.
    """
    checks.function("attack", attack)
    checks.number("beta", beta, at_least=0)
    checks.choice("kl_direction", kl_direction, ("clean_to_adversarial", "adversarial_to_clean"))
    checks.choice("attack_mode", attack_mode, ("eval", "train"))

    def objective(model_fn: ModelFn) -> LossFn:
        def outer(params, model_state, key, batch, train=True):
            clean, adversarial, model_state = _both_logits(
                model_fn, params, model_state, key, batch, train
            )
            if kl_direction == "clean_to_adversarial":
                divergence = kl_divergence(adversarial, clean)
            else:
                divergence = kl_divergence(clean, adversarial)
            losses = cross_entropy(clean, batch["label"]) + beta * divergence
            metrics = _metrics(losses, clean, adversarial, batch["label"])
            return losses, (model_state, {**metrics, "divergence": divergence})

        return Stages(_inner(attack, model_fn, attack_mode, target=lambda logits: logits), outer)

    return objective


def mart(
    attack: Attack,
    *,
    beta: ArrayLike = 6.0,
    guard: ArrayLike = 1e-4,
    attack_mode: str = "eval",
) -> Objective:
    """MART: misclassified examples count more in the divergence from clean to adversarial.

    ``BCE(f(x_adv), y) + beta * KL(f(x) || f(x_adv)) * (1 - p_y(x))`` with the boosted cross-entropy
    ``BCE = -log p'_y - log(1 + guard - max_{k != y} p'_k)``. Derivatives flow through the factor
    ``1 - p_y(x)`` too.

    Args:
      attack: an attack on the labels, such as PGD on the cross-entropy.
      beta: weight of the divergence, lambda of the paper; ``>= 0``.
      guard: see ``losses.boosted_cross_entropy``; the authors' code has 1e-4.
      attack_mode: as for ``madry``.

    Returns:
      An objective that reports what ``trades`` reports.

    Source: Wang et al. (2020), "Improving adversarial robustness requires revisiting misclassified
    examples", equation (11); clean before adversarial inputs in training mode, as for ``trades``.
    """
    checks.function("attack", attack)
    checks.number("beta", beta, at_least=0)
    checks.number("guard", guard, at_least=0)
    checks.choice("attack_mode", attack_mode, ("eval", "train"))

    def objective(model_fn: ModelFn) -> LossFn:
        def outer(params, model_state, key, batch, train=True):
            y = batch["label"]
            clean, adversarial, model_state = _both_logits(
                model_fn, params, model_state, key, batch, train
            )
            divergence = kl_divergence(adversarial, clean)
            doubt = -jnp.expm1(-cross_entropy(clean, y))  # 1 - p_y(x)
            losses = boosted_cross_entropy(adversarial, y, guard=guard) + beta * divergence * doubt
            metrics = _metrics(losses, clean, adversarial, y)
            return losses, (model_state, {**metrics, "divergence": divergence})

        return Stages(_inner(attack, model_fn, attack_mode), outer)

    return objective


def _both_logits(model_fn, params, model_state, key, batch, train):
    """Logits at clean and adversarial inputs, one after the other; both update the statistics."""
    checks.fields("batch", batch, ("adversarial",))
    clean, model_state = logits_of(model_fn, params, model_state, key, batch, batch["image"], train)
    adversarial, model_state = logits_of(
        model_fn, params, model_state, key, batch, batch["adversarial"], train
    )
    return clean, adversarial, model_state


def _metrics(losses, clean, adversarial, y) -> dict[str, Array]:
    return {
        "loss": losses,
        "accuracy": correct(clean, y).astype(jnp.float32),
        "robust_accuracy": correct(adversarial, y).astype(jnp.float32),
    }
