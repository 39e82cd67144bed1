"""The random draws of Square Attack: sizes, starts and updates, each example with its own key.

Images are ``(n, height, width, channels)``. Windows are comparisons of pixel indices, whose
positions and sizes may be traced, so that one compiled program serves every size.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt32

from robustjax import keys
from robustjax.attacks.stepwise import rows
from robustjax.threat import ThreatModel

# Iterations, of 10,000, after which the share of pixels is halved.
HALVINGS = {
    "thesis": (10, 50, 200, 1000, 2000, 4000, 6000, 8000),
    "reference": (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000),
}


def halvings(schedule: str, queries: int, rescale: bool) -> tuple[int, ...]:
    """The first iteration of each halving: at ``i >= starts[k]`` it has happened ``k + 1`` times.

    The schedule is that of 10,000 queries. ``rescale`` reads it at ``floor(10000 i / queries)``
    instead of ``i``.
    """
    scale = queries if rescale else 10_000
    return tuple(-(-(after + 1) * scale // 10_000) for after in HALVINGS[schedule])


def sides(p_init: float, levels: int, shape: tuple[int, int], least: int, most: int) -> np.ndarray:
    """Window sides ``round(sqrt(p h w))``, in ``[least, most]``, for ``p_init / 2^0, 2^1, ...``."""
    height, width = shape
    share = p_init * 0.5 ** np.arange(levels)
    return np.clip(np.rint(np.sqrt(share * height * width)), least, most).astype(np.int32)


def eta_profiles(side: int, *, single: bool, by_half: bool) -> np.ndarray:
    """The l_2 update as three vectors ``(a, b, scale)``: ``eta[r, s] = scale[s] min(a[r], b[s])``.

    ``eta`` has unit l_2 norm. An entry at Chebyshev distance ``d`` from the centre of its half is
    ``sum_{c=d}^{n} 1 / (c+1)^2``, ``n = side // 2``, which falls with ``d``: the minimum of one
    function of the row and one of the column.

    Args:
      side: side of the window, ``>= 2`` (``>= 1`` if ``single``).
      single: one centre instead of two halves of opposite signs.
      by_half: each half has norm ``1 / sqrt(2)``, as in the public code, instead of its natural
        share; the two differ for odd sides.
    """
    n = side // 2
    value = np.cumsum(1 / (np.arange(n, -1, -1) + 1.0) ** 2)[::-1]  # by distance, 0 .. n
    a = value[np.abs(np.arange(side) - n)]
    if single:
        halves, signs = [side], [1.0]
    else:
        halves, signs = [n, side - n], [1.0, -1.0]
    b = np.concatenate([value[np.abs(np.arange(k) - k // 2)] for k in halves])
    entries = np.minimum(a[:, None], b[None, :])
    ends = np.cumsum(halves)
    parts = [slice(end - k, end) for k, end in zip(halves, ends, strict=True)]
    scale = np.empty(side)
    for part, sign in zip(parts, signs, strict=True):
        norm = np.linalg.norm(entries[:, part])
        scale[part] = sign / (norm * math.sqrt(len(parts)) if by_half else np.linalg.norm(entries))
    return np.stack([a, b, scale])


def eta(side: int, *, single: bool = False, by_half: bool = False) -> np.ndarray:
    """The l_2 update ``(side, side)`` of unit norm; see ``eta_profiles``."""
    a, b, scale = eta_profiles(side, single=single, by_half=by_half)
    return scale * np.minimum(a[:, None], b)


def profile_table(sides: np.ndarray, *, single: bool, by_half: bool) -> Float[Array, "k 3 l"]:
    """The profiles of several sides, padded to one length."""
    most = int(sides.max())
    table = [
        np.pad(eta_profiles(int(side), single=single, by_half=by_half), ((0, 0), (0, most - side)))
        for side in sides
    ]
    return jnp.asarray(np.stack(table), jnp.float32)


def linf_start(
    init: str, key: Key[Array, " n"], x: Array, threat: ThreatModel, p_init: float
) -> Float[Array, "n h w c"]:
    """The first point of the l_inf attack; before the box is applied on the surface of the ball."""
    height, width, channels = x.shape[1:]
    eps = rows(jnp.asarray(threat.eps, x.dtype), x)
    if init == "uniform":
        delta = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1, 1))(key)
        return threat.clip(x + eps * delta)
    shape = {"vertical_stripes": (1, width), "horizontal_stripes": (height, 1)}.get(init, (1, 1))
    positive = _bits(key, (*shape, channels))
    if init == "random_squares":
        side = int(sides(p_init, 1, (height, width), 1, min(height, width))[0])

        def place(i: Array, positive: Array) -> Array:
            words = _words(keys.fold_in(key, i + 1), 2 + channels)
            mask = _square(words, side, x.shape, True)
            return jnp.where(mask, _signs(words[:, 2:]), positive)

        positive = jnp.broadcast_to(positive, x.shape)
        positive = jax.lax.fori_loop(0, 4 * height * width // side**2, place, positive)
    return threat.clip(x + jnp.where(positive, eps, -eps))


def linf_move(
    key: Key[Array, " n"],
    x_adv: Float[Array, "n h w c"],
    x: Float[Array, "n h w c"],
    threat: ThreatModel,
    side: Int[Array, ""],
    *,
    shape: str,
    signs: str,
    inclusive: bool,
    resample: bool,
) -> Float[Array, "n h w c"]:
    """``x_adv`` with the pixels of one window at ``x + eps`` or ``x - eps``, clipped to the box."""
    height, width, channels = x.shape[1:]
    count = 1 if signs == "one" else channels
    extra = 2 if shape == "rectangle" else 0
    words = _words(key, 3 + extra + count)
    if shape == "square":
        mask = _square(words, side, x.shape, inclusive)
    elif shape == "rectangle":
        mask = _rectangle(words, side, x.shape, inclusive)
    else:
        mask = _scattered(keys.fold_in(key, words.shape[1]), side * side, x.shape)
    if signs == "pixel":
        positive = _bits(keys.fold_in(key, words.shape[1] + 1), (height, width, channels))
    else:
        positive = _signs(words[:, 3 + extra :])
    eps = rows(jnp.asarray(threat.eps, x.dtype), x)
    high, low = threat.clip(x + eps), threat.clip(x - eps)
    if resample:
        # Only one vector of signs can leave the window as it is. If it was drawn, a uniformly
        # random non-empty set of its signs is turned, which makes every other vector equally
        # likely: the law of drawing until the window changes.
        changed = mask & (jnp.where(positive, high, low) != x_adv)
        same = ~changed.any(axis=(1, 2, 3))
        positive ^= rows(same, x) & _some(words[:, 2], count)
    return jnp.where(mask, jnp.where(positive, high, low), x_adv)


def l2_start(
    init: str,
    key: Key[Array, " n"],
    x: Array,
    threat: ThreatModel,
    tiles: int,
    tile: np.ndarray,
    *,
    random_signs: bool,
) -> Float[Array, "n h w c"]:
    """The first point of the l_2 attack. The grid has ``tiles`` tiles along the shorter side."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    eps = rows(jnp.asarray(threat.eps, wide), x)
    width, channels = x.shape[2:]
    if init == "eta_grid":
        delta = _grid(key, x.shape, tiles, tile)
        if random_signs:
            delta = jnp.where(_bits(keys.fold_in(key, 1), x.shape[1:]), delta, -delta)
    elif init == "gaussian":
        delta = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], wide))(key)
    elif init == "uniform":
        delta = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], wide, -1, 1))(key)
    else:
        delta = jnp.where(_bits(key, (1, width, channels)), 1.0, -1.0)
    if init in ("eta_grid", "gaussian"):
        delta = delta / _guarded(_norm(delta, (1, 2, 3)))
    else:
        delta = delta / math.sqrt(x[0].size)
    return threat.clip((x + eps * delta).astype(x.dtype))


