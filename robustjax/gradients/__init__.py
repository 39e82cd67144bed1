"""Gradient oracles: how the gradient is computed, ``(init, oracle)`` with ``oracle(loss_fn)``.

- ``plain``: ``plain`` (the gradient of the mean loss), ``Oracle``
- ``engm``: ``engm``, ``f_engm``, ``a_engm``, ``n_engm`` (examples weighted by the norms of their
  gradients), ``reweighted`` (by any rule)
- ``free``: ``free``, ``FreeState`` (free adversarial training: perturbations in the state)
- ``penalty``: ``clip_penalty`` (the gradient of a penalty clipped on its own)
- ``sharpness``: ``awp`` (adversarial weight perturbation around any of the others)
- ``per_example``: ``ghost_norms``, ``vmap_norms``, ``vjp_norms``, ``input_gradient_norms``: norms
  of per-example gradients; ``gradient_probe`` measures them on a set
- ``ghost``: ``layer_norms``, what ``ghost_norms`` rests on
"""

from robustjax.gradients.engm import AENGMState, a_engm, engm, f_engm, n_engm, reweighted
from robustjax.gradients.free import FreeState, free
from robustjax.gradients.ghost import layer_norms
from robustjax.gradients.penalty import clip_penalty
from robustjax.gradients.per_example import (
    GradientProbe,
    NormRule,
    ghost_norms,
    gradient_probe,
    input_gradient_norms,
    vjp_norms,
    vmap_norms,
)
from robustjax.gradients.plain import Oracle, plain
from robustjax.gradients.sharpness import awp

__all__ = [
    "AENGMState",
    "FreeState",
    "GradientProbe",
    "NormRule",
    "Oracle",
    "a_engm",
    "awp",
    "clip_penalty",
    "engm",
    "f_engm",
    "free",
    "ghost_norms",
    "gradient_probe",
    "input_gradient_norms",
    "layer_norms",
    "n_engm",
    "plain",
    "reweighted",
    "vjp_norms",
    "vmap_norms",
]
