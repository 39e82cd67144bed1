"""Norms of per-example gradients: ghost norms against the gradients themselves, closed forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models, objectives
from robustjax.attacks import pgd
from robustjax.gradients import (
    ghost_norms,
    gradient_probe,
    input_gradient_norms,
    vjp_norms,
    vmap_norms,
)
from robustjax.norms import LInf
from robustjax.objectives import madry, mart, standard, trades, trades_attack
from robustjax.threat import ThreatModel

KEY = jax.random.key(0)
THREAT = ThreatModel(LInf(), 0.1)
N = 4

# Not with optimisation level 0, as elsewhere in the tests: XLA:CPU 0.10 then gets the derivative of
# a maximum over two axes wrong.
jit = jax.jit


class Flaxen(nn.Module):
    """Layers of Flax's own: convolutions of several kinds, a layer norm, a weight used twice."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), strides=(2, 1), padding=((1, 0), (0, 2)))(x)
        x = nn.Conv(4, (2, 2), padding="VALID", use_bias=False)(jax.nn.relu(x))
        x = nn.Conv(4, (3, 3), feature_group_count=2)(x)  # no plain one: the direct form
        x = nn.LayerNorm()(x)
        twice = nn.Dense(4)
        x = twice(jnp.tanh(twice(x)))  # on every position
        return nn.Dense(self.num_classes, use_bias=False)(x.reshape(len(x), -1))


MODELS = {
    "linear": (models.Linear(num_classes=3), (3, 2, 1)),
    "mlp": (models.MLP((8,), num_classes=3), (3, 2, 1)),
    "small cnn": (models.SmallCNN(num_classes=3, channels=(4, 6), hidden=5), (8, 8, 1)),
    "flax layers": (Flaxen(), (6, 5, 2)),
    "preact, batch": (models.PreActResNet((1, 1), num_classes=3, width=2), (8, 8, 3)),
    "resnet, group": (models.ResNet((1,), num_classes=3, width=4, norm="group"), (8, 8, 3)),
    "bottleneck, none": (
        models.ResNet((1,), block="bottleneck", num_classes=3, width=2, norm="none"),
        (8, 8, 3),
    ),
    "vgg, batch": (models.VGG(((1,), (1,)), num_classes=3, width=2), (8, 8, 3)),
}


@functools.cache
def case(name):
    """Model, parameters that are all different, statistics, and an attacked batch."""
    module, shape = MODELS[name]
    model = models.from_linen(module)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.uniform(size=(N, *shape)), jnp.float32),
        "adversarial": jnp.asarray(rng.uniform(size=(N, *shape)), jnp.float32),
        "label": jnp.arange(N, dtype=jnp.int32) % 3,
        "index": jnp.arange(N, dtype=jnp.int32),
        "step": jnp.zeros((), jnp.int32),
    }
    params, model_state = jax.eval_shape(model.init, KEY, batch["image"])
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 4, p.dtype), params)
    model_state = jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.2, 1, s.shape), s.dtype), model_state
    )
    return model.apply, params, model_state, batch


OBJECTIVES = {
    "standard": standard(),
    "madry": madry(pgd(THREAT, steps=1)),
    "trades": trades(trades_attack(THREAT, steps=1)),
    "mart": mart(pgd(THREAT, steps=1)),
}
PAIRS = [
    *((name, "madry") for name in MODELS),
    *(("small cnn", objective) for objective in ("standard", "trades", "mart")),
    ("flax layers", "trades"),  # which calls each layer twice
]
GHOST, VMAP = ghost_norms(), vmap_norms(3)


@functools.cache
def measured(rule, name, objective="madry"):
    model_fn, params, model_state, batch = case(name)
    if objective == "standard":
        batch = {name: value for name, value in batch.items() if name != "adversarial"}
    loss_fn = OBJECTIVES[objective](model_fn)
    return np.asarray(jit(lambda p: rule(loss_fn, p, model_state, KEY, batch))(params))


@pytest.mark.parametrize("name, objective", PAIRS, ids=lambda x: x)
def test_ghost_norms_are_those_of_the_gradients(name, objective):
    """Every layer of the library, strides, biases, normalisations, layers called twice."""
    ghost = measured(GHOST, name, objective)
    assert ghost.shape == (N,) and (ghost > 0).all()
    np.testing.assert_allclose(ghost, measured(VMAP, name, objective), rtol=2e-4)


