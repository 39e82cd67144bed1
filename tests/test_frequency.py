import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.frequency import band_mask, dft, inverse_dft

SHAPES = [(1,), (2,), (7,), (8,), (1, 1, 1), (4, 6, 1), (5, 3, 2), (8, 8, 3)]


def real(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def matrix(d):
    """The unitary DFT matrix, from its definition."""
    k = np.arange(d)
    return np.exp(-2j * np.pi * np.outer(k, k) / d) / np.sqrt(d)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transform_is_that_of_the_definition(shape):
    v = real(shape)
    if len(shape) == 1:
        expected = matrix(shape[0]) @ v
    else:
        expected = np.einsum("ab,bdc,ed->aec", matrix(shape[0]), v, matrix(shape[1]))
    u = dft(v)
    np.testing.assert_allclose(u, expected, atol=2e-6)
    np.testing.assert_allclose(inverse_dft(u), v, atol=1e-6)
    # Parseval: the transform is unitary.
    np.testing.assert_allclose(np.linalg.norm(u), np.linalg.norm(v), rtol=1e-6)


def test_batch_axes_and_dtypes():
    v = real((3, 2, 4, 6, 2))
    one_by_one = np.stack([[dft(v[i, j]) for j in range(2)] for i in range(3)])
    np.testing.assert_allclose(dft(v, 2), one_by_one, atol=1e-6)
    np.testing.assert_allclose(inverse_dft(dft(v, 2), 2), v, atol=1e-6)
    # Three axes are one image, or a batch of batches of signals.
    np.testing.assert_allclose(dft(v[0, 0], 2)[1, 1], dft(v[0, 0, 1, 1]), atol=1e-6)
    assert dft(real((4,)).astype(jnp.bfloat16)).dtype == jnp.complex64


def test_the_inverse_takes_the_hermitian_part():
    u = real((5,)) + 1j * real((5,), 1)
    mirrored = jnp.conj(jnp.roll(jnp.flip(u), 1))
    np.testing.assert_allclose(inverse_dft(u), inverse_dft((u + mirrored) / 2), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (1, 9), (6, 1)], ids=str)
@pytest.mark.parametrize(
    "band", [{}, {"low": 0.2}, {"high": 0.1}, {"low": 0.4, "high": 0.1}], ids=str
)
def test_bands_are_symmetric_and_keep_what_they_say(shape, band):
    mask = band_mask(*shape, **band)
    mirrored = np.roll(np.flip(mask), (1, 1), (0, 1))
    np.testing.assert_array_equal(mask, mirrored)
    for i, f_y in enumerate(np.fft.fftfreq(shape[0])):
        for j, f_x in enumerate(np.fft.fftfreq(shape[1])):
            f = max(abs(f_x), abs(f_y))
            assert mask[i, j] == (f <= band.get("low", 1) and f >= band.get("high", 0))


def test_the_bands_of_thirty_two_pixels():
    low, high = band_mask(32, 32, low=0.125), band_mask(32, 32, high=0.25)
    assert (low.sum(), high.sum()) == (9 * 9, 32 * 32 - 15 * 15)
    assert low[0, 0] and not high[0, 0] and not np.any(low & high)
    np.testing.assert_array_equal(band_mask(1, 1, low=0.0), [[True]])


def test_a_filtered_image_is_real():
    v = real((6, 8, 2))
    u = dft(v) * band_mask(6, 8, low=0.25)[:, :, None]
    full = jnp.fft.ifftn(u, axes=(0, 1), norm="ortho")
    assert np.abs(full.imag).max() < 1e-6
    np.testing.assert_allclose(inverse_dft(u), full.real, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dft(jnp.zeros((2, 3))), r"v must be signals .* got shape \(2, 3\)"),
        (lambda: dft(jnp.zeros((2, 3)), 2), "after 2 batch axes"),
        (lambda: dft(jnp.zeros((0,))), "got shape"),
        (lambda: dft(jnp.zeros((3,), int)), "floating-point, got int32"),
        (lambda: dft([1.0]), "v must be an array"),
        (lambda: inverse_dft(jnp.zeros((2, 3), complex)), "spectrum must be signals"),
        (lambda: band_mask(0, 3), "h must be >= 1, got 0"),
        (lambda: band_mask(3, 3, low=0.7), "low must be <= 0.5, got 0.7"),
        (lambda: band_mask(3, 3, high=-0.1), "high must be >= 0, got -0.1"),
        (lambda: band_mask(4, 4, low=0.1, high=0.05), "4 x 4 images, got 0.1 and 0.05"),
    ],
)
def test_what_is_refused(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()


def test_under_jit_and_derivatives():
    v = real((4, 4, 1))
    np.testing.assert_allclose(jax.jit(dft)(v), dft(v), atol=1e-6)
    # The gradient of ||F v||^2 / 2 is v, the transform being unitary.
    gradient = jax.grad(lambda v: jnp.sum(jnp.abs(dft(v)) ** 2) / 2)(v)
    np.testing.assert_allclose(gradient, v, atol=1e-5)
