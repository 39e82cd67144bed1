"""Images of any size to squares: identities, determinism, what does not fit."""

import numpy as np
import pytest

from robustjax import data


def example(height, width, channels=3):
    image = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return {"image": image, "label": np.int32(1)}


@pytest.mark.parametrize("height, width", [(8, 8), (8, 12), (13, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_center_crop_without_scaling_is_the_middle(height, width, channels):
    given = example(height, width, channels)
    found = data.center_crop(4, share=0.5)(given)
    top, left = (height - 4) // 2, (width - 4) // 2
    np.testing.assert_array_equal(found["image"], given["image"][top : top + 4, left : left + 4])
    assert found["label"] == 1
    assert data.center_crop(6)(given)["image"].shape == (6, 6, channels)


def test_a_flat_image_stays_flat():
    flat = {"image": np.full((9, 14, 3), 77, np.uint8)}
    random = np.random.default_rng(1)
    for _ in range(5):
        found = data.random_resized_crop(5)(flat, random)["image"]
        np.testing.assert_array_equal(found, np.full((5, 5, 3), 77))
    np.testing.assert_array_equal(data.center_crop(20)(flat)["image"], np.full((20, 20, 3), 77))


def test_random_crops_are_functions_of_the_generator_and_cover_the_image():
    crop = data.random_resized_crop(4)
    given = example(16, 10)
    one, again = (crop(given, np.random.default_rng(3))["image"] for _ in range(2))
    np.testing.assert_array_equal(one, again)
    random = np.random.default_rng(0)
    # Of the whole area and no other aspect only the image itself, or its mirror image, is left.
    whole = data.random_resized_crop(8, area=(1.0, 1.0), aspect=(1.0, 1.0))
    square = example(8, 8)
    seen = [whole(square, random)["image"] for _ in range(20)]
    plain = [np.array_equal(image, square["image"]) for image in seen]
    mirrored = [np.array_equal(image, square["image"][:, ::-1]) for image in seen]
    assert all(a or b for a, b in zip(plain, mirrored, strict=True))
    assert any(plain) and any(mirrored)
    # What never fits falls back on the central square, as documented.
    tall = data.random_resized_crop(4, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=False)
    long = example(4, 8)
    np.testing.assert_array_equal(tall(long, random)["image"], long["image"][:, 2:6])


def test_a_mapped_set_reads_through_the_transform():
    digits = data.load("digits", "test")
    whole = np.round(255 * digits.image[:5]).astype(np.uint8)
    part = data.Dataset(whole, digits.label[:5], 10, "five")
    small = data.mapped(part, data.center_crop(3))
    twice = data.mapped(small, data.center_crop(2, share=1.0))
    assert len(small) == 5 and small[2]["image"].shape == (3, 3, 1)
    assert twice.subset(np.array([4]))[0]["image"].shape == (2, 2, 1)
    np.testing.assert_array_equal(small.labels(), part.label)
    batch = next(data.eval_batches(twice, 5))
    assert batch["image"].shape == (5, 2, 2, 1) and batch["image"].max() <= 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.center_crop(0), "size must be >= 1, got 0"),
        (lambda: data.center_crop(4, share=1.5), "share must be <= 1, got 1.5"),
        (lambda: data.random_resized_crop(4, area=(0.0, 1.0)), "area must be > 0, got 0"),
        (lambda: data.random_resized_crop(4, aspect=(2.0, 1.0)), "aspect must be >= 2"),
        (lambda: data.center_crop(4)({"image": np.zeros((4, 4), np.uint8)}), "image must be"),
    ],
)
def test_refusals(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
