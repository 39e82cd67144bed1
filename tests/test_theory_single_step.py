import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks import fgsm_rs
from robustjax.norms import LInf
from robustjax.theory.single_step import (
    activation_bound,
    alignment_bounds,
    grad_align_weight,
    network_input_gradient,
    random_network_alignment,
    random_start_rms,
    single_filter_alignment,
)
from robustjax.threat import ThreatModel

KEY = jax.random.key(0)
EPS = 8 / 255
P = 27  # a patch of 3 x 3 pixels with 3 channels
Z = np.random.default_rng(0).uniform(size=(4000, P))
NOISE = np.random.default_rng(1).uniform(-1, 1, size=(4000, P))


# Lemma 1


def test_root_mean_square_of_a_random_start_and_a_step():
    steps = np.array([0, 0.5, 1, 1.25, 1.5, 2])
    values = [0.57735, 0.66144, 0.81650, 0.88829, 0.94648, 1]
    np.testing.assert_allclose(random_start_rms(EPS, steps * EPS), EPS * np.array(values), 1e-5)
    assert random_start_rms(EPS, 1.25 * EPS) * 255 == pytest.approx(7.1063, abs=1e-4)
    assert random_start_rms(EPS, 0) == pytest.approx(EPS / math.sqrt(3))
    assert random_start_rms(EPS, 5 * EPS) == EPS
    grid = random_start_rms(1.0, np.linspace(0, 2, 101))
    assert np.all(np.diff(grid) > 0)


@pytest.mark.parametrize("step", [0.0, 0.5, 1.0, 1.25, 2.0, 3.0])
def test_root_mean_square_depends_on_the_sign_of_the_gradient(step):
    eta = EPS * (2 * (np.arange(100_000) + 0.5) / 100_000 - 1)  # midpoints: a quadrature
    moves = {"same": np.sign(eta), "opposite": -np.sign(eta), "independent": 1.0}
    squares = {}
    for name, sign in moves.items():
        squares[name] = np.square(np.clip(eta + step * EPS * sign, -EPS, EPS)).mean()
        found = random_start_rms(EPS, step * EPS, gradient_sign=name)
        np.testing.assert_allclose(found, math.sqrt(squares[name]), rtol=1e-4)
    assert squares["independent"] == pytest.approx((squares["same"] + squares["opposite"]) / 2)
    assert random_start_rms(1.0, 0.5, gradient_sign="opposite") == pytest.approx(0.2888, abs=2e-4)
    assert random_start_rms(1.0, 0.5, gradient_sign="same") == pytest.approx(0.8896, abs=3e-4)


def test_the_attack_on_a_linear_loss_has_the_length_of_the_lemma():
    n, d = 100, 3072
    w = jax.random.normal(jax.random.key(1), (d,))
    attack = fgsm_rs(ThreatModel(LInf(), EPS, -jnp.inf, jnp.inf))
    x = jnp.zeros((n, d))

    @jax.jit
    def lengths(key):
        logits_fn = lambda x: jnp.stack([x @ w, -(x @ w)], axis=1)  # noqa: E731
        x_adv = attack(logits_fn, jax.random.split(key, n), x, jnp.zeros(n, jnp.int32))
        return jnp.linalg.norm(x_adv, axis=1)

    found = np.asarray(lengths(KEY), np.float64) * 255 / math.sqrt(d)
    bound = random_start_rms(EPS, 1.25 * EPS) * 255
    error = found.std() / math.sqrt(n)
    assert abs(found.mean() - 7.105) < 4 * error < 0.002 * bound


# Lemma 2


def test_alignment_bounds_have_the_values_of_the_closed_forms():
    published = {  # eps: limit, Hoeffding, lemma
        8 / 255: (0.990, 0.947, 0.725),
        10 / 255: (0.988, 0.933, 0.693),
        0.1: (0.969, 0.832, 0.511),
    }
    for eps, values in published.items():
        np.testing.assert_allclose(alignment_bounds(Z, NOISE, eps), values, atol=1.5e-3)
    assert alignment_bounds(Z, NOISE, 0.06).limit == pytest.approx(0.981, abs=1e-3)
    assert alignment_bounds(Z, NOISE, 0.05).lemma == pytest.approx(0.653, abs=1.5e-3)


