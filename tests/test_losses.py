"""Losses: closed forms, invariances, ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from robustjax import losses

LOGITS = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32) * 3
LABELS = np.random.default_rng(1).integers(0, 6, 32).astype(np.int32)
UNTARGETED = [
    losses.boosted_cross_entropy,
    losses.cross_entropy,
    losses.margin,
    losses.cw,
    losses.dlr,
]


def test_cross_entropy_is_minus_the_log_probability():
    expected = -np.log(special.softmax(LOGITS, axis=1)[np.arange(32), LABELS])
    got = losses.cross_entropy(jnp.array(LOGITS), jnp.array(LABELS))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_kl_divergence_is_the_entropy_of_the_reference_relative_to_the_logits():
    reference = LOGITS[::-1].copy()
    p, q = special.softmax(reference, axis=1), special.softmax(LOGITS, axis=1)
    got = losses.kl_divergence(jnp.array(LOGITS), jnp.array(reference))
    np.testing.assert_allclose(got, stats.entropy(p, q, axis=1), rtol=1e-4, atol=1e-6)
    assert (np.asarray(got) >= 0).all()
    shifted = losses.kl_divergence(jnp.array(LOGITS), jnp.array(LOGITS) + 3.0)
    np.testing.assert_allclose(shifted, 0, atol=1e-5)


def _boosted_by_hand(logits, labels, guard):
    """Values and derivatives of the printed formula, in float64."""
    p, rows = special.softmax(logits.astype(float), axis=1), np.arange(len(labels))
    others = p.copy()
    others[rows, labels] = -1
    largest = others.argmax(axis=1)
    p_y, p_other = p[rows, labels], p[rows, largest]
    values = -np.log(p_y) - np.log(1 + guard - p_other)
    one_hot = np.eye(p.shape[1])
    slope = (p_other / (1 + guard - p_other))[:, None]
    return values, p - one_hot[labels] + slope * (one_hot[largest] - p)


@pytest.mark.parametrize("guard", [0.0, 1e-4, 0.5])
def test_boosted_cross_entropy_against_the_printed_formula(guard):
    def total(z):
        each = losses.boosted_cross_entropy(z, jnp.array(LABELS), guard=guard)
        return each.sum(), each

    gradient, got = jax.grad(total, has_aux=True)(jnp.array(LOGITS))
    values, derivatives = _boosted_by_hand(LOGITS, LABELS, guard)
    np.testing.assert_allclose(got, values, rtol=1e-4)
    np.testing.assert_allclose(gradient, derivatives, rtol=1e-3, atol=1e-5)


def test_boosted_cross_entropy_of_two_classes_is_twice_the_cross_entropy():
    """The only other class has what the label lacks: ``1 - p_other = p_y``."""
    z, y = jnp.array(LOGITS[:, :2]), jnp.array(LABELS % 2)
    boosted = losses.boosted_cross_entropy(z, y, guard=0.0)
    np.testing.assert_allclose(boosted, 2 * losses.cross_entropy(z, y), rtol=1e-4)


def test_boosted_cross_entropy_adds_a_margin_term_that_the_guard_lowers():
    z, y = jnp.array(LOGITS), jnp.array(LABELS)
    bare, guarded = (losses.boosted_cross_entropy(z, y, guard=g) for g in (0.0, 1e-4))
    assert (np.asarray(bare) > np.asarray(losses.cross_entropy(z, y))).all()
    assert (np.asarray(bare) > np.asarray(guarded)).all()
    assert float(guarded.min()) > -np.log1p(1e-4)


# Label far ahead; another class far ahead; two others far ahead.
EXTREME = np.array([[100, -100, -100], [-100, 100, -100], [-100, 100, 100]], np.float32)


@pytest.mark.parametrize("guard", [0.0, 1e-4])
def test_boosted_cross_entropy_at_extreme_logits(guard):
    def total(z):
        each = losses.boosted_cross_entropy(z, jnp.zeros(3, jnp.int32), guard=guard)
        return each.sum(), each

    gradient, got = jax.grad(total, has_aux=True)(jnp.array(EXTREME))
    # 1 - p_other, without cancellation.
    gap = np.array([1, 2 * np.exp(-200.0), 0.5])
    expected = np.array([0, 200, 200 + np.log(2)]) - np.log(guard + gap)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert np.isfinite(gradient).all()


def test_margin_is_the_gap_to_the_largest_other_class():
    expected = [
        max(row[j] for j in range(6) if j != y) - row[y]
        for row, y in zip(LOGITS, LABELS, strict=True)
    ]
    got = losses.margin(jnp.array(LOGITS), jnp.array(LABELS))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.margin, losses.dlr])
def test_positive_iff_misclassified(loss):
    got = np.asarray(loss(jnp.array(LOGITS), jnp.array(LABELS)))
    np.testing.assert_array_equal(got > 0, LOGITS.argmax(1) != LABELS)


def test_cw_is_the_margin_cut_at_the_confidence():
    m = np.asarray(losses.margin(jnp.array(LOGITS), jnp.array(LABELS)))
    for confidence in (0.0, 1.5):
        got = losses.cw(jnp.array(LOGITS), jnp.array(LABELS), confidence)
        np.testing.assert_allclose(got, np.minimum(m, confidence))
        got = losses.cw_targeted(jnp.array(LOGITS), jnp.array(LABELS), confidence)
        np.testing.assert_allclose(got, np.minimum(-m, confidence))


def _dlr_by_hand(z, y):
    s = np.sort(z)[::-1]
    return -(z[y] - max(z[j] for j in range(len(z)) if j != y)) / (s[0] - s[2])


def _dlr_targeted_by_hand(z, y, t):
    s = np.sort(z)[::-1]
    return -(z[y] - z[t]) / (s[0] - 0.5 * (s[2] + s[3]))


def test_dlr_against_the_printed_formula():
    got = losses.dlr(jnp.array(LOGITS), jnp.array(LABELS))
    expected = [_dlr_by_hand(z, y) for z, y in zip(LOGITS, LABELS, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    correct = LOGITS.argmax(1) == LABELS
    assert correct.any()
    assert (np.asarray(got)[correct] >= -1).all() and (np.asarray(got)[correct] <= 0).all()


def test_targeted_dlr_against_the_printed_formula():
    target = (LABELS + 2) % 6
    got = losses.dlr_targeted(jnp.array(LOGITS), jnp.array(LABELS), jnp.array(target))
    expected = [
        _dlr_targeted_by_hand(z, y, t) for z, y, t in zip(LOGITS, LABELS, target, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    own = losses.dlr_targeted(jnp.array(LOGITS), jnp.array(LABELS), jnp.array(LABELS))
    np.testing.assert_array_equal(own, 0)


@pytest.mark.parametrize("shift", [0.0, -2.5])
@pytest.mark.parametrize("scale", [1.0, 0.125, 8.0])
def test_dlr_ignores_shift_and_scale(shift, scale):
    z, y = jnp.array(LOGITS), jnp.array(LABELS)
    target = (y + 1) % 6
    moved = z * scale + shift
    np.testing.assert_allclose(losses.dlr(moved, y), losses.dlr(z, y), rtol=1e-4)
    np.testing.assert_allclose(
        losses.dlr_targeted(moved, y, target), losses.dlr_targeted(z, y, target), rtol=1e-4
    )


@pytest.mark.parametrize("loss", UNTARGETED)
def test_shift_of_all_logits_changes_nothing(loss):
    z, y = jnp.array(LOGITS), jnp.array(LABELS)
    np.testing.assert_allclose(loss(z + 7.0, y), loss(z, y), rtol=1e-4, atol=2e-5)


def test_cross_entropy_and_margin_do_feel_the_scale():
    z, y = jnp.array(LOGITS), jnp.array(LABELS)
    np.testing.assert_allclose(losses.margin(4 * z, y), 4 * losses.margin(z, y), rtol=1e-5)
    assert np.abs(losses.cross_entropy(4 * z, y) - losses.cross_entropy(z, y)).min() > 1e-3


@pytest.mark.parametrize("loss", UNTARGETED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_float32_out_finite_gradient_any_permutation(loss, dtype, jit):
    f = jax.jit(loss) if jit else loss
    z, y = jnp.array(LOGITS, dtype), jnp.array(LABELS)
    out = f(z, y)
    assert out.dtype == jnp.float32 and out.shape == (32,)
    order = np.random.default_rng(2).permutation(6)
    permuted = f(z[:, order], jnp.array(np.argsort(order)[LABELS], jnp.int32))
    np.testing.assert_allclose(permuted, out, rtol=1e-5)
    gradient = jax.grad(lambda z: f(z, y).sum())(z)
    assert gradient.dtype == dtype and bool(jnp.isfinite(gradient.astype(jnp.float32)).all())


@pytest.mark.parametrize("loss", UNTARGETED)
def test_equal_logits_give_finite_values_and_gradients(loss):
    z, y = jnp.zeros((2, 4)), jnp.array([0, 3])
    value, gradient = jax.value_and_grad(lambda z: loss(z, y).sum())(z)
    assert np.isfinite(value) and np.isfinite(gradient).all()
