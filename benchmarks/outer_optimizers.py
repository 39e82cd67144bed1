"""Speed and memory of the outer step of adversarial training: example-normalised gradients.

  python -m benchmarks.outer_optimizers                      some 10 minutes on 2 cores
  python -m benchmarks.outer_optimizers --only=outer         without an attack
  python -m benchmarks.outer_optimizers --norms=batch,group  with GroupNorm too

outer   one step of training on inputs that are attacked already: gradient oracle and optimizer.
attack  the same step with its PGD-10 attack, which costs all of them the same.

Pre-activation ResNet-18 of width 16, batch of 64, 32x32 images. Times are taken in turn after a
warm-up, without compilation; a ratio is that to MSGD in the same round, and the median of the
rounds counts. A-ENGM is timed in a step that measures the parameter norms and in one that does not,
and counts as their mean over tau steps.

Memory is what XLA plans for the compiled step: arguments (state and batch), results and temporary
buffers, less what results share with arguments. The code of the program is left out.

Backward passes are counted while they run: the passes, and the examples in them over the batch
size. Of the paper's n + 1 passes for ENGM, each of its n is for one example. Ours are as many for
``vmap_norms``, 64 examples in 64 passes; ``ghost_norms`` gets them in n / 16 passes of 16 examples,
so both process the batch twice; ``vjp_norms``, exact with batch statistics, n + 1 times.

Source of the ratios beside ours, on a Titan RTX: Dabouei et al. (2022), "Revisiting outer
optimization in adversarial training", table 1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import agreement, timing
from experiments import command_line
from experiments.command_line import setting
from robustjax import attacks, checks, gradients, models, objectives, optim, training
from robustjax.benchmark import compilation
from robustjax.benchmark import environment as machine
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import report

PARTS = ("outer", "attack")
NORMS = ("batch", "group")
THREAT = ThreatModel(LInf(), 8 / 255)
TAU = 50
# Seconds of an iteration over those of MSGD, attack included.
PAPER = {
    "MSGD": 1.0,
    "MGNC": 1.02,
    "SNGM": 1.05,
    "F-ENGM": 8.4,
    "ENGM, ghost": 8.4,
    "ENGM, vmap": 8.4,
    "ENGM, vjp": 8.4,
    "A-ENGM": 1.38,
    "A-ENGM, train": 1.38,
    "N-ENGM": 1.25,
    "N-ENGM, train": 1.25,
}
# Of the outer step alone.
TIME_AIMS = {
    "ENGM, ghost": 2.5,
    "A-ENGM": 1.35,
    "A-ENGM, train": 1.35,
    "N-ENGM": 1.25,
    "N-ENGM, train": 1.25,
}
COLUMNS = {
    "method": "method",
    "seconds": "median s",
    "ratio": "to MSGD",
    "range": "least .. greatest",
    "paper": "paper",
    "aim": "aim",
    "memory": "MiB (to MSGD, aim <= 2)",
    "passes": "backward passes (batches)",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    only: tuple[str, ...] = setting(PARTS, "parts to measure", "run", choices=PARTS)
    norms: tuple[str, ...] = setting(
        ("batch",), "normalisation of the network", "run", choices=NORMS)
    rounds: int | None = setting(None, "measurements of each; None: 10, or 1 if quick", "run")
    out: str | None = setting(
        None, "JSON file; None: benchmarks/results/outer-optimizers-DEVICE.json, or none if quick",
        "run")
    quick: bool = setting(False, "tiny sizes, which show that it works and no speed", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        if self.rounds is not None:
            checks.integer("rounds", self.rounds, at_least=1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much work is measured.

    Attributes:
      rounds: measurements of each run.
      slow_rounds: measurements of ``vjp_norms``, which goes through the batch n times.
      stage_sizes, width: of the pre-activation ResNet.
      image_size: side of its images.
      batch_size: its batch.
      attack_steps: steps of PGD.
    """

    rounds: int
    slow_rounds: int
    stage_sizes: tuple[int, ...]
    width: int
    image_size: int
    batch_size: int
    attack_steps: int


