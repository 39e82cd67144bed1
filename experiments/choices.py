"""Names on the command line and what they stand for: models, norms, attacks, optimizers, schedules.

These tables are the only place where a name becomes a part of the library.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax

from robustjax import attacks, checks, data, dct, gradients, losses, models, objectives, optim
from robustjax.norms import L1, L2, LInf, Norm
from robustjax.threat import ThreatModel

NORMS: Mapping[str, Norm] = {"linf": LInf(), "l2": L2(), "l1": L1()}
PRECISIONS: Mapping[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class DataFacts(NamedTuple):
    """What a dry run must know of a data set that need not be there: shape and sizes.

    Images are ``(h, w, c)``, waveforms ``(samples, 1)``.
    """

    image_shape: tuple[int, ...]
    num_classes: int
    train_size: int


DATA_FACTS: Mapping[str, DataFacts] = {
    "cifar10": DataFacts((32, 32, 3), 10, 50_000),
    "cifar100": DataFacts((32, 32, 3), 100, 50_000),
    "svhn_cropped": DataFacts((32, 32, 3), 10, 73_257),
    "mnist": DataFacts((28, 28, 1), 10, 60_000),
    "fashion_mnist": DataFacts((28, 28, 1), 10, 60_000),
    # Images of several sizes: image_size makes squares of them.
    "caltech101": DataFacts((224, 224, 3), 102, 3_059),
    "imagenette": DataFacts((224, 224, 3), 10, 9_469),
    "imagenet2012": DataFacts((224, 224, 3), 1000, 1_281_167),
    # Ten words, silence, and everything else.
    "speech_commands": DataFacts((16_000, 1), 12, 85_511),
    # Not in TFDS: arrays on disk, see README.
    "npz:tiny_imagenet.npz": DataFacts((64, 64, 3), 200, 100_000),
}


def _residual(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def make(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
        size = {} if width is None else {"width": width}
        return factory(num_classes=num_classes, norm=norm, dtype=dtype, **size)

    return make


def _wide(depth: int) -> Callable[..., nn.Module]:
    def make(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
        return models.WideResNet(
            depth=depth,
            widen_factor=10 if width is None else width,
            num_classes=num_classes,
            norm=norm,
            dtype=dtype,
        )

    return make


def _small_cnn(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
    del norm  # has no normalisation layers
    width = 16 if width is None else width
    return models.SmallCNN(num_classes=num_classes, channels=(width, 2 * width), dtype=dtype)


def _single_layer_cnn(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
    del norm  # has no normalisation layers
    filters = 4 if width is None else width
    return models.SingleLayerCNN(num_classes=num_classes, filters=filters, dtype=dtype)


def _mnist_cnn(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
    del norm  # has no normalisation layers
    width = 16 if width is None else width
    return models.MNISTCNN(num_classes=num_classes, channels=(width, 2 * width), dtype=dtype)


def _m5(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
    width = 128 if width is None else width
    widths = (width, width, 2 * width, 4 * width)
    return models.M5(num_classes=num_classes, widths=widths, norm=norm, dtype=dtype)


def _vit_b16(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
    del norm  # normalises layers
    width = 768 if width is None else width
    return models.ViT_B16(
        num_classes=num_classes,
        width=width,
        mlp_width=4 * width,
        num_heads=max(width // 64, 1),
        mean=0.5,  # as published weights want it
        std=0.5,
        dtype=dtype,
    )


# As the study of optimizers trains it, with or without BatchNorm: Ma, Pan and Farahmand (2023).
_plain_preact18 = functools.partial(
    models.PreActResNet18,
    shortcut="preactivated",
    use_bias=False,
    kernel_init=models.torch_default,
    head_init=models.torch_default,
)


def _mlp(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
    del norm  # has no normalisation layers
    width = 256 if width is None else width
    return models.MLP(features=(width, width), num_classes=num_classes, dtype=dtype)


def _linear(num_classes: int, width: int | None, norm: str, dtype: Any) -> nn.Module:
    del width, norm, dtype  # one affine map, in float32
    return models.Linear(num_classes=num_classes)


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "small_cnn": _small_cnn,
    "single_layer_cnn": _single_layer_cnn,
    "mnist_cnn": _mnist_cnn,
    "m5": _m5,
    "vit_b16": _vit_b16,
    "resnet10": _residual(models.ResNet10),
    "resnet18": _residual(models.ResNet18),
    "resnet34": _residual(models.ResNet34),
    "resnet50": _residual(models.ResNet50),
    "resnet50_imagenet": _residual(functools.partial(models.ResNet50, stem="imagenet")),
    "preact_resnet18": _residual(models.PreActResNet18),
    "preact_resnet18_cifar": _residual(_plain_preact18),
    "preact_resnet18_imagenet": _residual(functools.partial(_plain_preact18, stem="imagenet")),
    "wrn28": _wide(28),
    "wrn34": _wide(34),
    "vgg8": _residual(models.VGG8),
    "cnn6": _residual(models.CNN6),
    "cnn8": _residual(models.CNN8),
}

BATCH_STATISTICS = ("separate", "synchronised")
AUGMENTATIONS = ("none", "flip", "crop", "crop_and_flip")
FILTERS: Mapping[str, Callable[[Any, float], Any]] = {
    "energy": dct.energy_filter,
    "low_pass": dct.low_pass_filter,
}
LOSSES: Mapping[str, Callable] = {"margin": losses.margin, "cross_entropy": losses.cross_entropy}
POINTS = ("pgd1", "random", "zero")
PENALTY_CLIPS = ("none", "value", "gradient")
ATTACKS = ("fgsm", "fgsm_rs", "pgd", "pgd_corner")
STEP_RULES = ("steepest", "adam")
# What an evaluation can run, by name: from the threat model to the attack.
EVALUATION_ATTACKS: Mapping[str, Callable[[ThreatModel], Any]] = {
    "fgsm": attacks.fgsm,
    "bim": lambda threat: attacks.bim(threat, steps=50, step_size=threat.eps / 10),
    "pgd": lambda threat: attacks.pgd(
        threat, steps=50, step_size=threat.eps / 4, restarts=10, select="any"
    ),
    "apgd-ce": attacks.apgd,
    "apgd-dlr": lambda threat: attacks.apgd(threat, loss=losses.dlr),
    "apgd-t": attacks.apgd_targeted,
    "fab": lambda threat: attacks.fab(threat, early_stop=True),
    "fab-t": lambda threat: attacks.fab_targeted(threat, early_stop=True),
    "cw": attacks.carlini_wagner,
    "deepfool": attacks.deepfool,
    "square": attacks.square,
    "simba": lambda threat: attacks.simba(threat, max_queries=5000),
}
OBJECTIVES = ("standard", "madry", "trades", "mart", "mma", "foar", "soar")
OPTIMIZERS = ("sgd", "mgnc", "sngm", "adam", "adamw", "rmsprop", "sign_gd")
ORACLES = ("plain", "engm", "f_engm", "a_engm", "n_engm", "free")
NORM_RULES: Mapping[str, Callable[[], gradients.NormRule]] = {
    "ghost": gradients.ghost_norms,
    "vmap": gradients.vmap_norms,
    "vjp": gradients.vjp_norms,
}
SCHEDULES = ("constant", "piecewise", "cosine", "cyclic")


def _steps_of(rule: str, step_size: float | None) -> dict[str, Any]:
    """What PGD wants to know of its steps; they are Adam's learning rate with the rule ``adam``."""
    checks.choice("rule", rule, STEP_RULES)
    if rule == "adam":
        return {"step_rule": optax.adam(step_size)}
    return {} if step_size is None else {"step_size": step_size}


