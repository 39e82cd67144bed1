"""Norms of the Fourier transform, ``||F v||_inf`` and ``||F v||_1``, for all frequencies or a band.

They are norms like those of ``robustjax.norms``, so that ``ThreatModel(FourierLInf(), eps)`` is a
threat model and ``pgd`` attacks in it. Since F is unitary, every map of theirs is that of l_inf or
l_1 applied to the magnitudes ``|F v|``, with the phases kept:

===============  ============================  =======================  ==========================
norm             ``steepest(g)``, u = F g      ``project(v, r)``        ``prox(v, t)``
===============  ============================  =======================  ==========================
``FourierLInf``  F^-1(u / |u|)                 magnitudes cut at r      v - projection, dual ball
``FourierL1``    the frequency of largest |u|  magnitudes on l_1 ball   magnitudes less t
===============  ============================  =======================  ==========================

The magnitudes at k and -k are equal, so real vectors stay real. A vector is ONE array, a signal
``(d,)`` or an image ``(h, w, c)``, whose norm runs over frequencies and channels; ``batch_ndim`` as
in ``norms``.

A band, ``low`` and ``high`` as in ``frequency.band_mask``, restricts the perturbations:
``FourierLInf(low=r)`` is infinite on vectors with anything outside the band, so that its unit ball
is that of the band's vectors. Its dual, ``FourierL1(low=r)``, is the sum over the band alone; it
ignores what lies outside.

Source: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
(2021); for the samples Barthe et al., "A probabilistic approach to the geometry of the l_p^n-ball"
(2005).
"""

# ruff: noqa: D102  (the methods are documented once, on the protocol in norms.py)

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Complex, Float, Key

from robustjax import checks, lp
from robustjax.frequency import check_band, dft, inverse_dft, mask_of, spatial_axes
from robustjax.norms import L1, LInf, Norm

