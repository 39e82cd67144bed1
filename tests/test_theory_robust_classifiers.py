"""The largest margin and its certificate: closed forms, published values, and who reaches it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.norms import L1, L2, LInf, Lp
from robustjax.optim import (
    fista,
    fista_params,
    norm_penalty,
    scale_by_preconditioner,
    steepest_descent,
)
from robustjax.theory import ball_volume
from robustjax.theory import max_margin as mm
from robustjax.theory import robust_classifiers as rc
from robustjax.theory import saddle_point as sp

NORMS = [LInf(), L2(), L1(), FourierLInf(), Lp(3)]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)

# Rows are y_i x_i of the published instance.
ROW, COLUMN = np.ogrid[:4, :8]
GOLDEN = np.sin(1 + 8 * ROW + COLUMN) + 0.5 * (ROW == COLUMN)
ONES = np.ones(4)
GOLDEN_EPS = {
    LInf(): (0.08623608935, 1e-11),
    L2(): (0.20895045790, 1e-11),
    L1(): (0.5, 1e-12),
    FourierLInf(): (0.1176368, 1e-7),
}
GOLDEN_WEIGHTS = {
    LInf(): (0.21390009, 0.30839679, 0.31913299, 0.15857013),
    L2(): (0.20094365, 0.32141581, 0.29032352, 0.18731702),
}

# Tiny programs: what takes time is compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 9))
Y = np.array([1, 1, 1, -1, -1, 1])


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def teacher_data(n, d=100):
    """The data of the published calibration: float64, one teacher, one seed."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=d)
    x = rng.normal(size=(n, d))
    return x, np.sign(x @ w)


# The optimum.


@pytest.mark.parametrize("norm", GOLDEN_EPS, ids=lambda norm: norm.name)
def test_the_published_instance(norm):
    solved = mm.max_margin(GOLDEN, ONES, norm)
    expected, tolerance = GOLDEN_EPS[norm]
    assert solved.eps == pytest.approx(expected, abs=tolerance)
    assert -1e-12 <= solved.bound - solved.eps <= 1e-9
    if norm in GOLDEN_WEIGHTS:
        np.testing.assert_allclose(solved.weights, GOLDEN_WEIGHTS[norm], atol=1e-8)


@pytest.mark.parametrize(
    "n, linf, l2, l1, fourier",
    [
        (100, 0.1159, 0.7993, 5.344, None),
        (50, 0.2244, 1.4325, 10.848, None),
        (25, 0.3259, 1.9075, 15.072, None),
        (12, 0.5047, 2.6042, 20.244, 0.4220),
        (6, 0.7874, 3.9258, 32.289, 0.7254),
        (3, 1.6185, 5.9446, 47.802, 1.2501),
    ],
)
def test_the_published_table(n, linf, l2, l1, fourier):
    x, y = teacher_data(n)
    expected = {LInf(): linf, L2(): l2, L1(): l1} | ({FourierLInf(): fourier} if fourier else {})
    for norm, eps in expected.items():
        solved = mm.max_margin(x, y, norm)
        assert solved.eps == pytest.approx(eps, rel=5e-4)
        assert abs(solved.bound - solved.eps) <= 1e-8 * eps


