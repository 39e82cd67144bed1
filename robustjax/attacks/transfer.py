"""Transfer: adversarial examples made on one model and tried on others, and substitute models.

The attacker of a transfer attack does not see the target. It attacks a source, such as a model of
its own trained on the same data, or a substitute trained on labels that the target gives away.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from robustjax import checks, keys
from robustjax.attacks.gradient import Attack
from robustjax.attacks.stepwise import as_partial
from robustjax.metrics.accuracy import correct
from robustjax.norms import LInf

LogitsFn = Callable[[Array], Array]


class TransferMatrix(NamedTuple):
    """Accuracies of every target on the adversarial examples of every source.

    Attributes:
      sources: names of the sources, the rows.
      targets: names of the targets, the columns.
      clean: accuracy of each target without attack, ``(targets,)``.
      robust: accuracy of target j on the examples made on source i, ``(sources, targets)``.
      clean_correct: per example, ``(targets, n)``.
      robust_correct: per example, ``(sources, targets, n)``.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    clean: Float[np.ndarray, " targets"]
    robust: Float[np.ndarray, "sources targets"]
    clean_correct: Bool[np.ndarray, "targets n"]
    robust_correct: Bool[np.ndarray, "sources targets n"]


def transfer_matrix(
    sources: Mapping[str, LogitsFn],
    targets: Mapping[str, LogitsFn],
    attack: Attack,
    key: Array,
    x: Float[ArrayLike, "n ..."],
    y: Int[ArrayLike, " n"],
    *,
    batch_size: int = 1000,
) -> TransferMatrix:
    """Attacks each source once and tests all targets on the result.

    Where a source is its own target the entry is its white-box accuracy under the attack. Each
    example's randomness comes from its place in ``x``, so the batch size does not matter and every
    source is attacked with the same random numbers. Runs with the highest matrix-product precision.

    Args:
      sources: name to ``logits_fn``. Closures made by ``robustjax.models.eval_logits`` share their
        compiled program with others of the same model.
      targets: name to ``logits_fn``.
      attack: ``attack(logits_fn, keys, x, y) -> x_adv``; it is compiled.
      key: one key.
      x: examples, in the box of the attack.
      y: labels.
      batch_size: examples at a time; the last batch is filled up, so that all have one shape.

    Raises:
      ValueError: there are no sources or targets, one of them or the attack is no function, or the
        attack returns another shape; what the attack refuses.

    Source: Papernot et al., "Practical black-box attacks against machine learning" (2017); Athalye
    et al., "Obfuscated gradients give a false sense of security" (2018): examples that transfer
    should not be stronger than those made on the target itself.
    """
    for name, models in (("sources", sources), ("targets", targets)):
        if not isinstance(models, Mapping) or not models:
            raise ValueError(f"{name} must map names to functions, got {checks.shown(models)}")
        for which, model in models.items():
            checks.function(f"{name}[{which!r}]", model)
    checks.function("attack", attack)
    keys.check_one(key)
    checks.batch(x, y)
    checks.integer("batch_size", batch_size, at_least=1)
    x, y = np.asarray(x), np.asarray(y)
    n = len(x)

    @jax.jit
    def make(source, example_keys, x, y):
        with jax.default_matmul_precision("highest"):
            x_adv = attack(source, example_keys, x, y)
        checks.same_shape("x_adv, the result of attack,", x_adv, "x", x)
        return x_adv

    @jax.jit
    def judge(target, x, y):
        with jax.default_matmul_precision("highest"):
            return correct(target(x), y)

    sources = {name: as_partial(model) for name, model in sources.items()}
    targets = {name: as_partial(model) for name, model in targets.items()}
    clean = np.zeros((len(targets), n), bool)
    robust = np.zeros((len(sources), len(targets), n), bool)
    size = min(batch_size, n)
    for first in range(0, n, size):
        count = min(size, n - first)
        # The last batch is filled up with the first example of all.
        place = np.concatenate([np.arange(first, first + count), np.zeros(size - count, np.int64)])
        batch_x, batch_y = jnp.asarray(x[place]), jnp.asarray(y[place])
        here = np.s_[first : first + count]
        for j, target in enumerate(targets.values()):
            clean[j, here] = np.asarray(judge(target, batch_x, batch_y))[:count]
        example_keys = keys.per_example(key, jnp.asarray(place, jnp.int32))
        for i, source in enumerate(sources.values()):
            x_adv = make(source, example_keys, batch_x, batch_y)
            for j, target in enumerate(targets.values()):
                robust[i, j, here] = np.asarray(judge(target, x_adv, batch_y))[:count]
    return TransferMatrix(
        tuple(sources), tuple(targets), clean.mean(axis=-1), robust.mean(axis=-1), clean, robust
    )


def transfer_accuracy(
    source: LogitsFn,
    target: LogitsFn,
    attack: Attack,
    key: Array,
    x: Float[ArrayLike, "n ..."],
    y: Int[ArrayLike, " n"],
    *,
    batch_size: int = 1000,
) -> float:
    """Accuracy of the target on examples made on the source: one entry of ``transfer_matrix``."""
    matrix = transfer_matrix(
        {"source": source}, {"target": target}, attack, key, x, y, batch_size=batch_size
    )
    return float(matrix.robust[0, 0])


def substitute_augment(
    logits_fn: LogitsFn,
    x: Float[Array, "n ..."],
    y: Int[Array, " n"],
    step: ArrayLike,
    *,
    lower: ArrayLike = 0.0,
    upper: ArrayLike = 1.0,
) -> Float[Array, "m ..."]:
    """The examples and, after them, ``x + step * sign(d z_y / d x)`` for each: twice as many.

    Jacobian-based augmentation of the set on which a substitute is trained: the new examples lie
    where the substitute's output for the label that the target gave changes most. Their own labels
    are then asked of the target, and the substitute is trained again on all.

    Args:
      logits_fn: the substitute, ``(n, ...) -> (n, K)``, each row of its own example.
      x: its training examples.
      y: their labels, as the target gave them.
      step: length of the step in each coordinate; it may be negative, as in variants that change
        its sign from time to time.
      lower: lower end of the box, ``-jnp.inf`` for none.
      upper: upper end of the box.

    Raises:
      ValueError: shapes, dtypes or labels do not fit.

    Source: Papernot et al. (2017), section 4.2, equation (4). Deviation: the new examples are
    clipped to the box.
    """
    checks.function("logits_fn", logits_fn)
    checks.batch(x, y)
    checks.number("step", step)

    def own_output(x):
        logits = logits_fn(x)
        checks.logits_and_labels(logits, y)
        return jnp.sum(jnp.take_along_axis(logits, y[:, None], axis=1))

    direction = LInf().steepest(jax.grad(own_output)(x), batch_ndim=1)
    moved = x + jnp.asarray(step, x.dtype) * direction
    moved = jnp.clip(moved, jnp.asarray(lower, x.dtype), jnp.asarray(upper, x.dtype))
    return jnp.concatenate([x, moved])
