"""Training: state, step, loop, devices, checkpoints, reports.

- ``state``: ``TrainState``, ``create_state``, ``parameter_count``
- ``step``: ``train_step``; ``guarded_step``, which takes no step into NaN; ``several_steps``,
  ``several_resident_steps`` (many in one dispatch)
- ``evaluate``: ``make_evaluator``, ``adversarial_panel``
- ``checkpoint``: ``open_checkpoints``, ``save``, ``restore``, ``restore_latest``
- ``loop``: ``fit``, ``steps_per_dispatch``, ``NonFiniteLoss``
- ``interruption``: ``watch`` for SIGTERM
- ``report``, ``figures``: run folders, metrics, tables, pictures
- ``progress``: ``Progress`` with speed and time left, ``Trace`` for a profiler
- ``flops``: ``count_flops``; ``passes``: ``counted``, ``count_passes``
- ``memory``: ``peak_bytes``, ``tree_bytes``
"""

from robustjax.training import checkpoint, figures, interruption, progress, report
from robustjax.training.evaluate import adversarial_panel, make_evaluator
from robustjax.training.flops import count_flops
from robustjax.training.loop import NonFiniteLoss, fit, steps_per_dispatch
from robustjax.training.memory import peak_bytes, tree_bytes
from robustjax.training.passes import Passes, count_passes, counted
from robustjax.training.state import TrainState, create_state, parameter_count
from robustjax.training.step import (
    guarded_step,
    several_resident_steps,
    several_steps,
    train_step,
)

__all__ = [
    "NonFiniteLoss",
    "Passes",
    "TrainState",
    "adversarial_panel",
    "checkpoint",
    "count_flops",
    "count_passes",
    "counted",
    "create_state",
    "figures",
    "fit",
    "guarded_step",
    "interruption",
    "make_evaluator",
    "parameter_count",
    "peak_bytes",
    "progress",
    "report",
    "several_resident_steps",
    "several_steps",
    "steps_per_dispatch",
    "train_step",
    "tree_bytes",
]
