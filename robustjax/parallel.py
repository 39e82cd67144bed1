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
    if devices is None:
        # Those of a host in a row, as the shares of a batch are read.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (AXIS,))


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


def automatic(
    fn: Callable,
    mesh: Mesh,
    *,
    in_specs: Any,
    out_specs: Any,
    donate_argnums: int | tuple[int, ...] = (),
) -> Callable:
    """``jax.jit(fn)`` with its arguments and results split as told; the compiler divides the work.

    In contrast to ``parallel``, ``fn`` is written for whole arrays and names no axis. Batch
    statistics are those of the whole batch.

    Args:
      fn: the function of whole arrays.
      mesh: from ``device_mesh``.
      in_specs: for each argument a partition spec, or a tree of them as from ``shard_specs``.
      out_specs: the same for each result.
      donate_argnums: arguments whose buffers may be reused.
    """

    def shardings(specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
        )

    return jax.jit(
        fn,
        in_shardings=shardings(in_specs),
        out_shardings=shardings(out_specs),
        donate_argnums=donate_argnums,
    )


def shard_specs(tree: Any, mesh: Mesh, *, at_least: int = 2**14) -> Any:
    """How a state is split over the devices: each large array along its longest axis.

    Between steps each device then holds its share of the parameters and of what the optimizer keeps
    for them (ZeRO stage 3, Rajbhandari et al. 2020, also known as fully sharded data parallelism).
    How a step gets what it needs of the other shares, the compiler decides: it gathers the kernels
    of convolutions, and moves activations between wide dense layers, in every step of an attack,
    too. The last of equally long axes is taken, which in a kernel is that of its outputs.

    Args:
      tree: arrays or shapes.
      mesh: from ``device_mesh``.
      at_least: elements of the smallest array that is split.

    Returns:
      A partition spec for each array: replicated where no axis divides by the number of devices.
    """
    checks.integer("at_least", at_least, at_least=1)

    def spec(x: Any) -> P:
        axes = [i for i, size in enumerate(x.shape) if size % mesh.size == 0 and size]
        if x.size < at_least or not axes:
            return REPLICATED
        longest = max(axes, key=lambda i: (x.shape[i], i))
        return P(*(AXIS if i == longest else None for i in range(x.ndim)))

    return jax.tree.map(spec, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies the same values to every device of the mesh; each host passes equal values."""
    return place(tree, mesh, None)


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Places values on the devices as the specs say; each host passes equal, whole values.

    Args:
      tree: arrays or typed keys.
      mesh: from ``device_mesh``.
      specs: a partition spec for each, as from ``shard_specs``; None: all are replicated.
    """
    if specs is None:
        specs = jax.tree.map(lambda x: REPLICATED, tree)

    def put(x: Any, spec: P) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x), spec), impl=jax.random.key_impl(x)
            )
        # A true copy, since placing an array may share its buffer: training donates its state, and
        # must not delete the caller's arrays with it.
        whole = np.array(x)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(whole.shape, sharding, lambda share: whole[share])

    return jax.tree.map(put, tree, specs)


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
    """Which rows of a global batch of ``rows`` examples go to this host's devices.

    Raises:
      ValueError: this host's devices are not neighbours in the mesh.
    """
    each = rows // mesh.size
    local = {device.id for device in mesh.local_devices}
    places = [i for i, device in enumerate(mesh.devices.flat) if device.id in local]
    if places != list(range(places[0], places[-1] + 1)):
        raise ValueError(f"devices of a host must be neighbours in the mesh, got places {places}")
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


def gathered(x: np.ndarray) -> np.ndarray:
    """Each host's array, on all of them, joined along the first axis in the order of the hosts."""
    if jax.process_count() == 1:
        return x
    from jax.experimental import multihost_utils

    return np.concatenate(multihost_utils.process_allgather(x))
