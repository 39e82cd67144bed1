import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.optimize import minimize

from robustjax import norms
from robustjax.norms import L1, L2, LInf, Lp, Norm

NORMS = [LInf(), L2(), L1(), Lp(1.5), Lp(3)]
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1, "l1.5": 1.5, "l3": 3}
SIZED = ["project", "prox", "prox_squared"]

every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
# Batches, trees and dtypes are one code for all exponents, and l_p is slow to compile.
one_of_each = pytest.mark.parametrize("norm", NORMS[:4], ids=lambda norm: norm.name)


# Tiny programs: what takes time is compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=(0, 2))
def call(method, norm, batch_ndim, *args):
    return getattr(norm, method)(*args, batch_ndim=batch_ndim)


def vectors(n=40, d=6, seed=0):
    """Vectors of several scales, some with zeros and ties. One shape, so that few compile."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(n, d)) * np.exp(rng.normal(size=(n, 1)))
    v[1::4, ::2] = 0
    v[2::4] = np.round(v[2::4])
    return jnp.asarray(v, jnp.float32)


def many(size, n=40):
    return jnp.full(n, size)


def dot(a, b):
    return np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), axis=-1)


def order_norm(norm, v):
    return np.linalg.norm(np.asarray(v, np.float64), ORDERS[norm.name], axis=-1)


@every_norm
def test_value_is_numpys(norm):
    v = vectors()
    np.testing.assert_allclose(call("value", norm, 1, v), order_norm(norm, v), rtol=1e-6)
    assert norm.value(jnp.zeros(3)) == 0


def test_value_of_three_four():
    v = jnp.array([3.0, -4.0])
    assert [norm.value(v) for norm in (LInf(), L2(), L1())] == [4, 5, 7]


def test_names_and_duals():
    assert [norm.name for norm in NORMS] == ["linf", "l2", "l1", "l1.5", "l3"]
    assert [norm.dual for norm in NORMS] == [L1(), L2(), LInf(), Lp(3), Lp(1.5)]
    assert all(norm.dual.dual == norm for norm in NORMS)
    assert Lp(2).dual == Lp(2)
    for p in (1.1, 1.3, 7.0):
        assert Lp(p).dual.dual.p == pytest.approx(p, rel=1e-12)


@every_norm
def test_norms_are_static_pytrees(norm):
    assert isinstance(norm, Norm) and norms.check(norm) is norm
    assert jax.tree.leaves(norm) == [] and {norm: 1}[norm] == 1
    through_jit = jax.jit(lambda norm, v: norm.value(v))(norm, jnp.ones(4))
    assert through_jit == pytest.approx(4 ** (1 / ORDERS[norm.name]))


@every_norm
def test_hoelder_holds_with_equality_at_the_steepest_direction(norm):
    g, d = vectors(), vectors(seed=1)
    dual = call("value", norm.dual, 1, g)
    best = call("steepest", norm, 1, g)
    assert np.all(dot(g, d) <= dual * call("value", norm, 1, d) * (1 + 1e-6) + 1e-6)
    np.testing.assert_allclose(dot(g, best), dual, rtol=2e-6)
    assert np.all(order_norm(norm, best) <= 1 + 1e-6)
    assert not np.any(norm.steepest(jnp.zeros(5)))


def test_tie_rules_of_the_steepest_direction():
    g = {"b": jnp.array([2.0, 0.0]), "a": jnp.array([[-0.5, -2.0], [2.0, 0.0]])}
    sign = LInf().steepest(g)
    np.testing.assert_array_equal(sign["a"], [[-1, -1], [1, 0]])
    np.testing.assert_array_equal(sign["b"], [1, 0])
    # The leaves flatten in the order of their keys: the first |g_i| = 2 is a[0, 1].
    first = L1().steepest(g)
    np.testing.assert_array_equal(first["a"], [[0, -1], [0, 0]])
    np.testing.assert_array_equal(first["b"], [0, 0])


def test_steepest_of_lp_tends_to_its_neighbours():
    g = vectors()
    np.testing.assert_allclose(Lp(2).steepest(g, 1), L2().steepest(g, 1), atol=1e-6)
    np.testing.assert_allclose(Lp(1e6).steepest(g, 1), LInf().steepest(g, 1), atol=1e-4)
    one = g[:, :1]
    for norm in NORMS:  # in one dimension all norms are the same
        np.testing.assert_allclose(norm.steepest(one, 1), jnp.sign(one), atol=1e-6)


@every_norm
def test_projection_is_feasible_idempotent_and_non_expansive(norm):
    v, u = vectors(), vectors(seed=1)
    radius = jnp.linspace(0, 3, 40)
    w, z = call("project", norm, 1, v, radius), call("project", norm, 1, u, radius)
    assert np.all(order_norm(norm, w) <= radius * (1 + 1e-6))
    np.testing.assert_allclose(call("project", norm, 1, w, radius), w, rtol=1e-6, atol=1e-6)
    assert np.all(order_norm(L2(), w - z) <= order_norm(L2(), v - u) * (1 + 1e-6) + 1e-6)
    inside = order_norm(norm, v) < radius
    assert inside.any() and np.all((w == v)[inside])
    assert not np.any(call("project", norm, 1, v, many(0.0)))


@every_norm
def test_projection_is_feasible_in_many_dimensions(norm):
    v = 100 * jax.random.normal(jax.random.key(0), (2, 3072))
    w = call("project", norm, 1, v, 0.5)
    np.testing.assert_allclose(order_norm(norm, w), 0.5, rtol=3e-6)


def solve(norm, v, radius=None, level=lambda tau: 0.0):
    """Minimises |w - v|^2 / 2 + level(tau) over ||w|| <= tau, or over ||w|| <= radius, by SLSQP.

    The unknowns are the positive and negative parts of w, and tau, so that everything is smooth.
    """
    d, p = len(v), ORDERS[norm.name]

    def slack(x):
        size, tau = x[:d] + x[d:-1], x[-1]
        return tau - (size if p == np.inf else np.linalg.norm(size, p))

    def objective(x):
        return np.sum((x[:d] - x[d:-1] - v) ** 2) / 2 + level(x[-1])

    bounds = [(0, None)] * (2 * d) + [(0, None) if radius is None else (radius, radius)]
    size = np.linalg.norm(v, p) if radius is None else radius
    start = np.concatenate([np.maximum(v, 0), np.maximum(-v, 0), [size]])
    constraint = {"type": "ineq", "fun": slack}
    options = {"ftol": 1e-15, "maxiter": 500}
    x = minimize(
        objective, start, method="SLSQP", bounds=bounds, constraints=constraint, options=options
    ).x
    return x[:d] - x[d:-1]


@every_norm
@pytest.mark.parametrize("size", [0.3, 1.2])
def test_agreement_with_a_generic_solver(norm, size):
    v = np.asarray(vectors(), np.float64)
    for method, arguments in [
        ("project", {"radius": size}),
        ("prox", {"level": lambda tau: size * tau}),
        ("prox_squared", {"level": lambda tau: size * tau**2 / 2}),
    ]:
        found = call(method, norm, 1, vectors(), many(size))
        for i in range(4):
            np.testing.assert_allclose(
                found[i], solve(norm, v[i], **arguments), atol=1e-3, err_msg=f"{method} {v[i]}"
            )


@every_norm
def test_prox_optimality_and_moreau(norm):
    v, t = vectors(), jnp.linspace(0.05, 3, 40)
    w = call("prox", norm, 1, v, t)
    # v - w is t times a subgradient: in the dual ball of radius t and aligned with w.
    assert np.all(order_norm(norm.dual, v - w) <= t * (1 + 1e-5))
    np.testing.assert_allclose(dot(v - w, w), t * order_norm(norm, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(w + call("project", norm.dual, 1, v, t), v, atol=1e-6)
    np.testing.assert_array_equal(call("prox", norm, 1, v, many(0.0)), v)


def test_prox_closed_forms():
    v, t = vectors(), many(0.4)
    soft = jnp.sign(v) * jnp.maximum(jnp.abs(v) - 0.4, 0)
    np.testing.assert_allclose(call("prox", L1(), 1, v, t), soft, atol=1e-6)
    length = jnp.linalg.norm(v, axis=1, keepdims=True)
    shrunk = v * jnp.maximum(0, 1 - 0.4 / jnp.where(length > 0, length, 1))
    np.testing.assert_allclose(call("prox", L2(), 1, v, t), shrunk, atol=1e-6)
    for norm in (L2(), Lp(2)):
        np.testing.assert_allclose(call("prox_squared", norm, 1, v, t), v / 1.4, rtol=1e-5)
    ball = call("project", L2(), 1, v, t)
    np.testing.assert_allclose(call("project", Lp(2), 1, v, t), ball, atol=1e-6)


@every_norm
def test_prox_vanishes_exactly_in_the_dual_ball(norm):
    v = vectors()
    t = call("value", norm.dual, 1, v)
    assert not np.any(call("prox", norm, 1, v, t * (1 + 1e-5)))
    outside = order_norm(norm, call("prox", norm, 1, v, t * (1 - 1e-3)))
    np.testing.assert_array_equal(outside > 0, t > 0)


@every_norm
def test_prox_squared_optimality(norm):
    v, t = vectors(), jnp.geomspace(1e-3, 1e3, 40)
    w = call("prox_squared", norm, 1, v, t)
    length = order_norm(norm, w)
    np.testing.assert_allclose(order_norm(norm.dual, v - w), t * length, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dot(v - w, w), t * length**2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call("prox_squared", norm, 1, v, many(0.0)), v, rtol=1e-6)
    assert not np.any(call("prox_squared", norm, 1, 0 * v, t))


def test_agreement_with_optax():
    v = vectors()
    for norm, peer in [
        (LInf(), optax.projections.projection_linf_ball),
        (L2(), optax.projections.projection_l2_ball),
        (L1(), optax.projections.projection_l1_ball),
    ]:
        expected = jax.vmap(peer, in_axes=(0, None))(v, 0.7)
        np.testing.assert_allclose(call("project", norm, 1, v, many(0.7)), expected, atol=1e-6)


@every_norm
@pytest.mark.parametrize("method", ["value", "steepest", *SIZED])
def test_derivatives_at_zero_are_finite(norm, method):
    zero, some_zeros, tangent = jnp.zeros(4), jnp.array([0.0, 1.0, -2.0, 0.0]), jnp.ones(4)
    fn = getattr(norm, method)

    @jit
    def derivatives(v, sizes):
        gradient = jax.grad(lambda v: jnp.sum(fn(v, *sizes)))(v)
        return *jax.jvp(lambda v: fn(v, *sizes), (v,), (tangent,)), gradient

    for sizes in [(0.0,), (0.5,)] if method in SIZED else [()]:
        value, derivative, gradient = derivatives(zero, sizes)
        assert not np.any(value)
        if method in ("value", "steepest"):
            assert not np.any(derivative) and not np.any(gradient)
        for result in (derivative, gradient, *derivatives(some_zeros, sizes)):
            assert np.all(np.isfinite(result))


@every_norm
def test_derivatives_at_radius_zero_are_finite(norm):
    slope = jit(jax.grad(lambda radius, v: jnp.sum(norm.project(v, radius))))
    assert np.isfinite(slope(0.0, jnp.zeros(4))) and np.isfinite(slope(0.0, jnp.arange(4.0)))


@every_norm
@pytest.mark.parametrize("method", ["steepest", "project", "prox_squared"])
def test_derivatives_agree_with_finite_differences(norm, method):
    with jax.enable_x64(True):
        x = jnp.array([0.3, -1.1, 0.8, 2.0, 0.7])  # a vector, and the radius or step after it

        def fn(x):
            return getattr(norm, method)(x[:4], *(x[4:] if method in SIZED else ()))

        @jit
        def jacobians(x):
            steps = 1e-5 * jnp.eye(5)
            differences = jax.vmap(lambda h: (fn(x + h) - fn(x - h)) / 2e-5)(steps).T
            return differences, jax.jacfwd(fn)(x), jax.jacrev(fn)(x)

        expected, forward, reverse = jacobians(x)
        np.testing.assert_allclose(forward, expected, atol=1e-7)
        np.testing.assert_allclose(reverse, expected, atol=1e-7)


@every_norm
def test_gradient_of_the_value_is_the_dual_steepest_direction(norm):
    v = vectors()[0]
    np.testing.assert_allclose(jax.grad(norm.value)(v), norm.dual.steepest(v), atol=1e-6)


@one_of_each
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(norm):
    ones = jnp.ones(4096, jnp.bfloat16)
    expected = 4096 ** (1 / ORDERS[norm.name])
    value = norm.value(ones)
    assert value.dtype == jnp.bfloat16 and value == pytest.approx(expected, rel=2**-8)
    assert norm.steepest(ones).dtype == jnp.bfloat16
    v = vectors().astype(jnp.bfloat16)
    for method in ("project", "prox_squared"):
        wide = call(method, norm, 1, v.astype(jnp.float32), many(0.6))
        narrow = call(method, norm, 1, v, many(0.6))
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=1e-3, rtol=2**-8)


@pytest.mark.parametrize("norm", [L2(), Lp(1.5), Lp(3)], ids=lambda norm: norm.name)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_extreme_magnitudes_neither_underflow_nor_overflow(norm, factor):
    v = vectors()
    length, direction = call("value", norm, 1, v), call("steepest", norm, 1, v)
    np.testing.assert_allclose(call("value", norm, 1, factor * v), factor * length, rtol=1e-5)
    np.testing.assert_allclose(call("steepest", norm, 1, factor * v), direction, atol=1e-5)
    w = factor * call("project", norm, 1, v, many(0.5))
    scaled = call("project", norm, 1, factor * v, many(factor * 0.5))
    np.testing.assert_allclose(scaled, w, rtol=1e-5, atol=1e-6 * factor)


@every_norm
def test_nan_is_not_swallowed(norm):
    v = vectors().at[:, 1].set(jnp.nan)
    assert np.isnan(call("value", norm, 1, v)).all()
    assert np.isnan(call("steepest", norm, 1, v)).any(axis=1).all()
    for method in SIZED:
        assert np.isnan(call(method, norm, 1, v, many(0.5))).any(axis=1).all()


@one_of_each
@pytest.mark.parametrize("method", ["value", "steepest", "project"])
def test_batch_axes_are_vmap_are_a_loop(norm, method):
    v = vectors(6, 10).reshape(2, 3, 5, 2)
    sizes = (jnp.linspace(0.1, 2, 6).reshape(2, 3),) if method in SIZED else ()
    one = functools.partial(call, method, norm, 0)
    batched = call(method, norm, 2, v, *sizes)
    looped = [[one(v[i, j], *(s[i, j] for s in sizes)) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(batched, np.array(looped), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(batched, jax.vmap(jax.vmap(one))(v, *sizes), rtol=1e-6)


def test_one_radius_for_all_vectors():
    for norm in (LInf(), L2(), L1()):
        w = norm.project(vectors(), 0.5, 1)
        np.testing.assert_allclose(w, norm.project(vectors(), many(0.5), 1), atol=1e-6)


@one_of_each
@pytest.mark.parametrize("method", ["steepest", *SIZED])
def test_a_pytree_is_its_ravelled_vector(norm, method):
    v = vectors()
    tree = {"w": v[:, :4].reshape(40, 2, 2), "none": None, "z": (v[:, 4:], jnp.zeros((40, 0)))}
    np.testing.assert_allclose(call("value", norm, 1, tree), call("value", norm, 1, v), rtol=1e-6)
    sizes = (jnp.linspace(0.1, 2, 40),) if method in SIZED else ()
    w = call(method, norm, 1, tree, *sizes)
    assert jax.tree.structure(w) == jax.tree.structure(tree)
    flat = np.concatenate([w["w"].reshape(40, 4), w["z"][0]], axis=1)
    np.testing.assert_allclose(flat, call(method, norm, 1, v, *sizes), rtol=1e-5, atol=1e-6)


@one_of_each
def test_mixed_dtypes_and_empty_trees(norm):
    tree = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 2))}
    assert norm.value(tree).dtype == jnp.float32
    assert norm.value(tree) == pytest.approx(7 ** (1 / ORDERS[norm.name]), rel=1e-6)
    for method, *sizes in (("steepest",), ("project", 0.5), ("prox", 0.5)):
        w = call(method, norm, 0, tree, *sizes)
        assert w["a"].dtype == jnp.bfloat16 and w["b"].dtype == jnp.float32
        assert call(method, norm, 0, {}, *sizes) == {}
    assert norm.value({}) == 0


@pytest.mark.parametrize("norm", [LInf(), L2()], ids=lambda norm: norm.name)
@pytest.mark.parametrize("method", ["steepest", "project"])
def test_no_concatenation_of_parameters(norm, method):
    tree = {"a": jnp.ones(3), "b": jnp.ones(4)}
    s = () if method == "steepest" else (0.5,)
    assert "concatenate" not in str(jax.make_jaxpr(getattr(norm, method))(tree, *s))


def test_a_traced_radius_does_not_recompile():
    project = jax.jit(lambda v, radius: L1().project(v, radius))
    v = jnp.arange(4.0)
    for radius in (0.1, 0.5, 2.0):
        assert L1().value(project(v, radius)) == pytest.approx(radius)
    assert project._cache_size() == 1


@functools.partial(jit, static_argnums=(0, 2))
def draw(method, norm, n, like, radius):
    keys = jax.random.split(jax.random.key(7), n)
    return jax.vmap(lambda key: getattr(norm, method)(key, like, radius))(keys)


@every_norm
def test_samples_of_the_ball_are_uniform(norm):
    d, n, radius = 3, 4000, 0.5
    v = np.asarray(draw("sample_ball", norm, n, jnp.zeros(d), radius))
    length = order_norm(norm, v) / radius
    assert length.max() <= 1 + 1e-6
    assert length.mean() == pytest.approx(d / (d + 1), abs=0.01)
    assert np.abs(v.mean(axis=0)).max() < 0.02
    # Against rejection from the cube, which is uniform by construction.
    cube = np.random.default_rng(0).uniform(-1, 1, size=(60_000, d))
    expected = radius * cube[order_norm(norm, cube) <= 1][:n]
    for statistic in (lambda v: v[:, 0], lambda v: v[:, 2], lambda v: np.abs(v).min(axis=1)):
        assert stats.ks_2samp(statistic(v), statistic(expected)).pvalue > 0.01
    assert stats.kstest(length**d, "uniform").pvalue > 0.01


@every_norm
def test_samples_of_the_sphere(norm):
    d, n = 3, 4000
    v = np.asarray(draw("sample_sphere", norm, n, jnp.zeros(d), 2.0))
    np.testing.assert_allclose(order_norm(norm, v), 2, rtol=1e-6)
    assert np.abs(v.mean(axis=0)).max() < 0.08
    # The direction of a uniform point of the ball has the cone measure, which is the surface
    # measure for l_1, l_2 and l_inf.
    ball = np.asarray(draw("sample_ball", norm, n, jnp.zeros(d), 1.0))[::-1]
    ball = 2 * ball / order_norm(norm, ball)[:, None]
    for statistic in (lambda v: v[:, 0], lambda v: v[:, 2], lambda v: np.abs(v).min(axis=1)):
        assert stats.ks_2samp(statistic(v), statistic(ball)).pvalue > 0.01


@pytest.mark.parametrize("norm", NORMS[:3], ids=lambda norm: norm.name)
@pytest.mark.parametrize("method", ["sample_ball", "sample_sphere"])
def test_samples_have_the_form_of_like(norm, method):
    like = {"a": jnp.zeros((2, 2), jnp.bfloat16), "b": jnp.zeros(3)}
    v = draw(method, norm, 2, like, 0.5)
    assert v["a"].shape == (2, 2, 2) and v["a"].dtype == jnp.bfloat16
    assert v["b"].shape == (2, 3) and v["b"].dtype == jnp.float32
    flat = jnp.concatenate([v["a"].reshape(2, 4).astype(jnp.float32), v["b"]], axis=1)
    assert np.all(order_norm(norm, flat) <= 0.5 * (1 + 2**-8)) and np.all(flat[0] != flat[1])
    assert not np.any(draw(method, norm, 2, like, 0.0)["b"])


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Lp(1), r"p must lie strictly between 1 and inf, got 1 \(that is L1\(\)\)"),
        (lambda: Lp(jnp.inf), r"p must lie strictly .*LInf\(\)"),
        (lambda: Lp(0.5), "p must lie strictly between 1 and inf, got 0.5"),
        (lambda: Lp("3"), "p must be a number, got '3'"),
        (lambda: Lp(float("nan")), "p must be a number"),
        (lambda: L2().project(jnp.ones(3), -1.0), "radius must be >= 0, got -1.0"),
        (lambda: L2().project(jnp.ones(3), jnp.inf), "radius must be finite"),
        (lambda: L1().prox(jnp.ones(3), -1.0), "t must be >= 0"),
        (lambda: L1().prox_squared(jnp.ones(3), "a"), "t must be a number"),
        (lambda: LInf().steepest(jnp.arange(3)), "must be floating-point, got .* int32"),
        (lambda: L2().value(jnp.ones(3), 2), "must share 2 leading batch axes"),
        (lambda: L2().value({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, 1), "must share 1"),
        (lambda: L2().project(jnp.ones((2, 3)), jnp.ones(3), 1), r"radius .* batch shape \(2,\)"),
        (lambda: L2().sample_ball(jax.random.key(0), jnp.ones(3), -1.0), "radius must be >= 0"),
        (lambda: L2().sample_ball(jax.random.key(0), jnp.ones(0), 1.0), "like must hold at least"),
        (lambda: L2().sample_ball(jax.random.key(0), jnp.arange(3), 1.0), "like must hold"),
        (lambda: norms.check("linf"), r"norm must be a norm such as LInf\(\).*got 'linf'"),
        (lambda: norms.check(LInf), "norm must be a norm such as"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
