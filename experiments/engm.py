"""Outer optimizers of adversarial training: ENGM, its approximations, and what they are up against.

  python -m experiments.engm                               noisy digits, 4 minutes on two cores
  python -m experiments.engm --study=optimizers,alpha
  python -m experiments.engm --preset=mnist                MNIST-5k, a small CNN, 2 minutes
  python -m experiments.engm --preset=paper --study=optimizers     seven ResNet-18 on CIFAR-10
  python -m experiments.engm --preset=paper --dry_run      builds all, runs nothing

optimizers    seven optimizers, vanilla adversarial training (Table 2, Figs. 1 and 5h)
methods       vanilla, TRADES, MART, AWP with MSGD and ENGM (Table 3, Fig. 1)
sota          AWP on WRN-34-10 with MSGD, N-ENGM, ENGM (Table 4; paper preset)
eps           moments of the gradients and DeepFool distance over eps (Table 5)
gradients     moments and correlation of gradient norms over the epochs (Figs. 2 and 3)
landscape     loss on planes (Fig. 4; in the paper preset of the networks of study optimizers)
alpha, tau, beta, weight_decay    ablations (Fig. 5a-g)
l2            the l_2 threat model
convergence   descent with heavy-tailed noise (Theorem 2; small preset)
mnist         MSGD, N-ENGM, A-ENGM, ENGM on MNIST-5k with a small CNN (mnist preset)

The small preset trains perceptrons on 400 digits with 30 % wrong labels, where robust overfitting
shows within seconds; it prints claim by claim what holds there. Times per step (Table 1) are
measured by python -m benchmarks.outer_optimizers. The paper preset trains each network in a folder
of its own, WORKDIR/STUDY/NETWORK, and prints the published number beside its own; with --resume it
goes on where it was interrupted.

Source: Dabouei et al. (2022), "Revisiting outer optimization in adversarial training".
"""

import dataclasses
from pathlib import Path

from experiments import command_line, launch
from experiments.command_line import setting
from experiments.engm_jobs import jobs_of
from experiments.engm_published import base_of, published_landscape, run_study
from experiments.engm_studies import Small
from experiments.engm_sweeps import STUDIES
from experiments.jobs import print_costs
from experiments.studies import Study, run_studies
from robustjax import checks
from robustjax.training import report

TRAINED = ("optimizers", "methods", "sota", "eps", "gradients", "alpha", "tau", "beta",
           "weight_decay", "l2")  # fmt: skip
ALL = ("optimizers", "methods", "sota", "eps", "gradients", "landscape", "alpha", "tau", "beta",
       "weight_decay", "l2", "convergence", "mnist")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set; the settings of the published networks are in ``engm_jobs``."""

    # fmt: off
    scale: str = setting(
        "paper", "small: noisy digits; paper: the published networks", "run",
        choices=("small", "paper"))
    study: tuple[str, ...] = setting(TRAINED, "what is run, by commas", "run", choices=ALL)
    seeds: int = setting(3, "networks of each kind", "run")
    seed: int = setting(0, "the first seed", "run")
    workdir: str = setting("runs/engm/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    assert_claims: bool = setting(
        True, "end with an error if a claim that should hold does not", "run")
    epochs: int = setting(
        120, "epochs on noisy digits, a third of them on clean ones", "small", unit="epochs")
    evaluate_every: int = setting(8, "evaluations on digits", "small", unit="epochs")
    train_size: int = setting(400, "digits to train on", "small", unit="examples")
    test_size: int = setting(500, "digits to test on", "small", unit="examples")
    probe: int = setting(128, "digits whose gradients are measured", "small", unit="examples")
    noise: float = setting(0.3, "share of labels redrawn", "small")
    mnist_epochs: int = setting(6, "epochs on MNIST-5k", "small", unit="epochs")
    auto_attack: int = setting(
        10_000, "test examples for AutoAttack on each network's best checkpoint; 0: without",
        "paper", unit="examples")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "paper")
    tiny_imagenet: str = setting(
        "tiny_imagenet.npz", "file of arrays with Tiny-ImageNet, 64x64", "paper")
    batch_size: int = setting(128, "global batch size", "paper", unit="examples")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "epochs", "evaluate_every", "train_size", "test_size", "probe",
                     "mnist_epochs", "batch_size"):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        checks.integer("auto_attack", self.auto_attack)
        checks.divisible("epochs", self.epochs, "evaluate_every", self.evaluate_every)
        checks.number("noise", self.noise, at_least=0, at_most=1)
        known = ("mnist", *STUDIES) if self.scale == "small" else (*TRAINED, "landscape")
        for study in self.study:
            checks.choice(f"study at {self.scale} size", study, known)


PRESETS = {
    "small": Settings(
        scale="small",
        study=("optimizers", "methods", "eps", "gradients", "landscape", "alpha", "tau", "beta",
               "weight_decay", "l2", "convergence"),
        seeds=4,
        workdir="runs/engm/small",
    ),
    "mnist": Settings(scale="small", study=("mnist",), seeds=1, workdir="runs/engm/mnist"),
    "paper": Settings(),
}  # fmt: skip


def main(settings: Settings) -> None:
    """Runs or resumes the studies of these settings."""
    if settings.dry_run:
        dry_run(settings)
        return
    small = Small(settings.seeds, settings.epochs, settings.evaluate_every, settings.train_size,
                  settings.test_size, settings.probe, settings.noise, settings.seed)  # fmt: skip

    def make(study: str, workdir: Path) -> Study:
        if settings.scale == "small" and study != "mnist":
            return STUDIES[study](small)
        if study == "landscape":
            return published_landscape(settings, workdir)
        return run_study(settings, study, workdir)

    run_studies(
        settings,
        make,
        title="Noisy digits: what the paper finds, and what holds at this size",
    )


def dry_run(settings: Settings) -> None:
    """Builds the networks of all studies abstractly and prints what each would cost."""
    for study in settings.study:
        if settings.scale == "small" and study != "mnist":
            report.print_lines(
                f"Dry run: study {study}: perceptrons on digits, {settings.epochs} epochs"
            )
        elif study != "landscape":
            print_costs(jobs_of(study, base_of(settings, study), 1), study, settings.seeds)


if __name__ == "__main__":
    launch.split_cpu()
    command_line.run(main, Settings, PRESETS, __doc__)
