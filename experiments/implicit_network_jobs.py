"""The published networks of the study of implicit robustness, and what is measured of them.

WRN-28-10 on CIFAR-10: adversarial training and TRADES over the radius of training and over the
weight of the divergence, and RobustBench's networks under the Fourier attack. Only figures of these
are published, no numbers.

Source: Faghri, Gowal, Vasconcelos, Fleet, Pedregosa and Le Roux (2021), "Bridging the gap between
adversarial robustness and optimization bias", section 5.5, appendix B.5. Not printed, and so from
the authors' code or usual: 10 steps of the inner attack, weight decay 5e-4, crops and flips, 6 as
the weight of TRADES where the radius varies, nine weights where it does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import batch_sizes, fourier_attack, fourier_zoo, jobs, trained_models
from experiments.implicit_networks import BETAS, OBJECTIVES, TRAIN_EPS, adam_pgd
from experiments.jobs import Job
from experiments.studies import Study
from experiments.training_settings import Settings as Training
from robustjax import data, keys, metrics
from robustjax.benchmark.batches import BatchedFunction
from robustjax.norms import LInf
from robustjax.threat import ThreatModel

EPS = 8 / 255
# SGD with 0.1 per 256 examples. The inner attack steps by Adam with learning rate 0.1.
BASE = Training(
    model="wrn28", validation_size=0, selection="train", learning_rate=0.4, batch_size=1024,
    epochs=200, schedule="cosine", rate_warmup=10, milestones=(), weight_decay=5e-4, eps=EPS,
    attack_rule="adam", attack_step_size=0.1, attack_steps=10, checkpoint_every=10,
    test_steps=40, test_restarts=1, robust_examples=1000, test_batch_size=1000,
)  # fmt: skip
# What varies in each study: labels of the networks to changes of the settings.
_EPS_GRID = {
    (name, f"{8 * factor:g}/255"): {"objective": (objective,), "eps": factor * EPS}
    for name, objective in OBJECTIVES.items()
    for factor in TRAIN_EPS
}
_BETA_GRID = {
    ("TRADES", f"beta {beta:g}"): {"objective": ("trades",), "beta": beta} for beta in BETAS
}
STUDIES: Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]] = {
    "networks_eps": _EPS_GRID,
    "networks_trades": _BETA_GRID,
    "zoo": {},  # nothing is trained
}


def base_of(settings: Any) -> Training:
    """What all runs share, with ``data_dir`` and ``seed`` of the entry point's settings."""
    return dataclasses.replace(BASE, data_dir=settings.data_dir, seed=settings.seed)


def jobs_of(study: str, base: Training, seed: int, folder: Path) -> list[Job]:
    """The networks of a study, placed in ``folder``.

    Args:
      study: one of ``STUDIES``.
      base: what all runs share.
      seed: added to that of the base.
      folder: of all networks.
    """
    made = [
        Job(labels, dataclasses.replace(base, seed=base.seed + seed, **changes))
        for labels, changes in STUDIES[study].items()
    ]
    return jobs.placed(made, folder)


def zoo_settings(
    settings: Any, workdir: Path, names: Sequence[str] = fourier_zoo.SUPPORTED
) -> fourier_attack.Settings:
    """The evaluation of RobustBench's networks: ``eps`` 0 to 8/255, APGD-CE and APGD-DLR.

    Args:
      settings: of the entry point: ``zoo``, RobustBench's folder ``models/cifar10``, ``examples``,
        ``batch_size``, ``data_dir`` and ``seed``.
      workdir: of the results, to be resumed.
      names: of ``fourier_zoo.ZOO``.
    """
    return dataclasses.replace(
        fourier_attack.PRESETS["paper"],
        checkpoints=None,
        torch_checkpoints=fourier_zoo.files_in(settings.zoo, names),
        balls=("fourier",),
        examples=settings.examples,
        batch_size=settings.batch_size,
        data_dir=settings.data_dir,
        seed=settings.seed,
        workdir=str(workdir),
        resume=True,
    )


