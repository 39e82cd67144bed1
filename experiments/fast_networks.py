"""Networks of fast adversarial training at small size, and what is measured on them.

A convolution of four 3x3 filters and a dense layer, on 8x8 digits or on CIFAR-10. One compiled
program trains every method of the same number of attack steps and the same penalty, step length,
random start, radius and weight being numbers; another one measures all networks. Both run a network
on each CPU device, and what has been trained or measured once is kept.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import choices, noisy_digits, side_by_side
from robustjax import (
    attacks,
    checks,
    data,
    gradients,
    losses,
    metrics,
    models,
    norms,
    objectives,
    training,
)
from robustjax.threat import ThreatModel


class Setting(NamedTuple):
    """How networks are trained on a data set: largest learning rate of Adam, and batches."""

    learning_rate: float
    batch_size: int
    augmentation: str


# On CIFAR-10 the published setting of the single-layer CNN.
SETTINGS: Mapping[str, Setting] = {
    "digits": Setting(0.02, 64, "none"),
    "cifar10": Setting(0.003, 128, "crop_and_flip"),
}
EVALUATION_STEPS = 50


class Small(NamedTuple):
    """The size of the studies.

    Attributes:
      seeds: networks of each kind.
      epochs: of a run.
      evaluations: of a run; it divides ``epochs``.
      eps, large_eps: radii, the second one such that FGSM fails.
      weight: of GradAlign.
      filters: of the convolution.
      train_size, test_size: examples.
      dataset: a name of ``SETTINGS``.
      data_dir: where TFDS sets are prepared.
    """

    seeds: int
    epochs: int
    evaluations: int
    eps: float
    large_eps: float
    weight: float
    filters: int
    train_size: int
    test_size: int
    dataset: str = "digits"
    data_dir: str | None = None


class Method(NamedTuple):
    """An attack in training, and a penalty.

    Attributes:
      steps: of the attack.
      step: length of a step, in eps; 0 for training on clean images.
      start: radius of the ball from which the attack starts, uniformly, in eps.
      corner: whether perturbations are pushed to the corners of the ball at last.
      penalty: a name of ``PENALTIES``, or none.
      weight: of the penalty; ``None`` for that of GradAlign in ``Small``.
      replays: of every minibatch in free training, which has no attack; 0 for any other.
      longer: how many times the epochs of others; those of free training count replays.
    """

    steps: int = 1
    step: float = 1.0
    start: float = 0.0
    corner: bool = False
    penalty: str = ""
    weight: float | None = None
    replays: int = 0
    longer: int = 1


PENALTIES = {
    "GradAlign": objectives.grad_align,
    "GradAlign, FGSM point": functools.partial(objectives.grad_align, point="fgsm"),
    "CURE": objectives.cure,
    "gradient": lambda eps: objectives.gradient_penalty(),
}
METHODS: Mapping[str, Method] = {
    "standard": Method(step=0),
    "FGSM": Method(),
    "FGSM, step 0.888 eps": Method(step=0.888),
    "FGSM-RS": Method(step=1.25, start=1),
    "FGSM + GradAlign": Method(penalty="GradAlign"),
    # 96 epochs in place of 30 in the paper.
    "Free, 8 replays": Method(replays=8, longer=3),
    "PGD-2": Method(steps=2, step=0.5),
    "PGD-2, random start": Method(steps=2, step=0.5, start=1),
    "PGD-2, random start, step eps": Method(steps=2, step=1, start=1),
    "PGD-2 + GradAlign": Method(steps=2, step=0.5, penalty="GradAlign"),
    "PGD-10": Method(steps=10, step=0.2),
    "PGD-10, corners": Method(steps=10, step=0.2, corner=True),
    "FGSM + gradient penalty": Method(penalty="gradient", weight=0.3),
    "FGSM + CURE": Method(penalty="CURE", weight=0.3),
    "FGSM + GradAlign, FGSM point": Method(penalty="GradAlign, FGSM point"),
    "GradAlign, clean images": Method(step=0, penalty="GradAlign"),
    "CURE, clean images": Method(step=0, penalty="CURE", weight=3.0),
}


class Recipe(NamedTuple):
    """What is the same in all runs of one program."""

    steps: int
    corner: bool
    penalty: str
    replays: int
    filters: int
    epochs: int
    evaluations: int
    setting: Setting


class Knobs(NamedTuple):
    """What may differ from run to run: numbers or arrays ``(runs,)``."""

    seed: Any
    eps: Any
    weight: Any
    step: Any
    start: Any


class Judged(NamedTuple):
    """Which network is measured: evaluation, seed and radius of the attacks."""

    evaluation: Any
    seed: Any
    eps: Any


class Runs(NamedTuple):
    """Curves over the evaluations on the test set, ``(runs, t)``.

    Attributes:
      clean, fgsm, pgd: accuracy as it is, under FGSM, under PGD-50 from a random start with steps
        of eps / 4 (shares).
      train_pgd: accuracy under PGD-10 on the first 256 training examples.
      fgsm_loss, pgd_loss: mean losses under these attacks.
      alignment: of the gradients at ``x`` and at a uniform point of the ball, mean.
      attack_cosine: of the perturbations of FGSM and of PGD-50, mean.
      filter_norm, outgoing_norm: l_2 norms of each filter and of the weights of the dense layer
        that its feature map goes into, ``(runs, t, filters)``.
    """

    clean: Float[np.ndarray, "runs t"]
    fgsm: Float[np.ndarray, "runs t"]
    pgd: Float[np.ndarray, "runs t"]
    train_pgd: Float[np.ndarray, "runs t"]
    fgsm_loss: Float[np.ndarray, "runs t"]
    pgd_loss: Float[np.ndarray, "runs t"]
    alignment: Float[np.ndarray, "runs t"]
    attack_cosine: Float[np.ndarray, "runs t"]
    filter_norm: Float[np.ndarray, "runs t filters"]
    outgoing_norm: Float[np.ndarray, "runs t filters"]


def network(filters: int) -> models.Model:
    """The single-layer CNN of all studies."""
    return models.from_linen(models.SingleLayerCNN(filters=filters))


def threat_model(eps: Any) -> ThreatModel:
    """The l_inf ball in the box of the images."""
    return ThreatModel(norms.LInf(), eps)


def training_attack(
    threat: ThreatModel, steps: int, step: Any, start: Any, corner: bool = False
) -> attacks.Attack:
    """PGD with steps and a random start in units of eps, which may be traced, as in ``Method``."""
    ball = dataclasses.replace(threat, eps=start * threat.eps)
    size = step * threat.eps
    return attacks.pgd(threat, steps=steps, step_size=size, start=ball.sample, corner=corner)


def _first(small: Small, split: str, size: int) -> dict[str, Array]:
    """The first examples of a split."""
    whole = data.load(small.dataset, split, data_dir=small.data_dir, validation_size=0)
    checks.integer(f"{split}_size", size, at_least=1, at_most=len(whole))
    part = whole.subset(np.arange(size))
    return {"image": jnp.asarray(data.as_float(part.image)), "label": jnp.asarray(part.label),
            "index": jnp.arange(size, dtype=jnp.int32)}  # fmt: skip


@functools.lru_cache
def task(small: Small, squeezed: bool = False) -> noisy_digits.Task:
    """Images for training and test; ``squeezed``: in [0.25, 0.75], where no box is in the way."""
    if small.dataset == "digits":
        parts = noisy_digits.load_task(
            noise=0.0, train_size=small.train_size, test_size=small.test_size
        )
    else:
        sizes = {"train": small.train_size, "test": small.test_size}
        parts = noisy_digits.Task(*(_first(small, split, n) for split, n in sizes.items()))
    if not squeezed:
        return parts
    return noisy_digits.Task(*({**part, "image": 0.25 + part["image"] / 2} for part in parts))


def fit(
    small: Small,
    method: str,
    eps: Any,
    weight: Any = None,
    seeds: Any = None,
    *,
    squeezed: bool = False,
    epochs: int | None = None,
) -> Any:
    """Parameters at the evaluations of each run, ``(runs, t, ...)``; trained once.

    Args:
      small: the size of the studies.
      method: a name of ``METHODS``.
      eps: radius of training; a number, or one for each run, as a tuple.
      weight: of the penalty, likewise; by default that of the method.
      seeds: likewise; by default all of them.
      squeezed: see ``task``.
      epochs: in place of those of ``small``.
    """
    return _fit(small, method, *_runs(small, method, eps, weight, seeds), squeezed, epochs)


def train(
    small: Small,
    method: str,
    eps: Any,
    weight: Any = None,
    seeds: Any = None,
    *,
    squeezed: bool = False,
    epochs: int | None = None,
) -> Runs:
    """What is measured on the networks that ``fit`` trains, at the radius of training."""
    runs = _runs(small, method, eps, weight, seeds)
    return _measured(small, method, *runs, squeezed, epochs)


def last_over_eps(
    small: Small, method: str, eps: float, at: tuple[float, ...], *, squeezed: bool = False
) -> Runs:
    """The last networks measured at other radii ``at``, which take the place of the evaluations."""
    params = fit(small, method, eps, squeezed=squeezed)
    last = small.evaluations - 1
    return _stack(
        [_measure(small, jax.tree.map(lambda p, i=i: p[i], params), last, i, at, squeezed)
         for i in range(small.seeds)]
    )  # fmt: skip


def _runs(small: Small, method: str, eps: Any, weight: Any, seeds: Any) -> tuple[Any, ...]:
    """Radius, weight and seed of each run, as tuples."""
    chosen = METHODS[method]
    if not chosen.penalty:
        weight = 0.0
    elif weight is None:
        weight = small.weight if chosen.weight is None else chosen.weight
    values = np.broadcast_arrays(eps, weight, range(small.seeds) if seeds is None else seeds)
    return tuple(tuple(np.atleast_1d(value).tolist()) for value in values)


@functools.lru_cache
def _fit(small, method, eps, weight, seeds, squeezed, epochs):
    chosen = METHODS[method]
    epochs = chosen.longer * (small.epochs if epochs is None else epochs)
    recipe = Recipe(chosen.steps, chosen.corner, chosen.penalty, chosen.replays, small.filters,
                    epochs, small.evaluations, SETTINGS[small.dataset])  # fmt: skip
    knobs = Knobs(np.asarray(seeds, np.int32),
                  *(np.asarray(v, np.float32) for v in (eps, weight, chosen.step, chosen.start))
                  )  # fmt: skip
    return side_by_side.run(_train, recipe, knobs, task(small, squeezed).train)


@functools.lru_cache
def _measured(small, method, eps, weight, seeds, squeezed, epochs):
    params = _fit(small, method, eps, weight, seeds, squeezed, epochs)
    every = np.arange(small.evaluations)
    return _stack(
        [_measure(small, jax.tree.map(lambda p, i=i: p[i], params), every, seeds[i], eps[i],
                  squeezed) for i in range(len(seeds))]
    )  # fmt: skip


def _measure(small, params, evaluation, seed, eps, squeezed):
    knobs = Judged(np.asarray(evaluation, np.int32), np.asarray(seed, np.int32),
                   np.asarray(eps, np.float32))  # fmt: skip
    shared = (task(small, squeezed), params)
    return Runs(*side_by_side.run(_evaluate, small.filters, knobs, shared))


def _stack(parts: list[Runs]) -> Runs:
    return jax.tree.map(lambda *values: np.stack(values), *parts)


def _train(recipe: Recipe, knobs: Knobs, train_set: dict[str, Array]) -> Any:
    """One run: its parameters at the evaluations."""
    n = train_set["label"].shape[0]
    threat = threat_model(knobs.eps)
    setting = recipe.setting
    batch = setting.batch_size
    total = recipe.epochs * data.steps_per_epoch(n, batch)
    oracle = gradients.plain()
    if recipe.replays:
        objective = objectives.standard()
        oracle = gradients.free(
            threat, (batch, *train_set["image"].shape[1:]), replays=recipe.replays
        )
    else:
        attack = training_attack(threat, recipe.steps, knobs.step, knobs.start, recipe.corner)
        objective = objectives.madry(attack)
    if recipe.penalty:
        penalty = PENALTIES[recipe.penalty](threat.eps)
        objective = objectives.penalized(objective, penalty, weight=knobs.weight)
    rate = choices.make_schedule(
        "cyclic", learning_rate=setting.learning_rate, epochs=recipe.epochs,
        steps_per_epoch=total // recipe.epochs, milestones=(), decay=1.0,
    )  # fmt: skip
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(rate))
    model = network(recipe.filters)
    replays = max(1, recipe.replays)
    step = training.train_step(
        model.apply, objective, optimizer, oracle=oracle, replays=replays,
        augment=choices.make_augmentation(setting.augmentation),
    )  # fmt: skip
    init_key, run_key, order_key, _ = _keys(knobs.seed)
    params, model_state = model.init(init_key, train_set["image"][:1])
    state = training.create_state(params, model_state, optimizer, run_key, oracle=oracle)
    orders = jax.lax.map(lambda epoch: data.epoch_batches(order_key, epoch, n, batch),
                         jnp.arange(math.ceil(recipe.epochs / replays)))  # fmt: skip
    rows = jnp.repeat(orders.reshape(-1, batch), replays, axis=0)[:total]

    def period(state, rows):
        steps = training.several_resident_steps(step, side_by_side.take)
        state, _ = steps(state, train_set, rows)
        return state, state.params

    return jax.lax.scan(period, state, rows.reshape(recipe.evaluations, -1, batch))[1]


def _evaluate(filters: int, knobs: Judged, shared: Any) -> tuple[Array, ...]:
    """What ``Runs`` holds of one network."""
    (train_set, test_set), params = shared
    params = jax.tree.map(lambda p: p[knobs.evaluation], params)
    threat = threat_model(knobs.eps)
    key = _keys(knobs.seed)[3]
    logits_fn = models.eval_logits(network(filters).apply, params, {})
    x, y = test_set["image"], test_set["label"]
    seen, seen_label = train_set["image"][:256], train_set["label"][:256]
    size = threat.eps / 4
    attacked = {
        "fgsm": attacks.fgsm(threat)(logits_fn, key, x, y),
        "pgd": attacks.pgd(threat, steps=EVALUATION_STEPS, step_size=size)(logits_fn, key, x, y),
    }
    logits = {"clean": logits_fn(x), **{name: logits_fn(z) for name, z in attacked.items()}}
    short = attacks.pgd(threat, steps=10, step_size=size)(logits_fn, key, seen, seen_label)
    noise = jax.random.uniform(key, x.shape, minval=-1, maxval=1) * threat.eps
    outgoing = params["head"]["kernel"].reshape(-1, filters, params["head"]["kernel"].shape[1])
    return (
        *(metrics.correct(z, y).mean() for z in logits.values()),
        metrics.correct(logits_fn(short), seen_label).mean(),
        *(losses.cross_entropy(logits[name], y).mean() for name in attacked),
        metrics.gradient_alignment(logits_fn, x, y, noise).mean(),
        metrics.cosine(attacked["fgsm"] - x, attacked["pgd"] - x).mean(),
        jnp.sqrt(jnp.sum(params["conv"]["kernel"] ** 2, axis=(0, 1, 2))),
        jnp.sqrt(jnp.sum(outgoing**2, axis=(0, 2))),
    )


def _keys(seed: Any) -> Array:
    """Keys of initialisation, training, order and evaluation."""
    return jax.random.split(jax.random.key(seed), 4)
