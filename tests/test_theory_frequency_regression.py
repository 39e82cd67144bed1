import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
import scipy.integrate
import scipy.stats

from robustjax import optim
from robustjax.norms import L1, L2, LInf
from robustjax.theory import frequency_regression as fr
from robustjax.theory.frequency_regression import Population

RNG = np.random.default_rng(0)
D, EPS = 6, 0.3
VARIANCES = np.array([0.9, 0.5, 0.0, 0.2, 0.0, 0.1])
RELEVANT = VARIANCES > 0
TARGET, W = RNG.normal(size=(2, D))
NORMS = [L1(), L2(), LInf()]
# One program each instead of one per operation.
adversarial_risk, standard_risk, worst_perturbation = map(
    jax.jit, (fr.adversarial_risk, fr.standard_risk, fr.worst_perturbation)
)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def world():
    return Population(jnp.asarray(VARIANCES), jnp.asarray(TARGET))


def assert_close(got, expected, rtol=1e-10, atol=1e-13):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def matrix(d):
    return scipy.fft.dct(np.eye(d), axis=0, norm="ortho")


def test_the_transform_is_the_orthonormal_cosine_transform():
    rows = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    assert_close(fr.to_frequency(jnp.eye(3)).T, rows)
    x, w = (jnp.asarray(RNG.normal(size=(4, 28))) for _ in range(2))
    assert_close(fr.to_frequency(x), scipy.fft.dct(np.asarray(x), norm="ortho"))
    assert_close(fr.to_space(fr.to_frequency(x)), x)
    # A linear model is the same in both domains.
    assert_close(jnp.sum(fr.to_frequency(x) * fr.to_frequency(w), 1), jnp.sum(x * w, 1))
    narrow = fr.to_frequency(x.astype(np.float32))
    assert narrow.dtype == jnp.float32


def test_inputs_have_the_covariance_they_should():
    expected = matrix(D).T @ np.diag(VARIANCES) @ matrix(D)
    assert_close(fr.covariance(world()), expected)
    assert np.linalg.matrix_rank(expected) == RELEVANT.sum()
    n = 20_000
    x, y = fr.sample(jax.random.key(1), world(), n)
    spectra = np.asarray(fr.to_frequency(x))
    assert_close(y, spectra @ TARGET)
    assert np.abs(spectra[:, ~RELEVANT]).max() < 1e-14  # no energy there, up to rounding
    found = np.asarray(x.T @ x) / n
    deviation = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / n)
    assert np.all(np.abs(found - expected) < 4.5 * deviation)
    energy = np.sum(np.square(x), 1)
    assert abs(energy.mean() - VARIANCES.sum()) < 4 * energy.std() / math.sqrt(n)


def test_one_irrelevant_frequency_makes_space_redundant():
    variances = jnp.asarray([0.4, 0.7, 0.0])
    target = jnp.asarray([1.0, -2.0, 0.0])
    population = Population(variances, target)
    x, _ = fr.sample(jax.random.key(0), population, 50)
    assert_close(x[:, 0] - 2 * x[:, 1] + x[:, 2], 0)
    # The minimisers are w* + a b_2, at right angles: Pythagoras, not a sum of norms.
    a = 3.0
    other = target.at[2].set(a)
    assert_close(fr.to_space(other), fr.to_space(target) + a * np.array([1, -2, 1]) / 6**0.5)
    assert fr.standard_risk(population, other) == 0
    assert_close(jnp.sum(other**2), jnp.sum(target**2) + a**2)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_adversarial_risk_is_the_expected_loss_of_the_worst_perturbation(norm):
    x, y = fr.sample(jax.random.key(2), world(), 40_000)
    w = jnp.asarray(W)
    residual = x @ fr.to_space(w) - y
    assert_close(residual, fr.to_frequency(x) @ (W - TARGET))
    delta = worst_perturbation(world(), w, x, EPS, norm)
    assert_close(norm.value(delta, batch_ndim=1), EPS)
    loss = jnp.square((x + delta) @ fr.to_space(w) - y) / 2
    # No other perturbation does more: (|residual| + eps ||w||_*)^2 / 2.
    length = EPS * norm.dual.value(fr.to_space(w))
    assert_close(loss, jnp.square(jnp.abs(residual) + length) / 2)
    risk = adversarial_risk(world(), w, EPS, norm)
    assert abs(loss.mean() - risk) < 4 * loss.std() / math.sqrt(len(loss))
    # The expectation over the residual, a normal variable, is exact.
    v = float(VARIANCES @ (W - TARGET) ** 2)
    expected, _ = scipy.integrate.quad(
        lambda r: (r + float(length)) ** 2 / 2 * 2 * scipy.stats.norm.pdf(r, scale=v**0.5),
        0,
        np.inf,
        epsabs=0,
        epsrel=1e-12,
    )
    assert_close(risk, expected)


