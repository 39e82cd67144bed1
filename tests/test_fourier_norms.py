import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from robustjax import norms
from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.frequency import band_mask
from robustjax.norms import L1, L2, LInf, Norm

FULL = [FourierLInf(), FourierL1()]
NORMS = [*FULL, FourierLInf(low=0.25), FourierL1(high=0.2)]
SIZED = ["project", "prox", "prox_squared"]

# What is slow is to compile: each norm is tested on signals or on images.
SHAPES = [(4, 3, 2), (6,), (6,), (4, 3, 2)]
every_norm = pytest.mark.parametrize(
    "norm, shape", list(zip(NORMS, SHAPES, strict=True)), ids=[norm.name for norm in NORMS]
)
one_of_each = pytest.mark.parametrize(
    "norm, shape", [(NORMS[0], (4, 3, 2)), (NORMS[3], (4, 3, 2))], ids=["linf", "l1_high"]
)
full_band = pytest.mark.parametrize("norm", FULL, ids=lambda norm: norm.name)
every_shape = pytest.mark.parametrize("shape", [(4, 3, 2), (6,)], ids=["image", "signal"])

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=(0, 2))
def call(method, norm, batch_ndim, *args):
    return getattr(norm, method)(*args, batch_ndim=batch_ndim)


def vectors(shape, n=24, seed=0):
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(n, *shape)) * np.exp(rng.normal(size=(n,) + (1,) * len(shape)))
    v[1::4] = np.round(v[1::4])
    v[2::4, ..., :1] = 0
    v[3] = 0
    return jnp.asarray(v, jnp.float32)


def flat(v):
    return np.asarray(v, np.float64).reshape(len(v), -1)


def dot(a, b):
    return np.sum(flat(a) * flat(b), axis=1)


def spectrum(v):
    """Magnitudes by NumPy in float64, flattened."""
    v = np.asarray(v, np.float64)
    axes = (1,) if v.ndim == 2 else (1, 2)
    return np.abs(np.fft.fftn(v, axes=axes, norm="ortho"))


def band_of(norm, shape):
    h, w = shape[:2] if len(shape) == 3 else (1, shape[0])
    mask = band_mask(h, w, low=norm.low, high=norm.high)
    return mask[:, :, None] if len(shape) == 3 else mask[0]


def in_band(norm, v):
    """The part of the vectors that lies in the norm's band."""
    axes = (1,) if v.ndim == 2 else (1, 2)
    u = np.fft.fftn(np.asarray(v, np.float64), axes=axes, norm="ortho")
    u = u * band_of(norm, v.shape[1:])
    return jnp.asarray(np.fft.ifftn(u, axes=axes, norm="ortho").real, jnp.float32)


def fourier_norm(norm, v):
    size = (spectrum(v) * band_of(norm, v.shape[1:])).reshape(len(v), -1)
    return size.max(axis=1) if isinstance(norm, FourierLInf) else size.sum(axis=1)


@every_norm
def test_value_is_numpys(norm, shape):
    v = in_band(norm, vectors(shape))
    np.testing.assert_allclose(call("value", norm, 1, v), fourier_norm(norm, v), rtol=2e-6)


@every_shape
def test_parseval_and_the_chains_of_inequalities(shape):
    v = vectors(shape)
    d = np.prod(shape) if len(shape) == 1 else np.prod(shape[:2])  # the length of the transform
    all_d = np.prod(shape)
    f_inf, f_1 = (call("value", norm, 1, v) for norm in FULL)
    plain = {norm: call("value", norm, 1, v.reshape(len(v), -1)) for norm in (LInf(), L2(), L1())}
    np.testing.assert_allclose(np.linalg.norm(flat(spectrum(v)), axis=1), plain[L2()], rtol=1e-6)
    slack = 1 + 1e-5
    assert np.all(f_inf <= plain[L2()] * slack)
    assert np.all(plain[L2()] <= np.sqrt(all_d) * f_inf * slack)
    assert np.all(f_inf <= plain[L1()] / np.sqrt(d) * slack)
    assert np.all(plain[LInf()] <= f_1 / np.sqrt(d) * slack)
    assert np.all(plain[L2()] <= f_1 * slack)


