"""Why a single step works at first, and then does not: fast adversarial training in closed form.

- Lemma 1: a random start shortens the perturbation. With ``eta ~ U(-eps, eps)^d``,
  ``delta = clip(eta + alpha sign(g), -eps, eps)`` has
  ``E ||delta||_2 <= sqrt(d) sqrt(-alpha^3 / (6 eps) + alpha^2 / 2 + eps^2 / 3)``.
- Lemma 2: the input gradient of a one-layer network with random filters hardly changes direction in
  the ball, and never by more than to a cosine of 1/2 on average.
- Equation (2.6): after training it may, through a single filter whose responses change their sign.
- The weight of GradAlign as a function of eps.

NumPy in float64, except for the simulation ``random_network_alignment``.

Sources: Andriushchenko and Flammarion (2020), "Understanding and improving fast adversarial
training"; Andriushchenko (2024), "Understanding generalization and robustness in modern deep
learning", chapter 2, whose numbers of equations these are.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, ArrayLike, Float, Key

from robustjax import checks, keys
from robustjax.norms import L2


def random_start_rms(
    eps: float, step_size: ArrayLike, *, gradient_sign: str = "independent"
) -> float | Float[np.ndarray, "..."]:
    """Root mean square of a coordinate of FGSM with a random start; ``sqrt(d)`` times it bounds
    ``E ||delta||_2``, tightly for large ``d``.

    It grows with the step from ``eps / sqrt(3)`` for 0 to ``eps`` for ``2 eps`` and above, where
    the perturbation is a corner of the cube.

    Args:
      eps: radius of the cube, ``> 0``.
      step_size: ``alpha >= 0``, one number or an array of any shape.
      gradient_sign: how ``sign(g_i)`` depends on the start: ``"independent"``, as for a linear
        loss and as the lemma assumes without saying so; ``"same"`` or ``"opposite"`` as the sign of
        ``eta_i``. The mean square of the first is the mean of those of the others.

    Raises:
      ValueError: an argument is out of range.

    Source: Andriushchenko (2024), lemma 1, equation (2.4).
    """
    checks.number("eps", eps, above=0)
    checks.number("step_size", step_size, at_least=0)
    checks.choice("gradient_sign", gradient_sign, ("independent", "same", "opposite"))
    a = np.minimum(np.asarray(step_size, np.float64) / eps, 2)
    # E min(1, |v + a|)^2 for v uniform in (0, 1), and E max(-1, v - a)^2.
    same = np.where(a < 1, (1 - a**3) / 3 + a, 1)
    opposite = ((1 - a) ** 3 + np.minimum(a, 1) ** 3) / 3 + np.maximum(a - 1, 0)
    independent = -(a**3) / 6 + a**2 / 2 + 1 / 3
    squares = {"independent": independent, "same": same, "opposite": opposite}
    return eps * np.sqrt(squares[gradient_sign])


class AlignmentBounds(NamedTuple):
    """Alignment of a random one-layer network and its lower bounds, each below the one before.

    Attributes:
      limit: ``E[1 - angle(z, z + eta) / pi]``, for infinitely many patches and filters.
      hoeffding: ``max(1 - E 1F1(1/2; p/2; -||z||^2 / (2 eps^2)), 1/2)``.
      lemma: ``max(1 - sqrt(2 E 1F1(1/2; p/2; -||z||^2 / eps^2)), 1/2)``.
    """

    limit: float
    hoeffding: float
    lemma: float


def alignment_bounds(
    z: Float[np.ndarray | Array, "n p"], noise: Float[np.ndarray | Array, "n p"], eps: float
) -> AlignmentBounds:
    """Lemma 2: how well the input gradients at ``z`` and ``z + eps noise`` are aligned.

    The expectations over the random filters are exact: a Gaussian direction has both patches on its
    positive side with probability ``(1 - angle / pi) / 2``, and ``<w / ||w||, z>^2`` is ``||z||^2``
    times a beta variable, so that the mean of its exponential is Kummer's function 1F1. Those over
    the patches are means over the samples. All tend to 1 with ``eps -> 0``; no variance of the
    weights appears.

    Args:
      z: patches, in the lemma uniform in ``[0, 1]^p``, ``p >= 2``.
      noise: as many, uniform in ``[-1, 1]^p``; used by ``limit`` alone.
      eps: radius, ``>= 0``.

    Raises:
      ValueError: shapes differ, ``p < 2`` or ``eps < 0``.

    Source: Andriushchenko (2024), lemma 2 and equation (2.9). Figure 2.9 is said to have all values
    between 0.7 and 1 for eps up to 0.1; the stated bound is below 0.7 from about 0.038 on.
    """
    checks.number("eps", eps, at_least=0)
    if checks.array("z", z).ndim != 2 or z.shape[1] < 2 or not len(z):
        raise ValueError(f"z must be patches of shape (n, p) with p >= 2, got shape {z.shape}")
    checks.same_shape("noise", noise, "z", z)
    if eps == 0:
        return AlignmentBounds(1.0, 1.0, 1.0)
    z, noise = np.asarray(z, np.float64), np.asarray(noise, np.float64)
    p, square = z.shape[1], np.square(z).sum(axis=1)

    def kummer(scale: float) -> float:
        return scipy.special.hyp1f1(0.5, p / 2, -square / (scale * eps**2)).mean()

    return AlignmentBounds(
        float(1 - _angles(z, z + eps * noise).mean() / math.pi),
        float(max(1 - kummer(2), 0.5)),
        float(max(1 - math.sqrt(2 * kummer(1)), 0.5)),
    )


def network_input_gradient(
    filters: Float[Array, "m p"],
    outputs: Float[Array, "m k"],
    patches: Float[Array, "k p"],
    bias: ArrayLike = 0.0,
) -> Float[Array, "k p"]:
    """Input gradient of ``f = sum_ij u_ij max(<w_i, z_j> + b_i, 0)``, patches that do not overlap.

    For patch ``j`` it is ``sum_i u_ij 1[<w_i, z_j> + b_i >= 0] w_i``.

    Args:
      filters: ``w``, ``(m, p)``.
      outputs: ``u``, ``(m, k)``.
      patches: ``z``, ``(k, p)``.
      bias: ``b``, one number or ``(m,)``.
    """
    active = patches @ filters.T + bias >= 0
    return (active * outputs.T) @ filters


def random_network_alignment(
    key: Key[Array, ""],
    eps: ArrayLike,
    *,
    patches: int = 100,
    filters: int = 4,
    dimension: int = 27,
    samples: int = 1000,
) -> Float[Array, " samples"]:
    """Cosine of the input gradients at ``x`` and ``x + eta`` of random one-layer networks.

    The finite network of lemma 2: its mean tends to ``AlignmentBounds.limit``. The variances of the
    weights cancel and are 1. A cosine with a gradient that is zero (no filter is active) is 1.

    Args:
      key: one key; sample ``i`` draws from ``fold_in(key, i)``.
      eps: radius of the uniform noise, ``>= 0``; may be traced.
      patches: ``k``, each uniform in ``[0, 1]^p``.
      filters: ``m``.
      dimension: ``p >= 2`` of a patch, 27 for 3 x 3 pixels of 3 channels.
      samples: number of networks with an input each.

    Raises:
      ValueError: an argument is out of range.

    Source: Andriushchenko (2024), figure 2.9, "finite-sample cosine".
    """
    keys.check_one(key)
    checks.number("eps", eps, at_least=0)
    checks.integer("patches", patches, at_least=1)
    checks.integer("filters", filters, at_least=1)
    checks.integer("dimension", dimension, at_least=2)
    checks.integer("samples", samples, at_least=1)

    return _random_alignment(key, eps, patches, filters, dimension, samples)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _random_alignment(
    key: Array, eps: ArrayLike, patches: int, filters: int, dimension: int, samples: int
) -> Array:
    def one(key: Array) -> Array:
        weight_key, patch_key = jax.random.split(key)
        weights = jax.random.normal(weight_key, (filters, dimension + patches))
        w, u = weights[:, :dimension], weights[:, dimension:]
        z, place = jax.random.uniform(patch_key, (2, patches, dimension))
        noise = 2 * place - 1
        a = network_input_gradient(w, u, z)
        b = network_input_gradient(w, u, z + eps * noise)
        defined = (L2().value(a) > 0) & (L2().value(b) > 0)
        return jnp.where(defined, jnp.vdot(L2().steepest(a), L2().steepest(b)), 1)

    # One after the other: memory does not grow with the number of samples.
    return jax.lax.map(one, keys.per_example(key, jnp.arange(samples)))


def single_filter_alignment(
    responses: Float[np.ndarray | Array, " k"],
    noisy_responses: Float[np.ndarray | Array, " k"],
    outputs: Float[np.ndarray | Array, " k"],
) -> float:
    """Cosine of the input gradients of ``sum_i u_i max(<w, z_i> + b, 0)`` at ``z`` and ``z + eta``.

    With ``A`` and ``B`` the patches that are active at ``z`` and at ``z + eta``, it is
    ``sum_{A and B} u_i^2 / sqrt(sum_A u_i^2 sum_B u_i^2)``: the filter itself cancels. A filter
    with small negative responses to clean patches, such as a Laplace filter with a negative bias,
    has few in ``A`` and up to half of all in ``B``, hence a cosine near 0.

    Args:
      responses: ``<w, z_i> + b``, ``(k,)``, of patches that do not overlap.
      noisy_responses: ``<w, z_i + eta_i> + b``.
      outputs: ``u``.

    Returns:
      The cosine of the gradients of any loss whose derivative has the same sign at both points; 1
      if one of them is zero.

    Source: Andriushchenko (2024), equation (2.6).
    """
    checks.same_shape("noisy_responses", noisy_responses, "responses", responses)
    checks.same_shape("outputs", outputs, "responses", responses)
    weight = np.square(np.asarray(outputs, np.float64))
    clean, noisy = np.asarray(responses) >= 0, np.asarray(noisy_responses) >= 0
    lengths = math.sqrt(weight[clean].sum()) * math.sqrt(weight[noisy].sum())
    return float(weight[clean & noisy].sum() / lengths) if lengths else 1.0


def activation_bound(
    gap: ArrayLike, eps: ArrayLike, filter_norm: ArrayLike
) -> float | Float[np.ndarray, "..."]:
    """``exp(-t^2 / (2 eps^2 ||w||_2^2))``: bound on the chance that noise activates a filter.

    For a patch with ``<w, z> + b = -t`` and noise uniform in ``[-eps, eps]^p`` it bounds
    ``P(<w, eta> >= t)``, by Hoeffding's inequality.

    Args:
      gap: ``t >= 0``.
      eps: ``> 0``.
      filter_norm: ``||w||_2 > 0``.

    Raises:
      ValueError: an argument is out of range.
    """
    checks.number("gap", gap, at_least=0)
    checks.number("eps", eps, above=0)
    checks.number("filter_norm", filter_norm, above=0)
    ratio = np.asarray(gap, np.float64) / (np.asarray(eps, np.float64) * np.asarray(filter_norm))
    return np.exp(-np.square(ratio) / 2)


def grad_align_weight(eps: ArrayLike, at_8: float = 0.2, at_16: float = 2.0) -> ArrayLike:
    """The weight of GradAlign: linear in eps on a logarithmic scale, between two radii.

    ``at_8 (at_16 / at_8)^((255 eps - 8) / 8)``.

    Args:
      eps: l_inf radius for inputs in [0, 1], ``>= 0``; may be traced.
      at_8: weight for 8/255, ``> 0``; 0.2 for CIFAR-10, 2.5 for SVHN.
      at_16: weight for 16/255, ``> 0``; 2.0 for CIFAR-10, 4.0 for SVHN.

    Raises:
      ValueError: an argument is out of range.

    Source: Andriushchenko (2024), table 2.2.
    """
    checks.number("eps", eps, at_least=0)
    checks.number("at_8", at_8, above=0)
    checks.number("at_16", at_16, above=0)
    return at_8 * (at_16 / at_8) ** ((255 * eps - 8) / 8)


def _angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles between rows, accurate for small ones too (Kahan), where arccos is not."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=1), np.linalg.norm(a + b, axis=1))