def test_projected_gradient_ascent_finds_the_worst_perturbation():
    x, y = fr.sample(jax.random.key(3), world(), 20)
    w = fr.to_space(jnp.asarray(W))
    delta = jnp.asarray(RNG.normal(size=x.shape)) * 1e-3

    @jax.jit
    def ascend(delta):
        gradient = ((x + delta) @ w - y)[:, None] * w
        return L2().project(delta + gradient, EPS, batch_ndim=1)

    for _ in range(100):
        delta = ascend(delta)
    loss = jnp.square((x + delta) @ w - y)
    best = jnp.square((x + worst_perturbation(world(), jnp.asarray(W), x, EPS)) @ w - y)
    assert np.all(loss <= best * (1 + 1e-12))
    assert_close(np.median(loss / best), 1)


def test_a_zero_residual_is_attacked_too():
    delta = worst_perturbation(world(), jnp.asarray(W), jnp.zeros((2, D)), EPS)
    assert_close(L2().value(delta, batch_ndim=1), EPS)
    assert not np.any(worst_perturbation(world(), jnp.zeros(D), jnp.ones((2, D)), EPS))


def test_risks():
    w = jnp.asarray(RNG.normal(size=(50, D)))
    standard = standard_risk(world(), w)
    assert_close(standard, np.sum(VARIANCES * (np.asarray(w) - TARGET) ** 2, 1) / 2)
    sizes = [0.0, 0.1, 0.5, 2.0]
    risks = [adversarial_risk(world(), w, eps) for eps in sizes]
    assert_close(risks[0], standard)
    for less, more in itertools.pairwise(risks):
        assert np.all(less < more)
    # Minimisers of the standard risk: the smallest is the most robust.
    minimizers = fr.reached_minimizer(world(), w)
    assert_close(standard_risk(world(), minimizers), 0)
    squares = jnp.sum(minimizers**2, axis=-1)
    assert_close(adversarial_risk(world(), minimizers, EPS), EPS**2 / 2 * squares)
    assert_close(adversarial_risk(world(), minimizers, 2**0.5), squares)
    best = fr.robust_minimizer(world())
    assert_close(best, np.where(RELEVANT, TARGET, 0))
    robust = adversarial_risk(world(), best, EPS)
    slope = jax.jit(jax.grad(lambda w: fr.adversarial_risk(world(), w, EPS)))(best)
    assert_close(slope, EPS**2 * best)
    assert np.all(robust < adversarial_risk(world(), minimizers, EPS))