def l2_move(
    key: Key[Array, " n"],
    x_adv: Float[Array, "n h w c"],
    x: Float[Array, "n h w c"],
    threat: ThreatModel,
    side: Int[Array, ""],
    profiles: Float[Array, "3 l"],
    *,
    random_signs: bool,
    inclusive: bool,
    renormalise: bool,
) -> Float[Array, "n h w c"]:
    """Moves the perturbation of a second window, and what is left of ``eps``, into a first one.

    The first window's perturbation is turned towards the update of the given profiles. Before the
    box the result has norm ``eps`` (Proposition 3.4.1 of Andriushchenko, 2024).
    """
    height, width, channels = x.shape[1:]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    words = _words(key, 5 + channels)
    first, second = (
        [
            _place(words[:, i + k], side, length, inclusive)
            for k, length in ((0, height), (1, width))
        ]
        for i in (0, 2)
    )
    in_first = _inside(first, side, x.shape)
    in_second = _inside(second, side, x.shape)
    direction = jnp.where(in_first, _placed(profiles, words[:, 4], first, x.shape), 0)
    if random_signs:
        turned = _bits(keys.fold_in(key, words.shape[1]), (height, width, channels))
    else:
        turned = _signs(words[:, 5:])
    eps = rows(jnp.asarray(threat.eps, wide), x)

    nu = x_adv.astype(wide) - x.astype(wide)
    square = nu * nu
    total = _per_channel(square).sum(-1, keepdims=True)
    both = _per_channel(jnp.where(in_first | in_second, square, 0))
    old = jnp.sqrt(_per_channel(jnp.where(in_first, square, 0)))
    unused = jnp.maximum(eps**2 - total, 0)
    available = both + unused / channels
    mixed = jnp.where(turned, direction, -direction) + jnp.where(in_first, nu, 0) / _guarded(old)
    length = jnp.sqrt(_per_channel(mixed * mixed))
    moved = mixed * (jnp.sqrt(available) / _guarded(length))
    moved = jnp.where(in_first, moved, jnp.where(in_second, 0, nu))
    # The norm is eps up to rounding, which without this would add up over the steps; only where
    # the old perturbation cancels the update is it less.
    gained = (jnp.where(length > 0, available, 0) - both).sum(-1, keepdims=True)
    scale = eps / _guarded(jnp.sqrt(jnp.maximum(total + gained, 0)))
    moved = moved * (scale if renormalise else jnp.minimum(1, scale))
    return threat.clip((x + moved).astype(x.dtype))


