"""Networks: published sizes, modes, precision, input gradients. Big ones are only traced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models
from robustjax.models import layers, resnet
from robustjax.theory.linear_networks import convolutional_weight, dense_weight

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(4, 8, 8, 3)).astype(np.float32)


def shapes(module, image=(32, 32, 3)):
    x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    return jax.eval_shape(models.from_linen(module).init, KEY, x)


def variables(model, x):
    """He-normal kernels, unit scales and variances, zeros: ``init`` without compiling it."""

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = max(leaf.size // leaf.shape[-1], 1)
            return RNG.normal(scale=np.sqrt(2 / fan_in), size=leaf.shape).astype(np.float32)
        return np.full(leaf.shape, name in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, KEY, x))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def conv(k, c_in, c_out):
    return k * k * c_in * c_out


def resnet10_size(classes):
    """Stem, per stage two convolutions and, but for the first, a projection; all normalised."""
    total, c_in = conv(3, 3, 64) + 2 * 64, 64
    for c in (64, 128, 256, 512):
        total += conv(3, c_in, c) + conv(3, c, c) + 4 * c
        total += conv(1, c_in, c) + 2 * c if c != c_in else 0
        c_in = c
    return total + 512 * classes + classes


@pytest.mark.parametrize(
    "module,parameters",
    [
        (models.ResNet10(), resnet10_size(10)),
        (models.ResNet18(), 11_173_962),
        (models.ResNet18(num_classes=20), 11_179_092),
        (models.ResNet34(), 21_282_122),
        (models.ResNet50(), 23_520_842),
        (models.ResNet50(num_classes=20), 23_541_332),
        (models.ResNet50(num_classes=100), 23_705_252),
        (models.ResNet50(num_classes=1000, stem="imagenet"), 25_557_032),
        (models.PreActResNet18(), 11_171_146),
        (models.PreActResNet18(final_norm=True), 11_171_146 + 2 * 512),
        (models.PreActResNet18(shortcut="preactivated"), 11_171_146),
        # Kernels and the head alone; with the large stem 3 * 64 * (49 - 9) more.
        (models.PreActResNet18(norm="none", use_bias=False), 11_164_362),
        (models.PreActResNet18(norm="none", use_bias=False, stem="imagenet"), 11_172_042),
        (models.WideResNet(28, 10), 36_479_194),
        (models.WideResNet(28, 10, num_classes=100), 36_536_884),
        (models.WideResNet(34, 10), 46_160_474),
    ],
)
def test_parameter_counts_are_the_published_ones(module, parameters):
    assert size(shapes(module)[0]) == parameters


def test_batch_statistics_are_a_mean_and_a_variance_for_each_scale_and_bias():
    params, state = shapes(models.ResNet18())
    # 20 normalisations: stem 64, then 4, 5, 5, 5 of 64, 128, 256, 512 channels
    assert size(state) == 2 * (64 + 4 * 64 + 5 * (128 + 256 + 512))
    assert size(params["stage4_block1"]) + size(params["stage4_block2"]) == 8_393_728


def test_small_models_have_the_sizes_of_their_formulas():
    assert size(shapes(models.SmallCNN(), (28, 28, 1))[0]) == 166_406
    mnist = 272 + 8_224 + 2_163_300 + 1_010  # 16 * 17, 32 * 257, 100 * (32 * 26 * 26 + 1), 10 * 101
    assert size(shapes(models.MNISTCNN(), (28, 28, 1))[0]) == mnist == 2_172_806
    assert size(shapes(models.DeepLinear((20, 30), 5), (8, 8, 1))[0]) == 64 * 20 + 20 * 30 + 30 * 5
    assert size(shapes(models.LinearConv(5, depth=3), (8, 8, 1))[0]) == 2 * 64 + 64 * 5
    single = 3 * 3 * 3 * 4 + 4 + 4096 * 10 + 10  # of CIFAR-10 images
    assert size(shapes(models.SingleLayerCNN(), (32, 32, 3))[0]) == single
    digits = conv(4, 1, 16) + 16 + conv(4, 16, 32) + 32 + 4 * 32 * 100 + 100 + 100 * 10 + 10
    assert size(shapes(models.SmallCNN(), (8, 8, 1))[0]) == digits
    assert size(shapes(models.MLP((20, 30), 5), (8, 8, 1))[0]) == 65 * 20 + 21 * 30 + 31 * 5
    assert size(shapes(models.Linear(10), (7,))[0]) == 80


SMALL_RESNET = partial(models.ResNet, stage_sizes=(1, 1), width=4, num_classes=5)
SMALL_PREACT = partial(models.PreActResNet, stage_sizes=(1, 1), width=4, num_classes=5)
SMALL_VGG = partial(models.VGG, ((1,), (2, 2)), (2,), num_classes=5, width=4)
NETWORKS = {
    "resnet": SMALL_RESNET(),
    "bottleneck": SMALL_RESNET(block="bottleneck"),
    "resnet-group": SMALL_RESNET(norm="group"),
    "preact": SMALL_PREACT(mean=(0.4, 0.5, 0.6), std=0.25),
    "preact-final": SMALL_PREACT(final_norm=True, shortcut="preactivated"),
    "preact-none": SMALL_PREACT(norm="none"),
    "wide": models.WideResNet(10, 1, num_classes=5),
    "vgg": SMALL_VGG(),
    "cnn": models.SmallCNN(5, (4, 6), 7),
    "one layer": models.SingleLayerCNN(5, 3),
    "mlp": models.MLP((6,), 5),
    "linear": models.Linear(5),
    "mnist": models.MNISTCNN(5, (4, 6), 7),
    "preact-large-stem": SMALL_PREACT(norm="none", use_bias=False, stem="imagenet"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A module with its initial variables and its compiled ``model_fn``."""
    model = models.from_linen(NETWORKS[request.param])
    params, state = variables(model, X)
    return request.param, jax.jit(model.apply, static_argnums=3), params, state


