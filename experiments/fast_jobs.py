"""The published runs of fast adversarial training: which networks each table and figure needs.

Published numbers are those of Andriushchenko (2024), "Understanding generalization and robustness
in modern deep learning", chapter 2, in per cent: accuracy as it is, and under PGD-50 with ten
restarts on 1000 test examples.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.jobs import Job, over_seeds
from experiments.training_settings import Settings as Training
from robustjax.theory import grad_align_weight

# 30 epochs, triangular learning rate. The best checkpoint is that of early stopping: under PGD-10
# on the first 256 training examples. The model is in training mode during attacks, as in the
# authors' code, whose attacks also record running statistics.
BASE = Training(
    validation_size=0,
    schedule="cyclic",
    learning_rate=0.3,
    milestones=(),
    epochs=30,
    attack_start="zero",
    attack_mode="train",
    selection="train",
    validation_steps=10,
    validation_step_size=0.25,
    validation_loss="cross_entropy",
    monitor=256,
    robust_examples=1000,
)
# SVHN: crops without flips, and five epochs in which the radius grows, the step in single-step
# methods.
SVHN: Mapping[str, Any] = {
    "dataset": "svhn_cropped", "epochs": 15, "learning_rate": 0.05, "augmentation": "crop",
    "eps_warmup": 5,
}  # fmt: skip
STUDIES = ("methods", "eps", "reduced_step", "steps", "curves", "pgd2", "corners", "imagenet",
           "weight", "epochs", "large_eps", "penalties", "variants", "single_layer")  # fmt: skip
METHODS = ("Standard", "FGSM", "FGSM-RS", "FGSM + GradAlign", "Free", "PGD-2", "PGD-2 + GradAlign",
           "PGD-10")  # fmt: skip

# (clean, PGD-50-10[, AutoAttack]).
TABLE_4: Mapping[tuple[int, str], tuple[float, ...]] = {
    (8, "Standard"): (94.03, 0.0),
    (8, "FGSM"): (85.16, 0.02),
    (8, "FGSM-RS"): (84.32, 45.10, 42.80),
    (8, "FGSM + GradAlign"): (81.00, 47.58, 44.54),
    (8, "Free"): (77.92, 45.90),
    (8, "PGD-2"): (82.15, 48.43),
    (8, "PGD-2 + GradAlign"): (81.16, 47.76),
    (8, "PGD-10"): (81.88, 50.04),
    (16, "FGSM"): (73.76, 0.0),
    (16, "FGSM-RS"): (72.18, 0.0),
    (16, "FGSM + GradAlign"): (58.46, 28.88, 20.56),
    (16, "Free"): (48.10, 0.0),
    (16, "PGD-2"): (68.65, 9.92),
    (16, "PGD-2 + GradAlign"): (61.38, 29.80),
    (16, "PGD-10"): (60.28, 33.24),
}
# The text announces 16/255 where the table has 12/255. Rows of 18.50 are constant classifiers,
# on 1000 examples.
TABLE_5: Mapping[tuple[int, str], tuple[float, ...]] = {
    (8, "Standard"): (96.00, 1.00),
    (8, "FGSM"): (91.40, 0.04),
    (8, "FGSM-RS"): (95.38, 0.0),
    (8, "FGSM + GradAlign"): (92.36, 42.08),
    (8, "Free"): (75.34, 43.16),
    (8, "PGD-2"): (92.68, 47.28),
    (8, "PGD-2 + GradAlign"): (92.46, 47.02),
    (8, "PGD-10"): (91.92, 52.08),
    (12, "FGSM"): (88.74, 0.0),
    (12, "FGSM-RS"): (94.70, 0.0),
    (12, "FGSM + GradAlign"): (88.54, 24.04),
    (12, "Free"): (18.50, 18.50),
    (12, "PGD-2"): (92.74, 14.30),
    (12, "PGD-2 + GradAlign"): (87.14, 31.26),
    (12, "PGD-10"): (84.52, 38.32),
}
TABLE_6: Mapping[tuple[int, str], tuple[float, float]] = {
    (2, "FGSM"): (61.7, 42.1), (2, "FGSM-RS"): (59.3, 41.1), (2, "FGSM + GradAlign"): (61.8, 41.4),
    (4, "FGSM"): (56.9, 30.6), (4, "FGSM-RS"): (55.3, 27.8), (4, "FGSM + GradAlign"): (57.8, 30.5),
    (6, "FGSM"): (51.5, 20.6), (6, "FGSM-RS"): (36.6, 0.1), (6, "FGSM + GradAlign"): (51.5, 20.3),
}  # fmt: skip
TABLE_8: Mapping[tuple[int, str], tuple[float, float]] = {
    (8, "gradient"): (77.47, 46.69), (8, "cure"): (80.20, 47.25), (8, "grad_align"): (81.00, 47.58),
    (16, "gradient"): (56.44, 13.64), (16, "cure"): (62.39, 25.38),
    (16, "grad_align"): (58.46, 28.88),
}  # fmt: skip
# Weights of Table 2.8, for gradients of each example's own loss.
PENALTY_WEIGHTS = {(8, "gradient"): 1000.0, (16, "gradient"): 2000.0, (8, "cure"): 700.0,
                   (16, "cure"): 20000.0, (8, "grad_align"): 0.2,
                   (16, "grad_align"): 2.0}  # fmt: skip
# Three sizes of images, each network going on from the one before. The learning rates of the first
# are Wong et al.'s; those of the others, of which only epochs and batches are known, go on from
# where the one before ends.
IMAGENET_STAGES: tuple[dict[str, Any], ...] = (
    {"image_size": 128, "batch_size": 512, "epochs": 6, "learning_rate": 0.4, "cycle_peak": 1 / 6,
     "cycle_end": 0.04},
    {"image_size": 224, "batch_size": 224, "epochs": 6, "learning_rate": 0.04, "cycle_peak": 0.0,
     "cycle_end": 0.004},
    {"image_size": 288, "batch_size": 128, "epochs": 3, "learning_rate": 0.004, "cycle_peak": 0.0,
     "cycle_end": 0.0004},
)  # fmt: skip
LABELS: Mapping[str, tuple[str, ...]] = {
    "methods": ("data set", "eps", "method"),
    "eps": ("data set", "method", "eps"),
    "weight": ("method", "weight"),
    "epochs": ("method", "epochs"),
    "imagenet": ("method", "eps", "pixels"),
    "penalties": ("eps", "penalty"),
    "single_layer": ("network", "eps"),
    **dict.fromkeys(("reduced_step", "steps", "curves", "pgd2", "corners", "large_eps",
                     "variants"), ("method", "eps")),
}  # fmt: skip


def method(name: str, eps: int, *, svhn: bool = False) -> dict[str, Any]:
    """What a method changes in the base settings.

    Args:
      name: one of ``METHODS``.
      eps: radius in 1/255.
      svhn: with the settings of SVHN.
    """
    radius = eps / 255
    single = {"attack": "fgsm", "attack_step_size": radius, "warmup": "step"}
    double = {"attack_steps": 2, "attack_step_size": radius / 2}
    weight = grad_align_weight(radius, *((2.5, 4.0) if svhn else (0.2, 2.0)))
    changes: dict[str, Any] = {
        "Standard": {"objective": ("standard",)},
        "FGSM": single,
        "FGSM-RS": {**single, "attack": "fgsm_rs", "attack_step_size": 1.25 * radius},
        "FGSM + GradAlign": {**single, "penalty": "grad_align", "penalty_weight": float(weight)},
        # The published epochs count steps, of which eight share a minibatch.
        "Free": {"objective": ("standard",), "oracle": "free", "replays": 8,
                 "epochs": 45 if svhn else 96, "learning_rate": 0.01 if svhn else 0.04},
        "PGD-2": double,
        "PGD-2 + GradAlign": {**double, "penalty": "grad_align",
                              "penalty_weight": 0.5 if svhn else 0.1},
        "PGD-10": {"attack_steps": 10, "attack_step_size": radius / 5},
    }[name]  # fmt: skip
    return {**(SVHN if svhn else {}), "eps": radius, **changes}


def jobs_of(
    study: str, base: Training, seeds: int, *, batch_multiple: int | None = None
) -> list[Job]:
    """All networks of a study, each with every seed.

    Args:
      study: one of ``STUDIES``.
      base: what all of them share, with the first seed.
      seeds: how many there are.
      batch_multiple: batches are rounded down to multiples of it; ``None``: as published.
    """
    found = [
        Job(labels, dataclasses.replace(base, **changes), published)
        for labels, changes, published in _rows(study)
    ]
    if batch_multiple is not None:
        found = [job._replace(settings=_rounded(job.settings, batch_multiple)) for job in found]
    return over_seeds(found, seeds)


def _rounded(settings: Training, multiple: int) -> Training:
    size = max(settings.batch_size // multiple, 1) * multiple
    return dataclasses.replace(settings, batch_size=size)


def _rows(study: str) -> list[tuple[tuple[str, ...], dict[str, Any], dict[str, float]]]:
    """Labels, changes to the base settings, and published numbers."""
    columns = ("clean", "PGD-50-10", "AutoAttack")
    if study == "methods":
        return [
            (
                ("SVHN" if svhn else "CIFAR-10", f"{eps}/255", name),
                method(name, eps, svhn=svhn),
                dict(zip(columns, published, strict=False)),
            )
            for svhn, table in ((False, TABLE_4), (True, TABLE_5))
            for (eps, name), published in table.items()
        ]
    if study == "eps":
        return [
            (
                ("SVHN" if svhn else "CIFAR-10", name, f"{eps}/255"),
                method(name, eps, svhn=svhn),
                {},
            )
            for svhn, largest in ((False, 16), (True, 12))
            for name in METHODS
            if name not in ("Standard", "PGD-2 + GradAlign")
            for eps in range(1, largest + 1)
        ]
    if study == "reduced_step":
        stopped = {"FGSM": 36.35, "FGSM, step 7/255": 45.35, "FGSM-RS": 45.60}
        return [
            ((name, "8/255"), _step(name), {"stopped early PGD-50-10": value})
            for name, value in stopped.items()
        ]
    if study == "steps":
        # The steps of Fig. 2.3 are not printed.
        names = [*(f"FGSM, step {k}/255" for k in range(1, 9)), "FGSM-RS"]
        return [((name, "8/255"), _step(name), {}) for name in names]
    if study == "curves":
        return [((name, "8/255"), method(name, 8), {}) for name in ("Standard", "FGSM", "PGD-10")]
    if study == "pgd2":
        double = method("PGD-2", 8)
        rs = {**double, "attack_start": "uniform"}
        full = {**rs, "attack_step_size": 8 / 255}
        return [
            (("PGD-2-RS, step eps/2", "8/255"), rs, {"PGD-50-10": 45.06}),
            (("PGD-2-RS, step eps", "8/255"), full, {"PGD-50-10": 48.07}),
            (("PGD-2, step eps/2", "8/255"), double, {"PGD-50-10": 48.43}),
        ]
    if study == "corners":
        pgd = method("PGD-10", 8)
        return [
            (("FGSM", "8/255"), method("FGSM", 8), {"PGD-50-10": 0.0}),
            (("PGD-10", "8/255"), pgd, {"PGD-50-10": 50.48}),
            (("PGD-10, corners", "8/255"), {**pgd, "attack": "pgd_corner"}, {"PGD-50-10": 50.64}),
        ]
    if study == "imagenet":
        return [row for key, numbers in TABLE_6.items() for row in _imagenet(*key, numbers)]
    if study == "weight":
        aligned = method("FGSM + GradAlign", 16)
        return [
            (("FGSM + GradAlign", f"{w:g}"), {**aligned, "penalty_weight": w}, {})
            for w in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
        ]
    if study == "epochs":
        # 250 in the text of the ablation, up to 200 elsewhere.
        aligned = method("FGSM + GradAlign", 8)
        return [
            (("FGSM + GradAlign", str(n)), {**aligned, "epochs": n}, {})
            for n in (30, 50, 100, 150, 200)
        ]
    if study == "large_eps":
        numbers = {24: (41.80, 17.07), 32: (23.07, 12.93)}
        return [
            (
                ("FGSM + GradAlign", f"{eps}/255"),
                {**method("FGSM + GradAlign", eps), "penalty_weight": 2.0, "learning_rate": 0.1},
                dict(zip(columns, published, strict=False)),
            )
            for eps, published in numbers.items()
        ]
    if study == "penalties":
        return [
            (
                (f"{eps}/255", name),
                {**method("FGSM", eps), "penalty": name,
                 "penalty_weight": PENALTY_WEIGHTS[eps, name]},
                dict(zip(columns, published, strict=False)),
            )
            for (eps, name), published in TABLE_8.items()
        ]  # fmt: skip
    if study == "variants":
        clean = {**method("FGSM", 8), "attack_step_size": 0.0}
        aligned = {"penalty": "grad_align", "penalty_weight": 0.2}
        cure = {"penalty": "cure", "penalty_weight": 700.0}
        return [
            (("FGSM + GradAlign, FGSM point", "8/255"),
             {**method("FGSM", 8), **aligned, "penalty": "grad_align_fgsm"}, {}),
            (("GradAlign alone", "8/255"), {**clean, **aligned}, {}),
            # At FGSM points; quoted with another recipe and PGD-20.
            (("CURE alone", "8/255"), {**clean, **cure}, {"clean": 81.20, "PGD-50-10": 36.30}),
        ]  # fmt: skip
    if study == "single_layer":
        four = {"model": "single_layer_cnn", "precision": "float32", "optimizer": "adam",
                "learning_rate": 0.003}  # fmt: skip
        return [(("4 filters, FGSM", "10/255"), {**method("FGSM", 10), **four}, {})]
    raise ValueError(f"study must be one that trains networks, got {study!r}")


def _step(name: str) -> dict[str, Any]:
    """FGSM or FGSM-RS at 8/255, with the step that the name says."""
    if ", step " not in name:
        return method(name, 8)
    size = int(name.split(", step ")[1].removesuffix("/255"))
    return {**method("FGSM", 8), "attack_step_size": size / 255}


def _imagenet(eps: int, name: str, numbers: tuple[float, float]) -> list[Any]:
    """The three stages of one network; only the last one has published numbers."""
    changes = method(name, eps)
    aligned = name == "FGSM + GradAlign"
    if aligned:
        changes["penalty_weight"] = {2: 0.01, 4: 0.01, 6: 0.1}[eps]
    rows = []
    for stage in IMAGENET_STAGES:
        # Double backpropagation needs more memory.
        batch = {224: 180, 128: 100}.get(stage["batch_size"]) if aligned else None
        own = {**stage, "batch_size": batch or stage["batch_size"]}
        last = stage is IMAGENET_STAGES[-1]
        published = dict(zip(("clean", "PGD-50-10"), numbers, strict=True)) if last else {}
        fixed = {"dataset": "imagenet2012", "placement": "host", "model": "resnet50_imagenet",
                 "augmentation": "none", "weight_decay": 1e-4, "test_batch_size": 100}  # fmt: skip
        labels = (name, f"{eps}/255", str(stage["image_size"]))
        rows.append((labels, {**changes, **fixed, **own}, published))
    return rows
