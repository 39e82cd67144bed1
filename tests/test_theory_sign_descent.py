import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import optim
from robustjax.theory import frequency_regression as fr
from robustjax.theory import sign_descent as sd
from robustjax.theory import sign_regions as sr
from robustjax.theory.frequency_regression import Population

ROOT3, ROOT2, ROOT6 = math.sqrt(3), math.sqrt(2), math.sqrt(6)
ETA = 1e-3


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def assert_close(got, expected, rtol=1e-12, atol=1e-13):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def population(s0, s1, *target):
    return Population(jnp.asarray([s0, s1, 0.0]), jnp.asarray(target, float))


def random_errors(n, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(n, 3))


# The printed table, relation last: the sign of |A| - |B|.
TABLE = {
    (1, 1, 1): (ROOT3, 0, 0, 1),
    (1, 1, -1): (ROOT3 / 3, ROOT2, -ROOT6 / 3, -1),
    (1, 1, 0): (2 * ROOT3 / 3, ROOT2 / 2, -ROOT6 / 6, 0),
    (1, -1, 1): (ROOT3 / 3, -ROOT2, -ROOT6 / 3, -1),
    (1, 0, 1): (2 * ROOT3 / 3, -ROOT2 / 2, -ROOT6 / 6, 0),
    (-1, 1, -1): (-ROOT3 / 3, ROOT2, ROOT6 / 3, -1),
    (-1, -1, 1): (-ROOT3 / 3, -ROOT2, ROOT6 / 3, -1),
    (-1, -1, -1): (-ROOT3, 0, 0, 1),
    (-1, -1, 0): (-2 * ROOT3 / 3, -ROOT2 / 2, ROOT6 / 6, 0),
    (-1, 0, -1): (-2 * ROOT3 / 3, ROOT2 / 2, ROOT6 / 6, 0),
    (0, 1, -1): (0, ROOT2, 0, -1),
    (0, -1, 1): (0, -ROOT2, 0, -1),
    (0, 0, 0): (0, 0, 0, 0),
}


def test_the_table_has_the_printed_rows():
    table = sd.sign_table()
    assert {tuple(row) for row in table.signs} == set(TABLE)
    assert len(table.signs) == 13
    for signs, update, relation in zip(*table, strict=True):
        *expected, order = TABLE[tuple(signs)]
        assert_close(update, expected)
        assert relation == order


def test_no_other_signs_occur():
    values = np.arange(-3, 4)
    found = {
        (np.sign(a), np.sign(a + b), np.sign(a - b)) for a, b in itertools.product(values, values)
    }
    assert found == set(TABLE)


def test_every_row_of_the_table_is_a_step():
    for signs, (*update, _) in TABLE.items():
        a = signs[0] + (signs[1] + signs[2]) / 2
        b = (signs[1] - signs[2]) * (1 if signs[1] * signs[2] < 0 else 1 / 2)
        if signs[1] * signs[2] == 0 and any(signs):  # a tie: a = +-b exactly
            a, b = signs[0], b * 2
        assert (np.sign(a), np.sign(a + b), np.sign(a - b)) == signs
        variances = jnp.asarray([1.0, math.sqrt(1.5), 0.0])  # then A = B for equal errors
        got = sd.table_direction(variances, jnp.asarray([a * ROOT3, b * ROOT2 / 1.5**0.5, 0.7]))
        if signs[1] * signs[2] or not any(signs):
            assert_close(got, update)


def test_three_forms_of_a_step_agree():
    variances = jnp.asarray([0.9, 0.4, 0.0])
    errors = jnp.asarray(random_errors(500))
    closed = sd.table_direction(variances, errors)
    assert_close(sd.direction(variances, errors), closed)
    # In space, with the gradient of the population.
    world = Population(variances, jnp.zeros(3))
    space = np.sign(fr.to_space(errors) @ fr.covariance(world))
    assert_close(fr.to_frequency(jnp.asarray(space)), closed)
    # And as the step of (a, b).
    moved = sd.coordinates(variances, errors - 0.1 * closed, 0.1)
    expected = sr.step(*sd.coordinates(variances, errors, 0.1), 0.4 / 0.9)
    assert_close(moved, expected, atol=1e-12)


