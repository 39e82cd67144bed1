import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks.fourier import fourier_linear
from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.metrics.margins import (
    binary_margin,
    bisect_max_eps,
    linear_margin,
    max_eps,
    multiclass_margin,
    near_clean,
    no_error,
)
from robustjax.norms import L1, L2, LInf

NORMS = [LInf(), L2(), L1(), FourierLInf()]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
GRID = np.arange(17) * 0.5 / 255


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def separable(n=30, d=8):
    """Points with labels that a linear model classifies, all with some margin."""
    w, x = draw((d,)), draw((n, d), 1)
    y = jnp.sign(x @ w)
    return w, x + 0.2 * y[:, None] * w / jnp.linalg.norm(w), y


# The largest eps of a protocol.


def test_criteria():
    assert no_error(1.0) and not no_error(1 - 1e-5)
    assert no_error(float(jnp.mean(jnp.ones(7))))
    criterion = near_clean(0.95)
    assert criterion(0.94) and criterion(np.float32(0.94)) and not criterion(0.9399)
    assert near_clean(0.5, drop=0.0)(0.5) and not near_clean(0.5, drop=0.0)(0.499)


def test_max_eps_and_the_stricter_reading():
    table = dict(zip([0.0, 0.1, 0.2, 0.3], [1.0, 0.9, 1.0, 0.2], strict=True))
    asked = []

    def accuracy(eps):
        asked.append(eps)
        return table[eps]

    assert max_eps(accuracy, [0.3, 0.0, 0.2, 0.1]) == 0.2
    assert asked == [0.3, 0.2]
    asked.clear()
    assert max_eps(accuracy, list(table), all_smaller=True) == 0.0
    assert asked == [0.0, 0.1]
    assert max_eps(accuracy, list(table), near_clean(1.0, drop=0.1), all_smaller=True) == 0.2
    assert max_eps(lambda eps: 0.5, [0.0, 0.1]) is None
    assert max_eps(lambda eps: 0.5, [0.0, 0.1], all_smaller=True) is None


def test_the_protocol_of_cifar():
    def accuracy(eps):
        return 0.93 - 2 * eps

    assert max_eps(accuracy, GRID, near_clean(accuracy(0))) == pytest.approx(
        1 / 255
    )  # 1.275 pixels


def attacked_accuracy(w, x, y):
    def accuracy(eps):
        z = (x + fourier_linear(w, y, eps)) @ w
        return float(np.mean(np.asarray(y * z) > 0))

    return accuracy


def test_the_attack_finds_the_margin_up_to_the_grid():
    """Largest eps without error under the closed-form attack, and the margin it must agree with."""
    w, x, y = separable()
    margin = float(jnp.min(y * (x @ w)) / FourierL1().value(w))
    grid = np.linspace(0, 2 * margin, 21)
    resolution = grid[1]
    found = max_eps(attacked_accuracy(w, x, y), grid)
    assert margin - resolution <= found <= margin + resolution
    strict = max_eps(attacked_accuracy(w, x, y), grid, all_smaller=True)
    assert strict == found