# Magnitudes outside the band that count as zero, absolutely or relative to those inside it: what
# rounding leaves of the difference of two float32 images in [0, 1].
_ROUNDING = (1e-6, 1e-5)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FourierLInf(Norm):
    """``max_k |[F v]_k|``; infinite where ``v`` has frequencies outside the band.

    Its steepest direction has magnitude 1 at every frequency of the band at which the gradient is
    not zero (to rounding), and so the l_2 norm ``sqrt(d)``. Magnitudes outside the band count as
    zero up to 1e-6, or 1e-5 of the largest inside.

    Args:
      low: keep the frequencies up to this one, 0 to 0.5 cycles per pixel; None: no upper edge.
      high: keep the frequencies from this one on; None: no lower edge.

    Raises:
      ValueError: an edge is not in [0, 0.5]; of a method: the vector is neither a signal nor an
        image, or none of its frequencies is in the band.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        check_band(self.low, self.high)

    @property
    def name(self) -> str:
        return _name("fourier_linf", self)

    @property
    def dual(self) -> "FourierL1":
        return FourierL1(self.low, self.high)

    def value(self, v: Float[ArrayLike, "..."], batch_ndim: int = 0) -> Float[Array, "..."]:
        polar = _polar(v, batch_ndim)
        inside = _keep(polar, self)
        peak = LInf().value(jnp.where(inside, polar.size, 0), batch_ndim)
        outside = jnp.max(jnp.where(inside, 0, polar.size), axis=polar.axes)
        absolute, relative = _ROUNDING
        tolerance = jnp.maximum(relative * peak, absolute / polar.unit)
        value = jnp.where(outside > tolerance, jnp.inf, peak * polar.unit)
        return value.astype(polar.dtype)

    def steepest(self, g: Float[ArrayLike, "..."], batch_ndim: int = 0) -> Float[Array, "..."]:
        polar = _polar(g, batch_ndim)
        # A magnitude below rounding has no phase to speak of: 0, as sign(0) is.
        largest = jnp.max(polar.size, axis=polar.axes, keepdims=True)
        certain = polar.size > jnp.finfo(polar.size.dtype).eps * largest
        size = jnp.where(certain & _keep(polar, self), 1.0, 0.0)
        return polar._replace(unit=jnp.ones_like(polar.unit)).with_size(size)

    def project(
        self, v: Float[ArrayLike, "..."], radius: ArrayLike, batch_ndim: int = 0
    ) -> Float[Array, "..."]:
        polar = _polar(v, batch_ndim)
        inside = jnp.where(_keep(polar, self), polar.size, 0)
        radius = _per_vector("radius", radius, polar) / polar.unit
        return polar.with_size(LInf().project(inside, radius, batch_ndim))

    def prox_squared(
        self, v: Float[ArrayLike, "..."], t: ArrayLike, batch_ndim: int = 0
    ) -> Float[Array, "..."]:
        polar = _polar(v, batch_ndim)
        inside = jnp.where(_keep(polar, self), polar.size, 0)
        return polar.with_size(LInf().prox_squared(inside, _per_vector("t", t, polar), batch_ndim))

    def sample_ball(
        self, key: Key[Array, ""], like: Float[Any, "..."], radius: ArrayLike
    ) -> Float[Array, "..."]:
        noise = _white_noise(key, like)
        return _scaled(noise.with_size(_uniform_in_discs(noise, self)), like, radius)

    def sample_sphere(
        self, key: Key[Array, ""], like: Float[Any, "..."], radius: ArrayLike
    ) -> Float[Array, "..."]:
        # The ball is a product of discs, one for each pair of frequencies k and -k, and intervals,
        # one for each frequency that is its own negative. On a face one of them is at its edge;
        # the faces of a pair are sqrt(2) as large as those of an interval.
        inside, face = jax.random.split(key)
        noise = _white_noise(inside, like)
        mirror, real = _mirror(noise.size.shape)
        area = jnp.where(_keep(noise, self), jnp.where(real, 1.0, math.sqrt(0.5)), 0.0)
        chosen = jax.random.categorical(face, jnp.log(area).ravel())
        places = jnp.arange(mirror.size).reshape(mirror.shape)
        at_edge = (places == chosen) | (jnp.asarray(mirror) == chosen)
        size = jnp.where(at_edge, 1, _uniform_in_discs(noise, self))
        return _scaled(noise.with_size(size), like, radius)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FourierL1(Norm):
    """``sum_k |[F v]_k|`` over the frequencies of the band and the channels.

    The dual of ``FourierLInf``, so the robust margin of a linear model. Its steepest direction is a
    single frequency, the first of largest magnitude, with its negative. With a band it is no norm
    but a seminorm: 0 outside the band, which ``project`` and ``prox`` leave alone and where
    ``steepest`` and the samples are 0.

    Args:
      low: sum over the frequencies up to this one, 0 to 0.5 cycles per pixel; None: no upper edge.
      high: sum over the frequencies from this one on; None: no lower edge.

    Raises:
      ValueError: as for ``FourierLInf``.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        check_band(self.low, self.high)

    @property
    def name(self) -> str:
        return _name("fourier_l1", self)

    @property
    def dual(self) -> "FourierLInf":
        return FourierLInf(self.low, self.high)

    def value(self, v: Float[ArrayLike, "..."], batch_ndim: int = 0) -> Float[Array, "..."]:
        polar = _polar(v, batch_ndim)
        inside = jnp.where(_keep(polar, self), polar.size, 0)
        return (L1().value(inside, batch_ndim) * polar.unit).astype(polar.dtype)

    def steepest(self, g: Float[ArrayLike, "..."], batch_ndim: int = 0) -> Float[Array, "..."]:
        polar = _polar(g, batch_ndim)
        inside = jnp.where(_keep(polar, self), polar.size, 0)
        # One of k and -k is chosen; the real part of the inverse transform splits it in halves.
        polar = polar._replace(unit=jnp.ones_like(polar.unit))
        return polar.with_size(L1().steepest(inside, batch_ndim))

    def project(
        self, v: Float[ArrayLike, "..."], radius: ArrayLike, batch_ndim: int = 0
    ) -> Float[Array, "..."]:
        polar = _polar(v, batch_ndim)
        keep = _keep(polar, self)
        radius = _per_vector("radius", radius, polar) / polar.unit
        projected = L1().project(jnp.where(keep, polar.size, 0), radius, batch_ndim)
        return polar.with_size(jnp.where(keep, projected, polar.size))

    def prox_squared(
        self, v: Float[ArrayLike, "..."], t: ArrayLike, batch_ndim: int = 0
    ) -> Float[Array, "..."]:
        polar = _polar(v, batch_ndim)
        keep = _keep(polar, self)
        inside = jnp.where(keep, polar.size, 0)
        shrunk = L1().prox_squared(inside, _per_vector("t", t, polar), batch_ndim)
        return polar.with_size(jnp.where(keep, shrunk, polar.size))

    def sample_ball(
        self, key: Key[Array, ""], like: Float[Any, "..."], radius: ArrayLike
    ) -> Float[Array, "..."]:
        inside, slack = jax.random.split(key)
        noise, size = _laplace_in_discs(inside, like, self)
        total = jnp.sum(size) + jax.random.exponential(slack, (), size.dtype)
        return _scaled(noise.with_size(size / total), like, radius)

    def sample_sphere(
        self, key: Key[Array, ""], like: Float[Any, "..."], radius: ArrayLike
    ) -> Float[Array, "..."]:
        noise, size = _laplace_in_discs(key, like, self)
        return _scaled(noise.with_size(size / jnp.sum(size)), like, radius)


