"""Exact small worlds: settings whose answers are known in closed form, to test and to teach.

- ``clipped_gradients``: variance and convergence with bounded gradients; ``clip``,
  ``clipped_variance``, ``variance_bound``; ``descent_bound``, ``best_learning_rate``,
  ``simulate_descent``
- ``frequency_regression``: linear regression in frequency space; risks, irrelevant frequencies,
  gradient descent in closed form, ``simulate`` with any optimizer
- ``linear_networks``: convolutional and fully connected; effective weights and what descent prefers
- ``linear_regression``: training that leaves a model open to attack, its exact adversarial penalty,
  noise as a penalty, augmented and self-trained estimators
- ``logistic_regression``: the surrogates of the attacked loss, and when they vanish
- ``max_margin``: the most robust linear classifier; ``max_margin`` solves, ``descend`` tends to it
- ``norm_balls``: ``ball_volume``
- ``random_search``: ``random_search``, its rate ``gradient_norm_bound`` with the constants of
  ``sphere_constants`` and ``multiple_constants``, the samplers ``sample_single``,
  ``sample_multiple`` and ``sample_sphere`` of its steps
- ``robust_classifiers``: the largest perturbation that a linear classifier withstands, and the
  certificate that no other withstands a larger one
- ``saddle_point``: training under attack and with a penalty; thresholds and failures
- ``sign_descent``: signGD on three frequencies; its table of steps, the drift of the irrelevant
  weight and the adversarial risk it costs
- ``sign_regions``: where it goes; ``step``, ``classify``, ``steps_to_rest``, ``limits``
- ``single_step``: fast adversarial training; ``random_start_rms`` (lemma 1), ``alignment_bounds``
  and ``random_network_alignment`` (lemma 2) with ``network_input_gradient``,
  ``single_filter_alignment``, ``activation_bound``, ``grad_align_weight``
- ``squares``: why squares; ``max_windows``, ``count_windows``, ``mean_response``
- ``trade_offs``: accuracy against robustness, and how many examples each needs; ``FeatureWorld``,
  ``stripe_errors``, ``gaussian_errors``, ``half_space_error``
- ``trust_region``: ``quadratic_maximum`` over a ball and what SOAR bounds it by,
  ``augmented_hessian``, ``augmented_bound``, ``expected_product_norm``

The regressions, ``linear_networks``, ``max_margin``, ``robust_classifiers``, ``saddle_point``,
``sign_descent``, ``sign_regions`` and ``trade_offs`` are used by their modules,
``theory.linear_regression.risk``; all other names are here too.
"""

from robustjax.theory import (
    frequency_regression,
    linear_networks,
    linear_regression,
    logistic_regression,
    max_margin,
    robust_classifiers,
    saddle_point,
    sign_descent,
    sign_regions,
    trade_offs,
)
from robustjax.theory.clipped_gradients import (
    DescentTrace,
    best_learning_rate,
    clip,
    clipped_variance,
    descent_bound,
    simulate_descent,
    variance_bound,
)
from robustjax.theory.norm_balls import ball_volume
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
from robustjax.theory.single_step import (
    AlignmentBounds,
    activation_bound,
    alignment_bounds,
    grad_align_weight,
    network_input_gradient,
    random_network_alignment,
    random_start_rms,
    single_filter_alignment,
)
from robustjax.theory.squares import count_windows, max_windows, mean_response
from robustjax.theory.trust_region import (
    QuadraticMaximum,
    augmented_bound,
    augmented_hessian,
    expected_product_norm,
    quadratic_maximum,
)

__all__ = [
    "AlignmentBounds",
    "DescentTrace",
    "QuadraticMaximum",
    "SearchConstants",
    "SearchTrace",
    "activation_bound",
    "alignment_bounds",
    "augmented_bound",
    "augmented_hessian",
    "ball_volume",
    "best_learning_rate",
    "clip",
    "clipped_variance",
    "correlation_bounds",
    "count_windows",
    "descent_bound",
    "expected_product_norm",
    "frequency_regression",
    "grad_align_weight",
    "gradient_norm_bound",
    "linear_networks",
    "linear_regression",
    "logistic_regression",
    "max_margin",
    "max_windows",
    "mean_response",
    "multiple_constants",
    "network_input_gradient",
    "quadratic_maximum",
    "random_network_alignment",
    "random_search",
    "random_start_rms",
    "robust_classifiers",
    "saddle_point",
    "sample_multiple",
    "sample_single",
    "sample_sphere",
    "sign_descent",
    "sign_regions",
    "simulate_descent",
    "single_filter_alignment",
    "sphere_constants",
    "trade_offs",
    "variance_bound",
]
