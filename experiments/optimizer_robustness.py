"""What the optimizer does to robustness: SGD against Adam and RMSProp.

  python -m experiments.optimizer_robustness               digits, 2 minutes on two cores
  python -m experiments.optimizer_robustness --study=bands,dynamics

robustness  accuracy under noise and attacks, Lipschitz bounds (Tables 4.1, 4.3, Figure 4.1)
momentum    SGD with momentum 0.9 (Table 4.7)
filters     trained on filtered images, tested on original ones: Observation I (Figure 4.3)
energy      what images have at each frequency (Figures 4.2, 4.10)
bands       noise in ten bands of frequencies: Observation II (Figures 4.5, 4.6)
dynamics    linear regression with an irrelevant frequency, exact (Figure 4.7)
regions     where signGD goes, and how far its irrelevant weight (Figures 4.8, 4.9)
panels      filtered images (Figures 4.4, 4.11 to 4.16)
perturbed   perturbed images (Figures 4.18 to 4.20)

The small preset trains perceptrons on digits, and on digits enlarged so that three quarters of the
frequencies are unused, and prints claim by claim what holds there.

Source: Ma, Pan and Farahmand (2023), "Understanding the robustness difference between stochastic
gradient descent and adaptive gradient methods"; Ma (2025), "Understanding adversarial robustness in
deep learning", chapter 4.
"""

import dataclasses
import os

import jax

from experiments import command_line, optimizer_studies
from experiments.command_line import setting
from experiments.studies import run_studies
from robustjax import checks
from robustjax.training import report


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set."""

    # fmt: off
    study: tuple[str, ...] = setting(
        optimizer_studies.DEFAULT, "what is run, by commas", "run",
        choices=tuple(optimizer_studies.STUDIES))
    seeds: int = setting(3, "networks of each kind", "run")
    workdir: str = setting(
        "runs/optimizer_robustness/small", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "say what would be run; compute nothing", "run")
    assert_claims: bool = setting(
        True, "end with an error if a claim that should hold does not", "run")
    epochs: int = setting(120, "epochs of training", "small", unit="epochs")
    train_size: int = setting(1297, "digits to train on", "small", unit="examples")
    test_size: int = setting(500, "digits to test on", "small", unit="examples")
    draws: int = setting(5, "noise images of each band", "small", unit="images")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "epochs", "train_size", "test_size", "draws"):
            checks.integer(name, getattr(self, name), at_least=1)


PRESETS = {"small": Settings()}


def main(settings: Settings) -> None:
    """Runs or resumes the studies of these settings."""
    if settings.dry_run:
        report.print_lines(
            f"Dry run: {', '.join(settings.study)}: {settings.seeds} seeds, {settings.epochs} "
            "epochs of perceptrons 64-128-128-10 and 256-128-128-10"
        )
        return
    small = optimizer_studies.Small(
        settings.seeds, settings.epochs, settings.train_size, settings.test_size, settings.draws
    )
    run_studies(
        settings,
        lambda study, workdir: optimizer_studies.STUDIES[study](small),
        title="SGD, Adam, RMSProp: what the thesis finds, and what holds at this size",
    )


if __name__ == "__main__":
    # Two networks side by side are faster than one on two cores.
    jax.config.update("jax_num_cpu_devices", max(1, min(4, len(os.sched_getaffinity(0)))))
    command_line.run(main, Settings, PRESETS, __doc__)
