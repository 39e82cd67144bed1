"""Random search on smooth functions, and the square updates of Square Attack as its steps.

Random search keeps a random step if it lowers ``g``. For an L-smooth ``g`` it converges if the
steps have mean zero and, with a step length ``gamma_t``,

    E ||delta_t||_2^2 <= gamma_t^2 C,    E |<delta_t, v>| >= C~ gamma_t ||v||_2  for every v.

Steps of one sign for a whole square violate the second condition, steps of independent signs
fulfil it. Sources: Andriushchenko et al. (2020), "Square Attack", section 4.1; Andriushchenko
(2024), section 3.5, equation (3.3) and Proposition 3.5.1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import checks
from robustjax.norms import L2


class SearchConstants(NamedTuple):
    """The constants of equation (3.3), for steps of length ``gamma``.

    Attributes:
      moment: ``C``, ``E ||delta||_2^2 <= gamma^2 C``.
      correlation: ``C~``, ``E |<delta, v>| >= C~ gamma ||v||_2``.
    """

    moment: float
    correlation: float


class SearchTrace(NamedTuple):
    """The points of a random search and their values; the first is the start.

    Attributes:
      x: points, ``(steps + 1, ...)``.
      value: ``g`` at them, ``(steps + 1,)``; never rises.
    """

    x: Float[Array, "points ..."]
    value: Float[Array, " points"]


def random_search(
    g: Callable[[Array], Array],
    sample: Callable[[Array, Array], Array],
    key: Key[Array, ""],
    x: Float[Array, "..."],
    *,
    steps: int,
) -> SearchTrace:
    """Minimises ``g`` from ``x``: a step ``sample(key, t)`` is kept if it lowers ``g``.

    Args:
      g: function of one point to a scalar.
      sample: ``sample(key, t) -> delta``, the step ``t = 0, 1, ...`` in the shape of ``x``.
      key: one key; step ``t`` draws from ``fold_in(key, t)``.
      x: the start.
      steps: number of steps, ``>= 1``.
    """
    checks.function("g", g)
    checks.function("sample", sample)
    checks.integer("steps", steps, at_least=1)

    def step(carry: tuple[Array, Array], t: Array):
        x, value = carry
        candidate = x + sample(jax.random.fold_in(key, t), t)
        new = g(candidate)
        kept = (jnp.where(new < value, candidate, x), jnp.where(new < value, new, value))
        return kept, kept

    start = (x, g(x))
    _, (xs, values) = jax.lax.scan(step, start, jnp.arange(steps))
    return SearchTrace(jnp.concatenate([x[None], xs]), jnp.append(start[1], values))


def gradient_norm_bound(
    constants: SearchConstants, *, gamma: float, steps: int, gap: float, smoothness: float
) -> float:
    """Bound on the smallest ``E ||grad g(x_t)||_2``, t = 0 .. T, with ``gamma_t = gamma/sqrt(T)``.

    ``2 / (gamma C~ sqrt(T)) * (gap + gamma^2 C L / 2)``.

    Args:
      constants: of the distribution of the steps.
      gamma: total step length, ``> 0``.
      steps: ``T >= 1``; the search makes ``T + 1`` steps.
      gap: ``g(x_0) - E g(x_{T+1})``, or any upper bound of it.
      smoothness: ``L``, Lipschitz constant of the gradient.

    Source: Andriushchenko (2024), Proposition 3.5.1.
    """
    checks.number("gamma", gamma, above=0)
    checks.integer("steps", steps, at_least=1)
    checks.number("smoothness", smoothness, at_least=0)
    return (
        2
        / (gamma * constants.correlation * math.sqrt(steps))
        * (gap + gamma**2 * constants.moment * smoothness / 2)
    )


def sample_sphere(
    key: Key[Array, ""], shape: tuple[int, ...], gamma: float | Array
) -> Float[Array, "..."]:
    """A step uniform on the Euclidean sphere of radius ``gamma``."""
    return L2().sample_sphere(key, jax.ShapeDtypeStruct(shape, jnp.float32), gamma)


def sphere_constants(dimension: int) -> SearchConstants:
    """``C = 1`` and ``C~ = E |u_1| = Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))`` of the sphere."""
    checks.integer("dimension", dimension, at_least=1)
    d = dimension
    mean = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    return SearchConstants(1.0, mean)


def sample_single(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    side: int,
    eps: float | Array,
    *,
    windows: str = "inside",
) -> Float[Array, "h w c"]:
    """The step of the l_inf Square Attack: one window, one sign per channel, entries ``2 eps``.

    Args:
      key: one key.
      shape: of the image, ``(h, w, c)``.
      side: side of the window in pixels, ``1 .. min(h, w)``.
      eps: half the size of an entry.
      windows: where they may lie: ``"inside"`` the image (the attack), ``"wrapped"`` around its
        edges, or on the ``"tiles"`` into which ``side`` divides it.

    Source: Andriushchenko (2024), algorithm 2.
    """
    place, sign = jax.random.split(key)
    window = _window(place, shape, side, windows)
    return 2 * eps * window * jax.random.rademacher(sign, (1, 1, shape[2]), jnp.float32)


def sample_multiple(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    side: int,
    eps: float | Array,
    *,
    windows: str = "wrapped",
) -> Float[Array, "h w c"]:
    """One window with an independent sign for every pixel and channel, entries ``2 eps``.

    Arguments as of ``sample_single``. Exactly ``||delta||_2^2 = 4 c eps^2 side^2``.

    Source: Andriushchenko (2024), algorithm 4. Deviation: the listing draws the first row and
    column from ``0 .. w``, where ``w`` wraps around to 0 and counts it twice; here from 0 .. w - 1.
    """
    place, sign = jax.random.split(key)
    window = _window(place, shape, side, windows)
    return 2 * eps * window * jax.random.rademacher(sign, shape, jnp.float32)


def multiple_constants(shape: tuple[int, ...], side: int) -> SearchConstants:
    """Constants of ``sample_multiple`` with wrapped windows, for ``gamma = eps``.

    ``C = 4 c side^2``, and by Khintchine's inequality ``C~ = sqrt(2) side^2 / (h w)``.

    Source: Andriushchenko (2024), section 3.5.
    """
    _check_side(shape, side)
    height, width, channels = shape
    share = side**2 / (height * width)
    return SearchConstants(4.0 * channels * side**2, math.sqrt(2) * share)


def correlation_bounds(
    v: Float[Array, "h w c"], side: int, eps: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Lower and upper bound of ``E |<delta, v>|`` under ``sample_multiple``, wrapped windows.

    ``sqrt(2) eps (side^2 / hw) ||v||_2`` and ``2 eps (side / sqrt(hw)) ||v||_2``. Under
    ``sample_single`` with tiles, of one channel, it is ``2 eps (side^2 / hw) ||v||_1`` if ``v`` has
    a constant sign on every tile: larger by a factor of order ``side`` for piecewise constant
    ``v``.

    Source: Andriushchenko (2024), section 3.5; the upper bound by Jensen's inequality.
    """
    _check_side(v.shape, side)
    share = side**2 / (v.shape[0] * v.shape[1])
    norm = L2().value(v)
    return math.sqrt(2) * eps * share * norm, 2 * eps * math.sqrt(share) * norm


def _window(key: Array, shape: tuple[int, ...], side: int, windows: str) -> Float[Array, "h w 1"]:
    checks.choice("windows", windows, ("inside", "wrapped", "tiles"))
    _check_side(shape, side)
    inside = []
    for k, length in zip(jax.random.split(key), shape[:2], strict=True):
        if windows == "tiles":
            checks.divisible("shape", length, "side", side)
            start = side * jax.random.randint(k, (), 0, length // side)
        else:
            start = jax.random.randint(
                k, (), 0, length if windows == "wrapped" else length - side + 1
            )
        inside.append((jnp.arange(length) - start) % length < side)
    return (inside[0][:, None] & inside[1]).astype(jnp.float32)[..., None]


def _check_side(shape: tuple[int, ...], side: int) -> None:
    if len(shape) != 3:
        raise ValueError(f"shape must be that of an image (h, w, c), got {shape}")
    checks.integer("side", side, at_least=1, at_most=min(shape[:2]))
