"""Linear networks: effective weights against direct sums, costs, invariants, and their bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.norms import L1, L2, LInf
from robustjax.optim import steepest_descent
from robustjax.theory import linear_networks as ln
from robustjax.theory import max_margin as mm
from robustjax.theory import robust_classifiers as rc

RNG = np.random.default_rng(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def signals(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def spectrum(w):
    return np.fft.fft(w, norm="ortho")


@pytest.mark.parametrize("d", [5, 6])
def test_layers_are_the_sums_and_products_of_spectra(d):
    w, x = signals(d), signals(3, d)
    k = np.arange(d)
    for layer, sign in ((ln.correlate, 1), (ln.convolve, -1)):
        direct = [
            [sum(w[sign * m % d] * row[(i + m) % d] for m in k) / d**0.5 for i in k] for row in x
        ]
        np.testing.assert_allclose(layer(w, x), direct, atol=1e-12)
        filtered = spectrum(w).conj() if sign == 1 else spectrum(w)
        np.testing.assert_allclose(spectrum(layer(w, x)), filtered * spectrum(x), atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("layer", [ln.correlate, ln.convolve])
def test_the_effective_weight_of_convolutions(layer, depth):
    layers, x = list(signals(depth, 7)), signals(4, 7)
    w = ln.convolutional_weight(layers, layer=layer)
    scores = ln.convolutional_scores(layers, x, layer=layer)
    np.testing.assert_allclose(scores, x @ w, atol=1e-12)
    if layer is ln.correlate:  # the statement of the paper: the convolution of the filters
        product = functools.reduce(ln.convolve, layers[:-1], layers[-1])
    else:  # as printed the others are reversed
        product = functools.reduce(lambda v, f: ln.convolve(jnp.roll(f[::-1], 1), v), layers[:-1],
                                   layers[-1])  # fmt: skip
    np.testing.assert_allclose(w, product, atol=1e-12)
    sizes = np.prod([np.abs(spectrum(v)) for v in layers], axis=0)
    np.testing.assert_allclose(np.abs(spectrum(w)), sizes, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_balanced_layers_are_the_cheapest(depth):
    w = signals(6)
    cost = float(ln.layers_cost(w, depth))
    sizes = np.abs(spectrum(w))
    assert cost == pytest.approx(depth * (sizes ** (2 / depth)).sum())
    layers = ln.balanced_layers(w, depth)
    assert float(jnp.sum(layers**2)) == pytest.approx(cost)
    for layer in (ln.correlate, ln.convolve):
        np.testing.assert_allclose(ln.convolutional_weight(layers, layer=layer), w, atol=1e-12)
    # Any other layers cost at least what their effective weight says.
    for _ in range(20):
        others = signals(depth, 6)
        least = float(ln.layers_cost(ln.convolutional_weight(others), depth))
        assert least <= float(jnp.sum(others**2)) + 1e-9
    if depth > 1:
        np.testing.assert_allclose(ln.spectral_imbalance(layers), 0, atol=1e-12)
    if depth == 2:
        assert cost == pytest.approx(2 * float(FourierL1().value(w)))


@functools.partial(jax.jit, static_argnames=("weight", "steps", "rate", "scaled"))
def train(layers, x, y, *, weight, steps, rate, scaled=False):
    """Gradient descent on the logarithm of the risk of a network."""
    links = [ln.scale_by_layers()] if scaled else []

    def risk(layers):
        return mm.log_exponential_risk(weight(layers), x, y)

    return mm.descend(optax.chain(*links, optax.sgd(rate)), risk, layers, steps)[0]


def teacher_data(n, d):
    rng = np.random.default_rng(0)
    w = rng.normal(size=d)
    x = rng.normal(size=(n, d))
    return jnp.asarray(x), jnp.asarray(np.sign(x @ w))


def test_two_convolutions_are_the_most_robust_to_fourier_perturbations():
    """Calibrated at d = 100: at least 0.98 of the optimum, linear classifiers well below."""
    x, y = teacher_data(3, 100)
    best = mm.max_margin(x, y, FourierLInf()).eps
    layers = ln.init_convolutional(jax.random.key(0), 100, scale=0.1)
    layers = train(layers, x, y, weight=ln.convolutional_weight, steps=20_000, rate=1e-3)
    w = ln.convolutional_weight(layers)
    assert 0.98 * best <= float(rc.largest_eps(w, x, y, FourierLInf())) <= best
    share = []
    for norm in (L2(), LInf(), L1()):
        other = mm.max_margin(x, y, norm.dual).w
        share.append(float(rc.largest_eps(other, x, y, FourierLInf())) / best)
    np.testing.assert_allclose(share, [0.55, 0.43, 0.16], atol=0.02)


def test_in_two_dimensions_two_convolutions_are_sign_descent():
    x, y = jnp.array([[2.0, 0.3], [-0.4, -1.5]]), jnp.array([1, -1])
    best = mm.max_margin(x, y, L1())
    fourier = mm.max_margin(x, y, FourierLInf())
    assert fourier.eps == pytest.approx(best.eps / np.sqrt(2), rel=1e-8)
    layers = [jnp.array([0.3, 0.1]), jnp.zeros(2)]
    layers = train(layers, x, y, weight=ln.convolutional_weight, steps=5000, rate=1e-3)
    w = ln.convolutional_weight(layers)
    assert float(rc.largest_eps(w, x, y, L1())) >= 0.99 * best.eps
    sign = steepest_descent(LInf(), float(mm.safe_step(x, LInf())), scale_by_dual_norm=True)
    risk = functools.partial(mm.log_exponential_risk, x=x, y=y)
    other = jit(lambda w: mm.descend(sign, risk, w, 2000)[0])(jnp.zeros(2))
    assert float(rc.largest_eps(other, x, y, L1())) >= 0.99 * best.eps


def test_gradient_flow_keeps_the_imbalance_of_spectra():
    x, y = teacher_data(3, 6)
    layers = list(jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)) / 2))
    before = ln.spectral_imbalance(layers)
    change = []
    for rate, steps in ((2e-2, 250), (5e-3, 1000)):
        after = train(layers, x, y, weight=ln.convolutional_weight, steps=steps, rate=rate)
        assert float(jnp.abs(after[0] - layers[0]).max()) > 0.1
        change.append(np.abs(ln.spectral_imbalance(after) - before).max())
    assert change[1] < 0.3 * change[0] < 0.3 * 0.05  # of the order of the step


def test_dense_layers_align_and_are_the_most_robust_in_l_2():
    x, y = teacher_data(4, 12)
    best = mm.max_margin(x, y, L2()).eps

    @jit
    def look(layers):
        w = ln.dense_weight(layers)
        error = jnp.abs(ln.dense_scores(layers, x) - x @ w).max()
        invariants = jnp.concatenate([v.ravel() for v in ln.layer_imbalances(layers)])
        return (
            rc.largest_eps(w, x, y, L2()),
            error,
            invariants,
            ln.rank_ratios(layers),
            ln.layer_alignments(layers),
        )

    layers = jit(lambda key: ln.init_dense(key, (12, 6, 5)))(jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(layers[0], axis=0), 1, rtol=1e-6)
    run = functools.partial(train, x=x, y=y, weight=ln.dense_weight)
    _, _, before, ratios, _ = look(layers)
    change = []
    for rate, steps in ((2e-3, 500), (5e-4, 2000)):
        moved = run(layers, steps=steps, rate=rate)
        _, error, after, _, _ = look(moved)
        assert error < 1e-12 and float(jnp.abs(moved[0] - layers[0]).max()) > 1
        change.append(np.abs(after - before).max())
    assert change[1] < 0.3 * change[0] < 0.3 * 0.02  # of the order of the step
    eps, _, _, small, aligned = look(run(layers, steps=5000, rate=1.0, scaled=True))
    assert eps >= 0.99 * best
    assert (small < 0.2 * ratios).all() and (aligned > 0.9999).all()
    thin = [jnp.ones((3, 1)), jnp.ones(1)]
    np.testing.assert_allclose(ln.rank_ratios(thin), 0)
    np.testing.assert_allclose(ln.layer_alignments(thin), 1)


def test_starts():
    filters = jit(lambda key: ln.init_convolutional(key, 8, 3, scale=0.5))(jax.random.key(0))
    lengths = [float(jnp.linalg.norm(w)) for w in filters]
    np.testing.assert_allclose(lengths, [0.5, 0.5, 0], rtol=1e-6)
    gradient = jit(jax.grad(lambda v: ln.layers_cost(ln.convolutional_weight(v), 2)))(filters)
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ln.correlate(jnp.ones(3), jnp.ones((2, 4))), "w must be as wide as the signals"),
        (lambda: ln.convolutional_weight([]), "layers must be vectors of one width"),
        (lambda: ln.convolutional_weight([jnp.ones(2), jnp.ones(3)]), "vectors of one width"),
        (
            lambda: ln.convolutional_scores([jnp.ones(2)], jnp.ones((1, 2)), layer=jnp.convolve),
            "layer must be one of",
        ),
        (lambda: ln.layers_cost(jnp.ones(3), 0), "depth must be >= 1"),
        (lambda: ln.spectral_imbalance([jnp.ones(3)]), "layers must be at least two"),
        (lambda: ln.dense_weight([jnp.ones((3, 2)), jnp.ones(3)]), "matrices that fit"),
        (lambda: ln.scale_by_layers().update([jnp.ones(3)], ()), "params must be the layers"),
        (lambda: ln.dense_weight([jnp.ones((3, 2))]), "matrices that fit and a vector"),
        (lambda: ln.init_dense(jax.random.key(0), ()), "widths must hold that of the input"),
        (lambda: ln.init_convolutional(jax.random.key(0), 3, scale=0.0), "scale must be > 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
