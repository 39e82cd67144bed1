"""Square Attack: random search with square updates, which sees scores and no gradients.

An update lies where the perturbation can be largest: on the boundary of the ball. It is kept if
the loss improves. For l_inf a window of the image is set to ``x + eps`` or ``x - eps``; for l_2 the
perturbation of one window is moved into another. The windows shrink on a fixed schedule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from robustjax import checks, keys
from robustjax.attacks import square_moves as moves
from robustjax.attacks.stepwise import LogitsFn, StepwiseAttack, select
from robustjax.losses import cross_entropy, margin
from robustjax.metrics import correct
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat

_INITS = {
    "linf": ("vertical_stripes", "horizontal_stripes", "uniform", "random_squares"),
    "l2": ("eta_grid", "gaussian", "uniform", "vertical_stripes"),
}


class SquareState(NamedTuple):
    """The state of ``square``, one entry per example; ``has_aux=True`` returns the last one.

    Attributes:
      x_adv: the adversarial example, or the point of the largest loss that was found.
      done: broken (or misclassified from the start); nothing is queried any more.
      queries: scores asked for, the initial point of each restart included and the clean image not.
      loss: what the attack raises, at ``x_adv``; of a targeted attack, minus the target's loss.
      margin: by how much the attack has succeeded at ``x_adv``, positive iff it has (up to ties):
        ``max_{j != y} z_j - z_y``, or for a target ``z_t - max_{j != t} z_j``.
      search: the point and the loss of the present restart; None if there is only one.
    """

    x_adv: Float[Array, "n h w c"]
    done: Bool[Array, " n"]
    queries: Int[Array, " n"]
    loss: Float[Array, " n"]
    margin: Float[Array, " n"]
    search: tuple[Float[Array, "n h w c"], Float[Array, " n"]] | None


def square(
    threat: ThreatModel,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    schedule: str = "thesis",
    rescale_schedule: bool = True,
    targeted: bool = False,
    loss: Callable[[Array, Array], Array] | None = None,
    init: str | None = None,
    shape: str = "square",
    signs: str = "channel",
    update: str = "eta",
    formula: str = "text",
    init_tiles: int = 5,
    inclusive_positions: bool = True,
    resample_noop: bool = True,
    restarts: int = 1,
    has_aux: bool = False,
) -> StepwiseAttack:
    """Square Attack for l_inf and l_2 on images ``(n, h, w, c)``.

    Each query evaluates one candidate; it is kept if its loss is larger than the best so far, or
    if it succeeds. An example stops as soon as it is misclassified (reaches its target); one that
    is so from the start is returned as it came, with no query. Every example draws from its own
    key and neither the batch nor the other examples matter.

    Args:
      threat: l_inf or l_2 ball and box. ``eps`` may be traced.
      queries: queries in a restart, ``>= 1``, the initial point included.
      p_init: share of the pixels in the first windows, in ``(0, 1]``.
      schedule: when the share is halved, in iterations of 10,000: ``"thesis"`` at 10, 50, 200,
        1000, 2000, 4000, 6000 and 8000; ``"reference"``, the public code, also at 500.
      rescale_schedule: scale the schedule to ``queries``. AutoAttack does not.
      targeted: ``y`` are target classes, wanted instead of avoided.
      loss: ``loss(logits, y) -> (n,)``, raised by the attack (lowered if ``targeted``). Default
        ``margin``; if ``targeted``, ``cross_entropy``, which needs fewer queries than ``margin``.
      init: first point. l_inf: ``"vertical_stripes"`` (default) or ``"horizontal_stripes"`` of one
        pixel, ``"uniform"`` in the ball, ``"random_squares"`` (of the first size, with four
        times the area of the image, on a ground of one sign per channel; the source leaves their
        number open). l_2:
        ``"eta_grid"`` (default), ``"gaussian"`` (uniform on the sphere), ``"uniform"`` and
        ``"vertical_stripes"`` of entries up to ``eps / sqrt(d)``.
      shape: l_inf: the windows are a ``"square"``, a ``"rectangle"`` whose sides are stretched by
        two Exp(1) factors, or as many ``"random"`` pixels.
      signs: l_inf: one sign per ``"channel"``, ``"one"`` for the window, or one per ``"pixel"``.
      update: l_2: ``"eta"`` (two centres of opposite signs), ``"eta_single"`` (one) or
        ``"eta_rand"`` (random signs per pixel).
      formula: l_2: ``"text"``, or the public code's ``"reference"``: odd sides, halves of equal
        norm, and the perturbation scaled to norm ``eps`` before the box.
      init_tiles: l_2: tiles of the grid along the shorter side; fewer on small images, so that a
        tile is at least two pixels wide.
      inclusive_positions: windows may touch the last row and column. The public code leaves them
        out, and keeps windows smaller than the image.
      resample_noop: l_inf: signs that would leave the window as it is are drawn anew. AutoAttack
        does not.
      restarts: independent runs, ``>= 1``, of the examples that are not broken yet.
      has_aux: return ``(x_adv, SquareState)``.

    Raises:
      ValueError: the norm is another one, or an argument is out of range or belongs to the other
        norm; of a call: inputs are no images, or for l_2 less than 3 pixels high or wide.

    Source: Andriushchenko et al. (2020), "Square Attack: a query-efficient black-box adversarial
    attack via random search", sections 3 and 4; Andriushchenko (2024), "Understanding
    generalization and robustness in modern deep learning", chapter 3. Deviations: the loss to
    beat is that of the initial point, as in the public code; the listing has the clean image's.
    The public code draws one window for the whole batch.
    """
    if not isinstance(check_threat(threat).norm, (LInf, L2)):
        raise ValueError(f"threat must have the norm linf or l2, got {threat.norm.name}")
    norm = threat.norm.name
    checks.integer("queries", queries, at_least=1)
    checks.number("p_init", p_init, above=0, at_most=1)
    checks.choice("schedule", schedule, moves.HALVINGS)
    checks.choice("shape", shape, ("square", "rectangle", "random"))
    checks.choice("signs", signs, ("channel", "one", "pixel"))
    checks.choice("update", update, ("eta", "eta_single", "eta_rand"))
    checks.choice("formula", formula, ("text", "reference"))
    checks.integer("init_tiles", init_tiles, at_least=1)
    checks.integer("restarts", restarts, at_least=1)
    init = checks.choice("init", _INITS[norm][0] if init is None else init, _INITS[norm])
    other = (update, formula) if norm == "linf" else (shape, signs)
    if other != (("eta", "text") if norm == "linf" else ("square", "channel")):
        names = "update and formula" if norm == "linf" else "shape and signs"
        raise ValueError(f"{names} must be left out for the norm {norm}, got {other}")
    if loss is None:
        loss = cross_entropy if targeted else margin
    checks.function("loss", loss)
    sign = -1.0 if targeted else 1.0
    least = 1 if norm == "linf" else 3
    reference = formula == "reference"
    starts = np.asarray(moves.halvings(schedule, queries, rescale_schedule), np.int32)

    def check(x: ArrayLike) -> None:
        smallest = least if inclusive_positions else least + 1
        if x.ndim != 4 or min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"x must be images (n, h, w, c) with h, w >= {smallest}, got shape {x.shape}"
            )
        threat.check_inputs(x)

    def window_sides(x: Array) -> np.ndarray:
        size = x.shape[1:3]
        most = min(size) - (0 if inclusive_positions else 1)
        found = moves.sides(p_init, len(starts) + 1, size, least, most)
        if not reference:
            return found
        odd = found + (found % 2 == 0)
        return np.where(odd > most, odd - 2, odd).astype(np.int32)

    def judge(logits: Array, y: Array) -> tuple[Array, Array, Array]:
        score = sign * checks.per_example("loss(logits, y)", loss(logits, y), y.shape[0])
        return score, sign * margin(logits, y), correct(logits, y) == targeted

    def first_point(key: Key[Array, " n"], x: Array) -> Array:
        if norm == "linf":
            return moves.linf_start(init, key, x, threat, p_init)
        tiles = min(init_tiles, min(x.shape[1:3]) // 2)
        tile = moves.eta(
            min(x.shape[1:3]) // tiles, single=update == "eta_single", by_half=reference
        )
        return moves.l2_start(init, key, x, threat, tiles, tile, random_signs=update == "eta_rand")

    def candidate(t: int | Array, key: Key[Array, " n"], z: Array, x: Array) -> Array:
        table = window_sides(x)
        level = (t + 1 >= starts).sum()  # the initial point was iteration 0
        side = jnp.asarray(table)[level]
        if norm == "linf":
            return moves.linf_move(
                key,
                z,
                x,
                threat,
                side,
                shape=shape,
                signs=signs,
                inclusive=inclusive_positions,
                resample=resample_noop,
            )
        return moves.l2_move(
            key,
            z,
            x,
            threat,
            side,
            moves.profile_table(table, single=update == "eta_single", by_half=reference)[level],
            random_signs=update == "eta_rand",
            inclusive=inclusive_positions,
            renormalise=reference,
        )

    def initial(logits_fn: LogitsFn, example_keys: Array, x: Array, y: Array) -> SquareState:
        score, by, done = judge(logits_fn(x), y)
        score = jnp.where(done, score, -jnp.inf)  # any first point is better than the clean image
        count = jnp.zeros(x.shape[0], jnp.int32)
        return SquareState(x, done, count, score, by, None if restarts == 1 else (x, score))

    def begin(
        logits_fn: LogitsFn,
        r: int | Array,
        round_keys: Array,
        state: SquareState,
        x: Array,
        y: Array,
    ) -> SquareState:
        z = first_point(keys.fold_in(round_keys, 0), x)
        return asked(state, jnp.full(x.shape[:1], -jnp.inf), z, judge(logits_fn(z), y))

    def step(
        logits_fn: LogitsFn,
        t: int | Array,
        round_keys: Array,
        state: SquareState,
        x: Array,
        y: Array,
    ) -> SquareState:
        z, to_beat = (state.x_adv, state.loss) if restarts == 1 else state.search
        new = candidate(t, keys.fold_in(round_keys, t + 1), z, x)
        return asked(state, to_beat, new, judge(logits_fn(new), y))

    def asked(state: SquareState, to_beat: Array, z: Array, found: Any) -> SquareState:
        """The state after one query, of ``z``, in a restart whose best loss is ``to_beat``."""
        score, by, success = found
        search = state.search
        if restarts > 1:
            search = select(success | (score > to_beat), (z, score), search)
            to_beat = state.loss
        best = (state.x_adv, state.loss, state.margin)
        x_adv, score, by = select(success | (score > to_beat), (z, score, by), best)
        return SquareState(x_adv, success, state.queries + 1, score, by, search)

    return StepwiseAttack(
        init=initial,
        begin=begin,
        step=step,
        steps=queries - 1,
        rounds=restarts,
        check=check,
        has_aux=has_aux,
    )