def test_two_coordinates():
    v = vectors((2,))
    np.testing.assert_allclose(
        call("value", FourierLInf(), 1, v), call("value", L1(), 1, v) / np.sqrt(2), rtol=1e-6
    )
    np.testing.assert_allclose(
        call("value", FourierL1(), 1, v), call("value", LInf(), 1, v) * np.sqrt(2), rtol=1e-6
    )


def test_the_unit_ball_of_three_coordinates_is_a_cylinder():
    """Around the axis (1, 1, 1): axial coordinate in [-1, 1], radius sqrt(2)."""
    v = vectors((3,), n=200) * 0.8
    axis = np.ones(3) / np.sqrt(3)
    along = flat(v) @ axis
    radius = np.linalg.norm(flat(v) - along[:, None] * axis, axis=1)
    inside = (np.abs(along) <= 1) & (radius <= np.sqrt(2))
    np.testing.assert_array_equal(call("value", FourierLInf(), 1, v) <= 1, inside)
    assert 20 < inside.sum() < 180
    projected = flat(call("project", FourierLInf(), 1, v, 1.0))
    rest = flat(v) - along[:, None] * axis
    expected = np.clip(along, -1, 1)[:, None] * axis
    expected += rest * np.minimum(1, np.sqrt(2) / np.maximum(radius, 1e-9))[:, None]
    np.testing.assert_allclose(projected, expected, atol=2e-6)


@every_norm
def test_shifts_and_reversal_change_no_value(norm, shape):
    v = in_band(norm, vectors(shape))
    axes = (1, 2) if len(shape) == 3 else (1,)
    reversed_v = jnp.roll(jnp.flip(v, axes), 1, axes)  # v_{-i}
    value = call("value", norm, 1, v)
    for other in (reversed_v, jnp.roll(v, range(1, len(axes) + 1), axes)):
        np.testing.assert_allclose(call("value", norm, 1, other), value, rtol=1e-5)


@full_band
def test_maps_move_with_the_signal(norm):
    v = vectors((6,))
    for method in SIZED:
        shifted = call(method, norm, 1, jnp.roll(v, 2, 1), 0.5)
        np.testing.assert_allclose(
            shifted, jnp.roll(call(method, norm, 1, v, 0.5), 2, 1), atol=5e-6, rtol=1e-5
        )


def test_names_duals_and_static_pytrees():
    assert [norm.name for norm in NORMS] == [
        "fourier_linf", "fourier_l1", "fourier_linf_low0.25", "fourier_l1_high0.2",
    ]  # fmt: skip
    for norm in NORMS:
        assert isinstance(norm, Norm) and norms.check(norm) is norm
        assert type(norm.dual) is not type(norm) and norm.dual.dual == norm
        assert (norm.dual.low, norm.dual.high) == (norm.low, norm.high)
        assert jax.tree.leaves(norm) == [] and {norm: 1}[norm] == 1
    assert FourierLInf() == FourierLInf(None, None) != FourierLInf(low=0.25)
    assert jax.jit(lambda norm, v: norm.value(v))(FourierL1(), jnp.ones(4)) == pytest.approx(2)


@every_norm
def test_hoelder_holds_with_equality_at_the_steepest_direction(norm, shape):
    """The linear maximiser attains the dual norm, is feasible and real."""
    g, d = in_band(norm, vectors(shape)), in_band(norm, vectors(shape, seed=1))
    dual = call("value", norm.dual, 1, g)
    best = call("steepest", norm, 1, g)
    assert np.all(dot(g, d) <= dual * call("value", norm, 1, d) * (1 + 1e-5) + 1e-6)
    np.testing.assert_allclose(dot(g, best), dual, rtol=1e-5, atol=1e-6)
    assert np.all(fourier_norm(norm, best) <= 1 + 1e-6)
    assert best.dtype == jnp.float32
    assert not np.any(best[3])  # the direction of 0 is 0


@every_shape
def test_the_steepest_direction_of_linf_has_a_flat_spectrum(shape):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(20, *shape)), jnp.float32)
    best = call("steepest", FourierLInf(), 1, g)
    np.testing.assert_allclose(spectrum(best), 1, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(flat(best), axis=1), np.sqrt(np.prod(shape)), rtol=1e-5
    )
    banded = FourierLInf(low=0.25)
    size = spectrum(call("steepest", banded, 1, g))
    np.testing.assert_allclose(size, np.broadcast_to(band_of(banded, shape), size.shape), atol=1e-5)


