"""The discrete Fourier transform of signals and images, and bands of frequencies.

The transform is unitary, ``[F v]_k = d^(-1/2) sum_m v_m exp(-2 pi j m k / d)``: it keeps the
Euclidean norm, and its inverse is its adjoint. (Without the factor all norms below change by
``sqrt(d)``.) A signal is a vector ``(d,)``; an image ``(h, w, c)`` is transformed over its two
spatial axes, each channel for itself. With ``batch_ndim=k`` the ``k`` leading axes are batch axes.
Frequencies are ordered as ``jnp.fft.fftfreq`` has them, in cycles per sample (pixel), from -1/2
to 1/2. ``correlate`` and ``convolve`` are the circular filters, products in frequency space. The
cosine transform, with its filters and bands, is in ``robustjax.dct``.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from robustjax import checks


def dft(v: Float[Array, "..."], batch_ndim: int = 0) -> Complex[Array, "..."]:
    """The unitary transform ``F v`` of real vectors; complex64, or complex128 from float64.

    Args:
      v: ``(..., d)`` signals or ``(..., h, w, c)`` images.
      batch_ndim: leading axes that are batch axes.

    Raises:
      ValueError: ``v`` is not floating-point, or is neither signals nor images.
    """
    axes = spatial_axes("v", v, batch_ndim)
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise ValueError(f"v must be floating-point, got {v.dtype}")
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return jnp.fft.fftn(v, axes=axes, norm="ortho")


def inverse_dft(spectrum: Complex[Array, "..."], batch_ndim: int = 0) -> Float[Array, "..."]:
    """The real part of ``F^-1 u``: of a spectrum with ``u_-k = conj(u_k)``, all of it.

    Of any other spectrum it is the transform of the Hermitian part, ``(u_k + conj(u_-k)) / 2``.

    Args:
      spectrum: ``(..., d)`` or ``(..., h, w, c)``, as ``dft`` gives it.
      batch_ndim: leading axes that are batch axes.

    Raises:
      ValueError: ``spectrum`` is neither that of signals nor of images.
    """
    axes = spatial_axes("spectrum", spectrum, batch_ndim)
    return jnp.fft.ifftn(spectrum, axes=axes, norm="ortho").real


def correlate(w: Float[Array, " d"], x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """``d^{-1/2} sum_k w_k x_{i+k}``, indices modulo d: the layer that deep learning uses.

    Args:
      w: filter, as wide as the signals.
      x: signals.

    Raises:
      ValueError: the widths differ.
    """
    return _filtered(jnp.conj(dft(w)), w, x)


def convolve(w: Float[Array, " d"], x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """``d^{-1/2} sum_k w_{-k} x_{i+k}``, indices modulo d: the convolution of signal processing.

    Args and errors as of ``correlate``.
    """
    return _filtered(dft(w), w, x)


def _filtered(spectrum: Array, w: Array, x: Array) -> Array:
    if w.ndim != 1 or x.shape[-1:] != w.shape:
        raise ValueError(f"w must be as wide as the signals, {x.shape[-1:]}, got {w.shape}")
    return inverse_dft(spectrum * dft(x, x.ndim - 1), x.ndim - 1).astype(x.dtype)


def spatial_axes(name: str, v: Array, batch_ndim: int) -> tuple[int, ...]:
    """The axes along which ``v`` is transformed: the last of signals, (-3, -2) of images."""
    checks.array(name, v)
    rank = v.ndim - checks.integer("batch_ndim", batch_ndim)
    if rank not in (1, 3) or v.size == 0:
        raise ValueError(
            f"{name} must be signals (d,) or images (h, w, c) after {batch_ndim} batch axes, "
            f"got shape {v.shape}"
        )
    return (-1,) if rank == 1 else (-3, -2)


def band_mask(
    h: int, w: int, *, low: float | None = None, high: float | None = None
) -> Bool[np.ndarray, "h w"]:
    """Which frequencies of ``h x w`` images lie in a band of ``f = max(|f_x|, |f_y|)``.

    ``low`` alone keeps the low frequencies ``f <= low``, ``high`` alone the high ones
    ``f >= high``, both together the ring ``high <= f <= low``, neither of them all. A frequency is
    kept with its negative, so that filtering a real image gives a real one. The mask of signals of
    length d is that of ``1 x d`` images.

    Args:
      h: height in pixels, ``>= 1``.
      w: width in pixels, ``>= 1``.
      low: upper edge of the band, 0 to 0.5 cycles per pixel.
      high: lower edge of the band, 0 to 0.5 cycles per pixel.

    Raises:
      ValueError: an argument is out of range, or the band holds no frequency of such images.
    """
    checks.integer("h", h, at_least=1)
    checks.integer("w", w, at_least=1)
    check_band(low, high)
    f_y, f_x = np.abs(np.fft.fftfreq(h)), np.abs(np.fft.fftfreq(w))
    frequency = np.maximum(f_y[:, None], f_x[None, :])
    mask = np.full((h, w), True)
    if low is not None:
        mask &= frequency <= low
    if high is not None:
        mask &= frequency >= high
    if not mask.any():
        raise ValueError(
            f"low and high must leave some frequency of {h} x {w} images, got {low} and {high}"
        )
    return mask


def mask_of(
    shape: tuple[int, ...], *, low: float | None = None, high: float | None = None
) -> Bool[np.ndarray, "..."]:
    """``band_mask`` for vectors of this shape: ``(d,)`` for signals, ``(h, w, 1)`` for images."""
    if len(shape) == 1:
        return band_mask(1, shape[0], low=low, high=high)[0]
    return band_mask(shape[0], shape[1], low=low, high=high)[:, :, None]


def check_band(low: float | None, high: float | None) -> None:
    """Raises ``ValueError`` unless both edges are None or 0 to 0.5 cycles per pixel."""
    for name, edge in (("low", low), ("high", high)):
        if edge is not None:
            checks.number(name, edge, at_least=0, at_most=0.5)