@every_norm
@pytest.mark.parametrize("bias", [False, True])
def test_the_solution_and_its_certificate(norm, bias):
    solved = mm.max_margin(X, Y, norm, bias=bias)
    slack = 1e-6 if norm == Lp(3) else 1e-8
    assert -1e-12 <= solved.bound - solved.eps <= slack * solved.eps
    assert (Y * (X @ solved.w + solved.bias)).min() == pytest.approx(1, rel=1e-9)
    assert solved.weights.min() >= 0 and solved.weights.sum() == pytest.approx(1)
    if bias:
        assert solved.weights @ Y == pytest.approx(0, abs=1e-12)
        assert solved.eps > mm.max_margin(X, Y, norm).eps
    # The first row is the solution; no other classifier and no other weights do better.
    w = np.tile(solved.w, (50, 1)) + 0.3 * RNG.normal(size=(50, 9)) * np.abs(solved.w).max()
    weights, b = RNG.dirichlet(np.ones(6), 50), solved.bias + RNG.normal(size=50) / 10
    w[0], weights[0], b[0] = solved.w, solved.weights, solved.bias

    @jit
    @jax.vmap
    def certify(w, weights, b):
        return rc.certificate(w, weights, X, Y, norm, bias=b if bias else None)

    lower, upper = certify(w, weights, b)
    np.testing.assert_allclose([lower[0], upper[0]], [solved.eps, solved.bound], rtol=1e-9)
    assert lower[1:].max() < solved.bound and upper[1:].min() > solved.eps
    assert (rc.Certificate(lower, upper).gap[1:] > 0).all()


@every_norm
def test_one_and_two_points(norm):
    one = mm.max_margin(X[:1], Y[:1], norm)
    assert one.eps == pytest.approx(float(norm.value(jnp.asarray(X[0]))), rel=1e-8)
    two = mm.max_margin(X[[0, 3]], Y[[0, 3]], norm, bias=True)
    assert two.eps == pytest.approx(float(norm.value(jnp.asarray(X[0] - X[3]))) / 2, rel=1e-8)
    np.testing.assert_allclose(two.weights, [0.5, 0.5])


@pytest.mark.parametrize("norm", [LInf(), L2(), L1()], ids=lambda norm: norm.name)
def test_permuted_and_repeated_examples_change_nothing(norm):
    order = np.array([3, 0, 5, 5, 1, 4, 2, 0])
    again = mm.max_margin(X[order], Y[order], norm)
    assert again.eps == pytest.approx(mm.max_margin(X, Y, norm).eps, rel=1e-5)


def test_images_with_a_fourier_norm():
    x, y = RNG.normal(size=(3, 4, 3, 2)), np.array([1, -1, 1])
    solved = mm.max_margin(x, y, FourierLInf())
    assert solved.w.shape == (4, 3, 2)
    assert 0 < solved.eps <= solved.bound + 1e-12 <= solved.eps * (1 + 1e-8)


# One classifier.


@every_norm
def test_the_worst_perturbation_decides_at_the_margin(norm):
    w, b = mm.max_margin(X, Y, norm, bias=True)[:2]
    w = w + 0.05 * np.cos(np.arange(9)) * np.abs(w).max()  # not the optimum

    @jit
    def look(w, b, eps):
        delta = rc.worst_perturbations(w, Y, norm, eps)
        return (
            rc.largest_eps(w, X, Y, norm, bias=b),
            norm.value(delta, batch_ndim=1),
            rc.scores(w, X + delta, Y, bias=b),
            rc.scores(w, X, Y, bias=b) - eps * norm.dual.value(w),
        )

    eps = float(look(w, b, 0.0)[0])
    assert eps > 0 and float(look(3 * w, 3 * b, 0.0)[0]) == pytest.approx(eps)
    for factor, errors in ((1 - 1e-6, 0), (1 + 1e-6, 1)):
        _, sizes, scores, expected = look(w, b, factor * eps)
        np.testing.assert_allclose(sizes, factor * eps, rtol=1e-9)
        assert np.sum(scores < 0) == errors
        np.testing.assert_allclose(scores, expected, atol=1e-9)


def test_margins_are_ordered_like_the_norms():
    norms = (LInf(), L2(), L1(), FourierLInf())

    @jit
    @jax.vmap
    def each(w):
        return [rc.largest_eps(w, X, jnp.sign(X @ w), norm) for norm in norms]

    linf, l2, l1, fourier = each(RNG.normal(size=(20, 9)))
    assert (linf > 0).all() and (linf <= l2).all() and (l2 <= l1).all() and (fourier <= l2).all()


