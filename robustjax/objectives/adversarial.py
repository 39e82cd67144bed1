"""Adversarial training: the loss at the worst input that an attack finds in the threat model.

The attack sees the model as it is at this step, with parameters and statistics held constant
(Danskin): no derivative runs through it. By default it sees the model in evaluation mode; what
its forward passes would do to running statistics is discarded.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from robustjax import checks, keys
from robustjax.attacks import Attack, gaussian_start, pgd
from robustjax.losses import cross_entropy, kl_divergence
from robustjax.metrics.accuracy import correct
from robustjax.objectives.standard import LossFn, ModelFn, Objective, model_key
from robustjax.threat import ThreatModel


def _attack_batch(attack, model_fn, params, model_state, key, batch, y, attack_mode):
    """``attack`` at the batch's inputs with ``y``, each example under the key of its index."""
    # Tangents must not enter the attack: constants before it, not only a stop after it.
    params, model_state, y = jax.lax.stop_gradient((params, model_state, y))

    def logits_fn(x):
        train = attack_mode == "train"
        return model_fn(params, model_state, x, train, model_key(key, batch) if train else None)[0]

    example_keys = keys.per_example(jax.random.fold_in(key, 0), batch["index"])
    x_adv = attack(logits_fn, example_keys, batch["image"], y)
    checks.same_shape("x_adv, the result of attack,", x_adv, "image", batch["image"])
    return jax.lax.stop_gradient(x_adv)


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
        def loss_fn(params, model_state, key, batch):
            y = batch["label"]
            x_adv = _attack_batch(attack, model_fn, params, model_state, key, batch, y, attack_mode)
            logits, model_state = model_fn(params, model_state, x_adv, True, model_key(key, batch))
            losses = loss(logits, y)
            robust = correct(logits, y).astype(jnp.float32)
            return losses, (model_state, {"loss": losses, "robust_accuracy": robust})

        return loss_fn

    return objective


def trades_attack(threat: ThreatModel, *, steps: int = 10, step_size=0.007) -> Attack:
    """The inner attack of TRADES: PGD on the divergence from the clean logits, passed as ``y``.

    Starts at ``x + 0.001 * N(0, I)``; Zhang et al. (2019), section 5 and public code.
    """
    return pgd(
        threat,
        steps=steps,
        step_size=step_size,
        loss=kl_divergence,
        start=gaussian_start(0.001),
    )


def trades(
    attack: Attack,
    *,
    beta: float = 6.0,
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
        def loss_fn(params, model_state, key, batch):
            x, y = batch["image"], batch["label"]
            attacked, _ = model_fn(
                *jax.lax.stop_gradient((params, model_state)),
                x,
                attack_mode == "train",
                model_key(key, batch) if attack_mode == "train" else None,
            )
            x_adv = _attack_batch(
                attack, model_fn, params, model_state, key, batch, attacked, attack_mode
            )
            clean, model_state = model_fn(params, model_state, x, True, model_key(key, batch))
            adversarial, model_state = model_fn(
                params, model_state, x_adv, True, model_key(key, batch)
            )
            if kl_direction == "clean_to_adversarial":
                divergence = kl_divergence(adversarial, clean)
            else:
                divergence = kl_divergence(clean, adversarial)
            losses = cross_entropy(clean, y) + beta * divergence
            metrics = {
                "loss": losses,
                "accuracy": correct(clean, y).astype(jnp.float32),
                "robust_accuracy": correct(adversarial, y).astype(jnp.float32),
                "divergence": divergence,
            }
            return losses, (model_state, metrics)

        return loss_fn

    return objective
