"""The cosine transform against its matrix and SciPy; identities of filters, bands and noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from robustjax.dct import (
    band_noise,
    dct,
    dct_bands,
    dct_distance,
    dct_matrix,
    dct_resize,
    energy_filter,
    energy_share,
    inverse_dct,
    irrelevant_bases,
    low_pass_filter,
    low_pass_mask,
    low_pass_radius,
    spatial_covariance,
    spectral_energy,
)

KEY = jax.random.key(0)
SHAPES = [(1,), (7,), (300,), (1, 1, 1), (4, 6, 1), (5, 3, 2), (8, 8, 3)]


def real(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = real((3, 8, 6, 2))


def energy(x):
    return np.sum(np.square(x), axis=(1, 2, 3))


def basis_image(i, j, h=8, w=6):
    return np.outer(dct_matrix(h)[i], dct_matrix(w)[j])


@pytest.mark.parametrize("d", [1, 3, 8, 28, 32, 224])
def test_the_matrix_is_orthogonal_and_that_of_scipy(d):
    c = dct_matrix(d)
    np.testing.assert_allclose(c @ c.T, np.eye(d), atol=1e-12)
    np.testing.assert_allclose(c, scipy.fft.dct(np.eye(d), axis=0, norm="ortho"), atol=1e-12)


def test_the_matrix_of_three():
    rows = [[1, 1, 1] / np.sqrt(3), [1, 0, -1] / np.sqrt(2), [1, -2, 1] / np.sqrt(6)]
    np.testing.assert_allclose(dct_matrix(3), rows, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transform_is_that_of_scipy_and_keeps_energy(shape):
    v, other = real(shape), real(shape, 1)
    axes = (0,) if len(shape) == 1 else (0, 1)
    expected = scipy.fft.dctn(np.asarray(v, np.float64), axes=axes, norm="ortho")
    u = dct(v)
    np.testing.assert_allclose(u, expected, atol=3e-6)
    np.testing.assert_allclose(inverse_dct(u), v, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(u), np.linalg.norm(v), rtol=1e-6)
    # <C v, w> = <v, C^T w>
    np.testing.assert_allclose(np.vdot(u, other), np.vdot(v, inverse_dct(other)), atol=1e-5)


def test_the_transform_in_double_precision():
    with jax.enable_x64(True):
        v = jnp.asarray(np.random.default_rng(0).normal(size=(32, 28, 1)))
        expected = np.einsum("ki,ijc,lj->klc", dct_matrix(32), v, dct_matrix(28))
        np.testing.assert_allclose(dct(v), expected, atol=1e-12)
        np.testing.assert_allclose(inverse_dct(dct(v)), v, atol=1e-12)


def test_batches_dtypes_and_derivatives():
    v = real((3, 2, 4, 6, 2))
    one_by_one = jax.vmap(jax.vmap(dct))(v)
    np.testing.assert_allclose(jax.jit(dct, static_argnums=1)(v, 2), one_by_one, atol=1e-6)
    assert inverse_dct(v[0, 0, 0, 0].astype(jnp.bfloat16)).dtype == jnp.bfloat16
    # The gradient of ||C v||^2 / 2 is v.
    gradient = jax.grad(lambda v: jnp.sum(dct(v, 2) ** 2) / 2)(v)
    np.testing.assert_allclose(gradient, v, atol=1e-5)


def test_a_constant_image_has_one_coefficient():
    u = np.array(dct(jnp.full((8, 6, 1), 0.3)))
    np.testing.assert_allclose(u[0, 0, 0], 0.3 * np.sqrt(48), rtol=1e-6)
    u[0, 0] = 0
    assert np.abs(u).max() < 1e-6


def test_spectral_energy_of_noise_and_of_the_mean():
    noise = 0.5 * real((400, 8, 8, 2))
    statistic = spectral_energy(noise)
    # The mean of 800 absolute values has the standard error 0.5 sqrt((1 - 2 / pi) / 800).
    error = 0.5 * np.sqrt((1 - 2 / np.pi) / 800)
    np.testing.assert_allclose(statistic, 0.5 * np.sqrt(2 / np.pi), atol=5 * error)
    np.testing.assert_array_equal(spectral_energy(np.asarray(noise)), statistic)
    means = np.abs(np.mean(noise, axis=(1, 2)))
    np.testing.assert_allclose(statistic[0, 0], 8 * means.mean(), rtol=1e-5)


def test_energy_shares():
    bands = dct_bands(8, 6)
    shares = [energy_share(X, band) for band in bands]
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-6)
    np.testing.assert_allclose(energy_share(jnp.ones((1, 8, 6, 1)), bands[0]), 1)
    assert energy_share(0 * X, bands[0]) == 0
    white = energy_share(real((100, 32, 32, 1)), dct_bands(32, 32)[0])
    np.testing.assert_allclose(white, 103 / 1024, atol=0.01)


def test_natural_images_have_their_energy_in_the_lowest_tenth():
    from sklearn.datasets import load_sample_image

    image = load_sample_image("china.jpg")[None, :224, :224] / np.float32(255)
    assert energy_share(jnp.asarray(image), dct_bands(224, 224)[0]) > 0.9


# Percent, and how many of the 48 bases a threshold at that percentile (interpolated) keeps.
@pytest.mark.parametrize("removed, kept", [(0, 48), (25, 36), (50, 24), (90, 5), (100, 1)])
def test_the_energy_filter_keeps_the_largest_bases(removed, kept):
    x = X[..., :1]
    y = energy_filter(x, removed)
    u, v = np.asarray(dct(x, 1)), np.asarray(dct(y, 1))
    mask = np.abs(v) > 1e-5
    assert mask.sum(axis=(1, 2, 3)).tolist() == [kept] * 3
    np.testing.assert_allclose(v[mask], u[mask], atol=1e-5)
    # No other mask of that size keeps more energy.
    best = np.sort(np.square(u).reshape(3, -1))[:, -kept:].sum(axis=1)
    np.testing.assert_allclose(energy(y), best, rtol=1e-5)
    assert np.all(energy(y) <= energy(x) * (1 + 1e-6))


def test_the_energy_filter_at_zero_is_the_identity_and_strict_it_is_not():
    np.testing.assert_allclose(energy_filter(X, 0.0), X, atol=2e-6)
    strict = dct(energy_filter(X, 0.0, inclusive=False, per_channel=True), 1)
    assert (np.abs(strict) < 1e-5).sum(axis=(1, 2)).tolist() == [[1, 1]] * 3


def test_channels_share_the_mask_of_their_mean_magnitude():
    u = np.abs(np.asarray(dct(energy_filter(X, 60.0), 1))) > 1e-5
    np.testing.assert_array_equal(u[..., 0], u[..., 1])
    magnitude = np.abs(np.asarray(dct(X, 1))).mean(axis=3)
    threshold = np.percentile(magnitude, 60, axis=(1, 2), keepdims=True)
    np.testing.assert_array_equal(u[..., 0], magnitude >= threshold)
    alone = energy_filter(X[..., 1:], 60.0)
    np.testing.assert_allclose(energy_filter(X, 60.0, per_channel=True)[..., 1:], alone, atol=1e-5)


def test_the_energy_filter_commutes_with_a_flip_and_takes_a_traced_percentage():
    filtered = energy_filter(X, 70.0)
    np.testing.assert_allclose(energy_filter(X[:, :, ::-1], 70.0), filtered[:, :, ::-1], atol=2e-6)
    np.testing.assert_allclose(jax.jit(energy_filter)(X, jnp.float32(70)), filtered, atol=2e-6)
    assert energy_filter(X.astype(jnp.bfloat16), 70.0).dtype == jnp.bfloat16


RADII = [  # for 32x32 images: percent removed, radius and share of the bases, of the public code
    (10, 34.982, 0.8994),
    (30, 29.529, 0.6963),
    (50, 24.981, 0.4980),
    (70, 19.098, 0.2969),
    (90, 10.816, 0.0996),
]


@pytest.mark.parametrize("removed, radius, share", RADII)
def test_the_radii_of_thirty_two_pixels(removed, radius, share):
    np.testing.assert_allclose(low_pass_radius(32, 32, removed), radius, atol=5e-4)
    np.testing.assert_allclose(low_pass_mask(32, 32, removed).mean(), share, atol=5e-5)
    by_radius = low_pass_radius(32, 32, removed, rule="radius")
    np.testing.assert_allclose(by_radius, (1 - removed / 100) * np.sqrt(2) * 32)


def test_a_share_of_exactly_what_is_to_be_kept_is_too_large():
    # Of 10 bases in a row, each percentage removes one more than rounding down would.
    kept = [low_pass_mask(1, 10, p).sum() for p in (10, 20, 30, 40, 50, 60, 70, 80)]
    assert kept == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("rule", ["area", "radius"])
def test_low_pass_masks_shrink_to_the_mean(rule):
    masks = [low_pass_mask(8, 6, p, rule=rule) for p in (0, 5, 20, 50, 80, 95, 99.99)]
    for larger, smaller in itertools.pairwise(masks):
        assert np.all(larger | ~smaller)
    assert masks[0].all() and masks[-1].sum() == 1 and masks[-1][0, 0]


def test_the_low_pass_filter_is_an_orthogonal_projection():
    y = low_pass_filter(X, 40.0)
    np.testing.assert_allclose(low_pass_filter(y, 40.0), y, atol=2e-6)
    other = real(X.shape, 1)
    np.testing.assert_allclose(
        np.vdot(y, other), np.vdot(X, low_pass_filter(other, 40.0)), rtol=1e-5
    )
    np.testing.assert_allclose(low_pass_filter(X, 0.0), X, atol=2e-6)
    constant = jnp.full((1, 8, 6, 3), 0.7)
    np.testing.assert_allclose(low_pass_filter(constant, 99.0), constant, atol=1e-6)


@pytest.mark.parametrize("place", [(0, 5), (3, 2), (7, 0)])
def test_the_low_pass_filter_keeps_a_basis_image_or_removes_it(place):
    image = jnp.asarray(basis_image(*place), jnp.float32)[None, :, :, None]
    kept = low_pass_mask(8, 6, 50.0)[place]
    np.testing.assert_allclose(low_pass_filter(image, 50.0), kept * image, atol=1e-6)


def test_the_ten_bands_of_thirty_two_pixels():
    bands = dct_bands(32, 32)
    sizes = [103, 102, 103, 102, 102, 103, 102, 103, 102, 102]
    assert bands.sum(axis=(1, 2)).tolist() == sizes


@pytest.mark.parametrize("shape", [(8, 6), (28, 28), (1, 13), (16, 16)], ids=str)
def test_bands_are_a_partition_by_distance(shape):
    bands, distance = dct_bands(*shape), dct_distance(*shape)
    np.testing.assert_array_equal(bands.sum(axis=0), np.ones(shape))
    sizes = bands.sum(axis=(1, 2))
    assert sizes.max() - sizes.min() <= 1
    for nearer, farther in itertools.pairwise(bands):
        assert distance[nearer].max() <= distance[farther].min()


def test_band_noise_lies_in_its_band_and_sums_to_white_noise():
    bands = dct_bands(8, 6)
    draw = jax.jit(jax.vmap(lambda mask: band_noise(KEY, mask, 2, std=0.5)))
    noises = draw(jnp.asarray(bands))
    coefficients = np.asarray(dct(noises, 1))
    for band, u in zip(bands, coefficients, strict=True):
        assert np.abs(u[~band]).max() < 1e-6 and np.abs(u[band]).min() > 1e-6
    gram = np.einsum("ahwc,bhwc->ab", noises, noises)
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-5)
    white = inverse_dct(0.5 * jax.random.normal(KEY, (8, 6, 2)))
    np.testing.assert_allclose(noises.sum(axis=0), white, atol=1e-5)


def test_the_size_of_band_noise():
    mask = dct_bands(8, 6)[4]
    draw = jax.jit(jax.vmap(lambda key, std: band_noise(key, mask, 3, std=std), (0, None)))
    squares = np.square(draw(jax.random.split(KEY, 500), 0.2)).sum(axis=(1, 2, 3))
    mean = 0.2**2 * mask.sum() * 3
    np.testing.assert_allclose(squares.mean(), mean, atol=4 * squares.std() / np.sqrt(500))
    assert not np.any(draw(jax.random.split(KEY, 500), 0.0))
    scaled = jax.jit(lambda mask: band_noise(KEY, mask, 3, norm=1.5))
    np.testing.assert_allclose(np.linalg.norm(scaled(mask)), 1.5, rtol=1e-5)
    assert not np.any(scaled(0 * mask > 0))


# Which of the frequencies 0, 1, 2 are there, and what (X_0, X_1, X_2) gives in space.
R2, R3, R6 = np.sqrt([2, 3, 6])
SPATIAL = [
    ([1, 0, 0], lambda a, b, c: (a / R3, a / R3, a / R3)),
    ([0, 1, 0], lambda a, b, c: (b / R2, 0, -b / R2)),
    ([0, 0, 1], lambda a, b, c: (c / R6, -np.sqrt(2 / 3) * c, c / R6)),
    ([0, 1, 1], lambda a, b, c: (b / R2 + c / R6, -np.sqrt(2 / 3) * c, -b / R2 + c / R6)),
    ([1, 0, 1], lambda a, b, c: (a / R3 + c / R6, a / R3 - np.sqrt(2 / 3) * c, a / R3 + c / R6)),
    ([1, 1, 0], lambda a, b, c: (a / R3 + b / R2, a / R3, a / R3 - b / R2)),
    (
        [1, 1, 1],
        lambda a, b, c: (
            a / R3 + b / R2 + c / R6,
            a / R3 - np.sqrt(2 / 3) * c,
            a / R3 - b / R2 + c / R6,
        ),
    ),
]


@pytest.mark.parametrize("present, spatial", SPATIAL)
def test_missing_frequencies_are_redundant_coordinates(present, spatial):
    coefficients = np.array([0.7, -1.1, 0.4]) * present
    x = inverse_dct(jnp.asarray(coefficients, jnp.float32))
    np.testing.assert_allclose(x, spatial(*coefficients), atol=1e-6)
    covariance = spatial_covariance(np.array([2.0, 3.0, 0.5]) * present)
    assert np.linalg.matrix_rank(covariance) == sum(present)
    if not present[2]:
        np.testing.assert_allclose(x[0] - 2 * x[1] + x[2], 0, atol=1e-6)


def test_minimizers_along_an_irrelevant_basis_vector_obey_pythagoras():
    c = dct_matrix(3)
    w = c[:2].T @ [0.3, -0.8]
    for a in (-2.0, 0.5):
        np.testing.assert_allclose(np.sum((w + a * c[2]) ** 2), np.sum(w**2) + a**2)
        covariance = spatial_covariance(np.array([2.0, 3.0, 0.0]))
        np.testing.assert_allclose(covariance @ (w + a * c[2]), covariance @ w, atol=1e-12)


def test_irrelevant_bases_of_resized_images():
    large = dct_resize(real((40, 8, 8, 2)), 16, 16)
    expected = np.maximum(*np.ogrid[:16, :16]) >= 8
    np.testing.assert_array_equal(irrelevant_bases(large), expected)
    # Share of each of the ten bands.
    shares = [expected[band].mean() for band in dct_bands(16, 16)]
    np.testing.assert_allclose(shares, [0, 0, 0.6, 0.92, 1, 1, 1, 1, 1, 1], atol=0.02)
    # Permuted pixels are as redundant, and use all bases.
    order = np.random.default_rng(0).permutation(256)
    permuted = large.reshape(40, 256, 2)[:, order].reshape(large.shape)
    assert not irrelevant_bases(permuted).any()
    assert irrelevant_bases(0 * large).all()


def test_resizing_keeps_the_mean_and_comes_back():
    np.testing.assert_allclose(dct_resize(X, 8, 6), X, atol=2e-6)
    large = dct_resize(X, 11, 13)
    np.testing.assert_allclose(dct_resize(large, 8, 6), X, atol=3e-6)
    np.testing.assert_allclose(np.mean(large, (1, 2)), np.mean(X, (1, 2)), atol=1e-6)
    np.testing.assert_allclose(dct_resize(jnp.full((1, 8, 6, 1), 0.4), 3, 20), 0.4, atol=1e-6)


MASK = np.ones((2, 2), bool)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dct_matrix(0), "d must be >= 1, got 0"),
        (lambda: dct(jnp.zeros((2, 3))), r"v must be signals .* got shape \(2, 3\)"),
        (lambda: dct(jnp.zeros((3,), int)), "v must be floating-point, got int32"),
        (lambda: inverse_dct(jnp.zeros((2, 3))), "coefficients must be signals"),
        (lambda: dct_distance(2, 0), "w must be >= 1, got 0"),
        (lambda: spectral_energy(X[0]), r"x must be images \(n, h, w, c\), got shape \(8, 6, 2\)"),
        (lambda: energy_share(X, MASK), r"mask must have the size of the images, \(8, 6\)"),
        (lambda: irrelevant_bases(X, tolerance=-1), "tolerance must be >= 0, got -1"),
        (lambda: spatial_covariance([1.0, -1.0]), "variances must be >= 0, got -1"),
        (lambda: spatial_covariance(1.0), r"variances must have shape \(d,\)"),
        (lambda: energy_filter(X, 101), "removed must be <= 100, got 101"),
        (lambda: low_pass_filter(X, 100), "removed must be < 100, got 100"),
        (lambda: low_pass_radius(8, 8, 5, rule="volume"), "rule must be one of 'area', 'radius'"),
        (lambda: dct_bands(2, 2, 5), "bands must be <= 4, got 5"),
        (lambda: band_noise(KEY, MASK, 1), "one of std and norm must be given"),
        (lambda: band_noise(KEY, MASK, 1, std=1, norm=1), "one of std and norm must be given"),
        (lambda: band_noise(KEY, MASK, 1, std=-1), "std must be >= 0, got -1"),
        (lambda: band_noise(KEY, MASK[0], 1, std=1), r"mask must have shape \(h, w\)"),
        (lambda: band_noise(KEY, MASK, 0, std=1), "channels must be >= 1"),
        (lambda: dct_resize(X, 0, 4), "h must be >= 1, got 0"),
    ],
)
def test_what_is_refused(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
