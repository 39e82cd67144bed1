import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.theory import sign_regions as sr
from robustjax.theory.sign_regions import Region, Start

RATIOS = (0.05, 0.15, 0.3, 1 / 3, 0.36, 0.45, 0.7, 1.0, 1.7, 3.0)
POINTS, STEPS = 800, 64
BAND = [r for r in Region if r > 0]
# One program each, for any ratio.
classify, steps_to_rest, memberships = map(jax.jit, (sr.classify, sr.steps_to_rest, sr.memberships))
classify_start, start_memberships, moved_bounds = map(
    jax.jit, (sr.classify_start, sr.start_memberships, sr.moved_bounds)
)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


@jax.jit
def run(a, b, ratio):
    """``(STEPS + 1, ...)`` values of a and b."""

    def move(state, _):
        state = sr.step(*state, ratio)
        return state, state

    _, (all_a, all_b) = jax.lax.scan(move, (a, b), None, length=STEPS)
    return jnp.concatenate([a[None], all_a]), jnp.concatenate([b[None], all_b])


@pytest.fixture(scope="module")
def walks():
    """For every ratio, from random points: a, b, region, steps to rest; all ``(time, points)``."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        found = {}
        for ratio in RATIOS:
            a = rng.uniform(-1, 1, POINTS)
            b = rng.uniform(-1, 1, POINTS) * rng.choice([0.5, max(2, 4 * ratio)], POINTS)
            a[:2], b[:2] = (0.4995, 0.999), (0.499, 0.0005)  # in R22 and in R12, near the edges
            path = run(jnp.asarray(a), jnp.asarray(b), ratio)
            labels = classify(*path, ratio), steps_to_rest(*path, ratio)
            found[ratio] = [np.asarray(v) for v in (*path, *labels)]
    return found


def test_a_step_moves_by_the_printed_amounts():
    ratio = 0.4
    for a, b, move_a, move_b in (
        (2.0, 1.0, 1, 0),
        (1.0, 2.0, 1 / 3, ratio),
        (1.5, 1.5, 2 / 3, ratio / 2),
        (0.0, 2.0, 0, ratio),
        (0.0, 0.0, 0, 0),
    ):
        sides = np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
        new_a, new_b = sr.step(jnp.asarray(sides[0] * a), jnp.asarray(sides[1] * b), ratio)
        np.testing.assert_allclose(new_a, sides[0] * (a - move_a), atol=1e-15)
        np.testing.assert_allclose(new_b, sides[1] * (b - move_b), atol=1e-15)


def test_steps_towards_zero_end_below_the_largest_step():
    rng = np.random.default_rng(1)
    sizes = np.array([0.2, 0.5, 1.3])
    x, entered = rng.uniform(-20, 20, 500), np.zeros(500, bool)
    for _ in range(150):
        x = x - np.sign(x) * rng.choice(sizes, 500)
        assert not np.any(entered & (np.abs(x) > 1.3))
        entered |= np.abs(x) <= 1.3
    assert entered.all()


def test_a_reaches_the_band_and_stays():
    rng = np.random.default_rng(2)
    a, b = (jnp.asarray(rng.uniform(-20, 20, 400)) for _ in range(2))
    for ratio in (0.1, 1.0):
        size = np.abs(np.asarray(run(a, b, ratio)[0]))
        inside = size < 1
        assert inside[-1].all()
        assert np.all(inside[1:] | ~inside[:-1])


def test_regions_are_those_of_the_definitions():
    """Against the definitions written out, with every k up to 200."""
    rng = np.random.default_rng(3)
    multiples = np.arange(-200, 201)
    for ratio in (0.02, 0.2, 0.4, 1.0, 2.5):
        a, b = rng.uniform(-0.999, 0.999, 2000), rng.uniform(-3, 3, 2000)
        moved = np.abs(b[:, None] + multiples * ratio)
        even = (np.abs(a)[:, None] > moved) & (multiples % 2 == 0) & (multiples != 0)
        odd = (np.abs(a)[:, None] + moved < 1 / 3) & (multiples % 2 == 1)
        thirds = np.floor(np.abs(a) * 3)
        larger = np.abs(a) > np.abs(b)
        returns = (np.abs(a + 1) > np.abs(b)) & (np.abs(a - 1) > np.abs(b))
        expected = {
            Region.R11: (thirds == 2) & ~larger,
            Region.R12: (thirds == 2) & larger,
            Region.R21: (thirds == 1) & ~larger,
            Region.R22: (thirds == 1) & larger & returns,
            Region.R23: (thirds == 1) & larger & ~returns,
            Region.R31: (thirds == 0) & larger,
            Region.R32: (thirds == 0) & even.any(1),
            Region.R33: (thirds == 0) & odd.any(1),
            Region.R34: (thirds == 0) & ~larger & ~even.any(1) & ~odd.any(1),
        }
        got = memberships(jnp.asarray(a), jnp.asarray(b), ratio)
        assert list(got) == list(expected) == BAND
        for region, mask in expected.items():
            np.testing.assert_array_equal(got[region], mask, err_msg=f"{region!r}, {ratio}")
        # Together they cover the band; they are disjoint except for R31, R32 and R33.
        label = np.asarray(classify(jnp.asarray(a), jnp.asarray(b), ratio))
        assert np.isin(label, BAND).all()
        overlap = expected[Region.R32] & expected[Region.R33] & ~larger
        assert overlap.any() == (ratio < 1 / 3)
        assert expected[Region.R34].any() == (ratio > 1 / 3)
        # The least |k| of the definitions.
        size = np.abs(multiples)
        least = np.where(even | odd, size, 1000).min(1)
        least = np.where(larger, 0, least)
        resting = (thirds == 0) & (larger | even.any(1) | odd.any(1))
        steps = steps_to_rest(jnp.asarray(a), jnp.asarray(b), ratio)
        np.testing.assert_array_equal(steps, np.where(resting, least, -1))
        # Of one kind, k is unique for larger ratios only.
        several = ((even | odd).sum(1) > 1) & (thirds == 0) & ~larger
        assert several.any() == (ratio < 1 / 3)


def test_points_on_edges_have_no_region():
    a = jnp.asarray([1.0, 1 / 3, -2 / 3, 0.8, 1.5, -1.5])
    b = jnp.asarray([0.5, 0.1, 3.0, 0.8, 1.0, 9.0])
    label = classify(a, b, 1.0)
    np.testing.assert_array_equal(label, [Region.EDGE] * 4 + [Region.OUTSIDE] * 2)


NEXT = {
    Region.R11: (Region.R21, Region.R22, Region.R23),
    Region.R12: (Region.R31, Region.R32, Region.R33, Region.R34),
    Region.R21: (Region.R31, Region.R32, Region.R33, Region.R34),
    Region.R22: (Region.R22,),
    Region.R23: (Region.R21,),
    Region.R31: (Region.R12,),
    Region.R32: (Region.R31, Region.R32, Region.R33),
    Region.R33: (Region.R31, Region.R32),
    Region.R34: (Region.R34,),
}


def test_transitions(walks):
    seen = {region: set() for region in BAND}
    for *_, label, _ in walks.values():
        assert np.isin(label, BAND).all()
        for pair in np.unique(100 * label[:-1] + label[1:]):
            seen[Region(pair // 100)].add(Region(pair % 100))
    assert seen == {region: set(after) for region, after in NEXT.items()}


def test_every_walk_ends_in_one_of_three_cycles(walks):
    transient = (Region.R11, Region.R12, Region.R21, Region.R23)
    longest = 0
    for ratio, (a, b, label, rest) in walks.items():
        # Stationary within three steps: R11, R23, R21, then R3.
        stationary = ~np.isin(label, transient)
        first = stationary.argmax(0)
        longest = max(longest, first.max())
        assert first.max() <= 3
        # From then on a alternates in sign; two steps change it only on the way to R31.
        after = np.arange(STEPS + 1)[:, None] >= first
        assert np.all((a[1:] * a[:-1] < 0)[after[:-1]])
        entering = np.isin(label[:-2], (Region.R32, Region.R33)) & (label[1:-1] == Region.R31)
        assert entering.any()
        growth = np.abs(a[2:]) - np.abs(a[:-2])
        np.testing.assert_allclose(growth[entering], 2 / 3, rtol=1e-12)
        assert np.abs(growth[after[:-2] & ~entering]).max() < 1e-12
        # Where b rests: R22 for ever, or R31 and R12 in turn; else R34, b alternating.
        end = label[-1]
        still = np.abs(b[-1] - b[-2]) < 1e-12
        swinging = (np.abs(b[-1] - b[-3]) < 1e-12) & (b[-1] * b[-2] < 0)
        in_cycle = np.isin(end, (Region.R22, Region.R31, Region.R12))
        np.testing.assert_array_equal(still, in_cycle)
        np.testing.assert_array_equal(~still, end == Region.R34)
        assert np.all(swinging | still)
        assert (end == Region.R34).any() == (ratio > 1 / 3 + 1e-9)
        # R32 and R33 come to rest when they are said to, |b| falling by the ratio until then.
        moving = np.isin(label, (Region.R32, Region.R33))
        assert np.all(rest[moving] >= 1)
        np.testing.assert_array_equal(rest[1:][moving[:-1]], rest[:-1][moving[:-1]] - 1)
        still_far = moving[:-1] & (rest[:-1] > 1)
        fall = np.abs(b[:-1]) - np.abs(b[1:])
        np.testing.assert_allclose(fall[still_far], ratio, rtol=1e-9)
        assert np.all(rest[label == Region.R31] == 0)
        assert np.all(rest[label == Region.R34] == -1)
    assert longest == 3


def test_the_worst_way_into_the_stationary_regions_takes_three_steps():
    a, b = run(jnp.asarray([0.9]), jnp.asarray([1.0]), 0.5)
    names = [Region.R11, Region.R23, Region.R21]
    np.testing.assert_array_equal(classify(a, b, 0.5)[:3, 0], names)
    assert classify(a, b, 0.5)[3, 0] // 10 == 3


def test_asymptotic_bounds_and_how_the_printed_ones_fail(walks):
    worst_a, worst_b = 0, 0
    for ratio, (a, b, *_) in walks.items():
        variances = jnp.asarray([1.0, ratio, 0.0])
        last_a, last_b = np.abs(a[-4:]).max(), np.abs(b[-4:]).max()
        bound, printed = sr.limits(variances, 1.0), sr.limits(variances, 1.0, printed=True)
        assert last_a < bound.a
        assert last_b <= bound.b
        worst_a, worst_b = (
            max(worst_a, last_a / printed.a),
            max(worst_b, last_b / printed.b),
        )
        if ratio < 1 / 2:  # a constant b comes close to 1/2, whatever s1 is
            assert last_b > max(printed.b, 0.997 * bound.b)
        else:
            assert last_b <= printed.b
        np.testing.assert_allclose(bound.error_0, 3**0.5)
        np.testing.assert_allclose(bound.error_1, 2**0.5 * max(1, 1 / (2 * ratio)))
        np.testing.assert_allclose(printed.error_0, 2 / 3**0.5)
        np.testing.assert_allclose(printed.error_1, 2**0.5)
        risk = 3 / 2 + ratio * max(1, 1 / (2 * ratio)) ** 2
        np.testing.assert_allclose(bound.risk, risk)
    np.testing.assert_allclose([worst_a, worst_b], [1.5, 10], rtol=3e-3)


def test_partial_sums_of_signs_stay_below_two(walks):
    largest_from_the_start = 0
    for a, *_ in walks.values():
        signs = np.sign(a)
        assert np.abs(np.cumsum(signs[1:], 0)).max() <= 2
        largest_from_the_start = max(largest_from_the_start, np.abs(np.cumsum(signs, 0)).max())
    assert largest_from_the_start == 3


def starting_points(ratio, rng):
    a, b = (rng.uniform(0, 12, 4000) * rng.choice([-1, 1], 4000) for _ in range(2))
    return jnp.asarray(a), jnp.asarray(b)


@pytest.mark.parametrize("ratio", [0.05, 1 / 9, 0.3, 0.4, 1.0, 3.0, 9.0])
def test_how_often_the_irrelevant_weight_moves(ratio):
    a, b = starting_points(ratio, np.random.default_rng(4))
    all_a, all_b = map(np.abs, run(a, b, ratio))
    outside = all_a >= 1
    assert not outside[-1].any()
    n, total = (outside & (all_a <= all_b)).sum(0), outside.sum(0)
    low, high = map(np.asarray, moved_bounds(a, b, ratio))
    start = np.asarray(classify_start(a, b, ratio))
    names = [Start.P1, Start.P2, *((Start.P3, Start.P4) if ratio > 1 / 3 else (Start.P5, Start.P6))]
    np.testing.assert_array_equal(np.unique(start), names)
    assert np.all((low <= n) & (n <= high))
    assert np.all(total[start == Start.P1] == 0)
    assert np.all(n[start == Start.P2] == 0)
    every = np.isin(start, (Start.P3, Start.P5))
    np.testing.assert_array_equal(n[every], total[every])
    np.testing.assert_array_equal(n[every], np.ceil(3 * (np.abs(a) - 1))[every])
    # The printed counts of P4 and P6, without slack, fail.
    size = np.abs(b)
    if ratio > 1 / 3:
        excess = (n - (size - 1) / ratio)[start == Start.P4]
        assert excess.max() > 0
        assert (excess.max() < 1) == (ratio < 7 / 3)
        assert (n - (size - 2) / ratio)[start == Start.P4].min() > 0
    else:
        slack = (n - 3 * (size - 1))[start == Start.P6]
        assert slack.min() > -3 and slack.max() < 1
        assert np.abs(slack).max() > 2


@pytest.mark.parametrize("ratio", [0.2, 0.4, 1.0, 3.0])
def test_where_starts_lead(ratio):
    a, b = starting_points(ratio, np.random.default_rng(5))
    now = start_memberships(a, b, ratio)
    then = start_memberships(*sr.step(a, b, ratio), ratio)
    leads_to = {
        Start.P1: (Start.P1,),
        Start.P2: (Start.P1, Start.P2),
        Start.P3: (Start.P1, Start.P3),
        Start.P4: (Start.P1, Start.P2, Start.P3, Start.P4),
        Start.P5: (Start.P1, Start.P5),
        Start.P6: (Start.P1, Start.P5, Start.P6),
        Start.P31: (Start.P1, Start.P3),
        Start.P41: (Start.P1,),
        Start.P42: (Start.P31,),
    }
    for start, ends in leads_to.items():
        reached = np.logical_or.reduce([then[end] for end in ends])
        assert np.all(reached[np.asarray(now[start])]), start
    if ratio == 1:
        assert now[Start.P41].any() and now[Start.P42].any()
        assert np.all(now[Start.P31] <= now[Start.P3])
        for start in (Start.P41, Start.P42):
            assert np.all(now[start] <= now[Start.P4])


def test_one_program_for_many_ratios():
    rng = np.random.default_rng(6)
    a, b = (jnp.asarray(rng.uniform(-1, 1, 50)) for _ in range(2))
    ratios = jnp.asarray([0.2, 1.0])
    together = jax.vmap(classify, in_axes=(None, None, 0))(a, b, ratios)
    for ratio, label in zip((0.2, 1.0), together, strict=True):
        np.testing.assert_array_equal(label, classify(a, b, ratio))


def test_bad_input(plain_calls):
    one = jnp.ones(3)
    with pytest.raises(ValueError, match="ratio must be > 0, got -1"):
        sr.classify(one, one, -1.0)
    with pytest.raises(ValueError, match="ratio must be > 0, got 0"):
        sr.moved_bounds(one, one, 0.0)
    with pytest.raises(ValueError, match="three frequencies"):
        sr.limits(jnp.ones(4), 0.1)
    with pytest.raises(ValueError, match="first two variances"):
        sr.limits(jnp.asarray([1.0, 0.0, 0.0]), 0.1)
    with pytest.raises(ValueError, match="learning_rate must be > 0"):
        sr.limits(one, 0.0)
