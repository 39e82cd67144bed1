"""Adversarial training, end to end: trains, selects on validation data, evaluates, reports.

Trains one model for each objective, side by side in one folder. Each is evaluated on the test
set, clean and under PGD-50 with 10 restarts, at the checkpoint that was best on the validation
set and at the last one.

  python -m experiments.adversarial_training                      MNIST-5k on a laptop, 2 minutes
  python -m experiments.adversarial_training --preset=paper       PreAct-ResNet-18 on CIFAR-10
  python -m experiments.adversarial_training --preset=paper --dry_run     builds all, runs nothing

The folder of a run, WORKDIR/OBJECTIVE, holds config.json, metrics.jsonl, tensorboard/,
checkpoints/, results.json, curves.png and panel.png; WORKDIR has config.json and results.json of
all. A run that was interrupted goes on with --resume and ends with the same numbers.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import batch_sizes, command_line, trained_models
from experiments.dry_run import dry_run
from experiments.training_run import build, facts_of, load_split, run_objective, squared
from experiments.training_settings import NOT_OF_THE_RUN, Settings, added_since
from robustjax.training import report

PRESETS = {
    "small": Settings(
        dataset="mnist5k",
        validation_size=None,
        augmentation="none",
        model="small_cnn",
        normalization="none",
        precision="float32",
        objective=("standard", "madry"),
        eps=0.2,
        attack_steps=7,
        attack_step_size=0.05,
        eps_warmup=10,
        optimizer="adam",
        learning_rate=2e-3,
        weight_decay=0.0,
        schedule="cosine",
        milestones=(),
        epochs=30,
        batch_size=96,
        checkpoint_every=3,
        test_batch_size=100,
        workdir="runs/adversarial_training/small",
    ),
    "paper": Settings(),
}

# Vanilla adversarial training with momentum SGD, ResNet-18 on CIFAR-10: Dabouei et al. (2022),
# "Revisiting outer optimization in adversarial training", Table 2, in per cent. "pgd20" is under
# the margin loss, as in validation here.
PUBLISHED = {("madry", "best", "clean"): 84.70, ("madry", "best", "pgd20"): 50.87,
             ("madry", "last", "pgd20"): 44.15}  # fmt: skip


def main(settings: Settings) -> None:
    """Runs or resumes the experiment of these settings."""
    if settings.dry_run:
        dry_run(settings)
        return
    _print_results(settings, train(settings))


def train(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates a model for each objective; returns what ``results.json`` holds."""
    batch_sizes.check_training(settings.batch_size)
    config = dataclasses.asdict(settings)
    for name in NOT_OF_THE_RUN:
        del config[name]
    splits = {split: load_split(settings, split) for split in ("train", "test")}
    if settings.selection == "train":
        shown = np.arange(min(256, len(splits["train"])))
        splits["validation"] = splits["train"].subset(shown)
    else:
        splits["validation"] = load_split(settings, "validation")
    for split in ("validation", "test"):
        splits[split] = squared(settings, splits[split])
    start = None
    if settings.start_from is not None:
        start = trained_models.variables(settings.start_from, data_dir=settings.data_dir)
    if settings.pretrained is not None:
        start = trained_models.encoder(settings, facts_of(settings, splits["train"]))
    for objective in settings.objective:
        build(settings, objective, facts_of(settings, splits["train"]))
    workdir = _opened(settings.workdir, config, settings.resume)
    results = {}
    for objective in settings.objective:
        own = _opened(workdir / objective, {**config, "objective": [objective]}, settings.resume)
        results[objective] = run_objective(settings, objective, splits, own, start)
    if report.is_writer():
        report.write_json(workdir / "results.json", results)
    return results


def _opened(folder: str | Path, config: Mapping[str, Any], resume: bool) -> Path:
    """The folder of a run, which may have been started before some of the settings were there."""
    # The others must not look before the folder is there: a network file system remembers that.
    added = added_since(folder, config) if report.is_writer() else ()
    return report.open_workdir(folder, config, resume=resume, may_change=added)


def _is_published_setting(settings: Settings) -> bool:
    # With synchronised statistics many devices train what a single one does.
    free = (
        "seed", "test_batch_size", "dispatch", "placement", "batch_statistics", *NOT_OF_THE_RUN
    )  # fmt: skip
    return settings == dataclasses.replace(
        PRESETS["paper"], **{name: getattr(settings, name) for name in free}
    )


def _print_results(settings: Settings, results: Mapping[str, Any]) -> None:
    names = [name for name in next(iter(results.values()))["best"] if name != "step"]
    rows = []
    for objective, result in results.items():
        for which in ("best", "last"):
            shown = []
            for name in names:
                text = report.percent(result[which][name])
                published = PUBLISHED.get((objective, which, name))
                if published and _is_published_setting(settings):
                    text += f" ({published})"
                shown.append(text)
            rows.append([objective, f"{which}, step {result[which]['step']}", *shown])
    test_examples = next(iter(results.values()))["test_examples"]
    note = "; in parentheses: published, %" if _is_published_setting(settings) else ""
    report.print_table(
        f"{settings.dataset}, {test_examples} test examples, {settings.norm} "
        f"eps = {settings.eps:.4g}{note}",
        ["objective", "checkpoint", *names],
        rows,
    )
    report.print_lines(f"figures, metrics and checkpoints: {settings.workdir}/OBJECTIVE")


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
