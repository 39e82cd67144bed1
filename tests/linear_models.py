"""Linear classifiers of many classes, whose robust accuracy is known exactly."""

import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

from robustjax.norms import L1, L2, LInf
from robustjax.threat import ThreatModel

RNG = np.random.default_rng(7)
N, SHAPE, D, K = 24, (4, 4, 1), 16, 5
X = RNG.uniform(size=(N, *SHAPE)).astype(np.float32)
W = RNG.normal(size=(D, K)).astype(np.float32)
Y = (X.reshape(N, -1) @ W).argmax(axis=1).astype(np.int32)
# Around half of the examples are robust in each.
RADII = {LInf(): 0.05, L2(): 0.15, L1(): 0.4}


def linear(x):
    return x.reshape(len(x), -1) @ W


def threat(norm, boxed, scale=1.0):
    box = {} if boxed else {"lower": -jnp.inf, "upper": jnp.inf}
    return ThreatModel(norm, RADII[norm] * scale, **box)


def least_distances(norm, boxed):
    """The exact distance of each example to the nearest point of another class, ``(n,)``."""
    return np.array(
        [min(_distance(norm, boxed, i, k) for k in range(K) if k != Y[i]) for i in range(N)]
    )


def _distance(norm, boxed, i, k):
    """To class k: how far the steepest path goes until its linear gain closes the gap."""
    x = X[i].ravel().astype(float)
    w = (W[:, k] - W[:, Y[i]]).astype(float)
    gap = -w @ x
    room = np.where(w > 0, 1 - x, x) if boxed else np.full(D, 1e9)
    if np.abs(w) @ room <= gap:
        return np.inf
    if isinstance(norm, LInf):
        return brentq(lambda t: np.abs(w) @ np.minimum(t, room) - gap, 0, 1e9, xtol=1e-12)
    if isinstance(norm, L2):
        step = brentq(
            lambda t: np.abs(w) @ np.minimum(t * np.abs(w), room) - gap, 0, 1e9, xtol=1e-12
        )
        return np.linalg.norm(np.minimum(step * np.abs(w), room))
    left, total = gap, 0.0
    for j in np.argsort(-np.abs(w)):  # the steepest coordinates first: a fractional knapsack
        used = min(room[j], left / abs(w[j]))
        left, total = left - used * abs(w[j]), total + used
        if left <= 1e-12:
            break
    return total


def robust(norm, boxed, scale=1.0):
    """Which examples no point of the threat model can misclassify, ``(n,)`` bool."""
    return least_distances(norm, boxed) > RADII[norm] * scale
