"""VGG: sizes by hand, pooling against Flax's, an unnormalised network against its formula."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models
from robustjax.models.vgg import _max_pool

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(3, 9, 8, 1)), jnp.float32)


def shapes(module, image=(32, 32, 3)):
    x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    return jax.eval_shape(models.from_linen(module).init, KEY, x)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_vgg8_has_the_size_of_its_formula():
    channels = (3, 64, 64, 128, 128, 256, 256)
    convolutions = sum(9 * a * b for a, b in itertools.pairwise(channels))
    scales = 2 * sum(channels[1:])
    dense = (4 * 4 * 256 + 1) * 256 + 257 * 10
    params, state = shapes(models.VGG8())
    assert size(params) == convolutions + scales + dense == 2_197_706
    assert size(state) == scales
    assert set(params["stage3_conv2"]) == {"kernel"}
    assert params["stage3_conv2"]["kernel"].shape == (3, 3, 256, 256)


@pytest.mark.parametrize(
    "module, channels",
    [
        (models.CNN6(), (3, 64, 64, 128, 128, 196, 196)),
        (models.CNN8(), (3, 64, 64, 128, 128, 196, 196, 256, 256)),
    ],
)
def test_plain_networks_have_the_sizes_of_their_formulas(module, channels):
    convolutions = sum(9 * a * b + b for a, b in itertools.pairwise(channels))
    side = 32 // 2 ** (len(channels) // 2)
    dense = (side**2 * channels[-1] + 1) * 256 + 257 * 10
    params, state = shapes(module)
    assert size(params) == convolutions + dense and not jax.tree.leaves(state)


def test_width_scales_all_layers():
    params, _ = shapes(models.VGG8(width=4, num_classes=5), (8, 8, 1))
    kernels = {name: p["kernel"].shape[-1] for name, p in params.items() if "kernel" in p}
    assert kernels == {
        "stage1_conv1": 4,
        "stage1_conv2": 4,
        "stage2_conv1": 8,
        "stage2_conv2": 8,
        "stage3_conv1": 16,
        "stage3_conv2": 16,
        "dense1": 16,
        "head": 5,
    }
    assert params["dense1"]["kernel"].shape == (16, 16)  # 8x8 images leave one position


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 7, 3)])
def test_pooling_is_that_of_flax(shape):
    x = jnp.asarray(RNG.normal(size=shape), jnp.float32)

    def value_and_grad(pool):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(pool(x)))))(x)

    flax = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    np.testing.assert_array_equal(_max_pool(x), flax(x))
    for a, b in zip(value_and_grad(_max_pool), value_and_grad(flax), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_an_unnormalised_network_is_its_formula():
    module = models.VGG(((1, 2), (3,)), (2,), num_classes=5, width=2, norm="none")
    params = jax.jit(module.init)(KEY, X)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not zero

    x = X
    for stage in (("stage1_conv1", "stage1_conv2"), ("stage2_conv1",)):
        for name in stage:
            x = jax.lax.conv_general_dilated(
                x,
                params[name]["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + params[name]["bias"])
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape(3, -1)
    x = jax.nn.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    got = jax.jit(module.apply)({"params": params}, X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    "module, x, message",
    [
        (models.VGG8(), X[:, :7], r"with h and w >= 8, got \(3, 7, 8, 1\)"),
        (models.VGG8(), X[0], r"x must have shape \(n, h, w, c\)"),
        (models.VGG8(norm="layer"), X, "norm must be one of"),
        (models.VGG8(conv="fft"), X, "conv must be one of"),
        (models.VGG8(num_classes=0), X, "num_classes must be >= 1, got 0"),
        (models.VGG8(), X.astype(jnp.int32), "x must be floating-point"),
    ],
)
def test_bad_choices_are_refused(module, x, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(models.from_linen(module).init, KEY, x)
