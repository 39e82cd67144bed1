"""What reverse-mode differentiation keeps, from shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.training import residual_bytes, tree_bytes


def test_bytes_of_a_tree():
    tree = {
        "a": jnp.zeros((2, 3)),
        "b": [jnp.zeros(4, jnp.bfloat16), jax.ShapeDtypeStruct((), int)],
    }
    assert tree_bytes(tree) == 24 + 8 + np.dtype(int).itemsize
    assert tree_bytes(()) == 0


def test_a_chain_of_exponentials_keeps_each_of_its_values():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)  # nothing is computed

    def chain(x, depth):
        for _ in range(depth):
            x = jnp.exp(x)
        return x.sum()

    for depth in (1, 5):
        assert residual_bytes(lambda x, depth=depth: chain(x, depth), x) == 4000 * depth


def test_only_the_first_argument_is_differentiated():
    x, w = (jax.ShapeDtypeStruct((100, 100), jnp.float32) for _ in range(2))
    assert residual_bytes(lambda w, x: (x @ w).sum(), w, x) == 40_000  # x for the derivative for w
    assert residual_bytes(lambda w, x: (jnp.exp(x) @ w).sum(), w, x) == 40_000
