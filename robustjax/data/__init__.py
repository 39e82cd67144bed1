"""Data: sets by name, augmentation, and batches with an exact position.

sources      ``load`` (in memory) and ``load_source`` (random access): embedded sets, arrays and
             image folders on disk, TensorFlow Datasets; one rule for train, validation and test
dataset      what they give: ``Dataset``, ``Source``; ``as_float``; the stratified ``hold_out``
files        ``.npz`` archives and image folders
tfds         prepared TensorFlow Datasets
label_noise  ``redraw_labels`` of a share of the examples
augment      random crops and flips, one key per example
pipeline     batches on the device, on the host (grain, one part per process) and for evaluation
"""

from robustjax.data.augment import Augment, crop_and_flip, identity, random_crop, random_flip
from robustjax.data.dataset import Dataset, Source, as_float, hold_out
from robustjax.data.label_noise import redraw_labels
from robustjax.data.pipeline import (
    batch_indices,
    epoch_batches,
    epoch_order,
    eval_batches,
    host_batches,
    on_device,
    steps_per_epoch,
    take,
)
from robustjax.data.sources import load, load_source

__all__ = [
    "Augment",
    "Dataset",
    "Source",
    "as_float",
    "batch_indices",
    "crop_and_flip",
    "epoch_batches",
    "epoch_order",
    "eval_batches",
    "hold_out",
    "host_batches",
    "identity",
    "load",
    "load_source",
    "on_device",
    "random_crop",
    "random_flip",
    "redraw_labels",
    "steps_per_epoch",
    "take",
]
