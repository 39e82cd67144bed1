"""Closed forms against samples, limits, and the bounds that no rule passes."""

import numpy as np
import pytest
from scipy.stats import norm as gaussian

from robustjax import theory
from robustjax.norms import L1, L2, LInf
from robustjax.theory import trade_offs

WORLD = trade_offs.FeatureWorld(p=0.9, eta=0.2, d=100)


def test_rules_of_the_features_on_samples():
    x, y = WORLD.sample(np.random.default_rng(0), 40_000)
    assert x.shape == (40_000, 101)
    for eps in (0.0, 0.1, 0.4):
        attacked = x - eps * y[:, None]  # the worst for any rule of positive weights
        mean = np.mean(np.sign(attacked[:, 1:].mean(axis=1)) == y)
        assert mean == pytest.approx(WORLD.mean_accuracy(eps), abs=0.01)
        first = np.mean(np.sign(attacked[:, 0]) == y)
        assert first == pytest.approx(WORLD.first_accuracy(eps), abs=0.01)
    assert WORLD.first_accuracy(1.0) == 0


def test_what_makes_a_rule_accurate_makes_it_vulnerable():
    accuracies = [WORLD._replace(d=d).mean_accuracy() for d in (1, 10, 100, 1000)]
    assert accuracies == sorted(accuracies) and accuracies[-1] > 1 - 1e-9
    for d in (1, 10, 100, 1000):
        world = WORLD._replace(d=d)
        robust = world.mean_accuracy(2 * world.eta)
        assert robust == pytest.approx(1 - world.mean_accuracy())
        assert robust <= world.robust_bound(world.mean_accuracy()) + 1e-12
    assert WORLD.first_accuracy(0.4) <= WORLD.robust_bound(WORLD.first_accuracy()) + 1e-12
    assert WORLD.robust_bound(1.0) == 0


@pytest.mark.parametrize("eps", [0.0, 0.03, 0.05, 0.1, 0.3])
def test_errors_on_stripes_by_brute_force(eps):
    width, x = 0.1, (np.arange(20_000) + 0.5) / 20_000
    label = np.floor(x / width) % 2
    changes = width * np.arange(1, 10)
    at_risk = np.abs(x[:, None] - changes).min(axis=1) < eps
    found = trade_offs.stripe_errors(width, eps)
    assert found.natural == 0
    assert found.robust == pytest.approx(at_risk.mean(), abs=1e-3)
    assert trade_offs.stripe_errors(width, eps, rule="constant") == (0.5, 0.5)
    assert label.mean() == 0.5
    assert (found.robust == 1) == (eps >= width)


@pytest.mark.parametrize("norm", [LInf(), L2(), L1()])
def test_errors_of_a_linear_rule_on_gaussians(norm):
    rng = np.random.default_rng(1)
    w, theta = rng.normal(size=5), rng.normal(size=5)
    theta *= np.sign(w @ theta)
    found = trade_offs.gaussian_errors(w, theta, 1.3, 0.2, norm=norm)
    y = rng.choice([-1.0, 1.0], size=60_000)
    x = y[:, None] * theta + 1.3 * rng.normal(size=(60_000, 5))
    assert np.mean(y * (x @ w) < 0) == pytest.approx(found.natural, abs=0.01)
    worst = x - 0.2 * y[:, None] * np.asarray(norm.steepest(w.astype(np.float32)))
    assert np.mean(y * (worst @ w) < 0) == pytest.approx(found.robust, abs=0.01)
    assert trade_offs.gaussian_errors(3 * w, theta, 1.3, 0.2, norm=norm) == pytest.approx(found)


def test_robustness_needs_more_examples_than_accuracy():
    d = 400
    theta, rng = np.ones(d), np.random.default_rng(2)
    errors = {
        n: trade_offs.sample_mean_errors(rng, theta, 2.0, 0.5, examples=n, draws=20)
        for n in (1, 10, 100)
    }
    assert errors[1].natural < 0.01 < 0.2 < errors[1].robust
    assert errors[1].robust > errors[10].robust > errors[100].robust
    best = trade_offs.gaussian_errors(theta, theta, 2.0, 0.5)
    assert errors[100].robust == pytest.approx(best.robust, abs=0.01)


def test_the_boundary_is_near_in_every_dimension():
    rng = np.random.default_rng(3)
    for d, offset in ((1, 0.0), (50, 0.7)):
        v = rng.normal(size=d)
        v /= np.linalg.norm(v)
        distance = np.abs(rng.normal(size=(40_000, d)) @ v - offset)
        for radius in (0.0, 0.5, 2.0):
            expected = trade_offs.half_space_error(radius, offset=offset)
            assert np.mean(distance <= radius) == pytest.approx(expected, abs=0.01)
    assert trade_offs.half_space_error(1.0) == pytest.approx(2 * gaussian.cdf(1) - 1)
    assert trade_offs.half_space_error(3.0, lipschitz=3.0) == trade_offs.half_space_error(1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: WORLD._replace(p=1.0).mean_accuracy(), "p must be < 1, got 1.0"),
        (lambda: WORLD._replace(d=0).mean_accuracy(), "d must be >= 1, got 0"),
        (lambda: WORLD.robust_bound(1.5), "accuracy must be <= 1, got 1.5"),
        (lambda: trade_offs.stripe_errors(1 / 3, 0.1), "must be an even number, got 3.0"),
        (lambda: trade_offs.stripe_errors(0.1, 0.1, rule="best"), "rule must be one of"),
        (lambda: trade_offs.gaussian_errors(np.zeros(2), np.ones(2), 1.0, 0.1), "length of w"),
        (lambda: trade_offs.half_space_error(-1.0), "radius must be >= 0"),
    ],
)
def test_refusals(call, message):
    assert theory.trade_offs is trade_offs
    with pytest.raises(ValueError, match=message):
        call()
