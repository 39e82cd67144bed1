"""ThreatModel: what the attacker may do, a norm ball around each example and a box."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from robustjax import checks, keys, lp, norms
from robustjax.norms import L1, L2, LInf, Lp, Norm


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """The set ``{z : ||z - x|| <= eps, lower <= z <= upper}`` around each example ``x``.

    A frozen pytree: the norm is static, ``eps``, ``lower`` and ``upper`` are leaves and may be
    traced, so that a sweep over them does not recompile. All methods act on batches, with the
    examples along the leading axis, and expect ``x`` to lie in the box.

    Args:
      norm: ``LInf()``, ``L2()``, ``L1()``, ``Lp(p)`` or ``FourierLInf()``.
      eps: radius of the ball, finite and >= 0, in the units of the input; one number or one per
        example, ``(n,)``.
      lower: lower end of the box, a number or an array that broadcasts against one example (such
        as one number per channel); ``-jnp.inf`` for none.
      upper: upper end of the box, likewise; ``jnp.inf`` for none.

    Raises:
      ValueError: ``eps`` is negative, not finite or not of shape () or (n,); ``lower >= upper``;
        ``norm`` is no norm.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018),
    section 2.
    """

    norm: Norm
    eps: ArrayLike
    lower: ArrayLike = 0.0
    upper: ArrayLike = 1.0

    def __post_init__(self):
        norms.check(self.norm)
        checks.number("eps", self.eps, at_least=0)
        if jnp.ndim(self.eps) > 1:
            raise ValueError(
                f"eps must be one number or one per example, got shape {jnp.shape(self.eps)}"
            )
        checks.number("lower", self.lower, at_most=math.inf)
        checks.number("upper", self.upper, at_most=math.inf)
        traced = checks.is_traced(self.lower) or checks.is_traced(self.upper)
        if not traced and not np.all(np.less(self.lower, self.upper)):
            raise ValueError(f"lower must be < upper, got {self.lower} and {self.upper}")

    def project(
        self, x_adv: Float[Array, "n ..."], x: Float[Array, "n ..."]
    ) -> Float[Array, "n ..."]:
        """Into the threat model: the nearest point of the ball around ``x``, then clip to the box.

        The result is feasible, because ``x`` lies in the box and clipping moves each coordinate
        towards it; not so in the Fourier norms, where that can lengthen a perturbation (see
        ``robustjax.attacks.project_in_box``). For l_inf it is the Euclidean projection; for other
        norms with a box it is the sequential one that the field uses, not the nearest point of the
        intersection, which ``project_exact`` finds. For ``Lp(p)`` the perturbation is scaled back
        to the ball, which is not the nearest point unless p = 2: repeated steepest steps then end
        at the maximiser over the ball, while under Euclidean projection they do not (its residual
        at ``w`` is along ``|w|^(p-1)``, the steepest step along ``|g|^(q-1)``; they agree for
        p = 1, 2 and inf).

        Args:
          x_adv: points to project.
          x: clean examples.

        Raises:
          ValueError: the shapes of ``x_adv`` and ``x`` differ.
        """
        self._check(x_adv=x_adv, x=x)
        delta = x_adv - x
        if isinstance(self.norm, Lp):
            length = self.norm.value(delta, batch_ndim=1)
            scale = jnp.minimum(1, self._eps(x) / jnp.where(length > 0, length, 1))
            return self.clip(x + delta * _per_example("scale", scale, x))
        return self.clip(x + self.norm.project(delta, self._eps(x), batch_ndim=1))

    def check_inputs(self, x: Any) -> None:
        """Raises ``ValueError`` unless ``x`` lies in the box; nothing where values are traced."""
        if all(map(checks.is_known, (x, self.lower, self.upper))):
            checks.in_box("x", x, lower=self.lower, upper=self.upper)

    def clip(self, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Into the box alone; keeps the dtype of ``x``."""
        return jnp.clip(x, jnp.asarray(self.lower, x.dtype), jnp.asarray(self.upper, x.dtype))

    def project_exact(
        self, x_adv: Float[Array, "n ..."], x: Float[Array, "n ..."]
    ) -> Float[Array, "n ..."]:
        """The nearest point of the intersection of ball and box, for l_inf, l_2 and l_1.

        Args:
          x_adv: points to project.
          x: clean examples.

        Raises:
          ValueError: the shapes of ``x_adv`` and ``x`` differ, or the norm is another one.
        """
        self._check(x_adv=x_adv, x=x)
        if isinstance(self.norm, LInf):
            return self.project(x_adv, x)
        if not isinstance(self.norm, (L2, L1)):
            raise ValueError(f"project_exact knows the norms linf, l2 and l1, got {self.norm.name}")
        nearest = lp.project_box_l2 if isinstance(self.norm, L2) else lp.project_box_l1

        def one(v, room, eps):
            wide = lp.wide(v.dtype)
            w = nearest(v.ravel().astype(wide), room.ravel().astype(wide), eps.astype(wide))
            return w.reshape(v.shape).astype(v.dtype)

        v = x_adv - x
        room = jnp.where(v > 0, self.upper - x, x - self.lower)
        # Ball and box once more: rounding may have left the point just outside.
        return self.project(x + jax.vmap(one)(v, room, self._eps(x)), x)

    def sample(self, key: Array, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """A random start: uniform in the ball around each example, then clipped to the box.

        Args:
          key: one key, or one per example ``(n,)``; see ``robustjax.keys``.
          x: clean examples.
        """
        self._check(x=x)
        draw = jax.vmap(self.norm.sample_ball)
        return self.clip(x + draw(keys.as_per_example(key, x.shape[0]), x, self._eps(x)))

    def step(
        self,
        x_adv: Float[Array, "n ..."],
        x: Float[Array, "n ..."],
        g: Float[Array, "n ..."],
        size: ArrayLike,
    ) -> Float[Array, "n ..."]:
        """One step of projected steepest ascent, of length ``size`` in the norm of the model.

        Args:
          x_adv: current points.
          x: clean examples.
          g: gradient of what is to be increased, at ``x_adv``.
          size: step size in input units, one number or one per example ``(n,)``.
        """
        self._check(x_adv=x_adv, x=x, g=g)
        direction = self.norm.steepest(g, batch_ndim=1)
        return self.project(x_adv + _per_example("size", size, x) * direction, x)

    def corner(
        self, x_adv: Float[Array, "n ..."], x: Float[Array, "n ..."]
    ) -> Float[Array, "n ..."]:
        """Pushes each perturbation to its full size, as far as the box lets it.

        The perturbation becomes ``eps * steepest(x_adv - x)``, for l_inf the corner
        ``eps * sign(x_adv - x)``; a zero perturbation stays zero.

        Source: Andriushchenko and Flammarion, "Understanding and improving fast adversarial
        training" (2020), section 3.
        """
        self._check(x_adv=x_adv, x=x)
        direction = self.norm.steepest(x_adv - x, batch_ndim=1)
        return self.clip(x + _per_example("eps", self.eps, x) * direction)

    def contains(
        self, x_adv: Float[Array, "n ..."], x: Float[Array, "n ..."], atol: ArrayLike = 1e-6
    ) -> Bool[Array, " n"]:
        """Whether each ``x_adv`` is feasible; False where it is not a number.

        Args:
          x_adv: points to check.
          x: clean examples.
          atol: absolute tolerance on the norm and on the box. The radius has a relative
            tolerance of 1e-6 besides, for the rounding of ``x_adv``.
        """
        self._check(x_adv=x_adv, x=x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x_adv, x = x_adv.astype(wide), x.astype(wide)
        in_ball = self.norm.value(x_adv - x, batch_ndim=1) <= self._eps(x) * (1 + 1e-6) + atol
        in_box = (x_adv >= self.lower - atol) & (x_adv <= self.upper + atol)
        return in_ball & jnp.all(in_box, axis=tuple(range(1, x.ndim)))

    def _check(self, **arrays: Any) -> None:
        x = arrays["x"]
        if jnp.ndim(x) < 1 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                f"x must be a batch of floating-point inputs (n, ...), "
                f"got {jnp.result_type(x)}{jnp.shape(x)}"
            )
        for name, value in arrays.items():
            checks.same_shape(name, value, "x", x)
        example = jnp.shape(x)[1:]
        for name in ("lower", "upper"):
            shape = jnp.shape(getattr(self, name))
            # One example, not the batch: a vector must not be taken for one bound per example.
            fits = all(a in (1, b) for a, b in zip(shape[::-1], example[::-1], strict=False))
            if not fits or len(shape) > len(example):
                raise ValueError(
                    f"{name} must broadcast against one example, {example}, got shape {shape}"
                )

    def _eps(self, x: Array) -> Array:
        return _per_example("eps", self.eps, x).reshape(-1)


def check(threat: Any) -> ThreatModel:
    """The threat model itself; raises ``ValueError`` for anything else, such as a name."""
    if not isinstance(threat, ThreatModel):
        raise ValueError(
            f"threat must be a ThreatModel, such as ThreatModel(LInf(), 8 / 255), "
            f"got {checks.shown(threat)}"
        )
    return threat


_LEAVES = ("eps", "lower", "upper")


def _flatten_with_keys(threat: ThreatModel) -> tuple[list, Norm]:
    return [(jax.tree_util.GetAttrKey(k), getattr(threat, k)) for k in _LEAVES], threat.norm


def _unflatten(norm: Norm, leaves: Any) -> ThreatModel:
    # JAX also rebuilds pytrees around placeholders (axes, shapes, None), which the checks of the
    # constructor, and hence jax.tree_util.register_dataclass, would refuse.
    threat = object.__new__(ThreatModel)
    for name, value in zip(("norm", *_LEAVES), (norm, *leaves), strict=True):
        object.__setattr__(threat, name, value)
    return threat


jax.tree_util.register_pytree_with_keys(ThreatModel, _flatten_with_keys, _unflatten)


def _per_example(name: str, value: ArrayLike, x: Array) -> Array:
    """A number or ``(n,)`` numbers as ``(n, 1, ...)`` in the dtype of ``x``."""
    n = x.shape[0]
    if jnp.shape(value) not in ((), (n,)):
        raise ValueError(
            f"{name} must be one number or one per example, ({n},), got shape {jnp.shape(value)}"
        )
    return jnp.broadcast_to(jnp.asarray(value, x.dtype), (n,)).reshape((n,) + (1,) * (x.ndim - 1))
