"""The settings of a training run, shared by the entry points that train: fields, flags, checks."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import choices, command_line
from experiments.command_line import setting
from robustjax import checks
from robustjax.training import report
from robustjax.training.step import NONFINITE


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set, checked when it is made. The defaults are those of ``--preset=paper``.

    Raises:
      ValueError: a setting is out of range or not among its choices. What depends on the data or
        the devices is checked before a run begins.
    """

    # fmt: off
    dataset: str = setting(
        "cifar10", "digits, mnist5k, npz:FILE, folder:DIR or a TFDS name such as cifar10", "data")
    data_dir: str | None = setting(None, "where TFDS sets are prepared", "data")
    validation_size: int | None = setting(
        1000, "examples held out of the training set; None: what comes with the set", "data",
        unit="examples")
    augmentation: str = setting(
        "crop_and_flip", "per-example augmentation", "data", choices=choices.AUGMENTATIONS)
    image_filter: str = setting(
        "none", "cosine frequencies that training images lose after augmentation: those of least "
        "magnitude, or the highest", "data", choices=("none", *choices.FILTERS))
    filter_removed: float = setting(0.0, "how many", "data", unit="percent")
    image_size: int | None = setting(
        None, "images become squares of this side: random rectangles of them in training, their "
        "middle in evaluation; needs placement host. None: as they are", "data", unit="pixels")
    placement: str = setting(
        "device", "where the training set lives", "data", choices=("device", "host"))
    model: str = setting("preact_resnet18", "architecture", "model", choices=tuple(choices.MODELS))
    width: int | None = setting(
        None, "base width (widening factor of wrn); None: the published one", "model",
        unit="channels")
    normalization: str = setting(
        "batch", "normalisation layers of residual networks", "model",
        choices=("batch", "group", "none"))
    batch_statistics: str = setting(
        "separate", "statistics that BatchNorm takes in training; separate: of each device's part "
        "of the batch, as PyTorch's DataParallel; synchronised: of the whole batch, as "
        "SyncBatchNorm. With parameters sharded they are those of the whole batch in any case",
        "model", choices=choices.BATCH_STATISTICS)
    precision: str = setting(
        "bfloat16", "computation in training; parameters, statistics and evaluation are float32",
        "model", choices=tuple(choices.PRECISIONS))
    objective: tuple[str, ...] = setting(
        ("madry",), "what is minimised; several, by commas, train side by side", "objective",
        choices=choices.OBJECTIVES)
    beta: float = setting(6.0, "weight of the divergence in TRADES and MART", "objective")
    max_margin: float | None = setting(
        None, "largest margin that mma raises; None: eps", "objective", unit="input units")
    penalty: str = setting(
        "none", "penalty on the gradient at the clean inputs, added to the objective", "objective",
        choices=("none", *choices.PENALTIES))
    penalty_weight: float = setting(
        1.0, "weight of the penalty, that of foar and soar included", "objective")
    evaluation_point: str = setting(
        "pgd1", "where foar and soar expand the loss", "objective", choices=choices.POINTS)
    penalty_clip: str = setting(
        "none", "what of the penalty is bounded by penalty_bound: each example's value (soar), or "
        "the norm of its gradient", "objective", choices=choices.PENALTY_CLIPS)
    penalty_bound: float = setting(10.0, "see penalty_clip", "objective")
    oracle: str = setting(
        "plain", "how the gradient is taken: examples as they are, or weighted by their gradients' "
        "norms", "gradient", choices=choices.ORACLES)
    alpha: float = setting(5.0, "norm bound of engm, f_engm and a_engm", "gradient")
    alpha_naive: float = setting(0.5, "bound of the input gradients' norms in n_engm", "gradient")
    tau: int = setting(
        50, "from one regression of a_engm to the next", "gradient", unit="steps")
    norm_rule: str = setting(
        "ghost", "how parameter norms are found; vjp is that of BatchNorm in training mode",
        "gradient", choices=tuple(choices.NORM_RULES))
    replays: int = setting(
        8, "steps on each minibatch with oracle free; an epoch counts steps, not passes over the "
        "data", "gradient", unit="steps")
    awp: float = setting(
        0.0, "relative size of adversarial weight perturbations, 0 for none", "gradient")
    awp_warmup: int = setting(
        10, "epochs without weight perturbation", "gradient", unit="epochs")
    norm: str = setting(
        "linf", "norm of the threat model", "threat model", choices=tuple(choices.NORMS))
    eps: float = setting(8 / 255, "radius of the threat model", "threat model", unit="input units")
    eps_warmup: int = setting(
        0, "training starts at radius 0, which grows linearly to eps over these", "threat model",
        unit="epochs")
    warmup: str = setting(
        "radius", "what eps_warmup lets grow: radius and step, or the step alone", "threat model",
        choices=("radius", "step"))
    attack: str = setting("pgd", "attack in training (madry)", "attack", choices=choices.ATTACKS)
    attack_steps: int = setting(10, "steps of the attack in training", "attack")
    attack_step_size: float | None = setting(
        2 / 255, "length of a step; None: that of the attack", "attack", unit="input units")
    attack_rule: str = setting(
        "steepest", "what PGD in training steps by: the steepest direction, or Adam, whose "
        "learning rate is attack_step_size", "attack", choices=choices.STEP_RULES)
    attack_start: str = setting(
        "uniform", "where PGD starts in training", "attack", choices=("zero", "uniform"))
    attack_mode: str = setting(
        "eval", "mode of the model during the attack in training", "attack",
        choices=("eval", "train"))
    optimizer: str = setting("sgd", "optimizer", "optimizer", choices=choices.OPTIMIZERS)
    learning_rate: float = setting(0.1, "largest learning rate", "optimizer")
    momentum: float = setting(0.9, "momentum of sgd, mgnc and sngm", "optimizer")
    max_norm: float = setting(25.0, "norm bound of the batch's gradient in mgnc", "optimizer")
    weight_decay: float = setting(5e-4, "weight decay, coupled (but for adamw)", "optimizer")
    schedule: str = setting(
        "piecewise", "schedule of the learning rate", "optimizer", choices=choices.SCHEDULES)
    milestones: tuple[int, ...] = setting(
        (75, 90), "where a piecewise schedule falls", "optimizer", unit="epochs")
    decay: float = setting(0.1, "factor at a milestone", "optimizer")
    rate_warmup: int = setting(
        0, "the learning rate rises linearly from 0 over these, before a cosine schedule falls",
        "optimizer", unit="epochs")
    start_from: str | None = setting(
        None, "folder WORKDIR/OBJECTIVE of a run; training goes on from its last network", "run")
    pretrained: str | None = setting(
        None, "network to begin with, but for its last layer: the folder of a run, as start_from, "
        "or a file of PyTorch weights (.safetensors, .npz, .pt), as timm's of ViT-B/16", "run")
    frozen: str = setting(
        "none", "what keeps its weights: nothing, or the encoder, all but the last layer; it then "
        "stays in evaluation mode", "run", choices=("none", "encoder"))
    cycle_peak: float = setting(
        0.4, "share of the epochs after which a cyclic schedule is at learning_rate", "optimizer")
    cycle_end: float = setting(0.0, "learning rate at the end of a cyclic schedule", "optimizer")
    epochs: int = setting(120, "passes over the training set", "run", unit="epochs")
    batch_size: int = setting(
        128, "global batch size, divisible by the number of devices", "run", unit="examples")
    seed: int = setting(0, "seed of everything random", "run")
    workdir: str = setting(
        "runs/adversarial_training/paper", "folder of the results, new or to --resume", "run")
    resume: bool = setting(False, "go on with the run in workdir, if there is one", "run")
    dry_run: bool = setting(False, "build, check shapes, count; compute nothing", "run")
    dispatch: int = setting(50, "training steps per call of the compiled function, at most", "run")
    checkpoint_every: int = setting(1, "validation and checkpoint", "run", unit="epochs")
    save_every: int = setting(
        0, "checkpoints to resume from, between validations, at the end of a dispatch; 0: none. A "
        "run that is told to end (SIGTERM) saves one in any case", "run", unit="steps")
    nonfinite: str = setting(
        "stop", "what is done about a loss or gradient that is not finite: end the run with the "
        "state before it saved, or go on without the step, which is recorded", "run",
        choices=NONFINITE)
    parameters: str = setting(
        "replicated", "every device has all parameters and optimizer state, or its share of large "
        "ones, for models that do not fit (batch_statistics are then those of the whole batch)",
        "run", choices=("replicated", "sharded"))
    profile: bool = setting(
        False, "write a trace of the second dispatch to WORKDIR/OBJECTIVE/profile, for TensorBoard "
        "and Perfetto", "run")
    selection: str = setting(
        "validation", "what the best checkpoint is chosen on: the validation set, or the first 256 "
        "training examples", "evaluation", choices=("validation", "train"))
    monitor: int = setting(
        0, "first test examples on which gradient alignment and losses are measured at every "
        "validation", "evaluation", unit="examples")
    probe: int = setting(
        0, "training examples whose gradients are measured at every validation", "evaluation",
        unit="examples")
    probe_train: bool = setting(
        False, "the correlation of their norms with the model in training mode too", "evaluation")
    validation_steps: int = setting(
        20, "steps of PGD on the validation set", "evaluation")
    validation_step_size: float = setting(0.1, "their length, in eps", "evaluation")
    validation_loss: str = setting(
        "margin", "loss of that PGD", "evaluation", choices=tuple(choices.LOSSES))
    test_steps: int = setting(
        50, "steps of PGD on the test set, of length eps/4", "evaluation")
    test_restarts: int = setting(10, "restarts of PGD on the test set", "evaluation")
    robust_examples: int | None = setting(
        None, "first test examples that are attacked; None: all", "evaluation", unit="examples")
    test_batch_size: int = setting(
        1000, "examples at a time in evaluation, filled up to a multiple of the devices; no result "
        "depends on it", "evaluation", unit="examples")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        if len(set(self.objective)) < len(self.objective):
            raise ValueError(f"objective must name each one once, got {','.join(self.objective)}")
        for name in (
            "attack_steps", "validation_steps", "test_steps", "epochs", "eps_warmup", "awp_warmup",
            "probe", "monitor", "rate_warmup", "save_every",
        ):  # fmt: skip
            checks.integer(name, getattr(self, name))
        for name in (
            "batch_size", "test_batch_size", "test_restarts", "dispatch", "checkpoint_every",
            "tau", "replays",
        ):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        checks.integer("seed", self.seed, at_most=2**32 - 1)
        if self.image_size is not None:
            checks.integer("image_size", self.image_size, at_least=1)
            if self.placement != "host":
                raise ValueError(f"placement must be host with image_size, got {self.placement}")
        if self.width is not None:
            checks.integer("width", self.width, at_least=1)
        if self.robust_examples is not None:
            checks.integer("robust_examples", self.robust_examples, at_least=1)
        if self.validation_size is not None:
            checks.integer("validation_size", self.validation_size)
        for name in ("eps", "beta", "weight_decay", "decay", "awp", "penalty_weight"):
            checks.number(name, getattr(self, name), at_least=0)
        if self.max_margin is not None:
            checks.number("max_margin", self.max_margin, above=0)
        if self.attack_step_size is not None:
            checks.number("attack_step_size", self.attack_step_size, at_least=0)
        for name in ("learning_rate", "alpha", "alpha_naive", "max_norm", "penalty_bound",
                     "validation_step_size"):  # fmt: skip
            checks.number(name, getattr(self, name), above=0)
        checks.number("filter_removed", self.filter_removed, at_least=0, below=100)
        checks.number("cycle_peak", self.cycle_peak, at_least=0, at_most=1)
        checks.number("cycle_end", self.cycle_end, at_least=0)
        checks.number("momentum", self.momentum, at_least=0, below=1)
        for before, epoch in zip((0, *self.milestones), self.milestones, strict=False):
            if checks.integer("milestones", epoch) <= before:
                raise ValueError(f"milestones must rise from 1 on, got {self.milestones}")
        self._check_combinations()

    def _check_combinations(self):
        """Refuses settings that do not go together."""
        regularized = self.penalty != "none" or {"foar", "soar"} & set(self.objective)
        if self.penalty_clip != "none" and not regularized:
            raise ValueError(
                f"penalty_clip {self.penalty_clip} needs a penalty, got penalty none and objective "
                f"{','.join(self.objective)}"
            )
        if self.penalty_clip == "value" and "soar" not in self.objective:
            raise ValueError(
                f"penalty_clip value is for objective soar, got {','.join(self.objective)}"
            )
        if self.penalty_clip == "gradient" and (self.oracle != "plain" or self.awp):
            raise ValueError(
                f"penalty_clip gradient needs oracle plain without awp, got {self.oracle}, "
                f"{self.awp:g}"
            )
        if "mma" in self.objective and not (self.max_margin or self.eps):
            raise ValueError("max_margin must be given for mma with eps 0, got None")
        if self.oracle == "free" and (set(self.objective) != {"standard"} or self.awp):
            raise ValueError(
                "oracle free needs objective standard, whose inputs it perturbs, and no awp, got "
                f"{','.join(self.objective)}, {self.awp:g}"
            )
        if self.warmup == "step" and self.eps_warmup and self.attack_step_size is None:
            raise ValueError("attack_step_size must be given for warmup step, got None")
        if self.pretrained is not None and self.start_from is not None:
            raise ValueError(
                f"pretrained must be None with start_from, got {self.pretrained} and "
                f"{self.start_from}"
            )
        if self.attack_rule == "adam" and self.attack_step_size is None:
            raise ValueError("attack_step_size must be given for attack_rule adam, got None")
        if (
            self.norm_rule == "vjp"
            and self.oracle in ("engm", "f_engm", "a_engm")
            and (self.batch_statistics, self.parameters) == ("synchronised", "replicated")
        ):
            raise ValueError(
                "norm_rule vjp pulls losses back through each device's part of the batch and needs "
                f"batch_statistics separate or parameters sharded, got {self.batch_statistics} and "
                f"{self.parameters}"
            )
        if self.rate_warmup and (self.schedule != "cosine" or self.rate_warmup >= self.epochs):
            raise ValueError(
                "rate_warmup must be below epochs and needs schedule cosine, got "
                f"{self.rate_warmup} of {self.epochs}, {self.schedule}"
            )
        if "soar" in (self.penalty, *self.objective) and self.norm != "linf":
            raise ValueError(f"norm must be linf for soar, got {self.norm}")


# Settings that say where and how a run is started, not what it computes: they may change when it is
# resumed.
NOT_OF_THE_RUN = ("workdir", "resume", "dry_run", "data_dir", "save_every", "nonfinite", "profile")


def added_since(folder: str | Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings that the run in ``folder`` was started without, where ``config`` has the defaults.

    A setting is added with what runs did before as its default: such a run can be resumed.
    """
    try:
        old = json.loads((Path(folder) / report.CONFIG).read_text())
    except (OSError, ValueError):
        old = None
    if not isinstance(old, dict):
        return ()  # there is no run, or whoever opens the folder says what is wrong
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    return tuple(
        name for name, value in config.items() if name not in old and value == defaults[name]
    )