@pytest.mark.parametrize("momentum, ridge", [(0, 0), (0.9, 0), (0, 0.3), (0.5, 0.02)])
def test_gradient_descent_is_its_closed_form(momentum, ridge):
    rate, start = 0.4, jnp.asarray(W)
    transform = optax.chain(
        optax.add_decayed_weights(ridge), optax.sgd(rate, momentum=momentum or None)
    )
    path = np.asarray(fr.simulate(transform, world(), start, steps=300))
    closed = functools.partial(
        fr.gradient_descent, world(), start, learning_rate=rate, momentum=momentum, ridge=ridge
    )
    for t in (0, 1, 17, 300):
        assert_close(closed(steps=t), path[t], rtol=1e-12, atol=1e-12)
    limit = closed(steps=math.inf)
    assert_close(closed(steps=100_000), limit)
    if ridge:
        assert_close(limit, VARIANCES / (VARIANCES + ridge) * TARGET)
        if not momentum:
            assert_close(path[17, ~RELEVANT], (1 - rate * ridge) ** 17 * W[~RELEVANT])
    else:
        assert_close(limit, np.where(RELEVANT, TARGET, W))
        assert_close(limit, fr.reached_minimizer(world(), start))
        assert_close(path[:, ~RELEVANT], np.tile(W[~RELEVANT], (301, 1)))
        # Bit by bit in the closed form.
        np.testing.assert_array_equal(closed(steps=1000)[~RELEVANT], W[~RELEVANT])
    if not momentum and not ridge:
        frequency = (1 - rate * VARIANCES) ** 17 * (W - TARGET)
        assert_close(path[17] - TARGET, frequency)
        sigma = np.asarray(fr.covariance(world()))
        space = np.linalg.matrix_power(np.eye(D) - rate * sigma, 17) @ matrix(D).T @ (W - TARGET)
        assert_close(matrix(D).T @ (path[17] - TARGET), space)


def test_from_zero_gradient_descent_finds_the_smallest_solution():
    x, y = fr.sample(jax.random.key(4), world(), 30)
    limit = fr.gradient_descent(world(), jnp.zeros(D), steps=math.inf, learning_rate=0.1)
    assert_close(fr.to_space(limit), np.linalg.pinv(np.asarray(x), rcond=1e-10) @ y)
    assert_close(limit, fr.robust_minimizer(world()))


def test_the_damage_of_random_initial_weights():
    """``eps^2 / 2 |irrelevant| s^2`` in expectation: of order d."""
    d, scale, n = 40, 0.2, 4000
    variances = jnp.asarray(np.arange(d) < 10, float)
    population = Population(variances, jnp.zeros(d))
    starts = jnp.asarray(scale * RNG.normal(size=(n, d)))
    risks = adversarial_risk(population, fr.reached_minimizer(population, starts), EPS)
    expected = EPS**2 / 2 * 30 * scale**2
    assert abs(risks.mean() - expected) < 4 * risks.std() / math.sqrt(n)


# The published simulation.
FIGURE = ((0.01, 0.0025, 0.0), (5.0, 10.0, 0.0), (0.01, -0.01, 0.02))
OPTIMIZERS = {
    "gd": optax.sgd(0.01),
    "sign": optim.sign_gd(0.01),
    "adam": optax.adam(0.01),
    "rmsprop": optax.rmsprop(0.01, decay=0.99, eps=1e-8, initial_scale=0.0, eps_in_sqrt=False),
}


@functools.cache
def figure(name):
    variances, target, start = map(jnp.asarray, FIGURE)
    path = fr.simulate(OPTIMIZERS[name], Population(variances, target), start, steps=10_000)
    return Population(variances, target), np.asarray(path)


def risk(population, weights):
    return np.asarray(adversarial_risk(population, jnp.asarray(weights), 2**0.5))


def fit(population, weights):
    return np.asarray(standard_risk(population, jnp.asarray(weights)))