FULL = Sizes(
    rounds=10,
    slow_rounds=2,
    stage_sizes=(2, 2, 2, 2),
    width=16,
    image_size=32,
    batch_size=64,
    attack_steps=10,
)
QUICK = Sizes(
    rounds=1,
    slow_rounds=1,
    stage_sizes=(1,),
    width=2,
    image_size=8,
    batch_size=32,
    attack_steps=1,
)


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints tables, writes the JSON file; returns what it holds."""
    sizes = QUICK if settings.quick else FULL
    if settings.rounds is not None:
        slow_rounds = min(settings.rounds, sizes.slow_rounds)
        sizes = dataclasses.replace(sizes, rounds=settings.rounds, slow_rounds=slow_rounds)
    out = settings.out
    if out is None and not settings.quick:
        out = f"benchmarks/results/outer-optimizers-{jax.default_backend()}.json"
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)

    environment = machine.environment()
    if environment["load_average_1_minute"] > environment["cores"] / 2:
        report.print_lines(
            f"the machine is busy, load {environment['load_average_1_minute']:.1f} on "
            f"{environment['cores']} cores: trust the medians, not the seconds"
        )
    results: dict[str, Any] = {
        "environment": environment,
        "settings": dataclasses.asdict(settings),
        "sizes": dataclasses.asdict(sizes),
        "tau": TAU,
        "backward_passes": count_backward_passes(sizes),
        "runs": [],
    }
    for part in settings.only:
        for norm in settings.norms:
            measured = measure(part, norm, sizes)
            results["runs"].append(measured)
            print_table(measured, results["backward_passes"], sizes)
    results["environment"]["load_average_1_minute_after"] = timing.load()
    if out is not None:
        report.write_json(out, results)
        report.print_lines(f"written: {out}")
    return results


def methods(*, slow: bool) -> dict[str, tuple[gradients.Oracle, Any]]:
    """Name to gradient oracle and optimizer, with the paper's hyper-parameters for ResNet-18.

    Args:
      slow: also the ways to per-example norms that are there for comparison, but for ``vjp_norms``.
    """
    options = {"weight_decay": 5e-4}
    chain = optim.msgd(0.1, **options)
    in_training_mode = gradients.input_gradient_norms(mode="train")
    found = {
        "MSGD": (gradients.plain(), chain),
        "MGNC": (gradients.plain(), optim.mgnc(0.1, max_norm=25.0, **options)),
        "SNGM": (gradients.plain(), optim.sngm(0.1, **options)),
        "F-ENGM": (gradients.f_engm(), chain),
        "ENGM, ghost": (gradients.engm(5.0), chain),
        "A-ENGM": (gradients.a_engm(5.0, tau=TAU), chain),
        "A-ENGM, train": (gradients.a_engm(5.0, tau=TAU, input_norms=in_training_mode), chain),
        "N-ENGM": (gradients.n_engm(0.5), chain),
        "N-ENGM, train": (gradients.n_engm(0.5, input_norms=in_training_mode), chain),
    }
    if slow:
        found["ENGM, vmap"] = (gradients.engm(5.0, norms=gradients.vmap_norms()), chain)
    return found


def slow_methods() -> dict[str, tuple[gradients.Oracle, Any]]:
    """``vjp_norms``, and what it is compared with."""
    chain = optim.msgd(0.1, weight_decay=5e-4)
    return {
        "MSGD": (gradients.plain(), chain),
        "ENGM, vjp": (gradients.engm(5.0, norms=gradients.vjp_norms()), chain),
    }


def measure(part: str, norm: str, sizes: Sizes) -> dict[str, Any]:
    """Seconds, planned memory and seconds of compilation of a step of each method.

    Args:
      part: ``"outer"`` or ``"attack"``.
      norm: normalisation of the network.
      sizes: how much.

    Returns:
      ``timing.summary`` with the ratios to MSGD by method; ``memory`` in bytes by method; the same
      of the slow methods, taken in fewer rounds; ``loss``, which all steps agree on.

    Raises:
      ValueError: the losses of two methods differ, so that the times mean nothing.
    """
    outer = part == "outer"
    model = models.from_linen(models.PreActResNet(sizes.stage_sizes, width=sizes.width, norm=norm))
    batch = make_batch(sizes.batch_size, sizes.image_size)
    variables = agreement.random_variables(model, batch["image"])
    inner = (
        attacked_already
        if outer
        else attacks.pgd(THREAT, steps=sizes.attack_steps, step_size=2 / 255)
    )
    objective = objectives.madry(inner)

    def take(named: Mapping[str, tuple], rounds: int) -> dict[str, Any]:
        runs, memory, compile_seconds, loss = {}, {}, {}, {}
        for name, (oracle, optimizer) in named.items():
            step = training.train_step(model.apply, objective, optimizer, oracle=oracle)
            key = jax.random.key(0)
            state = training.create_state(*variables, optimizer, key, oracle=oracle)
            with compilation.compilations() as seen:
                compiled = jax.jit(step).lower(state, batch).compile()
            compile_seconds[name] = sum(seconds for _, seconds in seen)
            memory[name] = planned_memory(compiled)
            for when, start in moments(name, state).items():
                runs[when] = partial(finish, compiled, start, batch)
                loss[when] = float(compiled(start, batch)[1]["loss"])
                agreement.check_loss(when, loss[when], loss["MSGD"], within=1e-3)
        seconds = averaged_over_tau(timing.interleaved(runs, rounds))
        ratios = {name: (name, ["MSGD"]) for name in named if name != "MSGD"}
        return {
            **timing.summary(seconds, ratios),
            "memory": memory,
            "compile_seconds": compile_seconds,
            "loss": loss["MSGD"],
        }

    found = {"part": part, "norm": norm, **take(methods(slow=outer), sizes.rounds)}
    if outer:
        found["slow"] = take(slow_methods(), sizes.slow_rounds)
    return found


def make_batch(n: int, image_size: int) -> dict[str, jax.Array]:
    """Random images and labels."""
    draw = np.random.default_rng(0)
    return {
        "image": jnp.asarray(draw.random((n, image_size, image_size, 3), np.float32)),
        "label": jnp.asarray(draw.integers(0, 10, n), jnp.int32),
        "index": jnp.arange(n, dtype=jnp.int32),
    }


def attacked_already(logits_fn: Callable, keys: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The attack that leaves inputs as they are."""
    return x