def test_modes_of_batch_norm_and_independence_of_the_batch(network):
    name, model_fn, params, state = network
    normalised = name in ("resnet", "bottleneck", "preact", "preact-final", "wide", "vgg")
    logits, new_state = model_fn(params, state, X, True, KEY)
    assert logits.shape == (4, 5) and logits.dtype == jnp.float32
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True)
    ]
    assert bool(state) == normalised and all(changed)
    assert np.isfinite(logits).all()

    evaluated, same_state = model_fn(params, new_state, X, False, None)
    for a, b in zip(jax.tree.leaves(same_state), jax.tree.leaves(new_state), strict=True):
        np.testing.assert_array_equal(a, b)
    if normalised:
        assert np.abs(evaluated - logits).max() > 1e-3
    again, _ = model_fn(params, new_state, X, False, None)
    np.testing.assert_array_equal(evaluated, again)
    others = np.concatenate([X[:1], 1 - X[1:]])  # the first example in other company
    in_other_company, _ = model_fn(params, new_state, others, False, None)
    np.testing.assert_allclose(in_other_company[0], evaluated[0], rtol=1e-5, atol=1e-6)


def test_gradients_for_input_and_parameters_are_finite_and_not_zero(network):
    _, model_fn, params, state = network

    @jax.jit
    def gradients(params, x):
        loss = lambda params, x: jnp.sum(model_fn(params, state, x, False, None)[0] ** 2)  # noqa: E731
        return jax.grad(loss, (0, 1))(params, x)

    of_params, of_x = gradients(params, X)
    assert of_x.shape == X.shape and of_x.dtype == jnp.float32
    assert np.isfinite(of_x).all() and (np.abs(of_x).max(axis=(1, 2, 3)) > 0).all()
    for leaf in jax.tree.leaves(of_params):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


