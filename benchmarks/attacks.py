"""Speed of attacks and of adversarial training, against an unrolled loop and against PyTorch.

  python -m benchmarks.attacks                            all of it, some 15 minutes on 2 cores
  python -m benchmarks.attacks --only=pgd --widths=16     one part
  JAX_NUM_CPU_DEVICES=2 python -m benchmarks.attacks      also with batches split over 2 devices

pgd           PGD on PreAct-ResNet-18 in evaluation mode, l_inf: our ``lax.scan``, the same loop
              unrolled in Python, both with the plain convolution too, and the same attack in
              PyTorch with the same weights.
training      steps of adversarial training as in ``experiments.adversarial_training
              --preset=small``, and the same loop in PyTorch.
compilations  what XLA compiles in a whole small run of that entry point.

Times are taken in turn (A, B, C, A, B, C, ...) after a warm-up, without compilation; a ratio is
the median over the rounds. The JSON file holds every time. PyTorch runs in eager mode on its
default threads, in two memory formats, of which the faster counts.
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from benchmarks import compilations, demo_training, pgd, timing
from experiments import adversarial_training, command_line
from experiments.command_line import setting
from experiments.training_settings import Settings as TrainingSettings
from robustjax import checks
from robustjax.benchmark import environment as machine
from robustjax.training import report

PARTS = ("pgd", "training", "compilations")
BOUNDS = {
    "scan / unrolled": "at most 1.1",
    "scan / PyTorch": "aim 1.0",
    "scan on all devices / PyTorch": "aim 1.0",
    "robustjax / PyTorch": "aim 1.0",
    "robustjax on all devices / PyTorch": "aim 1.0",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    only: tuple[str, ...] = setting(PARTS, "parts to measure", "run", choices=PARTS)
    rounds: int | None = setting(None, "measurements of each; None: 5, or 1 if quick", "run")
    widths: tuple[int, ...] = setting(
        (), "widths of PreAct-ResNet-18; none: 16,64, or 2 if quick", "run", unit="channels")
    out: str | None = setting(
        None, "JSON file; None: benchmarks/results/attacks-DEVICE.json, or none if quick", "run")
    quick: bool = setting(False, "tiny sizes, which show that it works and no speed", "run")
    without_torch: bool = setting(False, "leave out the comparison with PyTorch", "run")
    # fmt: on


DEMO = adversarial_training.PRESETS["small"]
# A whole run of the entry point, in which compilations are counted.
SMALL_RUN = dataclasses.replace(
    DEMO,
    dataset="digits",
    objective=("madry",),
    epochs=4,
    eps_warmup=1,
    checkpoint_every=2,
    batch_size=96,
    test_batch_size=96,
    validation_steps=2,
    test_steps=2,
    test_restarts=2,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much work is measured.

    Attributes:
      rounds: measurements of each run.
      stage_sizes: blocks in the stages of the pre-activation ResNet.
      widths: its widths.
      image_size: side of its images.
      batch_size: its batch.
      attack_steps: steps of PGD.
      experiment: settings of the training that is timed.
      dispatches: dispatches of it in a measurement.
      whole_run: settings of the run whose compilations are counted.
    """

    rounds: int
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    image_size: int
    batch_size: int
    attack_steps: int
    experiment: TrainingSettings
    dispatches: int
    whole_run: TrainingSettings


FULL = Sizes(
    rounds=5,
    stage_sizes=(2, 2, 2, 2),
    widths=(16, 64),
    image_size=32,
    batch_size=64,
    attack_steps=10,
    experiment=DEMO,
    dispatches=2,
    whole_run=SMALL_RUN,
)
QUICK = Sizes(
    rounds=1,
    stage_sizes=(1,),
    widths=(2,),
    image_size=8,
    batch_size=8,
    attack_steps=2,
    experiment=dataclasses.replace(
        DEMO, dataset="digits", attack_steps=1, batch_size=96, dispatch=1
    ),
    dispatches=2,
    whole_run=dataclasses.replace(SMALL_RUN, model="linear", attack_steps=1, epochs=2),
)


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints tables, writes the JSON file; returns what it holds."""
    sizes = QUICK if settings.quick else FULL
    if settings.rounds is not None:
        rounds = checks.integer("rounds", settings.rounds, at_least=1)
        sizes = dataclasses.replace(sizes, rounds=rounds)
    if settings.widths:
        widths = tuple(checks.integer("widths", w, at_least=1) for w in settings.widths)
        sizes = dataclasses.replace(sizes, widths=widths)
    for part in settings.only:
        checks.choice("only", part, PARTS)
    peers = None
    if not settings.without_torch and {"pgd", "training"} & {*settings.only}:
        peers = _torch_peers()
    out = settings.out
    if out is None and not settings.quick:
        out = f"benchmarks/results/attacks-{jax.default_backend()}.json"
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)

    environment = machine.environment()
    if environment["load_average_1_minute"] > environment["cores"] / 2:
        report.print_lines(
            f"the machine is busy, load {environment['load_average_1_minute']:.1f} on "
            f"{environment['cores']} cores: PyTorch, whose threads wait for each other, loses most"
        )
    results: dict[str, Any] = {
        "environment": environment,
        "settings": dataclasses.asdict(settings),
        "sizes": dataclasses.asdict(sizes),
    }
    if peers is not None:
        results["environment"]["torch_threads"] = peers.torch.get_num_threads()
    if "pgd" in settings.only:
        results["pgd"] = []
        for width in sizes.widths:
            measured = pgd.measure(
                width,
                stage_sizes=sizes.stage_sizes,
                image_size=sizes.image_size,
                batch_size=sizes.batch_size,
                steps=sizes.attack_steps,
                rounds=sizes.rounds,
                peers=peers,
            )
            results["pgd"].append(measured)
            title = (
                f"PGD-{sizes.attack_steps}, PreAct-ResNet of width {width}, "
                f"batch {sizes.batch_size}, {sizes.image_size}x{sizes.image_size}"
            )
            timing.print_summary(title, measured, BOUNDS)
    if "training" in settings.only:
        measured = demo_training.measure(
            sizes.experiment, dispatches=sizes.dispatches, rounds=sizes.rounds, peers=peers
        )
        results["training"] = measured
        title = (
            f"{measured['steps']} steps of adversarial training, "
            f"{sizes.experiment.dataset}, PGD-{sizes.experiment.attack_steps}"
        )
        timing.print_summary(title, measured, BOUNDS)
    if "compilations" in settings.only:
        results["compilations"] = compilations.count(sizes.whole_run)
        compilations.print_table(results["compilations"])
    results["environment"]["load_average_1_minute_after"] = timing.load()
    if out is not None:
        report.write_json(out, results)
        report.print_lines(f"written: {out}")
    return results


def _torch_peers() -> ModuleType:
    """The module of the peers, if they can run here."""
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"the peers in PyTorch run on the CPU, JAX on {jax.default_backend()}: "
            "pass --without_torch, or set JAX_PLATFORMS=cpu"
        )
    try:
        from benchmarks import torch_peers
    except ImportError as error:
        raise ValueError(
            f"torch is needed for the comparison ({error}): "
            "pip install 'robustjax[parity]', or pass --without_torch"
        ) from error
    return torch_peers


if __name__ == "__main__":
    command_line.run(main, Settings, {"full": Settings()}, __doc__)