def dry_run(settings: Any, study: str) -> None:
    """Builds what a study trains or attacks abstractly, and prints what it would cost."""
    workdir = Path(settings.workdir)
    if study == "zoo":
        fourier_attack.dry_run(zoo_settings(settings, workdir / "zoo"))
        return
    made = jobs_of(study, base_of(settings), 0, workdir / "networks")
    jobs.print_costs(made, study, settings.seeds)


def run_study(settings: Any, study: str, workdir: Path) -> Study:
    """Trains what is missing of the networks of a study, and measures the last of each.

    Args:
      settings: of the entry point: ``seeds``, ``seed``, ``data_dir``, ``examples``, ``batch_size``,
        for the zoo also ``zoo``.
      study: one of ``STUDIES``.
      workdir: the networks go into folders of ``workdir / networks``.
    """
    if study == "zoo":
        return _zoo(settings, workdir)
    base, folder = base_of(settings), workdir / "networks"
    networks = [job for seed in range(settings.seeds) for job in jobs_of(study, base, seed, folder)]

    def outcome(job: Job) -> dict[str, float]:
        jobs.trained(job, study)
        return _measured(settings, job)

    table = jobs.tabulated(networks, outcome)
    return Study(
        f"Study {study}, CIFAR-10, WRN-28-10, mean ± std [95 % interval] over seeds; eps 8/255",
        ["training", "varied", *table.columns],
        table.rows,
        table.results,
    )


def _measured(settings: Any, job: Job) -> dict[str, float]:
    """Accuracy in per cent, clean and under 40 steps of Adam on the margin."""
    folder = jobs.model_folder(job)
    logits_fn = trained_models.load(folder, "last", data_dir=settings.data_dir).logits_fn
    examples = trained_models.evaluation_set(job.settings, "test", settings.examples)
    rows = (
        data.as_float(examples.image),
        examples.label,
        np.arange(settings.examples, dtype=np.int32),
    )
    batched = BatchedFunction(_correct, batch_size=batch_sizes.for_evaluation(settings.batch_size))
    fixed = batched.place((logits_fn, jax.random.key(0)))
    clean, robust = batched(fixed, (), rows)
    return {"clean": 100 * float(clean.mean()), "Adam-PGD-40": 100 * float(robust.mean())}


def _correct(fixed: tuple, numbers: tuple, rows: tuple) -> tuple[jax.Array, jax.Array]:
    del numbers
    (logits_fn, key), (x, y, index) = fixed, rows
    x_adv = adam_pgd(ThreatModel(LInf(), EPS))(logits_fn, keys.per_example(key, index), x, y)
    return metrics.correct(logits_fn(x), y), metrics.correct(logits_fn(x_adv), y)


def _zoo(settings: Any, workdir: Path) -> Study:
    """The largest Fourier eps of RobustBench's networks, one after the other, in ``zoo/NAME``.

    Raises:
      ValueError: files are missing.
    """
    files = fourier_zoo.parse(fourier_zoo.files_in(settings.zoo))
    missing = [path for path in files.values() if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"zoo must be RobustBench's folder models/cifar10, got {settings.zoo} without "
            f"{len(missing)} of {len(files)} files, the first: {missing[0]}"
        )
    found: dict[str, Any] = {}
    for name in files:
        own = zoo_settings(settings, workdir / "zoo" / name.replace("/", "_"), (name,))
        result = fourier_attack.main(own)
        assert result is not None  # it is no dry run
        found |= result["models"]
    rows = []
    for name, model in fourier_zoo.ZOO.items():
        curves = found.get(name.replace("/", "_"))
        if curves is None:
            rows.append([name, model.training, model.architecture, "not read here", ""])
            continue
        curve = curves["fourier"]
        rows.append([
            name, model.training, model.architecture, f"{255 * curve['max_eps']:.1f}/255",
            f"{100 * curve['accuracy'][-1]:.1f}",
        ])  # fmt: skip
    return Study(
        f"Study zoo, CIFAR-10, {settings.examples} examples: largest Fourier-l_inf eps that costs "
        "one point at most, of 0 to 8/255, under APGD-CE and APGD-DLR; accuracy (%) at 8/255",
        ["network", "trained for", "architecture", "max eps", "accuracy"],
        rows,
        found,
    )