def test_signs_of_margins_and_the_zero_classifier():
    x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1, -1])
    np.testing.assert_allclose(rc.margins(jnp.array([1.0, 1.0]), x, y, LInf()), [0.5, -1])
    np.testing.assert_array_equal(rc.margins(jnp.zeros(2), x, y, L2()), [0, 0])
    zero = rc.margins(jnp.zeros(2), x, y, L2(), bias=1.0)
    np.testing.assert_array_equal(zero, [np.inf, -np.inf])
    assert np.isinf(rc.eps_bound(jnp.array([1.0, 0.0]), x, y, L2(), bias=True))
    # Balanced, any weights are those of the half difference.
    bound = rc.eps_bound(jnp.array([3.0, 0.5]), x, y, LInf(), bias=True)
    assert float(bound) == pytest.approx(1.0)


def test_dtypes_compilation_and_derivatives():
    w = jnp.asarray(X[0], jnp.float32)
    margins = jit(lambda w, x, y: rc.margins(w, x, y, L2()))(w, X.astype(np.float32), Y)
    assert margins.dtype == jnp.float32
    slope = jit(jax.grad(lambda w: rc.largest_eps(w, X, Y, L1())))(X[0])
    assert np.isfinite(slope).all()
    assert float(slope @ X[0]) == pytest.approx(0, abs=1e-12)  # scaling changes nothing


@pytest.mark.parametrize("slack", [0.0, 0.1, 0.4, 1.5])
def test_slack(slack):
    w = 0.7 * X[0]
    eps = float(rc.slack_eps(w, X, Y, LInf(), slack, bias=0.2))

    def left(eps):
        margins = rc.scores(w, X, Y, bias=0.2) - eps * np.abs(w).sum()
        return float(sp.hinge(margins).mean())

    assert left(eps) == pytest.approx(slack, abs=1e-12)
    assert left(eps + 1e-6) > slack
    if eps > 0:
        risk = sp.attacked_risk(w, X, Y, LInf(), eps, loss=sp.hinge, bias=0.2)
        assert float(risk) == pytest.approx(slack, abs=1e-12)


def test_slack_zero_is_the_margin_of_large_weights_and_one_is_none():
    solved = mm.max_margin(X, Y, L2())
    eps = [float(rc.slack_eps(scale * solved.w, X, Y, L2(), 0.0)) for scale in (1, 10, 1e6)]
    np.testing.assert_allclose(eps, solved.eps * np.array([0, 0.9, 1 - 1e-6]), atol=1e-8)
    zero = [float(rc.slack_eps(np.zeros(9), X, Y, L2(), slack)) for slack in (0.0, 0.99, 1.0, 2.0)]
    assert zero == [-np.inf, -np.inf, np.inf, np.inf]


# Training under attack or with a penalty.


@pytest.mark.parametrize("norm", [LInf(), FourierLInf()], ids=lambda norm: norm.name)
def test_the_attacked_risk_is_that_of_the_worst_perturbations(norm):
    w, eps, losses = X[1], 0.3, (sp.logistic, sp.exponential, sp.hinge)

    @jit
    def look(others):
        worst = rc.scores(w, X + rc.worst_perturbations(w, Y, norm, eps), Y)
        exact = [loss(worst).mean() for loss in losses]
        risks = [sp.attacked_risk(w, X, Y, norm, eps, loss=loss) for loss in losses]
        return worst, exact, risks, norm.value(others, batch_ndim=1)

    others = RNG.normal(size=(40, 9))
    worst, exact, risks, sizes = look(others)
    np.testing.assert_allclose(risks, exact, rtol=1e-9)
    others = eps * others / np.asarray(sizes)[:, None]
    assert (worst <= Y * (X @ w + (others @ w)[:, None]) + 1e-9).all()  # each example by itself


def test_the_threshold_of_the_published_instance():
    x, y = teacher_data(3)
    eps = mm.max_margin(x, y, LInf()).eps
    assert float(sp.zero_eps(x, y, LInf())) == pytest.approx(1.9125, abs=1e-4)
    assert float(sp.zero_eps(x, y, LInf())) / eps == pytest.approx(1.18, abs=0.005)


