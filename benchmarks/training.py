"""The speed of training: images per second, use of the device, what the host adds, against PyTorch.

  python -m benchmarks.training                      CPU, an hour on 2 cores
  python -m benchmarks.training --size=full          one accelerator, PreAct-ResNet-18, WRN-34-10
  python -m benchmarks.training --profile            where the time goes, by kinds of operations

Measured are standard training and PGD-10 adversarial training as in
``experiments.adversarial_training --preset=paper`` on images 32x32: gathered on the device,
cropped, mirrored, attacked, learnt with SGD, several steps in one dispatch.

images/s      of the training loop (``robustjax.training.fit`` with ``feed.resident``)
host          what the loop adds to a dispatch, of its time: the loop's time beyond that of its
              compiled program, called back to back with arguments that are there already, for a
              linear model in many dispatches, where no computation hides it
utilisation   floating-point operations of the step (of its matrix products and convolutions, from
              the traced program) over the rate of large matrix products, measured in the same
              process with the same dtype
PyTorch       its time over ours, that is our throughput in its units, on the same device: eager,
              in two memory formats, and with ``torch.compile`` if asked for; the fastest counts

Times are taken in turn (A, B, C, A, B, C, ...) after a warm-up, without compilation; a ratio is
the median over the rounds. The JSON file holds every time.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from benchmarks import agreement, op_profile, peak, timing
from benchmarks.training_cases import ATTACK, OBJECTIVES, SIZES, Case, Run, Size, Sweep
from experiments import choices, command_line
from experiments.command_line import setting
from robustjax import checks
from robustjax.benchmark import compilation
from robustjax.benchmark import environment as machine
from robustjax.training import report


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    size: str = setting(
        "small", "small: for a CPU; full: for an accelerator; quick: shows that it works and no "
        "speed", "run", choices=tuple(SIZES))
    objective: tuple[str, ...] = setting(
        tuple(OBJECTIVES), "standard training, PGD-10 adversarial training", "run",
        choices=tuple(OBJECTIVES))
    precision: tuple[str, ...] = setting(
        tuple(choices.PRECISIONS), "dtypes of the computation", "run",
        choices=tuple(choices.PRECISIONS))
    model: str | None = setting(None, "one of the networks alone, None: all", "run")
    batch_sizes: tuple[int, ...] = setting((), "none: those of the size", "run", unit="examples")
    rounds: int | None = setting(None, "measurements of each; None: that of the size", "run")
    without_torch: bool = setting(False, "leave out the comparison with PyTorch", "run")
    torch_compile: bool = setting(
        False, "compare with torch.compile, too; it compiles for a minute or two", "run")
    profile: bool = setting(
        False, "where the time of the program goes, for the first batch size of each network",
        "run")
    out: str | None = setting(
        None, "JSON file; None: benchmarks/results/training-DEVICE.json, or none if quick", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        if self.rounds is not None:
            checks.integer("rounds", self.rounds, at_least=1)
        for batch_size in self.batch_sizes:
            checks.integer("batch_sizes", batch_size, at_least=1)
        if not self.sweeps():
            names = ", ".join(sorted({sweep.model for sweep in SIZES[self.size].sweeps}))
            raise ValueError(
                f"model must be one of {names} in a precision that size {self.size} has, got "
                f"{self.model} in {','.join(self.precision)}"
            )

    def sweeps(self) -> list[Sweep]:
        """Those that are asked for."""
        return [
            dataclasses.replace(sweep, batch_sizes=self.batch_sizes or sweep.batch_sizes)
            for sweep in SIZES[self.size].sweeps
            if sweep.precision in self.precision and self.model in (None, sweep.model)
        ]


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints the tables, writes the JSON file; returns what it holds.

    Raises:
      ValueError: a peer computes something else.
    """
    size = SIZES[settings.size]
    if settings.rounds is not None:
        size = dataclasses.replace(size, rounds=settings.rounds)
    out = settings.out
    if out is None and settings.size != "quick":
        out = f"benchmarks/results/training-{jax.default_backend()}.json"
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    peers = None if settings.without_torch else _torch_training()
    host_seconds = host_seconds_per_dispatch(size)
    results: dict[str, Any] = {
        "environment": machine.environment(),
        "settings": dataclasses.asdict(settings),
        "size": dataclasses.asdict(size),
        "host_seconds_per_dispatch": host_seconds,
        "peak": {},
        "runs": [],
    }
    for sweep in settings.sweeps():
        if sweep.precision not in results["peak"]:
            dtype = choices.PRECISIONS[sweep.precision]
            results["peak"][sweep.precision] = peak.matmul_rate(dtype, sizes=size.matrices)
        for objective in settings.objective:
            for batch_size in sweep.batch_sizes:
                case = Case(sweep, objective, batch_size)
                wanted = settings.profile and batch_size == sweep.batch_sizes[0]
                try:
                    found = measure(
                        case,
                        size,
                        rate=results["peak"][sweep.precision]["rate"],
                        host_seconds=host_seconds,
                        peers=peers if sweep.peer else None,
                        torch_compile=settings.torch_compile,
                        profile=wanted,
                    )
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    report.print_lines(f"{case.title}: does not fit into the memory")
                    continue
                results["runs"].append(found)
                report.print_lines(f"{case.title}: {found['images_per_second']:,.1f} images/s")
                if out is not None:  # what is measured is kept, whatever comes next
                    report.write_json(out, results)
    results["environment"]["load_average_1_minute_after"] = timing.load()
    _print(results)
    if out is not None:
        report.write_json(out, results)
        report.print_lines(f"written: {out}")
    return results


