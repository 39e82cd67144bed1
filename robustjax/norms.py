"""Norms of one vector: value, dual, steepest direction, projection, proximal maps, sampling.

Every part of the library that needs geometry takes it from here. The maximiser of ``<g, d>`` over
the unit ball, ``steepest(g)``, is FGSM on the input and signGD on the weights; its value is the
dual norm, which is the robust margin of a linear model; and Moreau's identity makes the proximal
maps and the projections one formula.

=========  =============================  =====================  ================================
norm       ``steepest(g)``                ``project(v, r)``      ``prox(v, t)``
=========  =============================  =====================  ================================
``LInf``   sign(g)                        clip to [-r, r]        v - projection on the l_1 ball
``L2``     g / ||g||_2                    v min(1, r / ||v||_2)  v max(0, 1 - t / ||v||_2)
``L1``     sign(g_i) e_i at max |g_i|     soft threshold         sign(v) max(|v| - t, 0)
``Lp(p)``  sign(g) (|g| / ||g||_q)^(q-1)  Newton's method        v - projection on the l_q ball
=========  =============================  =====================  ================================

A norm acts on ONE vector, given as an array or as a pytree of arrays (parameters), whose entries
are the coordinates in tree-flatten order. With ``batch_ndim=k`` the ``k`` leading axes of every
leaf are batch axes: there is one vector for each index into them. Sums run in at least float32 and
results have the dtypes of the input. Whatever is not differentiable at zero has a finite
derivative there, never NaN.

Sources: Moreau, "Proximité et dualité dans un espace hilbertien" (1965); Parikh and Boyd,
"Proximal algorithms" (2014), sections 2.5 and 6.5; Barthe et al., "A probabilistic approach to the
geometry of the l_p^n-ball" (2005), for the sampling.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from robustjax import checks, lp

Vector = PyTree[Float[ArrayLike, "..."]]


@runtime_checkable
class Norm(Protocol):
    """What a norm offers. Norms are frozen, hashable, and pytrees without leaves.

    ``radius`` and ``t`` are >= 0, one number or one per vector (the batch shape), and may be
    traced; a negative or infinite one raises ``ValueError``, as do integer vectors and leaves
    that disagree about the batch shape.
    """

    @property
    def name(self) -> str:
        """Short name for tables, such as ``"linf"``."""

    @property
    def dual(self) -> "Norm":
        """The norm ``||u||_* = max {<u, v> : ||v|| <= 1}``."""

    def value(self, v: Vector, batch_ndim: int = 0) -> Float[Array, "..."]:
        """``||v||``, one number for each vector."""

    def steepest(self, g: Vector, batch_ndim: int = 0) -> Vector:
        """The maximiser of ``<g, d>`` over ``||d|| <= 1``, with value ``||g||_*``; 0 for g = 0."""

    def project(self, v: Vector, radius: ArrayLike, batch_ndim: int = 0) -> Vector:
        """The nearest point, in Euclidean distance, of the ball ``||w|| <= radius``."""

    def prox(self, v: Vector, t: ArrayLike, batch_ndim: int = 0) -> Vector:
        """The minimiser over ``w`` of ``||w - v||_2^2 / 2 + t ||w||``; 0 iff ``||v||_* <= t``.

        By Moreau's identity it is what the projection on the dual ball of radius t leaves over.
        """
        _size("t", t)
        return jax.tree.map(jnp.subtract, v, self.dual.project(v, t, batch_ndim))

    def prox_squared(self, v: Vector, t: ArrayLike, batch_ndim: int = 0) -> Vector:
        """The minimiser over ``w`` of ``||w - v||_2^2 / 2 + t ||w||^2 / 2``."""

    def sample_ball(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        """One vector, uniform in the ball, with the shapes and dtypes of ``like``."""

    def sample_sphere(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        """One vector, uniform on the surface of the ball, shaped like ``like``."""


def check(norm: Any) -> Norm:
    """The norm itself; raises ``ValueError`` for anything else, such as a name."""
    if isinstance(norm, type) or not isinstance(norm, Norm):
        raise ValueError(f"norm must be a norm such as LInf(), L2(), L1() or Lp(3), got {norm!r}")
    return norm


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LInf(Norm):
    """``max |v_i|``, with dual ``L1``. Its steepest direction is ``sign(g)``, ``sign(0) = 0``."""

    @property
    def name(self) -> str:
        return "linf"

    @property
    def dual(self) -> "L1":
        return L1()

    def value(self, v: Vector, batch_ndim: int = 0) -> Float[Array, "..."]:
        return _batched(lambda v: lp.peak(v).astype(lp.dtype(v)), batch_ndim, v)

    def steepest(self, g: Vector, batch_ndim: int = 0) -> Vector:
        return _batched(lambda g: jax.tree.map(jnp.sign, g), batch_ndim, g)

    def project(self, v: Vector, radius: ArrayLike, batch_ndim: int = 0) -> Vector:
        fn = optax.projections.projection_linf_ball
        return _batched(fn, batch_ndim, v, _size("radius", radius))

    def prox_squared(self, v: Vector, t: ArrayLike, batch_ndim: int = 0) -> Vector:
        # v - w is t ||w|| times a vector of unit l_1 norm that lives where |w| is largest: w is v
        # clipped at the level with sum (|v| - level)_+ = t level.
        def one(v, t):
            level = lp.threshold(v, slope=t)
            return jnp.clip(v, -level, level)

        return _batched(_raveled(one), batch_ndim, v, _size("t", t))

    def sample_ball(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        def draw(key, size, dtype):
            return jax.random.uniform(key, (size,), dtype, minval=-1, maxval=1)

        return _sample(draw, key, like, radius)

    def sample_sphere(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        # All faces of the cube are equally large: draw one, and a uniform point of it.
        def draw(key, size, dtype):
            inside, face, side = jax.random.split(key, 3)
            v = jax.random.uniform(inside, (size,), dtype, minval=-1, maxval=1)
            face = jax.random.randint(face, (), 0, size)
            return v.at[face].set(jax.random.rademacher(side, (), dtype))

        return _sample(draw, key, like, radius)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class L2(Norm):
    """``(sum v_i^2)^(1/2)``, its own dual. Its steepest direction is ``g / ||g||_2``."""

    @property
    def name(self) -> str:
        return "l2"

    @property
    def dual(self) -> "L2":
        return L2()

    def value(self, v: Vector, batch_ndim: int = 0) -> Float[Array, "..."]:
        return _batched(lambda v: lp.norm(v, 2).astype(lp.dtype(v)), batch_ndim, v)

    def steepest(self, g: Vector, batch_ndim: int = 0) -> Vector:
        return _batched(lambda g: lp.steepest(g, 2), batch_ndim, g)

    def project(self, v: Vector, radius: ArrayLike, batch_ndim: int = 0) -> Vector:
        # Not optax.projections.projection_l2_ball: it squares the entries as they are, so that it
        # under- and overflows, and it divides 0 by 0 for v = 0 and radius 0.
        def one(v, radius):
            norm = lp.norm(v, 2)
            outside = norm > radius
            return lp.scale(v, jnp.where(outside, radius / jnp.where(outside, norm, 1), 1))

        return _batched(one, batch_ndim, v, _size("radius", radius))

    def prox_squared(self, v: Vector, t: ArrayLike, batch_ndim: int = 0) -> Vector:
        return _batched(lambda v, t: lp.scale(v, 1 / (1 + t)), batch_ndim, v, _size("t", t))

    def sample_ball(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        def draw(key, size, dtype):
            direction, length = jax.random.split(key)
            v = lp.steepest(jax.random.normal(direction, (size,), dtype), 2)
            return v * jax.random.uniform(length, (), dtype) ** (1 / size)

        return _sample(draw, key, like, radius)

    def sample_sphere(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        def draw(key, size, dtype):
            return lp.steepest(jax.random.normal(key, (size,), dtype), 2)

        return _sample(draw, key, like, radius)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class L1(Norm):
    """``sum |v_i|``, with dual ``LInf``.

    Its steepest direction is one coordinate: ``sign(g_i)`` at the first ``i``, in tree-flatten
    order, where ``|g_i|`` is largest, and 0 elsewhere (greedy coordinate ascent).
    """

    @property
    def name(self) -> str:
        return "l1"

    @property
    def dual(self) -> "LInf":
        return LInf()

    def value(self, v: Vector, batch_ndim: int = 0) -> Float[Array, "..."]:
        return _batched(lambda v: lp.total(lp.magnitude, v).astype(lp.dtype(v)), batch_ndim, v)

    def steepest(self, g: Vector, batch_ndim: int = 0) -> Vector:
        return _batched(_raveled(lp.first_peak), batch_ndim, g)

    def project(self, v: Vector, radius: ArrayLike, batch_ndim: int = 0) -> Vector:
        # Not optax.projections.projection_l1_ball: it divides by the radius, so that radius 0
        # gives NaN, and it sums in the dtype of the input. This threshold serves prox_squared too.
        def one(v, radius):
            level = lp.threshold(v, offset=radius)
            return lp.into_ball(lp.soft_threshold(v, level), radius, 1)

        return _batched(_raveled(one), batch_ndim, v, _size("radius", radius))

    def prox_squared(self, v: Vector, t: ArrayLike, batch_ndim: int = 0) -> Vector:
        # Soft thresholding at the level t ||w||_1.
        def one(v, t):
            return lp.soft_threshold(v, lp.threshold(v, weight=t, slope=1))

        return _batched(_raveled(one), batch_ndim, v, _size("t", t))

    def sample_ball(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        def draw(key, size, dtype):
            inside, slack = jax.random.split(key)
            v = jax.random.laplace(inside, (size,), dtype)
            return v / (jnp.sum(jnp.abs(v)) + jax.random.exponential(slack, (), dtype))

        return _sample(draw, key, like, radius)

    def sample_sphere(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        def draw(key, size, dtype):
            v = jax.random.laplace(key, (size,), dtype)
            return v / jnp.sum(jnp.abs(v))

        return _sample(draw, key, like, radius)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lp(Norm):
    """``(sum |v_i|^p)^(1/p)`` for ``1 < p < inf``, with dual ``Lp(q)``, ``1/p + 1/q = 1``.

    Its steepest direction is ``sign(g) (|g| / ||g||_q)^(q-1)``. The projection and the prox of the
    square have no closed form: Newton's method finds them, in float32 to a few 1e-6 of the largest
    entry for p between 1.1 and 20.
    ``sample_sphere`` draws from the cone measure, the direction of a uniform point of the ball,
    which for ``1 < p < inf`` is the surface measure only if p = 2.

    Args:
      p: exponent, ``1 < p < inf``; for 1 and inf use ``L1()`` and ``LInf()``. ``Lp(2)`` is
        allowed, but ``L2()`` is faster.

    Raises:
      ValueError: ``p`` is not a number in ``(1, inf)``.
    """

    p: float

    def __post_init__(self):
        checks.number("p", self.p, at_most=math.inf)
        if not 1 < self.p < math.inf:
            instead = {1.0: " (that is L1())", math.inf: " (that is LInf())"}.get(self.p, "")
            raise ValueError(f"p must lie strictly between 1 and inf, got {self.p}{instead}")
        object.__setattr__(self, "p", float(self.p))

    @property
    def name(self) -> str:
        return f"l{self.p:g}"

    @property
    def dual(self) -> "Lp":
        return Lp(self.p / (self.p - 1))

    def value(self, v: Vector, batch_ndim: int = 0) -> Float[Array, "..."]:
        return _batched(lambda v: lp.norm(v, self.p).astype(lp.dtype(v)), batch_ndim, v)

    def steepest(self, g: Vector, batch_ndim: int = 0) -> Vector:
        return _batched(lambda g: lp.steepest(g, self.dual.p), batch_ndim, g)

    def project(self, v: Vector, radius: ArrayLike, batch_ndim: int = 0) -> Vector:
        fn = _raveled(lambda v, radius: lp.project(v, radius, self.p))
        return _batched(fn, batch_ndim, v, _size("radius", radius))

    def prox_squared(self, v: Vector, t: ArrayLike, batch_ndim: int = 0) -> Vector:
        fn = _raveled(lambda v, t: lp.prox_squared(v, t, self.p))
        return _batched(fn, batch_ndim, v, _size("t", t))

    def sample_ball(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        def draw(key, size, dtype):
            return jax.random.ball(key, size, self.p, (), dtype)

        return _sample(draw, key, like, radius)

    def sample_sphere(self, key: Key[Array, ""], like: Any, radius: ArrayLike) -> Vector:
        def draw(key, size, dtype):
            v = jax.random.generalized_normal(key, self.p, (size,), dtype)
            return v / lp.norm(v, self.p)

        return _sample(draw, key, like, radius)


def _size(name: str, value: Any) -> tuple[str, Any]:
    """A checked and named radius or step, for ``_batched``."""
    return name, checks.number(name, value, at_least=0)


def _batched(fn: Callable, batch_ndim: int, v: Any, *sizes: tuple[str, Any]) -> Any:
    """``fn(v, *sizes)`` for every vector: ``fn`` is mapped over the batch axes."""
    v = jax.tree.map(jnp.asarray, v)
    leaves = jax.tree.leaves(v)
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"a vector must be floating-point, got a leaf of dtype {leaf.dtype}")
    batches = {leaf.shape[:batch_ndim] for leaf in leaves} if batch_ndim else {()}
    if len(batches) != 1 or len(batch := batches.pop()) != batch_ndim:
        raise ValueError(
            f"all leaves must share {batch_ndim} leading batch axes, "
            f"got shapes {[leaf.shape for leaf in leaves]}"
        )
    arrays = []
    for name, size in sizes:
        if jnp.shape(size) not in ((), batch):
            raise ValueError(
                f"{name} must be one number or have the batch shape {batch}, got {jnp.shape(size)}"
            )
        arrays.append(jnp.broadcast_to(jnp.asarray(size, lp.wide(lp.dtype(v))), batch))
    for _ in range(batch_ndim):
        fn = jax.vmap(fn)
    return fn(v, *arrays)


def _raveled(fn: Callable) -> Callable:
    """Lets ``fn``, which maps a flat array to one of its size, act on a pytree."""

    def on_tree(v, *sizes):
        flat, unravel = ravel_pytree(v)
        return unravel(fn(flat.astype(lp.wide(flat.dtype)), *sizes).astype(flat.dtype))

    return on_tree


def _sample(draw: Callable, key: Array, like: Any, radius: ArrayLike) -> Any:
    """``radius * draw(key, size, dtype)`` in the shapes and dtypes of ``like``."""
    checks.number("radius", radius, at_least=0)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, like))
    if flat.size == 0 or not jnp.issubdtype(flat.dtype, jnp.floating):
        raise ValueError(
            f"like must hold at least one floating-point coordinate, "
            f"got {flat.size} of dtype {flat.dtype}"
        )
    unit = draw(key, flat.size, lp.wide(flat.dtype))
    return unravel((unit * jnp.asarray(radius, unit.dtype)).astype(flat.dtype))
