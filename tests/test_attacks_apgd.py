"""Auto-PGD: closed forms on linear models, invariances, its own rules, independence."""

import functools

import jax
import jax.numpy as jnp
import linear_models as world
import numpy as np
import pytest

from robustjax.attacks.apgd import apgd, apgd_targeted
from robustjax.attacks.apgd_rules import checkpoints, plan_of, sparse_sign
from robustjax.attacks.targets import likeliest_wrong_classes
from robustjax.losses import dlr, margin
from robustjax.metrics.accuracy import correct
from robustjax.norms import L1, L2, LInf
from robustjax.threat import ThreatModel

NORMS = [LInf(), L2(), L1()]
KEY = jax.random.key(0)
X, Y = jnp.array(world.X), jnp.array(world.Y)
RNG = np.random.default_rng(1)
HIDDEN = jnp.array(RNG.normal(size=(world.D, 24)), jnp.float32)
OUT = jnp.array(RNG.normal(size=(24, world.K)), jnp.float32)
ids = {"ids": lambda n: n.name}


def network(x):
    return jax.nn.relu((x - 0.5).reshape(len(x), -1) @ HIDDEN) @ OUT


NETWORK_Y = jnp.argmax(network(X), -1).astype(jnp.int32)


def towards(logits, y, target):
    rows = jnp.arange(len(y))
    return logits[rows, target] - logits[rows, y]


MAKERS = {
    "ce": functools.partial(apgd, steps=25),
    "dlr": functools.partial(apgd, steps=25, loss=dlr),
    "targeted": functools.partial(apgd_targeted, steps=25, targets=4),
    "margin-targeted": functools.partial(apgd_targeted, steps=25, targets=4, loss=towards),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, logits_fn, threat, key, x, y):
    return MAKERS[name](threat, has_aux=True)(logits_fn, key, x, y)


@pytest.mark.parametrize("boxed", [False, True], ids=["free", "box"])
@pytest.mark.parametrize("norm", NORMS, **ids)
def test_robust_accuracy_of_linear_models_is_exact(norm, boxed):
    """The margin to each class is linear: APGD must find its maximum over ball and box."""
    for scale in (0.7, 1.0, 1.4):
        threat = world.threat(norm, boxed, scale)
        x_adv, state = run("margin-targeted", world.linear, threat, KEY, X, Y)
        expected = world.robust(norm, boxed, scale)
        assert 0 < expected.sum() < world.N
        np.testing.assert_array_equal(correct(world.linear(x_adv), Y), expected)
        np.testing.assert_array_equal(~state.success, expected)
        assert threat.contains(x_adv, X).all()


def cases(pairs):
    """Each attack with the norms that are given: what a norm changes is one code for all."""
    return pytest.mark.parametrize(
        "norm, name", pairs, ids=[f"{n.name}-{name}" for n, name in pairs]
    )


@cases(
    [(norm, name) for norm in NORMS for name in ("ce", "margin-targeted")]
    + [(L2(), "dlr"), (L1(), "targeted")]
)
def test_results_are_feasible_and_an_upper_bound(norm, name):
    threat = world.threat(norm, True)
    x_adv, state = run(name, world.linear, threat, KEY, X, Y)
    assert threat.contains(x_adv, X).all()
    right = np.asarray(correct(world.linear(x_adv), Y))
    assert (right >= world.robust(norm, True)).all()
    np.testing.assert_array_equal(right, ~state.success)