@every_norm
def test_zero_is_optimal_from_the_thresholds_on_and_not_below(norm):
    pull = jnp.mean(Y[:, None] * X, axis=0)
    away = 1e-4 * np.asarray(norm.dual.steepest(pull))  # the direction in which it fails first
    random = 1e-3 * RNG.normal(size=(30, 9))

    def risk(w, eps):
        return float(sp.attacked_risk(w, X, Y, norm, eps))

    eps = float(sp.zero_eps(X, Y, norm))
    assert eps >= mm.max_margin(X, Y, norm).eps
    assert risk(away, 0.99 * eps) < risk(0 * away, 0.0) < risk(away, 1.01 * eps)
    assert all(risk(w, eps) >= math.log(2) - 1e-12 for w in random)
    half = float(sp.zero_coefficient(X, Y, norm.dual))
    assert half == pytest.approx(eps / 2)
    whole = sp.zero_coefficient(X, Y, norm.dual, loss=sp.exponential)
    assert float(whole) == pytest.approx(eps)
    length = float(norm.dual.value(jnp.asarray(away)))
    assert risk(away, 0.0) + 0.99 * half * length < math.log(2)
    assert risk(away, 0.0) + 1.01 * half * length > math.log(2)


def test_the_constant_score_minimises_the_risk_without_inputs():
    y = np.array([1, 1, 1, -1])
    for loss, expected in ((sp.logistic, math.log(3)), (sp.exponential, math.log(3) / 2)):
        score = sp.constant_score(y, loss=loss)
        assert float(score) == pytest.approx(expected)
        slope = jax.grad(lambda p, loss=loss: loss(y * p).mean())(score)
        assert float(slope) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "n, shares",
    [
        (3, [0, 0.843, 0.925, 0.950, 0.963, 0.976]),
        (12, [0, 0.32, 0.79, 0.87, 0.905, 0.935]),
    ],
)
def test_the_published_path_of_an_l_1_penalty(n, shares):
    """Shares of the largest eps for ever smaller coefficients, at which the conditions hold."""
    x, y = teacher_data(n)
    coefficients = jnp.array([1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6])

    def risk(w):
        return sp.logistic(rc.scores(w, x, y)).mean()

    def solve(coefficient):
        prox = norm_penalty(L1(), coefficient)
        transform = fista(prox, 1e6, max_halvings=30, increase_factor=2)
        w = fista_params(mm.descend(transform, risk, jnp.zeros(100), 1000)[1])
        return w, -jax.grad(risk)(w), rc.largest_eps(w, x, y, LInf())

    w, pull, eps = jit(jax.vmap(solve))(coefficients)
    np.testing.assert_allclose(eps / mm.max_margin(x, y, LInf()).eps, shares, atol=5e-3)
    assert (jnp.abs(pull).max(1) <= coefficients * (1 + 1e-4)).all()
    np.testing.assert_allclose(jnp.sum(pull * w, 1), coefficients * jnp.abs(w).sum(1), rtol=1e-4)
    assert (sp.zero_coefficient(x, y, L1()) <= coefficients).tolist() == [True] + 5 * [False]


def test_the_published_share_of_adversarial_training_by_the_size_of_its_attack():
    x, y = teacher_data(3)
    best = mm.max_margin(x, y, LInf()).eps

    def train(share):
        def risk(w):
            return sp.attacked_risk(w, x, y, LInf(), share * best)

        w, _ = mm.descend(optax.sgd(0.1), risk, jnp.full(100, 1e-3), 20_000)
        return rc.largest_eps(w, x, y, LInf())

    eps = jit(jax.vmap(train))(jnp.array([0.1, 0.5, 0.9, 0.95, 1.2]))
    np.testing.assert_allclose(eps[:4] / best, [0.50, 0.76, 0.99, 0.995], atol=0.01)
    assert eps[4] < 0.5 * best


