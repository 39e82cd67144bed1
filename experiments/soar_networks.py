"""Small networks of SOAR, FOAR and what they are compared with, trained on digits.

A perceptron, trained as usual and then fine-tuned by each method: SOAR needs the small learning
rate and the start. Networks that several studies need are trained once and kept.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from experiments import choices, noisy_digits, side_by_side
from robustjax import attacks, data, models, objectives, training
from robustjax.threat import ThreatModel

PERCEPTRON = models.MLP((128, 128), num_classes=10)
# Name to objective or penalty, and to the evaluation point where there is one.
METHODS: Mapping[str, tuple[str, str]] = {
    "standard": ("standard", ""),
    "PGD-10": ("madry", ""),
    "TRADES": ("trades", ""),
    "MART": ("mart", ""),
    "FOAR, zero": ("foar", "zero"),
    "FOAR, random": ("foar", "random"),
    "FOAR, PGD-1": ("foar", "pgd1"),
    "SOAR, zero": ("soar", "zero"),
    "SOAR, random": ("soar", "random"),
    "SOAR, PGD-1": ("soar", "pgd1"),
}
RATE, TUNING_RATE = 0.05, 0.004


class Small(NamedTuple):
    """The size of the studies.

    Attributes:
      seeds: networks of each kind.
      epochs: of standard training, and of what follows.
      eps: radius of the threat model, l_inf.
      train_size, test_size: examples.
    """

    seeds: int
    epochs: int
    eps: float
    train_size: int
    test_size: int


class Networks(NamedTuple):
    """Networks of one architecture; the first axis of every leaf is the network."""

    params: Any
    model_state: Any

    def logits_fn(self, module: nn.Module, place: Any) -> models.LogitsFn:
        """One of them, in evaluation mode."""
        params, model_state = jax.tree.map(lambda leaf: leaf[place], self)
        return models.eval_logits(model_of(module).apply, params, model_state)


class Recipe(NamedTuple):
    """What is the same in all runs of one program.

    Attributes:
      module: the network.
      method: of ``METHODS``.
      norm: of the threat model.
      epochs, batch_size: of training.
    """

    module: nn.Module
    method: str
    norm: str
    epochs: int
    batch_size: int = 64


class Knobs(NamedTuple):
    """What may differ from run to run: numbers or arrays ``(runs,)``.

    Attributes:
      seed: of everything random, and the place of the network to begin with.
      stage: 0 for standard training, 1 for the networks attacked in place of others, 2 for tuning;
        each has random numbers of its own.
      rate: learning rate, that falls by 10 half-way.
      eps: radius of the threat model.
    """

    seed: Any
    stage: Any
    rate: Any
    eps: Any


@functools.lru_cache
def model_of(module: nn.Module) -> models.Model:
    """The module's functions, the same at every call: what is compiled for them is found again."""
    return models.from_linen(module)


@functools.lru_cache
def load_task(small: Small) -> noisy_digits.Task:
    """Digits with the right labels."""
    return noisy_digits.load_task(noise=0.0, train_size=small.train_size, test_size=small.test_size)


def threat_of(eps: Any, norm: str = "linf") -> ThreatModel:
    """A ball in the box [0, 1]."""
    return ThreatModel(choices.NORMS[norm], eps)


def l2_radius(small: Small) -> float:
    """Of the l_2 ball around the l_inf ball: ``eps sqrt(64)``."""
    return small.eps * 8


def initial(small: Small, module: nn.Module, stage: int) -> Networks:
    """Networks as they are initialised, of all seeds."""
    seeds = np.arange(small.seeds)
    return jax.tree.map(np.asarray, _init(module, seeds, np.full_like(seeds, stage)))


@functools.partial(jax.jit, static_argnums=0)
def _init(module: nn.Module, seeds: Array, stages: Array) -> Networks:
    def one(seed, stage):
        init_key = jax.random.split(_key(seed, stage), 3)[0]
        return Networks(*model_of(module).init(init_key, jnp.zeros((1, 8, 8, 1))))

    return jax.vmap(one)(seeds, stages)


def standard(small: Small, module: nn.Module = PERCEPTRON, *, source: bool = False) -> Networks:
    """Standard networks of all seeds, or others to make adversarial examples on."""
    return _trained(small, module, "standard", RATE, "linf", False, int(source))


def train(
    small: Small,
    method: str,
    module: nn.Module = PERCEPTRON,
    *,
    rate: float = TUNING_RATE,
    norm: str = "linf",
    warm: bool = True,
) -> Networks:
    """Networks of one method over all seeds.

    Args:
      small: the size.
      method: of ``METHODS``.
      module: the network.
      rate: first learning rate of the fine-tuning.
      norm: of the threat model; an l_2 ball has the radius ``l2_radius``.
      warm: begin with the standard networks, as SOAR does; otherwise from initial parameters.
    """
    if method == "standard":
        return standard(small, module)
    return _trained(small, module, method, rate, norm, warm, 2)


