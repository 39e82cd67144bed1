"""Data parallelism: a per-device function mapped over all devices with ``jit(shard_map)``.

One mesh axis, ``"data"``, over every device of every host. State is replicated, batches are
split on their example axis. The functions work unchanged on one device and on many hosts (after
``jax.distributed.initialize()``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from robustjax import checks

AXIS = "data"
REPLICATED = P()
SPLIT = P(AXIS)  # examples on the first axis
SPLIT_SECOND = P(None, AXIS)  # steps on the first axis, examples on the second


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh, axis ``"data"``, over the devices; default: all of all hosts."""
    if devices is not None and not len(devices):
        raise ValueError(f"devices must hold at least one device, got {devices}")
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def parallel(
    fn: Callable,
    mesh: Mesh,
    *,
    in_specs: Any,
    out_specs: Any,
    donate_argnums: int | tuple[int, ...] = (),
) -> Callable:
    """``jax.jit(jax.shard_map(fn))`` over the mesh.

    Args:
      fn: the function of one device's shares; collectives name the axis ``"data"``.
      mesh: from ``device_mesh``.
      in_specs: one of ``REPLICATED``, ``SPLIT``, ``SPLIT_SECOND`` for each argument.
      out_specs: the same for each result. ``fn`` itself must make replicated results equal.
      donate_argnums: arguments whose buffers may be reused.
    """
    # check_vma=False: gradients of a device's own loss, as under pmap. The check would make the
    # transpose of replicated parameters an all-reduce of its own, one per use.
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate_argnums)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies the same values to every device of the mesh; each host passes equal values."""
    sharding = NamedSharding(mesh, REPLICATED)

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                place(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        # A true copy, since placing an array may share its buffer: training donates its state, and
        # must not delete the caller's arrays with it.
        return jax.make_array_from_process_local_data(sharding, np.array(x))

    return jax.tree.map(place, tree)


def split(tree: Any, mesh: Mesh, spec: P = SPLIT) -> Any:
    """Places this host's share of a batch: its examples go to its own devices, in order.

    Args:
      tree: arrays of this host's examples (on one host, of all).
      mesh: from ``device_mesh``.
      spec: ``SPLIT`` or ``SPLIT_SECOND``.

    Raises:
      ValueError: the number of examples is not divisible by this host's number of devices.
    """
    axis = spec.index(AXIS)
    local = len(mesh.local_devices)
    sharding = NamedSharding(mesh, spec)

    def place(x: Any) -> jax.Array:
        checks.divisible("batch size", x.shape[axis], "the number of devices", local)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, tree)


def local_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Examples of a global batch that this host supplies.

    Raises:
      ValueError: ``batch_size`` is not divisible by the number of devices.
    """
    checks.integer("batch_size", batch_size, at_least=1)
    checks.divisible("batch_size", batch_size, "the number of devices", mesh.size)
    return batch_size // mesh.size * len(mesh.local_devices)


def own_rows(rows: int, mesh: Mesh) -> slice:
    """Which rows of a global batch of ``rows`` examples go to this host's devices."""
    each = rows // mesh.size
    local = {device.id for device in mesh.local_devices}
    places = [i for i, device in enumerate(mesh.devices.flat) if device.id in local]
    return slice(places[0] * each, (places[-1] + 1) * each)


def to_host(tree: Any) -> Any:
    """Fetches arrays as numpy; those split over hosts are gathered whole on each of them."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def fetch(x):
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)