@pytest.mark.parametrize("module", [SMALL_RESNET, SMALL_PREACT, SMALL_VGG, models.SmallCNN])
def test_bfloat16_computes_close_to_float32_and_keeps_float32_outside(module):
    options = {"num_classes": 5}
    full, half = (models.from_linen(module(dtype=d, **options)) for d in (None, jnp.bfloat16))
    params, state = variables(half, X)
    abstract = jax.eval_shape(half.init, KEY, X)
    assert {v.dtype for v in jax.tree.leaves(abstract)} == {jnp.dtype(jnp.float32)}

    def run(model):
        return jax.jit(model.apply, static_argnums=3)(params, state, X, True, None)

    (expected, _), (logits, new_state) = run(full), run(half)
    assert logits.dtype == jnp.float32
    assert {v.dtype for v in jax.tree.leaves(new_state)} <= {jnp.dtype(jnp.float32)}
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 0 < difference < 0.05  # it did compute in lower precision


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_plain_and_canonical_convolutions_make_the_same_network(norm):
    params, state = variables(models.from_linen(SMALL_PREACT(norm=norm)), X)

    def logits_and_gradient(conv):
        model = models.from_linen(SMALL_PREACT(norm=norm, conv=conv))
        logits_fn = models.eval_logits(model.apply, params, state)
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(logits_fn(x)))))(X)

    ours, plain = logits_and_gradient("canonical"), logits_and_gradient("plain")
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_convolutions_have_a_bias_exactly_where_nothing_normalises():
    with_norm, without = shapes(SMALL_PREACT())[0], shapes(SMALL_PREACT(norm="none"))[0]
    assert set(with_norm["stem_conv"]) == {"kernel"}
    assert set(without["stem_conv"]) == {"kernel", "bias"}
    assert set(without["stage1_block1"]) == {"conv1", "conv2"}


def test_the_projection_acts_on_what_is_asked_for():
    # One block whose residual branch is silenced: the logits see the shortcut alone.
    def pooled(shortcut, x):
        module = models.PreActResNet((0, 1), num_classes=2, width=1, norm="none", shortcut=shortcut)
        params = {
            "stem_conv": {
                "kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0),
                "bias": jnp.zeros(1),
            },
            "stage2_block1": {
                "conv1": {"kernel": jnp.zeros((3, 3, 1, 2)), "bias": jnp.zeros(2)},
                "conv2": {"kernel": jnp.zeros((3, 3, 2, 2)), "bias": jnp.zeros(2)},
                "shortcut_conv": {"kernel": jnp.ones((1, 1, 1, 2)), "bias": jnp.zeros(2)},
            },
            "head": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)},
        }
        return module.apply({"params": params}, x)[0, 0]

    x = jnp.asarray(RNG.normal(size=(1, 4, 4, 1)), jnp.float32)
    strided = np.asarray(x)[0, ::2, ::2, 0]
    np.testing.assert_allclose(pooled("input", x), strided.mean(), rtol=1e-5)
    np.testing.assert_allclose(pooled("preactivated", x), np.maximum(strided, 0).mean(), rtol=1e-5)


