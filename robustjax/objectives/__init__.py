"""Objectives: what training minimises, ``objective(model_fn) -> loss_fn``, one loss per example.

``loss_fn(params, model_state, key, batch) -> (losses (n,), (model_state, metrics))``, where a
batch is ``{"image": (n, ...), "label": (n,), "index": (n,)}`` and metrics are per example.

- ``standard``: ``standard``
- ``adversarial``: ``madry``, ``trades``, ``trades_attack``
- ``scheduled``: ``scheduled`` (settings that change with the step)
"""

from robustjax.objectives.adversarial import madry, trades, trades_attack
from robustjax.objectives.scheduled import scheduled
from robustjax.objectives.standard import LossFn, ModelFn, Objective, standard

__all__ = [
    "LossFn",
    "ModelFn",
    "Objective",
    "madry",
    "scheduled",
    "standard",
    "trades",
    "trades_attack",
]
