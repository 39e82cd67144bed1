"""Square Attack: exact draws, optima of linear models, invariances, query counts."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import keys
from robustjax.attacks import square_moves as moves
from robustjax.attacks.square import square
from robustjax.losses import margin
from robustjax.norms import L1, L2, LInf
from robustjax.threat import ThreatModel

KEY = jax.random.key(7)
LINF = ThreatModel(LInf(), 0.1)
FREE_L2 = ThreatModel(L2(), 0.7, -jnp.inf, jnp.inf)


def images(shape, low=0.0, high=1.0, seed=0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def linear(shape, classes=5, seed=1, bias=0.0):
    w = np.random.default_rng(seed).normal(size=(math.prod(shape), classes)).astype(np.float32)
    return lambda x: x.reshape(x.shape[0], -1) @ w + bias


def predictions(logits_fn, x):
    return np.asarray(logits_fn(x)).argmax(-1).astype(np.int32)


def margins(logits_fn, x, y):
    logits = np.asarray(logits_fn(x))
    own = np.arange(logits.shape[1]) == np.asarray(y)[:, None]
    return np.where(own, -np.inf, logits).max(-1) - logits[own]


def compiled(attack, logits_fn):
    run = jax.jit(lambda key, x, y: attack(logits_fn, key, x, y))
    return lambda key, x, y: jax.tree.map(np.asarray, run(key, x, jnp.asarray(y, jnp.int32)))


# Schedule


def share_of_public_code(i, queries, rescale, schedule):
    """p / p_init, as the public code's chain of comparisons has it."""
    i = int(i / queries * 10000) if rescale else i
    after = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    if schedule == "thesis":
        after.remove(500)
    return 0.5 ** sum(i > a for a in after)


@pytest.mark.parametrize("schedule", ["thesis", "reference"])
@pytest.mark.parametrize(("queries", "rescale"), [(10000, True), (5000, False), (2560, True)])
def test_schedule_is_that_of_the_public_code(schedule, queries, rescale):
    starts = np.asarray(moves.halvings(schedule, queries, rescale))
    for i in range(queries):
        expected = share_of_public_code(i, queries, rescale, schedule)
        assert 0.5 ** (i >= starts).sum() == expected, i


def test_schedule_of_the_text():
    expected = (11, 51, 201, 1001, 2001, 4001, 6001, 8001)
    assert moves.halvings("thesis", 10_000, True) == expected
    assert moves.halvings("thesis", 123, False) == expected
    assert len(moves.halvings("reference", 10_000, True)) == 9  # last share: p / 512


def test_sides():
    assert moves.sides(0.05, 1, (224, 224), 1, 224)[0] == 50
    assert moves.sides(0.3, 1, (8, 8), 1, 8)[0] == 4
    sides = moves.sides(0.8, 10, (28, 28), 1, 28)
    assert sides[0] == 25
    assert (np.diff(sides) <= 0).all()
    assert sides[-1] == 1
    assert moves.sides(0.8, 10, (28, 28), 3, 28)[-1] == 3


# l_inf draws


@functools.partial(jax.jit, static_argnames=("shape", "signs", "inclusive", "resample"))
def linf_move(
    x_adv, x, side, key=KEY, *, shape="square", signs="channel", inclusive=True, resample=True
):
    return moves.linf_move(
        keys.as_per_example(key, x.shape[0]),
        x_adv,
        x,
        LINF,
        jnp.asarray(side),
        shape=shape,
        signs=signs,
        inclusive=inclusive,
        resample=resample,
    )


@pytest.mark.parametrize("side", [1, 2, 5, 6])
@pytest.mark.parametrize("shape", ["square", "random"])
def test_linf_move_changes_exactly_the_window(side, shape):
    x = images((400, 6, 6, 3), 0.3, 0.7)
    moved = np.asarray(linf_move(x, x, side, shape=shape) != x)
    assert (moved.sum((1, 2, 3)) == side * side * 3).all()
    pixels = moved.any(-1)
    assert (pixels.sum((1, 2)) == side * side).all()
    if shape == "square":
        assert (pixels.any(1).sum(1) == side).all()
        assert (pixels.any(2).sum(1) == side).all()
    elif side == 5:
        assert (pixels.any(1).sum(1) > side).any()


