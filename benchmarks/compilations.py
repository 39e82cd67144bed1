"""What XLA compiles in a whole run of ``experiments.adversarial_training``."""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import jax

from experiments import adversarial_training
from experiments.training_settings import Settings
from robustjax import training
from robustjax.benchmark import compilation
from robustjax.training import feed, report


def count(settings: Settings) -> dict[str, Any]:
    """What XLA compiles while the entry point runs with these settings, in a temporary folder.

    ``jit(steps)`` is the training step and ``jit(judge)`` an evaluation. The cache sizes of either
    are those of ``jax.jit``: on several devices a program can be there twice, for inputs that the
    host placed and for its own outputs. JAX's caches are cleared before, as in a new process.
    """
    jax.clear_caches()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        _results_of(feed, "resident") as steps,
        _results_of(training, "make_evaluator") as evaluators,
        compilation.compilations() as seen,
    ):
        adversarial_training.main(dataclasses.replace(settings, workdir=f"{folder}/run"))
    seconds: dict[str, list[float]] = {}
    for name, compile_seconds in seen:
        seconds.setdefault(name, []).append(compile_seconds)
    return {
        "total": len(seen),
        "seconds": sum(s for _, s in seen),
        "by_name": {
            name: {"programs": len(values), "seconds": sum(values)}
            for name, values in sorted(seconds.items(), key=lambda item: -sum(item[1]))
        },
        "step_cache_sizes": [step.compiled._cache_size() for step in steps],
        "evaluator_cache_sizes": [evaluator.compiled._cache_size() for evaluator in evaluators],
    }


@contextlib.contextmanager
def _results_of(module: ModuleType, name: str) -> Iterator[list[Any]]:
    """Collects what a function of a module returns while the context lasts."""
    original, results = getattr(module, name), []

    def recording(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    with mock.patch.object(module, name, recording):
        yield results


def print_table(result: dict[str, Any]) -> None:
    """Prints the programs by function, the slowest first."""
    rows = [
        [name, value["programs"], f"{value['seconds']:.2f}"]
        for name, value in result["by_name"].items()
    ]
    rows.append(["all", result["total"], f"{result['seconds']:.2f}"])
    report.print_table("Compilations in a training run", ["function", "programs", "s"], rows)
    report.print_lines(
        f"programs of the step: {result['step_cache_sizes']}, "
        f"of the evaluations: {result['evaluator_cache_sizes']}"
    )
