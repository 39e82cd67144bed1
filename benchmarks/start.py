"""The start of ``experiments.adversarial_training``, up to its first line of metrics, timed.

``python -m benchmarks.start --preset=small ...`` takes the flags of that entry point, ends when the
first dispatch of training has come back, and prints a line of JSON. It is run by
``benchmarks.compilation_cache``, which says in ``ROBUSTJAX_BEGAN`` when it did.
"""

import json
import os
import sys
import time
from typing import Any
from unittest import mock

BEGAN = "ROBUSTJAX_BEGAN"  # seconds since the epoch
# Of a program that was compiled before, the last one is the time to read it.
PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compilation",
}
HITS = "/jax/compilation_cache/cache_hits"
# Packages that take long to import, and are not wanted before the first step.
HEAVY = ("torch", "tensorflow", "tensorboardX", "matplotlib", "orbax", "PIL")


def main(flags: list[str]) -> None:
    """Starts the run; does not return."""
    running = time.time()
    began = float(os.environ.get(BEGAN, running))

    from experiments import adversarial_training, command_line

    imported = time.time()

    import jax

    from robustjax.training import report

    seconds = dict.fromkeys(PHASES.values(), 0.0)
    programs: list[tuple[str, float]] = []
    hits = 0

    def listen(event: str, duration: float, **about: Any) -> None:
        if event in PHASES:
            seconds[PHASES[event]] += duration
        if PHASES.get(event) == "compilation":
            programs.append((str(about.get("fun_name", "?")), duration))

    def count(event: str, **about: Any) -> None:
        nonlocal hits
        hits += event == HITS

    def stop(*arguments: Any) -> None:
        now = time.time()
        found = {
            "total": now - began,
            "interpreter": running - began,
            "imports": imported - running,
            **seconds,
            "programs": len(programs),
            "read": hits,
            "heavy": [name for name in HEAVY if name in sys.modules],
            "longest": sorted(programs, key=lambda item: -item[1])[:5],
        }
        print(json.dumps(found), flush=True)
        os._exit(0)  # what comes next, the rest of the training, is not wanted

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.register_event_listener(count)
    sys.argv = ["adversarial_training", *flags]
    with mock.patch.object(report.MetricsWriter, "write", stop):
        command_line.run(
            adversarial_training.main,
            adversarial_training.Settings,
            adversarial_training.PRESETS,
            adversarial_training.__doc__,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
