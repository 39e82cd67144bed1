"""Fast adversarial training: catastrophic overfitting, and what prevents it.

  python -m experiments.fast_adversarial_training                   digits, 4 minutes on two cores
  python -m experiments.fast_adversarial_training --study=weight
  python -m experiments.fast_adversarial_training --preset=paper --study=methods    CIFAR-10, SVHN
  python -m experiments.fast_adversarial_training --preset=paper --dry_run    builds, runs nothing

methods        single-step methods, free training, PGD-2, PGD-10, corners (Tables 2.1, 2.3 to 2.5,
               section 2.4)
eps            methods over eps, with and without early stopping (Figs. 2.1, 2.8, 2.14)
reduced_step   FGSM with a shorter step (Table 2.1, Fig. 2.3 on digits)
curves         accuracies, losses, alignment over the epochs (Figs. 2.4, 2.11)
weight         the weight of GradAlign (Fig. 2.15)
penalties      FGSM with gradient penalty, CURE, GradAlign (Table 2.8)
variants       GradAlign at FGSM points; penalties without attack (section 2.11.5)
large_eps, epochs    larger radii (Table 2.7), longer training (Fig. 2.16); on digits not by default
filters, feature_maps    the filters of a single-layer CNN (Figs. 2.5 to 2.7, 2.12, 2.13)
linearization  quality of the linear approximation (Fig. 2.10; paper: networks of study curves)
start, initialization    Lemma 1, Lemma 2 (Figs. 2.2, 2.9; small preset)
steps, pgd2, corners, single_layer, imagenet    Fig. 2.3, Table 2.3, section 2.4, Fig. 2.11, Table
               2.6 (paper preset)

The small preset trains a convolution of four filters and a dense layer on 8x8 digits and prints
claim by claim what holds there. The paper preset trains each network (PreAct-ResNet-18; ResNet-50
on ImageNet) in a folder of its own, WORKDIR/STUDY/NETWORK, and prints the published number beside
its own; with --resume it goes on where it was interrupted.

Source: Andriushchenko and Flammarion (2020), "Understanding and improving fast adversarial
training"; Andriushchenko (2024), "Understanding generalization and robustness in modern deep
learning", chapter 2.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import command_line, fast_jobs, fast_studies, launch
from experiments.command_line import setting
from experiments.fast_published import base_of, published_linearization, run_study
from experiments.jobs import print_costs
from experiments.studies import Study, run_studies
from robustjax import checks, data, models, training
from robustjax.training import report

# The published single-layer CNN: FGSM at 10/255, 30 epochs.
CIFAR = fast_studies.Small(
    seeds=1, epochs=30, evaluations=30, eps=10 / 255, large_eps=10 / 255, weight=0.36, filters=4,
    train_size=50_000, test_size=1000, dataset="cifar10",
)  # fmt: skip
FILTERS = ("filters", "feature_maps")
PAPER = (*fast_jobs.STUDIES, "linearization", *FILTERS)
ALL = tuple(dict.fromkeys((*fast_studies.STUDIES, *PAPER)))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set; the settings of the published networks are in ``fast_jobs``."""

    # fmt: off
    scale: str = setting(
        "paper", "small: digits; paper: the published networks", "run",
        choices=("small", "paper"))
    study: tuple[str, ...] = setting(
        PAPER, "what is run, by commas", "run", choices=ALL)
    seeds: int = setting(5, "networks of each kind", "run")
    seed: int = setting(0, "the first seed of the published networks", "run")
    workdir: str = setting("runs/fast/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    assert_claims: bool = setting(
        True, "end with an error if a claim that should hold does not", "run")
    epochs: int = setting(60, "passes over the digits", "small", unit="epochs")
    evaluations: int = setting(12, "evaluations of a run", "small")
    eps: float = setting(0.25, "radius of the threat model, l_inf", "small", unit="input units")
    large_eps: float = setting(0.3, "a radius at which FGSM fails", "small", unit="input units")
    weight: float = setting(1.0, "weight of GradAlign", "small")
    filters: int = setting(4, "filters of the convolution", "small")
    train_size: int = setting(1437, "digits to train on", "small", unit="examples")
    test_size: int = setting(360, "digits to test on", "small", unit="examples")
    auto_attack: int = setting(
        1000, "test examples for AutoAttack, where it is published; 0: without", "paper",
        unit="examples")
    batch_multiple: int | None = setting(
        None, "training batches are rounded down to multiples of this, for devices that do not "
        "divide all published ones; with 8, the batches 180 and 100 of study imagenet become 176 "
        "and 96. None: as published", "paper", unit="examples")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "paper")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("seeds", "epochs", "evaluations", "filters", "train_size", "test_size"):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.integer("auto_attack", self.auto_attack)
        if self.batch_multiple is not None:
            checks.integer("batch_multiple", self.batch_multiple, at_least=1)
        checks.divisible("epochs", self.epochs, "evaluations", self.evaluations)
        for name in ("eps", "large_eps"):
            checks.number(name, getattr(self, name), above=0)
        checks.number("weight", self.weight, at_least=0)
        known = fast_studies.STUDIES if self.scale == "small" else PAPER
        for study in self.study:
            checks.choice(f"study at {self.scale} size", study, tuple(known))


PRESETS = {
    "small": Settings(
        scale="small", study=fast_studies.DEFAULT, seeds=4, workdir="runs/fast/small"
    ),
    "paper": Settings(),
}


def main(settings: Settings) -> None:
    """Runs or resumes the studies of these settings."""
    if settings.dry_run:
        dry_run(settings)
        return
    small = small_of(settings)

    def make(study: str, workdir: Path) -> Study:
        if settings.scale == "small":
            return fast_studies.STUDIES[study](small)
        if study == "linearization":
            return published_linearization(settings, workdir)
        if study in FILTERS:
            return fast_studies.STUDIES[study](CIFAR._replace(data_dir=settings.data_dir))
        return run_study(settings, study, workdir)

    run_studies(
        settings,
        make,
        title="Digits, a single-layer CNN: what the paper finds, and what holds here",
    )


def small_of(settings: Settings) -> fast_studies.Small:
    """The size of the small studies."""
    return fast_studies.Small(
        settings.seeds, settings.epochs, settings.evaluations, settings.eps, settings.large_eps,
        settings.weight, settings.filters, settings.train_size, settings.test_size,
    )  # fmt: skip


def dry_run(settings: Settings) -> None:
    """Builds the networks of all studies abstractly and prints what each would cost."""
    if settings.scale == "paper":
        for study in settings.study:
            if study in FILTERS:
                _print_single_layer(study, CIFAR, (32, 32, 3), 128)
                continue
            if study == "linearization":
                continue  # of the networks of study curves
            networks = fast_jobs.jobs_of(
                study, base_of(settings), 1, batch_multiple=settings.batch_multiple
            )
            print_costs(networks, study, settings.seeds)
        return
    _print_single_layer(", ".join(settings.study), small_of(settings), (8, 8, 1), 64)


def _print_single_layer(
    studies: str, small: fast_studies.Small, shape: tuple[int, ...], batch_size: int
) -> None:
    model = models.from_linen(models.SingleLayerCNN(filters=small.filters))
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), image)
    report.print_lines(
        f"Dry run: {studies}, {small.dataset}: {training.parameter_count(params):,} parameters, "
        f"{small.seeds} seeds, {small.epochs} epochs of "
        f"{data.steps_per_epoch(small.train_size, batch_size)} steps"
    )


if __name__ == "__main__":
    launch.split_cpu()
    command_line.run(main, Settings, PRESETS, __doc__)
