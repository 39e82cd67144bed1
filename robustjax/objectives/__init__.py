"""Objectives: what training minimises, ``objective(model_fn) -> loss_fn``, one loss per example.

``loss_fn(params, model_state, key, batch) -> (losses (n,), (model_state, metrics))``, where a
batch is ``{"image": (n, ...), "label": (n,), "index": (n,)}`` and metrics are per example.

- ``standard``: ``standard``
- ``adversarial``: ``madry``, ``trades``, ``trades_attack``, ``mart``
- ``margin``: ``mma``, ``an_pgd``: adversarial training at the decision boundary
- ``stages``: ``Stages``, ``stages``, ``outer_only``: inner maximisation and outer loss apart
- ``regularized``: ``penalized`` (any objective plus a penalty), ``grad_align``, ``first_order``
  (FOAR), ``gradient_penalty``, ``cure``, ``local_linearity`` (LLR), ``logit_squeezing``,
  ``clean_logit_pairing``
- ``second_order``: ``soar``, ``augmented_hessian_product``, ``evaluation_point``
- ``scheduled``: ``scheduled`` (settings that change with the step)
"""

from robustjax.objectives.adversarial import madry, mart, trades, trades_attack
from robustjax.objectives.margin import an_pgd, mma
from robustjax.objectives.regularized import (
    Penalty,
    clean_logit_pairing,
    cure,
    first_order,
    grad_align,
    gradient_penalty,
    local_linearity,
    logit_squeezing,
    penalized,
)
from robustjax.objectives.scheduled import scheduled
from robustjax.objectives.second_order import (
    augmented_hessian_product,
    evaluation_point,
    soar,
)
from robustjax.objectives.stages import LossFn, Stages, outer_only, stages
from robustjax.objectives.standard import ModelFn, Objective, standard

__all__ = [
    "LossFn",
    "ModelFn",
    "Objective",
    "Penalty",
    "Stages",
    "an_pgd",
    "augmented_hessian_product",
    "clean_logit_pairing",
    "cure",
    "evaluation_point",
    "first_order",
    "grad_align",
    "gradient_penalty",
    "local_linearity",
    "logit_squeezing",
    "madry",
    "mart",
    "mma",
    "outer_only",
    "penalized",
    "scheduled",
    "soar",
    "stages",
    "standard",
    "trades",
    "trades_attack",
]
