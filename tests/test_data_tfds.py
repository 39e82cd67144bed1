"""TensorFlow Datasets for real: a set that is prepared, read, shared and iterated like any other.

The set is prepared in a subprocess, which alone imports TensorFlow.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_shapes

from experiments import adversarial_training
from robustjax import data

HERE = pathlib.Path(__file__).parent


def run(*command):
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env=environment
    ).stdout


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    run(str(HERE / "tiny_shapes.py"), path)
    return path


@pytest.fixture(scope="module")
def splits(data_dir):
    return {
        split: data.load("tiny_shapes", split, data_dir=data_dir, validation_size=6)
        for split in ("train", "validation", "test")
    }


def rows(image, label):
    """A multiset of labelled images: preparing a set shuffles it."""
    flat = np.column_stack([np.asarray(image).reshape(len(image), -1), label])
    return flat[np.lexsort(flat.T)]


def test_prepared_set_holds_what_the_builder_generated(splits):
    test = splits["test"]
    np.testing.assert_array_equal(rows(test.image, test.label), rows(*tiny_shapes.examples("test")))
    image, label = (
        np.concatenate([getattr(splits[split], field) for split in ("train", "validation")])
        for field in ("image", "label")
    )
    np.testing.assert_array_equal(rows(image, label), rows(*tiny_shapes.examples("train")))
    np.testing.assert_array_equal(np.bincount(splits["validation"].label), [2, 2, 2])
    assert (test.name, test.num_classes, test.image.dtype) == ("tiny_shapes", 3, np.uint8)


def test_source_reads_the_same_examples_in_the_same_order(splits, data_dir):
    for split, dataset in splits.items():
        source = data.load_source("tiny_shapes", split, data_dir=data_dir, validation_size=6)
        assert isinstance(source, data.Source)
        np.testing.assert_array_equal(source.labels(), dataset.label)
        read = [source[i] for i in range(len(source))]
        np.testing.assert_array_equal(np.stack([e["image"] for e in read]), dataset.image)
        np.testing.assert_array_equal([e["label"] for e in read], dataset.label)


def test_hosts_share_the_batches_of_a_source_and_resume(splits, data_dir):
    source = data.load_source("tiny_shapes", "train", data_dir=data_dir, validation_size=6)

    def batches(count, **arguments):
        stream = data.host_batches(source, batch_size=8, seed=0, num_threads=2, **arguments)
        return list(itertools.islice(stream, count))

    alone = batches(10)
    train = splits["train"]
    for batch in alone:
        np.testing.assert_array_equal(batch["image"], data.as_float(train.image[batch["index"]]))
        np.testing.assert_array_equal(batch["label"], train.label[batch["index"]])
    shares = [batches(6, process_index=p, process_count=2, start_step=4) for p in range(2)]
    for batch, *parts in zip(alone[4:], *shares, strict=True):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        jax.tree.map(np.testing.assert_array_equal, batch, joined)


def test_evaluation_reads_a_source(splits, data_dir):
    source = data.load_source("tiny_shapes", "test", data_dir=data_dir)
    batch = jax.tree.map(lambda *x: np.concatenate(x), *data.eval_batches(source, 8))
    np.testing.assert_array_equal(
        batch["image"][batch["mask"]], data.as_float(splits["test"].image)
    )


READ_WITHOUT_TENSORFLOW = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] != "tensorflow":
            return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
try:
    import tensorflow
except ModuleNotFoundError:
    from robustjax import data
    print(data.load("tiny_shapes", "test", data_dir=sys.argv[1]).image.sum())
    try:
        data.load("tiny_sounds", "test", data_dir=sys.argv[1])
    except ValueError as error:
        print(error)
"""


def test_reading_needs_no_tensorflow(splits, data_dir):
    out = run("-c", READ_WITHOUT_TENSORFLOW, data_dir)
    total, *_, refusal = out.splitlines()
    assert int(total) == splits["test"].image.sum()
    assert refusal.startswith("data set 'tiny_sounds' has features, such as sounds, that need Tens")
    assert "tensorflow" not in sys.modules