def moments(name: str, state: training.TrainState) -> dict[str, training.TrainState]:
    """The states in which a step is timed: A-ENGM with a measurement of the norms and without."""
    if not name.startswith("A-ENGM"):
        return {name: state}
    later = state.oracle_state._replace(count=jnp.ones_like(state.oracle_state.count))
    return {f"{name} (refresh)": state, f"{name} (no refresh)": state._replace(oracle_state=later)}


def averaged_over_tau(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Adds the mean over ``TAU`` steps, of which one measures the norms, to each A-ENGM."""
    found = {}
    for name, values in seconds.items():
        found[name] = values
        method, without, _ = name.partition(" (no refresh)")
        if without:
            pairs = zip(found[f"{method} (refresh)"], values, strict=True)
            found[method] = [(slow + (TAU - 1) * fast) / TAU for slow, fast in pairs]
    return found


def planned_memory(compiled: Any) -> dict[str, int]:
    """Bytes that the compiled program needs, by kind, and in all."""
    plan = compiled.memory_analysis()
    kinds = {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes,
        "temporary": plan.temp_size_in_bytes,
        "shared": plan.alias_size_in_bytes,
    }
    total = kinds["arguments"] + kinds["results"] + kinds["temporary"] - kinds["shared"]
    return {**kinds, "total": total}


def count_backward_passes(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Backward passes of one outer step, counted while it runs; any network will do.

    Returns:
      By method ``passes``, and ``batches``: the examples in them over the batch size.
    """
    rows: list[int] = []

    @jax.custom_vjp
    def watched(logits):
        return logits

    def backward(_, cotangent):
        jax.debug.callback(lambda c: rows.append(len(c)), cotangent)
        return (cotangent,)

    watched.defvjp(lambda logits: (logits, None), backward)
    model = models.from_linen(models.MLP((4,), num_classes=10))

    def model_fn(*arguments):
        logits, model_state = model.apply(*arguments)
        return watched(logits), model_state

    batch = make_batch(sizes.batch_size, 4)
    variables = agreement.random_variables(model, batch["image"])
    objective = objectives.madry(attacked_already)
    found = {}
    for name, (oracle, optimizer) in {**methods(slow=True), **slow_methods()}.items():
        step = training.train_step(model_fn, objective, optimizer, oracle=oracle)
        step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
        state = training.create_state(*variables, optimizer, jax.random.key(0), oracle=oracle)
        for when, start in moments(name, state).items():
            rows.clear()
            jax.block_until_ready(step(start, batch))
            jax.effects_barrier()
            found[when] = {"passes": len(rows), "batches": sum(rows) / sizes.batch_size}
    return found


def print_table(
    measured: Mapping[str, Any], passes: Mapping[str, Mapping[str, float]], sizes: Sizes
) -> None:
    """Prints times and memory relative to MSGD beside the paper's ratios and the aims."""
    outer = measured["part"] == "outer"
    slow = measured.get("slow", {"median_seconds": {}})
    rows = []
    for group in (measured, slow):
        for name, median in group["median_seconds"].items():
            if group is slow and name == "MSGD":
                continue
            row = {"method": name, "seconds": f"{median:.3f}"}
            if ratio := group["ratios"].get(name):
                row["ratio"] = f"{ratio['median']:.2f}"
                row["range"] = f"{ratio['min']:.2f} .. {ratio['max']:.2f}"
            if outer and name in TIME_AIMS:
                row["aim"] = f"<= {TIME_AIMS[name]}"
            if memory := group["memory"].get(name):
                relative = memory["total"] / group["memory"]["MSGD"]["total"]
                row["memory"] = f"{memory['total'] / 2**20:.0f} ({relative:.2f})"
            if counted := passes.get(name):
                row["passes"] = f"{counted['passes']} ({counted['batches']:g})"
            rows.append([{"paper": PAPER.get(name, ""), **row}.get(c, "") for c in COLUMNS])
    what = "alone" if outer else f"with PGD-{sizes.attack_steps}"
    title = f"outer step {what}, {measured['norm']} normalisation, batch {sizes.batch_size}"
    report.print_table(title, [*COLUMNS.values()], rows)


def finish(run: Callable, *arguments: Any) -> None:
    """Runs to the end."""
    jax.block_until_ready(run(*arguments))


if __name__ == "__main__":
    command_line.run(main, Settings, {"full": Settings()}, __doc__)
