"""Speed of attacks and of adversarial training, against an unrolled loop and against PyTorch.

  python -m benchmarks.attacks                            all of it, some 15 minutes on 2 cores
  python -m benchmarks.attacks --only=pgd --widths=16     one part

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import compilations, timing
from experiments import adversarial_training, command_line
from experiments.command_line import setting
from robustjax import attacks, checks, data, keys, losses, models, training
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import feed, parallel, report

PARTS = ("pgd", "training", "compilations")
THREAT = ThreatModel(LInf(), 8 / 255)
STEP_SIZE = 2 / 255
BOUNDS = {
    "scan / unrolled": "at most 1.1",
    "scan / PyTorch": "aim 1.0",
    "plain scan / scan": "",
    "robustjax / PyTorch": "aim 1.0",
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


# A whole run of the entry point, in which compilations are counted.
SMALL_RUN = dataclasses.replace(
    adversarial_training.PRESETS["small"],
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
    experiment: adversarial_training.Settings
    dispatches: int
    whole_run: adversarial_training.Settings


DEMO = adversarial_training.PRESETS["small"]
FULL = Sizes(
    rounds=5,
    stage_sizes=(2, 2, 2, 2),
    widths=(16, 64),
    image_size=32,
    batch_size=64,
    attack_steps=10,
    experiment=DEMO,
    dispatches=2,
    whole_run=dataclasses.replace(
        DEMO,
        dataset="digits",
        objective=("madry",),
        epochs=4,
        eps_warmup=1,
        checkpoint_every=2,
        batch_size=96,
        validation_steps=2,
        test_steps=2,
        test_restarts=2,
        test_batch_size=96,
    ),
)
QUICK = Sizes(
    rounds=1,
    stage_sizes=(1, 1),
    widths=(2,),
    image_size=8,
    batch_size=4,
    attack_steps=2,
    experiment=dataclasses.replace(DEMO, dataset="digits", attack_steps=1, dispatch=2),
    dispatches=1,
    whole_run=dataclasses.replace(FULL.whole_run, model="linear", attack_steps=1, epochs=2),
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

    environment = timing.environment()
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
            results["pgd"].append(measure_pgd(sizes, width, peers))
            title = (
                f"PGD-{sizes.attack_steps}, PreAct-ResNet of width {width}, "
                f"batch {sizes.batch_size}, {sizes.image_size}x{sizes.image_size}"
            )
            timing.print_summary(title, results["pgd"][-1], BOUNDS)
    if "training" in settings.only:
        results["training"] = measure_training(sizes, peers)
        title = (
            f"{results['training']['steps']} steps of adversarial training, "
            f"{sizes.experiment.dataset}, PGD-{sizes.experiment.attack_steps}"
        )
        timing.print_summary(title, results["training"], BOUNDS)
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


def measure_pgd(sizes: Sizes, width: int, peers: ModuleType | None) -> dict[str, Any]:
    """Times of PGD on PreAct-ResNet-18 of one width, and how far the results agree.

    Raises:
      ValueError: the networks or the attacks do not agree, so that the times mean nothing.
    """
    draw = np.random.default_rng(0)
    size = sizes.image_size
    x = jnp.asarray(draw.random((sizes.batch_size, size, size, 3), np.float32))
    y = jnp.asarray(draw.integers(0, 10, len(x)), jnp.int32)
    attack_key = jax.random.key(0)
    model = {
        conv: models.from_linen(models.PreActResNet(sizes.stage_sizes, width=width, conv=conv))
        for conv in ("canonical", "plain")
    }
    variables = _random_variables(model["canonical"], x)

    options = {"steps": sizes.attack_steps, "step_size": STEP_SIZE}
    scanned, unrolled = attacks.pgd(THREAT, **options), unrolled_pgd(THREAT, **options)
    runs, compile_seconds, adversarial = {}, {}, {}
    for name, attack, conv in (
        ("scan", scanned, "canonical"),
        ("unrolled", unrolled, "canonical"),
        ("scan_plain", scanned, "plain"),
        ("unrolled_plain", unrolled, "plain"),
    ):
        arguments = (*variables, attack_key, x, y)
        with timing.compilations() as seen:
            run = jax.jit(_on_model(attack, model[conv].apply)).lower(*arguments).compile()
        compile_seconds[name] = sum(seconds for _, seconds in seen)
        adversarial[name] = run(*arguments)
        runs[name] = partial(_finish, run, *arguments)

    logits_fn = jax.jit(models.eval_logits(model["canonical"].apply, *variables))
    logits = logits_fn(x)
    logit_difference = {}
    # Where our attack starts, so that PyTorch's can be led from there to the same end.
    start = THREAT.sample(_start_keys(attack_key, len(x)), x)
    for name, memory_format in peers.FORMATS.items() if peers else ():
        network = peers.load_flax(peers.PreActResNet(sizes.stage_sizes, width), *variables)
        network = network.eval().requires_grad_(False).to(memory_format=memory_format)
        images = peers.images(x, memory_format)
        logit_difference[name] = _check_logits(name, network(images), logits)
        attack = partial(peers.pgd, network, images, peers.labels(y), eps=THREAT.eps, **options)
        x_adv = attack(start=peers.images(start, memory_format))
        adversarial[name] = jnp.asarray(x_adv.permute(0, 2, 3, 1).numpy())
        runs[name] = attack

    loss = {"clean": float(losses.cross_entropy(logits, y).mean())}
    for name, x_adv in adversarial.items():
        loss[name] = float(losses.cross_entropy(logits_fn(x_adv), y).mean())
        _check_loss(name, loss[name], loss["scan"], within=0.05)

    torch_runs = [*logit_difference]
    return {
        "width": width,
        "compile_seconds": compile_seconds,
        "agreement": {"logit_difference": logit_difference, "loss": loss},
        **timing.summary(
            timing.interleaved(runs, sizes.rounds),
            {
                "scan / unrolled": ("scan", ["unrolled", "unrolled_plain"]),
                "scan / PyTorch": ("scan", torch_runs),
                "plain scan / scan": ("scan_plain", ["scan"]),
            },
        ),
    }


def unrolled_pgd(threat: ThreatModel, *, steps: int, step_size: float) -> attacks.Attack:
    """``robustjax.attacks.pgd`` from a uniform start, its loop unrolled in Python."""

    def attack(logits_fn: Callable, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        z = threat.sample(_start_keys(key, len(x)), x)
        for _ in range(steps):
            gradient = jax.grad(lambda z: losses.cross_entropy(logits_fn(z), y).sum())(z)
            z = threat.step(z, x, gradient, step_size)
        return z

    return attack


def _start_keys(key: jax.Array, n: int) -> jax.Array:
    """The keys from which ``pgd`` draws the start of its first run."""
    return keys.fold_in(keys.as_per_example(key, n), 0)


def _on_model(attack: attacks.Attack, model_fn: models.ModelFn) -> Callable[..., jax.Array]:
    def run(params, model_state, key, x, y):
        return attack(models.eval_logits(model_fn, params, model_state), key, x, y)

    return run


def _finish(run: Callable, *arguments: Any) -> None:
    jax.block_until_ready(run(*arguments))


def _random_variables(model: models.Model, x: jax.Array) -> tuple[Any, Any]:
    """Parameters and statistics, none of them 0 or 1, so that no mistake about one goes unnoticed.

    Kernels are those of He et al. (2015). Drawn by numpy: XLA would compile a program per shape.
    """
    draw = np.random.default_rng(1)

    def leaf(path, shape):
        kind = path[-1].key
        if kind == "kernel":
            value = draw.normal(0, (2 / np.prod(shape.shape[:-1])) ** 0.5, shape.shape)
        elif kind in ("scale", "var"):
            value = draw.uniform(0.8, 1.2, shape.shape)
        else:
            value = draw.normal(0, 0.1, shape.shape)
        return jnp.asarray(value, shape.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _check_logits(name: str, theirs: Any, ours: jax.Array) -> float:
    theirs, ours = theirs.detach().numpy(), np.asarray(ours)
    difference = float(np.abs(ours - theirs).max())
    if not difference <= 1e-4 * max(1.0, float(np.abs(ours).max())):
        raise ValueError(f"logits of {name} must be those of our model, differ by {difference:.3g}")
    return difference


def _check_loss(name: str, value: float, reference: float, *, within: float) -> None:
    if not abs(value - reference) <= within * abs(reference):
        raise ValueError(
            f"loss of {name} must be within {within:.0%} of ours, {reference:.4g}, got {value:.4g}"
        )


def measure_training(sizes: Sizes, peers: ModuleType | None) -> dict[str, Any]:
    """Times of adversarial training of the small network from one initialisation, on one device.

    Raises:
      ValueError: the networks or the losses in training do not agree.
    """
    settings = sizes.experiment
    train = data.load(settings.dataset, "train")
    parts = adversarial_training.build(settings, "madry", len(train), train.num_classes)
    dispatch = training.steps_per_dispatch(parts.steps_per_epoch, settings.dispatch)
    steps = sizes.dispatches * dispatch
    mesh = parallel.device_mesh(jax.devices()[:1])
    run_key, order_key = jax.random.split(jax.random.key(settings.seed))
    x = jnp.asarray(data.as_float(train.image[:8]))
    params, model_state = _random_variables(parts.model, x)
    initial = jax.device_get(params)
    logits = models.eval_logits(parts.model.apply, params, model_state)(x)
    advance = feed.resident(
        parts.step, train, key=order_key, batch_size=settings.batch_size, mesh=mesh
    )
    state = training.create_state(params, model_state, parts.optimizer, run_key)
    state, done = parallel.replicate(state, mesh), 0

    def ours() -> tuple[float, float]:
        nonlocal state, done
        metrics = []
        for _ in range(sizes.dispatches):
            state, now = advance(state, *divmod(done, parts.steps_per_epoch), dispatch)
            metrics.append(now)
            done += dispatch
        metrics = jax.device_get(metrics)
        loss, accuracy = (
            float(np.mean([m[name] for m in metrics])) for name in ("loss", "robust_accuracy")
        )
        return loss, accuracy

    runs: dict[str, Callable[[], tuple[float, float]]] = {"robustjax": ours}
    logit_difference = {}
    for name, memory_format in peers.FORMATS.items() if peers else ():
        network = peers.SmallCNN(x.shape[1], x.shape[3], train.num_classes)
        network = peers.load_flax(network, initial, {}).to(memory_format=memory_format)
        theirs = network(peers.images(x, memory_format))
        logit_difference[name] = _check_logits(name, theirs, logits)
        trainer = peers.adversarial_trainer(
            network,
            train.image,
            train.label,
            memory_format=memory_format,
            batch_size=settings.batch_size,
            eps=settings.eps,
            step_size=settings.attack_step_size,
            attack_steps=settings.attack_steps,
            warmup_steps=settings.eps_warmup * parts.steps_per_epoch,
            learning_rate=settings.learning_rate,
            total_steps=settings.epochs * parts.steps_per_epoch,
        )
        runs[name] = partial(trainer, steps)

    # Loss and robust accuracy of every round: both must learn alike.
    trace: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    recorded = {
        name: lambda name=name, run=run: trace[name].append(run()) for name, run in runs.items()
    }
    with timing.compilations() as seen:
        seconds = timing.interleaved(recorded, sizes.rounds)
    for name, values in trace.items():
        _check_loss(name, values[-1][0], trace["robustjax"][-1][0], within=0.25)
    return {
        "steps": steps,
        "compile_seconds": {"robustjax": sum(s for _, s in seen)},
        "agreement": {"logit_difference": logit_difference, "loss_and_robust_accuracy": trace},
        **timing.summary(seconds, {"robustjax / PyTorch": ("robustjax", [*logit_difference])}),
    }


if __name__ == "__main__":
    command_line.run(main, Settings, {"full": Settings()}, __doc__)
