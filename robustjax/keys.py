"""Random keys: one per example, derived from the example's index and nothing else.

A result computed with ``per_example(key, index)`` depends neither on the batch size nor on the
number of devices, because example ``i`` draws from ``fold_in(key, i)`` wherever it is computed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from robustjax import checks


def check(key: Array) -> Array:
    """A typed key (``jax.random.key``) or an array of them; raises ``ValueError`` otherwise."""
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError(f"key must be a typed key made by jax.random.key, got {checks.shown(key)}")
    return key


def check_one(key: Array) -> Key[Array, ""]:
    """A single typed key; raises ``ValueError`` otherwise."""
    if check(key).shape != ():
        raise ValueError(f"key must be a single key, got shape {key.shape}")
    return key


def per_example(key: Key[Array, ""], index: Int[Array, " n"]) -> Key[Array, " n"]:
    """``fold_in(key, index[i])`` for each example ``i``; ``index`` is its place in the data set.

    Raises:
      ValueError: ``key`` is not a single typed key, or ``index`` not integers ``(n,)``.
    """
    check_one(key)
    checks.integers("index", index)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def as_per_example(key: Array, n: int) -> Key[Array, " n"]:
    """Keys for ``n`` examples: ``key`` itself if it is already ``(n,)``, else indices 0 .. n-1.

    Raises:
      ValueError: ``key`` is not a typed key, or neither a single one nor one per example.
    """
    check(key)
    if key.shape == ():
        return per_example(key, jnp.arange(n))
    if key.shape != (n,):
        raise ValueError(f"key must be one key or one per example, ({n},), got shape {key.shape}")
    return key


def fold_in(keys: Key[Array, " n"], data: int | Int[Array, ""]) -> Key[Array, " n"]:
    """``jax.random.fold_in`` with the same ``data >= 0`` for every key of a batch.

    Raises:
      ValueError: ``keys`` are not typed keys ``(n,)``, or ``data`` is not an integer ``>= 0``.
    """
    if check(keys).ndim != 1:
        raise ValueError(f"keys must have shape (n,), got {keys.shape}")
    if not jnp.issubdtype(jnp.result_type(data), jnp.integer):
        raise ValueError(f"data must be an integer, got {checks.shown(data)}")
    checks.number("data", data, at_least=0)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)
