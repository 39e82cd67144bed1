"""The cost of a training step for every objective, against standard training and its passes.

  python -m benchmarks.objectives               some 10 minutes on 2 cores
  python -m benchmarks.objectives --width=8
  python -m benchmarks.objectives --without_torch=True

Pre-activation ResNet-18 without normalisation, batch of 64, 32x32 images. Times are taken in turn
after a warm-up, without compilation; the median over the rounds counts. Passes are counted in the
traced step: forward, backward, and tangent ones, each as costly as a forward pass or a little more.
The predicted ratio takes a pass of any kind as one unit and standard training as two. The table of
Ma (2025) predicts by the same rule, but counts the derivative of a penalty for the parameters as
one backward pass. Convolutions are counted in the compiled step.

The peers are the same objectives in PyTorch. Before the clock starts, both must have the same loss
and the same gradient for the parameters, on the same batch with the same random numbers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import agreement, timing
from experiments import command_line
from experiments.command_line import setting
from robustjax import attacks, checks, keys, models, objectives, optim, training
from robustjax.benchmark import compilation
from robustjax.benchmark import environment as machine
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import report

LEARNING_RATE = 1e-6  # so small that the timed steps are all alike
EPS, ALIGN_WEIGHT, CURE_WEIGHT = 8 / 255, 0.2, 0.1
THREAT = ThreatModel(LInf(), EPS)
POINT, RADIUS = objectives.evaluation_point(THREAT)
FGSM = objectives.madry(attacks.fgsm(THREAT))
OBJECTIVES = {
    "standard": objectives.standard(),
    "FGSM": FGSM,
    "FGSM + GradAlign": objectives.penalized(FGSM, objectives.grad_align(EPS), weight=ALIGN_WEIGHT),
    "FGSM + CURE": objectives.penalized(FGSM, objectives.cure(EPS), weight=CURE_WEIGHT),
    "FGSM + gradient penalty": objectives.penalized(FGSM, objectives.gradient_penalty()),
    "FOAR": objectives.penalized(objectives.standard(), objectives.first_order(EPS)),
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
# Forward and backward passes of Ma (2025), "Understanding adversarial robustness in deep learning",
# table 3.5. The row of FOAR leaves out its point, the row of SOAR does not.
PUBLISHED_PASSES = {
    "standard": (1, 1),
    "FGSM": (2, 2),
    "PGD-2": (3, 3),
    "PGD-10": (11, 11),
    "FOAR": (1, 2),
    "SOAR, PGD-1": (3, 4),
}
# Attacks of several steps: in their programs the convolutions of a step are written once.
LOOPED = ("PGD-2", "PGD-10", "TRADES", "MART")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    width: int = setting(16, "channels of the first stage", "run")
    batch_size: int = setting(64, "images", "run", unit="examples")
    image_size: int = setting(32, "side of the images", "run", unit="pixels")
    stages: tuple[int, ...] = setting((2, 2, 2, 2), "blocks in each stage", "run")
    rounds: int = setting(7, "measurements of each", "run")
    without_torch: bool = setting(False, "leave out the comparison with PyTorch", "run")
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
    """Measures, prints the tables, writes the JSON file; returns what it holds.

    Raises:
      ValueError: a peer computes something else, or PyTorch is wanted where JAX is not on the CPU.
    """
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
    optimizer = optim.msgd(LEARNING_RATE)
    state = training.create_state(params, model_state, optimizer, jax.random.key(0))
    runs, passes, convolutions = {}, {}, {}
    for name, objective in OBJECTIVES.items():
        step = training.train_step(training.counted(model.apply), objective, optimizer)
        passes[name] = training.count_passes(step, state, batch)
        step = jax.jit(training.train_step(model.apply, objective, optimizer))
        compiled = step.lower(state, batch).compile()
        if name not in LOOPED:
            convolutions[name] = compiled.as_text().count(" convolution(")
        runs[name] = partial(_finish, compiled, state, batch)
    titles = {f"{name} / standard": (name, ["standard"]) for name in OBJECTIVES}
    if "FGSM" in OBJECTIVES:
        titles["FGSM + GradAlign / FGSM"] = ("FGSM + GradAlign", ["FGSM"])
    agreements = {}
    peers = None if settings.without_torch else _torch_peers()
    if peers is not None:
        environment["torch_threads"] = peers.torch.get_num_threads()
        steps, agreements = _torch_steps(peers, settings, model, params, batch)
        for name, formats in steps.items():
            runs.update(formats)
            titles[f"{name} / PyTorch"] = (name, [*formats])
    summary = timing.summary(timing.interleaved(runs, settings.rounds), titles)
    results = {
        "environment": {**environment, "load_average_1_minute_after": timing.load()},
        "settings": dataclasses.asdict(settings),
        "passes": {name: found._asdict() for name, found in passes.items()},
        "convolutions": convolutions,
        "predicted": {
            name: {
                "by_convolutions": (
                    convolutions[name] / convolutions["standard"] if name in convolutions else None
                ),
                "by_passes": found.total / passes["standard"].total,
                "published": sum(PUBLISHED_PASSES[name]) / 2 if name in PUBLISHED_PASSES else None,
            }
            for name, found in passes.items()
        },
        "agreement_with_torch": agreements,
        "compilations": _compilations(model, state, batch, optimizer),
        **summary,
    }
    _print(results)
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        report.write_json(settings.out, results)
    return results


def _print(results: dict[str, Any]) -> None:
    settings, ratios = results["settings"], results["ratios"]
    rows = []
    for name, passes in results["passes"].items():
        predicted = results["predicted"][name]
        peer = ratios.get(f"{name} / PyTorch")
        rows.append([
            name,
            f"{results['median_seconds'][name]:.3f}",
            f"{ratios[f'{name} / standard']['median']:.2f}",
            *("" if value is None else f"{value:.2f}" for value in predicted.values()),
            f"{passes['forward']}, {passes['backward']}, {passes['tangent']}",
            "" if peer is None else f"{peer['median']:.2f}",
        ])  # fmt: skip
    report.print_table(
        f"A training step, PreAct-ResNet of width {settings['width']}, "
        f"batch {settings['batch_size']}",
        [
            "objective", "median s", "to standard", "by convolutions", "by passes", "published",
            "forward, backward, tangent", "to PyTorch",
        ],
        rows,
    )  # fmt: skip
    aligned = ratios.get("FGSM + GradAlign / FGSM")
    if aligned is not None:
        report.print_lines(
            f"FGSM + GradAlign / FGSM: {aligned['median']:.2f} (aim 2.5, the paper about 3)"
        )
    if not results["agreement_with_torch"]:
        report.print_lines("PyTorch was left out")
    for name, count in results["compilations"].items():
        report.print_lines(f"programs of {name} for three pairs of eps and lambda: {count}")


def _compilations(model: models.Model, state: Any, batch: dict, optimizer: Any) -> dict[str, int]:
    """How many programs of a step XLA compiles when eps and lambda change."""

    def grad_align(eps, weight):
        base = objectives.madry(attacks.fgsm(ThreatModel(LInf(), eps)))
        return objectives.penalized(base, objectives.grad_align(eps), weight=weight)

    def soar(eps, weight):
        attack, radius = objectives.evaluation_point(ThreatModel(LInf(), eps))
        base = objectives.madry(attack)
        return objectives.penalized(base, objectives.soar(radius), weight=weight, at="adversarial")

    counts = {}
    for name, objective in {"FGSM + GradAlign": grad_align, "SOAR, PGD-1": soar}.items():

        @jax.jit
        def step_of_settings(state, batch, eps, weight, objective=objective):
            step = training.train_step(model.apply, objective(eps, weight), optimizer)
            return step(state, batch)

        with compilation.compilations() as seen:
            for eps, weight in ((EPS, 0.2), (EPS / 2, 0.2), (EPS / 2, 1.0)):
                jax.block_until_ready(step_of_settings(state, batch, eps, weight))
        counts[name] = sum("step_of_settings" in function for function, _ in seen)
    return counts


def _torch_peers() -> ModuleType | None:
    """The peers; None, and a line that says so, where PyTorch is missing."""
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"the PyTorch peers run on the CPU, JAX on {jax.default_backend()}: "
            "pass --without_torch, or set JAX_PLATFORMS=cpu"
        )
    try:
        from benchmarks import torch_objectives
    except ImportError as error:
        report.print_lines(f"No comparison with PyTorch: {error}")
        return None
    return torch_objectives


def _torch_steps(
    peers: ModuleType, settings: Settings, model: models.Model, params: Any, batch: dict
) -> tuple[dict[str, dict[str, Callable]], dict[str, dict[str, float]]]:
    """The peers' training steps by objective and run, and how well each agrees with ours.

    Raises:
      ValueError: a loss differs by more than a thousandth, or a gradient by more than a hundredth
        (a tenth for SOAR).
    """
    from benchmarks import torch_peers

    losses = peers.losses(eps=EPS, align_weight=ALIGN_WEIGHT, cure_weight=CURE_WEIGHT)
    key = jax.random.key(1)
    draws, labels = _draws(batch, key), torch_peers.labels(batch["label"])
    steps, agreements = {}, {}
    for name in [name for name in OBJECTIVES if name in losses]:
        loss_fn = OBJECTIVES[name](model.apply)

        def mean_loss(params, loss_fn=loss_fn):
            return loss_fn(params, {}, key, batch)[0].mean()

        value, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
        steps[name] = {}
        for peer, memory_format in torch_peers.FORMATS.items():
            title = f"{name}, {peer}"
            network = peers.PreActResNet(settings.stages, settings.width)
            network = torch_peers.load_flax(network, params, {}).to(memory_format=memory_format)
            images = torch_peers.images(batch["image"], memory_format)
            # z_1 has one number per example, the others are images.
            given = {
                draw: torch_peers.images(v, memory_format) if v.ndim == 4 else peers.torch.tensor(v)
                for draw, v in draws.items()
            }
            theirs, difference = peers.gradient_difference(
                network, losses[name], images, labels, given, gradient
            )
            agreement.check_loss(title, theirs, float(value), within=1e-3)
            # SOAR divides a difference of gradients by h: one ReLU whose input rounds to the other
            # side of zero, among millions, shows.
            if not difference <= (0.1 if name.startswith("SOAR") else 1e-2):
                raise ValueError(
                    f"the gradient of {title} must be ours, differs by {difference:.3g} of its norm"
                )
            agreements[title] = {
                "loss": theirs, "our_loss": float(value), "gradient_difference": difference
            }  # fmt: skip
            steps[name][title] = peers.training_step(
                network, losses[name], images, labels, LEARNING_RATE
            )
    return steps, agreements


def _draws(batch: dict, key: jax.Array) -> dict[str, np.ndarray]:
    """The random numbers of our objectives under a key, for the peers."""
    x, index = batch["image"], batch["index"]
    of_attack = keys.fold_in(keys.per_example(jax.random.fold_in(key, 0), index), 0)
    of_penalty = keys.per_example(jax.random.fold_in(key, 2), index)

    def normal(key):
        of_x, of_one = jax.random.split(jax.random.fold_in(key, 0))
        return jax.random.normal(of_x, x.shape[1:]), jax.random.normal(of_one)

    z, z_1 = jax.vmap(normal)(of_penalty)
    eta = jax.vmap(lambda key, x: LInf().sample_ball(key, x, EPS))(of_penalty, x)
    start = ThreatModel(LInf(), EPS / 2).sample(of_attack, x)
    return {"eta": np.array(eta), "start": np.array(start), "z": np.array(z), "z_1": np.array(z_1)}


def _finish(step: Any, *arguments: Any) -> None:
    jax.block_until_ready(step(*arguments))


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