@pytest.mark.parametrize("channels,strides", [(3, 1), (5, 2)])
def test_a_block_with_zero_kernels_is_its_shortcut(channels, strides):
    conv, norm = layers.conv_and_norm("plain", "none", True, None, None, layers.he_fan_out, False)
    block = resnet.PreActBlock(channels, strides, conv, norm, "preactivated")
    x = jnp.asarray(X) - 0.5
    shape = jax.eval_shape(block.init, KEY, x)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shape)["params"]
    assert all(set(layer) == {"kernel"} for layer in params.values())
    expected = x
    if strides > 1:
        kernel = jnp.asarray(RNG.normal(size=(1, 1, 3, 5)), jnp.float32)
        params["shortcut_conv"]["kernel"] = kernel
        expected = np.maximum(x, 0)[:, ::2, ::2] @ np.asarray(kernel)[0, 0]
    out = block.apply({"params": params}, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_nothing_stands_between_the_dense_layers_of_the_mnist_network():
    module = models.MNISTCNN(5, (4, 6), 7)
    params, _ = jax.jit(models.from_linen(module).init)(KEY, jnp.asarray(X))
    for name, fan_in in {"conv1": 48, "conv2": 64, "dense": 216, "head": 7}.items():
        for kind in ("kernel", "bias"):  # as PyTorch draws them
            largest = np.abs(params[name][kind]).max()
            assert 0.3 * fan_in**-0.5 < largest <= fan_in**-0.5, (name, kind)

    @jax.jit
    def logits(sign):
        dense = jax.tree.map(lambda w: sign * w, params["dense"])
        return module.apply({"params": {**params, "dense": dense}}, jnp.asarray(X))

    # Linear from the features on, so odd in the dense layer's weights but for the last bias.
    there, back = logits(1.0), logits(-1.0)
    middle = np.broadcast_to(params["head"]["bias"], (4, 5))
    np.testing.assert_allclose((there + back) / 2, middle, atol=1e-5)
    assert np.abs(there - back).max() > 1e-2


LINEAR = [
    (models.DeepLinear((6, 4), 3), dense_weight),
    (models.LinearConv(3, 3), convolutional_weight),
]


@pytest.mark.parametrize("module,effective", LINEAR)
def test_linear_networks_have_the_effective_weight_of_the_theory(module, effective):
    x = jnp.asarray(RNG.normal(size=(5, 2, 4)), jnp.float32)
    params = jax.jit(module.init)(KEY, x)["params"]
    hidden = [params[name] for name in sorted(params) if name != "head"]
    hidden = [layer["kernel"] if isinstance(layer, dict) else layer for layer in hidden]
    for w in hidden:  # columns of length one, outputs at zero
        np.testing.assert_allclose(jnp.linalg.norm(w, axis=0), 1.0, rtol=1e-5)
    assert not np.any(params["head"]["kernel"])
    head = jnp.asarray(RNG.normal(size=params["head"]["kernel"].shape), jnp.float32)
    weights = np.stack([effective([*hidden, column]) for column in head.T], axis=1)
    logits = module.apply({"params": {**params, "head": {"kernel": head}}}, x)
    np.testing.assert_allclose(logits, x.reshape(5, 8) @ weights, rtol=1e-4, atol=1e-5)


def test_dropout_of_a_block_is_active_in_training_only():
    def identity(x, name):
        return x

    x = jnp.asarray(X)
    options = {"conv": layers.Conv, "norm": identity, "dropout_rate": 0.5}
    block = partial(resnet.PreActBlock, channels=3, strides=1, **options)
    params = block().init(KEY, x)
    first, again, other = (
        block(train=True).apply(params, x, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    without = block(dropout_rate=0.0, train=True).apply(params, x)
    np.testing.assert_array_equal(block().apply(params, x), without)


@pytest.mark.parametrize(
    "module,x,message",
    [
        (models.ResNet18(block="dense"), X, "block must be one of 'basic', 'bottleneck'"),
        (models.ResNet18(norm="layer"), X, "norm must be one of"),
        (models.ResNet18(conv="fft"), X, "conv must be one of"),
        (models.PreActResNet18(shortcut="none"), X, "shortcut must be one of 'input', 'preact"),
        (models.WideResNet(27, 10), X, r"depth must be 6 n \+ 4 with n >= 1, got 27"),
        (models.WideResNet(28, 0), X, "widen_factor must be >= 1, got 0"),
        (models.WideResNet(10, 1, dropout_rate=1.0), X, "dropout_rate must be < 1, got 1"),
        (models.PreActResNet18(stem="tiny"), X, "stem must be one of 'small', 'imagenet'"),
        (models.LinearConv(3, 0), X, "depth must be >= 1, got 0"),
        (models.SmallCNN(0), X, "num_classes must be >= 1, got 0"),
        (models.SmallCNN(), X[0], r"x must have shape \(n, h, w, c\), got \(8, 8, 3\)"),
        (models.MLP((5,), 10), (255 * X).astype(np.uint8), "x must be floating-point"),
    ],
)
def test_bad_choices_are_refused(module, x, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(models.from_linen(module).init, KEY, x)