@pytest.mark.parametrize("d", [1, 4, 9])
def test_any_number_of_frequencies(d):
    rng = np.random.default_rng(d)
    variances = jnp.asarray(rng.uniform(0, 1, d) * (np.arange(d) < max(1, d - 2)))
    target = jnp.asarray(rng.normal(size=d))
    start = jnp.asarray(rng.normal(size=d))
    path = fr.simulate(optim.sign_gd(0.05), Population(variances, target), start, steps=6)
    for now, then in itertools.pairwise(path):
        assert_close(then, now - 0.05 * sd.direction(variances, now - target))


def test_coordinates_are_the_scaled_projections():
    s0, s1, eta = 0.7, 0.2, 0.03
    errors = random_errors(5)
    a, b = sd.coordinates(jnp.asarray([s0, s1, 0.0]), jnp.asarray(errors), eta)
    assert_close(a * s0 * eta, ROOT3 / 3 * s0 * errors[:, 0])
    assert_close(b * s0 * eta, ROOT2 / 2 * s1 * errors[:, 1])


def test_errors_and_ties_are_almost_never_exactly_zero():
    """From random weights; from weights on the grid of the steps they are."""
    variances = jnp.asarray([1.0, 0.6, 0.0])
    path = fr.simulate(
        optim.sign_gd(0.05),
        Population(variances, jnp.zeros(3)),
        jnp.asarray(random_errors(1, seed=3)[0]),
        steps=400,
    )
    a, b = sd.coordinates(variances, path, 0.05)
    assert np.all(a != 0) and np.all(b != 0) and np.all(np.abs(a) != np.abs(b))
    a, _ = sr.step(jnp.asarray(1.0), jnp.asarray(0.5), 0.6)
    assert a == 0


@functools.cache
def passages():
    """Random starts, several variances: the passage, and the errors of the 40 steps after it."""
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        n = 600
        ratio = rng.choice([0.05, 0.2, 0.4, 1.0, 2.5], n)
        variances = jnp.asarray(np.stack([np.full(n, 0.8), 0.8 * ratio, np.zeros(n)], 1))
        world = Population(variances, jnp.asarray(rng.normal(size=(n, 3))))
        start = jnp.asarray(rng.normal(size=(n, 3)))

        def run(world, start):
            passage = sd.enter_band(world, start, 0.02)

            def move(weights, _):
                weights = weights - 0.02 * sd.table_direction(
                    world.variances, weights - world.target
                )
                return weights, weights

            return passage, jax.lax.scan(move, passage.weights, None, length=40)[1]

        return world, start, *jax.jit(jax.vmap(run))(world, start)


def test_the_drift_is_the_count_of_moves():
    world, start, passage, _ = passages()
    moved = passage.weights[:, 2] - start[:, 2]
    expected = np.sign(start[:, 0] - world.target[:, 0]) * sd.DRIFT * 0.02 * passage.moved
    assert_close(moved, expected)
    assert_close(sd.DRIFT, ROOT6 / 3)
    assert not np.any(passage.ties)
    a, b = sd.coordinates(world.variances, start - world.target, 0.02)
    ratio = world.variances[:, 1] / world.variances[:, 0]
    low, high = sr.moved_bounds(a, b, ratio)
    assert np.all((low <= passage.moved) & (passage.moved <= high))
    end, _ = sd.coordinates(world.variances, passage.weights - world.target, 0.02)
    assert np.abs(end).max() < 1
    assert np.all((passage.steps == 0) == (np.abs(a) < 1))


def test_ties_move_by_half():
    # With s0 = s1 and eta = 1, A = sqrt(3) / 3 e_0 and B = sqrt(2) / 2 e_1.
    start = jnp.asarray([2.5 * ROOT3, 2.5 * ROOT2, 0.0])
    a, b = sd.coordinates(jnp.asarray([1.0, 1.0, 0.0]), start, 1.0)
    if a != b:  # make the tie exact in floating point
        start = start.at[1].multiply(a / b)
        a, b = sd.coordinates(jnp.asarray([1.0, 1.0, 0.0]), start, 1.0)
    assert a == b
    passage = sd.enter_band(population(1.0, 1.0, 0.0, 0.0, 0.0), start, 1.0)
    assert passage.ties >= 1
    assert_close(passage.weights[2], sd.DRIFT * (int(passage.moved) - int(passage.ties) / 2))


