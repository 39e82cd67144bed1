"""Each flag fires on a model made for it, and none on a plain network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.benchmark import flags

RNG = np.random.default_rng(0)
X = jnp.array(RNG.uniform(size=(16, 4, 4, 1)), jnp.float32)
HIDDEN = jnp.array(RNG.normal(size=(16, 32)), jnp.float32)
OUT = jnp.array(RNG.normal(size=(32, 10)), jnp.float32)
KEY = jax.random.key(0)


def plain(x):
    return jax.nn.relu(x.reshape(len(x), -1) @ HIDDEN) @ OUT


Y = jnp.argmax(plain(X), axis=-1).astype(jnp.int32)


def names(logits_fn, **options):
    return [flag.name for flag in flags.of_model(logits_fn, X, Y, KEY, **options)]


def test_plain_network_raises_none():
    assert names(plain) == []


def test_scan_over_layers_is_no_optimisation():
    def layered(x):
        weights = jnp.stack([jnp.eye(32)] * 3)
        hidden = jax.nn.relu(x.reshape(len(x), -1) @ HIDDEN)
        return jax.lax.scan(lambda h, w: (h @ w, None), hidden, weights)[0] @ OUT

    assert names(layered) == []


def test_quantised_inputs():
    assert names(lambda x: plain(jnp.floor(x * 16) / 16)) == ["zero_gradient"]


def test_probabilities():
    assert names(lambda x: jax.nn.softmax(plain(x))) == ["probabilities"]


def test_noise_at_test_time():
    def noisy(x, keys):
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
        return plain(x + 0.1 * noise)

    assert names(noisy, randomized=True) == ["randomized"]
    assert names(lambda x, keys: plain(x), randomized=True) == []


def test_hidden_noise():
    """A model that draws behind JAX's back."""
    draws = np.random.default_rng(1)

    def impure(x):
        shape = jax.ShapeDtypeStruct((16, 10), jnp.float32)
        noise = jax.experimental.io_callback(
            lambda: draws.normal(size=(16, 10)).astype(np.float32), shape
        )
        return plain(x) + jax.lax.stop_gradient(noise)

    assert names(impure) == ["randomized"]


def test_loop_of_unknown_length():
    def optimises(x):
        def body(carry):
            step, z = carry
            return step + 1, 0.9 * z

        _, z = jax.lax.while_loop(lambda c: (c[1] ** 2).sum() > 1.0, body, (0, x))
        return plain(x + jax.lax.stop_gradient(z))

    assert names(optimises) == ["dynamic"]
    assert names(jax.jit(optimises)) == ["dynamic"]


def test_logits_that_are_no_numbers():
    found = names(lambda x: plain(x).at[0, 0].set(jnp.nan))
    assert "not_a_number" in found


@pytest.mark.parametrize(("drop", "fires"), [(0.0019, False), (0.002, False), (0.0021, True)])
def test_drop_by_a_gradient_free_attack(drop, fires):
    found = flags.unreliable("square", 0.5, 0.5 - drop)
    assert [flag.name for flag in found] == ["unreliable"] * fires


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (2, "the DLR loss needs 3 classes and the targeted DLR loss needs 4 classes"),
        (3, "the targeted DLR loss needs 4 classes, the model has 3"),
        (5, "targeted attacks aim at 4 instead of 9 wrong classes"),
    ],
)
def test_few_classes(classes, message):
    (flag,) = flags.class_count(classes, 9)
    assert flag.name == "classes"
    assert message in flag.message


def test_enough_classes():
    assert flags.class_count(10, 9) == []
