import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks.apgd import apgd
from robustjax.attacks.fourier import (
    fourier_attack,
    fourier_linear,
    project_in_box,
    unprojected_step,
    violation,
)
from robustjax.attacks.gradient import fgsm, pgd
from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.frequency import band_mask
from robustjax.norms import LInf
from robustjax.threat import ThreatModel

EPS = 0.1
D = 24
every_kind = pytest.mark.parametrize(
    "shape, band",
    [((D,), {}), ((4, 6, 3), {}), ((D,), {"low": 0.3}), ((4, 6, 3), {"high": 0.2})],
    ids=str,
)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def weights(shape=(D,), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def flat(v):
    return np.asarray(v, np.float64).reshape(len(v), -1)


def spectrum(v):
    axes = (1,) if v.ndim == 2 else (1, 2)
    return np.abs(np.fft.fftn(np.asarray(v, np.float64), axes=axes, norm="ortho"))


def linear(w):
    """Two classes whose difference of logits is w . x: class 1 where it is positive."""

    def logits_fn(x):
        z = x.reshape(len(x), -1) @ w.ravel()
        return jnp.stack([-z / 2, z / 2], axis=1)

    return logits_fn


def free(norm, eps):
    return ThreatModel(norm, eps, -jnp.inf, jnp.inf)


@every_kind
def test_the_closed_form_of_linear_models(shape, band):
    """Value eps ||F w||_1, a flat and real spectrum, masked frequencies 0, l_2 norm eps sqrt(d)."""
    w, y = weights(shape), jnp.array([1.0, -1.0, 1.0])
    delta = jit(lambda w, y: fourier_linear(w, y, EPS, **band))(w, y)
    norm = FourierLInf(**band)
    change = flat(delta) @ np.asarray(w, np.float64).ravel()
    np.testing.assert_allclose(change, -np.asarray(y) * EPS * norm.dual.value(w), rtol=1e-5)
    h, width = shape[:2] if len(shape) == 3 else (1, D)
    mask = band_mask(h, width, **band)
    mask = mask[..., None] if len(shape) == 3 else mask[0]
    size = spectrum(delta)
    np.testing.assert_allclose(size, np.broadcast_to(EPS * mask, size.shape), atol=1e-6)
    active = np.broadcast_to(mask, shape).sum()
    np.testing.assert_allclose(
        np.linalg.norm(flat(delta), axis=1), EPS * np.sqrt(active), rtol=1e-5
    )
    assert delta.dtype == jnp.float32
    # Stronger than any other feasible perturbation.
    others = jax.random.normal(jax.random.key(0), (1000, *shape))
    others = jit(lambda v: norm.project(v, EPS, batch_ndim=1))(others)
    assert np.all(np.abs(flat(others) @ np.asarray(w).ravel()) <= np.abs(change[0]) * (1 + 1e-5))


def test_its_size_on_cifar_images():
    w = weights((32, 32, 3))
    delta = jit(lambda: fourier_linear(w, jnp.ones(1), 8 / 255))()
    assert np.linalg.norm(delta) == pytest.approx(55.43 * 8 / 255, rel=1e-4)
    assert np.linalg.norm(delta) == pytest.approx(1.739, abs=5e-4)


def test_the_label_flips_at_the_margin():
    w, x = weights(), weights((40, D), seed=1)
    score = x @ w
    y = jnp.sign(score)
    margin = jnp.abs(score) / FourierL1().value(w)
    attack = jit(fourier_linear)
    for factor, flipped in ((1 - 1e-5, False), (1 + 1e-5, True)):
        after = flat(x + attack(w, y, margin * factor)) @ np.asarray(w, np.float64)
        # Scores of nearly zero margin are lost in the rounding of x + delta.
        clear = np.abs(score) > 0.5
        np.testing.assert_array_equal((np.sign(after) != y)[clear], flipped)
        assert clear.sum() > 30


def test_in_one_dimension_it_is_the_sign_attack():
    w, y = jnp.array([-0.7]), jnp.array([1.0, -1.0])
    np.testing.assert_allclose(fourier_linear(w, y, EPS), [[EPS], [-EPS]], rtol=1e-6)
    x = jnp.array([[0.4], [0.6]])
    labels, model = jnp.array([0, 1]), ThreatModel(LInf(), EPS)
    args = (linear(w), jax.random.key(0), x, labels)
    both = jit(lambda: [attack(*args) for attack in (fourier_attack(EPS, steps=1), fgsm(model))])
    np.testing.assert_allclose(*both(), atol=1e-6)


def test_it_moves_with_the_input():
    """For a functional that no shift changes, the attack of a shifted input is shifted."""

    def logits_fn(x):
        z = jnp.sum(jnp.tanh(x * jnp.roll(x, 1, axis=1)), axis=1)
        return jnp.stack([z, -z], axis=1)

    x, y = weights((5, D), seed=2), jnp.zeros(5, jnp.int32)
    attack = fourier_attack(free(FourierLInf(), EPS), steps=3)
    run = jit(lambda x: attack(logits_fn, jax.random.key(0), x, y))
    np.testing.assert_allclose(run(jnp.roll(x, 7, 1)), jnp.roll(run(x), 7, 1), atol=1e-4)


@every_kind
def test_pgd_reaches_the_closed_form_in_one_step_and_stays(shape, band):
    w, x = weights(shape), weights((6, *shape), seed=1)
    y = jnp.array([0, 1] * 3)
    expected = x + fourier_linear(w, 2.0 * y - 1, EPS, **band)
    args = (linear(w), jax.random.key(0), x, y)
    threat = free(FourierLInf(**band), EPS)
    one = jit(lambda: pgd(threat, steps=1, step_size=EPS, start="zero")(*args))()
    np.testing.assert_allclose(one, expected, atol=1e-5)
    many = jit(lambda: fourier_attack(threat, steps=5)(*args))()
    np.testing.assert_allclose(many, expected, atol=1e-5)
    assert np.all(threat.contains(many, x, atol=1e-5))
    if not band:
        step = jit(lambda: unprojected_step(EPS)(*args))()
        np.testing.assert_allclose(step, expected, atol=1e-5)


@pytest.mark.parametrize("start", ["zero", "gaussian"])
def test_masked_frequencies_stay_zero_before_the_box(start):
    x, y = weights((4, 8, 8, 1), seed=3), jnp.array([0, 1, 0, 1])
    w = weights((64, 5), seed=4)

    def logits_fn(x):
        return jnp.stack(
            [jnp.sum(z, 1) for z in jnp.split(jnp.tanh(x.reshape(4, -1) @ w), [2], 1)], 1
        )

    for norm in (FourierLInf(low=0.25), FourierLInf(high=0.3)):
        threat = free(norm, EPS)
        attack = fourier_attack(threat, steps=4, start=start)
        x_adv = jit(lambda attack=attack: attack(logits_fn, jax.random.key(1), x, y))()
        size, mask = spectrum(x_adv - x), band_mask(8, 8, low=norm.low, high=norm.high)
        assert np.abs(size * ~mask[..., None]).max() < 1e-6
        assert size.max() == pytest.approx(EPS, rel=1e-4)
        assert np.all(threat.contains(x_adv, x))
        left = violation(x_adv, x, threat)
        assert max(left.ball.max(), left.band.max()) < 1e-6 and np.all(left.box == 0)


def test_apgd_reaches_the_closed_form():
    """From a random point of the surface; each step turns every phase nearer to the best one."""
    w, x = weights(), weights((4, D), seed=1)
    y = (x @ w > 0).astype(jnp.int32)  # a misclassified example would be left alone
    threat = free(FourierLInf(), EPS)
    attack = apgd(threat, steps=12, early_stop=False)
    x_adv = jit(lambda: attack(linear(w), jax.random.key(0), x, y))()
    change = (1 - 2.0 * y) * (flat(x_adv - x) @ np.asarray(w, np.float64))
    np.testing.assert_allclose(change, EPS * FourierL1().value(w), rtol=1e-4)
    assert np.all(threat.contains(x_adv, x, atol=1e-5))


def test_the_published_start_is_projected_noise():
    attack = fourier_attack(free(FourierLInf(), 0.3), steps=0, start="gaussian")
    x = jnp.zeros((200, D))
    x_adv = jit(attack, static_argnums=0)(
        linear(weights()), jax.random.key(2), x, jnp.zeros(200, int)
    )
    size = spectrum(x_adv)
    at_edge = np.isclose(size, 0.3, rtol=1e-4)
    # eps N(0, 1) has spectrum eps |z|, with P(|z|^2 > 1) = exp(-1), but for the two real ones.
    share = np.delete(at_edge, [0, D // 2], axis=1).mean()
    assert share == pytest.approx(np.exp(-1), abs=0.02)
    assert size.max() <= 0.3 * (1 + 1e-5)


def test_a_sparse_perturbation_is_small_in_frequency():
    """||F delta||_inf <= ||delta||_1 / sqrt(d)."""
    delta = jnp.zeros((1, D)).at[0, jnp.array([3, 11])].set(jnp.array([0.5, -0.2]))
    assert spectrum(delta).max() <= 0.7 / np.sqrt(D) + 1e-7


def boxed(band, n=8):
    """Images with many pixels at the ends of the box, and the attack clipped to it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.clip(rng.uniform(-0.3, 1.3, (n, 8, 8, 1)), 0, 1), jnp.float32)
    threat = ThreatModel(FourierLInf(**band), EPS)
    y = jnp.asarray(rng.integers(0, 2, n))
    w = weights((8, 8, 1))
    return (
        threat,
        x,
        jit(lambda: fourier_attack(threat, steps=3)(linear(w), jax.random.key(0), x, y))(),
    )


def test_the_box_leads_out_of_the_ball_and_projections_back():
    threat, x, x_adv = boxed({})
    left = violation(x_adv, x, threat)
    assert np.all(left.ball > 1e-4) and np.all(left.box == 0) and np.all(left.band == 0)
    assert not np.any(threat.contains(x_adv, x))
    np.testing.assert_allclose(left.ball + EPS, FourierLInf().value(x_adv - x, 1), rtol=1e-5)
    project = jit(lambda z, k: project_in_box(threat, z, x, iterations=k), static_argnums=1)
    for iterations in (1, 30):
        inside = project(x_adv, iterations)
        assert np.all(threat.contains(inside, x)) and inside.min() >= 0 and inside.max() <= 1
    # After many it was hardly necessary to draw it to x: the perturbation has kept its size.
    size = FourierLInf().value(inside - x, 1)
    np.testing.assert_allclose(size, EPS, rtol=1e-2)
    np.testing.assert_array_equal(project(x, 30), x)


@pytest.mark.parametrize("band", [{"low": 0.25}, {"high": 0.3}], ids=str)
def test_projections_lead_back_into_a_band_and_the_box(band):
    threat, x, x_adv = boxed(band)
    before = violation(x_adv, x, threat)
    assert np.all(before.band > 1e-3) and not np.any(threat.contains(x_adv, x))
    run = jit(lambda k: project_in_box(threat, x_adv, x, iterations=k), static_argnums=0)
    for iterations, share in ((10, 0.5), (100, 1e-2)):
        left = violation(run(iterations), x, threat)
        assert np.all(left.band < share * before.band) and np.all(left.box == 0)
    inside = run(1000)
    assert np.all(threat.contains(inside, x)) and inside.min() >= 0 and inside.max() <= 1
    assert np.all(threat.norm.value(inside - x, 1) > 0.8 * EPS)  # not by going back to x


def test_the_attack_can_end_in_both():
    threat, x, _ = boxed({})
    y = jnp.zeros(8, jnp.int32)
    run = jit(
        lambda: fourier_attack(threat, steps=3, iterations=20)(
            linear(weights((8, 8, 1))), jax.random.key(0), x, y
        )
    )
    assert np.all(threat.contains(run(), x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fourier_attack(ThreatModel(LInf(), 0.1)), r"norm FourierLInf\(\), got linf"),
        (lambda: fourier_attack("linf"), "threat must be a ThreatModel"),
        (lambda: fourier_attack(0.1, iterations=-1), "iterations must be >= 0"),
        (lambda: fourier_attack(-0.1), "eps must be >= 0"),
        (lambda: fourier_attack(0.1, start="normal"), "start must be one of"),
        (lambda: fourier_linear(jnp.ones(3), jnp.ones(()), 0.1), r"y must be \(n,\)"),
        (lambda: fourier_linear(jnp.ones(3), jnp.ones(2), jnp.ones(3)), r"\(2,\) and \(3,\)"),
        (
            lambda: project_in_box(
                ThreatModel(FourierLInf(), 0.1), jnp.ones((1, 3)), jnp.ones((2, 3))
            ),
            "x_adv must have the shape of x",
        ),
    ],
)
def test_what_is_refused(make, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        make()
