"""Arrays and image folders on disk."""

import numpy as np
import pytest
from PIL import Image

from robustjax import data


def images(n, offset=0, size=(4, 5)):
    """Distinct uint8 images by formula."""
    i, h, w, c = np.ogrid[:n, : size[0], : size[1], :3]
    return ((37 * (i + offset) + 11 * h + 5 * w + 83 * c) % 256).astype(np.uint8)


X_TRAIN, Y_TRAIN = images(30), np.arange(30) % 3
X_TEST, Y_TEST = images(9, offset=30), np.arange(9) % 3
BOTH = {"x_train": X_TRAIN, "y_train": Y_TRAIN, "x_test": X_TEST, "y_test": Y_TEST}


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_npz_gives_the_official_test_set_and_a_stratified_hold_out(tmp_path):
    name = save(tmp_path / "tiny.npz", **BOTH)
    train, validation, test = (
        data.load(name, split, validation_size=6) for split in ("train", "validation", "test")
    )
    np.testing.assert_array_equal(test.image, X_TEST)
    np.testing.assert_array_equal(test.label, Y_TEST)
    assert (test.num_classes, test.name, test.label.dtype) == (3, "tiny", np.int32)
    np.testing.assert_array_equal(np.bincount(validation.label), [2, 2, 2])
    rest, held = data.hold_out(Y_TRAIN, 6)
    np.testing.assert_array_equal(train.image, X_TRAIN[rest])
    np.testing.assert_array_equal(validation.image, X_TRAIN[held])
    other = data.load(name, "validation", validation_size=6, seed=1)
    assert not np.array_equal(other.image, validation.image)
    np.testing.assert_array_equal(data.load(name, "train", validation_size=0).image, X_TRAIN)


def test_npz_validation_arrays_are_used_unless_a_size_is_given(tmp_path):
    name = save(tmp_path / "own.npz", **BOTH, x_validation=X_TEST[:3], y_validation=Y_TEST[:3])
    np.testing.assert_array_equal(data.load(name, "validation").image, X_TEST[:3])
    np.testing.assert_array_equal(data.load(name, "train").image, X_TRAIN)
    assert len(data.load(name, "train", validation_size=6)) == 24
    assert len(data.load(name, "validation", validation_size=6)) == 6


def test_npz_floats_are_kept_as_float32(tmp_path):
    x = X_TEST / 255
    name = save(tmp_path / "float.npz", image=x, label=Y_TEST, num_classes=7)
    test = data.load(name, "test")
    assert test.image.dtype == np.float32 and test.num_classes == 7
    np.testing.assert_allclose(test.image, x, atol=1e-7)


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"a": X_TEST}, "must hold the arrays x_train, y_train, .* or image and label, got a"),
        ({"x_train": X_TRAIN}, "must hold both x_train and y_train, lacks y_train"),
        ({"image": X_TEST}, "must hold both image and label, lacks label"),
        ({"image": X_TEST, "label": Y_TEST[:4]}, "label in .* one entry per image, 9, got 4"),
        ({"image": X_TEST, "label": Y_TEST - 1}, "label in .* must lie in 0 .. 1, got -1"),
        ({"image": X_TEST, "label": Y_TEST / 1.0}, "label in .* must be integers"),
        ({"image": X_TEST, "label": Y_TEST[:, None]}, "label in .* must be integers of shape"),
        ({"image": X_TEST * 1.0, "label": Y_TEST}, r"image in .* must lie in \[0, 1\]"),
        ({"image": X_TEST * np.nan, "label": Y_TEST}, "image in .* must be finite"),
        ({"image": X_TEST[..., 0], "label": Y_TEST}, "image in .* of shape .n, h, w, c."),
        ({"image": X_TEST.astype(int), "label": Y_TEST}, "image in .* got int64"),
        ({"image": X_TEST[:0], "label": Y_TEST[:0]}, "image in .* at least one image"),
        ({"image": X_TEST, "label": Y_TEST, "num_classes": 2}, "must lie in 0 .. 1, got 2"),
        ({"image": X_TEST, "label": Y_TEST, "num_classes": 2.5}, "num_classes in .* one integer"),
        ({"image": np.array([{}]), "label": Y_TEST}, "must be an .npz archive of plain arrays"),
    ],
)
def test_npz_refuses(plain_calls, tmp_path, arrays, message):
    name = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(name, "test")


