"""What a program holds at once, from shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import parallel
from robustjax.training import peak_bytes, tree_bytes

X = jax.ShapeDtypeStruct((1000,), jnp.float32)  # nothing is computed
SIZE = 4000


def chain(x, depth=1):
    for _ in range(depth):
        x = jnp.exp(x)
    return x


def test_bytes_of_a_tree():
    tree = {
        "a": jnp.zeros((2, 3)),
        "b": [jnp.zeros(4, jnp.bfloat16), jax.ShapeDtypeStruct((), int)],
    }
    assert tree_bytes(tree) == 24 + 8 + np.dtype(int).itemsize
    assert tree_bytes(()) == 0


@pytest.mark.parametrize(
    ("fn", "arrays"),
    [
        (lambda x: x, 1),
        (chain, 2),  # the argument, and the result
        (lambda x: chain(x, 2), 3),  # and a value between
        (lambda x: chain(x, 9), 4),  # and one that is read while the next is made
        (lambda x: [chain(x), chain(x)], 3),
        (lambda x: jnp.exp(x) * jnp.sin(x), 4),
        (lambda x: jax.jit(lambda x: jnp.exp(x) * jnp.sin(x))(x), 4),
        # Argument, result, the sine and what is called; inside, two values more.
        (lambda x: jnp.sin(x) + jax.jit(lambda x: jnp.exp(x) * jnp.sin(x))(x), 6),
        # Argument, carry and, of three values in a row, two; with stacked values, those, too.
        (lambda x: jax.lax.scan(lambda x, _: (chain(x, 3), None), x, length=7)[0], 4),
        (lambda x: jax.lax.scan(lambda x, _: (chain(x, 3), x), x, length=7), 4 + 7),
        # A round reads a slice, and makes one of the stacked results.
        (lambda x: jax.lax.scan(lambda c, x: (c, chain(x)), 0.0, jnp.stack([x] * 3)), 1 + 3 + 5),
        (lambda x: jax.lax.while_loop(lambda x: x[0] < 9, lambda x: chain(x, 3), x), 4),
        (lambda x: jax.jit(lambda x: x + np.ones(1000, np.float32) * jnp.sum(x))(x), 4),
        (lambda x: jax.lax.cond(True, chain, lambda x: chain(x, 5), x), 4),  # the costliest branch
    ],
)
def test_values_are_there_from_their_operation_to_the_last_that_reads_them(fn, arrays):
    # Up to scalars: indices, lengths, predicates.
    assert peak_bytes(fn, X) == pytest.approx(arrays * SIZE, abs=16)


def test_a_result_takes_the_place_of_a_donated_argument_like_it():
    def fn(a, b):
        return chain(a), b.sum()

    # Two arguments, one of which is read before its place is taken.
    assert peak_bytes(jax.jit(fn), X, X) == pytest.approx(3 * SIZE, abs=16)
    assert peak_bytes(jax.jit(fn, donate_argnums=0), X, X) == pytest.approx(2 * SIZE, abs=16)
    other = jax.jit(lambda a: a.astype(jnp.bfloat16), donate_argnums=0)
    assert peak_bytes(other, X) == pytest.approx(1.5 * SIZE, abs=16)


def test_an_argument_that_is_not_read_and_a_key_are_there():
    y = jax.ShapeDtypeStruct((500,), jnp.float32)
    assert peak_bytes(lambda x, y: jax.jit(chain)(x), X, y) == 2.5 * SIZE
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert peak_bytes(lambda key: key, key) == tree_bytes(key) == 8


def test_a_backward_pass_holds_each_value_of_the_forward_one():
    found = [
        peak_bytes(jax.grad(lambda x, depth=depth: chain(x, depth).sum()), X)
        for depth in (5, 6, 20)
    ]
    assert found[1] - found[0] == SIZE and found[2] - found[0] == 15 * SIZE
    # Argument, result, the five values, one derivative and the next one.
    assert found[0] == pytest.approx(9 * SIZE, abs=16)


def test_what_is_computed_again_is_not_held():
    def loss(x, block):
        for _ in range(4):
            x = block(x)
        return x.sum()

    def block(x):
        return chain(x, 5)

    kept, again = (
        peak_bytes(jax.grad(lambda x, f=f: loss(x, f)), X) for f in (block, jax.checkpoint(block))
    )
    assert kept == pytest.approx(24 * SIZE, abs=16)
    # The three values between blocks, and the five of one block in its backward pass.
    assert again == pytest.approx(12 * SIZE, abs=2 * SIZE)


def test_of_a_function_over_devices_it_is_that_of_one():
    def fn(a, x):
        return a.sum() + chain(x, 3)

    mesh = parallel.device_mesh(jax.devices()[:4])
    specs = {"in_specs": (parallel.REPLICATED, parallel.SPLIT), "out_specs": parallel.SPLIT}
    shared = jax.ShapeDtypeStruct((10,), jnp.float32)
    found = peak_bytes(parallel.parallel(fn, mesh, **specs), shared, X)
    assert found == pytest.approx(40 + 4 * SIZE / 4, abs=16)
