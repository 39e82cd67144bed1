"""Exact small worlds: settings whose answers are known in closed form, to test and to teach.

- ``random_search``: ``random_search``, its rate ``gradient_norm_bound`` with the constants of
  ``sphere_constants`` and ``multiple_constants``, the samplers ``sample_single``,
  ``sample_multiple`` and ``sample_sphere`` of its steps
- ``squares``: why squares; ``max_windows``, ``count_windows``, ``mean_response``
"""

from robustjax.theory.random_search import (
    SearchConstants,
    SearchTrace,
    correlation_bounds,
    gradient_norm_bound,
    multiple_constants,
    random_search,
    sample_multiple,
    sample_single,
    sample_sphere,
    sphere_constants,
)
from robustjax.theory.squares import count_windows, max_windows, mean_response

__all__ = [
    "SearchConstants",
    "SearchTrace",
    "correlation_bounds",
    "count_windows",
    "gradient_norm_bound",
    "max_windows",
    "mean_response",
    "multiple_constants",
    "random_search",
    "sample_multiple",
    "sample_single",
    "sample_sphere",
    "sphere_constants",
]
