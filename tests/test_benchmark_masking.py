"""The report of gradient masking: linear models, the same with logits that blind gradients."""

import functools

import jax
import jax.numpy as jnp
import linear_models
import numpy as np
import pytest
from linear_models import D, K, N, X, Y

from robustjax import parallel
from robustjax.benchmark import masking
from robustjax.losses import cross_entropy
from robustjax.norms import LInf

KEY = jax.random.key(0)
THREAT = linear_models.threat(LInf(), boxed=True)
MESH = parallel.device_mesh(jax.devices()[:1])
OTHER = np.random.default_rng(3).normal(size=(D, K)).astype(np.float32)


def scaled(factor, x):
    return factor * linear_models.linear(x)


def other(x):
    return x.reshape(len(x), -1) @ OTHER


# The factor is a leaf, so that all models below are one program.
MODELS = {factor: jax.tree_util.Partial(scaled, np.float32(factor)) for factor in (0, 1, 1e4)}


@functools.cache
def report(factor, **options):
    options = {"queries": 30, "batch_size": N, "mesh": MESH, **options}
    return masking.masking_report(MODELS[factor], KEY, X, Y, THREAT, **options)


def test_linear_model_shows_no_sign():
    found = report(1)
    assert found.signs == ()
    assert found.clean_accuracy == 1
    # PGD is exact for linear models, so nothing can be stronger.
    robust = linear_models.robust(LInf(), True).mean()
    assert found.pgd_accuracy == pytest.approx(robust)
    assert robust <= found.square_accuracy < 1
    assert found.pgd1_confidence < found.clean_confidence


def test_scaled_logits_are_flagged():
    found = report(1e4)
    assert set(found.signs) >= {"vanishing_gradients", "overconfident", "search_is_stronger"}
    assert found.pgd_accuracy > report(1).pgd_accuracy + 0.1
    # The classifier is the same one, and a search sees it as it is.
    assert found.clean_accuracy == 1
    assert found.square_accuracy <= report(1).square_accuracy + 0.1


def test_flags_follow_their_thresholds():
    found = report(1, least_nonzero=1.0, most_unbounded=0.0, most_confident=0.0)
    assert found.overconfident
    assert found.vanishing_gradients == (found.nonzero_share < 1)
    assert found.withstands_unbounded == (found.unbounded_accuracy > 0)
    assert found[:10] == report(1)[:10]
    assert report(1, gradient_above=1e3).nonzero_entries == 0
    assert not report(1e4, tolerance=1.0).search_is_stronger


def test_constant_logits():
    found = report(0)
    for kind in ("clean", "noise", "pgd1"):
        assert getattr(found, f"{kind}_confidence") == pytest.approx(1 / K)
    assert found.nonzero_entries == 0 and found.vanishing_gradients
    assert found.clean_accuracy == np.mean(Y == 0) == found.unbounded_accuracy


@pytest.mark.parametrize("factor", MODELS)
def test_measures_lie_in_their_bounds(factor):
    found = report(factor)
    for name in found._fields:
        value = getattr(found, name)
        if name.endswith(("accuracy", "share")) and value is not None:
            assert 0 <= value <= 1
        if name.endswith("confidence"):
            assert 1 / K - 1e-6 <= value <= 1 + 1e-6
    assert found.nonzero_entries == pytest.approx(D * found.nonzero_share)
    assert found.transfer_accuracy is None and not found.transfer_is_stronger


def test_count_of_gradient_entries():
    probabilities = np.asarray(jax.nn.softmax(linear_models.linear(X)))
    gradients = (probabilities - np.eye(K)[Y]) @ linear_models.W.T
    at = float(np.median(np.abs(gradients)))
    expected = (np.abs(gradients) > at).sum(axis=1).mean()
    assert report(1, gradient_above=at).nonzero_entries == pytest.approx(expected, abs=1 / N)


def test_transfer():
    source = {"batch_size": 8, "queries": 1}
    itself = report(1, source_logits_fn=MODELS[1], **source)
    assert itself.transfer_accuracy == itself.pgd_accuracy == report(1).pgd_accuracy
    foreign = report(1, source_logits_fn=other, **source)
    assert foreign.transfer_accuracy > foreign.pgd_accuracy and not foreign.transfer_is_stronger
    # The same classifier with gradients that can be seen is the better source.
    masked = report(1e4, source_logits_fn=MODELS[1], **source)
    assert masked.transfer_is_stronger
    assert masked.transfer_accuracy == itself.pgd_accuracy


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_interpolation(factor):
    x, y = jnp.asarray(X[:3]), jnp.asarray(Y[:3])
    x_adv = jnp.asarray(X[3:6])
    logits_fn = functools.partial(scaled, factor)
    losses = masking.interpolation_losses(logits_fn, x, x_adv, y)
    assert losses.shape == (21, 3)
    np.testing.assert_allclose(losses[0], cross_entropy(logits_fn(x), y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses[-1], cross_entropy(logits_fn(x_adv), y), rtol=1e-5)
    middle = cross_entropy(logits_fn((x + x_adv) / 2), y)
    np.testing.assert_allclose(losses[10], middle, rtol=1e-5)
    # The cross-entropy of a linear model is convex on every way.
    assert (np.diff(losses, n=2, axis=0) >= -1e-5).all()


BAD = {
    "eps": ({"threat": linear_models.ThreatModel(LInf(), np.full(N, 0.1))}, "eps must be one"),
    "box": ({"threat": linear_models.threat(LInf(), boxed=False)}, "threat must have a finite"),
    "no threat": ({"threat": "linf"}, "threat must be a ThreatModel"),
    "steps": ({"steps": 0}, "steps must be"),
    "threshold": ({"most_confident": 2}, "most_confident must be <= 1"),
    "image": ({"x": X + 1}, "x must lie in"),
    "label": ({"y": Y + K}, "y must lie in"),
    "key": ({"key": jax.random.split(KEY, N)}, "key must be a single key"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(plain_calls, case):
    change, message = BAD[case]
    arguments = {"key": KEY, "x": X, "y": Y, "threat": THREAT, **change}
    with pytest.raises(ValueError, match=message):
        masking.masking_report(MODELS[1], **arguments)


def test_bad_input_of_interpolation(plain_calls):
    x = jnp.asarray(X)
    with pytest.raises(ValueError, match="points must be"):
        masking.interpolation_losses(MODELS[1], x, x, Y, points=1)
    with pytest.raises(ValueError, match="x_adv must have the shape"):
        masking.interpolation_losses(MODELS[1], x, x[:2], Y)
