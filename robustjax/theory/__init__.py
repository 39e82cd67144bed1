"""Exact small worlds: settings whose answers are known in closed form, to test and to teach.

- ``clipped_gradients``: variance and convergence with bounded gradients; ``clip``,
  ``clipped_variance``, ``variance_bound``; ``descent_bound``, ``best_learning_rate``,
  ``simulate_descent``
- ``random_search``: ``random_search``, its rate ``gradient_norm_bound`` with the constants of
  ``sphere_constants`` and ``multiple_constants``, the samplers ``sample_single``,
  ``sample_multiple`` and ``sample_sphere`` of its steps
- ``squares``: why squares; ``max_windows``, ``count_windows``, ``mean_response``
"""

from robustjax.theory.clipped_gradients import (
    DescentTrace,
    best_learning_rate,
    clip,
    clipped_variance,
    descent_bound,
    simulate_descent,
    variance_bound,
)
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
    "DescentTrace",
    "SearchConstants",
    "SearchTrace",
    "best_learning_rate",
    "clip",
    "clipped_variance",
    "correlation_bounds",
    "count_windows",
    "descent_bound",
    "gradient_norm_bound",
    "max_windows",
    "mean_response",
    "multiple_constants",
    "random_search",
    "sample_multiple",
    "sample_single",
    "sample_sphere",
    "simulate_descent",
    "sphere_constants",
    "variance_bound",
]
