"""What is measured of a network at every validation while it is trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import batch_sizes, choices
from experiments.training_fit import Measure
from experiments.training_settings import Settings
from robustjax import attacks, checks, data, gradients, losses, metrics, models, parallel, training
from robustjax.threat import ThreatModel

# Norm bounds for which the error of regressed weights is recorded: Dabouei et al. (2022), Fig. 3.
WEIGHT_ERROR_ALPHAS = (0.1, 1.0, 3.0)


def validation_attacks(settings: Settings, threat: ThreatModel) -> dict[str, attacks.Attack]:
    """PGD; by default on the margin loss, as in Dabouei et al. (2022), section 4.1."""
    attack = attacks.pgd(
        threat,
        steps=settings.validation_steps,
        step_size=threat.eps * settings.validation_step_size,
        loss=choices.LOSSES[settings.validation_loss],
    )
    return {f"pgd{settings.validation_steps}": attack}


def make_measure(
    settings: Settings,
    objective: Any,
    exact_model: models.Model,
    threat: ThreatModel,
    splits: dict[str, data.Dataset],
    key: jax.Array,
    mesh: Mesh,
) -> Measure:
    """Accuracy on the validation set; norms of gradients and signs of overfitting if asked for.

    Args:
      settings: ``probe``, ``monitor`` and those of validation are looked at.
      objective: of which gradients are taken.
      exact_model: computes in float32.
      threat: of the attacks.
      splits: the sets as they are evaluated.
      key: of the attacks.
      mesh: devices.
    """
    evaluate = training.make_evaluator(
        exact_model.apply, validation_attacks(settings, threat), mesh
    )
    batch_size = batch_sizes.for_evaluation(settings.test_batch_size, mesh.size)
    gradients_of = monitor = None
    if settings.probe:
        gradients_of = _gradient_measure(settings, objective, exact_model, splits["train"], key)
    if settings.monitor:
        monitor = _monitor(settings, exact_model, threat, splits["test"], key)

    def measure(state: training.TrainState) -> dict[str, dict[str, float]]:
        batches = data.eval_batches(splits["validation"], batch_size)
        verdicts = evaluate(state.params, state.model_state, key, batches)
        found = {"validation": {name: float(v.mean()) for name, v in verdicts.items()}}
        if monitor is not None:
            found["monitor"] = monitor(state)
        if gradients_of is not None:
            found["gradients"] = gradients_of(state)
        return found

    return measure


def _gradient_measure(settings, objective, exact_model, train, key):
    """Norms of the gradients of the first training examples, without augmentation."""
    n = settings.probe
    checks.integer("probe", n, at_most=len(train))
    chunk = max(k for k in range(1, min(n, settings.batch_size) + 1) if n % k == 0)
    shown = [train[i] for i in range(n)]
    batch = {
        "image": jnp.asarray(data.as_float(np.stack([example["image"] for example in shown]))),
        "label": jnp.asarray([int(example["label"]) for example in shown], jnp.int32),
        "index": jnp.arange(n, dtype=jnp.int32),
        "step": jnp.zeros((), jnp.int32),
    }
    loss_fn = objective(exact_model.apply)
    probe = jax.jit(gradients.gradient_probe(loss_fn, chunk=chunk))
    in_training = jax.jit(gradients.gradient_probe(loss_fn, chunk=chunk, mode="train"))

    def measure(state) -> dict[str, float]:
        params, model_state = parallel.to_host((state.params, state.model_state))
        found = probe(params, model_state, key, batch)
        moments = metrics.gradient_moments(found.parameter_norm, found.mean_gradient)
        norms = (found.parameter_norm, found.input_norm)
        more = {}
        if settings.probe_train:
            found = in_training(params, model_state, key, batch)
            more["correlation_train"] = metrics.correlation(found.parameter_norm, found.input_norm)
        return {
            **more,
            "mean_norm": float(moments.mean_norm),
            "variance": float(moments.variance),
            "correlation": metrics.correlation(*norms),
            **{
                f"weight_error_{alpha:g}": metrics.regressed_weight_error(*norms, alpha)
                for alpha in WEIGHT_ERROR_ALPHAS
            },
        }

    return measure


def _monitor(settings, exact_model, threat, test, key):
    """Signs of catastrophic overfitting, on the first test examples."""
    n = checks.integer("monitor", settings.monitor, at_most=len(test))
    shown = [test[i] for i in range(n)]
    x = jnp.asarray(data.as_float(np.stack([example["image"] for example in shown])))
    y = jnp.asarray([int(example["label"]) for example in shown], jnp.int32)
    pgd = attacks.pgd(threat, steps=10, step_size=threat.eps / 4)
    at_random = attacks.pgd(threat, steps=0, clip_start=False)

    @jax.jit
    def measured(params, model_state):
        logits_fn = models.eval_logits(exact_model.apply, params, model_state)
        found = {"fgsm": attacks.fgsm(threat)(logits_fn, key, x, y),
                 "pgd": pgd(logits_fn, key, x, y)}  # fmt: skip
        noise = at_random(logits_fn, key, x, y) - x
        out = {"clean": metrics.correct(logits_fn(x), y).mean()}
        for name, x_adv in found.items():
            logits = logits_fn(x_adv)
            out[f"{name}_accuracy"] = metrics.correct(logits, y).mean()
            out[f"{name}_loss"] = losses.cross_entropy(logits, y).mean()
        out["alignment"] = metrics.gradient_alignment(logits_fn, x, y, noise).mean()
        out["cosine_fgsm_pgd"] = metrics.cosine(found["fgsm"] - x, found["pgd"] - x).mean()
        return out

    def measure(state) -> dict[str, float]:
        params, model_state = parallel.to_host((state.params, state.model_state))
        return {name: float(value) for name, value in measured(params, model_state).items()}

    return measure