def test_volumes_in_three_dimensions():
    published = {L2(): 4 * np.pi / 3, L1(): 4 / 3, LInf(): 8, FourierLInf(): 4 * np.pi}
    for norm, volume in published.items():
        assert ball_volume(norm, 3) == pytest.approx(volume)
    assert ball_volume(Lp(1e9), 4) == pytest.approx(16)
    # In two dimensions the Fourier norms are l_1 / sqrt(2) and sqrt(2) l_inf.
    assert ball_volume(FourierLInf(), 2) == pytest.approx(2 * ball_volume(L1(), 2))
    assert ball_volume(FourierL1(), 2) == pytest.approx(ball_volume(LInf(), 2) / 2)
    points = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, (50_000, 3)))
    for norm in (Lp(3), FourierL1()):
        inside = jit(lambda v, norm=norm: norm.value(v, batch_ndim=1) <= 1)(points)
        share, expected = np.mean(inside), ball_volume(norm, 3) / 64
        assert abs(share - expected) < 4 * np.sqrt(expected / 50_000)


def test_equal_risk_with_and_without_an_error():
    sure, torn = sp.tied_margins(10, 0.1, 5.0)
    assert float(sp.logistic(sure).sum()) == pytest.approx(6.4440, abs=5e-5)
    assert float(sp.logistic(torn).sum()) == pytest.approx(6.4440, abs=5e-5)
    assert float(torn[-1]) == pytest.approx(-6.3818, abs=5e-5)
    sure, torn = sp.tied_margins(4, 0.5, 2.0, loss=sp.exponential)
    assert float(sp.exponential(sure).sum()) == pytest.approx(float(sp.exponential(torn).sum()))
    assert torn.min() < 0 < sure.min()


def test_sampled_data_are_separable_by_their_teacher():
    x, y, teacher = jit(lambda key: rc.sample_separable(key, 8, 20))(jax.random.key(0))
    assert x.shape == (8, 20) and float(jnp.linalg.norm(teacher)) == pytest.approx(1)
    assert rc.largest_eps(teacher, x, y, L2()) > 0


# Descent and its implicit bias.


def test_the_logarithm_of_the_risk():
    w = X[0] / 9
    risk = float(mm.log_exponential_risk(w, X, Y, bias=0.1))
    assert risk == pytest.approx(math.log(np.exp(-Y * (X @ w + 0.1)).mean()))
    shares = np.append(np.full(len(Y) - 1, 1 / (len(Y) - 1)), 0)
    without = mm.log_exponential_risk(w, X[:-1], Y[:-1])
    np.testing.assert_allclose(mm.log_exponential_risk(w, X, Y, shares=shares), without)
    grad = jit(jax.grad(mm.log_exponential_risk))
    gradient = grad(w, X, Y)
    weights = mm.example_weights(w, X, Y)
    np.testing.assert_allclose(gradient, -(weights * Y) @ X, atol=1e-12)
    solved = mm.max_margin(X, Y, L2())
    huge = jnp.asarray(1e6 * solved.w, jnp.float32)
    gradient = grad(huge, X.astype(np.float32), Y)
    assert np.linalg.norm(gradient) > 0.5 * solved.eps  # no underflow


PAIRS = {"linf": L1(), "l2": L2(), "l1": LInf(), "fourier": FourierL1()}


@functools.cache
def trained(n, steps):
    """Weights of coordinate descent, gradient descent, signGD and Fourier coordinate descent."""
    x, y = teacher_data(n)
    risk = functools.partial(mm.log_exponential_risk, x=x, y=y)

    def run(w):
        return {
            attack: mm.descend(
                steepest_descent(norm, mm.safe_step(x, norm), scale_by_dual_norm=True),
                risk,
                w,
                steps,
            )[0]
            for attack, norm in PAIRS.items()
        }

    return jit(run)(jnp.zeros(100))


