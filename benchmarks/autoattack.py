"""AutoAttack of this library against the reference implementation in PyTorch, in one run.

  python -m benchmarks.autoattack                    small CNN, 500 MNIST digits, l_inf 0.1
  python -m benchmarks.autoattack --eps=0.2 --only=autoattack

Both evaluate the same trained network on the same images, in turn, after a warm-up in which ours
compiles; the time of compilation is reported beside. Parts:

autoattack  version ``standard``, in all and by attack
query       one query of Square per image, without the rest of the ensemble
growth      our time for 1, 2 and 4 times the examples, and by the share that is robust

On a CPU the batch is split over one simulated device per core, as ``JAX_NUM_CPU_DEVICES`` does for
any program; PyTorch uses as many threads.

Needs PyTorch and the packages of requirements-parity.txt (see the README).
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import adversarial_training, choices, command_line, trained_models
from experiments.command_line import setting
from robustjax import attacks, checks, data
from robustjax.benchmark import auto_attack
from robustjax.benchmark import environment as machine
from robustjax.benchmark.chunks import ChunkedAttack
from robustjax.threat import ThreatModel
from robustjax.training import report

PARTS = ("autoattack", "query", "growth")
AIMS = {"robustjax / pyautoattack": "floor 1.0, aim 0.5"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    # fmt: off
    only: tuple[str, ...] = setting(PARTS, "parts to run", "run", choices=PARTS)
    model: str = setting("runs/benchmarks/autoattack/model", "where the network is trained", "run")
    objective: str = setting(
        "madry", "how the network is trained", "run", choices=("standard", "madry"))
    epochs: int = setting(12, "of its training", "run", unit="epochs")
    threat: str = setting("linf", "norm", "threat model", choices=("linf", "l2"))
    eps: float = setting(0.1, "radius", "threat model", unit="input units")
    examples: int = setting(500, "test images", "run", unit="examples")
    batch_size: int = setting(128, "of ours", "run", unit="examples")
    reference_batch_size: int = setting(500, "of the reference", "run", unit="examples")
    cpu_devices: int = setting(2, "simulated devices of ours, one per core", "run")
    rounds: int = setting(1, "measurements of each after the warm-up", "run")
    out: str | None = setting(
        "benchmarks/results/autoattack-cpu.json", "file for the results; None: none", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in (
            "epochs",
            "examples",
            "batch_size",
            "reference_batch_size",
            "rounds",
            "cpu_devices",
        ):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.number("eps", self.eps, above=0)


def main(settings: Settings) -> dict[str, Any]:
    """Runs the parts, prints tables, writes JSON."""
    jax.config.update("jax_num_cpu_devices", settings.cpu_devices)
    trained, x, y = subject(settings)
    results: dict[str, Any] = {
        "environment": machine.environment(),
        "settings": dataclasses.asdict(settings),
    }
    if "autoattack" in settings.only:
        results["autoattack"] = compare(settings, trained, x, y)
    if "query" in settings.only:
        results["query"] = queries(settings, trained, x, y)
    if "growth" in settings.only:
        results["growth"] = growth(settings, trained, x, y)
    results["environment"]["load_average_1_minute_after"] = timing.load()
    if settings.out:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        report.write_json(settings.out, results)
        report.print_lines(f"results: {settings.out}")
    return results


def subject(settings: Settings) -> tuple[trained_models.TrainedModel, np.ndarray, np.ndarray]:
    """The network, trained unless it is there, and the first test images."""
    training = dataclasses.replace(
        adversarial_training.PRESETS["small"],
        objective=(settings.objective,),
        epochs=settings.epochs,
        eps_warmup=min(5, settings.epochs),
        test_steps=1,
        test_restarts=1,
        resume=True,
        workdir=settings.model,
    )
    directory = Path(settings.model) / settings.objective
    if not (directory / "results.json").exists():
        adversarial_training.main(training)
    trained = trained_models.load(directory)
    examples = trained_models.evaluation_set(trained.settings, "test", settings.examples)
    return trained, data.as_float(examples.image), examples.label


def peer(trained: trained_models.TrainedModel, x: np.ndarray) -> Any:
    """The same network in PyTorch."""
    from benchmarks import torch_peers

    _, params, model_state = trained.logits_fn.args
    network = torch_peers.SmallCNN(x.shape[1], x.shape[-1])
    return torch_peers.load_flax(network, params, model_state).eval()


def compare(settings: Settings, trained: Any, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The whole ensemble, ours and the reference, in turn."""
    from benchmarks import torch_peers

    network = peer(trained, x)
    threat = ThreatModel(choices.NORMS[settings.threat], settings.eps)
    evaluate = auto_attack(batch_size=settings.batch_size)
    outcomes: dict[str, Any] = {}

    def ours() -> None:
        outcomes["ours"] = evaluate(trained.logits_fn, threat, jax.random.key(0), x, y)
        outcomes.setdefault("first", outcomes["ours"])

    def reference() -> None:
        outcomes["reference"] = torch_peers.reference_autoattack(
            network,
            x,
            y,
            settings.threat,
            settings.eps,
            batch_size=settings.reference_batch_size,
        )

    # Ours is warmed up by a whole run, the reference by a few images: it compiles nothing.
    ours()
    torch_peers.reference_autoattack(network, x[:20], y[:20], settings.threat, settings.eps)
    seconds: dict[str, list[float]] = {"robustjax": [], "pyautoattack": []}
    for _ in range(settings.rounds):
        for name, run in (("robustjax", ours), ("pyautoattack", reference)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    result = timing.summary(seconds, {"robustjax / pyautoattack": ("robustjax", ["pyautoattack"])})
    first, mine, theirs = outcomes["first"], outcomes["ours"], outcomes["reference"]
    result["compile_seconds"] = {"robustjax": sum(a.compile_seconds for a in first.attacks)}
    result["robust_accuracy"] = {
        "robustjax": mine.robust_accuracy,
        "pyautoattack": float(np.mean(theirs.robust)),
    }
    result["agreement"] = float(np.mean(mine.robust == np.asarray(theirs.robust)))
    result["by_attack"] = {
        a.name: {
            "robustjax_seconds": a.seconds,
            "pyautoattack_seconds": theirs.seconds.get(a.name),
            "robustjax_accuracy": a.robust_accuracy,
            "pyautoattack_accuracy": theirs.accuracy.get(a.name),
        }
        for a in mine.attacks
    }
    timing.print_summary(
        f"AutoAttack, {len(y)} images, {settings.threat} eps = {settings.eps:g}", result, AIMS
    )
    report.print_table(
        "by attack",
        ["attack", "robustjax s", "pyautoattack s", "robustjax robust", "pyautoattack robust"],
        [
            [name, *(_cell(values[key]) for key in values)]
            for name, values in result["by_attack"].items()
        ],
    )
    return result


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def queries(settings: Settings, trained: Any, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Square alone on the examples that it does not break, and one network evaluation a query."""
    count = 1000
    threat = ThreatModel(choices.NORMS[settings.threat], settings.eps)
    make = functools.partial(attacks.square, queries=count, schedule="reference")
    square = ChunkedAttack(make, batch_size=settings.batch_size)
    index = np.arange(len(y), dtype=np.int32)

    @jax.jit
    def forward(fn, x, n):
        # Each evaluation depends on the one before, or they would be made once.
        return jax.lax.fori_loop(0, n, lambda _, s: 1e-9 * fn(x + s).sum(), 0.0)

    logits_fn = trained.logits_fn

    def ours() -> None:
        _, state = square(logits_fn, threat, jax.random.key(0), x, y, index)
        ours.queries = int(np.sum(state.queries))

    def network_alone() -> None:
        forward(logits_fn, jnp.asarray(x), count).block_until_ready()

    import pyautoattack.square
    import torch

    network = peer(trained, x)
    images = torch.tensor(x).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(y).long()
    attack = pyautoattack.square.SquareAttack(
        network,
        norm={"linf": "Linf", "l2": "L2"}[settings.threat],
        n_queries=count,
        eps=settings.eps,
        resc_schedule=False,
        device="cpu",
    )

    def reference() -> None:
        attack.init_hyperparam(images)
        torch.manual_seed(0)
        asked, _ = attack.attack_single_run(images, labels)
        reference.queries = int(asked.sum())

    def reference_network() -> None:
        for _ in range(count):
            network(images)

    with torch.no_grad():
        seconds = timing.interleaved(
            {
                "square": ours,
                "its network": network_alone,
                "reference square": reference,
                "its PyTorch network": reference_network,
            },
            settings.rounds,
        )
    asked = {
        "square": ours.queries,
        "its network": count * len(y),
        "reference square": reference.queries,
        "its PyTorch network": count * len(y),
    }
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    result = {
        "seconds": seconds,
        "queries": asked,
        "microseconds_per_query": {n: 1e6 * medians[n] / asked[n] for n in asked},
    }
    report.print_table(
        "one query of one image",
        ["run", "queries", "microseconds each"],
        [[n, asked[n], f"{us:.1f}"] for n, us in result["microseconds_per_query"].items()],
    )
    return result


def growth(settings: Settings, trained: Any, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Our time by the number of examples and by the share of them that is robust."""
    norm = choices.NORMS[settings.threat]
    evaluate = auto_attack(batch_size=settings.batch_size)
    quarter = len(y) // 4

    def timed(n: int, eps: float) -> dict[str, float]:
        began = time.perf_counter()
        outcome = evaluate(
            trained.logits_fn, ThreatModel(norm, eps), jax.random.key(0), x[:n], y[:n]
        )
        return {
            "examples": n,
            "eps": eps,
            "robust_accuracy": outcome.robust_accuracy,
            "seconds": time.perf_counter() - began,
        }

    timed(len(y), settings.eps)  # compiles
    timed(quarter, settings.eps)
    by_examples = [timed(times * quarter, settings.eps) for times in (1, 2, 4)]
    by_eps = [timed(len(y), factor * settings.eps) for factor in (1, 2, 3)]
    for title, records in (("examples", by_examples), ("robust share", by_eps)):
        report.print_table(
            f"time by {title}",
            ["examples", "eps", "robust", "seconds"],
            [
                [
                    r["examples"],
                    f"{r['eps']:.3g}",
                    report.percent(r["robust_accuracy"]),
                    f"{r['seconds']:.1f}",
                ]
                for r in records
            ],
        )
    return {"by_examples": by_examples, "by_robust_share": by_eps}


if __name__ == "__main__":
    command_line.run(main, Settings, {"default": Settings()}, __doc__)
