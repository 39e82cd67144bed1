"""Why squares: which supports of an update excite a convolution most.

A convolution with ``s x s`` filters responds to a perturbation of size eps by at most
``eps sum |w_ij|``, reached where a whole ``s x s`` window lies in the support. A support of given
area should hold as many windows as possible. Sources: Andriushchenko et al. (2020), "Square
Attack", section 4.2; Andriushchenko (2024), section 3.5, Proposition 3.5.2.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from robustjax import checks


def max_windows(k: int, s: int) -> int:
    """The largest number of ``s x s`` windows that ``k`` pixels can contain.

    ``(a - s + 1)(b - s + 1) + (r - s + 1)^+`` with ``a = floor(sqrt(k))``, ``b = floor(k / a)``,
    ``r = k - a b``: an almost square rectangle and the rest of its next row. For ``k = l^2`` it is
    the ``l x l`` square.

    Args:
      k: area in pixels, ``>= s^2``.
      s: side of the windows, ``>= 2``.

    Raises:
      ValueError: ``s < 2`` or ``k < s^2``.

    Source: Andriushchenko (2024), Proposition 3.5.2, equation (3.4). Its proof has ``b - a`` 0 or
    1; it is 2 for ``k = a^2 + 2 a``, where the formula holds too.
    """
    checks.integer("s", s, at_least=2)
    checks.integer("k", k, at_least=s * s)
    a = math.isqrt(k)
    b = k // a
    return (a - s + 1) * (b - s + 1) + max(k - a * b - s + 1, 0)


def count_windows(mask: Bool[Array, "h w"], s: int) -> Int[Array, ""]:
    """The number of ``s x s`` windows that lie wholly in the mask."""
    checks.integer("s", s, at_least=1)
    summed = jax.lax.reduce_window(mask.astype(jnp.int32), 0, jax.lax.add, (s, s), (1, 1), "VALID")
    return (summed == s * s).sum()


def mean_response(
    key: Key[Array, ""],
    support: Bool[Array, "h w"],
    filters: Float[Array, "s s c m"],
    eps: float = 1.0,
) -> Float[Array, ""]:
    """Average over the filters of ``max |delta * w|``, for an update on a given support.

    The update has the size eps and one random sign per channel, drawn anew for every filter. Among
    supports of equal area, on average over random filters, a square responds most.

    Args:
      key: one key, for the signs.
      support: pixels of the update.
      filters: filters ``(s, s, c, m)``, as a convolution layer has them.
      eps: size of an entry.
    """
    signs = jax.random.rademacher(key, filters.shape[2:], filters.dtype)
    # With one sign per channel the channels of a filter can be added before the convolution.
    summed = (filters * signs).sum(axis=2, keepdims=True)
    response = jax.lax.conv_general_dilated(
        eps * support.astype(filters.dtype)[None, :, :, None],
        summed,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jnp.abs(response).max(axis=(0, 1, 2)).mean()
