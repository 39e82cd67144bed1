"""Starting on several hosts: one process each, joined by ``jax.distributed``, or a clear error."""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from robustjax import checks

# Where a flag is not given. JAX itself finds all three on TPU pods, under Slurm, Open MPI and
# Kubernetes.
VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def join(common: Any) -> None:
    """Joins the processes of a run, if flags or ``JAX_COORDINATOR_ADDRESS`` say there are several.

    It must come before anything else that JAX does. A process that waits for others in vain ends
    with a message after ``join_timeout`` seconds.

    Args:
      common: ``command_line.Common``.

    Raises:
      ValueError: the flags do not fit together, or no cluster can be found.
    """
    told = {
        "coordinator_address": common.coordinator_address,
        "num_processes": common.num_processes,
        "process_id": common.process_id,
    }
    flags = any(value is not None for value in told.values())
    if not (common.distributed or flags or os.environ.get(VARIABLES["coordinator_address"])):
        return
    for name in ("num_processes", "process_id"):
        if told[name] is None and os.environ.get(VARIABLES[name]):
            told[name] = _whole_number(VARIABLES[name])
    if told["coordinator_address"] is None:
        told["coordinator_address"] = os.environ.get(VARIABLES["coordinator_address"]) or None
    if not common.distributed:
        for name, value in told.items():
            if value is None:
                raise ValueError(
                    f"{name} must be given, by flag or {VARIABLES[name]}, or distributed to find "
                    "the cluster, got None"
                )
    address = told["coordinator_address"]
    host, _, port = (address or "").rpartition(":")
    if address is not None and not (host and port.isdigit()):
        raise ValueError(f"coordinator_address must be HOST:PORT, got {address}")
    if told["num_processes"] is not None:
        checks.integer("num_processes", told["num_processes"], at_least=1)
        if told["process_id"] is not None:
            checks.integer("process_id", told["process_id"], at_most=told["num_processes"] - 1)
    # The CPU backend has no collectives across processes otherwise.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    began = time.monotonic()
    if address is not None and told["process_id"] not in (None, 0):
        _await_coordinator(address, common.join_timeout)
    left = max(1.0, common.join_timeout - (time.monotonic() - began))
    with _deadline(left, _waited(common.join_timeout, told)):
        try:
            jax.distributed.initialize(
                **told,
                local_device_ids=_devices_of_the_task(),
                # Later than our own deadline: JAX ends a process that waits in vain by a crash.
                initialization_timeout=common.join_timeout + 60,
                heartbeat_timeout_seconds=common.heartbeat_timeout,
                shutdown_timeout_seconds=common.heartbeat_timeout,
            )
        except (ValueError, RuntimeError) as error:
            missing = [name for name, value in told.items() if value is None]
            needs = (
                f"distributed needs {', '.join(missing)}" if missing else f"cannot join {address}"
            )
            raise ValueError(f"{needs}: {error}") from error


def _devices_of_the_task() -> list[int] | None:
    """Which GPUs a process takes: none named means all of them, None what JAX makes of it.

    JAX gives each task of Slurm or Open MPI one GPU, the first one to a host's only task.
    """
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    # Before Slurm, in whose allocation it may run: so does JAX.
    if (of_open_mpi := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")) is not None:
        return [] if of_open_mpi == "1" else None
    tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    return [] if tasks is not None and tasks == nodes else None


# Where a host keeps its data.
MAY_DIFFER = ("data_dir",)


def check_settings(settings: Any) -> None:
    """Refuses processes of one run that were started with different flags.

    They would run different programs, and wait for each other in them without end.

    Args:
      settings: a dataclass of numbers, words and tuples of them.

    Raises:
      ValueError: they differ; on every process, with the first difference.
    """
    # Without asking for devices: who has none yet may still say how many there are to be.
    if not jax.distributed.is_initialized():
        return
    own = {k: v for k, v in dataclasses.asdict(settings).items() if k not in MAY_DIFFER}
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    first, *others = (
        json.loads(row[:size].tobytes()) for row, size in zip(texts, lengths, strict=True)
    )
    for process, other in enumerate(others, start=1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"all processes of a run must have the same flags, got {name}="
                    f"{first.get(name)!r} on process 0 and {other.get(name)!r} on process {process}"
                )


def split_cpu() -> None:
    """Makes a CPU of up to four devices, one a core, unless ``JAX_NUM_CPU_DEVICES`` says how many.

    Networks that are too small for several cores train side by side, one on each.
    """
    if not os.environ.get("JAX_NUM_CPU_DEVICES"):
        jax.config.update("jax_num_cpu_devices", max(1, min(4, len(os.sched_getaffinity(0)))))


@contextmanager
def peers_watched(debug: bool = False) -> Iterator[None]:
    """Ends the process at once, with a message, when another one of the run has gone.

    Without it the process would wait for that one again when it ends.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if jax.process_count() == 1 or not _lost_a_peer(error):
            raise
        if debug:
            traceback.print_exc()
        first = str(error).strip().splitlines()[0]
        _end(
            "error: another process of this run has stopped, or cannot be reached "
            f"({first[:200]}); what was saved stays: start all processes again with --resume"
        )


def _lost_a_peer(error: Exception) -> bool:
    signs = ("Gloo", "NCCL", "heartbeat", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED",
             "oordination service", "Connection reset", "another task")  # fmt: skip
    return any(sign in str(error) for sign in signs)


def _await_coordinator(address: str, seconds: float) -> None:
    """Waits until something listens at the address.

    Raises:
      ValueError: nothing did in time.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"coordinator_address {address} did not answer for {seconds:g} seconds "
                    f"({error}): is process 0 running there, and the port open?"
                ) from error
            time.sleep(0.2)


def _waited(seconds: float, told: dict[str, Any]) -> str:
    number = told["num_processes"]
    return (
        f"error: not all {'' if number is None else f'{number} '}processes joined within "
        f"{seconds:g} seconds (join_timeout): are all started, with the same coordinator_address "
        f"({told['coordinator_address']}) and num_processes, and each with its own process_id?"
    )


@contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with the message if the body takes longer: it may not return to Python."""
    timer = threading.Timer(seconds, _end, (message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(message: str) -> None:
    """Ends the process now; a regular end would wait for the other processes."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _whole_number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdigit():
        raise ValueError(f"{variable} must be a whole number, got {text!r}")
    return int(text)
