"""A small task on which robust overfitting shows within seconds, and many runs of it at once.

400 digits of 8x8 pixels, 30 % of their labels redrawn, and a perceptron 64-256-256-10. It is the
wrong labels that a network learns by heart in the late epochs of adversarial training, as large
networks do with CIFAR-10. Whole runs, with evaluation, are one compiled program mapped over seeds
and settings.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import choices, side_by_side
from robustjax import (
    attacks,
    checks,
    data,
    gradients,
    losses,
    metrics,
    models,
    training,
)
from robustjax.threat import ThreatModel

MODEL = models.from_linen(models.MLP((256, 256), num_classes=10))
MOMENTUM = 0.9
METHODS = ("msgd", "mgnc", "sngm", "f_engm", "n_engm", "a_engm", "engm")
OBJECTIVES = ("standard", "madry", "trades", "mart", "trades_awp")


class Task(NamedTuple):
    """Images ``(n, 8, 8, 1)`` in [0, 1] and labels ``(n,)`` for training and for the test."""

    train: dict[str, Array]
    test: dict[str, Array]


def load_task(*, noise: float = 0.3, train_size: int = 400, test_size: int = 800) -> Task:
    """A random part of the digits with label noise, and another, without, for the test."""
    parts = [data.load("digits", split) for split in ("train", "validation", "test")]
    image, label = (np.concatenate([getattr(part, name) for part in parts])
                    for name in ("image", "label"))  # fmt: skip
    whole = dataclasses.replace(parts[0], image=image, label=label)
    checks.integer("train_size", train_size, at_least=1, at_most=len(whole) - 1)
    checks.integer("test_size", test_size, at_least=1, at_most=len(whole) - train_size)
    order = np.random.RandomState(0).permutation(len(whole))
    chosen = data.redraw_labels(whole.subset(order[:train_size]), noise, seed=0)

    def arrays(part):
        return {"image": jnp.asarray(data.as_float(part.image)), "label": jnp.asarray(part.label),
                "index": jnp.arange(len(part), dtype=jnp.int32)}  # fmt: skip

    return Task(arrays(chosen), arrays(whole.subset(order[train_size : train_size + test_size])))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is the same in all runs of one program.

    Attributes:
      method: outer optimizer.
      objective: what it minimises; ``"trades_awp"`` is TRADES with weight perturbation.
      epochs: passes over the training set; the learning rate falls by 10 at 60 % and at 80 %.
      batch_size: examples of a batch; what is left of an epoch is dropped.
      attack_steps: steps of PGD in training, of length eps / 4.
      norm: of the threat model.
      evaluate_every: epochs from one evaluation to the next; it divides ``epochs``.
      probe: training examples whose gradients are measured at every evaluation; 0 for none.
    """

    method: str = "msgd"
    objective: str = "madry"
    epochs: int = 120
    batch_size: int = 64
    attack_steps: int = 10
    norm: str = "linf"
    evaluate_every: int = 5
    probe: int = 0

    def __post_init__(self):
        checks.choice("method", self.method, METHODS)
        checks.choice("objective", self.objective, OBJECTIVES)
        checks.choice("norm", self.norm, choices.NORMS)
        for name in ("epochs", "batch_size", "evaluate_every"):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.divisible("epochs", self.epochs, "evaluate_every", self.evaluate_every)


class Knobs(NamedTuple):
    """What may differ from run to run: numbers or arrays ``(runs,)``.

    Attributes:
      seed: of everything random.
      eps: radius of the threat model, in input units.
      alpha: norm bound of ENGM, F-ENGM and A-ENGM.
      alpha_naive: input norm bound of N-ENGM.
      max_norm: norm bound of MGNC.
      beta: weight of the divergence in TRADES and MART.
      weight_decay: coupled weight decay.
      learning_rate: the first one.
      gamma: relative size of the weight perturbation of AWP.
      tau: steps from one regression of A-ENGM to the next.
    """

    seed: Any = 0
    eps: Any = 0.1
    alpha: Any = 3.0
    alpha_naive: Any = 0.5
    max_norm: Any = 1.0
    beta: Any = 6.0
    weight_decay: Any = 5e-4
    learning_rate: Any = 0.1
    gamma: Any = 5e-3
    tau: Any = 10


class Runs(NamedTuple):
    """Curves over the evaluations, and what is left at the end; the first axis is the run.

    Attributes:
      epoch: epochs passed at the evaluations, ``(t,)``.
      clean: accuracy on the test images, ``(runs, t)``.
      robust: accuracy under PGD-20 on the margin loss with steps of eps / 10, ``(runs, t)``.
      train_robust: accuracy under the attack of training, mean since the last evaluation.
      mean_norm, variance: of the probe's gradients, ``(runs, t)``; NaN without a probe.
      parameter_norm, input_norm: ``(runs, t, probe)``.
      params: last parameters.
    """

    epoch: np.ndarray
    clean: Float[Array, "runs t"]
    robust: Float[Array, "runs t"]
    train_robust: Float[Array, "runs t"]
    mean_norm: Float[Array, "runs t"]
    variance: Float[Array, "runs t"]
    parameter_norm: Float[Array, "runs t m"]
    input_norm: Float[Array, "runs t m"]
    params: Any