def make_attack(
    name: str,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float | None,
    start: str,
    rule: str = "steepest",
) -> attacks.Attack:
    """An attack for training; ``steps``, ``start`` and ``rule`` matter to PGD alone."""
    checks.choice("attack", name, ATTACKS)
    if name == "fgsm":
        return attacks.fgsm(threat, step_size=step_size)
    if name == "fgsm_rs":
        return attacks.fgsm_rs(threat, step_size=step_size)
    corner = name == "pgd_corner"
    return attacks.pgd(
        threat, steps=steps, start=start, corner=corner, **_steps_of(rule, step_size)
    )


def make_objective(
    name: str,
    threat: ThreatModel,
    attack: attacks.Attack,
    *,
    steps: int,
    step_size: float | None,
    beta: float,
    attack_mode: str,
    rule: str = "steepest",
    max_margin: float | None = None,
    point: str = "pgd1",
    weight: float = 1.0,
    clip: float | None = None,
) -> objectives.Objective:
    """An objective; TRADES and MMA bring their own inner attacks, TRADES with these steps.

    ``beta`` is the weight of the divergence in TRADES and MART, ``max_margin`` the largest margin
    that MMA raises, if it is not that of the threat model. FOAR and SOAR expand the loss at
    ``point``; ``weight`` is that of their penalty, ``clip`` the most that SOAR's may be.
    """
    checks.choice("objective", name, OBJECTIVES)
    if name == "standard":
        return objectives.standard()
    if name == "madry":
        return objectives.madry(attack, attack_mode=attack_mode)
    if name in ("foar", "soar"):
        at, radius = objectives.evaluation_point(threat, point)
        if name == "foar":
            penalty = objectives.first_order(radius, norm=threat.norm)
        else:
            penalty = objectives.soar(radius, clip=clip)
        base = objectives.madry(at, attack_mode=attack_mode)
        return objectives.penalized(base, penalty, weight=weight, at="adversarial")
    if name == "mma":
        hinge = threat if max_margin is None else dataclasses.replace(threat, eps=max_margin)
        return objectives.mma(
            hinge, attack=objectives.an_pgd(hinge, steps=max(steps, 1)), attack_mode=attack_mode
        )
    if name == "mart":
        return objectives.mart(attack, beta=beta, attack_mode=attack_mode)
    inner = objectives.trades_attack(threat, steps=steps, **_steps_of(rule, step_size))
    return objectives.trades(inner, beta=beta, attack_mode=attack_mode)


