"""Second-order adversarial regularisation: SOAR and FOAR, and how to tell masked gradients.

  python -m experiments.soar                        digits, 4 minutes on two cores
  python -m experiments.soar --study=methods
  python -m experiments.soar --preset=paper --study=methods      ResNet-10 on CIFAR-10
  python -m experiments.soar --preset=paper --dry_run            builds all, runs nothing

methods      standard and PGD-10 training, TRADES, MART, FOAR, SOAR under PGD (Tables 3.1, 3.2)
points       zero, random and PGD-1 evaluation points (Tables 3.7, 3.8; small: in methods)
samples      the penalised loss over the number of vectors z (Table 3.6)
masking      signs of masked gradients (Table 3.1, appendix 3.F)
transfer     examples made on other networks, and SimBA (Table 3.3)
autoattack   the members of AutoAttack, each on its own, at eps and eps / 2 (Table 3.4)
l2           l_2 attacks (Table 3.9)
capacity     smaller networks (Table 3.10)
limitations  batch normalisation, a cold start, a large learning rate (section 3.6)
interpolation    the loss on the way to the adversarial example (section 3.3.4; small preset)
linear       linear regression in more dimensions than the data (section 3.2; small preset)
passes       forward and backward passes of a step (Table 3.5; small preset)

The small preset trains a perceptron on digits and prints claim by claim what holds there; at this
size SOAR is not expected to beat PGD-10 training. The paper preset trains each network once, in
WORKDIR/networks/NETWORK, and prints the published number beside its own; with --resume it goes on
where it was interrupted. SOAR withstands PGD and not the margin-based attacks of AutoAttack: a
report of PGD alone is misleading.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", chapter 3.
"""

import dataclasses
from pathlib import Path

from experiments import command_line, launch, soar_jobs, soar_studies
from experiments.command_line import setting
from experiments.jobs import print_costs
from experiments.soar_published import base_of, run_study
from experiments.studies import Study, run_studies
from robustjax import checks
from robustjax.training import report

ALL = tuple(dict.fromkeys((*soar_studies.STUDIES, *soar_jobs.STUDIES)))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set; the settings of the published networks are in ``soar_jobs``."""

    # fmt: off
    scale: str = setting(
        "paper", "small: digits; paper: the published networks", "run",
        choices=("small", "paper"))
    study: tuple[str, ...] = setting(
        tuple(soar_jobs.STUDIES), "what is run, by commas", "run", choices=ALL)
    seeds: int = setting(1, "networks of each kind", "run")
    seed: int = setting(0, "the first seed of the published networks", "run")
    workdir: str = setting("runs/soar/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    assert_claims: bool = setting(
        True, "end with an error if a claim that should hold does not", "run")
    epochs: int = setting(60, "epochs of standard training, and of what follows", "small",
                          unit="epochs")
    eps: float = setting(0.15, "radius of the threat model, l_inf", "small", unit="input units")
    train_size: int = setting(1297, "digits to train on", "small", unit="examples")
    test_size: int = setting(500, "digits to test on", "small", unit="examples")
    examples: int = setting(10_000, "first test examples that are attacked", "paper",
                            unit="examples")
    batch_size: int = setting(500, "examples at a time in evaluation, on all devices", "paper",
                              unit="examples")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "paper")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "epochs", "train_size", "test_size", "examples", "batch_size"):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.number("eps", self.eps, above=0)
        known = soar_studies.STUDIES if self.scale == "small" else soar_jobs.STUDIES
        for study in self.study:
            checks.choice(f"study at {self.scale} size", study, tuple(known))


PRESETS = {
    "small": Settings(
        scale="small", study=soar_studies.DEFAULT, seeds=4, workdir="runs/soar/small"
    ),
    "paper": Settings(),
}


def main(settings: Settings) -> None:
    """Runs or resumes the studies of these settings."""
    if settings.dry_run:
        dry_run(settings)
        return
    small = soar_studies.Small(
        settings.seeds, settings.epochs, settings.eps, settings.train_size, settings.test_size
    )

    def make(study: str, workdir: Path) -> Study:
        if settings.scale == "small":
            return soar_studies.STUDIES[study](small)
        return run_study(settings, study, workdir)

    run_studies(
        settings,
        make,
        title="Digits, a perceptron: what the thesis finds, and what holds at this size",
    )


def dry_run(settings: Settings) -> None:
    """Builds the networks of all studies abstractly and prints what each would cost."""
    if settings.scale == "small":
        report.print_lines(
            f"Dry run: {', '.join(settings.study)}: {settings.seeds} seeds, "
            f"{2 * settings.epochs} epochs of a perceptron 64-128-128-10"
        )
        return
    folder = Path(settings.workdir) / "networks"
    for study in settings.study:
        networks = soar_jobs.jobs_of(study, base_of(settings), 0, folder)
        print_costs(networks, study, settings.seeds)


if __name__ == "__main__":
    launch.split_cpu()
    command_line.run(main, Settings, PRESETS, __doc__)