def _key(seed: Any, stage: Any) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), stage)


@functools.lru_cache
def _trained(
    small: Small, module: nn.Module, method: str, rate: float, norm: str, warm: bool, stage: int
) -> Networks:
    start = standard(small, module) if warm else initial(small, module, stage)
    seeds = np.arange(small.seeds, dtype=np.int32)
    eps = small.eps if norm == "linf" else l2_radius(small)
    knobs = Knobs(seeds, np.int32(stage), np.float32(rate), np.float32(eps))
    recipe = Recipe(module, method, norm, small.epochs)
    shared = (load_task(small).train, start)
    return Networks(*side_by_side.run(_run, recipe, knobs, shared))


def _run(recipe: Recipe, knobs: Knobs, shared: tuple[Any, Networks]) -> tuple[Any, Any]:
    train_set, starts = shared
    model = model_of(recipe.module)
    n = train_set["label"].shape[0]
    steps = recipe.epochs * data.steps_per_epoch(n, recipe.batch_size)
    _, run_key, order_key = jax.random.split(_key(knobs.seed, knobs.stage), 3)
    params, model_state = jax.tree.map(lambda leaf: leaf[knobs.seed], starts)
    schedule = optax.piecewise_constant_schedule(1.0, {steps // 2: 0.1})
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.add_decayed_weights(2e-4),
        optax.sgd(lambda step: knobs.rate * schedule(step), momentum=0.9),
    )
    threat = threat_of(knobs.eps, recipe.norm)
    step = training.train_step(model.apply, _objective(recipe.method, threat), optimizer)
    state = training.create_state(params, model_state, optimizer, run_key)

    def one_epoch(state, epoch):
        order = data.epoch_batches(order_key, epoch, n, recipe.batch_size)
        return training.several_resident_steps(step, side_by_side.take)(state, train_set, order)[
            0
        ], None

    state = jax.lax.scan(one_epoch, state, jnp.arange(recipe.epochs))[0]
    return state.params, state.model_state


def _objective(method: str, threat: ThreatModel) -> objectives.Objective:
    kind, start = METHODS[method]
    size = threat.eps / 4
    if kind == "standard":
        return objectives.standard()
    if kind == "trades":
        return objectives.trades(objectives.trades_attack(threat, steps=10, step_size=size))
    if kind in ("madry", "mart"):
        make = {"madry": objectives.madry, "mart": objectives.mart}[kind]
        return make(attacks.pgd(threat, steps=10, step_size=size))
    attack, radius = objectives.evaluation_point(threat, start)
    penalty = {"foar": objectives.first_order, "soar": objectives.soar}[kind](radius)
    return objectives.penalized(objectives.madry(attack), penalty, at="adversarial")


class Place(NamedTuple):
    """One of the networks that are evaluated: numbers or arrays ``(runs,)``.

    Attributes:
      network: its place among all of them.
      seed: its seed, the place of what belongs to it.
      eps: radius.
    """

    network: Any
    seed: Any
    eps: Any

    @property
    def key(self) -> Key[Array, ""]:
        """For attacks: the same for all methods."""
        return _key(self.seed, 3)


def evaluate(
    small: Small,
    fn: Callable[[nn.Module, Place, Any], tuple[Array, ...]],
    networks: Mapping[str, Networks],
    eps: float,
    *shared: Networks,
    module: nn.Module = PERCEPTRON,
    seeds: int | None = None,
) -> dict[str, tuple[np.ndarray, ...]]:
    """Numbers of every network, ``(seeds, ...)`` each, by the names of the networks.

    Args:
      small: the size.
      fn: ``fn(module, place, (test set, networks, *shared))``; one program for all networks.
      networks: of the same architecture.
      eps: radius.
      *shared: other networks that ``fn`` needs, of each seed.
      module: the architecture.
      seeds: how many of the seeds; all by default.
    """
    seeds = small.seeds if seeds is None else seeds
    seed = np.tile(np.arange(seeds, dtype=np.int32), len(networks))
    first = small.seeds * np.repeat(np.arange(len(networks), dtype=np.int32), seeds)
    place = Place(first + seed, seed, np.float32(eps))
    everything = jax.tree.map(lambda *leaves: np.concatenate(leaves), *networks.values())
    arrays = (load_task(small).test, everything, *shared)
    found = side_by_side.run(fn, module, place, arrays)
    return {
        name: tuple(values.reshape(len(networks), seeds, *values.shape[1:])[i] for values in found)
        for i, name in enumerate(networks)
    }
