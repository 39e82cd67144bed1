"""Functions of examples, mapped over a data set in batches of fixed shapes on all devices."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from robustjax import checks, parallel


class BatchedFunction:
    """Compiles ``fn(fixed, numbers, rows) -> rows`` and runs it on any number of examples.

    There are two batch sizes, the full one and a quarter of it, so that a few left-over examples
    do not cost a full batch; incomplete batches are padded by copies of an example. Batches are
    split over all devices of all hosts. Matrix products run in the highest precision: lower ones
    overstate robustness.

    Args:
      fn: ``rows`` are pytrees of arrays with the examples on the first axis; each example must be
        treated on its own. ``fixed`` is a pytree of whatever stays, ``numbers`` a tuple of scalars
        that change.
      batch_size: examples at a time, over all devices; divisible by their number.
      mesh: devices; default all.

    Raises:
      ValueError: ``batch_size`` is not divisible by the number of devices.
    """

    def __init__(
        self, fn: Callable[[Any, tuple, Any], Any], *, batch_size: int, mesh: Mesh | None = None
    ):
        self.fn = checks.function("fn", fn)
        self._mesh = parallel.device_mesh() if mesh is None else mesh
        parallel.local_batch_size(batch_size, self._mesh)
        small = max(batch_size // 4 // self._mesh.size, 1) * self._mesh.size
        self._sizes = (small, batch_size)
        same, split = parallel.REPLICATED, parallel.SPLIT

        def precise(fixed: Any, numbers: tuple, rows: Any) -> Any:
            with jax.default_matmul_precision("highest"):
                return fn(fixed, numbers, rows)

        self._compiled = parallel.parallel(
            precise, self._mesh, in_specs=(same, same, split), out_specs=split
        )

    def place(self, fixed: Any) -> Any:
        """``fixed`` on all devices, once for many calls."""
        return parallel.replicate(fixed, self._mesh)

    def __call__(
        self, fixed: Any, numbers: tuple, rows: Any, chosen: np.ndarray | None = None
    ) -> Any:
        """Results for the chosen examples.

        Args:
          fixed: from ``place``.
          numbers: scalars.
          rows: numpy arrays of all examples; each host passes all of them.
          chosen: which of them, ``(m,)``; default all.

        Returns:
          Numpy arrays with ``m`` examples on the first axis, in the order of ``chosen``.
        """
        if chosen is None:
            chosen = np.arange(len(jax.tree.leaves(rows)[0]))
        numbers = self.place(numbers)
        parts = []
        for batch, real in self._batches(chosen):
            own = batch[parallel.own_rows(len(batch), self._mesh)]
            share = parallel.split(jax.tree.map(lambda a, own=own: a[own], rows), self._mesh)
            part = parallel.to_host(self._compiled(fixed, numbers, share))
            parts.append(jax.tree.map(lambda a, real=real: a[:real], part))
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)

    def _batches(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Batches of row numbers, and how many of them are not mere padding."""
        small, full = self._sizes
        while len(chosen):
            size = full if len(chosen) > full - small else small
            batch, chosen = chosen[:size], chosen[size:]
            yield np.concatenate([batch, np.repeat(batch[:1], size - len(batch))]), len(batch)
