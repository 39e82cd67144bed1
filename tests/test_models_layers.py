"""Layers: normalisation of inputs and features, convolution module, initial values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from robustjax import models
from robustjax.models import layers

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def images(*shape):
    return jnp.asarray(RNG.uniform(size=shape), jnp.float32)


@pytest.mark.parametrize(
    "mean,std", [((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)), (0.5, 0.25), (None, None)]
)
def test_normalize_is_affine_per_channel(mean, std):
    x = images(2, 4, 4, 3)
    got = models.Normalize(mean, std).apply({}, x)
    expected = (x - np.float32(mean or 0)) / np.float32(std or 1)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert models.Normalize(mean, std).init(KEY, x) == {}


def test_normalize_computes_in_float32():
    x = images(2, 4, 4, 3).astype(jnp.bfloat16)
    got = models.Normalize(0.5, 0.25).apply({}, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (np.asarray(x, np.float32) - 0.5) / 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    "mean,std,x,message",
    [
        ((0.1, 0.2), 1.0, np.zeros((1, 4, 4, 3), np.float32), "mean must be one number or one for"),
        (0.0, (1.0, 0.0, 1.0), np.zeros((1, 4, 4, 3), np.float32), "std must be > 0"),
        (0.0, ((1.0,), (1.0,), (1.0,)), np.zeros((1, 4, 4, 3), np.float32), "got shape"),
        (None, None, np.zeros((1, 4, 4, 3), np.uint8), "x must be floating-point.*uint8"),
    ],
)
def test_normalize_refuses(mean, std, x, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        models.Normalize(mean, std).apply({}, x)


@pytest.mark.parametrize("padding,strides", [("SAME", 2), (1, 2), (((2, 0), (1, 1)), (1, 2))])
@pytest.mark.parametrize("use_bias", [True, False])
def test_conv_is_that_of_flax(padding, strides, use_bias):
    x = images(2, 7, 6, 3)
    ours = layers.Conv(4, (3, 2), strides, padding, use_bias)
    flax = nn.Conv(4, (3, 2), strides, padding, use_bias=use_bias)
    variables = ours.init(KEY, x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, flax.init(KEY, x))
    if use_bias:
        variables["params"]["bias"] += jnp.arange(4.0)
    np.testing.assert_array_equal(ours.apply(variables, x), flax.apply(variables, x))


def test_conv_computes_in_bfloat16_with_float32_parameters():
    x = images(2, 6, 6, 3)
    conv = layers.Conv(4, 3, use_bias=True, dtype=jnp.bfloat16)
    variables = conv.init(KEY, x)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert conv.apply(variables, x).dtype == jnp.bfloat16
    gradients = jax.grad(lambda v: conv.apply(v, x).astype(jnp.float32).sum())(variables)
    assert {v.dtype for v in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "options,shape,message",
    [
        ({"conv": "fast"}, (1, 4, 4, 3), "conv must be one of 'canonical', 'plain', got 'fast'"),
        ({}, (4, 4, 3), r"x must have shape \(n, h, w, c\), got \(4, 4, 3\)"),
    ],
)
def test_conv_refuses(options, shape, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        layers.Conv(4, 3, **options).init(KEY, jnp.zeros(shape))


@pytest.mark.parametrize(
    "initializer,variance",
    [
        (models.he_fan_out, 2 / (3 * 3 * 64)),
        (models.he_fan_in, 2 / (3 * 3 * 16)),
        (models.torch_default, 1 / (3 * 3 * 3 * 16)),
    ],
)
def test_initial_kernels_have_the_stated_variance(initializer, variance):
    kernel = np.asarray(initializer(KEY, (3, 3, 16, 64)))
    np.testing.assert_allclose(kernel.var(), variance, rtol=0.05)
    np.testing.assert_allclose(kernel.mean(), 0, atol=4 * np.sqrt(variance / kernel.size))


def test_torch_default_is_bounded_by_the_inverse_root_of_fan_in():
    kernel = np.asarray(models.torch_default(KEY, (3, 3, 16, 64)))
    bound = 1 / np.sqrt(3 * 3 * 16)
    assert 0.99 * bound < np.abs(kernel).max() <= bound


class Norm(nn.Module):
    norm: str
    dtype: object = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        options = {"train": train, "dtype": self.dtype, "axis_name": self.axis_name}
        return models.feature_norm(self.norm, x, **options)


def test_batch_norm_records_the_biased_variance_with_torch_momentum():
    x = images(4, 3, 3, 2)
    norm = Norm("batch")
    variables = norm.init(KEY, x)
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-3, atol=1e-4)
    recorded = updated["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(recorded["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(recorded["var"], 0.9 + 0.1 * var, rtol=1e-4)
    y = norm.apply({**variables, **updated}, x)
    expected = (x - recorded["mean"]) / np.sqrt(recorded["var"] + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_are_float32_under_bfloat16():
    x = (100 + images(8, 4, 4, 2)).astype(jnp.bfloat16)
    norm = Norm("batch", jnp.bfloat16)
    variables = norm.init(KEY, x)
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    mean = updated["batch_stats"]["BatchNorm_0"]["mean"]
    assert mean.dtype == jnp.float32
    expected = 0.1 * np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_synchronised_statistics_are_those_of_the_whole_batch():
    x = images(8, 3, 3, 2)
    alone, together = Norm("batch"), Norm("batch", axis_name="device")
    variables = alone.init(KEY, x)

    def share(x):
        return together.apply(variables, x, train=True, mutable=["batch_stats"])

    split, shared = PartitionSpec("device"), PartitionSpec()
    mesh = jax.make_mesh((4,), ("device",))
    sharded = jax.shard_map(share, mesh=mesh, in_specs=split, out_specs=(split, shared))
    expected = alone.apply(variables, x, train=True, mutable=["batch_stats"])
    x = jax.device_put(x, NamedSharding(mesh, split))
    for a, b in zip(jax.tree.leaves(jax.jit(sharded)(x)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "channels,groups", [(512, 32), (64, 32), (48, 24), (16, 8), (8, 4), (4, 2), (3, 1), (1, 1)]
)
def test_groups_divide_the_channels_and_have_two_of_them(channels, groups):
    assert layers.group_count(channels) == groups


def test_group_norm_normalises_each_example_and_group():
    x = images(2, 3, 3, 12)
    norm = Norm("group")
    y = norm.apply(norm.init(KEY, x), x)
    grouped = np.asarray(y).reshape(2, 9, 6, 2)
    np.testing.assert_allclose(grouped.mean((1, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(grouped.var((1, 3)), 1, atol=5e-3)


def test_no_norm_is_the_identity_and_an_unknown_one_is_refused(plain_calls):
    x = images(2, 3, 3, 4)
    assert Norm("none").apply({}, x) is x
    with pytest.raises(ValueError, match="norm must be one of 'batch', 'group', 'none', got 'la"):
        Norm("layer").init(KEY, x)