def _words(key: Key[Array, " n"], count: int) -> UInt32[Array, "n k"]:
    return jax.vmap(lambda k: jax.random.bits(k, (count,), jnp.uint32))(key)


def _bits(key: Key[Array, " n"], shape: tuple[int, ...]) -> Bool[Array, "n ..."]:
    return jax.vmap(lambda k: jax.random.bits(k, shape, jnp.uint8))(key) % 2 == 1


def _signs(words: UInt32[Array, "n c"]) -> Bool[Array, "n 1 1 c"]:
    return (words >> 31 == 1)[:, None, None, :]


def _some(word: UInt32[Array, " n"], count: int) -> Bool[Array, "n 1 1 c"]:
    """A random subset of the channels (of the first sixteen), never the empty one."""
    drawn = min(count, 16)
    subset = 1 + word % np.uint32(2**drawn - 1)
    bits = (subset[:, None] >> np.arange(count, dtype=np.uint32).clip(max=31)) & 1
    return (bits == 1)[:, None, None, :]


def _unit(word: UInt32[Array, " n"]) -> Float[Array, " n"]:
    """Uniform in [0, 1), with the 24 bits of a float32."""
    return (word >> 8).astype(jnp.float32) * 2.0**-24


def _integer(word: UInt32[Array, " n"], span: ArrayLike) -> Int[Array, " n"]:
    """Uniform in ``0 .. span - 1``."""
    # The product can round up to span itself.
    return jnp.minimum((_unit(word) * span).astype(jnp.int32), span - 1)


def _place(word: Array, side: ArrayLike, length: int, inclusive: bool) -> Int[Array, " n"]:
    """First row (column) of a window in an image of that many."""
    return _integer(word, jnp.maximum(length - side + (1 if inclusive else 0), 1))


def _inside(
    start: list[Int[Array, " n"]], side: ArrayLike | list, shape: tuple[int, ...]
) -> Bool[Array, "n h w 1"]:
    size = side if isinstance(side, list) else [side, side]
    masks = []
    for axis in (0, 1):
        index = jnp.arange(shape[1 + axis]) - start[axis][:, None]
        masks.append((index >= 0) & (index < jnp.reshape(size[axis], (-1, 1))))
    return masks[0][:, :, None, None] & masks[1][:, None, :, None]