@pytest.mark.parametrize("name", ["mlp", "small cnn", "preact, batch"])
def test_pulled_back_norms_agree_where_no_example_sees_another(name):
    pulled = measured(vjp_norms(3, mode="eval"), name)
    np.testing.assert_allclose(pulled, measured(VMAP, name), rtol=1e-4)


def test_both_forms_of_a_convolution_agree():
    """The Gram form where there are few positions, the direct one where there are many."""
    from robustjax.gradients import ghost

    module = models.Conv(6, 3, strides=2, padding=1, use_bias=True)
    rng = np.random.default_rng(1)
    for side in (3, 9):  # 4 and 25 positions of 27 x 6 kernels: either side of the boundary
        x = jnp.asarray(rng.normal(size=(2, side, side, 3)), jnp.float32)
        y, variables = jit(module.init_with_output)(KEY, x)
        d = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
        layer = ghost._Layer(("conv",), module, (), {})

        @jit
        def both(x, variables, d, layer=layer):
            calls = [(layer, x, variables, d)]
            return ghost._squared_norms(calls), ghost._squares(ghost._direct_gradients(calls))

        fast, direct = both(x, variables, d)
        np.testing.assert_allclose(fast, direct, rtol=1e-5)


def test_softmax_regression_in_closed_form():
    """``g_i = (p_i - e_y) [x_i; 1]^T`` and ``h_i = W (p_i - e_y)``."""
    _, params, _, batch = case("linear")
    x = np.asarray(batch["image"].reshape(N, -1), np.float64)
    kernel, bias = (np.asarray(params["head"][k], np.float64) for k in ("kernel", "bias"))
    p = np.exp(x @ kernel + bias)
    error = p / p.sum(1, keepdims=True) - np.eye(3)[np.asarray(batch["label"])]
    expected = np.linalg.norm(error, axis=1) * np.sqrt((x**2).sum(1) + 1)
    for rule in (ghost_norms(), vmap_norms(), vjp_norms()):
        np.testing.assert_allclose(measured(rule, "linear", "standard"), expected, rtol=1e-5)
    inputs = measured(input_gradient_norms(), "linear", "standard")
    np.testing.assert_allclose(inputs, np.linalg.norm(error @ kernel.T, axis=1), rtol=1e-5)


def test_input_gradients_are_those_of_each_loss_alone():
    model_fn, params, model_state, batch = case("preact, batch")
    outer = OBJECTIVES["trades"](model_fn).outer

    def loss(x, i, field):
        one = {**jax.tree.map(lambda v: v[i : i + 1] if v.ndim else v, batch), field: x}
        return outer(params, model_state, KEY, one, train=False)[0][0]

    for field in ("adversarial", "image"):
        gradient = jit(jax.grad(lambda x, i, field=field: loss(x, i, field)), static_argnums=1)
        expected = [jnp.linalg.norm(gradient(batch[field][i : i + 1], i)) for i in range(2)]
        got = measured(input_gradient_norms(at=field), "preact, batch", "trades")
        np.testing.assert_allclose(got[:2], expected, rtol=2e-3)


def test_in_training_mode_batchnorm_couples_the_examples():
    """One pullback per loss is exact there; norms in evaluation mode are other numbers."""
    model_fn, params, model_state, batch = case("preact, batch")
    outer = OBJECTIVES["madry"](model_fn).outer
    losses = lambda p: outer(p, model_state, KEY, batch)[0]  # noqa: E731
    jacobian = jit(jax.jacrev(losses))(params)
    squares = [np.sum(np.square(leaf), axis=tuple(range(1, leaf.ndim)))
               for leaf in jax.tree.leaves(jacobian)]  # fmt: skip
    got = measured(vjp_norms(2), "preact, batch")
    np.testing.assert_allclose(got, np.sqrt(sum(squares)), rtol=1e-4)
    assert np.abs(got / measured(GHOST, "preact, batch") - 1).max() > 0.1


def test_low_precision_models_have_float32_norms():
    module = models.SmallCNN(num_classes=3, channels=(4, 6), hidden=5, dtype=jnp.bfloat16)
    _, params, _, batch = case("small cnn")
    loss_fn = madry(pgd(THREAT, steps=1))(models.from_linen(module).apply)
    norms = jit(lambda p: ghost_norms()(loss_fn, p, {}, KEY, batch))(params)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, measured(VMAP, "small cnn"), rtol=0.05)


