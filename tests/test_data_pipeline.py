"""Batches: every example once per epoch, exact position, shares of processes, padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robustjax import data

N, BATCH = 23, 4
STEPS = N // BATCH
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def dataset():
    image = (np.arange(N * 2 * 3, dtype=np.uint8)).reshape(N, 2, 3, 1)
    return data.Dataset(image, np.arange(N, dtype=np.int32) % 3, 3, "counting")


def assert_same(batch, other):
    jax.tree.map(np.testing.assert_array_equal, batch, other)


# On the device.


def test_epoch_order_is_a_new_permutation_for_each_epoch():
    order = jax.jit(data.epoch_order, static_argnums=2)
    epochs = [np.asarray(order(KEY, epoch, N)) for epoch in range(4)]
    for epoch in epochs:
        assert epoch.dtype == np.int32
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    np.testing.assert_array_equal(epochs[2], data.epoch_order(KEY, 2, N))
    assert not np.array_equal(epochs[0], data.epoch_order(jax.random.key(6), 0, N))


def test_epoch_batches_show_each_example_at_most_once_and_drop_the_rest():
    batches = np.asarray(data.epoch_batches(KEY, 1, N, BATCH))
    assert batches.shape == (STEPS, BATCH)
    np.testing.assert_array_equal(batches.ravel(), data.epoch_order(KEY, 1, N)[: STEPS * BATCH])
    whole = np.asarray(data.epoch_batches(KEY, 0, 20, BATCH))
    np.testing.assert_array_equal(np.sort(whole.ravel()), np.arange(20))


def test_batch_indices_are_a_function_of_the_step():
    at = jax.jit(data.batch_indices, static_argnums=(2, 3))
    got = np.stack([at(KEY, step, N, BATCH) for step in range(3 * STEPS)])
    epochs = [data.epoch_batches(KEY, epoch, N, BATCH) for epoch in range(3)]
    np.testing.assert_array_equal(got, np.concatenate(epochs))
    np.testing.assert_array_equal(data.batch_indices(KEY, 7, N, BATCH), got[7])
    assert at._cache_size() == 1  # the step is traced


@pytest.mark.parametrize("jit", [False, True])
def test_take_gathers_rows_as_floats(dataset, jit):
    arrays = data.on_device(dataset)
    assert arrays["image"].dtype == jnp.uint8
    indices = jnp.array([7, 0, 22, 7])
    batch = (jax.jit(data.take) if jit else data.take)(arrays, indices)
    assert set(batch) == {"image", "label", "index"}
    np.testing.assert_array_equal(batch["image"], data.as_float(dataset.image[np.array(indices)]))
    np.testing.assert_array_equal(batch["label"], dataset.label[np.array(indices)])
    np.testing.assert_array_equal(batch["index"], indices)
    assert [batch[k].dtype for k in ("image", "label", "index")] == [np.float32] + [np.int32] * 2


def test_take_brings_further_arrays_along(dataset):
    arrays = data.on_device(dataset) | {"clean_label": jnp.arange(N) * 2}
    batch = data.take(arrays, jnp.array([3, 5]))
    np.testing.assert_array_equal(batch["clean_label"], [6, 10])


def test_on_device_replicates_over_a_mesh(dataset):
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    arrays = data.on_device(dataset, everywhere)
    assert arrays["image"].sharding == everywhere
    np.testing.assert_array_equal(arrays["label"], dataset.label)


# On the host.


def host(dataset, count=2 * STEPS + 1, **arguments):
    settings = {"batch_size": BATCH, "seed": 3, "num_threads": 2, "prefetch": 3} | arguments
    return list(itertools.islice(data.host_batches(dataset, **settings), count))


def test_host_epochs_are_different_permutations_without_the_rest(dataset):
    batches = host(dataset, 3 * STEPS)
    index = np.stack([batch["index"] for batch in batches]).reshape(3, STEPS * BATCH)
    for epoch in index:
        assert len(np.unique(epoch)) == STEPS * BATCH
    assert len({tuple(epoch) for epoch in index}) == 3
    assert len({tuple(np.setdiff1d(np.arange(N), epoch)) for epoch in index}) > 1
    for batch in batches:
        np.testing.assert_array_equal(batch["image"], data.as_float(dataset.image[batch["index"]]))
        np.testing.assert_array_equal(batch["label"], dataset.label[batch["index"]])
        assert [batch[k].dtype for k in ("image", "label", "index")] == [
            np.float32,
            np.int32,
            np.int32,
        ]


def test_host_batches_cover_an_epoch_exactly(dataset):
    whole = dataset.subset(np.arange(20))
    index = np.concatenate([batch["index"] for batch in host(whole, 5)])
    np.testing.assert_array_equal(np.sort(index), np.arange(20))


def test_host_batches_are_determined_by_the_seed(dataset):
    first = host(dataset)
    assert_same(first, host(dataset, num_threads=0, prefetch=0))
    assert_same(first, host(dataset, num_threads=4, prefetch=8))
    other = host(dataset, seed=4)
    assert not np.array_equal(first[0]["index"], other[0]["index"])
    # nor is the next seed's stream this one's, an epoch later
    assert not np.array_equal(first[STEPS]["index"], other[0]["index"])


@pytest.mark.parametrize("start", [1, STEPS - 1, STEPS, STEPS + 2])
def test_host_batches_resume_exactly(dataset, start):
    assert_same(host(dataset)[start:], host(dataset, 2 * STEPS + 1 - start, start_step=start))


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_the_processes_make_up_the_global_batch(dataset, processes):
    alone = host(dataset, start_step=2)
    shares = [
        host(dataset, start_step=2, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    joined = [
        jax.tree.map(lambda *x: np.concatenate(x), *step) for step in zip(*shares, strict=True)
    ]
    assert_same(alone, joined)
    for step in zip(*shares, strict=True):
        index = np.concatenate([share["index"] for share in step])
        assert len(np.unique(index)) == BATCH


def noisy(example, rng):
    return example | {"image": (rng.random((2, 3, 1)) + example["label"]).astype(np.float32)}


def test_random_transform_depends_on_the_place_in_the_stream_only(dataset):
    alone = host(dataset, random_transform=noisy)
    assert len(np.unique([batch["image"] % 1 for batch in alone])) == np.size(alone[0]["image"]) * (
        len(alone)
    )
    assert_same(alone[3:], host(dataset, len(alone) - 3, random_transform=noisy, start_step=3))
    shares = [
        host(dataset, random_transform=noisy, process_index=p, process_count=2) for p in range(2)
    ]
    joined = [
        jax.tree.map(lambda *x: np.concatenate(x), *step) for step in zip(*shares, strict=True)
    ]
    assert_same(alone, joined)


def test_transform_sees_each_example_with_its_index(dataset):
    def transform(example):
        return example | {
            "image": example["image"][:1],
            "label": int(example["label"]),
            "twice": 2 * example["index"],
        }

    batch = host(dataset, 1, transform=transform, to_float=False)[0]
    np.testing.assert_array_equal(batch["image"], dataset.image[batch["index"]][:, :1])
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["twice"], 2 * batch["index"])


def unequal(example):
    return example | {"image": example["image"][: 1 + example["index"] % 2]}


def test_images_of_unequal_size_need_a_transform(dataset):
    with pytest.raises(ValueError, match=r"images must have one shape .* transform that crops"):
        host(dataset, transform=unequal)
    with pytest.raises(ValueError, match=r"images must have one shape .* transform that crops"):
        list(data.eval_batches(dataset, 4, transform=unequal))


# For evaluation.


@pytest.mark.parametrize("batch_size", [1, 4, 8, N, N + 7])
def test_eval_batches_have_one_shape_and_mask_what_is_not_an_example(dataset, batch_size):
    batches = list(data.eval_batches(dataset, batch_size))
    assert len(batches) == -(-N // batch_size)
    assert len({str(jax.tree.map(np.shape, batch)) for batch in batches}) == 1
    batch = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    assert batch["mask"].dtype == bool and batch["mask"].sum() == N
    np.testing.assert_array_equal(batch["index"][batch["mask"]], np.arange(N))
    np.testing.assert_array_equal(batch["image"][batch["mask"]], data.as_float(dataset.image))
    np.testing.assert_array_equal(batch["label"][batch["mask"]], dataset.label)
    padding = batch["image"][~batch["mask"]]
    np.testing.assert_array_equal(padding, np.broadcast_to(batch["image"][0], padding.shape))
    assert (batch["index"][~batch["mask"]] == 0).all()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda d: data.steps_per_epoch(N, 0), "batch_size must be >= 1, got 0"),
        (lambda d: data.steps_per_epoch(N, 24), "batch_size must be <= .*, 23, got 24"),
        (lambda d: data.epoch_batches(KEY, 0, N, 24), "batch_size must be <= .*, 23, got 24"),
        (lambda d: data.epoch_order(KEY, 0, 0), "n must be >= 1, got 0"),
        (lambda d: data.epoch_order(KEY, -1, N), "epoch must be >= 0, got -1"),
        (lambda d: data.batch_indices(KEY, -1, N, 4), "step must be >= 0, got -1"),
        (lambda d: data.epoch_order(jax.random.PRNGKey(0), 0, N), "key must be a typed key"),
        (lambda d: data.eval_batches(d, 0), "batch_size must be >= 1, got 0"),
        (lambda d: host(d, batch_size=24), "batch_size must be <= .*, 23, got 24"),
        (lambda d: host(d, process_index=2, process_count=2), "process_index must be <= 1, got 2"),
        (lambda d: host(d, process_index=0, process_count=0), "process_count must be >= 1, got 0"),
        (
            lambda d: host(d, process_index=0, process_count=3),
            r"batch_size \(4\) must be divisible by process_count \(3\)",
        ),
        (lambda d: host(d, seed=-1), "seed must be >= 0, got -1"),
        (lambda d: host(d, start_step=-1), "start_step must be >= 0, got -1"),
        (lambda d: host(d, num_threads=4, prefetch=2), "prefetch must be >= 4, got 2"),
    ],
)
def test_bad_arguments_are_refused(plain_calls, dataset, call, message):
    with pytest.raises(ValueError, match=message):
        call(dataset)