def test_figure_sign_descent():
    population, path = figure("sign")
    a = np.abs(0.01 / 3**0.5 * (path[:, 0] - 5))
    b = np.abs(0.0025 / 2**0.5 * (path[:, 1] - 10))
    assert_close([a[0], b[0]], [0.028810, 0.017695], rtol=2e-5)
    assert_close([5 * 0.01 / 3**0.5, 10 * 0.0025 / 2**0.5], [0.0289, 0.0177], rtol=2e-3)
    assert np.argmax(a <= b) == 112
    total = np.argmax(a < 0.01 * 0.01)
    assert total == 638
    assert np.sum((a <= b)[:total]) == 526
    assert_close((b[0] - 1e-4) / (1e-4 / 3), 527.86, rtol=1e-5)
    assert_close(path[1], [0.0273205, -0.01, 0.02], rtol=1e-6)
    assert_close(path[100], [1.742051, -0.01, 0.02], rtol=1e-6)
    assert_close(path[638], [4.986759, 7.428763, -4.274772], rtol=1e-6)
    assert_close(path[638, 2] - 0.02, -(6**0.5) / 3 * 0.01 * 526)
    assert_close(path[638, 2] - 0.02, -4.294772, rtol=1e-6)
    cycle = path[-2:][np.argsort(path[-2:, 0])]
    assert_close(cycle[:, 0], [4.98675932, 5.00407983], rtol=1e-8)
    assert_close(cycle[:, 1], [9.98848989] * 2, rtol=1e-8)
    assert_close(cycle[:, 2], [-4.29926691] * 2, rtol=1e-8)
    assert_close(fit(population, cycle), [1.042e-6, 2.49e-7], rtol=1e-3)
    assert_close(risk(population, cycle), [143.141, 143.304], rtol=3e-6)
    # Beyond the printed limit 2 sqrt(3) / 3 eta, within sqrt(3) eta.
    error = 5 - cycle[0, 0]
    assert_close(error, 0.01324, rtol=1e-3)
    assert 2 * 3**0.5 / 3 * 0.01 < error < 3**0.5 * 0.01
    # At least sqrt(3) / 3 eta per step in frequency 0 until the band, whatever its variance is.
    assert np.diff(path[: total + 1, 0]).min() > 3**0.5 / 3 * 0.01 * (1 - 1e-9)
    assert np.argmax(fit(population, path) < 2e-6) < 825
    # The ratio to gradient descent at its end, and the range in print.
    ratio = risk(population, cycle[1]) / risk(population, [5, 10, 0.02])
    assert_close(ratio, 1.1464, rtol=5e-5)
    assert 1.0375 <= ratio <= 1.15


def test_figure_gradient_descent():
    population, path = figure("gd")
    start = jnp.asarray(FIGURE[2])
    closed = functools.partial(fr.gradient_descent, population, start, learning_rate=0.01)
    assert_close(path[-1], closed(steps=10_000))
    assert_close(path[-1], [3.164374, 2.204229, 0.02], rtol=1e-6)
    assert_close(risk(population, path[-1]), 16.840, rtol=1e-5)
    late = closed(steps=200_000)
    assert_close(late, [5.0, 9.932557, 0.02], rtol=1e-6)
    assert_close(risk(population, late), 123.698, rtol=1e-5)
    limit = closed(steps=math.inf)
    assert_close(limit, [5, 10, 0.02])
    assert_close(risk(population, limit), 125.0004)
    assert fit(population, late) > 1e-6
    assert fit(population, closed(steps=1_000_000)) < 1e-12
    # In print the ratio is 1.146: of these, or of 141 (sampled) and 123 (at 200 000).
    assert_close(141 / 123, 1.146, rtol=5e-4)


def test_figure_adaptive_methods():
    population, adam = figure("adam")
    _, rmsprop = figure("rmsprop")
    _, sign = figure("sign")
    assert_close(adam[650], [3.945, 5.241, -2.521], rtol=2e-4)
    assert_close(adam[-1], [5.000, 10.000, -4.918], rtol=1e-4)
    assert_close(risk(population, adam[-1]), 149.185, rtol=1e-5)
    assert_close(rmsprop[650], [4.524, 7.660, -4.133], rtol=2e-4)
    assert_close(rmsprop[-1, :2], [5, 10], rtol=0.01 / 5)
    assert_close(rmsprop[-1, 2], -5.388, rtol=1e-4)
    assert_close(risk(population, rmsprop[-1]), 154.1, rtol=1e-3)
    # The first step of RMSProp is ten times that of the others.
    steps = [(matrix(3).T @ (path[1] - path[0]))[0] for path in (sign, adam, rmsprop)]
    assert_close(steps, [0.01, 0.01, 0.1], rtol=1e-4)
    # All fit the target; their order in adversarial risk.
    gd = fr.reached_minimizer(population, jnp.asarray(FIGURE[2]))
    ends = [gd, sign[-1], adam[-1], rmsprop[-1]]
    for end in ends:
        assert fit(population, end) < 2e-6
    risks = [risk(population, end) for end in ends]
    assert sorted(risks) == risks
    # The weight that no input asks for grows until the error oscillates, and stays.
    for path in (sign, adam, rmsprop):
        late = path[5000:, 2]
        assert np.ptp(late) < 0.05 and late.max() < -4


