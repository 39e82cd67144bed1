"""Carlini & Wagner and DeepFool against closed forms and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks.minimum_norm import carlini_wagner, deepfool
from robustjax.metrics import correct
from robustjax.norms import L1, L2, LInf, Lp
from robustjax.threat import ThreatModel

NORMS = (LInf(), L2(), L1())
OPEN = (-jnp.inf, jnp.inf)
KEY = jax.random.key(0)
N, D, K = 12, 6, 4
X = jax.random.uniform(jax.random.key(1), (N, D), minval=0.3, maxval=0.7)
W = jax.random.normal(jax.random.key(2), (D, K))
B = -0.5 * W.sum(axis=0) + 0.05 * jax.random.normal(jax.random.key(3), (K,))


def linear(x):
    return x @ W + B


Y = jnp.argmax(linear(X), axis=1).astype(jnp.int32)


def binary(x):
    """Of two classes: their margin is one hyperplane, where the largest of several is not."""
    return linear(x)[:, :2]


def distances(norm):
    """To the boundary of each class, without a box; inf for the label."""
    own, f = jnp.arange(N), linear(X)
    w = W.T[None] - W.T[Y][:, None]
    size = norm.dual.value(w, batch_ndim=2).at[own, Y].set(1)
    return ((f[own, Y][:, None] - f) / size).at[own, Y].set(jnp.inf)


def run(attack, logits_fn=linear, x=X, y=Y):
    return jax.jit(lambda x, y: attack(logits_fn, KEY, x, y))(x, y)


def relu_net(x):
    draws = jax.random.split(jax.random.key(6), 4)
    w1, w2 = jax.random.normal(draws[0], (2, 16)), jax.random.normal(draws[1], (16, 3))
    b1, b2 = jax.random.normal(draws[2], (16,)), jax.random.normal(draws[3], (3,))
    return jax.nn.relu((2 * x - 1) @ w1 + b1) @ w2 + b2


@functools.cache
def plane():
    """Points of the unit square, and the distances to the nearest other class on a grid."""
    side = 401
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, side)] * 2), axis=-1).reshape(-1, 2)
    classes = jnp.argmax(relu_net(grid), axis=1)
    x = jax.random.uniform(jax.random.key(7), (24, 2))
    y = jnp.argmax(relu_net(x), axis=1).astype(jnp.int32)
    assert len(np.unique(classes)) == 3

    def brute(norm):
        lengths = norm.value(grid[None] - x[:, None], batch_ndim=2)
        return jnp.where(classes != y[:, None], lengths, jnp.inf).min(axis=1)

    return x, y, brute, 1 / (side - 1)


class TestDeepFool:
    @pytest.mark.parametrize(
        "norm, step, length",
        [(L2(), [-0.2, 0.4], 1 / np.sqrt(5)), (LInf(), [-1 / 3, 1 / 3], 1 / 3)],
        ids=["l2", "linf"],
    )
    def test_one_step_to_the_boundary_of_a_line(self, norm, step, length):
        w, x, y = jnp.array([1.0, -2.0]), jnp.array([[1.0, 0.0]]), jnp.array([0])

        def line(x):
            return jnp.stack([x @ w, jnp.zeros(len(x))], axis=1)

        threat = ThreatModel(norm, 1.0, *OPEN)
        _, state = run(deepfool(threat, steps=1, overshoot=0.0, has_aux=True), line, x, y)
        np.testing.assert_allclose(state.total, [step], rtol=1e-6)
        np.testing.assert_allclose(state.iterate, x + jnp.array([step]), rtol=1e-6)
        x_adv, state = run(deepfool(threat, steps=1, has_aux=True), line, x, y)
        np.testing.assert_allclose(state.distance, [1.02 * length], rtol=1e-6)
        np.testing.assert_allclose(x_adv, x + 1.02 * jnp.array([step]), rtol=1e-6)
        assert bool(state.done[0])

    @pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
    def test_one_step_to_the_nearest_boundary_of_an_affine_model(self, norm):
        exact = distances(norm).min(axis=1)
        eps = float(jnp.median(exact))
        threat = ThreatModel(norm, eps, *OPEN)
        x_adv, state = run(deepfool(threat, steps=1, has_aux=True))
        np.testing.assert_allclose(norm.value(state.total, batch_ndim=1), exact, rtol=1e-5)
        np.testing.assert_allclose(state.distance, 1.02 * exact, rtol=1e-5)
        assert not bool(jnp.any(correct(linear(state.x_min), Y)))
        inside = state.distance <= eps
        np.testing.assert_array_equal(x_adv, jnp.where(inside[:, None], state.x_min, X))
        assert 0 < int(inside.sum()) < N

    def test_classes_are_those_with_the_largest_logits(self):
        few = deepfool(ThreatModel(L2(), 1.0, *OPEN), classes=2, has_aux=True)
        runner_up = jnp.argsort(-linear(X), axis=1)[:, 1]
        _, state = run(few)
        np.testing.assert_array_equal(state.classes[:, 0], runner_up)
        to_it = distances(L2())[jnp.arange(N), runner_up]
        # It may cross another boundary on the way, in which case it is done there as well.
        np.testing.assert_allclose(state.distance, 1.02 * to_it, rtol=1e-5)

    @pytest.mark.parametrize("norm", NORMS[:2], ids=lambda n: n.name)
    def test_never_below_the_minimum_of_a_piecewise_linear_model(self, norm):
        x, y, brute, cell = plane()
        attack = deepfool(ThreatModel(norm, 1.0), steps=30, has_aux=True)
        _, state = run(attack, relu_net, x, y)
        exact, found = brute(norm), jnp.isfinite(state.distance)
        assert bool(jnp.all(state.distance >= exact - norm.value(jnp.full(2, cell))))
        assert float(found.mean()) > 0.8
        assert not bool(jnp.any(correct(relu_net(state.x_min), y) & found))
        assert bool(jnp.all((state.x_min >= 0) & (state.x_min <= 1)))
        np.testing.assert_array_equal(state.done, found)
        ratio = state.distance / jnp.maximum(exact, cell)
        assert float(jnp.median(ratio)) < 1.2

    def test_misclassified_examples_have_distance_zero_and_order_does_not_matter(self):
        attack = deepfool(ThreatModel(LInf(), 0.01), has_aux=True)
        y = Y.at[::3].set((Y[::3] + 1) % K)
        x_adv, state = run(attack, y=y)
        wrong = np.arange(N) % 3 == 0
        np.testing.assert_array_equal(state.distance == 0, wrong)
        np.testing.assert_array_equal(x_adv[wrong], X[wrong])
        _, other = run(attack, x=X[::-1], y=y[::-1])
        np.testing.assert_allclose(other.distance[::-1], state.distance, rtol=1e-5)


class TestCarliniWagner:
    def test_finds_the_minimum_of_a_binary_linear_model_within_the_open_box(self):
        f, y = binary(X), jnp.argmax(binary(X), axis=1).astype(jnp.int32)
        exact = jnp.abs(f[:, 0] - f[:, 1]) / jnp.linalg.norm(W[:, 0] - W[:, 1])
        eps = float(jnp.median(exact))
        options = {"steps": 250, "step_size": 0.005, "has_aux": True}
        x_adv, state = run(carlini_wagner(ThreatModel(L2(), eps), **options), binary, y=y)
        assert bool(jnp.all(state.distance >= exact * (1 - 1e-5)))
        np.testing.assert_allclose(state.distance, exact, rtol=0.02)
        assert bool(jnp.all((state.x_min > 0) & (state.x_min < 1)))
        assert not bool(jnp.any(correct(binary(state.x_min), y)))
        inside = state.distance <= eps
        np.testing.assert_array_equal(x_adv, jnp.where(inside[:, None], state.x_min, X))
        # The bracket of the binary search closes: after c = 1e-3, 0.01, 0.1 and 1, four rounds
        # that the state knows of have halved what was at most [0.1, 1].
        width = state.enough - state.too_small
        assert bool(jnp.all((width > 0) & (width < 0.9 / 2**4 + 1e-6)))
        early = carlini_wagner(ThreatModel(L2(), eps), early_stop=True, **options)
        _, stopped = run(early, binary, y=y)
        np.testing.assert_array_equal(stopped.done, state.distance <= eps)

    def test_targets_and_confidence(self):
        f, kappa = binary(X), 0.2
        size = jnp.linalg.norm(W[:, 0] - W[:, 1])
        target = jnp.argmin(f, axis=1).astype(jnp.int32)
        margin = jnp.abs(f[:, 0] - f[:, 1])
        threat = ThreatModel(L2(), 1.0)
        options = {"steps": 250, "step_size": 0.005, "confidence": kappa, "has_aux": True}
        attack = carlini_wagner(threat, targeted=True, **options)
        _, state = run(attack, binary, y=target)
        np.testing.assert_allclose(state.distance, (margin + kappa) / size, rtol=0.02)
        z, own = binary(state.x_min), jnp.arange(N)
        assert bool(jnp.all(z[own, target] - z[own, 1 - target] >= kappa))
        # An input that is there already, with the confidence asked for, stays as it is.
        x_adv, again = run(attack, binary, state.x_min, target)
        np.testing.assert_array_equal(x_adv, state.x_min)
        np.testing.assert_array_equal(again.distance, 0)
        assert bool(jnp.all(again.done))
        # Misclassified, but with less confidence than asked for: not yet a success.
        _, near = run(carlini_wagner(threat, **options), binary, X, target)
        np.testing.assert_array_equal(near.distance == 0, margin >= kappa)
        expected = jnp.maximum(kappa - margin, 0) / size
        np.testing.assert_allclose(near.distance, expected, rtol=0.02, atol=5e-4)
        assert 0 < int(near.done.sum()) < N

    def test_corners_of_the_box_and_half_precision(self):
        """tanh has no value 1: a corner starts just inside, and the box stays open."""
        x = jnp.round(X)
        y = jnp.argmax(linear(x), axis=1).astype(jnp.int32)
        attack = carlini_wagner(ThreatModel(L2(), 3.0), steps=150, step_size=0.1, has_aux=True)
        x_adv, state = run(attack, linear, x, y)
        found = jnp.isfinite(state.distance)
        assert bool(jnp.all(found))
        assert bool(jnp.all((state.x_min > 0) & (state.x_min < 1)))
        assert not bool(jnp.any(correct(linear(x_adv), y)))
        half = x.astype(jnp.bfloat16)
        logits_fn = functools.partial(lambda w, x: x @ w, W.astype(jnp.bfloat16))
        y = jnp.argmax(logits_fn(half), axis=1).astype(jnp.int32)
        x_adv, state = run(attack, logits_fn, half, y)
        assert x_adv.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(state.v)))
        assert bool(jnp.any(jnp.isfinite(state.distance)))

    def test_no_example_is_below_the_minimum_of_a_piecewise_linear_model(self):
        x, y, brute, cell = plane()
        attack = carlini_wagner(
            ThreatModel(L2(), 1.0), steps=150, step_size=0.05, initial_const=0.1, has_aux=True
        )
        _, state = run(attack, relu_net, x, y)
        exact = brute(L2())
        assert bool(jnp.all(state.distance >= exact - 1.5 * cell))
        assert float((state.distance <= 1.05 * exact + 2 * cell).mean()) > 0.8

    def test_logits_that_are_not_numbers_count_as_misclassified(self):
        def breaks(x):
            far = jnp.max(jnp.abs(x - X), axis=1, keepdims=True) > 1e-2
            return jnp.where(far, jnp.nan, linear(x))

        options = {"steps": 40, "search_steps": 5, "initial_const": 1.0, "has_aux": True}
        _, state = run(carlini_wagner(ThreatModel(L2(), 1.0), **options), breaks)
        assert bool(jnp.all(jnp.isfinite(state.distance)))
        assert not bool(jnp.any(correct(breaks(state.x_min), Y)))


@pytest.mark.parametrize(
    "make, options, message",
    [
        (deepfool, {"steps": 0}, "steps must be >= 1"),
        (deepfool, {"overshoot": -0.1}, "overshoot must be >= 0"),
        (deepfool, {"classes": 1}, "classes must be >= 2"),
        (deepfool, {"threat": ThreatModel(Lp(3), 1.0)}, "linf, l2 or l1 for this attack, got l3"),
        (carlini_wagner, {"threat": ThreatModel(LInf(), 1.0)}, "must be l2, got linf"),
        (carlini_wagner, {"threat": ThreatModel(L2(), 1.0, *OPEN)}, "lower must be finite"),
        (carlini_wagner, {"steps": 0}, "steps must be >= 1"),
        (carlini_wagner, {"search_steps": 0}, "search_steps must be >= 1"),
        (carlini_wagner, {"step_size": 0.0}, "step_size must be > 0"),
        (carlini_wagner, {"initial_const": 0.0}, "initial_const must be > 0"),
        (carlini_wagner, {"confidence": -1.0}, "confidence must be >= 0"),
    ],
)
def test_bad_input(make, options, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        make(**{"threat": ThreatModel(L2(), 1.0), **options})