def test_the_sets_version_can_be_named(splits, data_dir):
    named = data.load("tiny_shapes:1.0.0", "test", data_dir=data_dir)
    np.testing.assert_array_equal(named.image, splits["test"].image)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012:5.1.0"])
def test_a_set_that_is_not_prepared_names_the_command(plain_calls, tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}' is not prepared in {tmp_path}") as raised:
        data.load(name, "train", data_dir=tmp_path)
    command = re.search(r'python -c "(.*)"$', str(raised.value)).group(1)
    assert command == (
        f"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{tmp_path}', "
        "file_format='array_record').download_and_prepare()"
    )


def test_unknown_names_list_the_choices(plain_calls, data_dir):
    message = f"name must be 'digits', .* or that of a set prepared in {data_dir}, got 'nonsense'"
    with pytest.raises(ValueError, match=message):
        data.load("nonsense", "train", data_dir=data_dir)


def test_without_tensorflow_datasets_the_extra_is_named(plain_calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"needs 'pip install robustjax\[tfds\]', got 'cifar10'"):
        data.load("cifar10", "train")


def test_a_test_split_without_labels_gives_way_to_validation(data_dir):
    """As in ImageNet, whose test labels are secret."""
    test = data.load("tiny_contest", "test", data_dir=data_dir)
    np.testing.assert_array_equal(rows(test.image, test.label), rows(*tiny_shapes.examples("test")))
    validation = data.load("tiny_contest", "validation", data_dir=data_dir, validation_size=9)
    np.testing.assert_array_equal(np.bincount(validation.label), [3, 3, 3])
    train = data.load("tiny_contest", "train", data_dir=data_dir, validation_size=0)
    expected = rows(*tiny_shapes.examples("train"))
    np.testing.assert_array_equal(rows(train.image, train.label), expected)


def test_sounds_come_as_one_second_of_sixteen_bits(data_dir):
    """Cut, or filled up with zeros; read where TensorFlow is, which their format needs."""
    with np.load(f"{data_dir}/tiny_sounds.npz") as found:
        assert int(found["num_classes"]) == 3
        for split in ("train", "test"):
            waves, labels = tiny_shapes.sounds(split)
            expected = np.stack([np.pad(wave, (0, 10))[:10] for wave in waves])[..., None]
            assert found[f"x_{split}"].dtype == np.int16
            np.testing.assert_array_equal(
                rows(found[f"x_{split}"], found[f"y_{split}"]), rows(expected, labels)
            )


def test_sets_that_cannot_be_used_are_refused(plain_calls, data_dir):
    with pytest.raises(ValueError, match="got the features label, text"):
        data.load("tiny_words", "train", data_dir=data_dir)
    with pytest.raises(ValueError, match="must have the format array_record, got tfrecord"):
        data.load("tiny_shapes", "train", data_dir=f"{data_dir}/records")
    with pytest.raises(ValueError, match=r"validation_size must be below .*, 40, got 1000"):
        data.load("tiny_shapes", "train", data_dir=data_dir)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_prepared_set_is_trained_on_by_its_name(data_dir, tmp_path, placement):
    """The entry point on eight devices, gathered on the device and streamed from the files."""
    settings = dataclasses.replace(
        adversarial_training.PRESETS["small"],
        dataset="tiny_shapes",
        data_dir=data_dir,
        validation_size=8,
        placement=placement,
        objective=("madry",),
        model="linear",
        epochs=2,
        checkpoint_every=1,
        batch_size=16,
        test_batch_size=16,
        test_steps=1,
        test_restarts=1,
        validation_steps=1,
        attack_steps=1,
        workdir=str(tmp_path / "run"),
    )
    adversarial_training.main(settings)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["madry"]
    assert results["last"]["step"] == 2 * ((40 - 8) // 16)
    assert results["test_examples"] == 20
    assert 0 <= results["best"]["pgd1"] <= results["best"]["clean"] <= 1
