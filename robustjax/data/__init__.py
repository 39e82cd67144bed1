"""Data: sets by name, augmentation, and batches with an exact position.

sources      ``load`` (in memory) and ``load_source`` (random access): embedded sets, arrays and
             image folders on disk, TensorFlow Datasets; one rule for train, validation and test
dataset      what they give: ``Dataset``, ``Source``, ``materialise``; ``as_float`` and the
             ``bounds`` of images and waveforms; the stratified ``hold_out``
synthetic    ``tones``: waveforms whose class is their pitch
files        ``.npz`` archives and image folders
tfds         prepared TensorFlow Datasets
label_noise  ``redraw_labels`` of a share of the examples
augment      random crops and flips, one key per example
resize       images of any size to squares of one, on the host
pipeline     batches on the device, on the host (grain, one part per process) and for evaluation
"""

from robustjax.data.augment import Augment, crop, crop_and_flip, identity, random_crop, random_flip
from robustjax.data.dataset import (
    Dataset,
    Source,
    as_float,
    bounds,
    check_values,
    hold_out,
    materialise,
)
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
from robustjax.data.resize import center_crop, mapped, random_resized_crop
from robustjax.data.sources import load, load_source
from robustjax.data.synthetic import tones

__all__ = [
    "Augment",
    "Dataset",
    "Source",
    "as_float",
    "batch_indices",
    "bounds",
    "center_crop",
    "check_values",
    "crop",
    "crop_and_flip",
    "epoch_batches",
    "epoch_order",
    "eval_batches",
    "hold_out",
    "host_batches",
    "identity",
    "load",
    "load_source",
    "mapped",
    "materialise",
    "on_device",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "redraw_labels",
    "steps_per_epoch",
    "take",
    "tones",
]
