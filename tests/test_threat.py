import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from robustjax import keys
from robustjax.norms import L1, L2, LInf, Lp
from robustjax.threat import ThreatModel

NORMS = [LInf(), L2(), L1()]
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1, "l3": 3}
EPS = {"linf": 0.2, "l2": 0.6, "l1": 1.0, "l3": 0.4}
SHAPE = (6, 3, 3, 1)

every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
# Tiny programs: what takes time is compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=0)
def call(method, threat, *args):
    return getattr(threat, method)(*args)


def images(seed=0):
    """Images with pixels at both ends of the box, and points far away from them."""
    rng = np.random.default_rng(seed)
    x = np.clip(rng.uniform(-0.3, 1.3, SHAPE), 0, 1)
    v = rng.normal(size=SHAPE) * rng.choice([0.01, 0.3, 3], size=(SHAPE[0], 1, 1, 1))
    return jnp.asarray(x, jnp.float32), jnp.asarray(x + v, jnp.float32)


def model(norm, **box):
    return ThreatModel(norm, EPS[norm.name], **box)


def sizes(threat, x_adv, x):
    v = np.asarray(x_adv - x, np.float64).reshape(len(x), -1)
    return np.linalg.norm(v, ORDERS[threat.norm.name], axis=1)


@pytest.mark.parametrize("norm", [*NORMS, Lp(3)], ids=lambda norm: norm.name)
def test_projection_is_feasible_and_leaves_feasible_points_alone(norm):
    x, far = images()
    threat = model(norm)
    z = call("project", threat, far, x)
    assert np.all(call("contains", threat, z, x)) and not np.all(call("contains", threat, far, x))
    np.testing.assert_allclose(call("project", threat, z, x), z, atol=1e-6)
    np.testing.assert_array_equal(call("project", threat, x, x), x)


@every_norm
def test_projection_without_a_box_is_that_of_the_norm(norm):
    x, far = images()
    threat = model(norm, lower=-jnp.inf, upper=jnp.inf)
    ball = x + norm.project(far - x, threat.eps, batch_ndim=1)
    z = call("project", threat, far, x)
    np.testing.assert_allclose(z, ball, atol=1e-6)
    assert np.any((z < 0) | (z > 1))
    clipped = call("project", model(norm), far, x)
    np.testing.assert_allclose(clipped, np.clip(ball, 0, 1), atol=1e-6)


