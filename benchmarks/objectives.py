"""The cost of a training step for every objective, against standard training and its passes.

  python -m benchmarks.objectives               some 5 minutes on 2 cores
  python -m benchmarks.objectives --width=8

Pre-activation ResNet-18 without normalisation, batch of 64, 32x32 images. Times are taken in turn
after a warm-up, without compilation; the median over the rounds counts. Passes are counted in the
traced step: forward, backward, and tangent ones, each as costly as a forward pass or a little more.
The predicted ratio takes a pass of any kind as one unit and standard training as two.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import agreement, timing
from experiments import command_line
from experiments.command_line import setting
from robustjax import attacks, checks, models, objectives, optim, training
from robustjax.benchmark import environment as machine
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import report

THREAT = ThreatModel(LInf(), 8 / 255)
POINT, RADIUS = objectives.evaluation_point(THREAT)
FGSM = objectives.madry(attacks.fgsm(THREAT))
OBJECTIVES = {
    "standard": objectives.standard(),
    "FGSM": FGSM,
    "FGSM + GradAlign": objectives.penalized(FGSM, objectives.grad_align(8 / 255), weight=0.2),
    "FGSM + CURE": objectives.penalized(FGSM, objectives.cure(8 / 255), weight=0.1),
    "FGSM + gradient penalty": objectives.penalized(FGSM, objectives.gradient_penalty()),
    "FOAR": objectives.penalized(objectives.standard(), objectives.first_order(8 / 255)),
    "FOAR, PGD-1": objectives.penalized(
        objectives.madry(POINT), objectives.first_order(RADIUS), at="adversarial"
    ),
    "SOAR, PGD-1": objectives.penalized(
        objectives.madry(POINT), objectives.soar(RADIUS), at="adversarial"
    ),
    "SOAR, PGD-1, exact": objectives.penalized(
        objectives.madry(POINT), objectives.soar(RADIUS, hessian="exact"), at="adversarial"
    ),
    "PGD-2": objectives.madry(attacks.pgd(THREAT, steps=2)),
    "PGD-10": objectives.madry(attacks.pgd(THREAT, steps=10)),
    "TRADES": objectives.trades(objectives.trades_attack(THREAT)),
    "MART": objectives.mart(attacks.pgd(THREAT, steps=10)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    width: int = setting(16, "channels of the first stage", "run")
    batch_size: int = setting(64, "images", "run", unit="examples")
    image_size: int = setting(32, "side of the images", "run", unit="pixels")
    stages: tuple[int, ...] = setting((2, 2, 2, 2), "blocks in each stage", "run")
    rounds: int = setting(7, "measurements of each", "run")
    out: str | None = setting(
        "benchmarks/results/objectives-cpu.json", "JSON file, or None", "run")
    # fmt: on

    def __post_init__(self):
        for name in ("width", "batch_size", "image_size", "rounds"):
            checks.integer(name, getattr(self, name), at_least=1)


PRESETS = {
    "full": Settings(),
    "quick": Settings(width=2, batch_size=4, image_size=8, stages=(1,), rounds=1, out=None),
}


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON file; returns what it holds."""
    environment = machine.environment()
    model = models.from_linen(
        models.PreActResNet(settings.stages, width=settings.width, norm="none")
    )
    draw = np.random.default_rng(0)
    n, side = settings.batch_size, settings.image_size
    batch = {
        "image": jnp.asarray(draw.random((n, side, side, 3), np.float32)),
        "label": jnp.asarray(draw.integers(0, 10, n), jnp.int32),
        "index": jnp.arange(n, dtype=jnp.int32),
    }
    params, model_state = agreement.random_variables(model, batch["image"])
    optimizer = optim.msgd(1e-6)
    state = training.create_state(params, model_state, optimizer, jax.random.key(0))
    runs, passes = {}, {}
    for name, objective in OBJECTIVES.items():
        step = training.train_step(training.counted(model.apply), objective, optimizer)
        passes[name] = training.count_passes(step, state, batch)
        step = jax.jit(training.train_step(model.apply, objective, optimizer))
        runs[name] = partial(_finish, step.lower(state, batch).compile(), state, batch)
    seconds = timing.interleaved(runs, settings.rounds)
    titles = {f"{name} / standard": (name, ["standard"]) for name in OBJECTIVES}
    titles["FGSM + GradAlign / FGSM"] = ("FGSM + GradAlign", ["FGSM"])
    summary = timing.summary(seconds, titles)
    rows = []
    for name, found in passes.items():
        ratio = summary["ratios"][f"{name} / standard"]
        rows.append([
            name, f"{summary['median_seconds'][name]:.3f}", f"{ratio['median']:.2f}",
            f"{found.total / passes['standard'].total:.2f}",
            f"{found.forward}, {found.backward}, {found.tangent}",
        ])  # fmt: skip
    report.print_table(
        f"A training step, PreAct-ResNet of width {settings.width}, batch {n}",
        ["objective", "median s", "to standard", "by passes", "forward, backward, tangent"],
        rows,
    )
    aligned = summary["ratios"]["FGSM + GradAlign / FGSM"]["median"]
    report.print_lines(f"FGSM + GradAlign / FGSM: {aligned:.2f} (aim 2.5, the paper about 3)")
    environment["load_average_1_minute_after"] = timing.load()
    results = {
        "environment": environment,
        "settings": dataclasses.asdict(settings),
        "passes": {name: found._asdict() for name, found in passes.items()},
        **summary,
    }
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        report.write_json(settings.out, results)
    return results


def _finish(step: Any, *arguments: Any) -> None:
    jax.block_until_ready(step(*arguments))


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