def test_alignment_bounds_are_ordered_and_tend_to_one():
    grid = [1e-6, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0]
    values = np.array([alignment_bounds(Z[:500], NOISE[:500], eps) for eps in grid])
    assert np.all(values[:, :-1] >= values[:, 1:]) and np.all(values >= 0.5)
    assert np.all(np.diff(values, axis=0) <= 0)
    np.testing.assert_allclose(values[0], 1, atol=1e-2)
    assert np.all(values[:5, :2] >= 0.8)  # the stated lemma is not: 0.51 for eps = 0.1
    assert alignment_bounds(Z, NOISE, 0) == (1, 1, 1)
    # Tiny angles are resolved: eps times the length of the noise across z, over that of z.
    z, noise = Z[:500], NOISE[:500]
    lengths = np.linalg.norm(z, axis=1)
    across = np.sqrt(np.square(noise).sum(axis=1) - ((noise * z).sum(axis=1) / lengths) ** 2)
    np.testing.assert_allclose(1 - values[0, 0], 1e-6 * np.mean(across / lengths) / np.pi, 1e-5)


def test_alignment_bounds_are_the_expectations_over_random_filters():
    eps, z, noise = 0.1, Z[:1], NOISE[:1]
    w = np.random.default_rng(2).normal(size=(400_000, P))
    square = np.square(w).sum(axis=1)
    a, b = (w @ z[0] >= 0), (w @ (z + eps * noise)[0] >= 0)
    direct = (square * a * b).mean() / math.sqrt((square * a).mean() * (square * b).mean())
    cosines = w @ z[0] / np.sqrt(square)
    hoeffding = 1 - (square * np.exp(-(cosines**2) / (2 * eps**2))).mean() / P
    lemma = 1 - math.sqrt(2 * np.exp(-(cosines**2) / eps**2).mean())
    found = alignment_bounds(z, noise, eps)
    np.testing.assert_allclose(found.limit, direct, atol=2e-3)
    np.testing.assert_allclose(found.hoeffding, hoeffding, atol=2e-3)
    np.testing.assert_allclose(found.lemma, max(lemma, 0.5), atol=4e-3)


def test_random_networks_approach_the_limit():
    limit = alignment_bounds(Z, NOISE, EPS).limit
    sizes = {"wide": (400, 64, 64, 0.001), "published": (100, 4, 1000, 0.003)}
    spread = {}
    for name, (patches, filters, samples, atol) in sizes.items():
        found = random_network_alignment(
            KEY, EPS, patches=patches, filters=filters, samples=samples
        )
        assert np.all(np.abs(found) <= 1 + 1e-5)
        assert found.mean() == pytest.approx(limit, abs=atol)
        spread[name] = float(found.std())
    assert spread["wide"] < 0.003 < spread["published"] < 0.03


def test_input_gradient_of_the_network_is_that_of_autodiff():
    rng = np.random.default_rng(3)
    w, u, z = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 5), (3, 7), (7, 5)))
    bias = jnp.asarray(rng.normal(size=3), jnp.float32)

    def network(z):
        return (u.T * jax.nn.relu(z @ w.T + bias)).sum()

    found = network_input_gradient(w, u, z, bias)
    np.testing.assert_allclose(found, jax.jit(jax.grad(network))(z), rtol=1e-5, atol=1e-6)
    # No variance of the weights changes an alignment: gradients scale with both.
    scaled = network_input_gradient(3 * w, 2 * u, z, 3 * bias)
    np.testing.assert_allclose(scaled, 6 * found, rtol=1e-5, atol=1e-5)


# One filter


def test_single_filter_identity_is_the_cosine_of_the_gradients():
    rng = np.random.default_rng(4)
    w, bias, u = rng.normal(size=4), -0.2, rng.normal(size=30)
    z = rng.normal(size=(30, 4))
    noisy = z + rng.uniform(-0.8, 0.8, size=z.shape)

    @jax.jit
    @jax.grad
    def gradient(z):  # of a loss whose derivative in f has one sign
        f = (u * jax.nn.relu(z @ w + bias)).sum()
        return jax.nn.softplus(0.1 * f)

    a, b = (np.ravel(gradient(jnp.asarray(v, jnp.float32))) for v in (z, noisy))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    found = single_filter_alignment(z @ w + bias, noisy @ w + bias, u)
    assert found == pytest.approx(cosine, rel=1e-5) and 0.1 < found < 0.95
    assert single_filter_alignment(z @ w, z @ w, u) == pytest.approx(1)
    assert single_filter_alignment(-np.ones(3), np.ones(3), np.ones(3)) == 1