def test_zero_gradients_have_zero_norms():
    model_fn, params, _, batch = case("small cnn")
    loss_fn = standard(lambda logits, y: 0 * logits[:, 0])(model_fn)
    rules = ghost_norms(), vmap_norms(), vjp_norms(), input_gradient_norms()
    for norms in jit(lambda p: [rule(loss_fn, p, {}, KEY, batch) for rule in rules])(params):
        np.testing.assert_array_equal(norms, 0)


def test_the_probe_gives_the_mean_gradient_and_the_norms_of_all_chunks():
    model_fn, params, model_state, batch = case("small cnn")
    loss_fn = OBJECTIVES["madry"](model_fn)
    probe = gradient_probe(loss_fn, chunk=2)
    got = jit(probe)(params, model_state, KEY, batch)

    @jit
    def all_at_once(params):
        attacked = loss_fn.inner(params, model_state, KEY, batch)
        norms, inputs = (
            rule(loss_fn, params, model_state, KEY, attacked)
            for rule in (ghost_norms(), input_gradient_norms())
        )
        mean = lambda p: loss_fn.outer(p, model_state, KEY, attacked)[0].mean()  # noqa: E731
        return norms, inputs, *jax.value_and_grad(mean)(params)

    norms, inputs, loss, expected = all_at_once(params)
    np.testing.assert_allclose(got.parameter_norm, norms, rtol=1e-5)
    np.testing.assert_allclose(got.input_norm, inputs, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        got.mean_gradient,
        expected,
    )
    np.testing.assert_allclose(got.loss.mean(), loss, rtol=1e-5)


def test_without_a_radius_adversarial_training_has_the_gradients_of_natural_training():
    model_fn, params, _, batch = case("small cnn")
    clean = {name: value for name, value in batch.items() if name != "adversarial"}
    nothing = madry(pgd(ThreatModel(LInf(), 0.0), steps=1))
    natural, adversarial = (
        jit(gradient_probe(objective(model_fn), chunk=4))(params, {}, KEY, clean)
        for objective in (standard(), nothing)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), natural, adversarial)


def plain_model(params, model_state, x, train, key):
    del train, key
    return x.reshape(len(x), -1) @ params["w"], model_state


def test_refusals(plain_calls):
    model_fn, params, model_state, batch = case("preact, batch")
    madry_fn = OBJECTIVES["madry"]
    with pytest.raises(ValueError, match="must use its running average, got BatchNorm in"):
        ghost_norms(mode="train")(madry_fn(model_fn), params, model_state, KEY, batch)
    weights = {"w": jnp.ones((8 * 8 * 3, 3))}
    with pytest.raises(ValueError, match="parameter w must belong to a Flax Linen layer"):
        ghost_norms()(madry_fn(plain_model), weights, {}, KEY, batch)
    with pytest.raises(ValueError, match="microbatch must be >= 1, got 0"):
        vmap_norms(0)
    with pytest.raises(ValueError, match="mode must be one of 'eval', 'train', got 'test'"):
        ghost_norms(mode="test")
    with pytest.raises(ValueError, match="at must be one of 'adversarial', 'image', got 'x'"):
        input_gradient_norms(at="x")
    with pytest.raises(ValueError, match=r"examples of the batch \(4\) must be divisible"):
        gradient_probe(madry_fn(model_fn), chunk=3)(params, model_state, KEY, batch)

    def without_modes(params, model_state, key, batch):
        return jnp.zeros(N), (model_state, {})

    with pytest.raises(ValueError, match="must have an argument train"):
        vmap_norms()(without_modes, params, model_state, KEY, batch)
    assert objectives.stages(without_modes)(params, {}, KEY, batch)[0].shape == (N,)


def test_any_loss_function_can_be_measured_without_our_models():
    _, _, _, batch = case("mlp")
    weights = {"w": jnp.ones((6, 3))}
    loss_fn = OBJECTIVES["standard"](plain_model)
    one = vmap_norms(2)(loss_fn, weights, {}, KEY, batch)
    np.testing.assert_allclose(one, vjp_norms(2)(loss_fn, weights, {}, KEY, batch), rtol=1e-5)
