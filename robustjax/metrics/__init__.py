"""Measurements of models, attacks and training runs.

- ``accuracy``: ``correct``, ``accuracy_drop`` under noise, ``instantaneous_accuracy``,
  ``cumulative_accuracy``
- ``minimum_norm``: ``minimum_norm_report``, ``robust_accuracy_curve``, ``relative_perturbation``:
  from the distance of each example to robust accuracy over eps
- ``margins``: ``linear_margin``, ``binary_margin``, ``multiclass_margin``: first-order estimates of
  that distance; ``max_eps``, ``bisect_max_eps`` with ``no_error``, ``near_clean``: the largest
  radius that a model withstands
- ``gradients``: ``gradient_moments``, ``correlation``, ``weight_error``,
  ``regressed_weight_error`` of per-example gradients;
  ``robust_overfitting``
- ``overfitting``: ``catastrophic_overfitting``, ``early_stopping``: from the curves of a training
- ``alignment``: ``gradient_alignment``, ``linearization_error``: how linear the loss is around an
  example; ``input_gradient``, ``cosine``; ``ForwardPass``, one that is used more than once
- ``landscape``: ``loss_plane`` around an example, and its ``curvature``
- ``statistics``: ``bootstrap_mean`` over seeds
- ``queries``: ``query_statistics``, ``common_query_statistics``, ``success_curve``: of black-box
  attacks
"""

from robustjax.metrics.accuracy import (
    accuracy_drop,
    correct,
    cumulative_accuracy,
    instantaneous_accuracy,
)
from robustjax.metrics.alignment import (
    ForwardPass,
    cosine,
    gradient_alignment,
    input_gradient,
    linearization_error,
)
from robustjax.metrics.gradients import (
    GradientMoments,
    correlation,
    gradient_moments,
    regressed_weight_error,
    robust_overfitting,
    weight_error,
)
from robustjax.metrics.landscape import LossPlane, curvature, loss_plane
from robustjax.metrics.margins import (
    binary_margin,
    bisect_max_eps,
    linear_margin,
    max_eps,
    multiclass_margin,
    near_clean,
    no_error,
)
from robustjax.metrics.minimum_norm import (
    MinimumNormReport,
    minimum_norm_report,
    relative_perturbation,
    robust_accuracy_curve,
)
from robustjax.metrics.overfitting import catastrophic_overfitting, early_stopping
from robustjax.metrics.queries import (
    QueryStatistics,
    common_query_statistics,
    query_statistics,
    success_curve,
)
from robustjax.metrics.statistics import ConfidenceInterval, bootstrap_mean

__all__ = [
    "ConfidenceInterval",
    "ForwardPass",
    "GradientMoments",
    "LossPlane",
    "MinimumNormReport",
    "QueryStatistics",
    "accuracy_drop",
    "binary_margin",
    "bisect_max_eps",
    "bootstrap_mean",
    "catastrophic_overfitting",
    "common_query_statistics",
    "correct",
    "correlation",
    "cosine",
    "cumulative_accuracy",
    "curvature",
    "early_stopping",
    "gradient_alignment",
    "gradient_moments",
    "input_gradient",
    "instantaneous_accuracy",
    "linear_margin",
    "linearization_error",
    "loss_plane",
    "max_eps",
    "minimum_norm_report",
    "multiclass_margin",
    "near_clean",
    "no_error",
    "query_statistics",
    "regressed_weight_error",
    "relative_perturbation",
    "robust_accuracy_curve",
    "robust_overfitting",
    "success_curve",
    "weight_error",
]
