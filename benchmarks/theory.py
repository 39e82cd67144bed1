"""The speed of the exact studies: sweeps of linear classifiers, and dynamics of sign descent.

  python -m benchmarks.theory              some 3 minutes on 2 cores
  python -m benchmarks.theory --steps=500

sweep     the programs of figure 5.2 of Faghri et al. (2021): all methods, ratios d/n and seeds;
          seconds of compilation and of running, each program once, and of the reference solvers
dynamics  figure 4.7 of Ma (2025): GD, signGD, Adam and RMSProp on three frequencies, all 20,000
          steps of each, after compilation
loops     signGD from many starts at once, against the same in NumPy: a loop over the starts, each
          of them a loop over the steps; and one loop over the steps, for all starts as arrays

Before the clock starts, all loops must end at the same weights. Times of the last two parts are
taken in turn; the median over the rounds counts.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import command_line, implicit_studies, implicit_sweeps, optimizer_theory
from experiments.command_line import setting
from experiments.implicit_studies import Grids, Program
from robustjax import checks
from robustjax.benchmark import environment as machine
from robustjax.theory import frequency_regression as regression
from robustjax.theory.frequency_regression import Population
from robustjax.training import report


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    seeds: int = setting(3, "data sets of each size in the sweep", "run")
    sweep_steps: int = setting(10_000, "steps of descent in the sweep", "run")
    steps: int = setting(2_000, "steps of the loops", "run")
    instances: int = setting(256, "starts of the loops", "run")
    dynamics_steps: int = setting(optimizer_theory.STEPS, "steps of the dynamics", "run")
    rounds: int = setting(5, "measurements of each", "run")
    out: str | None = setting("benchmarks/results/theory-cpu.json", "JSON file, or None", "run")
    # fmt: on

    def __post_init__(self):
        for name in ("seeds", "sweep_steps", "steps", "instances", "dynamics_steps", "rounds"):
            checks.integer(name, getattr(self, name), at_least=1)


PRESETS = {
    "full": Settings(),
    "quick": Settings(
        seeds=1, sweep_steps=5, steps=20, instances=4, dynamics_steps=20, rounds=1, out=None
    ),
}


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints the tables, writes the JSON file; returns what it holds.

    Raises:
      ValueError: the loops do not agree, so that their times mean nothing.
    """
    environment = machine.environment()
    with jax.enable_x64(True):
        results = {
            "environment": environment,
            "settings": dataclasses.asdict(settings),
            "sweep": sweep(settings),
            "dynamics": dynamics(settings),
            "loops": loops(settings),
        }
    environment["load_average_1_minute_after"] = timing.load()
    _print(results)
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        report.write_json(settings.out, results)
    return results


def sweep(settings: Settings) -> dict[str, Any]:
    """Seconds of each program of the sweep, compiled and run once, and of the exact solvers."""
    grids = Grids(
        seeds=settings.seeds,
        steps=settings.sweep_steps,
        penalty_steps=min(settings.sweep_steps, Grids().penalty_steps),
    )
    examples = implicit_studies.examples_of(grids, grids.ratios)
    programs, solvers = dict(implicit_studies.sweep_programs(grids)), {}
    for attack, norm in implicit_studies.ATTACKS.items():
        began = time.perf_counter()
        best = implicit_sweeps.optimum(examples, norm)
        solvers[attack] = time.perf_counter() - began
        own = implicit_studies.training(grids, norm, best.eps)
        programs |= {f"{name}, {attack}": program for name, program in own.items()}
    seconds = {name: _seconds(program, examples) for name, program in programs.items()}
    compiling, running = (sum(column) for column in zip(*seconds.values(), strict=True))
    return {
        "programs": {name: {"compile": c, "run": r} for name, (c, r) in seconds.items()},
        "solvers": solvers,
        "compile": compiling,
        "run": running,
        "total": compiling + running + sum(solvers.values()),
    }


def _seconds(program: Program, examples: Any) -> tuple[float, float]:
    """Seconds to trace and compile a program, and to run it."""
    began = time.perf_counter()
    compiled = jax.jit(program.run).lower(examples).compile()
    middle = time.perf_counter()
    jax.block_until_ready(compiled(examples))
    return middle - began, time.perf_counter() - middle