def test_a_frequency_without_gradient_stays_zero():
    g = jnp.asarray(np.cos(2 * np.pi * np.arange(8) / 8), jnp.float32)
    best = call("steepest", FourierLInf(), 0, g)
    np.testing.assert_allclose(spectrum(best[None])[0], [0, 1, 0, 0, 0, 0, 0, 1], atol=1e-5)
    constant = call("steepest", FourierLInf(), 0, jnp.full(8, -0.3))
    np.testing.assert_allclose(constant, -np.ones(8) / np.sqrt(8), atol=1e-6)


def test_the_steepest_direction_of_l1_is_one_pair_of_frequencies():
    g = vectors((6,))
    size = np.delete(spectrum(call("steepest", FourierL1(), 1, g)), 3, axis=0)
    np.testing.assert_allclose(size.sum(axis=1), 1, rtol=1e-5)
    assert np.all((size > 1e-5).sum(axis=1) <= 2)


@every_norm
def test_projection_is_feasible_idempotent_and_non_expansive(norm, shape):
    v, u = vectors(shape), vectors(shape, seed=1)
    radius = jnp.linspace(0, 3, len(v))
    w, z = call("project", norm, 1, v, radius), call("project", norm, 1, u, radius)
    assert np.all(call("value", norm, 1, w) <= radius * (1 + 1e-5) + 1e-6)
    np.testing.assert_allclose(call("project", norm, 1, w, radius), w, rtol=1e-5, atol=1e-5)
    assert np.all(
        np.linalg.norm(flat(w - z), axis=1)
        <= np.linalg.norm(flat(v - u), axis=1) * (1 + 1e-6) + 1e-6
    )
    # The residual makes an obtuse angle with all that is feasible: it is the nearest point.
    for other in (
        z,
        call("steepest", norm, 1, in_band(norm, v - w)) * radius.reshape(-1, *(1,) * len(shape)),
    ):
        scale = 1 + np.linalg.norm(flat(v), axis=1) ** 2
        assert np.all(dot(v - w, other - w) <= 2e-5 * scale)


@every_norm
def test_moreau(norm, shape):
    """prox_{t ||.||}(v) + t P^dual_1(v / t) = v, the projection being that on the dual ball."""
    v = vectors(shape)
    t = jnp.linspace(0.1, 3, len(v))
    rows = t.reshape(-1, *(1,) * len(shape))
    parts = call("prox", norm, 1, v, t) + rows * call("project", norm.dual, 1, v / rows, 1.0)
    np.testing.assert_allclose(parts, v, rtol=1e-5, atol=1e-5)


@every_norm
def test_prox_is_optimal_and_vanishes_in_the_dual_ball(norm, shape):
    v = in_band(norm, vectors(shape))
    v = v[fourier_norm(norm, v) > 0]
    t = 0.7 * call("value", norm.dual, 1, v)
    w = call("prox", norm, 1, v, t)
    rest = flat(v - w) / np.asarray(t)[:, None]
    assert np.all(fourier_norm(norm.dual, rest.reshape(v.shape)) <= 1 + 1e-5)
    np.testing.assert_allclose(dot(rest, w), fourier_norm(norm, w), rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(flat(w)).max(axis=1) > 1e-3)
    gone = call("prox", norm, 1, v, call("value", norm.dual, 1, v) * (1 + 1e-5))
    np.testing.assert_allclose(gone, 0, atol=1e-5)


@full_band
def test_soft_thresholding_and_clipping_are_the_formulas(norm):
    v = vectors((6,))
    u = np.fft.fft(np.asarray(v, np.float64), norm="ortho")
    size = np.maximum(np.abs(u), 1e-30)
    if isinstance(norm, FourierLInf):
        got, factor = call("project", norm, 1, v, 0.6), np.minimum(1, 0.6 / size)
    else:
        got, factor = call("prox", norm, 1, v, 0.6), np.maximum(0, 1 - 0.6 / size)
    np.testing.assert_allclose(got, np.fft.ifft(u * factor, norm="ortho").real, atol=2e-6)


