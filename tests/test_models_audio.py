"""Networks for waveforms: sizes of the formula and of the tutorial, lengths, pooling, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import data, models

KEY = jax.random.key(0)
TUTORIAL = models.M5(35, widths=(32, 32, 64, 64), stride=16, padding="VALID")
TINY = models.M5(3, widths=(4, 4, 8), stride=2, first_kernel=8)


def shapes(module, samples=16_000):
    x = jax.ShapeDtypeStruct((2, samples, 1), jnp.float32)
    params, state = jax.eval_shape(models.from_linen(module).init, KEY, x)
    return x, params, state


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def published_size(classes, widths, kernel=80):
    """Kernels and biases, two numbers per channel of BatchNorm, dense layer."""
    total, channels = 0, 1
    for width in widths:
        total += kernel * channels * width + width + 2 * width
        kernel, channels = 3, width
    return total + (channels + 1) * classes


@pytest.mark.parametrize(
    "module,parameters",
    [
        (models.M5(10), published_size(10, (128, 128, 256, 512))),
        (models.M5(12, norm="none"), published_size(12, (128, 128, 256, 512)) - 2 * 1024),
        (TUTORIAL, published_size(35, (32, 32, 64, 64))),
        (TUTORIAL, 26_915),  # as the tutorial prints it
    ],
)
def test_parameter_counts_are_those_of_the_formula(module, parameters):
    assert size(shapes(module)[1]) == parameters


def lengths(module, samples):
    """Of what the convolutions give, by their names."""
    x, params, state = shapes(module, samples)

    def run(x, params, state):
        variables = {"params": params, **state}
        return module.apply(variables, x, capture_intermediates=True, mutable="intermediates")

    logits, found = jax.eval_shape(run, x, params, state)
    outputs = [found["intermediates"][f"conv{i + 1}"]["__call__"][0] for i in range(4)]
    return logits.shape, [leaf.shape[1] for leaf in outputs]


def test_lengths_are_those_of_the_publication_and_of_the_tutorial():
    # Pooled by 4 after each: 32,000 samples become 2,000, 500, 125 and 32 values.
    assert lengths(models.M5(10), 32_000) == ((2, 10), [8_000, 2_000, 500, 125])
    # (16,000 - 80) / 16 + 1 = 996, pooled to 249, and so on: floors, not ceilings.
    assert lengths(TUTORIAL, 16_000) == ((2, 35), [996, 247, 59, 12])


@pytest.fixture(scope="module")
def tiny():
    x = data.tones(KEY, 6, 64, 3).image
    model = models.from_linen(TINY)
    params, state = jax.jit(model.init)(KEY, x)
    return x, jax.jit(model.apply, static_argnums=3), params, state


def test_the_output_is_that_of_signal_processing(tiny):
    """Each layer written out in NumPy, at unit scale and running statistics 0 and 1."""
    x, model_fn, params, state = tiny
    kernels, wave = [], np.asarray(x, np.float64)
    for i, (kernel, stride) in enumerate([(8, 2), (3, 1), (3, 1)]):
        w = np.asarray(params[f"conv{i + 1}"]["kernel"], np.float64)[:, 0]
        kernels.append(w.shape)
        before = (kernel - stride) // 2  # "SAME" of even lengths
        padded = np.pad(wave, ((0, 0), (before, kernel - stride - before), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1)[:, ::stride]
        wave = np.einsum("ntck,kcd->ntd", windows, w) + np.asarray(params[f"conv{i + 1}"]["bias"])
        wave = np.maximum(wave / np.sqrt(1 + 1e-5), 0)
        wave = np.pad(wave, ((0, 0), (0, -wave.shape[1] % 4), (0, 0)))  # zeros change no maximum
        wave = wave.reshape(len(wave), -1, 4, wave.shape[2]).max(axis=2)
    assert kernels == [(8, 1, 4), (3, 4, 4), (3, 4, 8)]
    expected = wave.mean(axis=1) @ np.asarray(params["head"]["kernel"]) + params["head"]["bias"]
    logits, _ = model_fn(params, state, x, False, None)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_weights_and_biases_begin_within_the_bounds_of_pytorch(tiny):
    params = tiny[2]
    for name, fan_in in {"conv1": 8, "conv2": 12, "conv3": 12, "head": 8}.items():
        for kind in ("kernel", "bias"):
            largest = np.abs(params[name][kind]).max()
            assert 0.1 * fan_in**-0.5 < largest <= fan_in**-0.5, (name, kind)


def test_training_mode_records_statistics_and_gradients_are_finite(tiny):
    x, model_fn, params, state = tiny

    def loss(params, x):
        logits, new_state = model_fn(params, state, x, True, KEY)
        return jnp.sum(logits**2), new_state

    (_, new_state), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
        assert np.abs(new - old).max() > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert grads[1].shape == x.shape and np.abs(grads[1]).max() > 0


@pytest.mark.parametrize(
    "module,shape,message",
    [
        (TINY, (2, 8, 8, 1), r"x must have shape \(n, samples, channels\), got \(2, 8, 8, 1\)"),
        (TINY.clone(padding="FULL"), (2, 64, 1), "padding must be one of 'SAME', 'VALID'"),
        (TINY.clone(widths=()), (2, 64, 1), "widths must hold at least one, got none"),
        (TINY.clone(norm="layer"), (2, 64, 1), "norm must be one of"),
        (TUTORIAL, (2, 2_000, 1), "x is too short for convolution 4, of 3 samples"),
    ],
)
def test_bad_choices_are_refused(plain_calls, module, shape, message):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(models.from_linen(module).init, KEY, x)