def test_rectangles_are_windows_of_random_sides():
    x = images((400, 6, 6, 3), 0.3, 0.7)
    pixels = np.asarray(linf_move(x, x, 2, shape="rectangle") != x).any(-1)
    down, across = pixels.any(2).sum(1), pixels.any(1).sum(1)
    assert (pixels.sum((1, 2)) == down * across).all()
    assert down.min() == across.min() == 1
    assert down.max() == across.max() == 6
    assert (down != across).any()
    # E clip(round(2 Exp(1)), 1, 6): the sum of the tail probabilities P(side >= j).
    expected = 1 + sum(math.exp(-(j - 0.5) / 2) for j in range(2, 7))
    assert abs(down.mean() - expected) < 4 * down.std() / 20


@pytest.mark.parametrize(("signs", "patterns"), [("channel", 8), ("one", 2), ("pixel", 400)])
def test_signs(signs, patterns):
    x = np.full((400, 6, 6, 3), 0.5, np.float32)
    moved = np.asarray(linf_move(x, x, 6, signs=signs)) - x
    assert np.allclose(np.abs(moved), 0.1)
    if signs != "pixel":
        assert (moved == moved[:, :1, :1, :]).all()
    if signs == "one":
        assert (moved == moved[..., :1]).all()
    assert len(np.unique(moved > 0, axis=0)) == patterns


@pytest.mark.parametrize(("inclusive", "last"), [(True, 4), (False, 3)])
def test_positions(inclusive, last):
    x = images((400, 6, 6, 3), 0.3, 0.7)
    pixels = np.asarray(linf_move(x, x, 2, inclusive=inclusive) != x).any(-1)
    for axis in (1, 2):
        start = pixels.any(3 - axis).argmax(1)
        assert set(start) == set(range(last + 1))
        counts = np.bincount(start)
        assert (np.abs(counts - 400 / (last + 1)) < 5 * math.sqrt(400 / (last + 1))).all()


@pytest.mark.parametrize("resample", [True, False])
def test_signs_that_change_nothing_are_drawn_anew(resample):
    x = images((400, 6, 6, 3), 0.3, 0.7)
    x_adv = x + np.where(np.arange(3) == 1, -1, 1).astype(np.float32) * np.float32(0.1)
    moved = [linf_move(x_adv, x, 3, jax.random.key(i), resample=resample) for i in range(5)]
    changed = (np.stack(moved) != x_adv).any((2, 3)).reshape(-1, 3)
    # Uniform on the seven non-empty sets of channels; on all eight if the draw is kept.
    counts = np.bincount(changed @ np.array([1, 2, 4]), minlength=8)
    expected = np.where(np.arange(8) == 0, 0, 2000 / 7) if resample else np.full(8, 250)
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    "init", ["vertical_stripes", "horizontal_stripes", "uniform", "random_squares"]
)
def test_linf_starts(init):
    x = images((50, 6, 8, 3), 0.2, 0.8)
    example_keys = keys.as_per_example(KEY, 50)
    start = jax.jit(lambda x: moves.linf_start(init, example_keys, x, LINF, 0.3))
    delta = np.asarray(start(x)) - x
    assert np.abs(delta).max() <= 0.1 + 1e-6
    assert not np.allclose(delta[0], delta[1])
    if init == "uniform":
        assert np.abs(delta).min() < 0.001
        assert abs(delta.mean()) < 4 * delta.std() / math.sqrt(delta.size)
        return
    assert np.allclose(np.abs(delta), 0.1, atol=1e-6)
    up = delta > 0
    assert (up == up[:, :1]).all() == (init == "vertical_stripes")
    assert (up == up[:, :, :1]).all() == (init == "horizontal_stripes")
    assert 0.3 < up.mean() < 0.7


