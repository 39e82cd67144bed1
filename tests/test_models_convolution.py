"""The canonical convolution against JAX's own: values, derivatives of every kind, compiled form."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from robustjax.models import canonical_conv

LAYOUT = ("NHWC", "HWIO", "NHWC")
CANONICAL = "b01f_01io->b01f"
RNG = np.random.default_rng(0)


def plain_conv(x, w, strides, padding):
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT)


def our_conv(x, w, strides, padding):
    return canonical_conv(x, w, strides, padding, dimension_numbers=LAYOUT)


def normal(*shape, dtype=np.float64):
    return RNG.normal(size=shape).astype(dtype)


def assert_trees_equal(ours, plain, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# Tiny programs: what takes time is compiling them.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def both(fn, *args):
    """``fn(conv, *args)`` with our convolution and with JAX's, compiled as one program."""
    return jit(lambda *args: (fn(our_conv, *args), fn(plain_conv, *args)))(*args)


def layer(conv, x, w):
    return jnp.sum(jnp.tanh(conv(x, w[0], (2, 1), ((1, 0), (0, 2)))) ** 2)


def network(conv, x, w):
    """A scalar with curvature, of a strided convolution and one that keeps the size."""
    y = jnp.tanh(conv(x, w[0], (2, 1), ((1, 0), (0, 2))))
    y = jnp.tanh(conv(y, w[1], (1, 1), "SAME"))
    return jnp.sum(y**2)


def operands(dtype=np.float32, n=2):
    return normal(n, 7, 6, 3, dtype=dtype), (
        normal(3, 2, 3, 4, dtype=dtype),
        normal(3, 3, 4, 4, dtype=dtype),
    )


# 5 positions by 8: odd and even, and a kernel of 5 has one position to go. Images of one channel
# have lowerings of their own; those of two and three share that of the input gradient; from 16
# examples, input and output channels on, all three maps have dilated rows.
GEOMETRIES = [
    *itertools.product([1, 2, 3, 5], [1, 2, 3], [(2, 1, 4), (2, 4, 4), (16, 16, 17)]),
    (2, 3, (2, 2, 4)), (3, 2, (2, 3, 4)), (5, 1, (2, 3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("kernel, stride, sizes", GEOMETRIES)
def test_values_and_gradients_are_those_of_autodiff(kernel, stride, sizes):
    examples, channels, filters = sizes
    paddings = ("SAME", "VALID", ((1, 1), (1, 1)), ((3, 0), (1, 2)))

    def values_and_gradients(conv, x, w):
        results = []
        for padding in paddings:
            y, vjp = jax.vjp(partial(conv, strides=(stride, stride), padding=padding), x, w)
            results.append((y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))))
        return results

    with jax.enable_x64(True):
        x, w = (
            jnp.asarray(normal(examples, 5, 8, channels)),
            jnp.asarray(normal(kernel, kernel, channels, filters)),
        )
        ours, plain = both(values_and_gradients, x, w)
    assert_trees_equal(ours, plain)


@pytest.mark.parametrize(
    "kernel,strides,padding",
    [
        ((1, 3), (2, 1), ((0, 1), (2, 0))),
        ((3, 2), (1, 3), "SAME"),
        ((2, 5), (3, 2), ((4, 4), (0, 1))),
    ],
)
def test_rectangular_kernels_and_strides(kernel, strides, padding):
    def gradients(conv, x, w):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w, strides, padding))), (0, 1))(x, w)

    with jax.enable_x64(True):
        x, w = jnp.asarray(normal(3, 8, 7, 2)), jnp.asarray(normal(*kernel, 2, 5))
        assert_trees_equal(*both(gradients, x, w))


@pytest.mark.parametrize("padding", [((0, 0), (1, 1)), ((-2, -2), (1, 1)), ((1, -1), (0, 0))])
@pytest.mark.parametrize("kernel", [1, 5])
def test_images_with_no_place_for_the_kernel(kernel, padding):
    x = normal(16, 4, 5, 16, dtype=np.float32)
    w = normal(kernel, 3, 16, 17, dtype=np.float32)
    ours, plain = both(lambda conv, x, w: conv(x, w, (1, 1), padding), x, w)
    assert_trees_equal(ours, plain, tolerance=1e-4)


def jvp(f, x, w):
    return jax.jvp(f, (x, w), (jnp.sin(x), jax.tree.map(jnp.cos, w)))


def forward_over_reverse(f, x, w):
    return jax.jvp(jax.grad(f, (0, 1)), (x, w), (jnp.sin(x), jax.tree.map(jnp.cos, w)))[1]


def reverse_over_reverse(f, x, w):
    return jax.grad(lambda x, w: jnp.sum(jax.grad(f)(x, w) ** 2), (0, 1))(x, w)


