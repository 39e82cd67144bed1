"""The loss around an example, on the plane of an adversarial and a random perturbation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import checks, keys
from robustjax.norms import L2


class LossPlane(NamedTuple):
    """Losses on a plane through an example.

    Attributes:
      loss: ``loss[i, j]`` at ``x + coordinates[i] axes[0] + coordinates[j] axes[1]``.
      coordinates: of the grid along both axes, ``(points,)``; 0 and 1 are among them exactly.
      axes: the perturbation and the random direction, orthogonal and of one l_2 norm,
        ``(2, ...)``.
    """

    loss: Float[Array, "points points"]
    coordinates: Float[Array, " points"]
    axes: Float[Array, "2 ..."]


def loss_plane(
    loss_fn: Callable[[Array], Array],
    x: Float[Array, "..."],
    first: Float[Array, "..."],
    key: Key[Array, ""],
    *,
    extent: float = 1.5,
    points: int = 31,
) -> LossPlane:
    """Losses around ONE example, along a perturbation and a random direction orthogonal to it.

    The random direction is Gaussian, made orthogonal by Gram-Schmidt and as long as the
    perturbation. The grid is not clipped to the box of the inputs. It is evaluated row by row,
    ``points`` inputs at a time.

    Args:
      loss_fn: losses ``(m, ...) -> (m,)`` of inputs that all have the example's label, such as
        ``lambda x: cross_entropy(logits_fn(x), jnp.full(len(x), y))``.
      x: the example, without batch axis, of at least two numbers.
      first: its adversarial perturbation ``x_adv - x``, not zero.
      key: one key, for the random direction.
      extent: the grid covers ``[-extent, extent]^2``, in units of the perturbation, ``>= 1``.
      points: grid points along an axis, ``2 extent k + 1`` for an integer ``k`` of them per unit,
        so that the clean and the adversarial example are among them.

    Raises:
      ValueError: an argument is out of range, shapes do not fit, or ``first`` is zero.

    Source: Dabouei et al. (2022), "Revisiting outer optimization in adversarial training", figure
    4; the extent and the grid are not given there.
    """
    checks.function("loss_fn", loss_fn)
    keys.check_one(key)
    checks.same_shape("first", first, "x", x)
    if x.size < 2:
        raise ValueError(f"x must hold at least two numbers to span a plane, got shape {x.shape}")
    if checks.is_known(first) and not jnp.any(first):
        raise ValueError("first must not be zero, got a perturbation of all zeros")
    coordinates = _grid(extent, points).astype(x.dtype)
    axes = jnp.stack([first, _orthogonal(key, first)])

    def row(a: Array) -> Float[Array, " points"]:
        b = coordinates.reshape(-1, *[1] * x.ndim)
        return checks.per_example("loss_fn(x)", loss_fn(x + a * axes[0] + b * axes[1]), points)

    return LossPlane(jax.lax.map(row, coordinates), coordinates, axes)


def curvature(plane: LossPlane) -> Float[Array, ""]:
    """Mean absolute second difference of the losses along both axes, per squared unit.

    0 for an affine loss; for a smooth one it tends to the mean of ``|d^2 loss / da^2|``, in units
    of the perturbation, as the grid becomes fine. It is large where the landscape is rough.
    """
    step = plane.coordinates[1] - plane.coordinates[0]
    along = [jnp.mean(jnp.abs(jnp.diff(plane.loss, n=2, axis=axis))) for axis in (0, 1)]
    return (along[0] + along[1]) / (2 * jnp.square(step))


def _grid(extent: float, points: int) -> Float[Array, " points"]:
    checks.number("extent", extent, at_least=1)
    checks.integer("points", points, at_least=3)
    per_unit = round((points - 1) / (2 * extent))
    if points % 2 == 0 or abs(2 * extent * per_unit - (points - 1)) > 1e-6:
        raise ValueError(
            f"points must be odd and 2 extent k + 1 for an integer k, so that 0 and 1 lie on the "
            f"grid (31 or 61 for extent 1.5), got {points} for extent {extent:g}"
        )
    half = points // 2
    return jnp.arange(-half, half + 1) / per_unit


def _orthogonal(key: Array, first: Array) -> Float[Array, "..."]:
    """A random direction orthogonal to ``first`` and as long."""
    wide = first.astype(jnp.promote_types(first.dtype, jnp.float32))
    unit = L2().steepest(wide)
    second = jax.random.normal(key, first.shape, wide.dtype)
    for _ in range(2):  # the second time removes what rounding left
        second = L2().steepest(second - jnp.vdot(unit, second) * unit)
    return (L2().value(wide) * second).astype(first.dtype)