@every_norm
def test_prox_of_the_square_is_stationary(norm, shape):
    """(v - w) / t is ||w|| times a point of the dual unit sphere that w attains."""
    v = in_band(norm, vectors(shape))
    t = jnp.linspace(0.1, 2, len(v))
    w = call("prox_squared", norm, 1, v, t)
    rest = flat(v - w) / np.asarray(t)[:, None]
    size = fourier_norm(norm, w)
    dual = fourier_norm(norm.dual, rest.reshape(v.shape))
    np.testing.assert_allclose(dual, size, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dot(rest, w), size**2, rtol=1e-4, atol=1e-6)


def test_outside_of_its_band():
    v = np.cos(2 * np.pi * 3 * np.arange(8) / 8).astype(np.float32)  # 0.375 cycles per sample
    inf, one = FourierLInf(low=0.25), FourierL1(low=0.25)
    assert call("value", inf, 0, v) == jnp.inf and call("value", one, 0, v) < 1e-5
    assert call("value", inf, 0, np.float32(1e-7) * v) < 1e-6  # what rounding leaves
    for method in SIZED:
        np.testing.assert_allclose(call(method, inf, 0, v, 1.0), 0, atol=1e-6)
        np.testing.assert_allclose(call(method, one, 0, v, 1.0), v, atol=1e-6)
    assert call("value", FourierLInf(low=0.4), 0, v) == pytest.approx(np.sqrt(2), rel=1e-5)


@pytest.mark.parametrize(
    "norm, shape",
    [(FULL[0], (5,)), (FULL[1], (5,)), (NORMS[2], (3, 4, 2)), (NORMS[3], (3, 4, 2))],
    ids=lambda case: case.name if isinstance(case, Norm) else "",
)
def test_samples_are_feasible_and_spheres_are_surfaces(norm, shape):
    like = jnp.zeros(shape)
    draws = jax.random.split(jax.random.key(0), 60)
    ball = jit(jax.vmap(lambda key: norm.sample_ball(key, like, 0.3)))(draws)
    sphere = jit(jax.vmap(lambda key: norm.sample_sphere(key, like, 0.3)))(draws)
    np.testing.assert_allclose(in_band(norm, ball), ball, atol=1e-6)
    assert np.all(fourier_norm(norm, ball) <= 0.3 * (1 + 1e-6))
    np.testing.assert_allclose(fourier_norm(norm, sphere), 0.3, rtol=1e-5)


@pytest.mark.parametrize(
    "norm, volume",
    [
        (FourierLInf(), 2 * 2 * np.pi),  # a cylinder of height 2 and radius sqrt(2)
        # The axial coordinate and half the rest: two cones of height 1 and radius 1/sqrt(2).
        (FourierL1(), 2 * np.pi / 6),
    ],
    ids=["linf", "l1"],
)
def test_samples_are_uniform(norm, volume):
    """In three dimensions, against uniform points of a cube that holds the ball."""
    n = 4000
    draws = jax.random.split(jax.random.key(1), n)
    ball = jit(jax.vmap(lambda key: norm.sample_ball(key, jnp.zeros(3), 1.0)))(draws)
    cube = np.random.default_rng(0).uniform(-1.75, 1.75, size=(60_000, 3))
    inside = cube[fourier_norm(norm, cube) <= 1]
    share = volume / 3.5**3
    spread = 4 * np.sqrt(share * (1 - share) / len(cube))
    assert len(inside) / len(cube) == pytest.approx(share, abs=spread)
    for direction in np.random.default_rng(1).normal(size=(3, 3)):
        assert stats.ks_2samp(flat(ball) @ direction, inside @ direction).pvalue > 1e-3
    # The norm of a uniform point has the distribution r^d.
    assert stats.kstest(fourier_norm(norm, ball) ** 3, "uniform").pvalue > 1e-3