def _population() -> Population:
    return Population(jnp.asarray(optimizer_theory.VARIANCES), jnp.asarray(optimizer_theory.TARGET))


def dynamics(settings: Settings) -> dict[str, Any]:
    """Seconds of all paths of the figure after compilation."""
    initial = jnp.asarray(optimizer_theory.INITIAL)

    def path(transform):
        return jax.block_until_ready(
            regression.simulate(transform, _population(), initial, steps=settings.dynamics_steps)
        )

    def everything():
        for transform in optimizer_theory.TRANSFORMS.values():
            path(transform)

    runs = {
        name: functools.partial(path, transform)
        for name, transform in optimizer_theory.TRANSFORMS.items()
    }
    return timing.summary(timing.interleaved({**runs, "all": everything}, settings.rounds), {})


def loops(settings: Settings) -> dict[str, Any]:
    """Seconds of sign descent from many starts, compiled and in NumPy, and their ratios."""
    starts = np.random.default_rng(0).normal(size=(settings.instances, 3))
    transform, population = optimizer_theory.TRANSFORMS["signGD"], _population()

    @jax.jit
    @jax.vmap
    def compiled(start):
        steps = settings.steps
        return regression.simulate(transform, population, start, steps=steps, every=steps)[-1]

    runs: dict[str, Callable[[], np.ndarray]] = {
        "robustjax": lambda: np.asarray(compiled(starts)),
        "NumPy, one start after the other": lambda: np.stack(
            [numpy_sign_descent(start, settings.steps) for start in starts]
        ),
        "NumPy, all starts as arrays": lambda: numpy_sign_descent(starts, settings.steps),
    }
    ends = {name: run() for name, run in runs.items()}
    apart = max(float(np.abs(end - ends["robustjax"]).max()) for end in ends.values())
    if not apart < 1e-9:
        raise ValueError(f"all loops must end at the same weights, got {apart:.1e} between them")
    others = [name for name in runs if name != "robustjax"]
    ratios = {f"{name} / robustjax": (name, ["robustjax"]) for name in others}
    return {
        "difference": apart,
        **timing.summary(timing.interleaved(runs, settings.rounds), ratios),
    }


def numpy_sign_descent(start: np.ndarray, steps: int) -> np.ndarray:
    """The last spectrum of signGD, as anyone would write it in NumPy.

    Args:
      start: spectra of the weights, ``(..., 3)``.
      steps: number of steps.
    """
    dct = np.asarray(regression.to_frequency(jnp.eye(3)))  # rows: spectra of the coordinates
    variances, target = map(np.array, (optimizer_theory.VARIANCES, optimizer_theory.TARGET))
    w = start @ dct.T
    for _ in range(steps):
        gradient = (variances * (w @ dct - target)) @ dct.T
        w = w - optimizer_theory.RATE * np.sign(gradient)
    return w @ dct


def _print(results: Mapping[str, Any]) -> None:
    found = results["sweep"]
    rows = [[name, f"{s['compile']:.1f}", f"{s['run']:.2f}"]
            for name, s in found["programs"].items()]  # fmt: skip
    rows += [[f"exact solvers, {name}", "", f"{s:.2f}"] for name, s in found["solvers"].items()]
    rows.append(["all", f"{found['compile']:.1f}", f"{found['total'] - found['compile']:.2f}"])
    report.print_table("The sweep over d/n", ["program", "compilation s", "run s"], rows)
    report.print_lines(f"all of the sweep: {found['total']:.1f} s (aim: below 120)")
    all_paths = results["dynamics"]["median_seconds"]["all"]
    timing.print_summary("The dynamics of three frequencies", results["dynamics"], {})
    report.print_lines(f"all paths: {all_paths:.3f} s (aim: below 1)")
    timing.print_summary(
        f"signGD, {results['settings']['instances']} starts",
        results["loops"],
        {"NumPy, one start after the other / robustjax": "aim: at least 20"},
    )


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
