"""SimBA: optima of linear models, norms, orders of directions, query counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from robustjax import keys
from robustjax.attacks import black_box
from robustjax.attacks.black_box import simba
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel

KEY = jax.random.key(3)
LINF = ThreatModel(LInf(), 0.1)


def images(shape, low=0.0, high=1.0):
    return np.random.default_rng(0).uniform(low, high, shape).astype(np.float32)


def binary(size, bias):
    """Logits ``(z, -z)`` of a linear score, and its weights."""
    w = np.random.default_rng(1).normal(size=size).astype(np.float32)

    def logits_fn(x):
        z = (x.reshape(x.shape[0], -1) * w).sum(-1) + bias
        return jnp.stack([z, -z], axis=1)

    return logits_fn, w


def run(attack, logits_fn, x, y, key=KEY):
    out = jax.jit(lambda key, x, y: attack(logits_fn, key, x, y))(key, x, jnp.asarray(y, jnp.int32))
    return jax.tree.map(np.asarray, out)


def test_one_pass_of_pixels_is_optimal_for_linear_models():
    # Some examples are misclassified from the start, some can be broken, some cannot.
    x = np.concatenate([images((8, 3, 3, 1))] * 2)
    bias = np.repeat(np.array([-1.2, 9.0], np.float32), 8)
    logits_fn, w = binary(9, bias)
    clean = np.asarray(logits_fn(x))[:, 0]
    y = np.zeros(16, int)
    attack = simba(LINF, max_queries=18, loss=lambda logits, y: -logits[:, 0], has_aux=True)
    x_adv, state = run(attack, logits_fn, x, y)
    best = np.clip(x - 0.1 * np.sign(w).reshape(3, 3, 1), 0, 1)
    can_break = (np.asarray(logits_fn(best))[:, 0] < 0) & (clean > 0)
    assert (state.done[clean > 0]).all()
    broken = np.asarray(logits_fn(x_adv))[:, 0] < 0
    assert (broken == (can_break | (clean < 0))).all()
    assert np.allclose(x_adv[~broken], best[~broken], atol=1e-6)
    assert not broken[bias > 0].any()
    assert 0 < (broken & (clean > 0)).sum() < (clean > 0)[:8].sum()
    assert (state.queries[clean < 0] == 0).all()
    # Every direction costs one query if the negative side is right, else two.
    wrong_way = (w < 0).sum()
    assert (state.queries[~broken] == 9 + wrong_way).all()
    assert LINF.contains(jnp.asarray(x_adv), jnp.asarray(x)).all()


@pytest.mark.parametrize(
    ("basis", "order"), [("pixel", "random"), ("dct", "random"), ("dct", "strided")]
)
def test_norm_grows_with_the_root_of_the_accepted_steps(basis, order):
    x = images((6, 4, 4, 2), 0.4, 0.6)
    logits_fn, _ = binary(32, 50.0)
    free = ThreatModel(L2(), 9.0, -jnp.inf, jnp.inf)
    options = {"basis": basis, "order": order, "freq_dims": 2 if order == "strided" else None}
    # The logit, not the probability, which saturates here.
    attack = simba(
        free,
        max_queries=23,
        step_size=0.3,
        stride=1,
        loss=lambda logits, y: -logits[:, 0],
        has_aux=True,
        **options,
    )
    x_adv, state = run(attack, logits_fn, x, np.zeros(6))
    assert (state.queries == 23).all()
    assert (state.accepted >= 11).all()
    norm = np.sqrt(((x_adv - x) ** 2).sum((1, 2, 3)))
    assert np.allclose(norm, 0.3 * np.sqrt(state.accepted), rtol=1e-5)
    if basis == "pixel":
        assert (((x_adv != x).sum((1, 2, 3))) == state.accepted).all()
    else:
        used = np.abs(scipy.fft.dctn(x_adv - x, axes=(1, 2), norm="ortho"))
        assert np.allclose(used[used > 1e-4], 0.3, atol=1e-5)
        if order == "strided":  # the four lowest frequencies of both channels are the first eight
            assert (used[:, :2, :2] > 0.29).all()


def test_the_norm_stays_at_eps():
    x = images((5, 4, 4, 1), 0.4, 0.6)
    logits_fn, _w = binary(16, 50.0)
    threat = ThreatModel(L2(), 0.5)
    attack = simba(threat, max_queries=32, loss=lambda logits, y: -logits[:, 0], has_aux=True)
    x_adv, state = run(attack, logits_fn, x, np.zeros(5))
    norm = np.sqrt(((x_adv - x) ** 2).sum((1, 2, 3)))
    assert np.allclose(norm, 0.5, atol=1e-3)
    assert threat.contains(jnp.asarray(x_adv), jnp.asarray(x)).all()
    assert (state.accepted > (0.5 / 0.2) ** 2).all()


def test_loss_never_falls_and_each_step_is_one_query():
    x = images((10, 4, 4, 1))
    w = np.random.default_rng(2).normal(size=(16, 4)).astype(np.float32)
    logits_fn = lambda x: x.reshape(x.shape[0], -1) @ w  # noqa: E731
    y = np.asarray(logits_fn(x)).argmax(-1)
    attack = simba(LINF, max_queries=20)

    @jax.jit
    def trace(x, y):
        example_keys = keys.as_per_example(KEY, 10)

        def one(state, t):
            state = attack.advance(logits_fn, 0, t, t + 1, example_keys, state, x, y)
            return state, state

        state = attack.init(logits_fn, example_keys, x, y)
        return state, jax.lax.scan(one, state, jnp.arange(20))[1]

    first, states = jax.tree.map(np.asarray, trace(x, jnp.asarray(y, jnp.int32)))
    losses = np.concatenate([first.loss[None], states.loss])
    assert (np.diff(losses, axis=0) >= 0).all()
    active = np.concatenate([first.done[None], states.done[:-1]]) == 0
    assert (np.diff(np.concatenate([first.queries[None], states.queries]), axis=0) == active).all()
    broken = np.asarray(logits_fn(states.x_adv[-1])).argmax(-1) != y
    assert broken.any()
    assert (states.done[-1] == (broken | (states.queries[-1] == 20))).all()
    # The probability of the class is what the default loss orders points by.
    logits = np.asarray([logits_fn(z) for z in states.x_adv])
    own = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.allclose(np.exp(-states.loss), own[:, np.arange(10), y], atol=1e-5)


def test_targeted_and_independent_of_the_batch():
    x = images((12, 4, 4, 1))
    w = np.random.default_rng(2).normal(size=(16, 4)).astype(np.float32)
    logits_fn = lambda x: x.reshape(x.shape[0], -1) @ w  # noqa: E731
    ranked = np.asarray(logits_fn(x)).argsort(-1)
    target = ranked[:, -2].copy()
    target[0] = ranked[0, -1]
    attack = simba(ThreatModel(LInf(), 0.3), max_queries=40, targeted=True, has_aux=True)
    x_adv, state = run(attack, logits_fn, x, target)
    reached = np.asarray(logits_fn(x_adv)).argmax(-1) == target
    assert reached.mean() > 0.5
    assert (state.done[reached]).all()
    assert state.queries[0] == 0
    own = keys.as_per_example(KEY, 12)
    part, other = run(attack, logits_fn, x[4:7], target[4:7], own[4:7])
    assert np.allclose(part, x_adv[4:7], atol=1e-6)
    assert (other.queries == state.queries[4:7]).all()
    assert (other.order == state.order[4:7]).all()


def test_orders_of_directions():
    key = keys.as_per_example(KEY, 50)
    shells = black_box._shells((6, 6, 3), "random", None, 7)
    order = np.asarray(black_box._directions(key, shells, 1000))
    assert (np.sort(order, axis=1) == np.arange(108)).all()
    assert len(np.unique(order[:, 0])) > 20
    # Only the lowest frequencies.
    shells = black_box._shells((6, 6, 3), "random", 2, 7)
    order = np.asarray(black_box._directions(key, shells, 1000))
    row, column, _ = np.unravel_index(order, (6, 6, 3))
    assert order.shape == (50, 12)
    assert max(row.max(), column.max()) == 1
    # Shells of three more: frequencies below 2, below 5, the rest.
    shells = black_box._shells((6, 6, 3), "strided", 2, 3)
    order = np.asarray(black_box._directions(key, shells, 100))
    row, column, _ = np.unravel_index(order, (6, 6, 3))
    frequency = np.maximum(row, column)
    assert order.shape == (50, 100)
    assert (frequency[:, :12] < 2).all()
    assert ((frequency[:, 12:75] >= 2) & (frequency[:, 12:75] < 5)).all()
    assert (frequency[:, 75:] == 5).all()


def test_cosines_are_the_orthonormal_dct():
    x = jnp.zeros((40, 4, 5, 2))
    q = np.asarray(black_box._cosines(jnp.arange(40), x))
    for i in range(40):
        unit = np.zeros(40)
        unit[i] = 1
        expected = scipy.fft.idctn(unit.reshape(4, 5, 2), axes=(0, 1), norm="ortho")
        assert np.allclose(q[i], expected, atol=1e-6)
    assert math.isclose(float((q[7] ** 2).sum()), 1, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queries": 0}, "max_queries must be >= 1"),
        ({"basis": "wavelet"}, "basis must be one of"),
        ({"order": "diagonal"}, "order must be one of"),
        ({"step_size": 0.0}, "step_size must be > 0"),
        ({"stride": 0}, "stride must be >= 1"),
        ({"freq_dims": 4}, "are for the dct basis, got basis 'pixel'"),
        ({"basis": "dct", "order": "strided"}, "freq_dims must be given"),
        ({"basis": "dct", "freq_dims": 0}, "freq_dims must be >= 1"),
        ({"loss": "ce"}, "loss must be a function"),
        ({"threat": "l2"}, "threat must be a ThreatModel"),
    ],
)
def test_bad_arguments(plain_calls, options, message):
    with pytest.raises(ValueError, match=message):
        simba(**({"threat": LINF, "max_queries": 5} | options))


def test_bad_inputs(plain_calls):
    logits_fn, _ = binary(16, 1.0)
    y = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"h, w >= 5 for the dct basis, got shape \(2, 4, 4, 1\)"):
        simba(LINF, max_queries=5, basis="dct", freq_dims=5)(
            logits_fn, KEY, images((2, 4, 4, 1)), y
        )
    with pytest.raises(ValueError, match="x must lie in"):
        simba(LINF, max_queries=5)(logits_fn, KEY, 2 + images((2, 16)), y)