@pytest.mark.parametrize(
    "name, steps, weight, low, high",
    [
        ("sign", 900, -4.02, 140.0, 142.2),
        ("adam", 2000, -4.87, 148.2, 149.2),
        ("rmsprop", 1500, -5.29, 152.4, 153.4),
    ],
)
def test_figure_with_fresh_batches(name, steps, weight, low, high):
    population, _ = figure(name)
    run = functools.partial(
        fr.simulate, OPTIMIZERS[name], population, steps=steps, every=steps, batch_size=1000
    )
    key = jax.random.key(0)
    end = np.array(run(jnp.asarray(FIGURE[2]), key=key)[-1])
    assert abs(end[2] - weight) < 0.12
    # What is left of the way in the other two makes 3 in risk.
    end[:2] = FIGURE[1][:2]
    assert low < risk(population, end) < high


def test_batches_of_gradient_descent():
    """Irrelevant weights stay; the others follow the population."""
    transform, start = optax.sgd(0.1, momentum=0.5), jnp.asarray(W)

    def run(key):
        return fr.simulate(transform, world(), start, steps=200, every=40, batch_size=100, key=key)

    paths = np.stack([run(jax.random.key(seed)) for seed in (5, 6, 5)])
    assert paths.shape == (3, 6, D)
    np.testing.assert_array_equal(paths[0], paths[2])
    assert_close(paths[..., ~RELEVANT], np.broadcast_to(W[~RELEVANT], (3, 6, 2)))
    np.testing.assert_array_equal(paths[:, 0], np.tile(W, (3, 1)))
    closed = fr.gradient_descent(world(), start, steps=200, learning_rate=0.1, momentum=0.5)
    assert np.abs(paths[:, -1] - closed).max() < 0.05
    assert np.abs(paths[0] - paths[1])[-1].max() > 1e-9


def test_only_gradient_descent_is_the_same_in_both_domains():
    transforms = {
        "momentum": optax.sgd(0.1, momentum=0.9),
        "sign": optim.sign_gd(0.1),
        "adam": optax.adam(0.1),
        "rmsprop": optax.rmsprop(0.1, decay=0.99, eps_in_sqrt=False),
    }
    for name, transform in transforms.items():
        space, frequency = (
            np.asarray(fr.simulate(transform, world(), jnp.asarray(W), steps=20, domain=domain))
            for domain in ("space", "frequency")
        )
        if name == "momentum":
            assert_close(space, frequency)
        else:
            assert np.abs(space - frequency).max() > 0.01
            # In the frequency domain no method moves what has no gradient.
            np.testing.assert_array_equal(frequency[:, ~RELEVANT], np.tile(W[~RELEVANT], (21, 1)))
            assert np.abs(space[-1] - W)[~RELEVANT].max() > 0.01


def test_many_runs_in_one_program():
    rates = jnp.asarray([0.05, 0.2])
    targets = jnp.asarray(RNG.normal(size=(2, D)))

    @jax.jit
    @jax.vmap
    def run(rate, target):
        population = Population(jnp.asarray(VARIANCES), target)
        return fr.simulate(optax.sgd(rate), population, jnp.asarray(W), steps=10, every=5)

    for rate, target, path in zip((0.05, 0.2), targets, run(rates, targets), strict=True):
        population = Population(jnp.asarray(VARIANCES), target)
        for t, weights in zip((0, 5, 10), path, strict=True):
            closed = fr.gradient_descent(population, jnp.asarray(W), steps=t, learning_rate=rate)
            assert_close(weights, closed)


