"""Which programs XLA compiles, and for how long."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

COMPILATION = "/jax/core/compile/backend_compile_duration"


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
