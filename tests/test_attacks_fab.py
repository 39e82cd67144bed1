"""FAB and FAB-T: exact distances of linear models, brute force in the plane, invariances."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import keys
from robustjax.attacks.fab import fab, fab_targeted
from robustjax.hyperplane import displacement
from robustjax.metrics import correct
from robustjax.norms import L1, L2, LInf, Lp
from robustjax.threat import ThreatModel

NORMS = (LInf(), L2(), L1())
CASES = [(norm, targeted) for norm in NORMS for targeted in (False, True)]
IDS = [f"{norm.name}-{'fab_targeted' if targeted else 'fab'}" for norm, targeted in CASES]
N, D, K, WIDTH = 24, 12, 4, 16
KEYS = keys.as_per_example(jax.random.key(0), N)
X = jax.random.uniform(jax.random.key(1), (N, D), minval=-0.1, maxval=1.1).clip(0, 1)
UNIT, OPEN = (0.0, 1.0), (-jnp.inf, jnp.inf)


def model(params, x):
    """A linear model plus a ReLU network; either may be zero."""
    hidden = jax.nn.relu((2 * x - 1) @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + x @ params["w"] + params["b"]


def parameters(seed, linear, inputs=D):
    """Random ones, which see the first ``inputs`` coordinates only."""
    draws = jax.random.split(jax.random.key(seed), 5)
    seen = (jnp.arange(D) < inputs)[:, None]
    return {
        "w1": jax.random.normal(draws[0], (D, WIDTH)) * seen,
        "b1": jax.random.normal(draws[1], (WIDTH,)),
        "w2": jax.random.normal(draws[2], (WIDTH, K)) * (not linear),
        "w": jax.random.normal(draws[3], (D, K)) * linear,
        "b": 0.3 * jax.random.normal(draws[4], (K,)),
    }


LINEAR, RELU = parameters(2, linear=True), parameters(3, linear=False)


def labels(params, x=X):
    return jnp.argmax(model(params, x), axis=1).astype(jnp.int32)


@functools.cache
def compiled(norm, targeted, early_stop=False):
    """One program for most tests: everything but the norm and the options is traced."""
    options = {"steps": 20, "early_stop": early_stop, "has_aux": True}

    def run(params, eps, box, x, y, keys):
        threat = ThreatModel(norm, eps, *box)
        if targeted:
            attack = fab_targeted(threat, targets=K - 1, restarts=2, **options)
        else:
            attack = fab(threat, **options)
        return attack(lambda x: model(params, x), keys, x, y)

    return jax.jit(run)


def run(norm, targeted, params, eps, box=UNIT, x=X, y=None, keys=KEYS, early_stop=False):
    y = labels(params, x) if y is None else y
    return compiled(norm, targeted, early_stop)(params, eps, box, x, y, keys)


def exact_distances(norm, box, classes=range(K)):
    """Of the linear model, by the projection that the solvers have checked."""
    best, y, logits = np.full(N, np.inf), labels(LINEAR), model(LINEAR, X)
    for j in classes:
        w = LINEAR["w"].T[j] - LINEAR["w"].T[y]
        gap = logits[jnp.arange(N), y] - logits[:, j]
        d = displacement(norm, w, gap, box[0] - X, box[1] - X)
        reached = jnp.abs(jnp.sum(w * d, axis=1) - gap) < 1e-4
        length = jnp.where(reached & (y != j), norm.value(d, batch_ndim=1), jnp.inf)
        best = np.minimum(best, length)
    return best


@pytest.mark.parametrize("norm, targeted", CASES, ids=IDS)
def test_linear_model_without_a_box(norm, targeted):
    """The closed form is the smallest of |f_j| / ||w_j||_*."""
    logits, own, y = model(LINEAR, X), jnp.arange(N), labels(LINEAR)
    f = logits - logits[own, y][:, None]
    w = LINEAR["w"].T[None] - LINEAR["w"].T[y][:, None]
    size = norm.dual.value(w, batch_ndim=2).at[own, y].set(1)
    exact = (-f / size).at[own, y].set(jnp.inf).min(axis=1)
    np.testing.assert_allclose(exact, exact_distances(norm, OPEN), rtol=1e-5)
    _, state = run(norm, targeted, LINEAR, 0.1, OPEN)
    ratio = state.distance / exact
    assert bool(jnp.all((ratio >= 1 - 1e-5) & (ratio <= 1.05 * (1 + 1e-5))))
    assert float(jnp.median(ratio)) < 1.02
    assert not bool(jnp.any(correct(model(LINEAR, state.x_min), y)))


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_linear_model_in_the_box_has_the_closed_form_robust_accuracy(norm):
    y, exact = labels(LINEAR), exact_distances(norm, UNIT)
    # A radius at the upper end of a gap between the distances: 1.05 decides about none of them.
    ordered = np.sort(exact)[N // 4 : -N // 4]
    widest = np.argmax(ordered[1:] / ordered[:-1])
    eps = float(0.999 * ordered[widest + 1])
    assert np.isfinite(exact).all() and eps > 1.06 * ordered[widest]
    x_adv, state = run(norm, True, LINEAR, eps)
    assert (state.distance >= exact * (1 - 1e-5)).all()
    assert (state.distance <= exact * 1.05 * (1 + 1e-5)).all()
    assert bool(jnp.all((state.x_min >= 0) & (state.x_min <= 1)))
    length = norm.value(state.x_min - X, batch_ndim=1)
    np.testing.assert_allclose(state.distance, length, rtol=1e-6)
    assert bool(jnp.all(ThreatModel(norm, eps).contains(x_adv, X)))
    np.testing.assert_array_equal(correct(model(LINEAR, x_adv), y), exact > eps)
    np.testing.assert_array_equal(x_adv[exact > eps], X[exact > eps])


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_all_classes_at_once_in_the_box_of_a_binary_model(norm):
    """Classes that nothing can reach leave one boundary, that of the nearest step."""
    rival = jnp.zeros(K).at[2:].set(-1e4)
    params = {**LINEAR, "b": LINEAR["b"] + rival, "w": LINEAR["w"].at[:, 2:].set(0)}
    y = labels(params)
    w = (params["w"][:, 1] - params["w"][:, 0]) * jnp.where(y == 0, 1.0, -1.0)[:, None]
    logits = model(params, X)
    gap = jnp.abs(logits[:, 0] - logits[:, 1])
    exact = norm.value(displacement(norm, w, gap, -X, 1 - X), batch_ndim=1)
    ratio = run(norm, False, params, 0.1)[1].distance / exact
    assert bool(jnp.all((ratio >= 1 - 1e-5) & (ratio <= 1.05 * (1 + 1e-5))))


@pytest.mark.parametrize("norm, targeted", CASES, ids=IDS)
def test_logits_times_a_power_of_two_change_no_bit(norm, targeted):
    expected = run(norm, targeted, RELU, 0.3)[1]
    for scale in (2.0**-40, 2.0**9):
        params = {**RELU, "w2": scale * RELU["w2"], "b": scale * RELU["b"]}
        scaled = run(norm, targeted, params, 0.3)[1]
        np.testing.assert_array_equal(scaled.x_min, expected.x_min)
        np.testing.assert_array_equal(scaled.distance, expected.distance)


@pytest.mark.parametrize("norm, targeted", CASES, ids=IDS)
def test_piecewise_linear_model_in_the_plane_against_brute_force(norm, targeted):
    """A network that sees two coordinates: no step moves the others."""
    params = parameters(6, linear=False, inputs=2)
    side = 401
    plane = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, side)] * 2), axis=-1).reshape(-1, 2)
    grid = jnp.pad(plane, ((0, 0), (0, D - 2)))
    classes, y = labels(params, grid), labels(params)
    assert len(np.unique(classes)) >= 3
    lengths = norm.value(plane[None] - X[:, None, :2], batch_ndim=2)
    brute = jnp.where(classes != y[:, None], lengths, jnp.inf).min(axis=1)
    cell = norm.value(jnp.full(2, 1 / (side - 1)))
    state = run(norm, targeted, params, 0.2)[1]
    if not targeted:  # no restart, whose random start moves everything
        np.testing.assert_array_equal(state.x_min[:, 2:], X[:, 2:])
    assert bool(jnp.all(state.distance >= brute - cell))
    # The method is local; least of all l_1 steps, along one axis, get out of a local minimum.
    near = state.distance <= 1.05 * brute + cell
    assert float(near.mean()) >= (0.85 if norm == L1() else 0.95)
    assert not bool(jnp.any(correct(model(params, state.x_min), y)))


@pytest.mark.parametrize("norm", NORMS[:2], ids=lambda n: n.name)
def test_stopping_early_gives_the_same_verdict(norm):
    y = labels(RELU)
    eps = float(jnp.median(run(norm, True, RELU, 1.0)[1].distance))
    full_adv, full = run(norm, True, RELU, eps)
    adv, early = run(norm, True, RELU, eps, early_stop=True)
    np.testing.assert_array_equal(early.done, full.distance <= eps)
    np.testing.assert_array_equal(correct(model(RELU, adv), y), full.distance > eps)
    np.testing.assert_array_equal(correct(model(RELU, full_adv), y), full.distance > eps)
    assert bool(jnp.all(early.distance >= full.distance))
    assert not bool(jnp.any(full.done)) and 0 < int(early.done.sum()) < N


def test_examples_do_not_depend_on_their_neighbours():
    for norm in NORMS:
        _, state = run(norm, False, RELU, 0.2)
        order = jnp.argsort(jax.random.uniform(jax.random.key(9), (N,)))
        _, other = run(norm, False, RELU, 0.2, x=X[order], keys=KEYS[order])
        np.testing.assert_allclose(other.distance, state.distance[order], rtol=1e-4)
        twice = jnp.zeros(N, jnp.int32)
        _, other = run(norm, False, RELU, 0.2, x=X[twice], keys=KEYS[twice])
        np.testing.assert_allclose(other.distance, state.distance[twice], rtol=1e-4)


def test_rounds_in_chunks_and_more_rounds_only_bring_the_distance_down():
    y, net = labels(RELU), functools.partial(model, RELU)
    attack = fab_targeted(ThreatModel(L2(), 0.5), targets=2, restarts=2, steps=6)
    assert (attack.rounds, attack.steps) == (4, 6)
    start = jax.jit(functools.partial(attack.start, net))
    advance = jax.jit(functools.partial(attack.advance, net))
    state, before = attack.init(net, KEYS, X, y), jnp.inf
    distances = []
    for r in range(4):
        state = start(r, KEYS, state, X, y)
        state = advance(r, 0, 4, KEYS, state, X, y)
        state = advance(r, 4, 6, KEYS, state, X, y)
        assert bool(jnp.all(state.distance <= before))
        before = state.distance
        distances.append(state.distance)
    assert bool(jnp.any(distances[-1] < distances[0]))
    whole = attack.init(net, KEYS, X, y)
    for r in range(4):
        whole = advance(r, 0, 6, KEYS, start(r, KEYS, whole, X, y), X, y)
    np.testing.assert_array_equal(state.x_min, whole.x_min)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_restarts_begin_at_half_the_smaller_of_eps_and_the_best_distance(norm):
    attack = fab_targeted(ThreatModel(norm, 0.2, *OPEN), targets=2, restarts=2, steps=1)
    y, net = labels(LINEAR), functools.partial(model, LINEAR)
    state = attack.init(net, KEYS, X, y)._replace(distance=jnp.linspace(0.1, 0.5, N))
    ranking = jnp.argsort(-net(X), axis=1)[:, 1:3]
    begin = jax.jit(lambda r: attack.begin(net, r, KEYS, state, X, y))
    for r in range(4):
        begun = begin(r)
        lengths = norm.value(begun.iterate - X, batch_ndim=1)
        radius = jnp.minimum(state.distance, 0.2) / 2 if r % 2 else jnp.zeros(N)
        np.testing.assert_allclose(lengths, radius, atol=1e-6)
        np.testing.assert_array_equal(begun.classes[:, 0], ranking[:, r // 2])


def literal_fab(net, jacobian_fn, x, y, steps):
    """The iteration as it is printed, in double precision, for one example and l_2."""
    z, best = x, np.inf
    for _ in range(steps):
        logits, jacobian = (np.asarray(v, float) for v in (net(z), jacobian_fn(z)))
        candidates = []
        for j in range(len(logits)):
            if j != y:
                w, df = jacobian[j] - jacobian[y], logits[j] - logits[y]
                candidates.append((abs(df) / np.linalg.norm(w), j, w, df))
        _, _, w, df = min(candidates)
        b = -df + w @ z
        d, d_org = nearest_in_unit_cube(z, w, b), nearest_in_unit_cube(x, w, b)
        near, far = np.linalg.norm(d), np.linalg.norm(d_org)
        alpha = min(near / (near + far), 0.1)
        z = np.clip((1 - alpha) * (z + 1.05 * d) + alpha * (x + 1.05 * d_org), 0, 1)
        if np.argmax(net(z)) != y:
            best = min(best, np.linalg.norm(z - x))
            z = x + 0.9 * (z - x)
    return z, best


def nearest_in_unit_cube(u, w, b):
    """Every active set of the cube in turn."""
    best = np.full(len(u), np.inf)
    for sides in itertools.product((None, 0.0, 1.0), repeat=len(u)):
        free = np.array([s is None for s in sides])
        v = np.array([a if s is None else s for a, s in zip(u, sides, strict=True)])
        if free.any():
            v = v + np.where(free, w * (b - w @ v) / (w[free] @ w[free]), 0)
        if abs(w @ v - b) < 1e-9 and (v > -1e-9).all() and (v < 1 + 1e-9).all():
            best = min(best, v - u, key=np.linalg.norm)
    assert np.isfinite(best).all()
    return best


def test_iterates_are_those_of_the_printed_algorithm():
    draws = jax.random.split(jax.random.key(12), 4)
    w1, w2 = jax.random.normal(draws[0], (3, 8)), jax.random.normal(draws[1], (8, 3))
    b1, b2 = jax.random.normal(draws[2], (8,)), jax.random.normal(draws[3], (3,))

    @jax.jit
    def net(x):
        return jax.nn.relu((2 * x - 1) @ w1 + b1) @ w2 + b2

    jacobian_fn = jax.jit(jax.jacobian(net))
    x = jax.random.uniform(jax.random.key(13), (4, 3))
    y = jnp.argmax(net(x), axis=1).astype(jnp.int32)
    attack = fab(ThreatModel(L2(), 0.5), steps=6, has_aux=True)
    _, state = jax.jit(lambda: attack(net, jax.random.key(0), x, y))()
    for i in range(4):
        z, best = literal_fab(net, jacobian_fn, np.asarray(x[i], np.float64), int(y[i]), 6)
        np.testing.assert_allclose(state.iterate[i], z, atol=1e-5)
        np.testing.assert_allclose(state.distance[i], best, rtol=1e-4)


def test_misclassified_examples_are_left_alone():
    wrong = (labels(LINEAR) + 1) % K
    x_adv, state = run(L2(), False, LINEAR, 0.2, y=wrong.astype(jnp.int32))
    np.testing.assert_array_equal(x_adv, X)
    np.testing.assert_array_equal(state.x_min, X)
    np.testing.assert_array_equal(state.distance, 0)
    assert bool(jnp.all(state.done))


def test_a_model_without_gradient_and_a_radius_of_zero():
    constant = {**LINEAR, "w": jnp.zeros((D, K))}
    x_adv, state = run(L2(), False, constant, 0.2)
    assert bool(jnp.all(jnp.isinf(state.distance) & ~state.done))
    np.testing.assert_array_equal(x_adv, X)
    assert bool(jnp.all(jnp.isfinite(state.iterate)))
    x_adv, state = run(L2(), False, LINEAR, 0.0)
    np.testing.assert_array_equal(x_adv, X)
    assert bool(jnp.all(jnp.isfinite(state.distance) & (state.distance > 0)))


def test_logits_that_are_not_numbers_count_as_misclassified():
    def breaks(x):
        far = jnp.max(jnp.abs(x - X), axis=1, keepdims=True) > 1e-3
        return jnp.where(far, jnp.nan, model(LINEAR, x))

    attack = fab(ThreatModel(L2(), 0.2), steps=3, has_aux=True)
    _, state = jax.jit(lambda: attack(breaks, KEYS, X, labels(LINEAR)))()
    assert bool(jnp.all(jnp.isfinite(state.x_min) & (state.distance < 3)[:, None]))
    assert not bool(jnp.any(correct(breaks(state.x_min), labels(LINEAR))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_images_in_the_box_of_their_channels(dtype):
    """Twelve classes: more gradients than are held at once. One eps per example."""
    upper = jnp.array([1.0, 0.5, 1.0])
    x = jax.random.uniform(jax.random.key(14), (4, 4, 4, 3))
    x = jnp.minimum(x, upper).astype(dtype)
    w = jax.random.normal(jax.random.key(15), (48, 12)).astype(dtype)

    def logits_fn(x):
        return x.reshape(x.shape[0], -1) @ w

    y = jnp.argmax(logits_fn(x), axis=1).astype(jnp.int32)
    eps = jnp.array([0.0, 1.0, 1.0, 1.0])
    attack = fab(ThreatModel(LInf(), eps, upper=upper), steps=8, has_aux=True)
    x_adv, state = jax.jit(lambda x, y: attack(logits_fn, jax.random.key(0), x, y))(x, y)
    assert x_adv.dtype == state.x_min.dtype == dtype and x_adv.shape == x.shape
    found = jnp.isfinite(state.distance)
    # Near the boundary a step can be smaller than what bfloat16 resolves.
    assert bool(jnp.any(found)) if dtype == jnp.bfloat16 else bool(jnp.all(found))
    assert bool(jnp.all((state.x_min >= 0) & (state.x_min <= upper)))
    assert not bool(jnp.any(correct(logits_fn(state.x_min), y) & found))
    np.testing.assert_array_equal(x_adv[0], x[0])
    np.testing.assert_array_equal(x_adv[1:], state.x_min[1:])


@pytest.mark.parametrize("make", [fab, fab_targeted])
@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"restarts": 0}, {"alpha_max": 1.5}, {"overshoot": 0.9}, {"backward": -0.1}],
    ids=lambda o: next(iter(o)),
)
def test_options_out_of_range(make, options, plain_calls):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(ThreatModel(L2(), 0.1), **options)


def test_bad_input(plain_calls):
    net, y = functools.partial(model, LINEAR), labels(LINEAR)
    with pytest.raises(ValueError, match="norm of threat must be linf, l2 or l1"):
        fab(ThreatModel(Lp(3), 0.1))
    with pytest.raises(ValueError, match="threat must be a ThreatModel"):
        fab("linf")
    with pytest.raises(ValueError, match="targets must be >= 1"):
        fab_targeted(ThreatModel(L2(), 0.1), targets=0)
    with pytest.raises(ValueError, match="K = 4 classes, got 9"):
        fab_targeted(ThreatModel(L2(), 0.1))(net, KEYS, X, y)
    with pytest.raises(ValueError, match="x must lie in"):
        fab(ThreatModel(L2(), 0.1))(net, KEYS, X + 1, y)
