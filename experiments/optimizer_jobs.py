"""The published networks of SGD against adaptive gradient methods: which runs each table needs.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", chapter 4 and appendix
4.A, and its public code. 200 epochs, a tenth of the learning rate from 100 and a hundredth from 150
on; batches of 128, of 32 for images of 224x224 pixels; inputs are not normalised. The checkpoint
that is most accurate on held-out training examples is measured; how many is not printed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import jobs
from experiments import optimizer_published as published
from experiments.jobs import Job
from experiments.optimizer_networks import NAMES
from experiments.optimizer_published import OPTIMIZERS, Rows
from experiments.training_settings import Settings as Training

# Nothing is attacked while it is trained: validation and test see the clean examples, and once
# more a random point within radius 0.
BASE = Training(
    objective=("standard",), model="preact_resnet18_cifar", normalization="none",
    precision="float32", weight_decay=0.0, momentum=0.0, epochs=200, milestones=(100, 150),
    eps=0.0, augmentation="none", validation_steps=0, test_steps=0, test_restarts=1,
    robust_examples=1,
)  # fmt: skip


class Task(NamedTuple):
    """A data set and how networks are trained on it.

    Attributes:
      changes: fields of the training settings.
      rates: first learning rates of SGD, Adam and RMSProp (table 4.2).
    """

    changes: Mapping[str, Any]
    rates: tuple[float, float, float]


# Of images of several sizes random rectangles are seen in training, flipped or not, as in earlier
# public code; the text has flips alone.
_LARGE = {"model": "preact_resnet18_imagenet", "image_size": 224, "placement": "host",
          "batch_size": 32, "test_batch_size": 100}  # fmt: skip
TASKS: Mapping[str, Task] = {
    "MNIST": Task({"dataset": "mnist", "model": "mnist_cnn"}, (0.1, 0.0005, 0.0005)),
    "Fashion-MNIST": Task(
        {"dataset": "fashion_mnist", "model": "mnist_cnn", "augmentation": "flip"},
        (0.1, 0.0005, 0.0005),
    ),
    "CIFAR-10": Task({"dataset": "cifar10", "augmentation": "flip"}, (0.2, 0.0002, 0.0005)),
    "CIFAR-100": Task({"dataset": "cifar100", "augmentation": "flip"}, (0.3, 0.0005, 0.0005)),
    "SVHN": Task({"dataset": "svhn_cropped"}, (0.2, 0.0002, 0.0002)),
    # 3,059 training examples: a tenth of them is held out.
    "Caltech-101": Task(
        {**_LARGE, "dataset": "caltech101", "validation_size": 306}, (0.05, 0.0002, 0.001)
    ),
    "Imagenette": Task({**_LARGE, "dataset": "imagenette"}, (0.1, 0.0002, 0.0002)),
    # The set has validation examples of its own. M5, with its batch normalisation; one paragraph
    # names the residual network instead.
    "Speech Commands": Task(
        {"dataset": "speech_commands", "model": "m5", "normalization": "batch",
         "validation_size": None},
        (0.1, 0.1, 0.1),
    ),
}  # fmt: skip
VISION = tuple(published.TABLE_4_3)
BATCH_NORM = {"normalization": "batch"}
# The last layer of a pretrained ViT-B/16; the length of the warm-up is not printed.
HEAD: Mapping[str, Any] = {
    "model": "vit_b16", "frozen": "encoder", "epochs": 10, "schedule": "cosine", "milestones": (),
    "rate_warmup": 1, "learning_rate": 0.01, "batch_size": 512,
}  # fmt: skip


class Table(NamedTuple):
    """A table of the thesis.

    Attributes:
      rows: published numbers, by data set and optimizer.
      changes: what its networks change in the settings of their data sets.
      kind: a word for these networks; none for those of table 4.3.
    """

    rows: Mapping[str, Rows]
    changes: Mapping[str, Any] = {}
    kind: str = ""


TABLES: Mapping[str, Table] = {
    "robustness": Table(published.TABLE_4_3),
    "batchnorm": Table(published.TABLE_4_4, BATCH_NORM, "batch norm"),
    "head": Table(published.TABLE_4_5, HEAD, "ViT head"),
    "audio": Table(published.TABLE_4_6),
    "momentum": Table(
        {
            data: {"SGD": published.TABLE_4_3[data]["SGD"], **rows}
            for data, rows in published.TABLE_4_7.items()
        }
    ),
}
FILTERS = {"energy": "energy", "low-pass": "low_pass"}
REMOVED = (10, 30, 50, 70, 90)
# Studies of spectra and pictures: whether they need the networks of the first table.
PICTURES: Mapping[str, bool] = {"bands": True, "perturbed": True, "energy": False, "panels": False}
STUDIES = (*TABLES, "filters", *PICTURES)
# What a study can be asked for, where it is less than all data sets.
COVERED: Mapping[str, tuple[str, ...]] = {
    **{study: tuple(table.rows) for study, table in TABLES.items()},
    **dict.fromkeys(("filters", *PICTURES), VISION),
}


def job(
    base: Training,
    data: str,
    optimizer: str,
    *,
    kind: str = "",
    changes: Mapping[str, Any] | None = None,
) -> Job:
    """The training of one network.

    Args:
      base: what all runs share.
      data: one of ``TASKS``.
      optimizer: one of ``optimizer_networks.NAMES``.
      kind: a word for what the changes make of it.
      changes: fields of the training settings.
    """
    task = TASKS[data]
    name, momentum = NAMES[optimizer]
    own = {
        "learning_rate": task.rates[OPTIMIZERS.index(optimizer.removesuffix("-m"))],
        **task.changes,
        "optimizer": name,
        "momentum": momentum,
        **(changes or {}),
    }
    return Job((f"{data}, {kind}" if kind else data, optimizer), dataclasses.replace(base, **own))


def jobs_of(study: str, base: Training, data: str, folder: Path) -> list[Job]:
    """The networks that a study measures on one data set, with published numbers, in folders.

    Args:
      study: one of ``STUDIES``.
      base: what all runs share, with the seed.
      data: one of ``COVERED[study]``.
      folder: of all networks.
    """
    found: list[Job] = []
    if study in TABLES:
        table = TABLES[study]
        for optimizer, row in table.rows[data].items():
            known = dict(zip(published.SEVERITIES[data].columns, row, strict=True))
            more = published.TABLE_4_3_TOP_5.get(data, {}).get(optimizer)
            if more is not None and table.kind == "":
                known |= dict(
                    zip(published.top(published.SEVERITIES[data].columns, 5), more, strict=True)
                )
            if study == "robustness":
                bound, average = published.TABLE_4_1[data][optimizer]
                known |= {"average": average, "Lipschitz bound": bound}
            one = job(base, data, optimizer, kind=table.kind, changes=table.changes)
            found.append(one._replace(published=known))
    elif study == "filters":
        found.append(job(base, data, "SGD"))
        for name, image_filter in FILTERS.items():
            for p in REMOVED:
                changes = {"image_filter": image_filter, "filter_removed": float(p)}
                found.append(job(base, data, "SGD", kind=f"{name} {p}", changes=changes))
    elif PICTURES[study]:
        found += [job(base, data, optimizer) for optimizer in OPTIMIZERS]
    return jobs.placed(found, folder)
