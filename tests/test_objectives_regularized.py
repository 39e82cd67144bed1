"""Penalties on the input gradient: closed forms, golden numbers, and what they compose with."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import models, training
from robustjax.attacks import fgsm, gaussian_start, pgd
from robustjax.gradients import a_engm, awp, clip_penalty, engm, ghost_norms, vmap_norms
from robustjax.losses import cross_entropy
from robustjax.metrics.alignment import (
    cosine,
    gradient_alignment,
    input_gradient,
    linearization_error,
)
from robustjax.models.convolution import canonical_conv
from robustjax.norms import L1, L2, LInf
from robustjax.objectives import (
    augmented_hessian_product,
    clean_logit_pairing,
    cure,
    evaluation_point,
    first_order,
    grad_align,
    gradient_penalty,
    local_linearity,
    logit_squeezing,
    madry,
    penalized,
    scheduled,
    soar,
    standard,
)
from robustjax.optim import msgd
from robustjax.threat import ThreatModel

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
N, D, K = 6, 5, 3
X = jnp.asarray(RNG.uniform(0.2, 0.8, size=(N, D)), jnp.float32)
Y = jnp.arange(N, dtype=jnp.int32) % K
MATRIX = jnp.asarray(RNG.normal(size=(D, D)), jnp.float32)
MATRIX = MATRIX + MATRIX.T
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(D, 8)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(8, K)), jnp.float32),
}


def at_once(function):
    """The results of a function without arguments, compiled as one program."""
    return jax.jit(function)()


def smooth(params, x):
    return jax.nn.softplus(x.reshape(len(x), -1) @ params["w"]) @ params["v"]


def binary(w, x):
    """Logits ``(0, w.x)``, whose cross-entropy is the logistic loss."""
    score = x @ w
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def first_logit(logits, y):
    """As a loss: the first logit itself, so that any function can be the loss."""
    del y
    return logits[:, 0]


def quadratic(x):
    """``x^T A x / 2`` as the first of two logits."""
    value = jnp.einsum("ni,ij,nj->n", x, MATRIX, x) / 2
    return jnp.stack([value, value], axis=-1)


def linear(x):
    value = x @ MATRIX[0]
    return jnp.stack([value, value], axis=-1)


# The measures themselves


def test_alignment_of_a_quadratic_in_closed_form():
    d = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
    got = gradient_alignment(quadratic, X, Y, d, loss=first_logit)
    a, b = np.asarray(X @ MATRIX), np.asarray((X + d) @ MATRIX)
    expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    scaled = gradient_alignment(lambda x: 7 * quadratic(x), X, Y, d, loss=first_logit)
    np.testing.assert_allclose(scaled, got, rtol=1e-5)
    np.testing.assert_allclose(
        gradient_alignment(quadratic, X, Y, 0 * d, loss=first_logit), 1, rtol=1e-6
    )
    error = linearization_error(quadratic, X, Y, d, loss=first_logit)
    np.testing.assert_allclose(error, np.abs(np.einsum("ni,ij,nj->n", d, MATRIX, d)) / 2, rtol=1e-3)


def test_a_linear_binary_model_is_perfectly_aligned_and_a_zero_gradient_counts_as_aligned():
    w = MATRIX[0]
    d = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
    y = Y % 2
    logits_fn = functools.partial(binary, w)
    np.testing.assert_allclose(gradient_alignment(logits_fn, X, y, d), 1, rtol=1e-6)
    np.testing.assert_allclose(linearization_error(linear, X, Y, d, loss=first_logit), 0, atol=1e-5)
    np.testing.assert_array_equal(cosine(jnp.zeros((2, 3)), jnp.ones((2, 3))), 1)
    slopes = jax.grad(lambda a: cosine(a, jnp.ones((2, 3))).sum())(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(slopes, 0)


# Penalties

THREAT = ThreatModel(LInf(), 0.1)
PENALTIES = {
    "grad_align": grad_align(0.1),
    "grad_align two": grad_align(0.1, sides="two"),
    "grad_align fgsm": grad_align(0.1, point="fgsm"),
    "grad_align l2": grad_align(0.3, norm=L2()),
    "gradient_penalty": gradient_penalty(),
    "gradient norm l1": gradient_penalty(norm=L1(), power=1),
    "first_order": first_order(0.1),
    "soar": soar(0.1),
    "soar exact": soar(0.1, hessian="exact"),
    "soar samples": soar(0.1, samples=3, bound="frobenius"),
    "soar clipped": soar(0.1, clip=0.5),
    "cure": cure(0.1),
    "cure unit": cure(0.1, point="unit"),
    "local_linearity": local_linearity(0.1, slope_weight=0.5),
    "logit_squeezing": logit_squeezing(),
    "clean_logit_pairing": clean_logit_pairing(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_derivatives_for_the_parameters_are_those_of_finite_differences(name):
    penalty = PENALTIES[name]
    direction = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), PARAMS)

    @jax.jit
    def mean(t):
        # The one-sided penalty holds the gradient at x: so does the difference, by its parameters.
        moved = jax.tree.map(lambda p, d: p + t * d, PARAMS, direction)
        return penalty(functools.partial(smooth, moved), KEY, X, Y).mean()

    slope = jax.grad(mean)(0.0)
    assert np.isfinite(slope) and mean(0.0) >= 0
    if name in (
        "grad_align", "grad_align fgsm", "grad_align l2", "cure", "cure unit", "local_linearity"
    ):  # fmt: skip
        return  # constants inside: tested below
    numeric = (mean(1e-2) - mean(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, numeric, rtol=3e-2, atol=2e-3)


def test_the_two_sided_alignment_has_both_one_sided_derivatives():
    d = 0.1 * jnp.sign(jnp.asarray(RNG.normal(size=(N, D)), jnp.float32))

    def alignment(first, second):
        a = input_gradient(functools.partial(smooth, first), X, Y)
        b = input_gradient(functools.partial(smooth, second), X + d, Y)
        return cosine(a, b).mean()

    by_first, by_second = jax.jit(jax.grad(alignment, argnums=(0, 1)))(PARAMS, PARAMS)
    both = jax.jit(jax.grad(lambda p: alignment(p, p)))(PARAMS)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-3, atol=1e-6),
        by_first, by_second, both,
    )  # fmt: skip


def test_the_one_sided_penalty_differentiates_the_second_gradient_alone():
    def value(params, sides):
        return grad_align(0.1, point="fgsm", sides=sides)(
            functools.partial(smooth, params), KEY, X, Y
        ).mean()

    first = at_once(lambda: input_gradient(functools.partial(smooth, PARAMS), X, Y))
    eta = 0.1 * jnp.sign(first)

    def by_hand(params):
        second = input_gradient(functools.partial(smooth, params), X + eta, Y)
        return 1 - cosine(first, second).mean()

    expected, slopes = jax.jit(jax.value_and_grad(by_hand))(PARAMS)
    one, got = jax.jit(jax.value_and_grad(functools.partial(value, sides="one")))(PARAMS)
    two = jax.jit(functools.partial(value, sides="two"))(PARAMS)
    np.testing.assert_allclose([one, two], [expected, expected], rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, slopes)


def test_alignment_penalty_is_zero_for_linear_models_and_bounded():
    logits_fn = functools.partial(binary, MATRIX[0])
    for name in ("grad_align", "grad_align fgsm", "grad_align l2"):
        np.testing.assert_allclose(PENALTIES[name](logits_fn, KEY, X, Y % 2), 0, atol=1e-6)
        values = PENALTIES[name](functools.partial(smooth, PARAMS), KEY, X, Y)
        assert (values >= 0).all() and (values <= 2).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_nothing_is_nan_where_the_loss_is_flat(name):
    """Parameters zero: no gradient for the input, none of it for the parameters but finite ones."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)

    def mean(params):
        return PENALTIES[name](functools.partial(smooth, params), KEY, X, Y).mean()

    value, slopes = jax.jit(jax.value_and_grad(mean))(zero)
    assert np.isfinite(value) and all(np.isfinite(s).all() for s in jax.tree.leaves(slopes))
    if not name.startswith("soar"):
        np.testing.assert_allclose(value, 0, atol=1e-6)


