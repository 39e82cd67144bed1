"""Lipschitz bounds: exact where the network is linear, never below what is sampled elsewhere."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models
from robustjax.lipschitz import lipschitz_bound
from robustjax.norms import L1, L2, LInf, Lp

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NORMS = {1: L1(), 2: L2(), np.inf: LInf()}


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X, A, B = normal(4, 6), normal(6, 5), normal(5, 3)
IMAGES = jnp.asarray(RNG.uniform(size=(4, 8, 8, 2)), jnp.float32)


def bound(f, norm=None, x=X):
    return jax.jit(lambda: lipschitz_bound(f, x, norm).value)()


def norm_of(matrix, p):
    return np.linalg.norm(np.asarray(matrix).T, p)


@pytest.mark.parametrize("p", NORMS)
def test_linear_networks_are_exact(p):
    norm = NORMS[p]
    np.testing.assert_allclose(bound(lambda x: x @ A + 1, norm), norm_of(A, p), rtol=1e-5)
    # The same, from the left, and for each of several positions.
    np.testing.assert_allclose(bound(lambda x: (A.T @ x.T).T, norm), norm_of(A, p), rtol=1e-5)
    tokens = bound(lambda x: (x @ A).reshape(len(x), -1), norm, normal(1, 4, 6))
    np.testing.assert_allclose(tokens, norm_of(A, p), rtol=1e-5)
    model = models.from_linen(models.Linear(3, mean=0.5, std=[0.5, 0.2]))
    params, state = model.init(KEY, IMAGES)
    scaled = params["head"]["kernel"] / jnp.tile(jnp.array([0.5, 0.2]), 64)[:, None]
    result = bound(models.eval_logits(model.apply, params, state), norm, IMAGES)
    assert norm_of(scaled, p) <= result <= 5.0001 * norm_of(params["head"]["kernel"], p)


@pytest.mark.parametrize("p", NORMS)
def test_composition_multiplies_and_branches_add(p):
    norm, a, b = NORMS[p], norm_of(A, p), norm_of(B, p)
    network = lambda x: jax.nn.relu(x @ A) @ B  # noqa: E731
    result = lipschitz_bound(network, X, norm)
    np.testing.assert_allclose(result.value, a * b, rtol=1e-5)
    np.testing.assert_allclose(result.log_product, np.log(a * b), rtol=1e-5)
    np.testing.assert_allclose(list(result.layers.values()), [a, b], rtol=1e-5)
    residual = bound(lambda x: x + jnp.tanh(x @ A) @ A.T / 7, norm)
    np.testing.assert_allclose(residual, 1 + a * norm_of(A.T, p) / 7, rtol=1e-5)
    joined = bound(lambda x: jnp.concatenate([x @ A, 2 * x], axis=1), norm)
    np.testing.assert_allclose(joined, np.linalg.norm([a, 2], p), rtol=1e-5)
    # One layer times c, all times c.
    np.testing.assert_allclose(bound(lambda x: jax.nn.relu(x @ (3 * A)) @ B, norm), 3 * a * b, 1e-5)


PARTS = [  # function, and its constants in l_1, l_2, l_inf
    (lambda x: x.mean(axis=(1, 2)), 1 / 64, 1 / 8, 1),
    (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), 1 / 4, 1 / 2, 1),
    (lambda x: nn.max_pool(x, (2, 2), (2, 2)), 1, 1, 1),
    (lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), 4, 2, 1),
    (lambda x: x[:, ::2, 1:].max(axis=(1, 3)), 1, 1, 1),
    (lambda x: jnp.tile(x, (1, 3, 3, 1)), 9, 3, 1),
    (lambda x: jnp.clip(jnp.abs(x), 0, 1) / 4, 1 / 4, 1 / 4, 1 / 4),
    (lambda x: jnp.maximum(x, -2 * x), 3, np.sqrt(5), 2),
    (lambda x: jax.nn.sigmoid(x) - 0.5, 1 / 4, 1 / 4, 1 / 4),
    (lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))[..., ::-1], 1, 1, 1),
    (lambda x: jax.checkpoint(jnp.tanh)(x) * jnp.array([0.5, -2.0]), 2, 2, 2),
    (lambda x: x[:, jnp.array([3, 1])], 1, 1, 1),
    (lambda x: x + 0 * IMAGES[:1], 1, 1, 1),
    (lambda x: jnp.zeros((len(x), 3)), 0, 0, 0),
]


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_the_constants_of_parts(part):
    f, *expected = PARTS[part]
    bounds = jax.jit(lambda: [lipschitz_bound(f, IMAGES, n).value for n in NORMS.values()])()
    np.testing.assert_allclose(bounds, expected, rtol=1e-5)


def test_the_constant_of_silu_is_its_largest_slope():
    slopes = jax.vmap(jax.grad(jax.nn.silu))(jnp.linspace(2.3, 2.5, 2001))
    np.testing.assert_allclose(bound(jax.nn.silu), slopes.max(), rtol=1e-6)
    # A product of other things has no constant.
    with pytest.raises(ValueError, match="the operation mul"):
        bound(lambda x: jax.nn.sigmoid(x) * jnp.sin(x))


NETWORKS = {
    "resnet": models.ResNet((0, 1), width=2, num_classes=3),  # the block has a projection
    "preact": models.PreActResNet((1,), width=2, activation="swish", final_norm=True, std=0.3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_jacobian_and_no_difference_quotient_is_above_the_bound(name):
    model = models.from_linen(NETWORKS[name])
    params, state = jax.tree.map(
        lambda s: jnp.asarray(RNG.uniform(0.2, 1.5, s.shape) * RNG.choice([1, -1], s.shape)),
        jax.eval_shape(model.init, KEY, IMAGES),
    )
    state = jax.tree.map(jnp.abs, state)  # variances are positive

    @jax.jit
    def everything(params, state, x):
        f = models.eval_logits(model.apply, params, state)
        jacobians = jax.vmap(jax.jacobian(lambda x: f(x[None])[0]))(x)
        return (
            [lipschitz_bound(f, x, norm, steps=20) for norm in NORMS.values()],
            jacobians.reshape(len(x), -1, x[0].size),
            f(x),
        )

    x = jnp.concatenate([IMAGES, IMAGES[:2] + 1e-2 * normal(2, 8, 8, 2)])
    bounds, jacobians, logits = everything(params, state, x)
    for p, result in zip(NORMS, bounds, strict=True):
        slopes = [np.linalg.norm(jacobian, p) for jacobian in jacobians]
        moves, ways = logits[:, None] - logits, (x[:, None] - x).reshape(len(x), len(x), -1)
        lengths = np.linalg.norm(ways, p, axis=2) + np.eye(len(x))
        quotients = np.linalg.norm(moves, p, axis=2) / lengths
        assert result.value >= max(*slopes, quotients.max()) * (1 - 1e-5)
        assert result.value > 0 and np.isfinite(result.log_value)
    layers = bounds[1].layers
    assert (
        len(layers)
        == sum(leaf.ndim > 1 for leaf in jax.tree.leaves(params)) + len(jax.tree.leaves(state)) // 2
    )
    for path, variance in jax.tree_util.tree_leaves_with_path(state["batch_stats"]):
        names = [key.key for key in path]
        if names[-1] == "var":
            scale = params
            for part in names[:-1]:
                scale = scale[part]
            expected = np.max(np.abs(scale["scale"]) / np.sqrt(variance + 1e-5))
            found = layers["/".join([type(NETWORKS[name]).__name__, *names[:-1]])]
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_bound_that_overflows_has_a_logarithm():
    huge = lambda x: ((x @ (1e15 * A)) @ (1e15 * B)) * 1e15  # noqa: E731
    result = lipschitz_bound(huge, X)
    expected = np.log(norm_of(A, 2) * norm_of(B, 2)) + 45 * np.log(10)
    assert np.isinf(result.value)
    np.testing.assert_allclose(result.log_value, expected, rtol=1e-5)


def test_a_bound_can_be_compiled_and_differentiated():
    kernel = normal(3, 3, 2, 2)

    @jax.jit
    @jax.grad
    def gradient(kernel):
        def network(x):
            conv = models.canonical_conv(x, kernel, (1, 1), "SAME", dimension_numbers=AXES)
            return jax.nn.relu(conv).reshape(len(x), -1)

        return lipschitz_bound(network, IMAGES).log_value

    # The bound is proportional to the kernel: its logarithm grows by 1 per e-fold.
    np.testing.assert_allclose(jnp.vdot(gradient(kernel), kernel), 1, rtol=1e-5)


AXES = ("NHWC", "HWIO", "NHWC")


def training_batch_norm(x):
    return nn.BatchNorm(use_running_average=False).init_with_output(KEY, x)[0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bound(lambda x: x * x), "operation mul in the function itself"),
        (lambda: bound(jax.nn.softmax), "got the operation exp"),
        (lambda: bound(training_batch_norm), "in evaluation mode, got the operation .* BatchNorm"),
        (lambda: bound(jnp.exp), "the operation exp"),
        (lambda: bound(lambda x: (x, x)), "logits_fn must return one array, got 2"),
        (lambda: bound(jnp.sin, x=jnp.ones(3)), r"x must be a batch of inputs \(n, ...\)"),
        (lambda: bound(jnp.sin, Lp(4)), "norm must be L1"),
        (lambda: bound("f"), "logits_fn must be a function"),
        (lambda: lipschitz_bound(jnp.sin, X, steps=0), "steps must be >= 1, got 0"),
        (lambda: lipschitz_bound(jnp.sin, X, key=1), "key must be a typed key"),
    ],
)
def test_what_is_refused(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
