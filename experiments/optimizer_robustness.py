"""What the optimizer does to robustness: SGD against Adam and RMSProp.

  python -m experiments.optimizer_robustness               digits, 3 minutes on two cores
  python -m experiments.optimizer_robustness --study=bands,dynamics
  python -m experiments.optimizer_robustness --preset=paper --study=robustness --data=CIFAR-10
  python -m experiments.optimizer_robustness --preset=paper --dry_run      builds all, runs nothing

robustness  accuracy under noise and attacks, Lipschitz bounds (Tables 4.1, 4.3, Figure 4.1)
batchnorm   with batch normalisation (Table 4.4)
head        the last layer on a frozen encoder; paper: a pretrained ViT-B/16 (Table 4.5)
audio       waveforms: tones; paper: Speech Commands with M5 (Table 4.6)
momentum    SGD with momentum 0.9 (Table 4.7)
filters     trained on filtered images, tested on original ones: Observation I (Figure 4.3)
bands       noise in ten bands of frequencies: Observation II (Figures 4.5, 4.6, 4.17)
energy      what images have at each frequency (Figures 4.2, 4.10)
panels      filtered images (Figures 4.4, 4.11 to 4.16)
perturbed   perturbed images (Figures 4.18 to 4.20)
dynamics    linear regression with an irrelevant frequency, exact (Figure 4.7; small preset)
regions     where signGD goes, and how far its irrelevant weight (Figures 4.8, 4.9; small preset)

The small preset trains small networks on digits, on digits enlarged so that three quarters of the
frequencies are unused, and on tones, and prints claim by claim what holds there. The paper preset
trains each network once, in WORKDIR/networks/NETWORK, for all studies, and prints the published
number beside its own; with --resume it goes on where it was interrupted. Data sets are those of
TensorFlow Datasets; --data chooses some of them.

Source: Ma, Pan and Farahmand (2023), "Understanding the robustness difference between stochastic
gradient descent and adaptive gradient methods"; Ma (2025), "Understanding adversarial robustness in
deep learning", chapter 4.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import (
    command_line,
    launch,
    optimizer_evaluation,
    optimizer_jobs,
    optimizer_spectra,
    optimizer_studies,
)
from experiments.command_line import setting
from experiments.jobs import print_costs
from experiments.studies import Study, run_studies
from robustjax import checks
from robustjax.training import report

PAPER: Mapping[str, Callable[[Any, str, Path], Study]] = {
    **dict.fromkeys(optimizer_jobs.TABLES, optimizer_evaluation.tables),
    "filters": optimizer_evaluation.filters,
    "bands": optimizer_spectra.bands,
    "energy": optimizer_spectra.energy,
    "panels": optimizer_spectra.panels,
    "perturbed": optimizer_spectra.perturbed,
}
ALL = tuple(dict.fromkeys((*PAPER, *optimizer_studies.STUDIES)))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set; the settings of the published networks are in ``optimizer_jobs``."""

    # fmt: off
    scale: str = setting(
        "paper", "small: digits; paper: the published networks", "run",
        choices=("small", "paper"))
    study: tuple[str, ...] = setting(tuple(PAPER), "what is run, by commas", "run", choices=ALL)
    seeds: int = setting(3, "networks of each kind", "run")
    seed: int = setting(0, "the first seed of the published networks", "run")
    workdir: str = setting(
        "runs/optimizer_robustness/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    assert_claims: bool = setting(
        True, "end with an error if a claim that should hold does not", "run")
    draws: int = setting(10, "noise images of each band", "run", unit="images")
    epochs: int = setting(120, "epochs of training", "small", unit="epochs")
    train_size: int = setting(1297, "digits to train on", "small", unit="examples")
    test_size: int = setting(500, "digits to test on", "small", unit="examples")
    data: tuple[str, ...] = setting(
        tuple(optimizer_jobs.TASKS), "data sets, by commas", "paper",
        choices=tuple(optimizer_jobs.TASKS))
    validation_size: int | None = setting(
        None, "training examples that choose the checkpoint; None: 1000, 306 of Caltech-101, those "
        "that come with Speech Commands", "paper", unit="examples")
    examples: int = setting(
        1000, "first test examples for attacks and noise in bands", "paper", unit="examples")
    batch_size: int = setting(
        500, "examples at a time in evaluation, on all devices", "paper", unit="examples")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "paper")
    pretrained: str | None = setting(
        None, "weights of a ViT-B/16 (PyTorch file, .npz or folder of a run); for study head",
        "paper")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "epochs", "train_size", "test_size", "draws", "examples",
                     "batch_size"):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        if self.validation_size is not None:
            checks.integer("validation_size", self.validation_size, at_least=1)
        known = optimizer_studies.STUDIES if self.scale == "small" else PAPER
        for study in self.study:
            checks.choice(f"study at {self.scale} size", study, tuple(known))
            if self.scale == "paper" and not set(self.data) & set(optimizer_jobs.COVERED[study]):
                raise ValueError(
                    f"data must name one of {', '.join(optimizer_jobs.COVERED[study])} for study "
                    f"{study}, got {', '.join(self.data)}"
                )


PRESETS = {
    "small": Settings(
        scale="small",
        study=optimizer_studies.DEFAULT,
        draws=5,
        workdir="runs/optimizer_robustness/small",
    ),
    "paper": Settings(),
}


def main(settings: Settings) -> None:
    """Runs or resumes the studies of these settings."""
    if settings.dry_run:
        dry_run(settings)
        return
    if settings.scale == "paper" and "head" in settings.study and settings.pretrained is None:
        raise ValueError(
            "pretrained must be a file of weights for study head, got None: give one, or the other "
            "studies by --study"
        )
    small = optimizer_studies.Small(
        settings.seeds, settings.epochs, settings.train_size, settings.test_size, settings.draws
    )

    def make(study: str, workdir: Path) -> Study:
        if settings.scale == "small":
            return optimizer_studies.STUDIES[study](small)
        return PAPER[study](settings, study, workdir)

    run_studies(
        settings,
        make,
        title="SGD, Adam, RMSProp: what the thesis finds, and what holds at this size",
    )


def dry_run(settings: Settings) -> None:
    """Builds the networks of all studies abstractly and prints what each would cost."""
    if settings.scale == "small":
        report.print_lines(
            f"Dry run: {', '.join(settings.study)}: {settings.seeds} seeds, {settings.epochs} "
            "epochs of perceptrons 64-128-128-10 and 256-128-128-10, fewer of other networks"
        )
        return
    one = dataclasses.replace(settings, seeds=1)
    for study in settings.study:
        sets = optimizer_evaluation.asked(settings, study)
        networks = [
            job
            for name in sets
            for job in optimizer_evaluation.networks_of(one, study, name, Path(settings.workdir))
        ]
        if networks:
            print_costs(networks, study, settings.seeds)
        else:
            report.print_lines(f"Dry run: study {study}: no networks; {', '.join(sets)}")


if __name__ == "__main__":
    launch.split_cpu()
    command_line.run(main, Settings, PRESETS, __doc__)