LOGISTIC_W = jnp.array([1.0, -2.0])
LOGISTIC = functools.partial(binary, LOGISTIC_W)
POINT, ONE = jnp.array([[0.5, 0.25]]), jnp.ones(1, jnp.int32)


def test_golden_numbers_of_logistic_regression():
    """f = 1/2 at (0.5, 0.25), so g = (-0.5, 1), K = 0.25 w w^T and H has rank one."""
    z, z_1 = jnp.array([[0.3, -0.7]]), jnp.array([0.2])

    def size(**options):
        upper, lower = augmented_hessian_product(LOGISTIC, POINT, ONE, z, z_1, **options)
        return upper, lower, 0.51 * jnp.sqrt((upper**2).sum() + lower[0] ** 2)

    def samples(**options):
        return soar(0.1, samples=5_000, hessian="exact", **options)(LOGISTIC, KEY, POINT, ONE)

    (upper, lower, exact), coarse, fine, mean, many = at_once(
        lambda: (
            size(hessian="exact"), size(h=0.1)[2], size(h=0.01)[2],
            samples(), samples(bound="frobenius"),
        )
    )  # fmt: skip
    np.testing.assert_allclose(upper, [[0.325, -0.65]], rtol=1e-5)
    np.testing.assert_allclose(lower, [-0.65], rtol=1e-5)
    np.testing.assert_allclose(exact, 0.49725, rtol=1e-5)
    np.testing.assert_allclose([coarse, fine], [0.495759, 0.497235], rtol=3e-5)
    # E ||Hz|| of a matrix of rank one, and the Frobenius norm.
    np.testing.assert_allclose(mean / 0.51, 2.25 * np.sqrt(2 / np.pi), rtol=0.02)
    np.testing.assert_allclose(many / 0.51, 2.25, rtol=0.02)
    np.testing.assert_allclose(
        cross_entropy(LOGISTIC(POINT), ONE) + many - 0.5, 1.340647, rtol=0.02
    )
    foar = cross_entropy(LOGISTIC(POINT), ONE) + first_order(0.1)(LOGISTIC, KEY, POINT, ONE)
    np.testing.assert_allclose(foar, 0.843147, rtol=1e-5)


