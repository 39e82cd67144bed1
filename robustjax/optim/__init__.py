"""Optax transforms: what is done with a gradient once it is there.

* ``steepest``: steepest descent in a norm (gradient descent, signGD, coordinate descent).
* ``normalized``: momentum SGD, and with the gradient of the batch clipped or normalised.
* ``per_example``: momentum SGD with the gradient of each example clipped or normalised (ENGM).
* ``step_policies``: step sizes that follow the loss.
* ``proximal``: proximal gradient descent and FISTA, for penalties and constraints by a norm.
* ``preconditioned``: steepest descent in a quadratic norm.
* ``adaptive``: Adam, RMSProp and signGD as one family.
"""

from robustjax.optim.adaptive import scale_by_adaptive_family
from robustjax.optim.normalized import mean_over_devices, mgnc, msgd, sngm
from robustjax.optim.per_example import (
    clip_per_example,
    engm,
    engm_weights,
    f_engm,
    f_engm_weights,
    mean_over_examples,
    normalize_per_example,
    scale_alpha,
)
from robustjax.optim.preconditioned import scale_by_preconditioner
from robustjax.optim.proximal import (
    FistaState,
    ProximalState,
    ball_constraint,
    fista,
    fista_params,
    norm_penalty,
    proximal_gradient,
    squared_norm_penalty,
)
from robustjax.optim.steepest import scale_by_steepest, sign_gd, steepest_descent
from robustjax.optim.step_policies import scale_by_loss_bound

__all__ = [
    "FistaState",
    "ProximalState",
    "ball_constraint",
    "clip_per_example",
    "engm",
    "engm_weights",
    "f_engm",
    "f_engm_weights",
    "fista",
    "fista_params",
    "mean_over_devices",
    "mean_over_examples",
    "mgnc",
    "msgd",
    "norm_penalty",
    "normalize_per_example",
    "proximal_gradient",
    "scale_alpha",
    "scale_by_adaptive_family",
    "scale_by_loss_bound",
    "scale_by_preconditioner",
    "scale_by_steepest",
    "sign_gd",
    "sngm",
    "squared_norm_penalty",
    "steepest_descent",
]