def test_after_the_passage_the_weight_stays_close():
    *_, passage, after = passages()
    away = np.abs(after[:, :, 2] - passage.weights[:, None, 2])
    assert away.max() <= ROOT6 * 0.02 * (1 + 1e-9)
    assert_close(away.max(), ROOT6 * 0.02, rtol=1e-9)  # attained: the printed bound fails
    assert away.max() > 2 * ROOT6 / 3 * 0.02 * 1.4
    since = np.abs(after[:, 1:, 2] - after[:, :1, 2])
    assert since.max() <= 2 * ROOT6 / 3 * 0.02 * (1 + 1e-9)


def test_the_risk_at_the_end_is_within_its_limit():
    world, _, _, after = passages()
    end = Population(world.variances[:, None], world.target[:, None])
    risk = fr.standard_risk(end, after[:, -4:])
    bound = sr.limits(world.variances, 0.02)
    # Errors that started far away may still be on their way.
    close = np.abs(after - world.target[:, None])[:, -4:, 1].max(1) <= bound.error_1
    assert close.mean() > 0.3
    assert np.all(risk[close] <= bound.risk[close, None])
    assert np.all(np.abs(after - world.target[:, None])[..., 0] < bound.error_0[:, None])


# (s0, s1), target; T, n, final weight and its limit; ratio of the risks and its limit.
GOLDEN = {
    "P5": ((1, 0.3), (3, 10), 5194, 5194, -4.2433, -ROOT2 * 3, 1.1651, 1.16514),
    "P6": ((1, 0.3), (5, 10), 7126, 6360, -5.1954, -ROOT3 * 0.3 * 10, 1.2158, 1.216),
    "P5, steeper": ((1, 0.2), (2, 20), 3462, 3462, -2.8292, -ROOT2 * 2, 1.0196, 1.0198),
    "P4": ((1, 1), (3, 5), None, 3535, -2.8855, -5 / ROOT3, 1.2451, 1 + 25 / 3 / 34),
}
SIGN = optim.sign_gd(ETA)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_drifts_and_ratios(name):
    variances, target, steps, moved, weight, limit, ratio, predicted = GOLDEN[name]
    world, start = population(*variances, *target, 0), jnp.zeros(3)
    passage = sd.enter_band(world, start, ETA)
    if steps is not None:
        assert passage.steps == steps
    assert passage.moved == moved
    # The golden weight is that of the end, up to sqrt(6) eta further.
    assert abs(passage.weights[2] - weight) < ROOT6 * ETA + 5e-5
    assert_close(sd.drift(world.variances, start - world.target), limit)
    assert_close(passage.weights[2], limit, rtol=2e-3)
    assert_close(sd.risk_ratio(world, start), predicted, rtol=1e-4)
    end = fr.simulate(SIGN, world, start, steps=20_000, every=10_000)[-1]
    assert abs(end[2] - weight) < 1e-4
    reached = fr.reached_minimizer(world, start)
    found = fr.adversarial_risk(world, end, 0.1) / fr.adversarial_risk(world, reached, 0.1)
    assert_close(found, ratio, rtol=2e-3)
    norms = jnp.sum(end**2) / jnp.sum(reached**2)
    assert_close(norms, ratio, rtol=2e-4)