def test_npz_refuses_what_is_not_an_archive(plain_calls, tmp_path):
    np.save(tmp_path / "one.npy", X_TEST)
    (tmp_path / "text.npz").write_text("not an archive")
    whole = (save(tmp_path / "cut.npz", **BOTH), (tmp_path / "cut.npz").read_bytes())[1]
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for file in ("one.npy", "text.npz", "cut.npz"):
        with pytest.raises(ValueError, match=f"{file} must be an .npz archive of plain arrays"):
            data.load(f"npz:{tmp_path / file}", "test")
    with pytest.raises(ValueError, match=r"npz file must exist, got /nowhere/x.npz"):
        data.load("npz:/nowhere/x.npz", "test")


def test_npz_of_one_set_is_for_evaluation_only(plain_calls, tmp_path):
    name = save(tmp_path / "one.npz", image=X_TEST, label=Y_TEST)
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=f"got '{split}': it has labelled examples only for t"):
            data.load(name, split)


def test_validation_size_must_fit(plain_calls, tmp_path):
    name = save(tmp_path / "tiny.npz", **BOTH)
    with pytest.raises(ValueError, match=r"validation_size must be below .*, 30, got 1000"):
        data.load(name, "train")
    with pytest.raises(ValueError, match="validation_size must be > 0 for split 'validation'"):
        data.load(name, "validation", validation_size=0)


@pytest.fixture
def folder(tmp_path):
    for split, x, y in (("train", X_TRAIN, Y_TRAIN), ("val", X_TEST, Y_TEST)):
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            place = tmp_path / split / f"class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:03}.png")
    (tmp_path / "train" / "class_0" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_of_images_gives_the_arrays_that_were_written(folder):
    """Without a test folder, ``val`` is the official test set, as for ImageNet."""
    test = data.load(f"folder:{folder}", "test")
    by_class = np.argsort(Y_TEST, kind="stable")
    np.testing.assert_array_equal(test.image, X_TEST[by_class])
    np.testing.assert_array_equal(test.label, Y_TEST[by_class])
    assert (test.num_classes, test.name) == (3, folder.name)
    by_class = np.argsort(Y_TRAIN, kind="stable")
    rest, held = data.hold_out(Y_TRAIN[by_class], 6)
    train = data.load_source(f"folder:{folder}", "train", validation_size=6)
    validation = data.load(f"folder:{folder}", "validation", validation_size=6)
    np.testing.assert_array_equal(train[4]["image"], X_TRAIN[by_class][rest][4])
    np.testing.assert_array_equal(train.labels(), Y_TRAIN[by_class][rest])
    np.testing.assert_array_equal(validation.image, X_TRAIN[by_class][held])


def test_folder_images_are_read_as_rgb_of_their_own_size(folder):
    gray = images(1, size=(6, 7))[0, :, :, 0]
    Image.fromarray(gray).save(folder / "val" / "class_0" / "a_gray.png")
    source = data.load_source(f"folder:{folder}", "test")
    shapes = {source[i]["image"].shape for i in range(len(source))}
    assert shapes == {(4, 5, 3), (6, 7, 3)}
    found = next(source[i]["image"] for i in range(10) if source[i]["image"].shape[0] == 6)
    np.testing.assert_array_equal(found, np.repeat(gray[..., None], 3, axis=2))
    with pytest.raises(ValueError, match="one shape and dtype to be stacked, got uint8"):
        data.load(f"folder:{folder}", "test")


def test_folder_refuses(plain_calls, folder):
    name = f"folder:{folder}"
    with pytest.raises(ValueError, match="image folder must exist, got /nowhere"):
        data.load("folder:/nowhere", "train")
    with pytest.raises(
        ValueError, match=r"must hold the folders train, val or test, .* got class_"
    ):
        data.load(f"folder:{folder / 'train'}", "train")
    deep = np.zeros((4, 5), np.uint16)
    Image.fromarray(deep).save(folder / "val" / "class_1" / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png must be a readable 8-bit image, but: .*8 bits"):
        data.load(name, "test")
    (folder / "val" / "class_1" / "deep.png").write_text("no image")
    with pytest.raises(ValueError, match=r"deep.png must be a readable 8-bit image"):
        data.load(name, "test")
    (folder / "val" / "stranger").mkdir()
    with pytest.raises(ValueError, match="stranger must be one of the 3 classes of the training"):
        data.load(name, "test")
    (folder / "test" / "class_0").mkdir(parents=True)
    (folder / "val" / "stranger").rmdir()
    with pytest.raises(ValueError, match="test must hold images"):
        data.load(name, "test")
