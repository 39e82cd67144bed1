"""Norms of linear maps against their matrices, eigenvalues against dense decompositions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import spectral
from robustjax.models import canonical_conv
from robustjax.norms import L1, L2, LInf, Lp
from robustjax.spectral import conv_map, dense_map, frobenius_norm, operator_norm, stable_rank

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


KERNEL, MATRIX = normal(3, 3, 2, 3), normal(5, 4)


def at_once(function):
    """The results of a function without arguments, compiled as one program."""
    return jax.jit(function)()


def all_norms(linear_map):
    norms = [operator_norm(linear_map, norm) for norm in (L1(), L2(), LInf())]
    return [*norms, frobenius_norm(linear_map)]


def expected_norms(matrix):
    return [np.linalg.norm(matrix, ord) for ord in (1, 2, np.inf, "fro")]


def expected_rank(matrix):
    return (np.linalg.norm(matrix) / np.linalg.norm(matrix, 2)) ** 2


CONVOLUTIONS = {
    "same": ((6, 6), {}),
    "strided": ((6, 5), {"strides": 2, "padding": 1}),
    "valid": ((4, 5), {"strides": (1, 2), "padding": "VALID"}),
    "smaller than its kernel": ((2, 2), {"padding": ((1, 0), (2, 1))}),
    "canonical": ((6, 5), {"strides": 2, "padding": 1, "convolution": canonical_conv}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_norms_of_convolutions_are_those_of_their_matrices(name):
    size, options = CONVOLUTIONS[name]

    @jax.jit
    def norms_and_matrix(kernel):
        linear_map = conv_map(kernel, size, **options)
        matrix = jax.jacobian(linear_map)(jnp.zeros(linear_map.input_shape))
        return all_norms(linear_map), matrix.reshape(-1, size[0] * size[1] * 2)

    norms, matrix = norms_and_matrix(KERNEL)
    np.testing.assert_allclose(norms, expected_norms(matrix), rtol=2e-5)


def test_norms_of_dense_layers():
    matrices = MATRIX, jnp.diag(jnp.array([3.0, -4.0]))
    norms, diagonal = at_once(lambda: [all_norms(dense_map(matrix)) for matrix in matrices])
    np.testing.assert_allclose(norms, expected_norms(MATRIX.T), rtol=1e-5)
    np.testing.assert_allclose(diagonal, [4, 4, 4, 5], rtol=1e-6)
    assert operator_norm(dense_map(MATRIX.astype(jnp.bfloat16))).dtype == jnp.float32


def test_a_stable_rank_is_one_for_rank_one_and_full_for_rotations():
    rank_one, rotation = jnp.outer(MATRIX[:, 0], MATRIX[0]), np.linalg.qr(normal(4, 4))[0]
    diagonal = jnp.diag(jnp.array([3.0, 4]))
    matrices = rank_one, jnp.asarray(rotation), MATRIX, 7 * MATRIX, diagonal
    ranks = at_once(lambda: [stable_rank(dense_map(matrix)) for matrix in matrices])
    expected = [1, 4, expected_rank(MATRIX), expected_rank(MATRIX)]
    np.testing.assert_allclose(ranks[:4], expected, rtol=1e-5)
    np.testing.assert_allclose(ranks[4], 25 / 16)


def test_the_zero_map_has_norm_zero_and_a_finite_derivative():
    @jax.jit
    def measures(kernel):
        conv, dense = conv_map(kernel, (3, 2)), dense_map(kernel[0, 0])
        functions = (operator_norm, frobenius_norm, stable_rank)
        return jnp.stack([f(m) for m in (conv, dense) for f in functions])

    assert not np.any(measures(0 * KERNEL))
    assert np.all(np.isfinite(jax.jit(jax.jacrev(measures))(0 * KERNEL)))


def test_the_derivative_of_a_spectral_norm_is_the_outer_product_of_its_vectors():
    def value(matrix):
        return spectral.power_iteration(lambda x: x @ matrix, jnp.ones(5), steps=200).value

    u, _, v = np.linalg.svd(MATRIX)
    np.testing.assert_allclose(jax.jit(jax.grad(value))(MATRIX), np.outer(u[:, 0], v[0]), atol=1e-5)
    # Of a convolution, along the kernel itself: the norm grows in proportion.
    norm, gradient = jax.jit(
        jax.value_and_grad(lambda k: operator_norm(conv_map(k, (4, 4)), steps=32))
    )(KERNEL)
    np.testing.assert_allclose(jnp.vdot(gradient, KERNEL), norm, rtol=1e-5)


def test_power_iteration_gives_the_triple_of_the_largest_singular_value():
    @jax.jit
    def triple(start):
        return spectral.power_iteration(lambda x: x @ MATRIX, start, steps=200)

    u, s, v = np.linalg.svd(MATRIX.T)
    value, left, right = triple(normal(5))
    np.testing.assert_allclose(value, s[0], rtol=1e-6)
    np.testing.assert_allclose(right @ MATRIX, value * left, atol=1e-5)
    np.testing.assert_allclose([abs(left @ u[:, 0]), abs(right @ v[0])], 1, rtol=1e-6)
    # It starts again where it was: one step is then enough.
    one = jax.jit(lambda x: spectral.power_iteration(lambda x: x @ MATRIX, x, steps=1).value)
    np.testing.assert_allclose(one(right), s[0], rtol=1e-6)
    few = one(jnp.ones(5))
    assert few <= s[0] * (1 + 1e-6)


def test_power_iteration_takes_pytrees_and_batches_of_maps():
    other = normal(2, 4)

    def linear_map(v):
        return {"out": v["a"] @ MATRIX + v["b"] @ other}

    start = {"a": jnp.ones(5), "b": jnp.ones(2)}
    kernels = jnp.stack([MATRIX, 2 * MATRIX[::-1]])

    def largest(kernel):
        return spectral.power_iteration(lambda x: x @ kernel, jnp.ones(5)).value

    @jax.jit
    def both(start):
        return spectral.power_iteration(linear_map, start), jax.vmap(largest)(kernels)

    (value, left, _), values = both(start)
    stacked = np.linalg.norm(np.concatenate([MATRIX, other]), 2)
    np.testing.assert_allclose(value, stacked, rtol=1e-5)
    assert left["out"].shape == (4,)
    np.testing.assert_allclose(values, np.linalg.norm(kernels, 2, axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("spectrum", [[3.0, 1.0, -5.0], [2.0, -1.0, 0.5], [-4.0, -1.0, -2.0]])
def test_both_ends_of_a_symmetric_spectrum(spectrum):
    basis = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    matrix = jnp.asarray(basis * spectrum @ basis.T, jnp.float32)

    @jax.jit
    def ends(shift):
        operator = lambda v: matrix @ v  # noqa: E731
        return spectral.symmetric_power_iteration(operator, jnp.ones(3), steps=80, shift=shift)

    far = ends(0.0)
    other = ends(far.value)
    np.testing.assert_allclose(far.value, max(spectrum, key=abs), rtol=1e-5)
    values = sorted([far.value, other.value])
    np.testing.assert_allclose(values, [min(spectrum), max(spectrum)], rtol=1e-4)
    np.testing.assert_allclose(matrix @ far.vector, far.value * far.vector, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_top_eigenvalue_of_the_hessian_of_a_loss(sign):
    inputs, targets = normal(6, 3), normal(6)

    def loss(params):
        hidden = jnp.tanh(inputs @ params["w"]) @ params["v"]
        return sign * jnp.mean((hidden - targets) ** 2)

    flat, unravel = jax.flatten_util.ravel_pytree({"w": normal(3, 2), "v": normal(2)})

    @jax.jit
    def top_and_matrix(flat):
        value, vector = spectral.top_hessian_eigenpair(loss, unravel(flat), KEY, steps=300)
        hessian = jax.hessian(lambda p: loss(unravel(p)))(flat)
        return value, jax.flatten_util.ravel_pytree(vector)[0], hessian

    value, vector, hessian = top_and_matrix(flat)
    values, vectors = np.linalg.eigh(hessian)
    # With the sign changed the lowest eigenvalue is the one of largest magnitude.
    assert (abs(values[0]) < abs(values[-1])) == (sign == 1)
    np.testing.assert_allclose(value, values[-1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(abs(vector @ vectors[:, -1]), 1, rtol=1e-2)


def test_lanczos_is_exact_when_its_space_is_exhausted():
    # A blur of two pixels: the space has two dimensions, the steps are fifty.
    blur = conv_map(jnp.ones((3, 1, 1, 1)), (2, 1))
    identity = dataclasses.replace(dense_map(jnp.eye(4)), matrix=None)
    norms = at_once(lambda: (operator_norm(blur), operator_norm(identity, steps=3)))
    np.testing.assert_allclose(norms, [2, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dense_map(jnp.ones(3)), r"kernel must be floating-point with 2 axes, got float32"),
        (lambda: dense_map(jnp.ones((3, 2), int)), "got int32"),
        (lambda: conv_map(jnp.ones((3, 2)), (3, 3)), "kernel must be floating-point with 4 axes"),
        (lambda: conv_map(KERNEL, (0, 3)), "image_size must be >= 1, got 0"),
        (lambda: conv_map(KERNEL, (3, 3), strides=0), "strides must be >= 1, got 0"),
        (lambda: operator_norm(dense_map(MATRIX), Lp(3)), r"norm must be L1\(\), L2\(\) or LInf"),
        (lambda: operator_norm(dense_map(MATRIX), "l2"), "got 'l2'"),
        (lambda: operator_norm(dense_map(MATRIX), steps=0), "steps must be >= 1, got 0"),
        (lambda: operator_norm(conv_map(KERNEL, (3, 3)), key=3), "key must be a typed key"),
        (lambda: spectral.power_iteration(jnp.sin, jnp.zeros(2)), "start must not be zero"),
        (lambda: spectral.power_iteration("f", jnp.ones(2)), "linear_map must be a function"),
        (lambda: spectral.symmetric_power_iteration(jnp.sin, 1.0, steps=0), "steps must be >= 1"),
        (lambda: spectral.top_hessian_eigenpair(jnp.sum, jnp.ones(2), 3), "key must be a typed"),
    ],
)
def test_what_is_refused(call, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        call()