DEEP = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.03, momentum=0.9),
    "sign": optim.sign_gd(0.01),
    "adam": optax.adam(0.01),
    "rmsprop": optax.rmsprop(0.003, decay=0.99, eps=1e-8, initial_scale=0.0, eps_in_sqrt=False),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_first_layer_of_a_deep_network(name):
    """Whatever follows it, it is as in the linear model: see where no input has energy."""
    d, width, classes = 16, 12, 3
    variances = jnp.asarray(np.where(np.arange(d) < 9, 1.0, 0.0), jnp.float32)
    population = Population(variances, jnp.zeros(d, jnp.float32))
    x, _ = fr.sample(jax.random.key(6), population, 64)
    rng = np.random.default_rng(7)
    y = np.argmax(np.asarray(x) @ rng.normal(size=(d, classes)), axis=1)
    shapes = [(d, width), (width, width), (width, classes)]
    params = [jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32) for s in shapes]
    transform = DEEP[name]

    def loss(params):
        h = x
        for w in params[:-1]:
            h = jax.nn.relu(h @ w)
        return optax.softmax_cross_entropy_with_integer_labels(h @ params[-1], y).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = transform.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, transform.init(params)), None, length=100)
        return params, losses

    trained, losses = train(params)
    assert losses[-1] < losses[0] / 2
    moved = fr.to_frequency((trained[0] - params[0]).T)
    assert np.abs(moved[:, :9]).max() > 0.05
    away = np.abs(moved[:, 9:]).max()
    if name in ("sgd", "momentum"):
        assert away < 1e-5
    else:
        assert away > 1e-2


def test_bad_input(plain_calls):
    population, w = world(), jnp.asarray(W)
    with pytest.raises(ValueError, match="variances must be >= 0, got -1"):
        fr.standard_risk(Population(-jnp.ones(3), jnp.ones(3)), jnp.ones(3))
    with pytest.raises(ValueError, match="variances must have the shape of target"):
        fr.covariance(Population(jnp.ones(2), jnp.ones(3)))
    with pytest.raises(ValueError, match="one entry per frequency, 6"):
        fr.standard_risk(population, jnp.ones(3))
    with pytest.raises(ValueError, match="target must be weights"):
        fr.covariance(Population(jnp.ones(()), jnp.ones(())))
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        fr.adversarial_risk(population, w, -1.0)
    with pytest.raises(ValueError, match="norm must be a norm"):
        fr.worst_perturbation(population, w, jnp.ones((1, D)), 1.0, "l2")
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        fr.sample(jax.random.key(0), population, 0)
    descend = functools.partial(fr.gradient_descent, population, w)
    with pytest.raises(ValueError, match=r"steps must be an integer, got 1\.5"):
        descend(steps=1.5, learning_rate=0.1)
    with pytest.raises(ValueError, match="momentum must be < 1, got 1"):
        descend(steps=1, learning_rate=0.1, momentum=1.0)
    with pytest.raises(ValueError, match=r"for a limit, got 2\.7"):
        descend(steps=math.inf, learning_rate=3.0)
    run = functools.partial(fr.simulate, optax.sgd(0.1), population, w)
    with pytest.raises(ValueError, match="transform must be an optax"):
        fr.simulate("sgd", population, w, steps=1)
    with pytest.raises(ValueError, match=r"steps \(3\) must be divisible by every \(2\)"):
        run(steps=3, every=2)
    with pytest.raises(ValueError, match="must be given together, got 5 and no key"):
        run(steps=3, batch_size=5)
    with pytest.raises(ValueError, match="must be given together, got None and a key"):
        run(steps=3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="domain must be one of 'space', 'frequency'"):
        run(steps=3, domain="time")
