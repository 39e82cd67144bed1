"""Measurements of models, attacks and training runs.

- ``accuracy``: ``correct``, ``instantaneous_accuracy``, ``cumulative_accuracy``
- ``minimum_norm``: ``minimum_norm_report``, ``robust_accuracy_curve``, ``relative_perturbation``:
  from the distance of each example to robust accuracy over eps
- ``margins``: ``linear_margin``, ``binary_margin``, ``multiclass_margin``: first-order estimates of
  that distance; ``max_eps``, ``bisect_max_eps`` with ``no_error``, ``near_clean``: the largest
  radius that a model withstands
- ``queries``: ``query_statistics``, ``common_query_statistics``, ``success_curve``: of black-box
  attacks
"""

from robustjax.metrics.accuracy import correct, cumulative_accuracy, instantaneous_accuracy
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
from robustjax.metrics.queries import (
    QueryStatistics,
    common_query_statistics,
    query_statistics,
    success_curve,
)

__all__ = [
    "MinimumNormReport",
    "QueryStatistics",
    "binary_margin",
    "bisect_max_eps",
    "common_query_statistics",
    "correct",
    "cumulative_accuracy",
    "instantaneous_accuracy",
    "linear_margin",
    "max_eps",
    "minimum_norm_report",
    "multiclass_margin",
    "near_clean",
    "no_error",
    "query_statistics",
    "relative_perturbation",
    "robust_accuracy_curve",
    "success_curve",
]
