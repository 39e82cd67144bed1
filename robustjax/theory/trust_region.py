"""The exact maximum of a quadratic over a ball, and the bounds that SOAR puts in its place.

For ``q(delta) = <g, delta> + <delta, K delta> / 2`` and the augmented Hessian
``H = [[K, g], [g^T, 1]]``,

    q(delta) = (<delta', H delta'> - 1) / 2,    delta' = (delta, 1),

so that over the ball of radius ``R``, and with ``R = sqrt(d) eps`` over the cube of half side eps,

    max q <= (R^2 + 1) ||H||_2 / 2 - 1/2 <= (R^2 + 1) ||H||_F / 2 - 1/2.

NumPy in float64, outside of ``jit``: what approximations are compared with.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", proposition 3.3.1 and
corollary 3.3.2. These set ``||H||_F = E ||H z||_2`` for ``z ~ N(0, I)``. Only
``E ||H z||_2^2 = ||H||_F^2`` is true, and

    sqrt(2 / pi) ||H||_F <= E ||H z||_2 <= ||H||_F,

with equality on the left for rank one: with ``E ||H z||_2`` the bound can fail. It does for a flat
loss, where it is below the maximum, 0, as soon as ``R^2 < sqrt(pi / 2) - 1``.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.optimize
from jaxtyping import Array, Float

from robustjax import checks

# Below this share of the largest number a difference of eigenvalues is rounding.
_ROUNDING = 1e-13


class QuadraticMaximum(NamedTuple):
    """Where a quadratic is largest in a ball, and why it is nowhere larger.

    Attributes:
      value: the maximum.
      point: a maximiser ``(d,)``.
      multiplier: ``lam >= 0`` with ``(lam I - K) point = g``, ``lam >= lambda_max(K)``, and
        ``lam = 0`` unless the point lies on the sphere; together they prove the maximum.
    """

    value: float
    point: Float[np.ndarray, " d"]
    multiplier: float


def quadratic_maximum(
    gradient: Float[np.ndarray | Array, " d"],
    hessian: Float[np.ndarray | Array, "d d"],
    radius: float,
) -> QuadraticMaximum:
    """The maximum of ``<g, delta> + <delta, K delta> / 2`` over ``||delta||_2 <= radius``.

    In the eigenbasis of ``K`` the maximiser is ``g_i / (lam - lambda_i)``, and ``lam`` solves the
    secular equation ``||delta|| = radius`` unless the ball is large enough. In the hard case, where
    no ``lam`` does, an eigenvector of the largest eigenvalue fills up what is missing.

    Args:
      gradient: ``g``, ``(d,)``.
      hessian: ``K``, symmetric, indefinite or not, ``(d, d)``.
      radius: ``> 0``.

    Raises:
      ValueError: ``radius <= 0``, or shapes do not fit, or ``K`` is not symmetric.

    Source: Conn, Gould and Toint (2000), "Trust-region methods", chapter 7.
    """
    checks.number("radius", radius, above=0)
    g, hessian = _checked(gradient, hessian)
    eigenvalues, basis = np.linalg.eigh(hessian)
    g = basis.T @ g
    # lam = lambda_max + excess, and lam - lambda_i = excess + gaps_i, without cancellation.
    gaps = eigenvalues[-1] - eigenvalues
    top = gaps <= _ROUNDING * np.abs(eigenvalues).max()
    gaps[top] = 0
    if np.linalg.norm(g[top]) <= _ROUNDING * np.linalg.norm(g):
        g[top] = 0

    def step(excess: float) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(g == 0, 0, g / (excess + gaps))

    excess = max(0.0, -eigenvalues[-1])
    delta = step(excess)
    if np.linalg.norm(delta) <= radius:
        if eigenvalues[-1] > 0:  # the hard case
            delta[-1] = math.sqrt(radius**2 - delta @ delta)
    else:
        excess = scipy.optimize.brentq(
            lambda excess: 1 / np.linalg.norm(step(excess)) - 1 / radius,
            excess,
            np.linalg.norm(g) / radius * (1 + 1e-9),
            xtol=1e-300,
            rtol=1e-15,
            maxiter=1000,
        )
        delta = step(excess)
        delta *= radius / np.linalg.norm(delta)
    value = g @ delta + delta @ (eigenvalues * delta) / 2
    return QuadraticMaximum(float(value), basis @ delta, float(excess + eigenvalues[-1]))


def augmented_hessian(
    gradient: Float[np.ndarray | Array, " d"], hessian: Float[np.ndarray | Array, "d d"]
) -> Float[np.ndarray, "e e"]:
    """``H = [[K, g], [g^T, 1]]``, of size ``e = d + 1``."""
    g, hessian = _checked(gradient, hessian)
    return np.block([[hessian, g[:, None]], [g[None], np.ones((1, 1))]])


def expected_product_norm(matrix: Float[np.ndarray | Array, "e e"]) -> float:
    """``E ||H z||_2`` for ``z ~ N(0, I)`` and a symmetric ``H``, to about 1e-9.

    ``||H z||^2`` is a sum of ``lambda_i^2 xi_i^2`` with independent normal ``xi_i``. From the
    Laplace transform of its law,

        E ||H z|| = pi^(-1/2) int_0^inf (1 - prod_i (1 + 2 v^2 lambda_i^2)^(-1/2)) / v^2 dv.

    Raises:
      ValueError: the matrix is not square and symmetric.
    """
    squares = np.square(np.linalg.eigvalsh(_symmetric("matrix", matrix)))
    largest = squares.max()
    if largest == 0:
        return 0.0

    def integrand(v: float) -> float:
        return -math.expm1(-np.log1p(2 * v**2 * squares / largest).sum() / 2) / v**2

    integral, _ = scipy.integrate.quad(integrand, 0, math.inf, epsabs=0, epsrel=1e-9, limit=500)
    return math.sqrt(largest / math.pi) * integral


def augmented_bound(
    gradient: Float[np.ndarray | Array, " d"],
    hessian: Float[np.ndarray | Array, "d d"],
    radius: float,
    *,
    size: str = "frobenius",
) -> float:
    """``(radius^2 + 1) size(H) / 2 - 1/2``: what bounds ``max q`` over the ball.

    Args:
      gradient: ``g``, ``(d,)``.
      hessian: ``K``, symmetric, ``(d, d)``.
      radius: of the l_2 ball, ``>= 0``; ``sqrt(d) eps`` for the l_inf ball.
      size: ``"spectral"`` or ``"frobenius"``: the norm of ``H``; ``"expected"``: ``E ||H z||_2``,
        as published, which can lie below the maximum.

    Source: Ma (2025), proposition 3.3.1 and equations (3.7) to (3.9).
    """
    checks.number("radius", radius, at_least=0)
    checks.choice("size", size, ("spectral", "frobenius", "expected"))
    matrix = augmented_hessian(gradient, hessian)
    if size == "expected":
        length = expected_product_norm(matrix)
    else:
        length = np.linalg.norm(matrix, 2 if size == "spectral" else "fro")
    return float((radius**2 + 1) * length / 2 - 1 / 2)


def _checked(gradient: np.ndarray | Array, hessian: np.ndarray | Array) -> tuple:
    g = np.asarray(checks.array("gradient", gradient), np.float64)
    hessian = _symmetric("hessian", hessian)
    if g.shape != hessian.shape[:1]:
        raise ValueError(
            f"gradient must have one entry per row of the hessian, {hessian.shape[:1]}, "
            f"got {g.shape}"
        )
    return g, hessian


def _symmetric(name: str, matrix: np.ndarray | Array) -> np.ndarray:
    matrix = np.asarray(checks.array(name, matrix), np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"{name} must be a square matrix, got shape {matrix.shape}")
    if np.abs(matrix - matrix.T).max() > 1e-5 * np.abs(matrix).max():
        raise ValueError(
            f"{name} must be symmetric, got entries that differ from their mirror "
            f"images by up to {np.abs(matrix - matrix.T).max():g}"
        )
    return (matrix + matrix.T) / 2
