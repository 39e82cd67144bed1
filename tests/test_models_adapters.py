"""One contract for Linen, NNX and plain functions: logits, state, modes, keys, gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from robustjax import models
from robustjax.models import canonical_conv

KEY = jax.random.key(0)
X = np.random.default_rng(0).uniform(size=(4, 6, 6, 1)).astype(np.float32)
Y = np.array([0, 1, 2, 0])


class LinenNet(nn.Module):
    dropout_rate: float = 0.5

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), conv_general_dilated=canonical_conv)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(3)(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        conv = {"conv_general_dilated": canonical_conv, "rngs": rngs}
        self.conv = nnx.Conv(1, 4, (3, 3), **conv)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.head(self.dropout(x))


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]


def linear_init(key, x):
    return {"w": 0.1 * jax.random.normal(key, (x[0].size, 3)), "b": jnp.zeros(3)}


def linen_model():
    model = models.from_linen(LinenNet())
    return model, *model.init(KEY, X)


def nnx_model():
    return models.from_nnx(NNXNet(nnx.Rngs(0)))


def function_model():
    model = models.from_function(linear, linear_init)
    return model, *model.init(KEY, X)


@pytest.fixture(scope="module", params=[linen_model, nnx_model, function_model])
def adapted(request):
    model, params, state = request.param()
    return request.param.__name__, jax.jit(model.apply, static_argnums=3), params, state


def equal(a, b):
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), a, b)
    return all(jax.tree.leaves(same))


def test_the_contract_holds(adapted):
    name, model_fn, params, state = adapted
    logits, new_state = model_fn(params, state, X, True, jax.random.key(1))
    assert logits.shape == (4, 3) and logits.dtype == jnp.float32
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    stateless = name == "function_model"
    assert equal(new_state, state) == stateless
    other, _ = model_fn(params, state, X, True, jax.random.key(2))
    assert equal(logits, other) == stateless  # dropout draws from the key
    again, _ = model_fn(params, state, X, True, jax.random.key(1))
    assert equal(logits, again)

    evaluated, same_state = model_fn(params, new_state, X, False, None)
    assert equal(same_state, new_state)
    halves = [model_fn(params, new_state, x, False, None)[0] for x in (X[:2], X[2:])]
    np.testing.assert_allclose(np.concatenate(halves), evaluated, rtol=1e-5, atol=1e-6)
    assert equal(models.eval_logits(model_fn, params, new_state)(X), evaluated)


def test_input_gradients_and_a_training_step(adapted):
    _, model_fn, params, state = adapted

    @jax.jit
    def loss_and_gradients(params, state, x):
        def loss(params, x):
            logits, new_state = model_fn(params, state, x, True, KEY)
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, Y
            ).mean(), new_state

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    (before, state), (of_params, of_x) = loss_and_gradients(params, state, X)
    assert of_x.shape == X.shape and np.isfinite(of_x).all() and np.abs(of_x).max() > 0
    optimizer = optax.sgd(0.1)
    updates, _ = optimizer.update(of_params, optimizer.init(params), params)
    (after, _), _ = loss_and_gradients(optax.apply_updates(params, updates), state, X)
    assert after < before


def test_nothing_outside_changes_and_eager_equals_compiled():
    module = NNXNet(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(module, nnx.Param, nnx.BatchStat))
    model, params, state = models.from_nnx(module)
    logits, new_state = model.apply(params, state, X, True, KEY)  # eager: nothing may be shared
    assert not equal(new_state, state)
    assert equal(nnx.state(module, nnx.Param, nnx.BatchStat), before)
    again, _ = jax.jit(model.apply, static_argnums=3)(params, state, X, True, KEY)
    np.testing.assert_allclose(logits, again, rtol=1e-4, atol=1e-5)
    assert equal(model.init(KEY, X), (params, state))


def test_nnx_gives_what_the_module_gives():
    module = NNXNet(nnx.Rngs(0))
    model, params, state = models.from_nnx(module)
    module.eval()
    np.testing.assert_allclose(model.apply(params, state, X, False, None)[0], module(X), rtol=1e-5)


def test_linen_init_is_that_of_the_module_and_works_abstractly():
    module = LinenNet()
    model = models.from_linen(module)
    params, state = model.init(KEY, X)
    variables = module.init(KEY, X)
    assert equal({"params": params, **state}, variables)
    assert set(state) == {"batch_stats"}
    abstract = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, (params, state))


def test_a_function_of_a_function():
    # an ensemble is a plain function of the logits of others
    model, params, state = linen_model()
    pair = models.from_function(
        lambda p, x: sum(models.eval_logits(model.apply, q, state)(x) for q in p) / 2
    )
    logits, _ = pair.apply((params, params), {}, X, False, None)
    np.testing.assert_allclose(logits, model.apply(params, state, X, False, None)[0], rtol=1e-5)


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


def test_bad_calls_are_refused(plain_calls):
    with pytest.raises(ValueError, match=r"module must have an argument train .*NoTrain has x"):
        models.from_linen(NoTrain())
    with pytest.raises(ValueError, match="init must be given"):
        models.from_function(linear).init(KEY, X)
    flat = models.from_function(lambda p, x: x.reshape(-1))
    with pytest.raises(ValueError, match=r"must return logits \(n, K\) with n = 4, got shape"):
        flat.apply({}, {}, X, False, None)
    model, params, state = linen_model()
    with pytest.raises(ValueError, match="train must be True or False"):
        jax.jit(model.apply)(params, state, X, True, KEY)
    with pytest.raises(ValueError, match="key must be a typed key"):
        model.apply(params, state, X, True, np.zeros(2, np.uint32))
    with pytest.raises(ValueError, match="key must be a typed key"):
        model.init(0, X)
    model, params, state = nnx_model()
    with pytest.raises(ValueError, match="key must be given in training mode"):
        model.apply(params, state, X, True, None)