def gradient_of_checkpoint(f, x, w):
    return jax.grad(jax.checkpoint(f), (0, 1))(x, w)


def hessian_of_vmap(f, x, w):
    return jax.vmap(lambda x: jax.hessian(lambda s: f(x[None] * s, w))(0.5))(x)


def per_example_gradients(f, x, w):
    return jax.vmap(lambda x, w: jax.grad(f, 1)(x[None], w), (2, None))(jnp.moveaxis(x, 0, 2), w)


def gradient_over_an_ensemble(f, x, w):
    ensemble = jax.tree.map(lambda w: jnp.stack([w, 2 * w], axis=1), w)
    return jax.grad(lambda x, w: jnp.sum(jax.vmap(f, (None, 1))(x, w)), (0, 1))(x, ensemble)


DERIVATIVES = [
    jvp,
    forward_over_reverse,
    reverse_over_reverse,
    gradient_of_checkpoint,
    hessian_of_vmap,
    per_example_gradients,
    gradient_over_an_ensemble,
]


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda f: f.__name__)
def test_every_mode_of_differentiation_agrees(derivative):
    with jax.enable_x64(True):
        x, w = jax.tree.map(jnp.asarray, operands(np.float64))
        ours, plain = both(lambda conv, x, w: derivative(partial(layer, conv), x, w), x, w)
    assert_trees_equal(ours, plain, 1e-9)


def test_derivatives_of_any_order_are_made_of_the_three_maps():
    def third(x, w):
        second = partial(reverse_over_reverse, partial(network, our_conv), x)
        return jax.jvp(second, (w,), (w,))[1]

    jaxpr = str(jax.make_jaxpr(third)(*operands()))
    assert "conv_general_dilated" not in jaxpr
    for name in ("conv", "conv_input_gradient", "conv_kernel_gradient"):
        assert f"canonical_{name}[" in jaxpr


def test_bfloat16_stays_bfloat16():
    x, w = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), operands())
    ours, plain = both(lambda c, x, w: jax.value_and_grad(partial(layer, c), (0, 1))(x, w), x, w)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        scale = np.abs(np.asarray(b, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.02 * scale
        )


def test_runs_without_jit():
    x, w = jax.tree.map(jnp.asarray, operands())
    expected = jax.grad(partial(layer, plain_conv))(x, w)
    assert_trees_equal(jax.grad(partial(layer, our_conv))(x, w), expected, 1e-5)
    with jax.disable_jit():
        assert_trees_equal(jax.grad(partial(layer, our_conv))(x, w), expected, 1e-5)


# What makes it fast: in the compiled program of a loop, every convolution has canonical axes.


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


def axis_orders(program):
    return set(re.findall(r"dim_labels=([^\s,]+)", program))


def in_loop(step):
    return lambda x, w: jax.lax.scan(lambda c, _: (step(*c), None), (x, w), None, length=3)[0]


def descend(f, x, w):
    gradients = jax.grad(f, (0, 1))(x, w)
    return jax.tree.map(lambda v, g: v - 0.1 * g, (x, w), gradients)


def descend_per_example(f, x, w):
    return x - 0.1 * jax.vmap(jax.grad(lambda x: f(x[None], w)))(x), w


def penalise_gradient(f, x, w):
    gradients = reverse_over_reverse(f, x, w)
    return jax.tree.map(lambda v, g: v - 0.1 * g, (x, w), gradients)


def sharpen(f, x, w):
    return forward_over_reverse(f, x, w)


def test_no_map_of_many_channels_is_left_to_one_core():
    x, w = normal(16, 8, 8, 16, dtype=np.float32), normal(3, 3, 16, 32, dtype=np.float32)

    def maps_of(dtype, conv, x, w):
        y, vjp = jax.vjp(lambda x, w: conv(x, w, (1, 1), "SAME"), x.astype(dtype), w.astype(dtype))
        return y, vjp(y)

    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.05)):
        ours, plain = both(partial(maps_of, dtype), x, w)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            assert a.dtype == b.dtype == dtype
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
    program = compiled(partial(maps_of, jnp.float32, our_conv), x, w)
    assert len(re.findall(r"window=.*lhs_dilate=2x1 rhs_dilate=2x1", program)) == 3
    assert "ynn_fusion" not in program


