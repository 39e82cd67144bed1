"""What the optimizer, the architecture and penalties do to robustness.

  python -m experiments.implicit_robustness                 three minutes on two cores
  python -m experiments.implicit_robustness --study=sweep,fourier
  python -m experiments.implicit_robustness --preset=paper --study=sweep      the published grids
  python -m experiments.implicit_robustness --preset=paper --dry_run          builds, runs nothing

Linear classifiers of separable data, against the most robust ones that there are:

sweep       optimizers, penalties, adversarial training over d/n (Figures 5.2, B.1)
fourier     convolutions and other ways to withstand Fourier attacks (Figures 5.3, B.2)
gap         what convolutions lack: start, step size, precision, width (section 5.6.1)
at          adversarial training over the size of its attack (Figure 5.4 a)
penalty     an l_1 penalty over its coefficient (Figure 5.4 b)
saddle      what the saddle point cannot tell or does not find (section 5.2)
slack       the most robust classifier with slack (appendix B.1)
balls       unit balls in three dimensions (Figure B.9)
precond     preconditioned descent against Mahalanobis attacks

Networks; small: perceptrons on digits, paper: WRN-28-10 on CIFAR-10:

networks_eps     adversarial training and TRADES over the radius (Figure 5.4 c)
networks_trades  TRADES over the weight of its divergence (Figure 5.4 d)
first_order      margins by the gradient against attacks (appendix B.4; small preset)
zoo              networks under the Fourier attack (Figure 5.5)

The small preset prints claim by claim what holds. The paper preset runs the grids of Table B.1,
each method with the best of its grid, and trains each network once, in WORKDIR/networks; with
--resume it goes on where it was interrupted.

Source: Faghri, Gowal, Vasconcelos, Fleet, Pedregosa and Le Roux (2021), "Bridging the gap between
adversarial robustness and optimization bias".
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from experiments import (
    command_line,
    implicit_fourier,
    implicit_network_jobs,
    implicit_networks,
    implicit_studies,
    implicit_sweeps,
    implicit_theory,
    launch,
)
from experiments.command_line import setting
from experiments.implicit_networks import SmallNetworks
from experiments.implicit_studies import PUBLISHED, Grids, Planned
from experiments.studies import Study, run_studies
from robustjax import checks
from robustjax.training import count_flops, report

LINEAR: Mapping[str, Callable[[Grids], Study]] = {
    **implicit_studies.STUDIES, **implicit_fourier.STUDIES, **implicit_theory.STUDIES
}  # fmt: skip
PLANS: Mapping[str, Callable[[Grids], Mapping[str, Planned]]] = {
    **implicit_studies.PLANS, **implicit_fourier.PLANS, **implicit_theory.PLANS
}  # fmt: skip
SMALL = (*LINEAR, *implicit_networks.STUDIES)
# Exact studies have one size.
PAPER = (*LINEAR, *implicit_network_jobs.STUDIES)
OF_GRIDS = ("sweep", "fourier", "at", "penalty")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set; grids are in ``implicit_studies``, networks in ``implicit_network_jobs``."""

    # fmt: off
    scale: str = setting(
        "paper", "small: short grids, perceptrons; paper: the published ones", "run",
        choices=("small", "paper"))
    study: tuple[str, ...] = setting(
        (*OF_GRIDS, *implicit_network_jobs.STUDIES), "what is run, by commas", "run",
        choices=tuple(dict.fromkeys((*SMALL, *PAPER))))
    seeds: int = setting(3, "data sets of each size, for linear classifiers", "run")
    networks: int = setting(1, "networks of each kind", "run")
    seed: int = setting(0, "the first seed of the published networks", "run")
    workdir: str = setting(
        "runs/implicit_robustness/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    assert_claims: bool = setting(
        False, "end with an error if a claim that should hold does not; claims are calibrated for "
        "the small preset", "run")
    epochs: int = setting(SmallNetworks().epochs, "epochs of training", "small", unit="epochs")
    train_size: int = setting(
        SmallNetworks().train_size, "digits to train on", "small", unit="examples")
    test_size: int = setting(
        SmallNetworks().test_size, "digits to test on", "small", unit="examples")
    zoo: str = setting(
        "models/cifar10", "RobustBench's folder of its networks on CIFAR-10", "paper")
    examples: int = setting(10_000, "first test examples that are attacked", "paper",
                            unit="examples")
    batch_size: int = setting(500, "examples at a time in evaluation, on all devices", "paper",
                              unit="examples")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "paper")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "networks", "epochs", "train_size", "test_size", "examples",
                     "batch_size"):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        for study in self.study:
            known = SMALL if self.scale == "small" else PAPER
            checks.choice(f"study at {self.scale} size", study, known)


PRESETS = {
    "small": Settings(
        scale="small", study=SMALL, networks=SmallNetworks().seeds, assert_claims=True,
        workdir="runs/implicit_robustness/small",
    ),
    "paper": Settings(),
}  # fmt: skip


def main(settings: Settings) -> None:
    """Runs or resumes the studies of these settings."""
    if settings.dry_run:
        for study in settings.study:
            dry_run(settings, study)
        return
    run_studies(
        settings,
        lambda study, workdir: run_study(settings, study, workdir),
        title="Optimizers, architectures, penalties: what the paper finds, and what holds here",
    )


def grids_of(settings: Settings) -> Grids:
    """The grids of the preset."""
    return (Grids() if settings.scale == "small" else PUBLISHED)._replace(seeds=settings.seeds)


def run_study(settings: Settings, study: str, workdir: Path) -> Study:
    """Runs one study; linear classifiers are trained in float64."""
    if study in LINEAR:
        with jax.enable_x64(True):
            return LINEAR[study](grids_of(settings))
    if settings.scale == "small":
        small = SmallNetworks(
            settings.networks, settings.epochs, settings.train_size, settings.test_size
        )
        return implicit_networks.STUDIES[study](small)
    return implicit_network_jobs.run_study(_of_networks(settings), study, workdir)


def dry_run(settings: Settings, study: str) -> None:
    """Builds the programs of a study abstractly and prints their sizes and what they cost."""
    if study in PLANS:
        with jax.enable_x64(True):
            print_plan(study, PLANS[study](grids_of(settings)))
    elif study in LINEAR:
        report.print_lines(f"Dry run: {study}: closed forms, and descent within seconds")
    elif settings.scale == "small":
        report.print_lines(
            f"Dry run: {study}: {settings.networks} perceptrons of each kind, {settings.epochs} "
            f"epochs of {settings.train_size} digits"
        )
    else:
        implicit_network_jobs.dry_run(_of_networks(settings), study)


def print_plan(study: str, plan: Mapping[str, Planned]) -> None:
    """Prints the compiled programs of a study of linear classifiers."""
    rows = []
    for name, (program, examples) in plan.items():
        sets, n, d = examples.x.shape
        flops = count_flops(program.run, implicit_sweeps.abstract(examples))
        rows.append([name, f"{sets} of up to {n} x {d}", str(program.grid),
                     f"{program.steps:,}", f"{flops:.1e}"])  # fmt: skip
    report.print_table(
        f"Dry run: {study}; FLOPs of matrix products, with one trial in each line search",
        ["program", "data sets", "grid", "steps", "FLOPs"],
        rows,
    )


def _of_networks(settings: Settings) -> Settings:
    return dataclasses.replace(settings, seeds=settings.networks)


if __name__ == "__main__":
    launch.split_cpu()
    command_line.run(main, Settings, PRESETS, __doc__)