@pytest.mark.parametrize("norm", [LInf(), L2()], **ids)
def test_one_step_is_optimal_where_the_gradient_is_constant(norm):
    """The first step, 2 eps, crosses the l_inf ball from any start; in l_2 it comes close."""
    w = jnp.array(world.W[:, 0])

    def binary(x):
        score = x.reshape(len(x), -1) @ w
        return jnp.stack([jnp.zeros_like(score), score], axis=-1)

    threat = ThreatModel(norm, 0.2, lower=-jnp.inf, upper=jnp.inf)
    y = (X.reshape(len(X), -1) @ w > 0).astype(jnp.int32)
    attack = apgd(threat, loss=margin, steps=1, early_stop=False)
    x_adv = jax.jit(attack, static_argnums=0)(binary, KEY, X, y)
    gain = margin(binary(x_adv), y) - margin(binary(X), y)
    most = 0.2 * float(norm.dual.value(w))
    assert (gain <= most * (1 + 1e-5)).all()
    # From the edge point u, the direction u + 2 v has a cosine of at least sqrt(3) / 2 with v.
    assert (gain >= most * (1 - 1e-5 if norm == LInf() else 3**0.5 / 2 - 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS, **ids)
def test_rules_along_the_way(norm):
    """The best loss never falls, the step size is only ever halved, iterates are feasible."""
    threat = ThreatModel(norm, 3 * world.RADII[norm])
    attack = apgd(threat, steps=40, early_stop=False, warm_up=False)
    state = attack.init(network, KEY, X, NETWORK_Y)
    keys = jax.random.split(KEY, len(X))
    state = jax.jit(attack.start, static_argnums=0)(network, 0, keys, state, X, NETWORK_Y)
    advance = jax.jit(attack.advance, static_argnums=0)
    first = (1 if norm == L1() else 2) * threat.eps
    sizes = set()
    for t in range(attack.steps):
        new = advance(network, 0, t, t + 1, keys, state, X, NETWORK_Y)
        going = ~np.asarray(state.done)  # those misclassified from the start stay as they are
        assert (new.loss_max >= state.loss_max)[going].all() or t == 0
        assert threat.contains(new.x, X).all() and threat.contains(new.x_adv, X).all()
        sizes |= set(np.asarray(new.step_size)[going].tolist())
        state = new
    if norm == L1():
        assert min(sizes) >= 0.1 * first * (1 - 1e-6) and max(sizes) <= first * (1 + 1e-6)
    else:
        halvings = np.log2(first / np.array(sorted(sizes)))
        np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-5)
        assert len(sizes) > 2


def test_checkpoints():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]
    assert checkpoints(16)[-1] <= 16
    plan = plan_of(100, sparse=False, warm_up=False)
    np.testing.assert_array_equal(np.flatnonzero(plan.interval), checkpoints(100))
    assert plan.interval.sum() == 99


def test_warm_up_ends_in_the_ball_of_the_threat_model():
    plan = plan_of(100, sparse=True, warm_up=True)
    assert plan.enters.nonzero()[0].tolist() == [0, 30, 60]
    assert plan.factor[[0, 29, 30, 59, 60, 100]].tolist() == [3, 3, 2, 2, 1, 1]
    np.testing.assert_array_equal(plan.counts, plan.factor == 1)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_sparse_sign_takes_the_largest_entries(share):
    gradient = RNG.normal(size=(6, 4, 3)).astype(np.float32)
    found = np.asarray(sparse_sign(jnp.array(gradient), jnp.full(6, share))).reshape(6, -1)
    wanted = max(int(share * 12), 1)
    for row, g in zip(found, gradient.reshape(6, -1), strict=True):
        largest = np.argsort(-np.abs(g))[:wanted]
        np.testing.assert_array_equal(np.flatnonzero(row), np.sort(largest))
        np.testing.assert_allclose(row[largest], np.sign(g[largest]) / wanted, rtol=1e-6)


def test_scaled_logits_blind_cross_entropy_and_not_dlr():
    """A power of two leaves DLR bit-equal; in float32 the gradients of cross-entropy vanish."""

    def scaled(x):
        return 2.0**17 * network(x)

    threat = ThreatModel(LInf(), 0.08)
    accuracy = {}
    for name in ("ce", "dlr"):
        for fn in (network, scaled):
            x_adv, _ = run(name, fn, threat, KEY, X, NETWORK_Y)
            accuracy[name, fn] = x_adv
    np.testing.assert_array_equal(accuracy["dlr", network], accuracy["dlr", scaled])
    right = {k: correct(network(v), NETWORK_Y).mean() for k, v in accuracy.items()}
    assert right["ce", scaled] > right["ce", network] + 0.1


