"""Attacks that go in steps and know which examples they are done with.

An iterative attack is written once, as three functions of a per-example state. ``StepwiseAttack``
runs them in one compiled loop, like any attack; ``robustjax.benchmark.ChunkedAttack`` runs the same
functions a few steps at a time and drops the examples that are done in between, so that an example
which is broken early costs nothing more. An example's result is the same either way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from robustjax import checks, keys

LogitsFn = Callable[..., Array]


class StepState(Protocol):
    """What every state has; all leaves are arrays with the examples on the first axis."""

    @property
    def x_adv(self) -> Float[Array, "n ..."]:
        """The adversarial example if one was found, else the attack's best attempt; feasible."""

    @property
    def done(self) -> Bool[Array, " n"]:
        """Examples on which the attack does nothing more. Their state is frozen."""


@dataclasses.dataclass(frozen=True)
class StepwiseAttack:
    """An attack of ``rounds`` (restarts, targets) of ``steps`` each.

    Called as ``attack(logits_fn, key, x, y)`` it is an attack like any other and returns ``x_adv``,
    or ``(x_adv, state)`` with ``has_aux``. It stops when every example is done.

    In the three functions, ``keys`` are one key per example, those of round ``r`` being
    ``fold_in(key, r)`` of the example's own; ``r`` and ``t`` are traced integers.

    Attributes:
      init: ``init(logits_fn, keys, x, y) -> state`` before all rounds, with the examples' own keys.
      begin: ``begin(logits_fn, r, keys, state, x, y) -> state`` starts round ``r = 0, 1, ...``.
      step: ``step(logits_fn, t, keys, state, x, y) -> state``, step ``t = 0 .. steps-1`` of it.
      steps: steps in a round.
      rounds: rounds.
      check: ``check(x)`` raises ``ValueError`` if the inputs do not suit the attack; shapes and,
        where they are known, values.
      has_aux: return the final state as well.
    """

    init: Callable[..., Any]
    begin: Callable[..., Any]
    step: Callable[..., Any]
    steps: int
    rounds: int = 1
    check: Callable[[ArrayLike], None] = lambda x: None
    has_aux: bool = False

    def __call__(
        self, logits_fn: LogitsFn, key: Array, x: ArrayLike, y: ArrayLike
    ) -> Array | tuple[Array, Any]:
        """Runs all rounds on the batch ``x (n, ...)`` with labels ``y``; one key or ``(n,)``."""
        checks.function("logits_fn", logits_fn)
        checks.batch(x, y)
        self.check(x)
        x, y = jax.lax.stop_gradient((jnp.asarray(x), jnp.asarray(y)))
        example_keys = keys.as_per_example(key, x.shape[0])
        state = self.init(logits_fn, example_keys, x, y)

        def one_round(r: Array, state: Any) -> Any:
            state = self.start(logits_fn, r, example_keys, state, x, y)
            return self.advance(logits_fn, r, 0, self.steps, example_keys, state, x, y)

        state = jax.lax.fori_loop(0, self.rounds, one_round, state)
        state = jax.lax.stop_gradient(state)
        return (state.x_adv, state) if self.has_aux else state.x_adv

    def start(
        self,
        logits_fn: LogitsFn,
        r: int | Int[Array, ""],
        example_keys: Key[Array, " n"],
        state: Any,
        x: Float[Array, "n ..."],
        y: Array,
    ) -> Any:
        """Begins round ``r`` for the examples that are not done."""
        round_keys = keys.fold_in(example_keys, r)
        return _unless_done(state, self.begin(logits_fn, r, round_keys, state, x, y))

    def advance(
        self,
        logits_fn: LogitsFn,
        r: int | Int[Array, ""],
        first: int | Int[Array, ""],
        last: int | Int[Array, ""],
        example_keys: Key[Array, " n"],
        state: Any,
        x: Float[Array, "n ..."],
        y: Array,
    ) -> Any:
        """Steps ``first .. last-1`` of round ``r``, fewer if every example is done before.

        ``r``, ``first`` and ``last`` may be traced: chunks of any length are one program.
        """
        round_keys = keys.fold_in(example_keys, r)

        def goes_on(carry: tuple[Array, Any]) -> Array:
            t, state = carry
            return (t < last) & ~jnp.all(state.done)

        def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            t, state = carry
            new = self.step(logits_fn, t, round_keys, state, x, y)
            return t + 1, _unless_done(state, new)

        return jax.lax.while_loop(goes_on, body, (jnp.asarray(first, jnp.int32), state))[1]


def select(wins: Bool[Array, " n"], new: Any, old: Any) -> Any:
    """The leaves of ``new`` for the examples in ``wins``, those of ``old`` for the others."""
    return jax.tree.map(lambda a, b: jnp.where(rows(wins, a), a, b), new, old)


def rows(per_example: Array, like: Array) -> Array:
    """``(n,)`` shaped to broadcast against ``(n, ...)``; a scalar stays as it is."""
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - 1) * per_example.ndim)


def as_partial(logits_fn: Callable) -> jax.tree_util.Partial:
    """A function as a pytree; the arguments of a ``jax.tree_util.Partial`` are its leaves.

    Parameters that are leaves are arguments of the compiled programs, which then serve every
    checkpoint of a model. ``robustjax.models.eval_logits`` makes such functions.
    """
    checks.function("logits_fn", logits_fn)
    partial = isinstance(logits_fn, jax.tree_util.Partial)
    return logits_fn if partial else jax.tree_util.Partial(logits_fn)


def _unless_done(old: Any, new: Any) -> Any:
    return select(old.done, old, new)
