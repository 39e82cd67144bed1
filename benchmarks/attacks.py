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

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import adversarial_training, command_line
from experiments.command_line import setting
from robustjax import attacks, checks, data, keys, losses, models, training
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import feed, parallel, report

PARTS = ("pgd", "training", "compilations")
THREAT = ThreatModel(LInf(), 8 / 255)
STEP_SIZE = 2 / 255


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
    """How much work is measured: by default, that of the published numbers.

    Attributes:
      rounds: measurements of each run.
      widths: widths of PreAct-ResNet-18.
      image_size: side of its images.
      batch_size: its batch.
      attack_steps: steps of PGD.
      experiment: settings of the training that is timed.
      dispatches: dispatches of it in a measurement.
      small_run: settings of the whole run whose compilations are counted.
    """

    rounds: int = 5
    widths: tuple[int, ...] = (16, 64)
    image_size: int = 32
    batch_size: int = 64
    attack_steps: int = 10
    experiment: adversarial_training.Settings = adversarial_training.PRESETS["small"]
    dispatches: int = 2
    small_run: adversarial_training.Settings = SMALL_RUN


FULL = Sizes()
QUICK = Sizes(
    rounds=1,
    widths=(2,),
    image_size=8,
    batch_size=4,
    attack_steps=2,
    experiment=dataclasses.replace(
        FULL.experiment, dataset="digits", attack_steps=1, batch_size=64, dispatch=2, eps_warmup=0
    ),
    dispatches=1,
    small_run=dataclasses.replace(FULL.small_run, model="linear", attack_steps=1, epochs=2),
)


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints tables, writes the JSON file; returns what it holds."""
    sizes = QUICK if settings.quick else FULL
    given = {"rounds": settings.rounds, "widths": settings.widths}
    sizes = dataclasses.replace(sizes, **{name: v for name, v in given.items() if v})
    checks.integer(
        "rounds", sizes.rounds if settings.rounds is None else settings.rounds, at_least=1
    )
    for width in sizes.widths:
        checks.integer("widths", width, at_least=1)
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

    results: dict[str, Any] = {
        "environment": timing.environment(),
        "settings": dataclasses.asdict(settings),
        "sizes": dataclasses.asdict(sizes),
    }
    if peers is not None:
        results["environment"]["torch_threads"] = peers.torch.get_num_threads()
    if "pgd" in settings.only:
        results["pgd"] = [measure_pgd(sizes, width, peers) for width in sizes.widths]
        _print_pgd(sizes, results["pgd"])
    if "training" in settings.only:
        results["training"] = measure_training(sizes, peers)
        _print_training(sizes, results["training"])
    if "compilations" in settings.only:
        results["compilations"] = count_compilations(sizes.small_run)
        _print_compilations(results["compilations"])
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


def unrolled_pgd(threat: ThreatModel, *, steps: int, step_size: float) -> attacks.Attack:
    """``robustjax.attacks.pgd`` from a uniform start, its loop unrolled in Python."""

    def attack(logits_fn: Callable, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        example_keys = keys.fold_in(keys.as_per_example(key, len(x)), 0)
        z = threat.sample(example_keys, x)
        for _ in range(steps):
            gradient = jax.grad(lambda z: losses.cross_entropy(logits_fn(z), y).sum())(z)
            z = threat.step(z, x, gradient, step_size)
        return z

    return attack


def measure_pgd(sizes: Sizes, width: int, peers: ModuleType | None) -> dict[str, Any]:
    """Times of PGD on PreAct-ResNet-18 of one width, and how far the results agree.

    Raises:
      ValueError: the networks or the attacks do not agree, so that the times mean nothing.
    """
    model = {
        conv: models.from_linen(models.PreActResNet18(width=width, conv=conv))
        for conv in ("canonical", "plain")
    }
    image_key, label_key, init_key, attack_key = jax.random.split(jax.random.key(0), 4)
    shape = (sizes.batch_size, sizes.image_size, sizes.image_size, 3)
    x = jax.random.uniform(image_key, shape)
    y = jax.random.randint(label_key, shape[:1], 0, 10)
    params, model_state = _with_statistics(*model["canonical"].init(init_key, x))

    options = {"steps": sizes.attack_steps, "step_size": STEP_SIZE}
    scanned, unrolled = attacks.pgd(THREAT, **options), unrolled_pgd(THREAT, **options)
    variants = {
        "scan": (scanned, "canonical"),
        "unrolled": (unrolled, "canonical"),
        "scan_plain": (scanned, "plain"),
        "unrolled_plain": (unrolled, "plain"),
    }
    runs, compile_seconds, adversarial = {}, {}, {}
    for name, (attack, conv) in variants.items():
        compiled, compile_seconds[name] = _compiled(
            attack, model[conv].apply, params, model_state, attack_key, x, y
        )
        arguments = (params, model_state, attack_key, x, y)
        runs[name] = lambda compiled=compiled, a=arguments: jax.block_until_ready(compiled(*a))
        adversarial[name] = np.asarray(runs[name]())

    logits_fn = jax.jit(models.eval_logits(model["canonical"].apply, params, model_state))
    agreement: dict[str, Any] = {}
    if peers is not None:
        start = THREAT.sample(keys.fold_in(keys.as_per_example(attack_key, len(x)), 0), x)
        for name, memory_format in peers.FORMATS.items():
            attack, logits, x_adv = _torch_pgd(
                peers, width, memory_format, params, model_state, x, y, start, options
            )
            agreement[f"logits {name}"] = _check_logits(name, np.asarray(logits_fn(x)), logits)
            runs[name], adversarial[name] = attack, x_adv
    agreement["loss clean"] = float(losses.cross_entropy(logits_fn(x), y).mean())
    for name, x_adv in adversarial.items():
        agreement[f"loss {name}"] = float(losses.cross_entropy(logits_fn(x_adv), y).mean())
        agreement[f"equal pixels {name}"] = float(
            np.mean(np.abs(x_adv - adversarial["scan"]) < STEP_SIZE / 100)
        )
        _check_loss(name, agreement[f"loss {name}"], agreement["loss scan"], within=0.05)

    seconds = timing.interleaved(runs, sizes.rounds)
    result = {
        "width": width,
        "median_seconds": timing.medians(seconds),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "ratios": {
            "scan/unrolled": timing.ratio(seconds, "scan", "unrolled"),
            "scan/unrolled_plain": timing.ratio(seconds, "scan", "unrolled_plain"),
            "scan_plain/scan": timing.ratio(seconds, "scan_plain", "scan"),
        },
        "agreement": agreement,
    }
    if peers is not None:
        result["faster_torch"] = min(peers.FORMATS, key=result["median_seconds"].get)
        result["ratios"]["scan/torch"] = timing.ratio(seconds, "scan", result["faster_torch"])
    return result


def _with_statistics(params: Any, model_state: Any) -> tuple[Any, Any]:
    """Perturbs every array, so that a mistaken scale, bias or statistic cannot go unnoticed."""
    leaves, structure = jax.tree.flatten((params, model_state))
    noise = np.random.default_rng(0)
    # Factors around 1 keep variances positive; zeros (biases, means) become small numbers.
    leaves = [
        leaf * noise.uniform(0.8, 1.2, leaf.shape)
        + (0.1 * noise.normal(size=leaf.shape)) * (leaf == 0)
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, [jnp.asarray(leaf, jnp.float32) for leaf in leaves])


def _compiled(
    attack: attacks.Attack, model_fn: models.ModelFn, *arguments: Any
) -> tuple[Callable, float]:
    def run(params, model_state, key, x, y):
        return attack(models.eval_logits(model_fn, params, model_state), key, x, y)

    with timing.compilations() as seen:
        compiled = jax.jit(run).lower(*arguments).compile()
    return compiled, sum(seconds for _, seconds in seen)


def _torch_pgd(
    peers: ModuleType, width, memory_format, params, model_state, x, y, start, options
) -> tuple[Callable[[], Any], np.ndarray, np.ndarray]:
    """The timed attack in PyTorch; logits, and what it makes of our start, for the checks."""
    network = peers.load_flax(peers.PreActResNet18(width), params, model_state)
    network = network.eval().requires_grad_(False).to(memory_format=memory_format)
    x, start = (peers.images(image, memory_format) for image in (x, start))
    y = peers.torch.tensor(np.asarray(y), dtype=peers.torch.long)
    options = {"eps": THREAT.eps, **options}
    x_adv = peers.pgd(network, x, y, start=start, **options)
    return (
        lambda: peers.pgd(network, x, y, **options),
        network(x).numpy(),
        x_adv.permute(0, 2, 3, 1).numpy(),
    )


def _check_logits(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
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
    """Times of adversarial training of the small network, from the same initial weights.

    One device: the peer has no other.

    Raises:
      ValueError: the networks or the losses of training do not agree.
    """
    settings = sizes.experiment
    train = data.load(settings.dataset, "train")
    parts = adversarial_training.build(settings, "madry", len(train), train.num_classes)
    mesh = parallel.device_mesh(jax.devices()[:1])
    init_key, run_key, order_key = jax.random.split(jax.random.key(settings.seed), 3)
    x = jnp.asarray(data.as_float(train.image[:8]))
    params, model_state = parts.model.init(init_key, x)
    initial = jax.device_get(params)
    logits = np.asarray(parts.model.apply(params, model_state, x, False, None)[0])
    state = training.create_state(params, model_state, parts.optimizer, run_key)
    advance = feed.resident(
        parts.step, train, key=order_key, batch_size=settings.batch_size, mesh=mesh
    )
    dispatch = training.steps_per_dispatch(parts.steps_per_epoch, settings.dispatch)
    steps = sizes.dispatches * dispatch
    position = {"state": parallel.replicate(state, mesh), "step": 0}

    def ours() -> tuple[float, float]:
        metrics = []
        for _ in range(sizes.dispatches):
            epoch, first = divmod(position["step"], parts.steps_per_epoch)
            position["state"], now = advance(position["state"], epoch, first, dispatch)
            position["step"] += dispatch
            metrics.append(now)
        metrics = jax.device_get(metrics)
        return tuple(
            float(np.mean([m[name] for m in metrics])) for name in ("loss", "robust_accuracy")
        )

    runs: dict[str, Callable[[], tuple[float, float]]] = {"robustjax": ours}
    difference = {}
    for name, memory_format in ({} if peers is None else peers.FORMATS).items():
        network = peers.SmallCNN(x.shape[1], x.shape[3], train.num_classes)
        network = peers.load_flax(network, initial, {}).to(memory_format=memory_format)
        with peers.torch.no_grad():
            theirs = network(peers.images(x, memory_format)).numpy()
        difference[name] = _check_logits(name, logits, theirs)
        theirs_advance = peers.adversarial_trainer(
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
        runs[name] = partial(theirs_advance, steps)

    trace: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}

    def kept(name: str) -> Callable[[], None]:
        return lambda: trace[name].append(runs[name]())

    with timing.compilations() as seen:
        seconds = timing.interleaved({name: kept(name) for name in runs}, sizes.rounds)
    for name, values in trace.items():
        _check_loss(name, values[-1][0], trace["robustjax"][-1][0], within=0.2)
    result = {
        "steps": steps,
        "median_seconds": timing.medians(seconds),
        "steps_per_second": {name: steps / s for name, s in timing.medians(seconds).items()},
        "seconds": seconds,
        "compile_seconds": {"robustjax": sum(s for _, s in seen)},
        "ratios": {},
        "agreement": {"logits": difference, "loss and robust accuracy of each round": trace},
    }
    if peers is not None:
        result["faster_torch"] = min(peers.FORMATS, key=result["median_seconds"].get)
        result["ratios"]["robustjax/torch"] = timing.ratio(
            seconds, "robustjax", result["faster_torch"]
        )
    return result


def count_compilations(settings: adversarial_training.Settings) -> dict[str, Any]:
    """What XLA compiles while the entry point runs with these settings, in a temporary folder.

    ``jit(steps)`` is the training step and ``jit(judge)`` an evaluation; an entry of the caches of
    either is a program. The caches of JAX are cleared before, as in a new process.
    """
    jax.clear_caches()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        _results_of(feed, "resident") as steps,
        _results_of(training, "make_evaluator") as evaluators,
        timing.compilations() as seen,
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


BOUNDS = {
    "scan/unrolled": "at most 1.1",
    "scan/torch": "aim 1.0",
    "robustjax/torch": "aim 1.0",
}


def _print_ratios(title: str, ratios: dict[str, dict[str, float]]) -> None:
    rows = [
        [name, *(f"{value[k]:.2f}" for k in ("median", "min", "max")), BOUNDS.get(name, "")]
        for name, value in ratios.items()
    ]
    report.print_table(title, ["ratio of times", "median", "least", "greatest", ""], rows)


def _print_pgd(sizes: Sizes, results: list[dict[str, Any]]) -> None:
    for result in results:
        title = (
            f"PGD-{sizes.attack_steps}, PreAct-ResNet-18 of width {result['width']}, "
            f"batch {sizes.batch_size}, {sizes.image_size}x{sizes.image_size}"
        )
        rows = [
            [name, f"{seconds:.3f}", f"{result['compile_seconds'].get(name, 0.0):.1f}"]
            for name, seconds in result["median_seconds"].items()
        ]
        report.print_table(title, ["run", "median s", "compilation s"], rows)
        _print_ratios(title, result["ratios"])


def _print_training(sizes: Sizes, result: dict[str, Any]) -> None:
    title = f"Adversarial training, {sizes.experiment.dataset}, {result['steps']} steps"
    rows = [
        [name, f"{seconds:.3f}", f"{result['steps_per_second'][name]:.1f}"]
        for name, seconds in result["median_seconds"].items()
    ]
    report.print_table(title, ["run", "median s", "steps / s"], rows)
    if result["ratios"]:
        _print_ratios(title, result["ratios"])


def _print_compilations(result: dict[str, Any]) -> None:
    rows = [
        [name, value["programs"], f"{value['seconds']:.2f}"]
        for name, value in result["by_name"].items()
    ]
    rows.append(["all", result["total"], f"{result['seconds']:.2f}"])
    report.print_table("Compilations in a training run", ["function", "programs", "seconds"], rows)
    report.print_lines(
        f"programs in the cache of the step: {result['step_cache_sizes']}, "
        f"of the evaluations: {result['evaluator_cache_sizes']}"
    )


if __name__ == "__main__":
    command_line.run(main, Settings, {"full": Settings()}, __doc__)
