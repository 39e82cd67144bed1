"""Many whole runs of a small experiment in one compiled program: over seeds and settings."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from robustjax import parallel


def run(fn: Callable, recipe: Any, knobs: Any, shared: Any) -> Any:
    """``fn(recipe, knobs_i, shared)`` for every run ``i``, results stacked on a leading axis.

    Runs go side by side, one on each CPU device or all on the accelerators. One program serves any
    number of them, and any other call with the same ``fn`` and an equal recipe.

    Args:
      fn: a whole run, as a pure function.
      recipe: what is static and the same in all runs; hashable.
      knobs: a tuple (or named tuple) of numbers or arrays ``(runs,)``, broadcast to each other.
      shared: arrays that all runs read.

    Returns:
      The results as numpy arrays.
    """
    runs = max(np.size(value) for value in knobs)
    values = [np.broadcast_to(np.asarray(value), (runs,)) for value in knobs]
    mesh = parallel.device_mesh()
    cpu = mesh.devices.flat[0].platform == "cpu"
    group = mesh.size if cpu else math.ceil(runs / mesh.size) * mesh.size
    program = _program(fn, recipe, mesh)
    found = []
    for first in range(0, runs, group):
        # The last group is filled up with runs that are thrown away.
        chosen = np.minimum(np.arange(first, first + group), runs - 1)
        share = type(knobs)(*(value[chosen] for value in values))
        found.append(parallel.to_host(program(parallel.split(share, mesh), shared)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:runs], *found)


@functools.lru_cache
def _program(fn: Callable, recipe: Any, mesh: jax.sharding.Mesh) -> Callable:
    return parallel.parallel(
        jax.vmap(functools.partial(fn, recipe), in_axes=(0, None)),
        mesh,
        in_specs=(parallel.SPLIT, parallel.REPLICATED),
        out_specs=parallel.SPLIT,
    )


def take(arrays: Any, indices: Any) -> dict[str, Any]:
    """A batch of examples held on the device, for ``training.several_resident_steps``."""
    return {**jax.tree.map(lambda x: x[indices], arrays), "index": indices}
