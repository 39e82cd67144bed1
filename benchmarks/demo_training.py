"""The speed of adversarial training: steps of the demo's small network, and the same in PyTorch."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import agreement, timing
from experiments import training_run
from experiments.training_settings import Settings
from robustjax import data, models, parallel, training
from robustjax.benchmark import compilation
from robustjax.training import feed


def measure(
    settings: Settings,
    *,
    dispatches: int,
    rounds: int,
    peers: ModuleType | None,
) -> dict[str, Any]:
    """Times of adversarial training of the small network from one set of weights.

    Args:
      settings: of the experiment; its model must be ``small_cnn``, its optimizer ``adam`` with the
        ``cosine`` schedule, for that is what the peer has.
      dispatches: dispatches in a measurement.
      rounds: measurements of each run.
      peers: ``benchmarks.torch_peers``, or None to leave PyTorch out.

    Returns:
      ``timing.summary``, seconds of compilation, and what was compared to see that all agree.

    Raises:
      ValueError: the networks or the losses in training do not agree.
    """
    train = data.load(settings.dataset, "train")
    parts = training_run.build(settings, "madry", training_run.facts_of(settings, train))
    dispatch = training.steps_per_dispatch(parts.steps_per_epoch, settings.dispatch)
    steps = dispatches * dispatch
    x = jnp.asarray(data.as_float(train.image[:8]))
    variables = agreement.random_variables(parts.model, x)
    logits = models.eval_logits(parts.model.apply, *variables)(x)

    trainer = partial(_trainer, settings, parts, train, variables, dispatch, dispatches)
    runs = {"robustjax": trainer(jax.devices()[:1])}
    on_all = jax.device_count() > 1 and settings.batch_size % jax.device_count() == 0
    if on_all:
        runs["robustjax_on_all_devices"] = trainer(jax.devices())
    logit_difference = {}
    for name, memory_format in peers.FORMATS.items() if peers else ():
        network = peers.SmallCNN(x.shape[1], x.shape[3], train.num_classes)
        network = peers.load_flax(network, *variables).to(memory_format=memory_format)
        theirs = network(peers.images(x, memory_format))
        logit_difference[name] = agreement.check_logits(name, theirs, logits)
        advance = peers.adversarial_trainer(
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
        runs[name] = partial(advance, steps)

    # Loss and robust accuracy of every round: both must learn alike.
    trace: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    recorded = {
        name: lambda run=run, values=trace[name]: values.append(run()) for name, run in runs.items()
    }
    compile_seconds = {}
    for name, run in recorded.items():  # once each, torch too: all stay at the same step
        with compilation.compilations() as seen:
            run()
        if name not in logit_difference:
            compile_seconds[name] = sum(seconds for _, seconds in seen)
    seconds = timing.interleaved(recorded, rounds)
    for name, values in trace.items():
        agreement.check_loss(name, values[-1][0], trace["robustjax"][-1][0], within=0.25)
    torch_runs = [*logit_difference]
    return {
        "steps": steps,
        "compile_seconds": compile_seconds,
        "agreement": {"logit_difference": logit_difference, "loss_and_robust_accuracy": trace},
        **timing.summary(
            seconds,
            {
                "robustjax / PyTorch": ("robustjax", torch_runs),
                "robustjax on all devices / PyTorch": (
                    "robustjax_on_all_devices",
                    torch_runs if on_all else [],
                ),
            },
        ),
    }


def _trainer(
    settings: Settings,
    parts: training_run.Parts,
    train: data.Dataset,
    variables: tuple[Any, Any],
    dispatch: int,
    dispatches: int,
    devices: Sequence[jax.Device],
) -> Callable[[], tuple[float, float]]:
    """A function that trains for so many dispatches more: ``() -> (loss, robust accuracy)``."""
    run_key, order_key = jax.random.split(jax.random.key(settings.seed))
    mesh = parallel.device_mesh(devices)
    advance = feed.resident(
        parts.step, train, key=order_key, batch_size=settings.batch_size, mesh=mesh
    )
    state = training.create_state(*variables, parts.optimizer, run_key)
    # A copy, because the step donates its state.
    state, done = parallel.replicate(jax.tree.map(jnp.copy, state), mesh), 0

    def run() -> tuple[float, float]:
        nonlocal state, done
        metrics = []
        for _ in range(dispatches):
            state, now = advance(state, *divmod(done, parts.steps_per_epoch), dispatch)
            metrics.append(now)
            done += dispatch
        metrics = jax.device_get(metrics)
        loss, accuracy = (
            float(np.mean([m[name] for m in metrics])) for name in ("loss", "robust_accuracy")
        )
        return loss, accuracy

    return run