def test_mean_square_of_the_product_is_the_frobenius_norm():
    """``||K||_F^2 + 2 ||g||^2 + 1``, with K from the Hessian itself."""
    logits_fn = functools.partial(smooth, PARAMS)

    def loss(x):
        return cross_entropy(logits_fn(x[None]), Y[:1])[0]

    z = jnp.asarray(RNG.normal(size=(1, D)), jnp.float32)

    def values(bound, *counts):
        rules = [soar(0.1, samples=n, hessian="exact", bound=bound) for n in counts]
        return [rule(logits_fn, KEY, X[:1], Y[:1])[0] for rule in rules]

    @jax.jit
    def everything(x, z):
        product = augmented_hessian_product(
            logits_fn, X[:1], Y[:1], z, jnp.array([0.3]), hessian="exact"
        )
        sizes = *values("mean", 5_000), *values("frobenius", 5_000)
        return jax.hessian(loss)(x), jax.grad(loss)(x), product, sizes, values("spectral", 1, 3, 60)

    hessian, gradient, (upper, lower), sizes, found = everything(X[0], z)
    augmented = np.block([[np.asarray(hessian), np.asarray(gradient)[:, None]],
                          [np.asarray(gradient)[None], np.ones((1, 1))]])  # fmt: skip
    frobenius = np.linalg.norm(augmented)
    np.testing.assert_allclose(
        frobenius**2, (hessian**2).sum() + 2 * (gradient**2).sum() + 1, rtol=1e-5
    )
    expected = augmented @ np.append(np.asarray(z[0]), 0.3)
    np.testing.assert_allclose(np.append(upper[0], lower), expected, rtol=1e-3, atol=1e-4)
    factor = (D * 0.1**2 + 1) / 2
    mean, of_frobenius = np.array(sizes) / factor
    np.testing.assert_allclose(of_frobenius, frobenius, rtol=0.02)
    # Power iteration comes to the largest eigenvalue from below.
    found = np.array(found) / factor
    spectral = np.linalg.norm(augmented, 2)
    assert found[0] < found[1] < spectral * (1 + 1e-5)
    np.testing.assert_allclose(found[2], spectral, rtol=1e-3)
    assert np.sqrt(2 / np.pi) * frobenius * 0.98 <= mean <= frobenius * 1.02