class _Polar(NamedTuple):
    """Vectors in polar form: ``unit * size * phase`` in the frequency domain.

    ``unit``, one positive number per vector, is its largest entry, so that the rest neither
    overflows nor underflows: gradients of confident models are as small as 1e-30. What is computed
    from the parts does not depend on it, and it needs no derivative.
    """

    phase: Complex[Array, "..."]
    size: Float[Array, "..."]
    unit: Float[Array, "..."]
    dtype: Any

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of one vector."""
        return tuple(range(self.unit.ndim, self.size.ndim))

    def with_size(self, size: Float[Array, "..."]) -> Float[Array, "..."]:
        """The real vectors with these magnitudes and the same phases and units."""
        v = inverse_dft(self.phase * size, self.unit.ndim)
        return (v * jnp.expand_dims(self.unit, self.axes)).astype(self.dtype)


def _polar(v: Any, batch_ndim: int) -> _Polar:
    spatial_axes("v", v, batch_ndim)
    v = jnp.asarray(v)
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise ValueError(f"v must be floating-point, got {v.dtype}")
    wide = v.astype(lp.wide(v.dtype))
    unit = jax.lax.stop_gradient(LInf().value(wide, batch_ndim))
    usable = (unit >= jnp.finfo(unit.dtype).tiny) & jnp.isfinite(unit)
    unit = jnp.where(usable, unit, 1)
    u = dft(wide / jnp.expand_dims(unit, tuple(range(batch_ndim, v.ndim))), batch_ndim)
    squared = jnp.square(u.real) + jnp.square(u.imag)
    zero = squared == 0
    size = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))
    return _Polar(u / jnp.where(zero, 1, size), size, unit, v.dtype)


def _keep(polar: _Polar, norm: FourierLInf | FourierL1) -> Bool[np.ndarray, "..."]:
    """The mask of the norm's band, in a shape that broadcasts against one vector."""
    return mask_of(polar.size.shape[polar.unit.ndim :], low=norm.low, high=norm.high)


def _mirror(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The flat place of frequency -k at that of k, and which frequencies are their own negative."""
    places = np.arange(math.prod(shape)).reshape(shape)
    axes = (0,) if len(shape) == 1 else (0, 1)
    mirror = np.roll(np.flip(places, axes), 1, axes)
    return mirror, mirror == places


def _per_vector(name: str, value: Any, polar: _Polar) -> Array:
    """A checked radius or step: one number, or one per vector."""
    checks.number(name, value, at_least=0)
    batch = polar.unit.shape
    if jnp.shape(value) not in ((), batch):
        raise ValueError(
            f"{name} must be one number or have the batch shape {batch}, got {jnp.shape(value)}"
        )
    return jnp.broadcast_to(jnp.asarray(value, polar.size.dtype), batch)


def _name(base: str, norm: FourierLInf | FourierL1) -> str:
    low = "" if norm.low is None else f"_low{norm.low:g}"
    high = "" if norm.high is None else f"_high{norm.high:g}"
    return base + low + high


def _white_noise(key: Array, like: Any) -> _Polar:
    """Normal noise shaped like ``like``: independent phases, and magnitudes with known laws.

    ``|u_k|^2`` is exponential where k is not its own negative, and ``u_k`` normal where it is.
    """
    if not jnp.issubdtype(jnp.result_type(like), jnp.floating):
        raise ValueError(f"like must be floating-point, got {jnp.result_type(like)}")
    noise = jax.random.normal(key, jnp.shape(like), lp.wide(jnp.result_type(like)))
    polar = _polar(noise, 0)
    return polar._replace(size=polar.size * polar.unit, unit=jnp.ones_like(polar.unit))


def _uniform_in_discs(noise: _Polar, norm: FourierLInf) -> Float[Array, "..."]:
    """Magnitudes of a uniform point of the unit ball: the laws of the noise made uniform."""
    _, real = _mirror(noise.size.shape)
    interval = jax.scipy.special.erf(noise.size / math.sqrt(2))
    disc = jnp.sqrt(-jnp.expm1(-jnp.square(noise.size)))
    return jnp.where(_keep(noise, norm), jnp.where(real, interval, disc), 0)


def _laplace_in_discs(key: Array, like: Any, norm: FourierL1) -> tuple[_Polar, Float[Array, "..."]]:
    """Phases and magnitudes of a vector with density ``exp(-||v||)``, as in Barthe et al..

    Its magnitude is exponential where k is its own negative, else half a gamma variable of shape
    2: half the sum of the squares of two independent noises in both cases.
    """
    one, two = (_white_noise(k, like) for k in jax.random.split(key))
    size = (jnp.square(one.size) + jnp.square(two.size)) / 2
    return one, jnp.where(_keep(one, norm), size, 0)


def _scaled(unit: Array, like: Any, radius: Any) -> Array:
    checks.number("radius", radius, at_least=0)
    return (unit * jnp.asarray(radius, unit.dtype)).astype(jnp.result_type(like))
