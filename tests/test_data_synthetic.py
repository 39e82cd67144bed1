"""Synthetic waveforms and the range of values: images in [0, 1], waveforms in [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import data

KEY = jax.random.key(3)


def test_the_pitch_is_the_class():
    tones = data.tones(KEY, 31, 2_000, 5, noise=0.2)
    assert tones.image.shape == (31, 2_000, 1) and tones.image.dtype == np.float32
    assert np.abs(tones.image).max() <= 1
    spectrum = np.abs(np.fft.rfft(tones.image[..., 0], axis=1))
    strongest = spectrum.argmax(axis=1) / 2_000  # cycles per sample
    expected = 0.02 * 10 ** (np.arange(5) / 4)  # 0.02 to 0.2 in equal ratios
    np.testing.assert_allclose(strongest, expected[tones.label], atol=0.5 / 2_000)
    np.testing.assert_array_equal(np.sort(np.bincount(tones.label)), [6, 6, 6, 6, 7])
    assert tones.num_classes == 5


def test_without_noise_a_tone_is_a_sine_of_the_given_amplitude():
    pure = data.tones(KEY, 4, 500, 2, lowest=0.05, highest=0.25, amplitude=(0.5, 0.5), noise=0.0)
    for wave, label in zip(pure.image[..., 0], pure.label, strict=True):
        t = 2 * np.pi * (0.05, 0.25)[label] * np.arange(500)
        basis = np.stack([np.sin(t), np.cos(t)], axis=1)
        parts, *_ = np.linalg.lstsq(basis, wave, rcond=None)
        np.testing.assert_allclose(basis @ parts, wave, atol=1e-4)
        assert np.hypot(*parts) == pytest.approx(0.5, abs=1e-4)


def test_tones_depend_on_the_key_alone():
    first, again = (data.tones(KEY, 6, 50, 3) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    other = data.tones(jax.random.key(4), 6, 50, 3)
    assert np.abs(first.image - other.image).max() > 0.1


@pytest.mark.parametrize(
    "change,message",
    [
        ({"n": 0}, "n must be >= 1"),
        ({"samples": 1}, "samples must be >= 2"),
        ({"classes": 1}, "classes must be >= 2"),
        ({"lowest": 0.0}, "lowest must be > 0"),
        ({"highest": 0.5}, "highest must be < 0.5"),
        ({"lowest": 0.3}, "highest must be > 0.3"),
        ({"amplitude": (0.5, 1.5)}, "amplitude must be <= 1"),
        ({"amplitude": (0.5, 0.4)}, "amplitude must be >= 0.5"),
        ({"noise": -0.1}, "noise must be >= 0"),
    ],
)
def test_bad_tones_are_refused(plain_calls, change, message):
    with pytest.raises(ValueError, match=message):
        data.tones(KEY, **{"n": 4, "samples": 20, "classes": 2, **change})


def test_bounds_are_those_of_images_and_of_waveforms(plain_calls):
    assert data.bounds((32, 32, 3)) == (0.0, 1.0)
    assert data.bounds((16_000, 1)) == (-1.0, 1.0)
    for shape in ((7,), (8, 8)):
        with pytest.raises(ValueError, match=r"shape must be \(h, w, c\) or \(samples, 1\), got"):
            data.bounds(shape)


def test_sixteen_bits_become_floats_on_host_and_device():
    wave = np.array([-32768, -1, 0, 1, 32767], np.int16)
    expected = np.array([-1, -(2.0**-15), 0, 2.0**-15, 1 - 2.0**-15], np.float32)
    np.testing.assert_array_equal(data.as_float(wave), expected)
    np.testing.assert_array_equal(jax.jit(data.as_float)(jnp.asarray(wave)), expected)


def waveforms(image):
    return data.Dataset(image, np.zeros(len(image), np.int32), 2, "waves")


def test_batches_of_waveforms_are_floats_whatever_they_are_stored_as():
    image = np.array([[[-32768], [16384]], [[0], [8192]]], np.int16)
    expected = np.array([[[-1], [0.5]], [[0], [0.25]]], np.float32)
    for stored in (image, expected):
        whole = waveforms(stored)
        (batch,) = data.eval_batches(whole, 2)
        np.testing.assert_array_equal(batch["image"], expected)
        gathered = data.take(data.on_device(whole), jnp.array([1, 0]))
        np.testing.assert_array_equal(gathered["image"], expected[::-1])
        data.check_values("images", batch["image"])


@pytest.mark.parametrize(
    "image,message",
    [
        (np.full((2, 5, 1), 1.5, np.float32), r"image must lie in \[-1, 1\], got values from 1.5"),
        (np.zeros((2, 5, 1), np.uint8), r"or int16 or float32 of shape \(n, samples, 1\)"),
        (np.zeros((2, 5, 3), np.float32), r"of shape \(n, samples, 1\), got float32\(2, 5, 3\)"),
        (np.zeros((2, 5, 5, 1), np.int16), r"image must be uint8 or float32 of shape \(n, h, w, c"),
        (-np.ones((2, 5, 5, 1), np.float32), r"image must lie in \[0, 1\]"),
    ],
)
def test_other_arrays_are_refused(plain_calls, image, message):
    with pytest.raises(ValueError, match=message):
        waveforms(image)