def test_bisection_finds_it_to_its_tolerance():
    w, x, y = separable()
    margin = float(jnp.min(y * (x @ w)) / FourierL1().value(w))
    found = bisect_max_eps(attacked_accuracy(w, x, y), 0.0, 1.0, tolerance=1e-5)
    assert found == pytest.approx(margin, abs=2e-5)
    exact = bisect_max_eps(lambda eps: float(eps < 1 / 3), 0, 1, tolerance=1e-12)
    assert 0 <= 1 / 3 - exact <= 1e-12
    assert bisect_max_eps(lambda eps: 1.0, 0.0, 0.7) == 0.7
    assert bisect_max_eps(lambda eps: 0.0, 0.0, 0.7) is None
    # A tolerance finer than the numbers ends too.
    assert bisect_max_eps(lambda eps: float(eps < 0.3), 0, 1, tolerance=1e-300) < 0.3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: max_eps(lambda eps: 1.0, []), "at least one eps"),
        (lambda: max_eps(lambda eps: 1.0, [-0.1]), "grid must be >= 0, got -0.1"),
        (lambda: max_eps(0.9, [0.1]), "accuracy must be a function"),
        (lambda: max_eps(lambda eps: 1.0, [0.1], "no_error"), "criterion must be a function"),
        (lambda: near_clean(95), "clean must be <= 1, got 95"),
        (lambda: bisect_max_eps(lambda eps: 1.0, 1.0, 0.5), "upper must be >= 1, got 0.5"),
        (lambda: bisect_max_eps(lambda eps: 1.0, 0, 1, tolerance=0.0), "tolerance must be > 0"),
        (lambda: linear_margin(jnp.ones(3), jnp.ones((2, 4)), L2()), r"got \(3,\) and \(2, 4\)"),
        (lambda: linear_margin(jnp.ones(3), jnp.ones((3, 4)), "l2"), "norm must be a norm"),
        (lambda: linear_margin(jnp.ones(3), jnp.ones((3, 4)), L2(), cap=-1.0), "cap must be >= 0"),
        (lambda: binary_margin(jnp.sum, jnp.ones((2, 3)), jnp.ones(2), L2()), "phi.x. must have"),
        (
            lambda: multiclass_margin(lambda x: x, jnp.ones((2, 3)), jnp.array([0, 3]), L2()),
            r"y must lie in 0 .. 2",
        ),
    ],
)
def test_what_is_refused(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()


# Margins by gradient.


@every_norm
def test_exact_for_linear_models(norm):
    """``y (w . x + b) / ||w||_*``, signed, whatever the scale; capped."""
    w, x, _ = separable()
    y = jnp.sign(draw((30,), 3))  # some of them wrong
    expected = y * (x @ w + 0.1) / norm.dual.value(w)
    for scale in (1.0, 100.0):
        margin = binary_margin(lambda x, s=scale: s * (x @ w + 0.1), x, y, norm)
        np.testing.assert_allclose(margin, expected, rtol=1e-5, atol=1e-6)
    assert np.any(margin < 0) and np.any(margin > 0)
    capped = binary_margin(lambda x: x @ w + 0.1, x, y, norm, cap=0.05)
    np.testing.assert_allclose(capped, np.minimum(expected, 0.05), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [LInf(), FourierLInf()], ids=lambda norm: norm.name)
def test_exact_for_linear_classifiers_of_several_classes(norm):
    """The nearest of the hyperplanes to the other classes; two classes are the binary case."""
    w, x, y = draw((8, 4)), draw((12, 8), 1), jnp.arange(12) % 4
    z = x @ w
    expected = np.full(12, np.inf)
    for i, k in itertools.product(range(12), range(4)):
        if k != y[i]:
            size = norm.dual.value(w[:, y[i]] - w[:, k])
            expected[i] = min(expected[i], (z[i, y[i]] - z[i, k]) / size)
    margin = jax.jit(lambda x: multiclass_margin(lambda x: 7 * (x @ w), x, y, norm))(x)
    np.testing.assert_allclose(margin, expected, rtol=1e-4, atol=1e-6)
    two = multiclass_margin(lambda x: x @ w[:, :2], x, y % 2, norm, cap=0.3)
    sign = 1.0 - 2 * (y % 2)
    binary = binary_margin(lambda x: x @ (w[:, 0] - w[:, 1]), x, sign, norm, cap=0.3)
    np.testing.assert_allclose(two, binary, rtol=1e-5, atol=1e-6)


def test_exact_for_relu_networks_inside_one_activation_region():
    """The l_inf ball lies in one region if its corners have one pattern: units are affine."""
    w1, b1, w2 = draw((3, 6)), draw((6,), 1), draw((6,), 2)

    def phi(x):
        return jax.nn.relu(x @ w1 + b1) @ w2

    x = draw((200, 3), 3)
    y = np.sign(phi(x))
    margin = np.asarray(binary_margin(phi, x, y, LInf()))
    corners = np.array(list(itertools.product((-1, 1), repeat=3)), np.float32)
    output, x, checked = jax.jit(phi), np.asarray(x), 0
    for i in np.flatnonzero(np.isfinite(margin) & (margin > 0)):
        ball = x[i] + 1.01 * margin[i] * corners
        patterns = np.asarray(ball) @ np.asarray(w1) + np.asarray(b1) > 0
        if not np.all(patterns == patterns[0]):
            continue
        checked += 1
        # In the region phi is affine: its smallest value on the ball is at a corner.
        just_in = y[i] * output(x[i] + 0.999 * margin[i] * corners)
        just_out = y[i] * output(x[i] + 1.001 * margin[i] * corners)
        assert just_in.min() > 0 > just_out.min()
    assert checked > 20


@pytest.mark.parametrize("norm", [LInf(), FourierLInf()], ids=lambda norm: norm.name)
def test_saturation_overstates_and_growth_understates(norm):
    """tanh(u): sinh(2u)/2 in place of u; sinh(u): tanh(u) in place of u (all over a ||w||_*)."""
    w, x, y = separable()
    a = 0.7
    u = a * y * (x @ w)
    size = a * norm.dual.value(w)
    over = binary_margin(lambda x: jnp.tanh(a * (x @ w)), x, y, norm)
    clear = np.asarray(u) < 3  # beyond, 1 - tanh(u)^2 is lost in rounding
    np.testing.assert_allclose(over[clear], (jnp.sinh(2 * u) / 2 / size)[clear], rtol=2e-3)
    assert np.all(over >= u / size) and clear.sum() > 15
    under = binary_margin(lambda x: jnp.sinh(a * (x @ w)), x, y, norm)
    np.testing.assert_allclose(under, jnp.tanh(u) / size, rtol=1e-4)
    assert np.all(under < u / size)


def test_without_a_gradient():
    value, gradient = jnp.array([2.0, -2.0, 0.0, 1.0]), jnp.zeros((4, 3)).at[3, 0].set(2)
    np.testing.assert_array_equal(linear_margin(value, gradient, L2()), [jnp.inf, -jnp.inf, 0, 0.5])
    np.testing.assert_allclose(
        linear_margin(value, gradient, L2(), cap=0.3), [0.3, -jnp.inf, 0, 0.3]
    )