# l_2 draws


def eta_by_the_formula(h1, h2):
    """Equation (3.2) as it is written, indices from 1."""
    n = h1 // 2
    out = np.zeros((h1, h2))
    for r, s in itertools.product(range(1, h1 + 1), range(1, h2 + 1)):
        m = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
        out[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
    return out


@pytest.mark.parametrize("h", [2, 3, 4, 5, 8, 9, 16])
def test_eta_is_the_formula(h):
    halves = [eta_by_the_formula(h, k) for k in (h // 2, h - h // 2)]
    natural = np.concatenate([halves[0], -halves[1]], axis=1)
    assert np.allclose(moves.eta(h), natural / np.linalg.norm(natural), atol=1e-12)
    equal = np.concatenate(
        [v * s / np.linalg.norm(v) for v, s in zip(halves, (1, -1), strict=True)], axis=1
    )
    assert np.allclose(moves.eta(h, by_half=True), equal / math.sqrt(2), atol=1e-12)
    single = eta_by_the_formula(h, h)
    assert np.allclose(moves.eta(h, single=True), single / np.linalg.norm(single), atol=1e-12)


@pytest.mark.parametrize("h", [3, 4, 5, 8, 9, 16])
def test_eta_identities(h):
    n, k = h // 2, h // 2
    natural = np.concatenate([eta_by_the_formula(h, k), -eta_by_the_formula(h, h - k)], axis=1)
    ours = moves.eta(h) * np.linalg.norm(natural)
    for half in (ours[:, :k], -ours[:, k:]):
        assert half.min() > 0
        assert np.isclose(half.min(), 1 / (n + 1) ** 2)
        assert np.isclose(half.max(), sum(1 / (c + 1) ** 2 for c in range(n + 1)))
        assert half.max() < math.pi**2 / 6
    expected = {3: -0.75, 5: -1.3056, 9: -1.3531}.get(h, 0)
    assert np.isclose(ours.sum(), expected, atol=5e-5)


@functools.partial(jax.jit, static_argnames=("single", "random_signs", "inclusive", "renormalise"))
def l2_move(
    x_adv, x, h, key, *, single=False, random_signs=False, inclusive=True, renormalise=False
):
    profiles = moves.profile_table(np.arange(2, 10), single=single, by_half=renormalise)
    return moves.l2_move(
        keys.as_per_example(key, x.shape[0]),
        x_adv,
        x,
        FREE_L2,
        jnp.asarray(h),
        profiles[h - 2],
        random_signs=random_signs,
        inclusive=inclusive,
        renormalise=renormalise,
    )


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (1, {}),
        (2, {}),
        (1, {"inclusive": False}),
        (1, {"single": True}),
        (2, {"random_signs": True}),
        (2, {"renormalise": True}),
    ],
)
def test_l2_updates_have_norm_eps(channels, options):
    """Proposition 3.4.1, with windows that overlap, and after the box has clipped."""
    x = images((200, 9, 9, channels))
    x_adv = x
    for i, h in enumerate([7, 5, 3, 3, 6, 4, 3, 3] * 3):
        x_adv = np.asarray(l2_move(x_adv, x, h, jax.random.key(i), **options))
        assert np.allclose(np.sqrt(((x_adv - x) ** 2).sum((1, 2, 3))), 0.7, rtol=2e-6)
        x_adv = np.clip(x_adv, 0, 1) if i % 2 else x_adv


def test_l2_update_by_hand():
    """One channel, from zero: the update itself, of norm eps, somewhere in the image."""
    x = images((200, 9, 9, 1))
    delta = (np.asarray(l2_move(x, x, 7, KEY)) - x)[..., 0]
    eta, seen = 0.7 * moves.eta(7), set()
    for d in delta:
        r, c = (np.abs(d).sum(1 - axis) > 1e-4 for axis in (0, 1))
        r, c = r.argmax(), c.argmax()
        for sign, transposed in itertools.product((1, -1), (False, True)):
            if np.allclose(
                d[r : r + 7, c : c + 7], sign * (eta.T if transposed else eta), atol=1e-6
            ):
                seen.add((r, c, sign, transposed))
                break
        else:
            raise AssertionError(d)
        assert np.isclose((d**2).sum(), 0.49, rtol=1e-5)
    assert len(seen) == 3 * 3 * 2 * 2


def test_l2_update_empties_the_second_window():
    x = images((200, 9, 9, 2))
    x_adv = x + np.float32(0.7 / math.sqrt(162))
    before, after = (np.asarray(z) - x for z in (x_adv, l2_move(x_adv, x, 3, KEY)))
    emptied = (np.abs(after) < 1e-7).all(-1)
    same = np.isclose(after, before, atol=1e-6).all(-1)
    assert set(emptied.sum((1, 2))) <= {0, 3, 6, 9, 2, 4, 1, 5, 7, 8}
    assert (emptied.sum((1, 2)) == 9).any()  # windows that do not overlap
    # Unless they overlap, energy only moves between the two windows.
    apart = (emptied.sum((1, 2)) == 9) & (same.sum((1, 2)) == 81 - 18)
    assert apart.mean() > 0.3
    assert (same.sum((1, 2)) >= 81 - 18).all()
    energy = (after[apart] ** 2).sum((1, 2))
    assert np.allclose(energy, (before[apart] ** 2).sum((1, 2)), rtol=1e-4)  # per channel


@pytest.mark.parametrize("init", ["eta_grid", "gaussian", "uniform", "vertical_stripes"])
def test_l2_starts(init):
    x = images((40, 11, 13, 2))
    example_keys = keys.as_per_example(KEY, 40)
    tile = moves.eta(2)
    start = jax.jit(
        lambda x: moves.l2_start(init, example_keys, x, FREE_L2, 5, tile, random_signs=False)
    )
    delta = np.asarray(start(x)) - x
    assert not np.allclose(delta[0], delta[1])
    norm = np.sqrt((delta**2).sum((1, 2, 3)))
    if init == "uniform":
        assert (np.abs(delta) <= 0.7 / math.sqrt(286) + 1e-6).all()
        assert np.allclose(norm, 0.7 / math.sqrt(3), rtol=0.2)
        return
    assert np.allclose(norm, 0.7, rtol=1e-5)
    if init == "vertical_stripes":
        assert np.allclose(np.abs(delta), 0.7 / math.sqrt(286), atol=1e-6)
        assert ((delta > 0) == (delta[:, :1] > 0)).all()
    if init == "eta_grid":  # five tiles of side 2 down and five across, centred
        assert np.allclose(delta[:, 10:], 0, atol=1e-7)
        assert np.allclose(delta[:, :, [0, 11, 12]], 0, atol=1e-7)
        assert (np.abs(delta[:, :10, 1:11]) > 1e-3).all()


# The attack


@pytest.mark.parametrize("channels", [1, 3])
def test_one_pixel_images_by_enumeration(channels):
    x = images((6, 1, 1, channels), 0.05, 0.95)
    f = linear((channels,), classes=2, bias=np.array([9.0, 0.0], np.float32))
    y = np.zeros(6, np.int32)
    _, state = compiled(square(LINF, queries=60, has_aux=True), f)(KEY, x, y)
    corners = itertools.product((-1, 1), repeat=channels)
    best = [
        margins(f, np.clip(x + np.float32(0.1) * np.array(s, np.float32), 0, 1), y) for s in corners
    ]
    best = np.max(best, axis=0)
    assert np.allclose(state.margin, best, atol=1e-6)


def test_linear_model_reaches_the_dual_norm():
    x = images((5, 4, 4, 1), 0.2, 0.8)
    w = np.random.default_rng(1).normal(size=16).astype(np.float32)

    def f(z):
        score = z.reshape(-1, 16) @ w + 9
        return jnp.stack([score, -score], axis=1)

    y = np.zeros(5, np.int32)
    x_adv, state = compiled(square(LINF, queries=800, has_aux=True), f)(KEY, x, y)
    expected = -2 * (x.reshape(5, 16) @ w + 9 - 0.1 * np.abs(w).sum())
    assert np.allclose(state.margin, expected, atol=1e-4)
    assert (state.queries == 800).all()
    assert not state.done.any()
    assert np.allclose(x_adv - x, -0.1 * np.sign(w).reshape(4, 4, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ("linf", {"schedule": "reference", "rescale_schedule": False, "resample_noop": False}),
        ("linf", {"signs": "pixel", "shape": "random", "init": "uniform"}),
        ("linf", {"signs": "one", "shape": "rectangle", "inclusive_positions": False}),
        ("l2", {"formula": "reference", "inclusive_positions": False}),
        ("l2", {"update": "eta_rand", "init": "gaussian"}),
        ("l2", {"update": "eta_single", "restarts": 2}),
    ],
)
def test_every_iterate_is_feasible_and_the_loss_never_falls(norm, options):
    threat = LINF if norm == "linf" else ThreatModel(L2(), 0.5)
    x = images((12, 7, 7, 2))
    f = linear((7, 7, 2), classes=3)
    y = predictions(f, x)
    attack = square(threat, queries=30, **options)

    @jax.jit
    def run(x, y):
        example_keys = keys.as_per_example(KEY, 12)

        def one(state, t):
            state = attack.advance(f, 0, t, t + 1, example_keys, state, x, y)
            return state, state

        state = attack.init(f, example_keys, x, y)
        state = attack.start(f, 0, example_keys, state, x, y)
        later = jax.lax.scan(one, state, jnp.arange(29))[1]
        return state, later

    state, later = jax.tree.map(np.asarray, run(x, jnp.asarray(y)))
    assert ((later.x_adv >= 0) & (later.x_adv <= 1)).all()
    size = np.linalg.norm(
        (later.x_adv - x).reshape(29, 12, -1), np.inf if norm == "linf" else 2, axis=-1
    )
    assert (size <= threat.eps + 1e-6).all()
    assert (state.queries == 1).all()
    assert (state.loss > -np.inf).all()
    for t in range(29):
        before, state = state, jax.tree.map(lambda leaf, t=t: leaf[t], later)
        if norm == "linf" and options.get("init") != "uniform":
            corners = [np.clip(x + sign * np.float32(0.1), 0, 1) for sign in (1, -1)]
            assert ((state.x_adv == corners[0]) | (state.x_adv == corners[1])).all()
        assert (state.loss >= before.loss).all()
        assert (state.queries == before.queries + ~before.done).all()
        assert np.allclose(state.margin, margins(f, state.x_adv, y), atol=1e-4)
        assert (state.done == (predictions(f, state.x_adv) != y)).all()
        assert (state.x_adv == before.x_adv)[before.done].all()


@pytest.mark.parametrize("threat", [LINF, ThreatModel(L2(), 0.5)], ids=["linf", "l2"])
def test_invariances(threat):
    x = images((24, 6, 6, 1))
    f = linear((6, 6, 1))
    y = predictions(f, x)
    attack = square(threat, queries=50, has_aux=True)

    @jax.jit
    def compute(own, x, y, scale, order):
        return attack(lambda z: jnp.take_along_axis(f(z) * scale, order, axis=1), own, x, y)

    def run(*arguments):
        return jax.tree.map(np.asarray, compute(*arguments))

    own = keys.as_per_example(KEY, 24)
    plain = np.tile(np.arange(5), (24, 1))
    x_adv, state = run(own, x, y, 1.0, plain)
    assert 0 < state.done.mean() < 1
    # Positive factors: a power of two only changes exponents.
    scaled, other = run(own, x, y, 2.0**13, plain)
    assert (scaled == x_adv).all()
    assert (other.queries == state.queries).all()
    # The other classes in another order.
    order = plain.copy()
    for i, label in enumerate(np.asarray(y)):
        order[i, plain[i] != label] = np.roll(plain[i][plain[i] != label], 1)
    permuted, other = run(own, x, y, 1.0, order)
    assert (permuted == x_adv).all()
    assert (other.queries == state.queries).all()
    # Other examples around it, in another place.
    places = np.arange(24)[::-1]
    kept = places % 2 == 0
    mixed = np.where(kept[:, None, None, None], x[places], images(x.shape, seed=5))
    moved, other = run(own[places], mixed, y[places], 1.0, plain)
    assert (moved == x_adv[places])[kept].all()
    assert (other.queries == state.queries[places])[kept].all()


def test_queries_are_counted_until_the_first_success():
    x = images((30, 6, 6, 1))
    f = linear((6, 6, 1))
    y = predictions(f, x)
    y[0] += 1
    y = y % 5
    options = {"rescale_schedule": False, "has_aux": True}
    x_adv, state = compiled(square(LINF, queries=40, **options), f)(KEY, x, y)
    assert state.queries[0] == 0
    assert (x_adv[0] == x[0]).all()
    assert state.done[0]
    assert (state.queries[~state.done] == 40).all()
    assert (state.queries[1:] >= 1).all()
    assert ((predictions(f, x_adv) != y) == state.done).all()
    found = np.asarray(state.queries)[np.asarray(state.done)]
    budget = int(found.max())
    _, shorter = compiled(square(LINF, queries=budget, **options), f)(KEY, x, y)
    assert (shorter.done == (state.done & (state.queries <= budget))).all()
    assert (shorter.queries == np.minimum(state.queries, budget)).all()
    assert (shorter.queries[shorter.done] == budget).any()


def test_restarts_only_help():
    x = images((40, 6, 6, 1))
    f = linear((6, 6, 1))
    y = predictions(f, x)
    threat = ThreatModel(LInf(), 0.04)
    results = [
        compiled(square(threat, queries=8, restarts=r, has_aux=True), f)(KEY, x, y) for r in (1, 4)
    ]
    (_, one), (x_adv, four) = results
    assert (four.done | ~one.done).all()
    assert four.done.sum() > one.done.sum()
    assert (four.loss >= one.loss)[~four.done].all()
    assert (four.queries[one.done] == one.queries[one.done]).all()
    assert (four.queries[~four.done] == 32).all()
    assert np.allclose(four.margin, margins(f, x_adv, y), atol=1e-5)
    assert (one.x_adv == x_adv)[one.done].all()


@pytest.mark.parametrize("loss", [None, margin])
def test_targeted(loss):
    x = images((20, 6, 6, 1))
    f = linear((6, 6, 1))
    order = np.argsort(np.asarray(f(x)), -1)
    target = order[:, -2].copy()
    target[0] = order[0, -1]
    attack = square(ThreatModel(LInf(), 0.3), queries=80, targeted=True, loss=loss, has_aux=True)
    x_adv, state = compiled(attack, f)(KEY, x, target)
    assert (state.done == (predictions(f, x_adv) == target)).all()
    assert state.done.mean() > 0.8
    assert state.queries[0] == 0
    assert (x_adv[0] == x[0]).all()
    assert ((state.margin > 0) == state.done).all()
    logits = np.asarray(f(x_adv))
    cross_entropy = np.log(np.exp(logits).sum(-1)) - logits[np.arange(20), target]
    value = margins(f, x_adv, target) if loss else cross_entropy
    assert np.allclose(state.loss, -value, atol=1e-4)


def test_success_is_kept_whatever_the_loss_says():
    x = images((20, 6, 6, 1))
    f = linear((6, 6, 1))
    y = predictions(f, x)
    attack = square(LINF, queries=40, loss=lambda logits, y: jnp.zeros(y.shape), has_aux=True)
    x_adv, state = compiled(attack, f)(KEY, x, y)
    assert state.done.any()
    assert ((predictions(f, x_adv) != y) == state.done).all()


def test_scores_that_are_no_numbers_are_a_success():
    x = images((4, 5, 5, 1))

    def f(z):  # breaks down away from the clean image of the first example
        broken = (jnp.abs(z - x).max((1, 2, 3)) > 0) & (jnp.arange(4) == 0)
        return jnp.where(broken[:, None], jnp.nan, jnp.array([5.0, 0.0]))

    x_adv, state = compiled(square(LINF, queries=5, has_aux=True), f)(KEY, x, jnp.zeros(4, int))
    assert list(state.done) == [True, False, False, False]
    assert list(state.queries) == [1, 5, 5, 5]
    assert (x_adv[0] != x[0]).any()


@pytest.mark.parametrize("norm", [LInf(), L2()])
def test_dtype_traced_eps_and_eps_per_example(norm):
    x = jnp.asarray(images((3, 6, 6, 1)), jnp.bfloat16)
    f = linear((6, 6, 1), bias=np.array([99.0, 0, 0, 0, 0], np.float32))

    @jax.jit
    def run(eps):
        return square(ThreatModel(norm, eps), queries=4)(f, KEY, x, jnp.zeros(3, jnp.int32))

    x_adv = run(jnp.array([0.0, 0.1, 0.3]))
    assert x_adv.dtype == jnp.bfloat16
    delta = np.asarray(x_adv, np.float32) - np.asarray(x, np.float32)
    order = np.inf if norm == LInf() else 2
    size = np.linalg.norm(delta.reshape(3, -1), order, axis=1)
    assert size[0] == 0
    assert 0.03 < size[1] < 0.105
    assert 0.1 < size[2] < 0.305


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be >= 1, got 0"),
        ({"p_init": 0.0}, "p_init must be > 0"),
        ({"p_init": 1.5}, "p_init must be <= 1"),
        ({"schedule": "fast"}, "schedule must be one of"),
        ({"init": "eta_grid"}, "init must be one of 'vertical_stripes'"),
        ({"shape": "circle"}, "shape must be one of"),
        ({"signs": "all"}, "signs must be one of"),
        ({"update": "eta_single"}, "update and formula must be left out for the norm linf"),
        ({"formula": "reference"}, "update and formula must be left out"),
        ({"restarts": 0}, "restarts must be >= 1"),
        ({"loss": "margin"}, "loss must be a function"),
        ({"threat": ThreatModel(L1(), 1.0)}, "threat must have the norm linf or l2, got l1"),
        (
            {"threat": FREE_L2, "shape": "random"},
            "shape and signs must be left out for the norm l2",
        ),
        ({"threat": FREE_L2, "init_tiles": 0}, "init_tiles must be >= 1"),
        ({"threat": "linf"}, "threat must be a ThreatModel"),
    ],
)
def test_bad_arguments(plain_calls, options, message):
    with pytest.raises(ValueError, match=message):
        square(**({"threat": LINF} | options))


@pytest.mark.parametrize(
    ("threat", "shape", "message"),
    [
        (LINF, (2, 8), r"x must be images \(n, h, w, c\) with h, w >= 1, got shape \(2, 8\)"),
        (FREE_L2, (2, 2, 8, 1), "h, w >= 3"),
    ],
)
def test_bad_inputs(plain_calls, threat, shape, message):
    with pytest.raises(ValueError, match=message):
        square(threat, queries=2)(linear(shape[1:]), KEY, images(shape), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="x must lie in"):
        square(LINF, queries=2)(linear((4, 4, 1)), KEY, 2 + images((2, 4, 4, 1)), jnp.zeros(2, int))