def test_noise_destroys_the_alignment_of_a_laplace_filter_but_not_of_a_blur():
    side, eps = 60, 8 / 255
    grid = np.linspace(0, 2 * np.pi, side)
    image = 0.5 + 0.3 * np.sin(grid)[:, None] * np.cos(grid)
    noisy = image + np.random.default_rng(5).uniform(-eps, eps, size=image.shape)
    u = np.random.default_rng(6).normal(size=(side // 3) ** 2)
    laplace = np.array([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    cosines = {}
    for name, kernel, bias in (("laplace", laplace, -0.005), ("blur", np.ones((3, 3)) / 9, -0.5)):
        responses = [
            (v.reshape(side // 3, 3, side // 3, 3) * kernel[:, None]).sum((1, 3)).ravel() + bias
            for v in (image, noisy)
        ]
        cosines[name] = single_filter_alignment(*responses, u)
        share = np.mean(np.array(responses) >= 0, axis=1)
        if name == "laplace":
            assert 0 < share[0] < 0.15 and 0.3 < share[1] < 0.6
    assert cosines["blur"] > 0.95 and cosines["laplace"] < 0.5


def test_activation_bound_is_above_the_share_of_activations():
    w = np.random.default_rng(7).normal(size=9)
    eta = np.random.default_rng(8).uniform(-0.1, 0.1, size=(50_000, 9)) @ w
    gaps = np.linspace(0, 0.1 * np.abs(w).sum(), 20)
    bounds = activation_bound(gaps, 0.1, np.linalg.norm(w))
    shares = (eta >= gaps[:, None]).mean(axis=1)
    assert bounds.shape == (20,) and bounds[0] == 1 and np.all(shares <= bounds)
    np.testing.assert_allclose(activation_bound(0.3, 0.1, 1.5), math.exp(-2), rtol=1e-12)


# The weight of GradAlign

TABLE = {
    (0.2, 2.0): "0.03 0.04 0.05 0.06 0.08 0.11 0.15 0.20 0.27 0.36 0.47 0.63 0.84 1.12 1.50 2.00",
    (2.5, 4.0): "1.66 1.76 1.86 1.98 2.10 2.22 2.36 2.50 2.65 2.81 2.98 3.16 3.35 3.56 3.77 4.00",
}


@pytest.mark.parametrize("ends", TABLE)
def test_weights_are_those_of_the_table(ends):
    found = [f"{grad_align_weight(k / 255, *ends):.2f}" for k in range(1, 17)]
    assert " ".join(found) == TABLE[ends]
    traced = jax.jit(lambda eps: grad_align_weight(eps, *ends))(12 / 255)
    np.testing.assert_allclose(traced, math.sqrt(ends[0] * ends[1]), rtol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: random_start_rms(0.0, 0.1), "eps must be > 0"),
        (lambda: random_start_rms(0.1, -0.1), "step_size must be >= 0"),
        (lambda: random_start_rms(0.1, 0.1, gradient_sign="no"), "gradient_sign must be one of"),
        (lambda: alignment_bounds(Z[:, :1], NOISE[:, :1], 0.1), "z must be patches"),
        (lambda: alignment_bounds(Z, NOISE[:1], 0.1), "noise must have the shape of z"),
        (lambda: random_network_alignment(KEY, 0.1, dimension=1), "dimension must be >= 2"),
        (lambda: single_filter_alignment(Z[0], Z[1], Z[0, :2]), "outputs must have the shape"),
        (lambda: activation_bound(-1.0, 0.1, 1.0), "gap must be >= 0"),
        (lambda: grad_align_weight(0.1, 0.0, 1.0), "at_8 must be > 0"),
    ],
)
def test_refusals(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
