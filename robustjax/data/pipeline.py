"""From a data set to batches: on the device, on the host, and for evaluation.

A batch is ``{"image", "label", "index"}``: float32 images in [0, 1], int32 labels, and the int32
place of each example in its data set. Training batches are a pure function of a key (or seed) and
the step: the examples are shuffled anew in every epoch, the last ``n % batch_size`` of an epoch are
left out, and epoch ``e`` is steps ``e * (n // batch_size)`` and up. To resume exactly, go on from
the step.

A set that fits on the device goes there once (``on_device``) and is gathered from under ``jit``
(``epoch_batches`` or ``batch_indices``, then ``take``). One that does not is read by
``host_batches``, each process reading its own part of every batch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, Int32, Key

from robustjax import checks, keys
from robustjax.data.dataset import Dataset, Example, Source, as_float, stack_images

Batch = dict[str, Any]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in an epoch of ``n`` examples, ``n // batch_size``; the rest is left out.

    Raises:
      ValueError: ``batch_size`` is not in ``1 .. n``.
    """
    checks.integer("batch_size", batch_size, at_least=1)
    if batch_size > n:
        raise ValueError(f"batch_size must be <= the number of examples, {n}, got {batch_size}")
    return n // batch_size


# Device-resident data.


def on_device(dataset: Dataset, device: Any = None) -> dict[str, Array]:
    """The images (in their own dtype) and labels of a data set as device arrays, for ``take``.

    Args:
      dataset: A data set that fits.
      device: A device or sharding, as for ``jax.device_put``; a replicated sharding gives each
        device of a mesh its copy.
    """
    return jax.device_put({"image": dataset.image, "label": dataset.label}, device)


def epoch_order(key: Key[Array, ""], epoch: Int[ArrayLike, ""], n: int) -> Int32[Array, " n"]:
    """The order of ``n`` examples in an epoch: a permutation drawn from ``fold_in(key, epoch)``.

    ``epoch`` may be traced.
    """
    checks.integer("n", n, at_least=1)
    checks.number("epoch", epoch, at_least=0)
    order = jax.random.permutation(jax.random.fold_in(keys.check(key), epoch), n)
    return order.astype(jnp.int32)


def epoch_batches(
    key: Key[Array, ""], epoch: Int[ArrayLike, ""], n: int, batch_size: int
) -> Int32[Array, "steps batch_size"]:
    """The indices of all the batches of an epoch, one row per step; ``epoch`` may be traced."""
    steps = steps_per_epoch(n, batch_size)
    return epoch_order(key, epoch, n)[: steps * batch_size].reshape(steps, batch_size)


def batch_indices(
    key: Key[Array, ""], step: Int[ArrayLike, ""], n: int, batch_size: int
) -> Int32[Array, " batch_size"]:
    """The indices of the batch at a step: row ``step % steps`` of its epoch's ``epoch_batches``.

    ``step`` may be traced. The whole permutation is drawn to take one batch of it (on a CPU some
    10 ms for 50,000 examples, up to a second for a million): a loop over many steps draws
    ``epoch_batches`` once per epoch instead.
    """
    checks.number("step", step, at_least=0)
    epoch, row = jnp.divmod(step, steps_per_epoch(n, batch_size))
    return epoch_batches(key, epoch, n, batch_size)[row]


def take(arrays: Mapping[str, Array], indices: Int[Array, " b"]) -> Batch:
    """The batch at ``indices``: every array's rows, uint8 images made float32, and ``index``.

    Args:
      arrays: ``{"image": (n, h, w, c), "label": (n,)}`` as from ``on_device``; further arrays
        ``(n, ...)`` come along.
      indices: ``(b,)`` integers in ``0 .. n-1`` (others cannot be refused under ``jit``: they wrap
        or clamp as in any JAX indexing).
    """
    batch = {name: array[indices] for name, array in arrays.items()}
    return batch | {"image": as_float(batch["image"]), "index": indices.astype(jnp.int32)}


# Data on the host.


