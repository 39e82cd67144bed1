"""Small networks, trained with SGD, with momentum, with Adam and with RMSProp.

Besides the digits there are *band-limited* ones: twice as large, their cosine coefficients padded
with zeros. Three quarters of their frequencies are irrelevant: no image, of the training or of the
test set, has energy there. Perceptrons that several studies need are trained once and kept.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from experiments import choices, noisy_digits, side_by_side
from robustjax import data, dct, models, objectives, training

# Height of the images: the digits as they are, and band-limited.
TASKS: Mapping[str, int] = {"digits": 8, "band-limited": 16}
MODEL = models.from_linen(models.MLP((128, 128), num_classes=10))
# First learning rates. With momentum m a step is 1 / (1 - m) times as long in the end.
RATES: Mapping[str, float] = {"SGD": 0.3, "Adam": 1e-3, "RMSProp": 1e-3, "SGD-m": 0.03}
OPTIMIZERS = ("SGD", "Adam", "RMSProp")
# What they are called elsewhere, and their momentum.
NAMES: Mapping[str, tuple[str, float]] = {
    "SGD": ("sgd", 0.0), "Adam": ("adam", 0.0), "RMSProp": ("rmsprop", 0.0), "SGD-m": ("sgd", 0.9),
}  # fmt: skip


class Small(NamedTuple):
    """The size of the studies.

    Attributes:
      seeds: networks of each kind.
      epochs: of training.
      train_size, test_size: examples.
      draws: noise images of each band.
    """

    seeds: int
    epochs: int
    train_size: int
    test_size: int
    draws: int


class Recipe(NamedTuple):
    """What is the same in all runs of one program.

    Attributes:
      optimizer: of ``NAMES``.
      rate: the first learning rate; a tenth of it from half of the steps on, and a hundredth from
        three quarters.
      shape: of an example.
      epochs, batch_size: of training.
      model: that is trained.
    """

    optimizer: str
    rate: float
    shape: tuple[int, ...]
    epochs: int
    batch_size: int = 64
    model: models.Model = MODEL


class Knobs(NamedTuple):
    """What may differ from run to run: numbers or arrays ``(runs,)``.

    Attributes:
      seed: of everything random.
      version: which version of the training images is trained on.
    """

    seed: Any
    version: Any


class Place(NamedTuple):
    """One of the networks that are evaluated: numbers or arrays ``(runs,)``.

    Attributes:
      network: its place among all of them.
    """

    network: Any


@functools.lru_cache
def load_task(small: Small, task: str) -> noisy_digits.Task:
    """Digits with the right labels, of the height that the task has."""
    found = noisy_digits.load_task(
        noise=0.0, train_size=small.train_size, test_size=small.test_size
    )
    height = TASKS[task]
    if height == 8:
        return found
    return noisy_digits.Task(
        *({**part, "image": dct.dct_resize(part["image"], height, height)} for part in found)
    )


def make_optimizer(name: str, schedule: optax.Schedule) -> optax.GradientTransformation:
    """An optimizer by the name in the tables, with the defaults of PyTorch."""
    known, momentum = NAMES[name]
    return choices.make_optimizer(
        known,
        schedule,
        momentum=momentum,
        weight_decay=0.0,
        max_norm=1.0,  # of no use to these
    )


def initial(small: Small, task: str) -> Any:
    """The parameters at the start, of all seeds."""
    return jax.tree.map(np.asarray, _init(TASKS[task], np.arange(small.seeds)))


@functools.partial(jax.jit, static_argnums=0)
def _init(height: int, seeds: Array) -> Any:
    return jax.vmap(lambda seed: _start(MODEL, (height, height, 1), seed)[0])(seeds)


def _start(model: models.Model, shape: tuple[int, ...], seed: Any) -> tuple[Any, Any]:
    init_key = jax.random.split(jax.random.key(seed), 3)[0]
    return model.init(init_key, jnp.zeros((1, *shape)))


@functools.lru_cache
def train(small: Small, task: str, optimizer: str, rate: float | None = None) -> Any:
    """Parameters of perceptrons of all seeds, ``(seeds, ...)`` each; the rate is of ``RATES``."""
    images = load_task(small, task).train["image"]
    return train_on(small, task, optimizer, images[None], rate)


def train_on(
    small: Small, task: str, optimizer: str, images: Array, rate: float | None = None
) -> Any:
    """The same on each version ``images[i]`` of the training images: ``(versions seeds, ...)``."""
    rate = RATES[optimizer] if rate is None else rate
    recipe = Recipe(optimizer, rate, images.shape[2:], small.epochs)
    return fit(recipe, small.seeds, images, load_task(small, task).train["label"])[0]


def fit(recipe: Recipe, seeds: int, images: Array, label: Array) -> tuple[Any, Any]:
    """Parameters and states of networks, trained on each version ``images[i]`` from each seed."""
    numbers = np.arange(seeds, dtype=np.int32)
    versions = np.arange(len(images), dtype=np.int32)
    knobs = Knobs(np.tile(numbers, len(versions)), np.repeat(versions, seeds))
    return side_by_side.run(_run, recipe, knobs, (images, label))


def _run(recipe: Recipe, knobs: Knobs, shared: tuple[Array, Array]) -> tuple[Any, Any]:
    images, label = shared
    train_set = {"image": images[knobs.version], "label": label}
    steps = recipe.epochs * data.steps_per_epoch(len(label), recipe.batch_size)
    _, run_key, order_key = jax.random.split(jax.random.key(knobs.seed), 3)
    params, model_state = _start(recipe.model, recipe.shape, knobs.seed)
    schedule = optax.piecewise_constant_schedule(
        recipe.rate, {steps // 2: 0.1, 3 * steps // 4: 0.1}
    )
    optimizer = make_optimizer(recipe.optimizer, schedule)
    step = training.train_step(recipe.model.apply, objectives.standard(), optimizer)
    state = training.create_state(params, model_state, optimizer, run_key)

    def one_epoch(state, epoch):
        order = data.epoch_batches(order_key, epoch, len(label), recipe.batch_size)
        run = training.several_resident_steps(step, side_by_side.take)
        return run(state, train_set, order)[0], None

    state = jax.lax.scan(one_epoch, state, jnp.arange(recipe.epochs))[0]
    return state.params, state.model_state


def logits_fn(params: Any) -> models.LogitsFn:
    """One perceptron in evaluation mode."""
    return models.eval_logits(MODEL.apply, params, {})


def evaluate(
    small: Small,
    task: str,
    fn: Callable[[models.LogitsFn, Key[Array, ""], Any], tuple[Array, ...]],
    params: Any,
    *shared: Any,
) -> tuple[np.ndarray, ...]:
    """Numbers of every perceptron, ``(networks, ...)`` each.

    Args:
      small: the size.
      task: of ``TASKS``.
      fn: ``fn(logits_fn, key, (test set, *shared))``, a function of a module, so that its program
        is found again; the key is the same for all networks.
      params: of the networks, ``(networks, ...)``.
      *shared: arrays that ``fn`` needs.
    """
    return measure(MODEL, fn, (params, {}), load_task(small, task).test, *shared)


def measure(
    model: models.Model, fn: Callable, variables: tuple[Any, Any], *shared: Any
) -> tuple[np.ndarray, ...]:
    """The same for networks of any model, with ``variables`` as ``fit`` returns them."""
    networks = np.arange(len(jax.tree.leaves(variables)[0]), dtype=np.int32)
    return side_by_side.run(_measure, (model, fn), Place(networks), (variables, *shared))


def _measure(recipe: tuple, place: Place, arrays: tuple) -> tuple[Array, ...]:
    model, fn = recipe
    variables = jax.tree.map(lambda leaf: leaf[place.network], arrays[0])
    return fn(models.eval_logits(model.apply, *variables), jax.random.key(1), arrays[1:])