def _square(
    words: Array, side: ArrayLike, shape: tuple[int, ...], inclusive: bool
) -> Bool[Array, "n h w 1"]:
    start = [_place(words[:, axis], side, shape[1 + axis], inclusive) for axis in (0, 1)]
    return _inside(start, side, shape)


def _rectangle(
    words: Array, side: ArrayLike, shape: tuple[int, ...], inclusive: bool
) -> Bool[Array, "n h w 1"]:
    """Sides ``alpha * side``, ``beta * side`` with ``alpha, beta ~ Exp(1)``, at least one pixel."""
    start, sizes = [], []
    for axis in (0, 1):
        stretch = -jnp.log1p(-_unit(words[:, 3 + axis]))
        length = shape[1 + axis]
        size = jnp.clip(jnp.rint(stretch * side).astype(jnp.int32), 1, length)
        sizes.append(size)
        start.append(_place(words[:, axis], size, length, inclusive))
    return _inside(start, sizes, shape)


def _scattered(
    key: Key[Array, " n"], count: Int[Array, ""], shape: tuple[int, ...]
) -> Bool[Array, "n h w 1"]:
    """``count`` pixels at random: those of the smallest random numbers."""
    n, height, width, _ = shape
    pixels = height * width
    low = (pixels - 1).bit_length()
    # The pixel's index in the low bits makes the numbers distinct.
    numbers = (_words(key, pixels) >> low << low) | jnp.arange(pixels, dtype=jnp.uint32)

    def halve(i: Array, bound: Array) -> Array:
        # The largest bound with fewer than count numbers below it is the last one taken. Found
        # bit by bit, because sorting is slow on CPUs.
        trial = bound | (np.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where((numbers < trial[:, None]).sum(axis=1) < count, trial, bound)

    last = jax.lax.fori_loop(0, 32, halve, jnp.zeros(n, jnp.uint32))
    return (numbers <= last[:, None]).reshape(n, height, width, 1)


def _placed(
    profiles: Array, word: Array, start: list[Array], shape: tuple[int, ...]
) -> Float[Array, "n h w 1"]:
    """The update, or by the bit of ``word`` its transpose, with its corner at ``start``."""
    a, b, scale = profiles
    on_row = (word & 1)[:, None] == 0
    index = [jnp.arange(shape[1 + k]) - start[k][:, None] for k in (0, 1)]
    index = [jnp.clip(i, 0, a.shape[0] - 1) for i in index]
    row, column = (
        (jnp.where(first, a[i], b[i]), jnp.where(first, 1, scale[i]))
        for first, i in ((on_row, index[0]), (~on_row, index[1]))
    )
    value = jnp.minimum(row[0][:, :, None], column[0][:, None, :])
    return (value * row[1][:, :, None] * column[1][:, None, :])[..., None]


def _grid(
    key: Key[Array, " n"], shape: tuple[int, ...], tiles: int, update: np.ndarray
) -> Float[Array, "n h w c"]:
    """Tiles of the update or its transpose, each with random signs per channel, and a margin."""
    n, height, width, channels = shape
    side = update.shape[0]
    down, across = (length * tiles // min(height, width) for length in (height, width))
    bits = _bits(key, (down, across, 1 + channels))
    tile = jnp.where(bits[..., :1, None], update, update.T)  # n, down, across, side, side
    sign = jnp.where(bits[..., 1:], 1.0, -1.0)
    grid = jnp.einsum("nijrs,nijc->nirjsc", tile, sign)
    grid = grid.reshape(n, down * side, across * side, channels)
    margins = [
        ((length - size) // 2, length - size - (length - size) // 2)
        for length, size in ((height, down * side), (width, across * side))
    ]
    return jnp.pad(grid, ((0, 0), *margins, (0, 0)))


def _per_channel(v: Float[Array, "n h w c"]) -> Float[Array, "n 1 1 c"]:
    """Sums over the pixels. Whole rows are added first: few channels make short vectors."""
    n, height, width, channels = v.shape
    by_column = v.reshape(n, height, width * channels).sum(1)
    return by_column.reshape(n, 1, width, channels).sum(2, keepdims=True)


def _norm(v: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt((v * v).sum(axes, keepdims=True))


def _guarded(norm: Array) -> Array:
    """A denominator under which 0 / 0 is 0."""
    return jnp.where(norm > 0, norm, 1)
