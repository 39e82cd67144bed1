"""Attacks on a whole data set: a few steps at a time, on the examples that are still undecided.

Between chunks of steps, the examples that are done are dropped and the others packed into full
batches, so that the cost follows the number of examples that still stand. An example draws from
its index in the data set: its result does not depend on how it was packed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from robustjax import checks, keys
from robustjax.attacks.stepwise import StepwiseAttack, as_partial
from robustjax.benchmark.batches import BatchedFunction
from robustjax.threat import ThreatModel

# The first chunk; later ones are a quarter as long as what came before them. An example then makes
# at most a quarter more steps than it needs, and the 5,000 queries of Square are 28 chunks.
FIRST_CHUNK = 10


class Position(NamedTuple):
    """Where an attack stands: what a state file holds, and what a run goes on from.

    Attributes:
      round: the present round.
      step: steps of it that are done.
      state: the attack's state, numpy arrays with all examples on the first axis.
    """

    round: int
    step: int
    state: Any


class ChunkedAttack:
    """A compiled attack on data sets of any size; see the module.

    Args:
      make_attack: ``make_attack(threat) -> attack``. A ``StepwiseAttack`` runs in chunks, any other
        attack whole. It is called while tracing: eps is an argument of the compiled program.
      batch_size: examples at a time, over all devices; divisible by their number.
      mesh: devices; default all.

    Raises:
      ValueError: ``batch_size`` is not divisible by the number of devices.
    """

    def __init__(
        self,
        make_attack: Callable[[ThreatModel], Any],
        *,
        batch_size: int,
        mesh: Mesh | None = None,
    ):
        checks.function("make_attack", make_attack)
        self._make = make_attack

        def init(fixed: tuple, numbers: tuple, rows: tuple) -> Any:
            (logits_fn, threat, key), (x, y, index) = fixed, rows
            own_keys = keys.per_example(key, index)
            return make_attack(threat).init(logits_fn, own_keys, x, y)

        def advance(fixed: tuple, numbers: tuple, rows: tuple) -> Any:
            (logits_fn, threat, key), (state, x, y, index) = fixed, rows
            r, first, last = numbers
            attack, own_keys = make_attack(threat), keys.per_example(key, index)
            state = jax.lax.cond(
                first == 0,
                lambda state: attack.start(logits_fn, r, own_keys, state, x, y),
                lambda state: state,
                state,
            )
            return attack.advance(logits_fn, r, first, last, own_keys, state, x, y)

        def whole(fixed: tuple, numbers: tuple, rows: tuple) -> Array:
            (logits_fn, threat, key), (x, y, index) = fixed, rows
            return make_attack(threat)(logits_fn, keys.per_example(key, index), x, y)

        self._init, self._advance, self._whole = (
            BatchedFunction(fn, batch_size=batch_size, mesh=mesh) for fn in (init, advance, whole)
        )

    def budget(self, threat: ThreatModel) -> tuple[int | None, int | None]:
        """Rounds, and steps in each; None for an attack that does not say."""
        attack = self._make(threat)
        stepwise = isinstance(attack, StepwiseAttack)
        return (attack.rounds, attack.steps) if stepwise else (None, None)

    def __call__(
        self,
        logits_fn: Callable[..., Array],
        threat: ThreatModel,
        key: Array,
        x: np.ndarray,
        y: np.ndarray,
        index: np.ndarray,
        *,
        resume: Position | None = None,
        on_chunk: Callable[[Position], None] = lambda position: None,
    ) -> tuple[np.ndarray, Any]:
        """Attacks all examples.

        Args:
          logits_fn: a function, or a ``jax.tree_util.Partial`` of one over its parameters.
          threat: norm ball and box; ``eps`` one number.
          key: one key.
          x: inputs ``(n, ...)``.
          y: labels ``(n,)``.
          index: place of each example in the data set, ``(n,)`` int32; its randomness.
          resume: a position that ``on_chunk`` was given, in a run with the same arguments; a list
            of its state's leaves will do.
          on_chunk: called after each chunk. Its arrays are changed later.

        Returns:
          ``(x_adv, state)``, numpy arrays; the state is None for an attack that runs whole.
        """
        attack = self._make(threat)
        fixed = self._init.place((as_partial(logits_fn), threat, key))
        if not isinstance(attack, StepwiseAttack):
            return self._whole(fixed, (), (x, y, index)), None
        attack.check(x)
        if resume is None:
            # A copy: arrays that come from a device are read-only.
            state = jax.tree.map(np.array, self._init(fixed, (), (x, y, index)))
            r, first = 0, 0
        else:
            r, first, state = resume
            data = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, y, index))
            structure = jax.tree.structure(jax.eval_shape(self._init.fn, fixed, (), data))
            state = jax.tree.unflatten(structure, jax.tree.leaves(state))
        while r < attack.rounds and not state.done.all():
            last = min(first + max(FIRST_CHUNK, first // 4), attack.steps)
            active = np.flatnonzero(~state.done)
            numbers = (np.int32(r), np.int32(first), np.int32(last))
            part = self._advance(fixed, numbers, (state, x, y, index), active)
            for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(part), strict=True):
                old[active] = new
            r, first = (r + 1, 0) if last == attack.steps else (r, last)
            on_chunk(Position(r, first, state))
        return state.x_adv, state