@pytest.mark.parametrize(
    "ratio, errors, size, low, high",
    [
        (0.2, (1.0, 20.0), ROOT2 * 1.0, -3, -2),  # P5
        (0.2, (5.0, 3.0), ROOT3 * 0.2 * 3.0, -6, -2),  # P6
        (0.9, (1.0, 9.0), ROOT2 * 1.0, -3, -2),  # P3
        (0.9, (5.0, 3.0), 3.0 / ROOT3, -2 / 0.9, 1 - 1 / 0.9),  # P4
        (4.0, (5.0, 3.0), 3.0 / ROOT3, -2 / 4, 5),  # P4
    ],
)
def test_the_drift_converges_to_its_limit(ratio, errors, size, low, high):
    """The difference, in moves of the irrelevant weight, does not depend on eta."""
    world = population(1.0, ratio, 0.0, 0.0, 0.0)
    for side_0, side_1 in ((1, 1), (-1, 1), (1, -1)):
        start = jnp.asarray([side_0 * errors[0], side_1 * errors[1], 0.0])
        assert_close(sd.drift(world.variances, start), side_0 * size)
        for eta in (1e-2, 1e-3):
            passage = sd.enter_band(world, start, eta)
            gap = (abs(passage.weights[2]) - size) / (sd.DRIFT * eta)
            assert low - 1e-6 < gap < high + 1e-6


def test_the_range_of_the_ratio_is_the_printed_one():
    for s1, target in ((0.3, (3.0, 10.0)), (0.3, (5.0, 10.0)), (0.2, (2.0, 20.0))):
        world = population(1.0, s1, *target, 0.0)
        total = target[0] ** 2 + target[1] ** 2
        if target[0] / ROOT3 < s1 * target[1] / ROOT2:
            expected = [1 + c * target[0] ** 2 / total for c in (1 / 2, 2)]
        else:
            expected = [1 + c * s1**2 * target[1] ** 2 / total for c in (3 / 4, 3)]
        assert_close(sd.risk_ratio_range(world), expected)
        assert_close(sd.risk_ratio(world, jnp.zeros(3)), expected[1])


def test_sign_descent_can_be_the_more_robust():
    """If the drift is towards zero, and less than twice as far as the weight is."""
    world = population(1.0, 0.3, 3.0, 10.0, 0.0)
    way = -3 * ROOT2
    for weight, better in ((0.4 * way, False), (-0.4 * way, False), (-0.6 * way, True)):
        start = jnp.asarray([0.0, 0.0, weight])
        assert (sd.risk_ratio(world, start) < 1) == better
        end = fr.simulate(SIGN, world, start, steps=20_000, every=10_000)[-1]
        reached = fr.reached_minimizer(world, start)
        found = jnp.sum(end**2) / jnp.sum(reached**2)
        assert (found < 1) == better
        assert_close(found, sd.risk_ratio(world, start), rtol=3e-3)


def test_the_passage_ends_where_rounding_swallows_the_steps():
    world = population(1.0, 0.3, 0.0, 0.0, 0.0)
    assert sd.enter_band(world, jnp.asarray([1e17, 0.0, 0.0]), 1e16).steps == 5
    stuck = sd.enter_band(world, jnp.asarray([1e18, 0.0, 0.0]), 10.0)
    assert stuck.weights[0] == 1e18
    assert stuck.steps == 1


def test_bad_input(plain_calls):
    one = jnp.ones(3)
    with pytest.raises(ValueError, match="three frequencies"):
        sd.coordinates(jnp.ones(4), jnp.ones(4), 0.1)
    with pytest.raises(ValueError, match="last of variances must be <= 0, got 1"):
        sd.table_direction(one, one)
    with pytest.raises(ValueError, match="first of variances must be > 0, got 0"):
        sd.drift(jnp.asarray([0.0, 1.0, 0.0]), one)
    with pytest.raises(ValueError, match="learning_rate must be > 0, got 0"):
        sd.enter_band(population(1.0, 1.0, 1, 1, 1), one, 0.0)
    with pytest.raises(ValueError, match="errors must have one entry per variance"):
        sd.direction(jnp.ones(4), one)


def test_the_transform_of_optax_is_the_same():
    world = population(1.0, 0.3, 3.0, 10.0, 0.0)
    start = jnp.asarray(random_errors(1)[0])
    ours = fr.simulate(optim.sign_gd(0.1), world, start, steps=50)
    family = optax.chain(
        optim.scale_by_adaptive_family(1.0, 1.0, 0.0), optax.scale_by_learning_rate(0.1)
    )
    for other in (optax.sign_sgd(0.1), family):
        assert_close(fr.simulate(other, world, start, steps=50), ours)