PENALTIES: Mapping[str, Callable[[ThreatModel], objectives.Penalty]] = {
    "grad_align": lambda threat: objectives.grad_align(threat.eps, norm=threat.norm),
    "grad_align_fgsm": lambda threat: objectives.grad_align(
        threat.eps, norm=threat.norm, point="fgsm"
    ),
    "gradient": lambda threat: objectives.gradient_penalty(),
    "cure": lambda threat: objectives.cure(threat.eps),
    "llr": lambda threat: objectives.local_linearity(threat.eps, norm=threat.norm),
    "foar": lambda threat: objectives.first_order(threat.eps, norm=threat.norm),
    "soar": lambda threat: objectives.soar(threat.eps),
}


def add_penalty(
    objective: objectives.Objective, name: str, weight: float, threat: ThreatModel
) -> objectives.Objective:
    """The objective with a penalty on input gradients at the clean inputs; ``"none"`` leaves it."""
    checks.choice("penalty", name, ("none", *PENALTIES))
    if name == "none":
        return objective
    return objectives.penalized(objective, PENALTIES[name](threat), weight=weight)


def make_augmentation(
    name: str, *, image_filter: str = "none", removed: float = 0.0
) -> data.Augment | None:
    """Random flips, or crops with a margin of four pixels; then a filter of cosine frequencies."""
    checks.choice("augmentation", name, AUGMENTATIONS)
    augment = {"none": None, "flip": data.crop_and_flip(0), "crop": data.crop(4),
               "crop_and_flip": data.crop_and_flip(4)}[name]  # fmt: skip
    checks.choice("image_filter", image_filter, ("none", *FILTERS))
    if image_filter == "none":
        return augment
    before = data.identity if augment is None else augment
    return lambda keys, x: FILTERS[image_filter](before(keys, x), removed)


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    milestones: tuple[int, ...],
    decay: float,
    peak: float = 0.4,
    end: float = 0.0,
    warmup: int = 0,
) -> optax.Schedule:
    """The learning rate at each step.

    ``piecewise`` multiplies by ``decay`` at each of the milestones, in epochs; ``cosine`` falls to
    0, after a linear rise from 0 over ``warmup`` epochs; ``cyclic`` rises linearly from 0 over the
    share ``peak`` of the epochs, whole ones, and falls linearly to ``end``.
    """
    checks.choice("schedule", name, SCHEDULES)
    total = max(epochs * steps_per_epoch, 1)
    if name == "piecewise":
        return optax.piecewise_constant_schedule(
            learning_rate, {epoch * steps_per_epoch: decay for epoch in milestones}
        )
    if name == "cosine":
        if warmup:
            rise = warmup * steps_per_epoch
            return optax.warmup_cosine_decay_schedule(0.0, learning_rate, rise, total)
        return optax.cosine_decay_schedule(learning_rate, total)
    if name == "cyclic":
        whole = int(peak * epochs + 1e-9)
        rise = (max(whole, 1) if peak else 0) * steps_per_epoch
        fall = optax.linear_schedule(learning_rate, end, max(total - rise, 1))
        if not rise:
            return fall
        return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, rise), fall], [rise])
    return optax.constant_schedule(learning_rate)