def test_the_sphere_of_the_cylinder_is_its_surface():
    """Two lids of area 2 pi, a side of 2 * 2 pi sqrt(2); uniform on each."""
    n = 4000
    draws = jax.random.split(jax.random.key(2), n)
    v = flat(jit(jax.vmap(lambda k: FourierLInf().sample_sphere(k, jnp.zeros(3), 1.0)))(draws))
    along = v @ np.ones(3) / np.sqrt(3)
    lid = np.abs(along) > 1 - 1e-5
    share = 4 * np.pi / (4 * np.pi + 4 * np.pi * np.sqrt(2))
    assert lid.mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / n))
    radius = np.linalg.norm(v - np.outer(along, np.ones(3)) / np.sqrt(3), axis=1)
    assert stats.kstest(radius[lid] ** 2 / 2, "uniform").pvalue > 1e-3
    assert stats.kstest((along[~lid] + 1) / 2, "uniform").pvalue > 1e-3


@one_of_each
def test_batches_are_vectors_one_by_one(norm, shape):
    v = in_band(norm, vectors(shape, n=6)).reshape(2, 3, *shape)
    sizes = jnp.linspace(0.1, 1, 6).reshape(2, 3)
    for method in ("value", "steepest", *SIZED):
        args = (sizes,) if method in SIZED else ()
        batched = call(method, norm, 2, v, *args)
        for i, j in itertools.product(range(2), range(3)):
            one = call(method, norm, 0, v[i, j], *(size[i, j] for size in args))
            np.testing.assert_allclose(batched[i, j], one, rtol=1e-5, atol=1e-6)


@one_of_each
def test_scales_dtypes_and_zero(norm, shape):
    v = in_band(norm, vectors(shape))[4]
    for scale in (1e-30, 1e30):
        value = call("value", norm, 0, v * scale)
        np.testing.assert_allclose(value / scale, call("value", norm, 0, v), rtol=1e-5)
        steepest = call("steepest", norm, 0, v * scale)
        np.testing.assert_allclose(steepest, call("steepest", norm, 0, v), atol=1e-5)
        w = call("project", norm, 0, v * scale, 0.4 * scale) / scale
        np.testing.assert_allclose(w, call("project", norm, 0, v, 0.4), atol=1e-5)
    np.testing.assert_allclose(call("project", norm, 0, v, 0.0), 0, atol=1e-6)
    half = v.astype(jnp.bfloat16)
    for method in ("value", "steepest", *SIZED):
        args = (0.3,) if method in SIZED else ()
        assert jax.eval_shape(getattr(norm, method), half, *args).dtype == half.dtype
        assert np.all(np.isfinite(gradient_at_zero(method, norm, *args)))
    sample = jax.eval_shape(norm.sample_ball, jax.random.key(0), half, 1.0)
    assert sample.dtype == half.dtype


def gradient_at_zero(method, norm, *args):
    return jit(jax.grad(lambda v: jnp.sum(getattr(norm, method)(v, *args))))(jnp.zeros(6))


def test_the_derivative_of_the_value_is_the_steepest_direction_of_the_dual():
    """As for every norm: the gradient of ||w|| attains it over the dual unit ball."""
    v = vectors((5,))[0]
    gradient = jit(jax.grad(FourierL1().value))(v)
    np.testing.assert_allclose(gradient, call("steepest", FourierLInf(), 0, v), atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FourierLInf(low=0.6), "low must be <= 0.5, got 0.6"),
        (lambda: FourierL1(high=-1), "high must be >= 0, got -1"),
        (lambda: FourierLInf().value(jnp.zeros((2, 2))), "must be signals .* images"),
        (lambda: FourierLInf().value({"a": jnp.zeros(2)}), "v must be an array, got dict"),
        (lambda: FourierL1().project(jnp.zeros(3), -1.0), "radius must be >= 0, got -1.0"),
        (lambda: FourierLInf().project(jnp.zeros((2, 3)), jnp.ones(3), 1), r"batch shape \(2,\)"),
        (lambda: FourierLInf().prox_squared(jnp.zeros(3), jnp.inf), "t must be finite"),
        (lambda: FourierLInf().steepest(jnp.zeros(3, int)), "floating-point, got int32"),
        (lambda: FourierLInf(high=0.5).value(jnp.zeros(3)), "must leave some frequency"),
        (
            lambda: FourierL1().sample_ball(jax.random.key(0), jnp.zeros(3), -1.0),
            "radius must be >= 0",
        ),
    ],
)
def test_what_is_refused(make, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        make()
