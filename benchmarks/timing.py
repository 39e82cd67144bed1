"""Times taken in turn, their ratios, compilations, and the machine on which they were taken."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

COMPILATION = "/jax/core/compile/backend_compile_duration"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")

Seconds = Mapping[str, Sequence[float]]


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, in turn: A, B, C, A, B, C, ...; after one warm-up each.

    Args:
      runs: name to a function that returns when its work is done.
      rounds: measurements of each, ``>= 1``.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    """The median time of each run."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Seconds, name: str, other: str) -> dict[str, float]:
    """Time of one run over that of another: median, least and greatest over the rounds.

    The ratio is taken in each round, since the two are neighbours in time there: what else the
    machine does slows both.
    """
    ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@contextlib.contextmanager
def compilations() -> Iterator[list[tuple[str, float]]]:
    """Collects ``(function, seconds)`` of every program that XLA compiles in the context.

    The seconds are those of XLA; tracing and lowering come before.
    """
    seen: list[tuple[str, float]] = []

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event == COMPILATION:
            seen.append((str(about.get("fun_name", "?")), seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def environment() -> dict[str, Any]:
    """Device, processor, load of the machine, versions and date."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average_1_minute": load(),
        "python": platform.python_version(),
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def load() -> float:
    """Processes that wanted to run, on average over the last minute; ours are among them."""
    return os.getloadavg()[0]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
