"""The speed of PGD: in ``lax.scan``, unrolled in Python, and in PyTorch with the same weights."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import agreement, timing
from robustjax import attacks, keys, losses, models, parallel
from robustjax.benchmark import compilation
from robustjax.norms import LInf
from robustjax.threat import ThreatModel

THREAT = ThreatModel(LInf(), 8 / 255)
STEP_SIZE = 2 / 255


def measure(
    width: int,
    *,
    stage_sizes: Sequence[int],
    image_size: int,
    batch_size: int,
    steps: int,
    rounds: int,
    peers: ModuleType | None,
) -> dict[str, Any]:
    """Times of l_inf PGD on a pre-activation ResNet, and how far the results agree.

    Args:
      width: channels of its first stage.
      stage_sizes: blocks in its stages.
      image_size: side of the images.
      batch_size: images.
      steps: steps of PGD.
      rounds: measurements of each run.
      peers: ``benchmarks.torch_peers``, or None to leave PyTorch out.

    Returns:
      ``timing.summary``, seconds of compilation, and what was compared to see that all agree.

    Raises:
      ValueError: the networks or the attacks do not agree, so that the times mean nothing.
    """
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.random((batch_size, image_size, image_size, 3), np.float32))
    y = jnp.asarray(draw.integers(0, 10, len(x)), jnp.int32)
    attack_key = jax.random.key(0)
    model = {
        conv: models.from_linen(models.PreActResNet(stage_sizes, width=width, conv=conv))
        for conv in ("canonical", "plain")
    }
    variables = agreement.random_variables(model["canonical"], x)

    options = {"steps": steps, "step_size": STEP_SIZE}
    scanned, unrolled = attacks.pgd(THREAT, **options), unrolled_pgd(THREAT, **options)
    # One key per example, so that splitting the batch changes nothing.
    arguments = (*variables, keys.as_per_example(attack_key, len(x)), x, y)
    programs = {
        "scan": (jax.jit(_on_model(scanned, model["canonical"].apply)), arguments),
        "unrolled": (jax.jit(_on_model(unrolled, model["canonical"].apply)), arguments),
        "scan_plain": (jax.jit(_on_model(scanned, model["plain"].apply)), arguments),
        "unrolled_plain": (jax.jit(_on_model(unrolled, model["plain"].apply)), arguments),
    }
    on_all = jax.device_count() > 1 and batch_size % jax.device_count() == 0
    if on_all:
        programs["scan_on_all_devices"] = _on_all_devices(
            _on_model(scanned, model["canonical"].apply), arguments
        )
    runs, compile_seconds, adversarial = {}, {}, {}
    for name, (program, inputs) in programs.items():
        with compilation.compilations() as seen:
            compiled = program.lower(*inputs).compile()
        compile_seconds[name] = sum(seconds for _, seconds in seen)
        adversarial[name] = compiled(*inputs)
        runs[name] = partial(_finish, compiled, *inputs)

    logits_fn = jax.jit(models.eval_logits(model["canonical"].apply, *variables))
    logits = logits_fn(x)
    logit_difference = {}
    # Where our attack starts, so that PyTorch's can be led from there to the same end.
    start = THREAT.sample(_start_keys(attack_key, len(x)), x)
    for name, memory_format in peers.FORMATS.items() if peers else ():
        network = peers.load_flax(peers.PreActResNet(stage_sizes, width), *variables)
        network = network.eval().requires_grad_(False).to(memory_format=memory_format)
        images = peers.images(x, memory_format)
        logit_difference[name] = agreement.check_logits(name, network(images), logits)
        attack = partial(peers.pgd, network, images, peers.labels(y), eps=THREAT.eps, **options)
        x_adv = attack(start=peers.images(start, memory_format))
        adversarial[name] = x_adv.permute(0, 2, 3, 1).numpy()
        runs[name] = attack

    loss = {"clean": float(losses.cross_entropy(logits, y).mean())}
    for name, x_adv in adversarial.items():
        logits = logits_fn(jnp.asarray(np.asarray(x_adv)))
        loss[name] = float(losses.cross_entropy(logits, y).mean())
        agreement.check_loss(name, loss[name], loss["scan"], within=0.05)

    torch_runs = [*logit_difference]
    return {
        "width": width,
        "compile_seconds": compile_seconds,
        "agreement": {"logit_difference": logit_difference, "loss": loss},
        **timing.summary(
            timing.interleaved(runs, rounds),
            {
                "scan / unrolled": ("scan", ["unrolled", "unrolled_plain"]),
                "scan / PyTorch": ("scan", torch_runs),
                "scan on all devices / PyTorch": (
                    "scan_on_all_devices",
                    torch_runs if on_all else [],
                ),
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


def _on_all_devices(run: Callable, arguments: tuple) -> tuple[Callable, tuple]:
    """``run`` with its batch split over all devices, and its arguments placed there."""
    mesh = parallel.device_mesh()
    whole, rows = parallel.REPLICATED, parallel.SPLIT
    specs = (whole, whole, rows, rows, rows)
    placed = (
        jax.device_put(argument, jax.NamedSharding(mesh, spec))
        for argument, spec in zip(arguments, specs, strict=True)
    )
    return parallel.parallel(run, mesh, in_specs=specs, out_specs=rows), tuple(placed)


def _finish(run: Callable, *arguments: Any) -> None:
    jax.block_until_ready(run(*arguments))