@pytest.mark.parametrize(
    "step", [descend, descend_per_example, penalise_gradient, sharpen], ids=lambda f: f.__name__
)
def test_all_convolutions_in_a_loop_are_canonical(step):
    x, w = operands()
    ours = compiled(in_loop(partial(step, partial(layer, our_conv))), x, w)
    assert axis_orders(ours) == {CANONICAL}
    assert "conditional(" not in ours
    # If this fails, XLA has learnt to do it by itself, and the module can go.
    plain = compiled(in_loop(partial(step, partial(layer, plain_conv))), x, w)
    assert axis_orders(plain) > {CANONICAL}


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_devices(check_vma):
    x, w = operands(n=8)
    mesh = jax.make_mesh((8,), ("device",))
    split, shared = PartitionSpec("device"), PartitionSpec()

    def share(conv, x, w):
        gradients = jax.grad(partial(network, conv), (0, 1))
        g_x, g_w = gradients(x, w)
        # with check_vma the gradient of what the devices share is already their sum
        return g_x, g_w if check_vma else jax.lax.psum(g_w, "device")

    def sharded(conv):
        return jax.shard_map(
            partial(share, conv),
            mesh=mesh,
            in_specs=(split, shared),
            out_specs=(split, shared),
            check_vma=check_vma,
        )

    x = jax.device_put(x, NamedSharding(mesh, split))
    w = jax.device_put(w, NamedSharding(mesh, shared))
    expected = jax.grad(partial(network, plain_conv), (0, 1))(*operands_like(x, w))
    assert_trees_equal(jax.jit(sharded(our_conv))(x, w), expected, 1e-4)
    program = compiled(in_loop(sharded(our_conv)), x, w)
    assert axis_orders(program) == {CANONICAL}
    assert "conditional(" not in program


def operands_like(*trees):
    return jax.tree.map(np.asarray, trees)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_operands_that_are_sharded_outside_shard_map(axis_type):
    x, w = operands(n=8)
    mesh = jax.make_mesh((8,), ("device",), axis_types=(axis_type,))
    expected = jax.grad(partial(network, plain_conv), (0, 1))(x, w)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("device")))
    w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
    assert_trees_equal(jax.jit(jax.grad(partial(network, our_conv), (0, 1)))(x, w), expected, 1e-4)


def stablehlo(fn, args, platform):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def described(program):
    return sorted(re.findall(r"dim_numbers = (\S+x\S+|.*?), window = (.*?})", program))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_get_the_convolutions_of_autodiff(platform):
    ours, plain = (jax.grad(partial(network, c), (0, 1)) for c in (our_conv, plain_conv))
    on_cpu = stablehlo(ours, operands(), "cpu")
    ours, plain = (stablehlo(fn, operands(), platform) for fn in (ours, plain))
    assert len(described(plain)) == 6
    assert described(ours) == described(plain)
    assert described(on_cpu) != described(plain)


def test_precision_of_the_context_reaches_the_derivatives():
    def inside(x, w):
        with jax.default_matmul_precision("highest"):
            return jax.grad(partial(network, our_conv), (0, 1))(x, w)

    program = stablehlo(inside, operands(), "cuda")
    assert program.count("#stablehlo<precision HIGHEST>, #stablehlo<precision HIGHEST>") == 6
    program = stablehlo(jax.grad(partial(network, our_conv), (0, 1)), operands(), "cuda")
    assert "HIGHEST" not in program


@pytest.mark.parametrize(
    "options",
    [
        {"lhs_dilation": (2, 1), "padding": ((0, 0), (0, 0))},
        {"rhs_dilation": (1, 2)},
        {"feature_group_count": 2},
        {"preferred_element_type": jnp.float32},
        {"dimension_numbers": ("NHWC", "HWIO", "NCHW")},
        {"dimension_numbers": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_covered_goes_to_the_plain_convolution(options):
    kernel_inputs = 2 if "feature_group_count" in options else 4
    arguments = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT} | options
    x, w = normal(2, 4, 4, 4, dtype=np.float32), normal(4, 4, kernel_inputs, 4, dtype=np.float32)
    jaxpr = jax.make_jaxpr(lambda x, w: canonical_conv(x, w, **arguments))(x, w)
    assert [e.primitive.name for e in jaxpr.eqns] == ["conv_general_dilated"]


@pytest.mark.parametrize("dilation", [None, (1, 1)])
def test_dilation_by_one_is_covered(dilation):
    x, w = normal(2, 4, 4, 3, dtype=np.float32), normal(3, 3, 3, 4, dtype=np.float32)
    conv = partial(
        canonical_conv,
        window_strides=(1, 1),
        padding="SAME",
        lhs_dilation=dilation,
        rhs_dilation=dilation,
        dimension_numbers=LAYOUT,
    )
    jaxpr = jax.make_jaxpr(conv)(x, w)
    assert [e.primitive.name for e in jaxpr.eqns] == ["canonical_conv"]
    assert jaxpr.out_avals[0].shape == (2, 4, 4, 4)


def test_channels_that_do_not_match_are_refused(plain_calls):
    x, w = jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 2, 4))
    with pytest.raises(ValueError, match="3 input channels, got 2"):
        our_conv(x, w, (1, 1), "SAME")
