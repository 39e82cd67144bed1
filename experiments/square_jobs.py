"""What the studies of Square Attack run: their settings, and the attacks of each study.

A study is a list of jobs, one attack on one model with one or more seeds, so that a dry run can
build and count what a run would do.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments import adversarial_training, choices, command_line
from experiments.command_line import setting
from experiments.training_settings import Settings as TrainingSettings
from robustjax import attacks, checks, losses
from robustjax.threat import ThreatModel

STUDIES = ("ablation", "p", "seeds", "targeted", "curves", "robust", "masking", "steps", "theory")
ROLES = {"standard": "standard", "robust": "madry"}  # the objective of each model
P_VALUES = (
    "0.0125", "0.025", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.8",
)  # fmt: skip
# Windows, signs and first points of Table 3.7, the default last.
LINF_ABLATION = (
    ("random", "pixel", "vertical_stripes"),
    ("random", "pixel", "uniform"),
    ("random", "channel", "vertical_stripes"),
    ("square", "pixel", "vertical_stripes"),
    ("square", "one", "vertical_stripes"),
    ("rectangle", "channel", "vertical_stripes"),
    ("square", "channel", "uniform"),
    ("square", "channel", "random_squares"),
    ("square", "channel", "horizontal_stripes"),
    ("square", "channel", "vertical_stripes"),
)
L2_ABLATION = (
    ("eta_rand", "eta_grid"),
    ("eta_single", "eta_grid"),
    ("eta", "gaussian"),
    ("eta", "uniform"),
    ("eta", "vertical_stripes"),
    ("eta", "eta_grid"),
)
# The l_2 radii of Table 3.5 are 2, 2.5 and 3: these factors times the first.
L2_FACTORS = (1.0, 1.25, 1.5)
# Logits times these are the same classifier. The second is a power of two: nothing is rounded.
SCALES = (1.0, 1e4, 2.0**13)

# How models are trained on the spot.
RECIPES: Mapping[str, TrainingSettings] = {
    "digits": dataclasses.replace(
        adversarial_training.PRESETS["small"],
        dataset="digits",
        objective=("madry",),
        eps=0.15,
        attack_step_size=0.04,
        eps_warmup=5,
        batch_size=64,
        test_steps=10,
        test_restarts=1,
        checkpoint_every=10,
        test_batch_size=200,
    ),
    # Madry et al. (2018): 100,000 steps. Their network has 5x5 filters and a dense layer of 1,024.
    "mnist": TrainingSettings(
        dataset="mnist",
        augmentation="none",
        model="small_cnn",
        width=32,
        normalization="none",
        precision="float32",
        eps=0.3,
        attack_steps=40,
        attack_step_size=0.01,
        optimizer="adam",
        learning_rate=1e-4,
        weight_decay=0.0,
        schedule="constant",
        milestones=(),
        epochs=85,
        batch_size=50,
        checkpoint_every=5,
    ),
    "cifar10": TrainingSettings(),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set; the defaults are those of ``--preset=paper``.

    Raises:
      ValueError: a setting is out of range or not among its choices.
    """

    # fmt: off
    study: tuple[str, ...] = setting(STUDIES, "studies, by commas", "run", choices=STUDIES)
    standard: str = setting(
        "cifar10", f"model trained on clean images: a recipe ({', '.join(RECIPES)}), trained here, "
        "or the folder WORKDIR/OBJECTIVE of a training run", "models")
    robust: str = setting("mnist", "the same for the adversarially trained model", "models")
    which: str = setting("best", "their checkpoints", "models", choices=("best", "last"))
    epochs: int | None = setting(
        None, "of training here; None: those of the recipe", "models", unit="epochs")
    train_batch_size: int | None = setting(
        None, "global batch size of training here, divisible by the number of devices; None: that "
        "of the recipe", "models", unit="examples")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "models")
    examples: int = setting(1000, "first examples of the test set", "attacks", unit="examples")
    robust_examples: int = setting(
        10_000, "the same for the study robust", "attacks", unit="examples")
    norms: tuple[str, ...] = setting(
        ("linf", "l2"), "norms of ablation, p, seeds, targeted, curves, steps", "attacks",
        choices=("linf", "l2"))
    eps_linf: float = setting(8 / 255, "l_inf radius", "attacks", unit="input units")
    eps_l2: float = setting(0.5, "l_2 radius", "attacks", unit="input units")
    queries: int = setting(10_000, "queries", "attacks")
    p_linf: float = setting(0.05, "share of pixels in the first windows, l_inf", "attacks")
    p_l2: float = setting(0.1, "the same for l_2, on either model", "attacks")
    seeds: int = setting(1, "seeds of ablation, p and targeted", "attacks")
    p: tuple[str, ...] = setting(P_VALUES[:-1], "shares of the study p", "p", choices=P_VALUES)
    stability_seeds: int = setting(10, "seeds of the study seeds", "seeds")
    targeted_eps_linf: float = setting(8 / 255, "l_inf radius", "targeted", unit="input units")
    targeted_eps_l2: float = setting(0.5, "l_2 radius", "targeted", unit="input units")
    targeted_queries_linf: int = setting(100_000, "queries, l_inf", "targeted")
    targeted_queries_l2: int = setting(60_000, "queries, l_2", "targeted")
    targeted_p_linf: float = setting(0.01, "share of pixels, l_inf", "targeted")
    targeted_p_l2: float = setting(0.02, "share of pixels, l_2", "targeted")
    robust_eps_linf: float = setting(0.3, "l_inf radius", "robust", unit="input units")
    robust_eps_l2: float = setting(
        2.0, "smallest l_2 radius; the others are 1.25 and 1.5 times it", "robust",
        unit="input units")
    robust_p: float = setting(0.8, "share of pixels, l_inf", "robust")
    robust_queries: int = setting(20_000, "queries of a restart, l_inf", "robust")
    restarts: int = setting(50, "restarts of Square, l_inf", "robust")
    pgd_steps: int = setting(50, "steps of PGD, of length eps/4", "robust")
    pgd_restarts: tuple[int, ...] = setting((1, 10, 100), "restarts of PGD", "robust")
    seed: int = setting(0, "first seed of everything random", "run")
    batch_size: int = setting(1000, "examples at a time, on all devices", "run", unit="examples")
    workdir: str = setting("runs/square_attack/paper", "folder of the results", "run")
    resume: bool = setting(True, "keep the studies that workdir holds already", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("study", "norms", "p", "pgd_restarts"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one, got none")
        for name in (
            "examples", "robust_examples", "queries", "seeds", "stability_seeds", "restarts",
            "targeted_queries_linf", "targeted_queries_l2", "robust_queries", "batch_size",
        ):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        for number in self.pgd_restarts:
            checks.integer("pgd_restarts", number, at_least=1)
        checks.integer("pgd_steps", self.pgd_steps)
        if self.epochs is not None:
            checks.integer("epochs", self.epochs, at_least=1)
        if self.train_batch_size is not None:
            checks.integer("train_batch_size", self.train_batch_size, at_least=1)
        checks.integer("seed", self.seed, at_most=2**32 - 1 - max(self.seeds, self.stability_seeds))
        for role in ("", "targeted_", "robust_"):
            for norm in ("linf", "l2"):
                name = f"{role}eps_{norm}"
                checks.number(name, getattr(self, name), above=0)
        for name in ("p_linf", "p_l2", "targeted_p_linf", "targeted_p_l2", "robust_p"):
            checks.number(name, getattr(self, name), above=0, at_most=1)

    def training(self, role: str) -> TrainingSettings | None:
        """How the model of a role is trained here; None if it is in a folder already."""
        recipe = RECIPES.get(getattr(self, role))
        if recipe is None:
            return None
        epochs = recipe.epochs if self.epochs is None else self.epochs
        return dataclasses.replace(
            recipe,
            objective=(ROLES[role],),
            epochs=epochs,
            eps_warmup=min(recipe.eps_warmup, epochs),
            batch_size=self.train_batch_size or recipe.batch_size,
            data_dir=self.data_dir,
            seed=self.seed,
            workdir=f"{self.workdir}/models/{role}",
            resume=True,
        )


PRESETS = {
    "small": Settings(
        standard="digits",
        robust="digits",
        examples=200,
        robust_examples=200,
        eps_linf=0.15,
        eps_l2=1.0,
        queries=1000,
        p_linf=0.3,
        p_l2=0.3,
        seeds=3,
        p=("0.0125", "0.3", "0.8"),
        targeted_eps_linf=0.3,
        targeted_eps_l2=1.5,
        targeted_queries_linf=1000,
        targeted_queries_l2=1000,
        targeted_p_linf=0.1,
        targeted_p_l2=0.1,
        robust_eps_linf=0.15,
        robust_eps_l2=0.5,
        robust_p=0.3,
        robust_queries=1000,
        restarts=5,
        pgd_restarts=(1, 10),
        # 200 examples go to the smaller of its two programs, of 70: each attack compiles one.
        batch_size=280,
        workdir="runs/square_attack/small",
    ),
    "paper": Settings(),
}


class Job(NamedTuple):
    """One attack on one model.

    Attributes:
      label: what tells it from the others of its study, by column of the table.
      role: the model, ``"standard"`` or ``"robust"``.
      threat: norm ball and box.
      make: ``make(threat) -> attack``.
      seeds: how many; each runs on all examples.
      examples: how many.
      targeted: attacks towards a random wrong class.
      scale: the logits are multiplied by it.
    """

    label: dict[str, Any]
    role: str
    threat: ThreatModel
    make: functools.partial
    seeds: int
    examples: int
    targeted: bool = False
    scale: float = 1.0


def pgd(threat: ThreatModel, *, steps: int, restarts: int) -> attacks.Attack:
    """PGD with steps of eps/4; an example is broken if any restart breaks it."""
    size = threat.eps / 4
    return attacks.pgd(threat, steps=steps, step_size=size, restarts=restarts, select="any")


def jobs_of(study: str, settings: Settings) -> list[Job]:
    """The jobs of a study; none for pictures and theory."""
    return JOBS[study](settings) if study in JOBS else []


def _threat(norm: str, eps: float) -> ThreatModel:
    return ThreatModel(choices.NORMS[norm], eps)


def _square(settings: Settings, norm: str, **options: Any) -> functools.partial:
    given = {"queries": settings.queries, "p_init": getattr(settings, f"p_{norm}"), **options}
    return functools.partial(attacks.square, **given)


def _job(settings: Settings, label: dict, norm: str, make: Any, **options: Any) -> Job:
    """A job on the standard model at the usual radius, unless the options say otherwise."""
    usual = {
        "role": "standard",
        "threat": _threat(norm, getattr(settings, f"eps_{norm}")),
        "seeds": 1,
        "examples": settings.examples,
    }
    return Job(label={"norm": norm, **label}, make=make, **(usual | options))


def _ablation(settings: Settings) -> list[Job]:
    known = {
        "linf": (("shape", "signs", "init"), LINF_ABLATION),
        "l2": (("update", "init"), L2_ABLATION),
    }
    found = []
    for norm in settings.norms:
        names, variants = known[norm]
        for variant in variants:
            options = dict(zip(names, variant, strict=True))
            make = _square(settings, norm, **options)
            label = {"variant": " ".join(variant[:-1]), "init": variant[-1]}
            found.append(_job(settings, label, norm, make, seeds=settings.seeds))
    return found


def _p(settings: Settings) -> list[Job]:
    return [
        _job(settings, {"p": float(p)}, norm, _square(settings, norm, p_init=float(p)),
             seeds=settings.seeds)
        for norm in settings.norms
        for p in settings.p
    ]  # fmt: skip


def _seeds(settings: Settings) -> list[Job]:
    found = []
    for role in ROLES:
        for norm in settings.norms:
            make, eps = _square(settings, norm), getattr(settings, f"eps_{norm}")
            if role == "robust":
                eps = getattr(settings, f"robust_eps_{norm}")
                if norm == "linf":
                    make = _robust_square(settings)
            found.append(
                _job(settings, {"model": role}, norm, make, role=role, threat=_threat(norm, eps),
                     seeds=settings.stability_seeds)
            )  # fmt: skip
    return found


def _targeted(settings: Settings) -> list[Job]:
    named: dict[str, Callable] = {"cross-entropy": losses.cross_entropy, "margin": losses.margin}
    return [
        _job(
            settings,
            {"loss": name},
            norm,
            _square(
                settings,
                norm,
                queries=getattr(settings, f"targeted_queries_{norm}"),
                p_init=getattr(settings, f"targeted_p_{norm}"),
                targeted=True,
                loss=loss,
            ),
            threat=_threat(norm, getattr(settings, f"targeted_eps_{norm}")),
            seeds=settings.seeds,
            targeted=True,
        )
        for norm in settings.norms
        for name, loss in named.items()
    ]


def _curves(settings: Settings) -> list[Job]:
    found = []
    for norm in settings.norms:
        makers = {"Square": _square(settings, norm)}
        for basis in ("pixel", "dct"):
            makers[f"SimBA ({basis})"] = functools.partial(
                attacks.simba, max_queries=settings.queries, basis=basis
            )
        found += [_job(settings, {"attack": a}, norm, make) for a, make in makers.items()]
    return found


def _robust_square(settings: Settings, **options: Any) -> functools.partial:
    return _square(
        settings, "linf", queries=settings.robust_queries, p_init=settings.robust_p, **options
    )


def _robust(settings: Settings) -> list[Job]:
    """Tables 3.4 and 3.5: white-box and black-box attacks on the model trained for l_inf."""
    white = {
        f"PGD-{settings.pgd_steps}, restarts {r}": functools.partial(
            pgd, steps=settings.pgd_steps, restarts=r
        )
        for r in settings.pgd_restarts
    }
    black = {"Square": _robust_square(settings)}
    if settings.restarts > 1:
        name = f"Square, restarts {settings.restarts}"
        black[name] = _robust_square(settings, restarts=settings.restarts)
    radii = [("linf", settings.robust_eps_linf, white | black)]
    # Steps of 0.5 at the radius 2, as for the published numbers.
    simba = functools.partial(
        attacks.simba, max_queries=settings.queries, step_size=settings.robust_eps_l2 / 4
    )
    black = {"SimBA (pixel)": simba, "Square": _square(settings, "l2")}
    for factor in L2_FACTORS:
        radii.append(("l2", factor * settings.robust_eps_l2, white | black))
    return [
        _job(settings, {"eps": eps, "attack": name}, norm, make, role="robust",
             threat=_threat(norm, eps), examples=settings.robust_examples)
        for norm, eps, makers in radii
        for name, make in makers.items()
    ]  # fmt: skip


def _masking(settings: Settings) -> list[Job]:
    steps, restarts = settings.pgd_steps, min(10, max(settings.pgd_restarts))
    found = []
    for role in ROLES:
        own = role == "robust"
        eps = settings.robust_eps_linf if own else settings.eps_linf
        makers = {
            f"PGD-{steps}-{restarts}": functools.partial(pgd, steps=steps, restarts=restarts),
            "Square": _robust_square(settings) if own else _square(settings, "linf"),
        }
        for name, make in makers.items():
            for scale in SCALES:
                label = {"model": role, "attack": name, "logits times": scale}
                found.append(
                    _job(settings, label, "linf", make, role=role, threat=_threat("linf", eps),
                         scale=scale)
                )  # fmt: skip
    return found


JOBS: Mapping[str, Callable[[Settings], list[Job]]] = {
    "ablation": _ablation,
    "p": _p,
    "seeds": _seeds,
    "targeted": _targeted,
    "curves": _curves,
    "robust": _robust,
    "masking": _masking,
}
