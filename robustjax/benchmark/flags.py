"""Signs that an evaluation cannot be trusted, or that a model is not admitted to the benchmark.

RobustBench admits classifiers that have non-zero gradients in general, a deterministic forward
pass and no optimisation loop in it. What can be seen of that from outside is looked at here, once,
on a few examples. A sign is reported as a ``Flag`` and stops nothing.

Sources: Croce et al. (2021), "RobustBench: a standardized adversarial robustness benchmark",
sections 3 and 4.1; the numerical thresholds are those of the reference implementation of Croce &
Hein (2020).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array

from robustjax import keys
from robustjax.attacks.stepwise import as_partial
from robustjax.losses import dlr, margin

UNRELIABLE_DROP = 0.002
RUNS = 5


class Flag(NamedTuple):
    """A warning of an evaluation.

    Attributes:
      name: ``unreliable``, ``randomized``, ``probabilities``, ``zero_gradient``, ``dynamic``,
        ``classes``, ``not_a_number`` or ``not_reproduced``.
      message: what was seen, with its figure, and what to do.
    """

    name: str
    message: str


def unreliable(name: str, before: float, after: float) -> list[Flag]:
    """A gradient-free attack broke more than 0.2 points of what white-box attacks had left.

    Args:
      name: the gradient-free attack.
      before: least robust accuracy after the white-box attacks, in [0, 1].
      after: robust accuracy after the gradient-free attack.
    """
    # The rounding of the difference must not decide whether 0.2 points are more than 0.2 points.
    if before - after <= UNRELIABLE_DROP + 1e-9:
        return []
    return [
        Flag(
            "unreliable",
            f"{name} lowered robust accuracy from {before:.2%} to {after:.2%}: white-box attacks "
            "seem to fail on this model; more queries, restarts or an adaptive attack are needed",
        )
    ]


def class_count(num_classes: int, targets: int) -> list[Flag]:
    """Fewer classes than the losses and the targeted attacks are made for."""
    if num_classes <= 3:
        loss = "the DLR loss needs 3 classes and" if num_classes < 3 else ""
        return [
            Flag(
                "classes",
                f"{loss} the targeted DLR loss needs 4 classes, the model has {num_classes}: "
                "attacks that use them are left out".strip(),
            )
        ]
    if targets > num_classes - 1:
        return [
            Flag(
                "classes",
                f"targeted attacks aim at {num_classes - 1} instead of {targets} wrong classes: "
                f"the model has {num_classes} classes",
            )
        ]
    return []


def of_model(
    logits_fn: Callable[..., Array], x: Array, y: Array, key: Array, *, randomized: bool = False
) -> list[Flag]:
    """All flags that a few examples show, before any attack.

    Args:
      logits_fn: ``logits_fn(x)``, or ``logits_fn(x, keys)`` if ``randomized``.
      x: inputs ``(n, ...)``.
      y: labels ``(n,)``.
      key: one key, for the draws of a randomised model.
      randomized: the model takes keys.
    """
    own_keys = keys.as_per_example(key, len(x))
    model = as_partial(logits_fn)
    with jax.default_matmul_precision("highest"):
        runs = [_logits(model, x, own_keys, run, randomized=randomized) for run in range(RUNS)]
        runs = np.stack([np.asarray(logits) for logits in runs])
        gradient = _gradient(model, x, y, own_keys, randomized=randomized)
    looks = (
        not_a_number(runs[0]),
        randomness(runs, np.asarray(y)),
        probabilities(runs[0]),
        zero_gradients(np.asarray(gradient)),
        dynamics(lambda z: _logits(model, z, own_keys, 0, randomized=randomized), x),
    )
    return [flag for flags in looks for flag in flags]


@functools.partial(jax.jit, static_argnames="randomized")
def _logits(
    model: Callable[..., Array], x: Array, own_keys: Array, run: Any, *, randomized: bool
) -> Array:
    return model(x, keys.fold_in(own_keys, run)) if randomized else model(x)


@functools.partial(jax.jit, static_argnames="randomized")
def _gradient(
    model: Callable[..., Array], x: Array, y: Array, own_keys: Array, *, randomized: bool
) -> Array:
    def total(z: Array) -> Array:
        logits = _logits(model, z, own_keys, 0, randomized=randomized)
        return (dlr if logits.shape[-1] >= 3 else margin)(logits, y).sum()

    return jax.grad(total)(x)


def randomness(runs: np.ndarray, y: np.ndarray) -> list[Flag]:
    """Outputs ``(runs, n, K)`` for the same inputs differ from run to run."""
    right = (runs.argmax(axis=-1) == y).sum(axis=-1)
    length = np.linalg.norm(runs, axis=-1, keepdims=True)
    unit = runs / np.maximum(length, np.finfo(np.float32).tiny)
    distance = float(np.linalg.norm(unit - unit[:1], axis=-1).max())
    if (right == right[0]).all() and not distance > 1e-4:
        return []
    return [
        Flag(
            "randomized",
            f"{len(runs)} runs on the same {len(y)} examples got {right.min()} to {right.max()} "
            f"right, and their normalised outputs differ by up to {distance:.2g}: the forward pass "
            "is random; use version 'rand'",
        )
    ]


def probabilities(logits: np.ndarray) -> list[Flag]:
    """Outputs ``(n, K)`` lie in [0, 1] and sum to one."""
    inside = (logits >= -1e-5).all() and (logits <= 1 + 1e-5).all()
    if not (inside and (np.abs(logits.sum(axis=-1) - 1) <= 1e-5).all()):
        return []
    return [
        Flag(
            "probabilities",
            "the model seems to return probabilities: losses on logits have vanishing gradients "
            "there; return the logits",
        )
    ]


def zero_gradients(gradient: np.ndarray) -> list[Flag]:
    """The input gradient ``(n, ...)`` of an example is exactly zero everywhere."""
    zero = int((np.abs(gradient).reshape(len(gradient), -1).sum(axis=1) == 0).sum())
    if not zero:
        return []
    return [
        Flag(
            "zero_gradient",
            f"the input gradient is exactly zero for {zero} of {len(gradient)} examples: "
            "gradient attacks cannot move them; replace what has no derivative",
        )
    ]


def not_a_number(logits: np.ndarray) -> list[Flag]:
    """Outputs ``(n, K)`` that are not finite; they count as misclassified."""
    bad = int((~np.isfinite(logits)).any(axis=-1).sum())
    if not bad:
        return []
    return [Flag("not_a_number", f"the logits of {bad} of {len(logits)} examples are not finite")]


def dynamics(logits_fn: Callable[[Array], Array], x: Array) -> list[Flag]:
    """The forward pass holds a loop of unknown length, as an optimisation at test time would.

    A heuristic: the program is searched for a ``while`` primitive. A loop of fixed length, such as
    ``jax.lax.scan`` over layers, is not counted.
    """
    loops = sum(name == "while" for name in _primitives(jax.make_jaxpr(logits_fn)(x).jaxpr))
    if not loops:
        return []
    return [
        Flag(
            "dynamic",
            f"the forward pass holds {loops} loop(s) of unknown length: if they optimise something "
            "at test time, attacks must be adapted to them",
        )
    ]


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from _primitives(inner)
