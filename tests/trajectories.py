"""Random gradients, optimizers run on them, and their trajectories as matrices."""

import functools

import jax
import numpy as np
import optax

# Tiny programs: what takes time is compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PARAMS = {"w": np.float32([[1.0, -2.0], [0.5, 3.0]]), "b": np.float32([-1.0, 0.2])}
STEPS = 6


def gradients(seed=0, size=1.0, steps=STEPS, like=PARAMS, examples=()):
    """A sequence of gradients: a leading axis of steps, and then one of examples if given.

    They are NumPy's, like whatever the tests make of them: nothing is compiled for that.
    """
    rng = np.random.default_rng(seed)
    return {
        name: (size * rng.normal(size=(steps, *examples, *leaf.shape))).astype(leaf.dtype)
        for name, leaf in like.items()
    }


def scan(transform, grads, params=PARAMS):
    """Updates and parameters after each step, one row a step, and the last state."""

    def step(carry, g):
        params, state = carry
        updates, state = transform.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (updates, params)

    (_, state), trajectory = jax.lax.scan(step, (params, transform.init(params)), grads)
    return *trajectory, state


def run(transform, grads, params=PARAMS):
    return jit(functools.partial(scan, transform))(grads, params)


def rows(tree, batch_ndim=1):
    """A matrix of one vector per row; with more batch axes, an array of vectors."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    vectors = [x.reshape(*x.shape[:batch_ndim], -1) for x in leaves]
    return np.concatenate(vectors, axis=-1)


def flat(tree):
    return rows(tree, batch_ndim=0)


def lengths(tree, batch_ndim=1):
    return np.linalg.norm(rows(tree, batch_ndim), axis=-1)


def buffers(updates, lr):
    """The momentum buffers behind the updates of a constant learning rate."""
    return jax.tree.map(lambda u: -np.asarray(u) / lr, updates)


def geometric(momentum, steps=STEPS):
    return (1 - momentum ** np.arange(1, steps + 1)) / (1 - momentum)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)