@cases([*((norm, "ce") for norm in NORMS), (L1(), "targeted")])
def test_an_example_is_attacked_on_its_own(norm, name):
    threat = ThreatModel(norm, 2 * world.RADII[norm])
    keys = jax.random.split(KEY, len(X))
    together, _ = run(name, network, threat, keys, X, NETWORK_Y)
    part, _ = run(name, network, threat, keys[5:9], X[5:9], NETWORK_Y[5:9])
    np.testing.assert_allclose(together[5:9], part, atol=1e-6)


def test_misclassified_inputs_are_left_alone():
    wrong = (NETWORK_Y + 1) % world.K
    x_adv, state = run("ce", network, ThreatModel(LInf(), 0.1), KEY, X, wrong)
    np.testing.assert_array_equal(x_adv, X)
    assert state.done.all()


def test_restarts_only_add():
    threat = ThreatModel(LInf(), 0.04)
    one, three = (
        jax.jit(apgd(threat, steps=5, restarts=r), static_argnums=0)(network, KEY, X, NETWORK_Y)
        for r in (1, 3)
    )
    right_one, right_three = (correct(network(z), NETWORK_Y) for z in (one, three))
    assert (right_three <= right_one).all()


def test_without_early_stop_the_loss_of_successes_is_larger():
    threat = ThreatModel(LInf(), 0.1)
    stop, go = (
        jax.jit(apgd(threat, steps=25, early_stop=e), static_argnums=0)(network, KEY, X, NETWORK_Y)
        for e in (True, False)
    )
    np.testing.assert_array_equal(
        correct(network(stop), NETWORK_Y), correct(network(go), NETWORK_Y)
    )
    assert (margin(network(go), NETWORK_Y) >= margin(network(stop), NETWORK_Y) - 1e-5).mean() > 0.9


def test_expectation_over_transformation():
    """Without noise it is the plain attack; with it, more draws see through it."""

    def noiseless(x, keys):
        return network(x)

    def noisy(x, keys):
        noise = jax.vmap(lambda k, x: jax.random.normal(k, x.shape))(keys, x)
        return network(x + 0.3 * noise)

    threat = ThreatModel(LInf(), 0.06)

    def attacked(fn, **options):
        attack = apgd(threat, steps=25, early_stop=False, **options)
        return jax.jit(attack, static_argnums=0)(fn, KEY, X, NETWORK_Y)

    np.testing.assert_allclose(attacked(noiseless, eot=2), attacked(network), atol=1e-6)
    losses = [margin(network(attacked(noisy, eot=eot)), NETWORK_Y).mean() for eot in (1, 20)]
    assert losses[1] > losses[0]


def test_targets_are_the_likeliest_wrong_classes():
    logits = jnp.array([[1.0, 5.0, 3.0, 4.0], [9.0, 5.0, 3.0, 4.0]])
    found = likeliest_wrong_classes(logits, jnp.array([1, 2], jnp.int32), 2)
    np.testing.assert_array_equal(found, [[3, 2], [0, 1]])


def test_radius_can_be_traced():
    attack = jax.jit(
        lambda eps: apgd(ThreatModel(LInf(), eps), steps=3)(network, KEY, X, NETWORK_Y)
    )
    for eps in (0.0, 0.05):
        assert jnp.abs(attack(eps) - X).max() <= eps + 1e-6
    assert attack._cache_size() == 1


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: apgd("linf"), "threat must be a ThreatModel"),
        (lambda t: apgd(t, steps=0), "steps must be >= 1, got 0"),
        (lambda t: apgd(t, restarts=0), "restarts must be >= 1, got 0"),
        (lambda t: apgd(t, loss="ce"), "loss must be a function, got 'ce'"),
        (lambda t: apgd(t, eot=0), "eot must be >= 1, got 0"),
        (lambda t: apgd_targeted(t, targets=0), "targets must be >= 1, got 0"),
        (
            lambda t: apgd_targeted(t, targets=5)(network, KEY, X, NETWORK_Y),
            "targets must be <= K - 1, here 4 because there are K = 5 classes, got 5",
        ),
        (lambda t: apgd(t)(network, KEY, X + 1, NETWORK_Y), r"x must lie in \[0, 1\]"),
        (lambda t: apgd(t)(network, KEY, X, NETWORK_Y[:3]), "y must have one entry per example"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(ThreatModel(LInf(), 0.1))