def make_oracle(
    name: str,
    *,
    alpha: float,
    alpha_naive: float,
    tau: int,
    norm_rule: str,
    awp: float,
    awp_warmup: int,
    axis_name: str | None,
    threat: ThreatModel,
    batch_shape: tuple[int, ...],
    replays: int,
    growth: optax.Schedule | None,
    penalty_norm: float | None,
) -> gradients.Oracle:
    """How the gradient is taken; ``awp > 0`` takes it at adversarially perturbed weights.

    ``alpha`` bounds parameter norms, ``alpha_naive`` the input norms of ``n_engm``; ``awp_warmup``
    is in steps. ``threat``, ``batch_shape`` (of the images of a global batch), ``replays`` and
    ``growth`` (the factor of its radius at each step) are for ``free``. ``penalty_norm`` bounds the
    norm of the penalty's gradient.
    """
    if penalty_norm is not None:
        return gradients.clip_penalty(penalty_norm, axis_name=axis_name)
    checks.choice("oracle", name, ORACLES)
    norms = NORM_RULES[norm_rule]()
    oracle = {
        "plain": lambda: gradients.plain(),
        "engm": lambda: gradients.engm(alpha, norms=norms),
        "f_engm": lambda: gradients.f_engm(alpha, norms=norms),
        "a_engm": lambda: gradients.a_engm(alpha, tau=tau, norms=norms, axis_name=axis_name),
        "n_engm": lambda: gradients.n_engm(alpha_naive),
        "free": lambda: gradients.free(
            threat, batch_shape, replays=replays, schedule=growth, axis_name=axis_name
        ),
    }[name]()
    if awp:
        oracle = gradients.awp(awp, oracle=oracle, warmup=awp_warmup, axis_name=axis_name)
    return oracle


def make_optimizer(
    name: str, schedule: optax.Schedule, *, momentum: float, weight_decay: float, max_norm: float
) -> optax.GradientTransformation:
    """An optimizer; weight decay is coupled (added to the gradient) but for ``adamw``."""
    checks.choice("optimizer", name, OPTIMIZERS)
    outer = {"momentum": momentum, "weight_decay": weight_decay}
    if name == "sgd":
        return optim.msgd(schedule, **outer)
    if name == "mgnc":
        return optim.mgnc(schedule, max_norm=max_norm, **outer)
    if name == "sngm":
        return optim.sngm(schedule, **outer)
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=weight_decay)
    base = {
        "adam": lambda: optax.adam(schedule),
        # The constants of PyTorch; optax has 0.9, and eps under the root.
        "rmsprop": lambda: optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False),
        "sign_gd": lambda: optim.sign_gd(schedule),
    }[name]()
    return optax.chain(optax.add_decayed_weights(weight_decay), base) if weight_decay else base
