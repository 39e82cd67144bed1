"""Preconditioned descent: steepest descent in ``||v||_P = sqrt(v^T P v)``.

Its dual is ``||u||_{P^-1}``, so the direction of steepest descent times the dual norm of the
gradient is ``-P^-1 g``, and on separable data it tends to the classifier that is most robust to
perturbations with ``sqrt(delta^T P^-1 delta) <= eps``. In the coordinates ``P^{1/2} w`` it is
gradient descent on the inputs ``P^{-1/2} x``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import ArrayLike, Float

from robustjax import checks


def scale_by_preconditioner(
    preconditioner: Float[ArrayLike, " d"] | Float[ArrayLike, "d d"],
) -> optax.GradientTransformation:
    """Replaces updates g by ``P^-1 g``; a learning rate comes after it in the chain.

    The tree is one vector of d coordinates, in tree-flatten order.

    Args:
      preconditioner: P, symmetric and positive definite, ``(d, d)``, or its diagonal ``(d,)``.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: P is not positive definite, or not of the size of the updates.

    Source: Gunasekar et al., "Characterizing implicit bias in terms of optimization geometry"
    (2018), on steepest descent in a quadratic norm.
    """
    p = checks.array("preconditioner", preconditioner)
    if p.ndim not in (1, 2) or p.shape != (p.shape[0],) * p.ndim:
        raise ValueError(f"preconditioner must be (d,) or (d, d), got shape {p.shape}")
    if checks.is_known(p) and not _is_positive(np.asarray(p, np.float64)):
        raise ValueError("preconditioner must be positive definite, got one that is not")

    def solve(g, params):
        del params
        flat, unravel = ravel_pytree(g)
        if flat.size != p.shape[0]:
            raise ValueError(
                f"preconditioner must have the size of the updates, {flat.size}, got {p.shape[0]}"
            )
        wide = flat.astype(jnp.promote_types(flat.dtype, p.dtype))
        if p.ndim == 1:
            solved = wide / p
        else:
            solved = jax.scipy.linalg.solve(p.astype(wide.dtype), wide, assume_a="pos")
        return unravel(solved.astype(flat.dtype))

    return optax.stateless(solve)


def _is_positive(p: np.ndarray) -> bool:
    return bool((p if p.ndim == 1 else np.linalg.eigvalsh(p)).min() > 0)
