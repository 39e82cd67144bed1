"""SimBA: coordinate search in an orthonormal basis, from scores alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from robustjax import checks, keys
from robustjax.attacks.stepwise import LogitsFn, StepwiseAttack, rows
from robustjax.dct import dct_matrix
from robustjax.losses import cross_entropy
from robustjax.metrics import correct
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat


class SimBAState(NamedTuple):
    """The state of ``simba``, one entry per example; ``has_aux=True`` returns the last one.

    Attributes:
      x_adv: the present point, whose loss is the largest so far.
      done: broken (or misclassified from the start), or nothing left to try or to spend.
      queries: scores asked for; the clean image is not counted.
      loss: what the attack raises, at ``x_adv``; of a targeted attack, minus the target's loss.
      accepted: directions along which the point has moved.
      order: the directions in the order in which they are tried.
      place: the place in ``order`` of the direction that is tried now.
      forward: its negative side has been tried without success; the positive one is next.
    """

    x_adv: Float[Array, "n ..."]
    done: Bool[Array, " n"]
    queries: Int[Array, " n"]
    loss: Float[Array, " n"]
    accepted: Int[Array, " n"]
    order: Int[Array, "n directions"]
    place: Int[Array, " n"]
    forward: Bool[Array, " n"]


def simba(
    threat: ThreatModel,
    *,
    max_queries: int,
    basis: str = "pixel",
    step_size: float | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    targeted: bool = False,
    order: str = "random",
    freq_dims: int | None = None,
    stride: int = 7,
    has_aux: bool = False,
) -> StepwiseAttack:
    """SimBA and SimBA-DCT, kept inside a threat model.

    Goes through the vectors ``q`` of an orthonormal basis, each once: moves to ``x - step_size q``
    if that raises the loss, else to ``x + step_size q`` if that does. A candidate is projected into
    the threat model first, so that the l_2 norm, which grows as ``step_size * sqrt(accepted)``,
    stays at ``eps`` once it is there. An example stops when it is misclassified (reaches its
    target), after ``max_queries``, or when every direction was tried.

    Args:
      threat: norm ball and box.
      max_queries: queries for an example, ``>= 1``; one or two for a direction.
      basis: ``"pixel"``, the coordinates of inputs of any shape, or ``"dct"``, the orthonormal
        two-dimensional cosine basis of every channel of images ``(n, h, w, c)``.
      step_size: length of a step in the l_2 norm, in input units, ``> 0``. Default: ``eps`` for
        pixels in an l_inf ball, else 0.2, as in the public code.
      loss: ``loss(logits, y) -> (n,)``, raised by the attack (lowered if ``targeted``). The
        default orders points as the probability of the class does, as in the paper.
      targeted: ``y`` are target classes, wanted instead of avoided.
      order: ``"random"``, or ``"strided"``: the ``freq_dims`` lowest frequencies first, at random,
        then shells of ``stride`` more, each at random. Every example has its own order.
      freq_dims: for the cosine basis, only (``"strided"``: first) frequencies below this, in both
        directions. Default: all.
      stride: width of a shell of the strided order, ``>= 1``.
      has_aux: return ``(x_adv, SimBAState)``.

    Raises:
      ValueError: an argument is out of range, or of the cosine basis and given for pixels; of a
        call: inputs are no images, or have fewer than ``freq_dims`` frequencies.

    Source: Guo et al. (2019), "Simple black-box adversarial attacks", algorithm 1 and section 3.
    Deviation: the public code does not project, and counts an example as broken only if its norm
    is at most ``eps``.
    """
    check_threat(threat)
    checks.integer("max_queries", max_queries, at_least=1)
    checks.choice("basis", basis, ("pixel", "dct"))
    checks.function("loss", loss)
    checks.choice("order", order, ("random", "strided"))
    checks.integer("stride", stride, at_least=1)
    pixels = basis == "pixel"
    if freq_dims is not None:
        checks.integer("freq_dims", freq_dims, at_least=1)
    if pixels and (freq_dims is not None or order == "strided"):
        raise ValueError(
            f"freq_dims and the strided order are for the dct basis, got basis {basis!r}, "
            f"order {order!r}, freq_dims {freq_dims}"
        )
    if order == "strided" and freq_dims is None:
        raise ValueError("freq_dims must be given for the strided order, got None")
    if step_size is None:
        step_size = threat.eps if pixels and isinstance(threat.norm, LInf) else 0.2
    else:
        checks.number("step_size", step_size, above=0)
    sign = -1.0 if targeted else 1.0

    def check(x: ArrayLike) -> None:
        threat.check_inputs(x)
        if not pixels and (x.ndim != 4 or min(x.shape[1:3]) < (freq_dims or 1)):
            raise ValueError(
                f"x must be images (n, h, w, c) with h, w >= {freq_dims or 1} for the dct basis, "
                f"got shape {x.shape}"
            )

    def judge(logits: Array, y: Array) -> tuple[Array, Array]:
        score = sign * checks.per_example("loss(logits, y)", loss(logits, y), y.shape[0])
        return score, correct(logits, y) == targeted

    def initial(
        logits_fn: LogitsFn, example_keys: Key[Array, " n"], x: Array, y: Array
    ) -> SimBAState:
        score, done = judge(logits_fn(x), y)
        zero = jnp.zeros(x.shape[0], jnp.int32)
        shells = _shells(x.shape[1:], order, freq_dims, stride)
        directions = _directions(keys.fold_in(example_keys, 0), shells, max_queries)
        return SimBAState(x, done, zero, score, zero, directions, zero, jnp.zeros_like(done))

    def begin(
        logits_fn: LogitsFn,
        r: int | Array,
        round_keys: Array,
        state: SimBAState,
        x: Array,
        y: Array,
    ) -> SimBAState:
        return state

    def step(
        logits_fn: LogitsFn,
        t: int | Array,
        round_keys: Array,
        state: SimBAState,
        x: Array,
        y: Array,
    ) -> SimBAState:
        index = jnp.take_along_axis(state.order, state.place[:, None], axis=1)[:, 0]
        q = _unit_vectors(index, x) if pixels else _cosines(index, x)
        length = rows(jnp.asarray(step_size, x.dtype), x)
        move = jnp.where(rows(state.forward, x), length, -length) * q
        candidate = threat.project(state.x_adv + move, x)
        score, success = judge(logits_fn(candidate), y)
        better = success | (score > state.loss)
        onward = better | state.forward
        place = state.place + onward
        queries = state.queries + 1
        exhausted = (place == state.order.shape[1]) | (queries == max_queries)
        return SimBAState(
            x_adv=jnp.where(rows(better, x), candidate, state.x_adv),
            done=success | exhausted,
            queries=queries,
            loss=jnp.where(better, score, state.loss),
            accepted=state.accepted + better,
            order=state.order,
            place=place,
            forward=~onward,
        )

    return StepwiseAttack(
        init=initial, begin=begin, step=step, steps=max_queries, check=check, has_aux=has_aux
    )


def _shells(
    shape: tuple[int, ...], order: str, freq_dims: int | None, stride: int
) -> Int[np.ndarray, "k 2"]:
    """The directions that may be tried, and the shell of each: lower shells come first."""
    size = int(np.prod(shape))
    shell = np.zeros(shape, np.int32)
    if freq_dims is not None:
        frequency = np.maximum(*np.ogrid[: shape[0], : shape[1]])[..., None]
        shell = shell + np.maximum(0, -(-(frequency - freq_dims + 1) // stride)).astype(np.int32)
    pairs = np.stack([np.arange(size, dtype=np.int32), shell.ravel()], axis=1)
    return pairs if order == "strided" else pairs[pairs[:, 1] == 0]


def _directions(
    key: Key[Array, " n"], shells: Int[np.ndarray, "k 2"], most: int
) -> Int[Array, "n directions"]:
    """An order of the directions for each example: by shell, and at random within it."""

    def one(key: Array) -> Array:
        bits = jax.random.bits(key, (len(shells),), jnp.uint32)
        columns = (jnp.asarray(shells[:, 1]), bits, jnp.asarray(shells[:, 0]))
        return jax.lax.sort(columns, num_keys=2)[2][:most]

    return jax.vmap(one)(key)


def _unit_vectors(index: Int[Array, " n"], x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    flat = jnp.arange(x[0].size) == index[:, None]
    return flat.reshape(x.shape).astype(x.dtype)


def _cosines(index: Int[Array, " n"], x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Orthonormal cosine images: the index counts vertical, horizontal frequency and channel."""
    height, width, channels = x.shape[1:]
    down, across, channel = jnp.unravel_index(index, (height, width, channels))
    column = jnp.asarray(dct_matrix(height), x.dtype)[down]
    row = jnp.asarray(dct_matrix(width), x.dtype)[across]
    only = jnp.arange(channels) == channel[:, None]
    q = column[:, :, None, None] * row[:, None, :, None] * only[:, None, None, :]
    return q
