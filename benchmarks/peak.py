"""The rate of matrix products of a device, as it is measured."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from robustjax import checks


def matmul_rate(
    dtype: Any, *, sizes: Sequence[int], products: int = 4, rounds: int = 3
) -> dict[str, float]:
    """Operations per second of square matrix products, the best of all sizes and rounds.

    It is the rate that programs in the same process can reach, with the precision that they use:
    nothing is looked up, and float32 is what the platform makes of it by default (on NVIDIA GPUs
    TF32).

    Args:
      dtype: of the matrices.
      sizes: rows of the square matrices that are tried; large ones fill the device.
      products: products in a row in a measurement, each of the last one's result.
      rounds: measurements of each size.

    Returns:
      ``rate``, in operations per second (a multiplication and an addition are two), and the
      ``size`` that gave it.
    """
    checks.integer("products", products, at_least=1)
    checks.integer("rounds", rounds, at_least=1)
    best = {"rate": 0.0, "size": 0}
    for size in sizes:
        checks.integer("sizes", size, at_least=1)
        # Entries of +-1/sqrt(size): products of products stay of the size of one.
        x = jax.random.rademacher(jax.random.key(0), (size, size), dtype) / dtype(size) ** 0.5
        multiply = jax.jit(partial(_powers, products=products))
        jax.block_until_ready(multiply(x))
        for _ in range(rounds):
            began = time.perf_counter()
            jax.block_until_ready(multiply(x))
            rate = 2 * products * size**3 / (time.perf_counter() - began)
            if rate > best["rate"]:
                best = {"rate": rate, "size": size}
    return best


def _powers(x: jax.Array, *, products: int) -> jax.Array:
    return jax.lax.fori_loop(0, products, lambda _, y: jnp.matmul(x, y), x)