def measure(
    case: Case,
    size: Size,
    *,
    rate: float,
    host_seconds: float,
    peers: ModuleType | None,
    torch_compile: bool,
    profile: bool,
) -> dict[str, Any]:
    """Times of a case, and what follows from them.

    Args:
      case: what is trained.
      size: how much of it.
      rate: operations per second of matrix products, of the case's dtype.
      host_seconds: what the loop adds to a dispatch.
      peers: ``benchmarks.torch_training``, or None.
      torch_compile: compare with that, too.
      profile: see where the time goes.

    Raises:
      ValueError: the peers compute something else.
    """
    run = Run(case, size)
    began = time.perf_counter()
    with compilation.compilations() as seen:
        run.loop()
    first = time.perf_counter() - began
    runs: dict[str, Callable] = {"loop": run.loop, "program": run.program}
    peer_runs = _peers(peers, case, run, torch_compile) if peers else {}
    summary = timing.summary(
        timing.interleaved({**runs, **peer_runs}, size.rounds),
        {"loop / program": ("loop", ["program"]), "loop / PyTorch": ("loop", [*peer_runs])},
    )
    median, flops = summary["median_seconds"]["loop"], run.flops()
    found = {
        "title": case.title,
        **dataclasses.asdict(case),
        "steps": run.steps,
        "first_seconds": first,
        "compile_seconds": sum(seconds for name, seconds in seen if "steps" in name),
        "flops_per_step": flops,
        "images_per_second": run.steps * case.batch_size / median,
        "utilisation": flops * run.steps / median / rate,
        "host_share": host_seconds * run.dispatches / median,
        **summary,
    }
    if "loop / PyTorch" in summary["ratios"]:
        times = summary["ratios"]["loop / PyTorch"]
        found["throughput_over_torch"] = {
            "to": times["to"],
            "median": 1 / times["median"],
            "min": 1 / times["max"],
            "max": 1 / times["min"],
        }
    if profile:
        found["profile"] = op_profile.measure(partial(run.program, 1), op_profile.works(run.text()))
    return found


def host_seconds_per_dispatch(size: Size) -> float:
    """What the training loop adds to the time of its program, at least over the rounds."""
    case = Case(Sweep("linear", None, "float32", (32,)), "standard", 32)
    run = Run(case, dataclasses.replace(size, dispatches=size.host_dispatches))
    runs = {"loop": run.loop, "program": run.program}
    loop, program = map(min, timing.interleaved(runs, size.rounds).values())
    return (loop - program) / run.dispatches


def _peers(
    peers: ModuleType, case: Case, run: Run, torch_compile: bool
) -> dict[str, Callable[[], Any]]:
    """The same training in PyTorch, by name; its losses must be ours."""
    from benchmarks import torch_peers

    runs = {}
    formats = [(*item, False) for item in torch_peers.FORMATS.items()]
    if torch_compile:
        formats.append(("torch_compile", torch_peers.FORMATS["torch_channels_last"], True))
    for name, memory_format, compiled in formats:
        network = torch_peers.PreActResNet((2, 2, 2, 2), run.settings.width or 64)
        advance = peers.trainer(
            torch_peers.load_flax(network, *run.variables),
            run.train.image,
            run.train.label,
            memory_format=memory_format,
            batch_size=case.batch_size,
            attack=ATTACK if case.objective == "madry" else None,
            learning_rate=run.settings.learning_rate,
            momentum=run.settings.momentum,
            weight_decay=run.settings.weight_decay,
            bfloat16=case.sweep.precision == "bfloat16",
            compiled=compiled,
        )
        agreement.check_loss(name, advance(run.steps), run.losses[0], within=0.25)
        runs[name] = partial(advance, run.steps)
    return runs


def _torch_training() -> ModuleType | None:
    """The peers; None, and a line that says so, where PyTorch is missing or on another device."""
    try:
        from benchmarks import torch_training
    except ImportError as error:
        report.print_lines(f"No comparison with PyTorch: {error}")
        return None
    ours = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if torch_training.device() != ours:
        report.print_lines(
            f"No comparison with PyTorch, which is on {torch_training.device()}, not {ours}"
        )
        return None
    return torch_training


def _print(results: dict[str, Any]) -> None:
    for precision, found in results["peak"].items():
        report.print_lines(
            f"matrix products, {precision}: {found['rate']:.3e} operations/s ({found['size']} rows)"
        )
    report.print_lines(f"host: {1000 * results['host_seconds_per_dispatch']:.2f} ms a dispatch")
    rows = []
    for run in results["runs"]:
        peer = run.get("throughput_over_torch")
        rows.append([
            run["title"],
            f"{run['images_per_second']:,.1f}",
            f"{1000 * run['median_seconds']['loop'] / run['steps']:,.1f}",
            f"{100 * run['utilisation']:.1f} %",
            f"{100 * run['host_share']:.1f} %",
            f"{run['compile_seconds']:.1f}",
            "" if peer is None else f"{peer['median']:.2f} ({peer['min']:.2f}-{peer['max']:.2f})",
        ])  # fmt: skip
    report.print_table(
        f"Training, {results['environment']['device']}",
        ["run", "images/s", "ms a step", "utilisation", "host", "XLA s", "x PyTorch"],
        rows,
    )
    report.print_lines("aims: host below 2 %, x PyTorch at least 1.0 on a CPU, 1.5 on a GPU")
    for run in results["runs"]:
        if "profile" in run:
            op_profile.print_table(run["title"], run["profile"])


if __name__ == "__main__":
    command_line.run(main, Settings, {"default": Settings()}, __doc__)