def test_each_optimizer_is_the_most_robust_to_its_own_attack():
    x, y = teacher_data(12)
    weights = trained(12, 10_000)
    shares = {}
    for attack, norm in PAIRS.items():
        best = mm.max_margin(x, y, norm.dual)
        eps = {name: float(rc.largest_eps(w, x, y, norm.dual)) for name, w in weights.items()}
        assert eps[attack] >= 0.99 * best.eps
        assert all(eps[attack] > 1.2 * other for name, other in eps.items() if name != attack)
        bound = rc.eps_bound(mm.example_weights(weights[attack], x, y), x, y, norm.dual)
        assert eps[attack] <= best.eps <= float(bound) + 1e-9
        shares[attack] = eps
    # Published: l_inf eps of the first three, then l_1 eps.
    published = {"linf": (0.502, 0.320, 0.218), "l1": (1.21, 9.74, 20.22)}
    for attack, expected in published.items():
        found = [shares[attack][name] for name in ("linf", "l2", "l1")]
        np.testing.assert_allclose(found, expected, rtol=0.005)


def test_preconditioned_descent_is_the_most_robust_in_its_own_norm():
    x, y = teacher_data(6, d=20)
    p = np.random.default_rng(1).uniform(0.2, 5, 20)
    # In the coordinates P^(1/2) w it is gradient descent on P^(-1/2) x.
    best = mm.max_margin(x / np.sqrt(p), y, L2())
    step = 1 / (x**2 / p).sum(1).max()
    transform = optax.chain(scale_by_preconditioner(p), optax.scale(-step))
    risk = functools.partial(mm.log_exponential_risk, x=x, y=y)
    w, _ = jit(lambda w: mm.descend(transform, risk, w, 10_000))(jnp.zeros(20))
    eps = float(rc.largest_eps(np.sqrt(p) * w, x / np.sqrt(p), y, L2()))
    assert eps >= 0.99 * best.eps
    delta = -y[:, None] * eps * p * w / math.sqrt(w @ (p * w))
    np.testing.assert_allclose(np.einsum("ni,i,ni->n", delta, 1 / p, delta), eps**2)
    assert (y * ((x + delta) @ w)).min() == pytest.approx(0, abs=1e-9)


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rc.margins(X[0, :3], X, Y, L2()), "w must be shaped like one input"),
        (lambda: rc.margins(X[0], X, Y * 2, L2()), "y must hold labels -1 and 1"),
        (lambda: rc.margins(X[0], X, Y[:2], L2()), "y must have one entry per example"),
        (lambda: rc.margins(X[0], X, Y, "l2"), "norm must be a norm"),
        (lambda: rc.eps_bound(-ONES, GOLDEN, ONES, L2()), "weights must be >= 0"),
        (lambda: rc.slack_eps(X[0], X, Y, L2(), -1.0), "slack must be >= 0"),
        (lambda: rc.worst_perturbations(X[0], Y, L2(), -1.0), "eps must be >= 0"),
        (lambda: sp.attacked_risk(X[0], X, Y, L2(), -1.0), "eps must be >= 0"),
        (lambda: sp.constant_score(Y, loss=sp.hinge), "loss must be one of"),
        (lambda: sp.tied_margins(3, 2.0, 1.0), "high must be > 2"),
        (lambda: mm.max_margin(X, Y, FourierLInf(low=0.2)), "norm must be LInf"),
        (lambda: mm.max_margin(X, np.ones(6), L2(), bias=True), "labels of both classes"),
        (lambda: ball_volume(FourierL1(low=0.1), 3), "norm must be an l_p norm"),
        (lambda: mm.log_exponential_risk(X[0], X, Y, shares=-np.ones(6)), "shares must be >= 0"),
        (lambda: mm.descend("sgd", jnp.sum, X, 3), "transform must be an optax"),
        *[
            (
                lambda norm=norm: mm.max_margin(np.array([[1.0], [2.0]]), np.array([1, -1]), norm),
                "x must be separable",
            )
            for norm in NORMS
        ],
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