def host_batches(
    source: Dataset | Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
    start_step: int = 0,
    transform: Callable[[Example], Example] | None = None,
    random_transform: Callable[[Example, np.random.Generator], Example] | None = None,
    to_float: bool = True,
    num_threads: int = 8,
    prefetch: int = 16,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches of this process, read ahead by threads.

    The global batch at a step, its order included, is a function of ``seed`` and the step alone.
    Process ``p`` of ``P`` reads its rows ``p * batch_size / P`` and up, so that the processes'
    batches joined in order are the batch that one process alone would read.

    Args:
      source: A data set or source of ``n`` examples.
      batch_size: Global batch size, over all processes; <= n.
      seed: Seed of the order and of ``random_transform``, 0 .. 2**32 - 1.
      process_index: This process; ``None`` is ``jax.process_index()``.
      process_count: Number of processes; ``None`` is ``jax.process_count()``.
      start_step: First step to give; the stream goes on exactly as one that started at 0.
      transform: Applied to each example ``{"image", "label", "index"}``, for instance a central
        crop, before ``random_transform``.
      random_transform: The same with a generator that depends on the seed and on the example's
        place in the stream, not on processes, threads or where the stream was started.
      to_float: Give float32 images. ``False`` leaves uint8, a quarter of the bytes to the device,
        where the step calls ``as_float``.
      num_threads: Batches that are read at the same time; 0 reads in the caller's thread.
      prefetch: Batches that are kept ready, >= num_threads.

    Returns:
      An iterator over dicts of NumPy arrays: image ``(b, h, w, c)``, label ``(b,)`` int32, index
      ``(b,)`` int32 with ``b = batch_size / process_count``, and what else the transform adds.

    Raises:
      ValueError: An argument out of range, a batch that the processes cannot share evenly, or
        (when it is read) a batch of images of unequal size.
    """
    n = len(source)
    per_epoch = steps_per_epoch(n, batch_size)
    process_count = jax.process_count() if process_count is None else process_count
    process_index = jax.process_index() if process_index is None else process_index
    checks.integer("process_count", process_count, at_least=1)
    checks.integer("process_index", process_index, at_most=process_count - 1)
    checks.divisible("batch_size", batch_size, "process_count", process_count)
    checks.integer("seed", seed, at_most=2**32 - 1)
    checks.integer("start_step", start_step)
    checks.integer("num_threads", num_threads)
    checks.integer("prefetch", prefetch, at_least=num_threads)

    import grain  # here, for it takes long, and data that live on the device do without

    # grain draws the order: random access to a permutation that is never stored.
    order = grain.MapDataset.range(n).seed(seed).shuffle()[: per_epoch * batch_size].repeat()
    rows = batch_size // process_count
    first = process_index * rows

    def example_at(position: int) -> Example:
        index = order[position]
        example = source[index] | {"index": np.int32(index)}
        if transform is not None:
            example = transform(example)
        if random_transform is not None:
            example = random_transform(example, np.random.default_rng((seed, position)))
        return example

    def batch_at(step: int) -> dict[str, np.ndarray]:
        start = step * batch_size + first
        examples = [example_at(position) for position in range(start, start + rows)]
        return _stack(examples, to_float)

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch_at)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(steps.to_iter_dataset(options))


def _stack(examples: list[Example], to_float: bool) -> dict[str, np.ndarray]:
    image = stack_images([e["image"] for e in examples])
    batch = {name: np.stack([e[name] for e in examples]) for name in examples[0] if name != "image"}
    batch["label"] = batch["label"].astype(np.int32)  # a transform may have made a Python int
    return {"image": as_float(image) if to_float else image} | batch


def eval_batches(
    source: Dataset | Source,
    batch_size: int,
    *,
    transform: Callable[[Example], Example] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, in batches of one shape, so that evaluation compiles once.

    Args:
      source: A data set or source of ``n`` examples.
      batch_size: Examples per batch, >= 1; may exceed ``n``.
      transform: Applied to each example ``{"image", "label", "index"}``.

    Returns:
      An iterator over ``ceil(n / batch_size)`` dicts of NumPy arrays: image float32 ``(b, h, w,
      c)``, label and index int32 ``(b,)``, and mask bool ``(b,)``. The last batch is filled up by
      repeating the first example of the set, for which ``mask`` is False.

    Raises:
      ValueError: ``batch_size`` < 1, or (when it is read) a batch of images of unequal size.
    """
    checks.integer("batch_size", batch_size, at_least=1)
    n = len(source)

    def example_at(i: int) -> Example:
        example = source[i] | {"index": np.int32(i)}
        return example if transform is None else transform(example)

    def batch_at(start: int) -> dict[str, np.ndarray]:
        mask = np.arange(start, start + batch_size) < n
        real = range(start, min(start + batch_size, n))
        examples = [example_at(i) for i in real]
        if len(real) < batch_size:
            examples += [example_at(0)] * (batch_size - len(real))
        return _stack(examples, to_float=True) | {"mask": mask}

    return (batch_at(start) for start in range(0, n, batch_size))
