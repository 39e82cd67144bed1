"""Vision transformer: published size, a reference in NumPy, weights of PyTorch's names."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from robustjax import models
from robustjax.benchmark.import_torch import convert, read_state_dict

TINY = models.ViT(
    num_classes=5, patch_size=4, depth=2, width=12, mlp_width=20, num_heads=3, mean=0.5, std=0.5
)
SIZE = 8  # pixels: 4 patches
X = np.random.default_rng(0).uniform(size=(3, SIZE, SIZE, 3)).astype(np.float32)


def tiny_state():
    """A state dict as ``timm`` names it."""
    shapes = {
        "cls_token": (1, 1, 12),
        "pos_embed": (1, 5, 12),
        "patch_embed.proj.weight": (12, 3, 4, 4),
        "patch_embed.proj.bias": (12,),
        "norm.weight": (12,),
        "norm.bias": (12,),
        "head.weight": (5, 12),
        "head.bias": (5,),
    }
    for i in range(2):
        for layer, outputs, inputs in [
            ("attn.qkv", 36, 12), ("attn.proj", 12, 12), ("mlp.fc1", 20, 12), ("mlp.fc2", 12, 20),
        ]:  # fmt: skip
            shapes[f"blocks.{i}.{layer}.weight"] = (outputs, inputs)
            shapes[f"blocks.{i}.{layer}.bias"] = (outputs,)
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{norm}.weight"] = shapes[f"blocks.{i}.{norm}.bias"] = (12,)
    draw = np.random.default_rng(1)
    return {name: draw.normal(scale=0.5, size=s).astype(np.float32) for name, s in shapes.items()}


def reference(state, x, *, heads=3, patch=4):
    """Logits in float64, from PyTorch's layouts and the equations of the publication."""
    state = {name: value.astype(np.float64) for name, value in state.items()}

    def dense(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(name, x):
        n, t, c = x.shape
        q, k, v = (
            dense(f"{name}.qkv", x).reshape(n, t, 3, heads, c // heads).transpose(2, 0, 3, 1, 4)
        )
        weights = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(c // heads), axis=-1)
        return dense(f"{name}.proj", (weights @ v).swapaxes(1, 2).reshape(n, t, c))

    x = (x.astype(np.float64) - 0.5) / 0.5
    n, size = len(x), x.shape[1] // patch
    patches = x.reshape(n, size, patch, size, patch, 3).transpose(0, 1, 3, 5, 2, 4)
    kernel = state["patch_embed.proj.weight"].reshape(12, -1)
    x = patches.reshape(n, size * size, -1) @ kernel.T + state["patch_embed.proj.bias"]
    x = np.concatenate([np.repeat(state["cls_token"], n, axis=0), x], axis=1) + state["pos_embed"]
    for i in range(2):
        x = x + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", x))
        hidden = dense(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        x = x + dense(f"blocks.{i}.mlp.fc2", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)
    return dense("head", norm("norm", x)[:, 0])


def test_the_base_model_has_the_published_size():
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    model = models.from_linen(models.ViT_B16())
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 86_567_656
    assert params["pos_embed"].shape == (1, 197, 768) and not state
    logits, _ = jax.eval_shape(lambda p, x: model.apply(p, {}, x, False, None), params, x)
    assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)


def test_imported_weights_give_the_logits_of_the_reference():
    state = tiny_state()
    module, params, model_state = convert(state, TINY, image_size=SIZE)
    assert module == TINY and not model_state
    logits = jax.jit(models.eval_logits(models.from_linen(module).apply, params, {}))(X)
    expected = reference(state, X)
    assert np.ptp(expected, axis=0).min() > 0.1  # the images matter
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_and_training_reaches_every_parameter():
    params = convert(tiny_state(), TINY, image_size=SIZE).params
    model = models.from_linen(TINY.clone(dtype=jnp.bfloat16))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        logits, _ = model.apply(params, {}, jnp.asarray(X), True, None)
        return jnp.sum(logits**2), logits

    (_, logits), grads = run(params)
    assert logits.dtype == jnp.float32
    expected = reference(tiny_state(), X)
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert leaf.dtype == jnp.float32 and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def safetensors(state, dtypes):
    """The bytes of a file: length of the header, header, arrays."""
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, array in state.items():
        end = len(content) + array.nbytes
        header[name] = {
            "dtype": dtypes[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [len(content), end],
        }
        content += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def test_safetensors_are_read_and_damaged_ones_refused(tmp_path, plain_calls):
    state = tiny_state()
    state["norm.bias"] = np.asarray(jnp.arange(12, dtype=jnp.bfloat16))
    content = safetensors(state, {"float32": "F32", "bfloat16": "BF16"})
    file = tmp_path / "vit.safetensors"
    file.write_bytes(content)
    read = read_state_dict(file)
    assert list(read) == list(state)
    for name, array in state.items():
        np.testing.assert_array_equal(read[name], array)
    params = convert(read, TINY, image_size=SIZE).params
    np.testing.assert_array_equal(params["norm"]["bias"], np.arange(12, dtype=np.float32))
    strange = safetensors(state, {"float32": "F8", "bfloat16": "BF16"})
    longer = (2**40).to_bytes(8, "little")
    for damaged in (content[:-4], content[:100], longer + content[8:], b"", strange):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a file of safetensors"):
            read_state_dict(file)


def test_without_its_head_the_network_fits_other_classes():
    state = tiny_state()
    whole = convert(state, TINY, image_size=SIZE).params
    for changed in (state, {k: v for k, v in state.items() if not k.startswith("head")}):
        params = convert(changed, TINY.clone(num_classes=7), image_size=SIZE, head=False).params
        assert set(whole) - set(params) == {"head"}
        for name in params:
            jax.tree.map(np.testing.assert_array_equal, params[name], whole[name])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"cls_token": None}, "cls_token is missing"),
        ({"blocks.1.attn.qkv.bias": None}, "blocks.1.attn.qkv.bias is missing"),
        ({"blocks.2.norm1.bias": np.zeros(12, np.float32)}, "blocks.2.norm1.bias is surplus"),
        ({"head_dist.bias": np.zeros(5, np.float32)}, "head_dist.bias is surplus"),
        ({"pos_embed": np.zeros((1, 10, 12), np.float32)},
         r"pos_embed has shape \(1, 10, 12\), expected \(1, 5, 12\)"),
        ({"blocks.0.mlp.fc1.weight": np.zeros((12, 20), np.float32)},
         r"blocks.0.mlp.fc1.weight has shape \(12, 20\), expected \(20, 12\)"),
        ({"norm.weight": np.full(12, np.nan, np.float32)}, "norm.weight has values that are not"),
    ],
)  # fmt: skip
def test_state_dicts_that_do_not_fit_are_refused(plain_calls, change, message):
    state = {name: v for name, v in {**tiny_state(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        convert(state, TINY, image_size=SIZE)


@pytest.mark.parametrize(
    "change,shape,message",
    [
        ({"num_heads": 5}, X.shape, r"width \(12\) must be divisible by num_heads \(5\)"),
        ({}, (1, 8, 10, 3), r"side of the images \(10\) must be divisible by patch_size \(4\)"),
        ({"depth": 0}, X.shape, "depth must be >= 1, got 0"),
        ({}, (8, 8, 3), r"x must have shape \(n, h, w, c\), got \(8, 8, 3\)"),
    ],
)
def test_networks_that_cannot_be_are_refused(plain_calls, change, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            models.from_linen(TINY.clone(**change)).init,
            jax.random.key(0),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
