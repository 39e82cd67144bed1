"""The published networks of SOAR: trained once, measured for every table."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import batch_sizes, choices, jobs, soar_jobs, trained_models
from experiments.jobs import Job
from experiments.soar_jobs import NETWORKS
from experiments.studies import Study
from experiments.training_settings import Settings as Training
from robustjax import attacks, data, keys, losses, metrics, norms, objectives
from robustjax.benchmark import masking_report
from robustjax.benchmark.batches import BatchedFunction
from robustjax.threat import ThreatModel


def _pgd(steps: int, restarts: int = 1) -> Callable[[ThreatModel], attacks.Attack]:
    return lambda threat: attacks.pgd(
        threat, steps=steps, step_size=threat.eps / 4, restarts=restarts, select="any"
    )


# Names to attacks on the network itself, or on another one for "transfer".
ATTACKS: Mapping[str, Callable[[ThreatModel], attacks.Attack]] = {
    "FGSM": attacks.fgsm,
    **{f"PGD{steps}": _pgd(steps) for steps in (20, 100, 200, 1000)},
    "PGD20-50": _pgd(20, 50),
    # One pass over the pixels, with steps of eps; neither is printed.
    "SimBA": lambda threat: attacks.simba(threat, max_queries=3072),
    **{name: choices.EVALUATION_ATTACKS[name] for name in ("apgd-ce", "apgd-t", "fab-t", "square")},
}
# Published steps: 2.5 eps / 100.
_L2_PGD = functools.partial(attacks.pgd, steps=100)


def base_of(settings: Any) -> Training:
    """What all runs share, with ``settings`` of ``experiments.soar``."""
    return dataclasses.replace(soar_jobs.BASE, data_dir=settings.data_dir, seed=settings.seed)


def run_study(settings: Any, study: str, workdir: Path) -> Study:
    """Trains what is missing of the networks of a study, and measures them.

    Args:
      settings: of ``experiments.soar``.
      study: one of ``soar_jobs.STUDIES``.
      workdir: the networks go into folders of ``workdir / networks``, which all studies share.
    """
    measure = soar_jobs.STUDIES[study]
    base, folder = base_of(settings), workdir / "networks"
    networks, needed = [], {}
    for seed in range(settings.seeds):
        for job in soar_jobs.jobs_of(study, base, seed, folder):
            needed[job.labels[0], seed] = job
            jobs.trained(job, study)
        for name, published in measure.rows.items():
            known = zip(measure.columns, published, strict=True)
            known = {column: number for column, number in known if number is not None}
            networks.append(needed[name, seed]._replace(published=known))

    def outcome(job: Job) -> dict[str, float]:
        seed = job.settings.seed - base.seed
        return _measured(settings, job, measure.columns, {
            source: needed.get((f"source {source}", seed)) for source in ("R", "W")
        })  # fmt: skip

    table = jobs.tabulated(networks, outcome)
    return Study(
        f"Study {study}, CIFAR-10, mean ± std [95 % interval] over seeds; in parentheses: "
        "published",
        ["network", *table.columns],
        table.rows,
        table.results,
    )


def _measured(
    settings: Any, job: Job, columns: tuple[str, ...], sources: Mapping[str, Job | None]
) -> dict[str, float]:
    """The columns of one network; shares in per cent."""
    target = _loaded(job, settings.data_dir)
    examples = trained_models.evaluation_set(job.settings, "test", settings.examples)
    x, y = data.as_float(examples.image), examples.label
    out: dict[str, float] = {}

    def accuracy(attack: str, norm: str, eps: float, source: Any = None) -> float:
        measure = _accuracy(attack, norm, eps, settings.batch_size)
        fixed = measure.place((target, target if source is None else source, jax.random.key(0)))
        index = np.arange(len(x), dtype=np.int32)
        return 100 * float(measure(fixed, (), (x, y, index)).mean())

    for column in columns:
        of, name = None, column
        if column.startswith("transfer "):
            source, name = column.removeprefix("transfer ").split(", ", 1)
            needed = sources[source]
            assert needed is not None  # jobs_of lists the sources that the columns name
            of = _loaded(needed, settings.data_dir)
        if name in ("clean", *ATTACKS) or name.endswith(", eps/2"):
            half = name.endswith(", eps/2")
            eps = soar_jobs.EPS / 2 if half else soar_jobs.EPS
            out[column] = accuracy(name.removesuffix(", eps/2"), "linf", eps, of)
        elif name.startswith("l2 "):
            radius = name.removeprefix("l2 ")
            eps = float(radius) if "/" not in radius else float(radius.split("/")[0]) / 255
            out[column] = accuracy("l2", "l2", eps, of)
    if "confidence" in columns:
        out |= _masking(target, x, y, settings.batch_size)
    if "loss, 1 z" in columns:
        out |= _losses(target, x, y, settings.batch_size)
    return out


def _loaded(job: Job, data_dir: str | None) -> Any:
    which = NETWORKS[job.labels[0]].which
    return _read(str(jobs.model_folder(job)), which, data_dir)


@functools.lru_cache(maxsize=32)
def _read(folder: str, which: str, data_dir: str | None) -> Any:
    return trained_models.load(folder, which, data_dir=data_dir).logits_fn


@functools.lru_cache(maxsize=64)
def _accuracy(name: str, norm: str, eps: float, batch_size: int) -> BatchedFunction:
    """Correctness of the first network on what the attack finds on the second one."""
    threat = ThreatModel(choices.NORMS[norm], eps)
    attack = None
    if name != "clean":
        attack = _L2_PGD(threat) if name == "l2" else ATTACKS[name](threat)

    def measure(fixed, numbers, rows):
        del numbers
        (target, source, key), (x, y, index) = fixed, rows
        if attack is not None:
            x = attack(source, keys.per_example(key, index), x, y)
        return metrics.correct(target(x), y)

    return BatchedFunction(measure, batch_size=batch_sizes.for_evaluation(batch_size))


def _masking(target: Any, x: Any, y: Any, batch_size: int) -> dict[str, float]:
    threat = ThreatModel(norms.LInf(), soar_jobs.EPS)
    size = batch_sizes.for_evaluation(batch_size)
    found = masking_report(target, jax.random.key(0), x, y, threat, batch_size=size)
    return {
        "confidence": 100 * found.clean_confidence,
        "confidence on noise": 100 * found.noise_confidence,
        "confidence on PGD-1": 100 * found.pgd1_confidence,
        "non-zero gradients": found.nonzero_entries,
        "unbounded PGD20": 100 * found.unbounded_accuracy,
    }


def _losses(target: Any, x: Any, y: Any, batch_size: int) -> dict[str, float]:
    """Table 3.6: cross-entropy at the PGD-1 point plus the penalty, its values clipped at 10."""
    threat = ThreatModel(norms.LInf(), soar_jobs.EPS)
    attack, radius = objectives.evaluation_point(threat)

    def measure(fixed, numbers, rows):
        del numbers
        (target, key), (x, y, index) = fixed, rows
        example_keys = keys.per_example(key, index)
        at = attack(target, example_keys, x, y)
        return {
            f"loss, {n} z": losses.cross_entropy(target(at), y)
            + objectives.soar(radius, samples=n, clip=10.0)(target, example_keys, at, y)
            for n in (1, 10, 100)
        }

    batched = BatchedFunction(measure, batch_size=batch_sizes.for_evaluation(batch_size))
    index = np.arange(len(x), dtype=np.int32)
    found = batched(batched.place((target, jax.random.key(0))), (), (x, y, index))
    return {name: float(values.mean()) for name, values in found.items()}
