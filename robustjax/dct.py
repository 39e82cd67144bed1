"""The orthonormal discrete cosine transform of signals and images, its filters and its bands.

The transform (DCT-II) is ``v~ = C v`` with the orthogonal matrix

    C_kj = sqrt(a_k / d) cos(pi k (j + 1/2) / d),    a_0 = 1, a_k = 2 for k > 0,

and its inverse (DCT-III) is the adjoint ``C^T v~``; an image is transformed over both spatial axes,
``C_h x C_w^T``, each channel for itself. Energy is kept (Parseval), and white noise stays white.
Frequency 0 is the mean: a constant ``h x w`` image has the single coefficient ``sqrt(h w)`` times
its value. The *distance* of the basis image ``(i, j)`` from it is ``sqrt(i^2 + j^2)``.

Shapes are those of ``robustjax.frequency``: signals ``(d,)`` or images ``(h, w, c)`` after
``batch_ndim`` batch axes; filters take batches of images ``(n, h, w, c)``.

Sources: Ahmed, Natarajan and Rao (1974), "Discrete cosine transform"; Ma, Pan and Farahmand (2023),
"Understanding the robustness difference between stochastic gradient descent and adaptive gradient
methods"; Ma (2025), "Understanding adversarial robustness in deep learning", chapter 4, whose
numbers of equations, figures and appendices these are. Its displayed matrix has rows and columns
mixed; equation (4.4), used here, is right.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from robustjax import checks, keys
from robustjax.frequency import spatial_axes
from robustjax.norms import L2

Images = Float[Array | np.ndarray, "n h w c"]


def dct_matrix(d: int) -> Float[np.ndarray, "d d"]:
    """The orthogonal matrix ``C``, rows by frequency and columns by position, in float64.

    Raises:
      ValueError: ``d < 1``.
    """
    checks.integer("d", d, at_least=1)
    k, j = np.ogrid[:d, :d]
    return np.cos(np.pi * k * (j + 0.5) / d) * np.sqrt(np.where(k == 0, 1, 2) / d)


def dct(v: Float[Array, "..."], batch_ndim: int = 0) -> Float[Array, "..."]:
    """``C v`` of signals, ``C_h v C_w^T`` of images; of the dtype of ``v``.

    A product with the matrix up to 256 positions, where it is as fast as the fast transform and
    compiles sooner; longer signals take that one. ``bfloat16`` computes in float32.

    Args:
      v: ``(..., d)`` signals or ``(..., h, w, c)`` images.
      batch_ndim: leading axes that are batch axes.

    Raises:
      ValueError: ``v`` is not floating-point, or is neither signals nor images.
    """
    return _along_axes(False, "v", v, batch_ndim)


def inverse_dct(coefficients: Float[Array, "..."], batch_ndim: int = 0) -> Float[Array, "..."]:
    """``C^T u`` of signals, ``C_h^T u C_w`` of images: the inverse and the adjoint of ``dct``.

    Args:
      coefficients: ``(..., d)`` or ``(..., h, w, c)``, as ``dct`` gives them.
      batch_ndim: leading axes that are batch axes.

    Raises:
      ValueError: ``coefficients`` are not floating-point, or of neither signals nor images.
    """
    return _along_axes(True, "coefficients", coefficients, batch_ndim)


_LONG = 256  # positions beyond which the fast transform is used


def _along_axes(inverse: bool, name: str, v: Array, batch_ndim: int) -> Float[Array, "..."]:
    axes = spatial_axes(name, v, batch_ndim)
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating-point, got {v.dtype}")
    out = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    for axis in axes:
        if v.shape[axis] > _LONG:
            fast = jax.scipy.fft.idct if inverse else jax.scipy.fft.dct
            out = fast(out, axis=axis, norm="ortho")
        else:
            matrix = jnp.asarray(dct_matrix(v.shape[axis]), out.dtype)
            contracted = (0 if inverse else 1, axis)
            out = jnp.tensordot(matrix, out, contracted, precision="highest")
            out = jnp.moveaxis(out, 0, axis)
    return out.astype(v.dtype)


def dct_distance(h: int, w: int) -> Float[np.ndarray, "h w"]:
    """The distance ``sqrt(i^2 + j^2)`` of each basis image from the constant one.

    Raises:
      ValueError: ``h < 1`` or ``w < 1``.
    """
    checks.integer("h", h, at_least=1)
    checks.integer("w", w, at_least=1)
    i, j = np.ogrid[:h, :w]
    return np.sqrt(i**2 + j**2)


# What data sets are made of.


def spectral_energy(x: Images) -> Float[Array, "h w"]:
    """``S_ij``, the mean of ``|x~_ij|`` over images and channels.

    The mean over a data set is that over its batches, weighted by their sizes. White noise of
    standard deviation ``s`` has ``S = sqrt(2 / pi) s`` throughout.

    Raises:
      ValueError: ``x`` is not a batch of floating-point images.

    Source: Ma (2025), figure 4.2; for one channel there.
    """
    return jnp.mean(jnp.abs(_transformed(x)), axis=(0, 3))


def energy_share(x: Images, mask: Bool[Array | np.ndarray, "h w"]) -> Float[Array, ""]:
    """The share of ``sum x~^2`` that lies in the bases of ``mask``; 0 if all ``x`` are zero.

    For natural images, that of the tenth of all bases nearest to the mean is above 0.9.

    Raises:
      ValueError: ``x`` is not a batch of floating-point images, or ``mask`` of another size.
    """
    energy = _mean_squares(x)
    _check_mask(mask, x.shape[1:3])
    total = jnp.sum(energy)
    share = jnp.sum(jnp.where(mask, energy, 0)) / jnp.where(total > 0, total, 1)
    return share.astype(x.dtype)


def irrelevant_bases(x: Images, *, tolerance: float = 1e-5) -> Bool[Array, "h w"]:
    """The bases that the data do not use: ``sqrt(mean x~_ij^2) <= tolerance`` times the largest.

    Spectral irrelevance is spatial redundancy: for each such basis image ``b_ij`` the pixels of
    every image satisfy ``<b_ij, x> = 0``, so the covariance of the pixels (``spatial_covariance``)
    is singular. The converse fails: permuted pixels are as redundant, and use all bases.

    Args:
      x: images, such as those of a whole training set.
      tolerance: ``>= 0``; the default is above the rounding of float32.

    Raises:
      ValueError: ``x`` is not a batch of floating-point images, or ``tolerance < 0``.

    Source: Ma (2025), appendix 4.D.3.
    """
    checks.number("tolerance", tolerance, at_least=0)
    energy = _mean_squares(x)
    # Compared as roots: the square of a tolerance may be less than float32 tells from zero.
    return jnp.sqrt(energy) <= tolerance * jnp.sqrt(jnp.max(energy))


def spatial_covariance(variances: Float[ArrayLike, " d"]) -> Float[np.ndarray, "d d"]:
    """``C^T diag(variances) C``: the covariance of signals with independent cosine coefficients.

    Its rank is the number of frequencies of positive variance. In float64.

    Raises:
      ValueError: ``variances`` are not ``(d,)`` or not ``>= 0``.

    Source: Ma (2025), appendix 4.D.3, table 4.8.
    """
    variances = np.asarray(variances, np.float64)
    if variances.ndim != 1 or not variances.size:
        raise ValueError(f"variances must have shape (d,), got {variances.shape}")
    checks.number("variances", variances, at_least=0)
    c = dct_matrix(len(variances))
    return (c.T * variances) @ c


# Filters.


def energy_filter(
    x: Images,
    removed: float | Float[Array, ""],
    *,
    inclusive: bool = True,
    per_channel: bool = False,
) -> Float[Array, "n h w c"]:
    """Removes the bases of smallest magnitude from each image: ``C^T (x~ M) C``.

    ``M`` keeps ``|x~_ij| >= `` the ``removed``-th percentile of the image's magnitudes, by linear
    interpolation. Of all masks that keep as many bases this one keeps the most energy. The result
    is not clipped to the range of images. It may be part of a compiled input pipeline, with
    ``removed`` traced.

    Args:
      x: images.
      removed: percentage of the bases to remove, 0 (the identity) to 100 (all but the largest).
      inclusive: ``>=``, as the public code has it; ``False`` is the ``>`` of the text, which drops
        the smallest basis even where none is to be removed.
      per_channel: whether each channel has a mask of its own, as the formulas of the text, or all
        share that of their mean magnitude, as the public code.

    Raises:
      ValueError: ``x`` is not a batch of floating-point images, or ``removed`` is out of range.

    Source: Ma (2025), appendix 4.C, whose ``C (.) C^T`` is the forward transform, printed in place
    of its inverse.
    """
    checks.number("removed", removed, at_least=0, at_most=100)
    u = _transformed(x)
    magnitude = jnp.abs(u)
    if not per_channel:
        magnitude = jnp.mean(magnitude, axis=3, keepdims=True)
    threshold = jnp.percentile(magnitude, removed, axis=(1, 2), keepdims=True)
    keep = magnitude >= threshold if inclusive else magnitude > threshold
    return inverse_dct(jnp.where(keep, u, 0), batch_ndim=1)


def low_pass_radius(h: int, w: int, removed: float, *, rule: str = "area") -> float:
    """The radius below which ``low_pass_filter`` keeps bases, ``> 0``; inf where it keeps all.

    Args:
      h: height in pixels.
      w: width in pixels.
      removed: percentage to remove, ``0 <= removed < 100``.
      rule: ``"area"``: the largest radius below which lies a share of the bases smaller than
        ``1 - removed / 100``, of 2000 steps from 0 to ``sqrt(h^2 + w^2)``, as in the public code;
        for 32x32 images 34.982, 29.529, 24.981, 19.098, 10.816 for 10, 30, 50, 70, 90 percent.
        ``"radius"``: ``(1 - removed / 100) sqrt(h^2 + w^2)``.

    Raises:
      ValueError: an argument is out of range.
    """
    distance = np.sort(dct_distance(h, w), axis=None)
    checks.number("removed", removed, at_least=0, below=100)
    checks.choice("rule", rule, ("area", "radius"))
    if removed == 0:
        return np.inf
    longest, kept = np.hypot(h, w), (100 - removed) / 100
    if rule == "radius":
        return float(kept * longest)
    radii = longest * np.arange(1, 2001) / 2000
    shares = np.searchsorted(distance, radii) / distance.size
    return float(radii[max(np.flatnonzero(shares < kept), default=0)])


def low_pass_mask(h: int, w: int, removed: float, *, rule: str = "area") -> Bool[np.ndarray, "h w"]:
    """The bases nearer to the constant one than ``low_pass_radius``, which is among them."""
    return dct_distance(h, w) < low_pass_radius(h, w, removed, rule=rule)


def low_pass_filter(x: Images, removed: float, *, rule: str = "area") -> Float[Array, "n h w c"]:
    """Removes the bases of high frequency: the orthogonal projection ``C^T (x~ M) C``.

    ``M`` is ``low_pass_mask`` and the same for all images of a size. The result is not clipped.

    Args:
      x: images.
      removed: percentage to remove, ``0 <= removed < 100``; 0 is the identity.
      rule: ``"area"``, percent of the bases, or ``"radius"``; see ``low_pass_radius``.

    Raises:
      ValueError: ``x`` is not a batch of floating-point images, or an argument is out of range.

    Source: Ma (2025), appendix 4.C. Corrected: the printed mask keeps what should go, and compares
    a squared radius with ``removed / 100 sqrt(2) d``.
    """
    u = _transformed(x)
    mask = low_pass_mask(*x.shape[1:3], removed, rule=rule)
    return inverse_dct(jnp.where(mask[:, :, None], u, 0), batch_ndim=1)


# Bands.


def dct_bands(h: int, w: int, bands: int = 10) -> Bool[np.ndarray, "bands h w"]:
    """Splits the bases by distance from the constant one into ``bands`` masks of equal size.

    Sizes differ by at most one: the basis of rank ``r`` is in band ``floor(r bands / (h w))``.
    Bases at the same distance are ranked by rows.

    Args:
      h: height in pixels.
      w: width in pixels.
      bands: number of masks, 1 to ``h w``; mask 0 holds the lowest frequencies.

    Raises:
      ValueError: an argument is out of range.

    Source: Ma (2025), figure 4.5. The public code splits by radii, into groups of 101 to 107 for
    32x32 images.
    """
    distance = dct_distance(h, w)
    checks.integer("bands", bands, at_least=1, at_most=h * w)
    rank = np.empty(h * w, int)
    # Squares are whole numbers, whose ties rounding cannot break.
    rank[np.argsort(np.rint(distance**2), axis=None, kind="stable")] = np.arange(h * w)
    return (rank * bands // (h * w)).reshape(h, w) == np.arange(bands)[:, None, None]


def band_noise(
    key: Key[Array, ""],
    mask: Bool[Array | np.ndarray, "h w"],
    channels: int,
    *,
    std: ArrayLike | None = None,
    norm: ArrayLike | None = None,
) -> Float[Array, "h w c"]:
    """Gaussian noise in the bases of ``mask`` alone, ``C^T (M delta) C``, in float32.

    ``delta ~ N(0, std^2)`` are the coefficients, which is white noise of the pixels before the
    mask. One key gives the same ``delta`` for every mask: the noises of the bands of a partition
    are orthogonal, and sum to white noise.

    Args:
      key: one key. Callers ``vmap`` over keys, and over masks.
      mask: such as a band of ``dct_bands``.
      channels: number of channels, each with noise of its own.
      std: standard deviation ``>= 0`` of a coefficient; ``E ||noise||_2^2`` is ``std^2`` times the
        number of bases and of channels. It may be traced, as may ``norm``.
      norm: in its place, the l_2 norm ``>= 0`` that every noise image is scaled to.

    Raises:
      ValueError: not one of ``std`` and ``norm`` is given, or an argument is out of range.

    Source: Ma (2025), figure 4.5; the public code has the variance 0.01 for CIFAR-100.
    """
    keys.check_one(key)
    checks.integer("channels", channels, at_least=1)
    if checks.array("mask", mask).ndim != 2 or mask.size == 0:
        raise ValueError(f"mask must have shape (h, w), got {mask.shape}")
    if (std is None) == (norm is None):
        raise ValueError(f"one of std and norm must be given, got std={std} and norm={norm}")
    checks.number("std", 1.0 if std is None else std, at_least=0)
    checks.number("norm", 1.0 if norm is None else norm, at_least=0)
    delta = jax.random.normal(key, (*mask.shape, channels), jnp.float32)
    delta = jnp.where(mask[:, :, None], delta, 0)
    # The transform keeps the norm, so the coefficients can be scaled.
    delta = std * delta if norm is None else norm * L2().steepest(delta)
    return inverse_dct(delta)


def dct_resize(x: Images, h: int, w: int) -> Float[Array, "n p q c"]:
    """Images of another size with the same low frequencies: cosine coefficients cut or zero-padded.

    Coefficients are scaled by ``sqrt(h w / (old h w))``, so that a constant image stays what it is.
    Enlarged images leave every basis ``(i, j)`` with ``i`` or ``j`` beyond the old size unused.

    Args:
      x: images.
      h: new height, ``>= 1``.
      w: new width, ``>= 1``.

    Raises:
      ValueError: ``x`` is not a batch of floating-point images, or a size is ``< 1``.
    """
    u = _transformed(x)
    height, width = x.shape[1:3]
    checks.integer("h", h, at_least=1)
    checks.integer("w", w, at_least=1)
    u, scale = u[:, :h, :w], math.sqrt(h * w / (height * width))
    margins = ((0, 0), (0, max(h - height, 0)), (0, max(w - width, 0)), (0, 0))
    return inverse_dct(jnp.pad(u, margins) * scale, batch_ndim=1)


def _transformed(x: Images) -> Float[Array, "n h w c"]:
    if checks.array("x", x).ndim != 4:
        raise ValueError(f"x must be images (n, h, w, c), got shape {x.shape}")
    return dct(jnp.asarray(x), batch_ndim=1)


def _mean_squares(x: Images) -> Float[Array, "h w"]:
    u = _transformed(x)
    return jnp.mean(jnp.square(u.astype(jnp.promote_types(u.dtype, jnp.float32))), axis=(0, 3))


def _check_mask(mask: Array | np.ndarray, size: tuple[int, int]) -> None:
    if checks.array("mask", mask).shape != size:
        raise ValueError(f"mask must have the size of the images, {size}, got {mask.shape}")
