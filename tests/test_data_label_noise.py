"""Label noise: exact counts, uniform classes, one seed one noise."""

import numpy as np
import pytest

from robustjax import data

RNG = np.random.default_rng(0)


def dataset(n=1000, classes=10):
    image = RNG.integers(256, size=(n, 2, 2, 1), dtype=np.uint8)
    label = np.arange(n, dtype=np.int32) % classes
    return data.Dataset(image, label, classes, "made-up")


def test_only_labels_change_and_the_original_stays():
    clean = dataset()
    before = clean.label.copy()
    noisy = data.redraw_labels(clean, 0.3, seed=1)
    assert noisy.image is clean.image
    assert (noisy.num_classes, noisy.name) == (10, "made-up")
    assert noisy.label.dtype == np.int32
    np.testing.assert_array_equal(clean.label, before)


@pytest.mark.parametrize("n, share, count", [(10, 0.3, 3), (10, 0.25, 2), (7, 0.5, 4), (9, 1, 9)])
def test_the_exact_count_is_redrawn(n, share, count):
    # With so many classes a redrawn label is the old one with probability 1e-6.
    label = np.zeros(n, np.int32)
    many = data.Dataset(np.zeros((n, 2, 2, 1), np.uint8), label, 10**6, "many")
    assert np.sum(data.redraw_labels(many, share).label != label) == count


def test_classes_are_uniform_and_some_labels_stay():
    clean = dataset(20_000)
    noisy = data.redraw_labels(clean, 1.0, seed=3)
    counts = np.histogram2d(clean.label, noisy.label, bins=10)[0]
    # chi-squared with 99 degrees of freedom: mean 99, standard deviation 14
    assert np.sum((counts - 200) ** 2 / 200) < 99 + 4 * 14
    changed = np.mean(data.redraw_labels(clean, 0.3).label != clean.label)
    assert changed == pytest.approx(0.3 * 0.9, abs=0.01)


def test_no_share_no_noise():
    clean = dataset()
    np.testing.assert_array_equal(data.redraw_labels(clean, 0.0).label, clean.label)


def test_seeds():
    clean = dataset()
    one, again, other = (data.redraw_labels(clean, 0.3, seed=s).label for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)


def test_the_noise_never_changes():
    """Other noise would make results of different versions incomparable."""
    clean = dataset(30)
    label = data.redraw_labels(clean, 0.2, seed=0).label
    changed = np.flatnonzero(label != clean.label)
    assert dict(zip(changed.tolist(), label[changed].tolist(), strict=True)) == {
        5: 9,
        6: 3,
        13: 8,
        16: 7,
        23: 9,
        29: 0,
    }


def test_smaller_shares_are_nested_in_larger_ones():
    clean = dataset()
    small, large = (data.redraw_labels(clean, share, seed=5).label for share in (0.2, 0.6))
    changed = small != clean.label
    np.testing.assert_array_equal(small[changed], large[changed])
    assert np.sum(large != clean.label) > 2 * changed.sum()


@pytest.mark.parametrize(
    "share, seed, message",
    [
        (-0.1, 0, "share must be >= 0, got -0.1"),
        (1.1, 0, "share must be <= 1, got 1.1"),
        (0.5, -1, "seed must be >= 0, got -1"),
        (0.5, 2**32, "seed must be <= 4294967295"),
    ],
)
def test_bad_input(share, seed, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        data.redraw_labels(dataset(), share, seed=seed)