def test_the_difference_is_exact_for_a_quadratic_loss_and_first_order_otherwise():
    z = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
    z_1 = jnp.asarray(RNG.normal(size=N), jnp.float32)
    product = functools.partial(augmented_hessian_product, x=X, y=Y, z=z, z_1=z_1)
    exact = product(quadratic, hessian="exact", loss=first_logit)
    np.testing.assert_allclose(
        exact[0], z @ MATRIX + z_1[:, None] * (X @ MATRIX), rtol=1e-4, atol=1e-4
    )
    for h in (0.01, 1.0):
        got = product(quadratic, h=h, loss=first_logit)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), got, exact
        )
    logits_fn = functools.partial(smooth, PARAMS)
    true = product(logits_fn, hessian="exact")[0]
    errors = [float(jnp.abs(product(logits_fn, h=h)[0] - true).max()) for h in (0.2, 0.1, 0.05)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_a_flat_loss_leaves_the_floor():
    flat = jnp.zeros((1000, D))
    spectral = soar(0.1, samples=2, bound="spectral")

    def constant(x):
        return jnp.zeros((len(x), 2))

    @jax.jit
    def everything(w):
        return (
            soar(0.1)(constant, KEY, flat, jnp.zeros(1000, jnp.int32)),
            soar(0.1, clip=0.3)(constant, KEY, flat, ONE.repeat(1000)),
            jax.value_and_grad(
                lambda w: spectral(lambda x: w * constant(x), KEY, flat[:2], Y[:2]).mean()
            )(w),
        )

    values, clipped, (largest, slope) = everything(1.0)
    factor = (D * 0.1**2 + 1) / 2
    np.testing.assert_allclose(values.mean(), factor * np.sqrt(2 / np.pi), rtol=0.05)
    np.testing.assert_allclose(largest, factor, rtol=1e-5)
    assert slope == 0
    np.testing.assert_allclose(clipped, np.minimum(values, 0.3), rtol=1e-6)


def test_the_quadratic_model_in_the_box_is_below_the_frobenius_bound():
    """Exhaustive over the corners, for losses that are convex around the point."""
    eps = 0.3
    corners = eps * np.array(list(itertools.product((-1, 1), repeat=D)))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        root, g = rng.normal(size=(D, D)), rng.normal(size=D)
        hessian = root @ root.T / D
        gains = corners @ g + np.einsum("ci,ij,cj->c", corners, hessian, corners) / 2
        augmented = np.block([[hessian, g[:, None]], [g[None], np.ones((1, 1))]])
        assert gains.max() <= (D * eps**2 + 1) / 2 * np.linalg.norm(augmented) - 0.5


def test_first_order_is_the_largest_gain_of_the_linearised_loss():
    logits_fn = functools.partial(smooth, PARAMS)
    gradient = input_gradient(logits_fn, X, Y)
    corners = 0.1 * np.array(list(itertools.product((-1, 1), repeat=D)))
    np.testing.assert_allclose(
        first_order(0.1)(logits_fn, KEY, X, Y), (gradient @ corners.T).max(1), rtol=1e-4
    )
    for norm in (L2(), L1()):
        expected = 0.1 * norm.dual.value(gradient, batch_ndim=1)
        got = first_order(0.1, norm=norm)(logits_fn, KEY, X, Y)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradient_penalty_of_logistic_loss_in_closed_form():
    w, y = MATRIX[0], Y % 2
    margin = (2 * np.asarray(y) - 1) * np.asarray(X @ w)
    expected = (1 / (1 + np.exp(margin))) ** 2 * float(w @ w)
    got = gradient_penalty()(functools.partial(binary, w), KEY, X, y)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_cure_of_a_quadratic_is_the_curvature_along_the_step():
    step = 0.1 * jnp.sign(X @ MATRIX)
    got = cure(0.1, loss=first_logit)(quadratic, KEY, X, Y)
    np.testing.assert_allclose(got, ((step @ MATRIX) ** 2).sum(1), rtol=1e-3)
    unit = step / jnp.linalg.norm(step, axis=1, keepdims=True) * 0.1
    got = cure(0.1, point="unit", loss=first_logit)(quadratic, KEY, X, Y)
    np.testing.assert_allclose(got, ((unit @ MATRIX) ** 2).sum(1), rtol=1e-3)
    np.testing.assert_allclose(cure(0.1, loss=first_logit)(linear, KEY, X, Y), 0, atol=1e-9)


def test_local_linearity_of_a_quadratic_is_its_largest_curvature_term():
    """``max |d^T A d| / 2`` over the box, at two corners for a positive A; 0 for linear losses."""
    definite = jnp.eye(D) + jnp.ones((D, D))

    def logits_fn(x):
        value = jnp.einsum("ni,ij,nj->n", x, definite, x) / 2
        return jnp.stack([value, value], axis=-1)

    corners = 0.1 * np.array(list(itertools.product((-1, 1), repeat=D)))
    largest = np.einsum("ci,ij,cj->c", corners, definite, corners).max() / 2
    got = local_linearity(0.1, steps=20, loss=first_logit)(logits_fn, KEY, X, Y)
    assert got.max() <= largest * (1 + 1e-3)
    np.testing.assert_allclose(got.max(), largest, rtol=1e-2)
    weight = local_linearity(0.1, steps=1, slope_weight=2.0, loss=first_logit)
    flat = local_linearity(0.1, steps=1, loss=first_logit)(linear, KEY, X, Y)
    np.testing.assert_allclose(flat, 0, atol=1e-6)
    slope = weight(linear, KEY, X, Y)  # 2 |<d, g>| at a point of the ball
    assert (slope > 0).all() and (slope <= 2 * 0.1 * jnp.abs(MATRIX[0]).sum() + 1e-5).all()


def test_the_gradient_of_the_penalty_is_clipped_on_its_own():
    objective = penalized(standard(), gradient_penalty(), weight=3.0)
    loss_fn = objective(MODEL.apply)

    def gradient(fn):
        return jax.jit(jax.grad(fn))(PARAMS)

    of_base = gradient(lambda p: standard()(MODEL.apply)(p, {}, KEY, BATCH)[0].mean())
    of_penalty = gradient(lambda p: loss_fn(p, {}, KEY, BATCH)[1][1]["penalty"].mean())
    size = float(optax.tree.norm(of_penalty))
    for max_norm in (size / 4, 2 * size):
        grad_fn = clip_penalty(max_norm).oracle(loss_fn)
        got = jax.jit(lambda p, f=grad_fn: f(p, {}, (), KEY, BATCH)[0])(PARAMS)
        factor = min(max_norm / size, 1)
        jax.tree.map(
            lambda a, b, c, f=factor: np.testing.assert_allclose(
                c, a + f * b, rtol=1e-3, atol=1e-5),
            of_base, of_penalty, got,
        )  # fmt: skip
    with pytest.raises(ValueError, match="penalty"):
        clip_penalty().oracle(standard()(MODEL.apply))(PARAMS, {}, (), KEY, BATCH)


def test_logit_penalties():
    logits_fn = functools.partial(smooth, PARAMS)
    z = np.asarray(logits_fn(X))
    squeezed = logit_squeezing()(logits_fn, KEY, X, Y)
    np.testing.assert_allclose(squeezed, (z**2).sum(1), rtol=1e-5)
    paired = clean_logit_pairing()(logits_fn, KEY, X, Y)
    np.testing.assert_allclose(paired, ((z - np.roll(z, N // 2, 0)) ** 2).sum(1), rtol=1e-4)


# Objectives

MODEL = models.from_function(smooth)
BATCH = {"image": X, "label": Y, "index": jnp.arange(N, dtype=jnp.int32)}


def test_penalized_is_the_base_and_the_weighted_penalty_where_it_is_told():
    attack = pgd(THREAT, steps=1)
    for at, weight in (("image", 0.5), ("adversarial", 2.0)):
        loss_fn = penalized(madry(attack), gradient_penalty(), weight=weight, at=at)(MODEL.apply)
        losses, (_, metrics) = loss_fn(PARAMS, {}, KEY, BATCH)
        base = madry(attack)(MODEL.apply)
        expected, _ = base(PARAMS, {}, KEY, BATCH)
        attacked = base.inner(PARAMS, {}, KEY, BATCH)
        added = gradient_penalty()(functools.partial(smooth, PARAMS), KEY, attacked[at], Y)
        np.testing.assert_allclose(metrics["penalty"], weight * added, rtol=1e-5)
        np.testing.assert_allclose(losses, expected + weight * added, rtol=1e-5)
        np.testing.assert_array_equal(metrics["loss"], losses)
    nothing = penalized(standard(), soar(0.1), weight=0.0)(MODEL.apply)
    plain, _ = standard()(MODEL.apply)(PARAMS, {}, KEY, BATCH)
    np.testing.assert_allclose(nothing(PARAMS, {}, KEY, BATCH)[0], plain, rtol=1e-6)


LAYERS = 2
AXES = ("NHWC", "HWIO", "NHWC")
KERNELS = {
    "first": jnp.asarray(RNG.normal(size=(3, 3, 4, 4)), jnp.float32),
    "second": jnp.asarray(RNG.normal(size=(3, 3, 4, 4)), jnp.float32),
}


def number_of_convolutions(objective):
    """In the compiled program of the gradient of a small network's mean loss."""

    def network(params, x):
        for kernel in params.values():
            x = jax.nn.relu(canonical_conv(x, kernel, (1, 1), "SAME", dimension_numbers=AXES))
        return x.mean((1, 2))

    batch = {**BATCH, "image": jnp.full((N, 4, 4, 4), 0.5)}
    loss_fn = objective(models.from_function(network).apply)
    gradient = jax.grad(lambda p: loss_fn(p, {}, KEY, batch)[0].mean())
    return jax.jit(gradient).lower(KERNELS).compile().as_text().count(" convolution(")


def test_no_pass_runs_twice():
    """A pass has a convolution per layer; the input needs none in a derivative for parameters.

    The derivative of an input gradient for the parameters takes six for a layer: the two passes of
    the gradient, back through either, and to the parameters of either.
    """
    plain, double = 3 * LAYERS - 1, 6 * LAYERS - 1
    attack = 2 * LAYERS
    aligned = penalized(madry(fgsm(THREAT)), grad_align(0.1))
    # The constant gradient of the penalty is that of the attack.
    assert number_of_convolutions(aligned) == attack + plain + double
    # The loss is measured in the forward pass of the penalty, and goes back through it with it.
    assert number_of_convolutions(penalized(standard(), first_order(0.1))) == double


def test_sharing_a_forward_pass_changes_nothing():
    penalty = gradient_penalty()

    def apart(*arguments):  # has no argument for the forward pass
        return penalty(*arguments)

    def noisy(params, model_state, x, train, key):
        logits = smooth(params, x)
        return logits * (1 + 0.5 * jax.random.normal(key, logits.shape)), model_state + 1

    def redrawn(model_fn):
        loss_fn = standard()(model_fn)
        return lambda params, model_state, key, batch: loss_fn(
            params, model_state, jax.random.fold_in(key, 9), batch
        )

    def value_and_slopes(penalty, base):
        loss_fn = penalized(base, penalty)(noisy)

        def mean(params):
            losses, (model_state, _) = loss_fn(params, 0, KEY, BATCH)
            return losses.mean(), model_state

        return jax.jit(jax.value_and_grad(mean, has_aux=True))(PARAMS)

    # The second one draws another noise for the loss, which must not be that of the penalty.
    for base in (standard(), redrawn):
        got, expected = (value_and_slopes(p, base) for p in (penalty, apart))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected
        )


def test_soar_expands_the_loss_at_a_point_of_half_the_radius():
    threat = ThreatModel(LInf(), 0.2)
    points = {}
    for start, radius in (("zero", 0.2), ("random", 0.2), ("pgd1", 0.1)):
        attack, left = evaluation_point(threat, start)
        assert left == pytest.approx(radius)
        points[start] = attack(functools.partial(smooth, PARAMS), KEY, X, Y) - X
    np.testing.assert_array_equal(points["zero"], 0)
    assert 0.1 < jnp.abs(points["random"]).max() <= 0.2 + 1e-6
    moved = jnp.abs(points["pgd1"])
    assert moved.max() <= 0.1 + 1e-6 and (moved > 0.05).mean() > 0.4
    attack, left = evaluation_point(threat)
    objective = penalized(madry(attack), soar(left), at="adversarial")
    loss_fn = objective(MODEL.apply)
    losses, (_, metrics) = jax.jit(loss_fn)(PARAMS, {}, KEY, BATCH)
    attacked = loss_fn.inner(PARAMS, {}, KEY, BATCH)["adversarial"]
    assert jnp.abs(attacked - X).max() <= 0.1 + 1e-6
    at_point = cross_entropy(smooth(PARAMS, attacked), Y)
    np.testing.assert_allclose(losses, at_point + metrics["penalty"], rtol=1e-4)
    assert (metrics["penalty"] > 0).all()


def test_random_numbers_follow_the_example_not_its_place():
    loss_fn = jax.jit(penalized(standard(), soar(0.1))(MODEL.apply))
    whole = loss_fn(PARAMS, {}, KEY, BATCH)[0]
    part = jax.tree.map(lambda v: v[2:5], BATCH)
    np.testing.assert_allclose(loss_fn(PARAMS, {}, KEY, part)[0], whole[2:5], rtol=1e-5)


def test_another_radius_or_weight_is_no_other_program():
    @jax.jit
    def mean_loss(params, eps, weight):
        threat = ThreatModel(LInf(), eps)
        objective = penalized(madry(fgsm(threat)), grad_align(eps), weight=weight)
        return objective(MODEL.apply)(params, {}, KEY, BATCH)[0].mean()

    values = [mean_loss(PARAMS, *pair) for pair in ((0.1, 0.0), (0.1, 0.5), (0.2, 0.5))]
    assert len({float(value) for value in values}) == 3
    assert mean_loss._cache_size() == 1


COMPOSED = {
    "GradAlign": penalized(madry(fgsm(THREAT)), grad_align(0.1), weight=0.2),
    "SOAR": penalized(madry(evaluation_point(THREAT)[0]), soar(0.05), at="adversarial"),
    "LSQ": penalized(
        madry(pgd(THREAT, steps=0, start=gaussian_start(0.5))), logit_squeezing(), at="adversarial"
    ),
    "warm-up": scheduled(
        lambda weight: penalized(madry(fgsm(THREAT)), cure(0.1), weight=weight),
        lambda step: 0.1 * step,
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_they_train_with_other_oracles_and_normalisation(name):
    model = models.from_linen(models.VGG(((1,),), num_classes=K, width=2))
    batch = {**BATCH, "image": jnp.asarray(RNG.uniform(size=(N, 4, 4, 1)), jnp.float32)}
    oracle = {
        "GradAlign": engm(1.0, norms=vmap_norms(3)),
        "SOAR": a_engm(1.0, norms=vmap_norms(3)),
        "LSQ": awp(0.01),
    }.get(name)
    optimizer = msgd(0.01)
    step = jax.jit(training.train_step(model.apply, COMPOSED[name], optimizer, oracle=oracle))
    params, model_state = model.init(KEY, batch["image"])
    state = training.create_state(params, model_state, optimizer, KEY, oracle=oracle)
    new, metrics = step(state, batch)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((new.params, metrics)))
    assert metrics["penalty"] >= 0


def test_ghost_norms_refuse_layers_under_a_derivative(plain_calls):
    model = models.from_linen(models.MLP((4,), num_classes=K))
    params, _ = model.init(KEY, X)
    loss_fn = COMPOSED["SOAR"](model.apply)
    attacked = loss_fn.inner(params, {}, KEY, BATCH)
    with pytest.raises(ValueError, match="take the norms by vmap_norms"):
        ghost_norms()(loss_fn, params, {}, KEY, attacked)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: grad_align(-0.1), "eps must be >= 0, got -0.1"),
        (lambda: grad_align(0.1, point="pgd"), "point must be one of 'random', 'fgsm', got 'pgd'"),
        (lambda: grad_align(0.1, sides="three"), "sides must be one of"),
        (lambda: grad_align(0.1, norm="linf"), "norm must be a norm"),
        (lambda: gradient_penalty(power=3), "power must be one of 1, 2, got 3"),
        (lambda: soar(0.1, h=0), "h must be > 0, got 0"),
        (lambda: soar(0.1, samples=0), "samples must be >= 1, got 0"),
        (lambda: soar(0.1, clip=-1.0), "clip must be > 0, got -1.0"),
        (lambda: soar(0.1, hessian="fd"), "hessian must be one of"),
        (lambda: penalized(standard(), soar(0.1), weight=-1.0), "weight must be >= 0, got -1.0"),
        (lambda: penalized(standard(), "soar"), "penalty must be a function, got 'soar'"),
        (lambda: evaluation_point(THREAT, "pgd2"), "start must be one of"),
        (lambda: cure(0.1, point="random"), "point must be one of"),
        (lambda: local_linearity(0.1, steps=0), "steps must be >= 1, got 0"),
        (lambda: clip_penalty(0), "max_norm must be > 0, got 0"),
    ],
)
def test_refusals(make, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_penalty_at_the_attacked_input_needs_an_attack(plain_calls):
    loss_fn = penalized(standard(), soar(0.1), at="adversarial")(MODEL.apply)
    with pytest.raises(ValueError, match="adversarial"):
        loss_fn(PARAMS, {}, KEY, BATCH)