def nearest(norm, v, low, high, eps):
    """The projection of v on the intersection of the ball and [low, high], by SLSQP."""

    def slack(w):
        return eps - (w if norm == LInf() else np.linalg.norm(w, ORDERS[norm.name]))

    side = np.where(v < 0, -1, 1)  # each coordinate stays on its side of the centre
    bounds = [(0, h) if s > 0 else (0, -lo) for s, lo, h in zip(side, low, high, strict=True)]
    start = norm.project(jnp.asarray(v), eps)
    result = minimize(
        lambda size: np.sum((side * size - v) ** 2) / 2,
        np.clip(
            side * np.asarray(start, np.float64), [b[0] for b in bounds], [b[1] for b in bounds]
        ),
        jac=lambda size: side * (side * size - v),
        method="SLSQP",
        bounds=bounds,
        constraints={"type": "ineq", "fun": slack},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return side * result.x


@every_norm
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_projection_agrees_with_a_generic_solver(norm, seed):
    x, far = images(seed)
    threat = model(norm)
    z = call("project_exact", threat, far, x)
    assert np.all(call("contains", threat, z, x))
    for i in range(SHAPE[0]):
        centre, v = np.ravel(x[i]).astype(float), np.ravel(far[i] - x[i]).astype(float)
        w = nearest(norm, v, -centre, 1 - centre, threat.eps)
        np.testing.assert_allclose(np.ravel(z[i]) - centre, w, atol=2e-4)


@every_norm
def test_exact_projection_is_nearer_idempotent_and_that_of_the_ball_without_a_box(norm):
    x, far = images()
    threat = model(norm)
    z, w = call("project_exact", threat, far, x), call("project", threat, far, x)
    gaps = [np.linalg.norm((far - u).reshape(len(x), -1), axis=1) for u in (z, w)]
    assert np.all(gaps[0] <= gaps[1] + 1e-6)
    assert norm == LInf() or np.any(gaps[0] < gaps[1] - 1e-3)
    np.testing.assert_allclose(call("project_exact", threat, z, x), z, atol=1e-6)
    free = model(norm, lower=-jnp.inf, upper=jnp.inf)
    ball = call("project", free, far, x)
    np.testing.assert_allclose(call("project_exact", free, far, x), ball, atol=2e-6)
    # A ball larger than the box: the nearest point of the box.
    wide = ThreatModel(norm, 100.0)
    np.testing.assert_allclose(call("project_exact", wide, far, x), np.clip(far, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(call("project_exact", ThreatModel(norm, 0.0), far, x), x)


def test_exact_projection_by_hand():
    x, far = jnp.array([[0.9, 0.5]]), jnp.array([[1.9, 1.5]])
    # The first pixel can move 0.1 only; the second takes what that leaves of the radius.
    z = call("project_exact", ThreatModel(L2(), 0.3), far, x)
    np.testing.assert_allclose(z, [[1.0, 0.5 + np.sqrt(0.3**2 - 0.1**2)]], atol=1e-6)
    z = call("project_exact", ThreatModel(L1(), 0.3), far, x)
    np.testing.assert_allclose(z, [[1.0, 0.7]], atol=1e-6)
    z = call("project", ThreatModel(L1(), 0.3), far, x)
    np.testing.assert_allclose(z, [[1.0, 0.65]], atol=1e-6)


@every_norm
def test_step_is_projected_steepest_ascent(norm):
    x, _ = images()
    threat = model(norm)
    g = jax.random.normal(jax.random.key(1), SHAPE).at[0].set(0)
    z = call("step", threat, x, x, g, threat.eps / 2)
    expected = x + threat.eps / 2 * norm.steepest(g, batch_ndim=1)
    np.testing.assert_allclose(z, np.clip(expected, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(z[0], x[0])
    for _ in range(4):
        z = call("step", threat, z, x, g, threat.eps)
        assert np.all(call("contains", threat, z, x))


def test_linf_steps_reach_the_best_corner():
    x, _ = images()
    g = jax.random.normal(jax.random.key(1), SHAPE)
    threat = ThreatModel(LInf(), 0.2)
    z = call("step", threat, x, x, g, 0.3)
    best = np.where(g > 0, np.minimum(x + 0.2, 1), np.maximum(x - 0.2, 0))
    np.testing.assert_allclose(z, best, atol=1e-6)


@every_norm
def test_corner_pushes_to_the_full_radius(norm):
    x, far = images()
    inside = call("project", model(norm), far, x)
    free = model(norm, lower=-jnp.inf, upper=jnp.inf)
    z = call("corner", free, inside, x)
    moved = sizes(free, inside, x) > 0
    np.testing.assert_allclose(sizes(free, z, x)[moved], free.eps, rtol=1e-5)
    boxed = call("corner", model(norm), inside, x)
    np.testing.assert_allclose(boxed, np.clip(z, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(call("corner", free, x, x), x)
    if norm == LInf():
        np.testing.assert_allclose(z - x, 0.2 * np.sign(inside - x), atol=1e-6)


@pytest.mark.parametrize("norm", [*NORMS, Lp(3)], ids=lambda norm: norm.name)
def test_samples_are_feasible_and_belong_to_their_keys(norm):
    x, _ = images()
    threat, key = model(norm), jax.random.key(3)
    z = call("sample", threat, key, x)
    assert np.all(call("contains", threat, z, x)) and np.all(sizes(threat, z, x) > 0)
    own = keys.per_example(key, jnp.arange(len(x)))
    np.testing.assert_array_equal(call("sample", threat, own, x), z)
    split = [call("sample", threat, own[i : i + 3], x[i : i + 3]) for i in (0, 3)]
    np.testing.assert_allclose(jnp.concatenate(split), z, atol=1e-6)


def test_linf_samples_are_uniform_in_the_cube():
    x = jnp.full((500, 20), 0.5)
    v = call("sample", ThreatModel(LInf(), 0.1), jax.random.key(0), x) - x
    assert np.abs(v).max() <= 0.1 + 1e-6
    assert np.var(v) == pytest.approx(0.1**2 / 3, rel=0.03)


@every_norm
def test_contains(norm):
    x = jnp.full((4, 3), 0.5)
    step = norm.steepest(jnp.array([3.0, 1.0, 2.0]))
    outside = jnp.stack([x[0] + s * step for s in (0.1, 0.1001, 0.0, 0.05)])
    outside = outside.at[2, 0].set(jnp.nan)
    threat = ThreatModel(norm, 0.1)
    np.testing.assert_array_equal(threat.contains(outside, x), [True, False, False, True])
    assert threat.contains(outside, x, atol=0.01)[1]
    assert not threat.contains(jnp.array([[1.001]]), jnp.array([[0.99]]), atol=1e-4)[0]


def test_bounds_may_differ_per_channel_and_eps_per_example():
    x = jnp.full((2, 2, 2, 3), 0.5)
    lower, upper = jnp.array([0.0, 0.4, -jnp.inf]), jnp.array([0.6, 1.0, jnp.inf])
    threat = ThreatModel(LInf(), jnp.array([0.2, 3.0]), lower, upper)
    z = call("project", threat, x + 9, x)
    np.testing.assert_allclose(z[:, 0, 0], [[0.6, 0.7, 0.7], [0.6, 1.0, 3.5]], atol=1e-6)
    z = call("project", threat, x - 9, x)
    np.testing.assert_allclose(z[:, 0, 0], [[0.3, 0.4, 0.3], [0.0, 0.4, -2.5]], atol=1e-6)
    assert np.all(call("contains", threat, z, x))
    step = call("step", threat, x, x, jnp.ones_like(x), jnp.array([0.05, 0.0]))
    np.testing.assert_allclose(step[:, 0, 0, 1], [0.55, 0.5], atol=1e-6)


@every_norm
def test_half_precision_stays_half_precision(norm):
    x, far = (a.astype(jnp.bfloat16) for a in images())
    threat = ThreatModel(norm, jnp.float32(0.25))
    for z in (
        call("project", threat, far, x),
        call("sample", threat, jax.random.key(0), x),
        call("step", threat, far, x, far, jnp.float32(0.1)),
        call("corner", threat, far, x),
    ):
        assert z.dtype == jnp.bfloat16
        assert np.all(call("contains", threat, z, x, 0.03))


def test_is_a_pytree_of_its_numbers():
    threat = ThreatModel(L2(), 0.5, upper=2.0)
    assert jax.tree.leaves(threat) == [0.5, 0.0, 2.0]
    assert jax.tree.map(lambda leaf: leaf, threat) == threat
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(threat)]
    assert paths == [".eps", ".lower", ".upper"]
    # Placeholders that the constructor would refuse.
    assert jax.tree.map(lambda _: None, threat).eps is None
    assert jax.eval_shape(lambda t: t, threat).eps.shape == ()
    with pytest.raises(AttributeError):
        threat.eps = 1.0


def test_a_sweep_over_eps_compiles_once():
    x, far = images()
    project = jax.jit(lambda threat: threat.project(far, x))
    for eps in (0.1, 0.2, 0.3):
        threat = ThreatModel(L2(), eps)
        assert sizes(threat, project(threat), x).max() <= eps * (1 + 1e-6)
    assert project._cache_size() == 1
    swept = jax.vmap(lambda eps: ThreatModel(L2(), eps).project(far, x))(jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(swept[1], project(ThreatModel(L2(), 0.3)), atol=1e-6)
    slope = jax.grad(lambda eps: jnp.sum(ThreatModel(L2(), eps).project(far, x)))(0.1)
    assert np.isfinite(slope)


@pytest.mark.parametrize("norm", [L2(), Lp(3)], ids=lambda norm: norm.name)
def test_examples_sharded_over_devices(norm):
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types, devices=jax.devices()[:2])
    threat = model(norm)

    def start_and_step(x, own_keys, g):
        return threat.step(threat.sample(own_keys, x), x, g, 0.3)

    x, g = images()
    own_keys = keys.per_example(jax.random.key(0), jnp.arange(len(x)))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(start_and_step, mesh=mesh, in_specs=spec, out_specs=spec)
    alone = jit(start_and_step)(x, own_keys, g)
    np.testing.assert_allclose(jit(sharded)(x, own_keys, g), alone, atol=1e-6)


X = jnp.full((2, 3), 0.5)


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ThreatModel(L2(), -0.1), "eps must be >= 0, got -0.1"),
        (lambda: ThreatModel(L2(), jnp.inf), "eps must be finite"),
        (lambda: ThreatModel(L2(), float("nan")), "eps must be a number"),
        (lambda: ThreatModel(L2(), "8/255"), "eps must be a number, got '8/255'"),
        (lambda: ThreatModel(L2(), jnp.ones((2, 1))), r"eps must be .* got shape \(2, 1\)"),
        (lambda: ThreatModel(L2(), 0.1, 1.0, 0.0), "lower must be < upper, got 1.0 and 0.0"),
        (lambda: ThreatModel(L2(), 0.1, 0.5, jnp.array([0.4, 1.0])), "lower must be < upper"),
        (lambda: ThreatModel(L2(), 0.1, lower=None), "lower must be a number, got None"),
        (lambda: ThreatModel("l2", 0.1), r"norm must be a norm such as LInf\(\).*got 'l2'"),
        (lambda: ThreatModel(L2(), 0.1).project(X[:1], X), r"x_adv must have the shape of x"),
        (lambda: ThreatModel(L2(), 0.1).step(X, X, X[:, :1], 0.1), "g must have the shape of x"),
        (lambda: ThreatModel(L2(), 0.1).step(X, X, X, jnp.ones(3)), r"size must be .*\(2,\)"),
        (lambda: ThreatModel(L2(), 0.1).contains(X, X[0]), "x_adv must have the shape of x"),
        (lambda: ThreatModel(L2(), jnp.ones(3)).project(X, X), r"eps must be .* got shape \(3,\)"),
        (
            lambda: ThreatModel(L2(), 0.1, jnp.zeros(2)).project(X, X),
            "lower must broadcast .* got shape",
        ),
        (lambda: ThreatModel(L2(), 0.1).project(X > 0, X > 0), "x must be a batch of floating"),
        (lambda: ThreatModel(L2(), 0.1).sample(0, X), "key must be a typed key"),
        (lambda: ThreatModel(Lp(3), 0.1).project_exact(X, X), "project_exact knows .* got l3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
