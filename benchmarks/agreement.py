"""That two programs whose times are compared do the same work, from the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import models


def random_variables(model: models.Model, x: jax.Array) -> tuple[Any, Any]:
    """Parameters and statistics, none of them 0 or 1, so that no mistake about one goes unnoticed.

    Kernels are those of He et al. (2015). Drawn by numpy: XLA would compile a program per shape.
    """
    draw = np.random.default_rng(1)

    def leaf(path, shape):
        kind = path[-1].key
        if kind == "kernel":
            value = draw.normal(0, (2 / np.prod(shape.shape[:-1])) ** 0.5, shape.shape)
        elif kind in ("scale", "var"):
            value = draw.uniform(0.8, 1.2, shape.shape)
        else:
            value = draw.normal(0, 0.1, shape.shape)
        return jnp.asarray(value, shape.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def check_logits(name: str, theirs: Any, ours: jax.Array) -> float:
    """The largest difference of a PyTorch tensor of logits from ours.

    Raises:
      ValueError: it is above 1e-4, or above 1e-4 of the largest logit if that is more than 1.
    """
    theirs, ours = theirs.detach().numpy(), np.asarray(ours)
    difference = float(np.abs(ours - theirs).max())
    if not difference <= 1e-4 * max(1.0, float(np.abs(ours).max())):
        raise ValueError(f"logits of {name} must be those of our model, differ by {difference:.3g}")
    return difference


def check_loss(name: str, value: float, reference: float, *, within: float) -> None:
    """Two losses that are alike, up to a share ``within`` of the second; else ``ValueError``."""
    if not abs(value - reference) <= within * abs(reference):
        raise ValueError(
            f"loss of {name} must be within {within:.0%} of ours, {reference:.4g}, got {value:.4g}"
        )