def train(recipe: Recipe, knobs: Knobs, task: Task) -> Runs:
    """Trains and evaluates one network for every entry of the knobs, side by side."""
    curves = side_by_side.run(_run, recipe, knobs, task)
    epoch = np.arange(recipe.evaluate_every, recipe.epochs + 1, recipe.evaluate_every)
    return Runs(epoch, *curves)


def build(recipe: Recipe, knobs: Knobs, total_steps: int) -> tuple[Any, ...]:
    """The parts of a run: objective, oracle, optimizer; the knobs may be traced."""
    threat = ThreatModel(choices.NORMS[recipe.norm], knobs.eps)
    size = threat.eps / 4
    attack = choices.make_attack(
        "pgd", threat, steps=recipe.attack_steps, step_size=size, start="uniform"
    )
    objective = choices.make_objective(
        recipe.objective.removesuffix("_awp"),
        threat,
        attack,
        steps=recipe.attack_steps,
        step_size=size,
        beta=knobs.beta,
        attack_mode="eval",
    )
    # Norms of the whole batch at once: it is small.
    oracle = {
        "f_engm": lambda: gradients.f_engm(knobs.alpha),
        "n_engm": lambda: gradients.n_engm(knobs.alpha_naive),
        "a_engm": lambda: gradients.a_engm(knobs.alpha, tau=knobs.tau),
        "engm": lambda: gradients.engm(knobs.alpha, norms=gradients.ghost_norms(None)),
    }.get(recipe.method, gradients.plain)()
    if recipe.objective == "trades_awp":
        oracle = gradients.awp(knobs.gamma, oracle=oracle, warmup=total_steps // 12)
    schedule = optax.piecewise_constant_schedule(
        1.0, {int(0.6 * total_steps): 0.1, int(0.8 * total_steps): 0.1}
    )
    optimizer = choices.make_optimizer(
        recipe.method if recipe.method in ("mgnc", "sngm") else "sgd",
        lambda step: knobs.learning_rate * schedule(step),
        momentum=MOMENTUM,
        weight_decay=knobs.weight_decay,
        max_norm=knobs.max_norm,
    )
    return objective, oracle, optimizer


def _run(recipe: Recipe, knobs: Knobs, task: Task) -> tuple[Array, ...]:
    """One run from its initial parameters to its curves."""
    n = task.train["label"].shape[0]
    per_epoch = data.steps_per_epoch(n, recipe.batch_size)
    objective, oracle, optimizer = build(recipe, knobs, recipe.epochs * per_epoch)
    init_key, run_key, order_key, test_key = jax.random.split(jax.random.key(knobs.seed), 4)
    step = training.train_step(MODEL.apply, objective, optimizer, oracle=oracle)
    params, model_state = MODEL.init(init_key, task.train["image"][:1])
    state = training.create_state(params, model_state, optimizer, run_key, oracle=oracle)
    loss_fn = objective(MODEL.apply)
    threat = ThreatModel(choices.NORMS[recipe.norm], knobs.eps)
    judge = attacks.pgd(threat, steps=20, step_size=threat.eps / 10, loss=losses.margin)

    def one_epoch(state, epoch):
        order = data.epoch_batches(order_key, epoch, n, recipe.batch_size)
        return training.several_resident_steps(step, side_by_side.take)(state, task.train, order)

    def period(state, epochs):
        state, trace = jax.lax.scan(one_epoch, state, epochs)
        x, y = task.test["image"], task.test["label"]
        logits_fn = models.eval_logits(MODEL.apply, state.params, model_state)
        clean = metrics.correct(logits_fn(x), y).mean()
        robust = metrics.correct(logits_fn(judge(logits_fn, test_key, x, y)), y).mean()
        # The accuracy that the objective reports: under attack where it has one.
        seen = trace.get("robust_accuracy", trace.get("accuracy"))
        return state, (clean, robust, seen.mean(), *_probe(state.params))

    def _probe(params):
        if not recipe.probe:
            nan = jnp.full((), jnp.nan)
            return nan, nan, nan[None], nan[None]
        batch = jax.tree.map(lambda x: x[: recipe.probe], task.train)
        batch["step"] = jnp.zeros((), jnp.int32)
        probe = gradients.gradient_probe(
            loss_fn, chunk=recipe.probe, norms=gradients.ghost_norms(None)
        )
        found = probe(params, model_state, test_key, batch)
        moments = metrics.gradient_moments(found.parameter_norm, found.mean_gradient)
        return moments.mean_norm, moments.variance, found.parameter_norm, found.input_norm

    epochs = jnp.arange(recipe.epochs).reshape(-1, recipe.evaluate_every)
    state, curves = jax.lax.scan(period, state, epochs)
    return *curves, state.params
