"""Free adversarial training against a loop written by hand, and split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import data, models, parallel, training
from robustjax.gradients import FreeState, free, plain
from robustjax.losses import cross_entropy
from robustjax.norms import L2, LInf
from robustjax.objectives import standard
from robustjax.threat import ThreatModel
from robustjax.training import feed

KEY = jax.random.key(0)
N, SHAPE, K, M = 4, (3, 2, 1), 3, 3
RNG = np.random.default_rng(0)
# Two minibatches, with pixels at the ends of the box.
DATA = {
    "image": np.float32(np.clip(RNG.uniform(-0.2, 1.2, size=(2 * N, *SHAPE)), 0, 1)),
    "label": np.arange(2 * N, dtype=np.int32) % K,
    "index": np.arange(2 * N, dtype=np.int32),
}
ROWS = np.repeat(np.arange(2 * N).reshape(2, N), M, axis=0)
BATCHES = {name: jnp.asarray(values[ROWS]) for name, values in DATA.items()}
FIRST = {name: values[0] for name, values in BATCHES.items()}
MODEL = models.from_linen(models.MLP((5,), num_classes=K))
PARAMS = jax.tree.map(
    lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), MODEL.init(KEY, FIRST["image"])[0]
)
EPS, RATE = 0.1, 0.5
THREAT = ThreatModel(LInf(), EPS)
SGD = optax.sgd(RATE)


def logits(params, x):
    return MODEL.apply(params, {}, x, True, None)[0]


@jax.jit
def gradients(params, delta, x, y):
    """For the parameters and for the perturbation, through the clip."""

    def loss(params, delta):
        noisy = x + delta
        # The clip's derivative is 1 at the ends of the box, unlike that of jnp.clip.
        inside = jnp.where((noisy >= 0) & (noisy <= 1), noisy, jnp.clip(noisy, 0, 1))
        return cross_entropy(logits(params, inside), y).mean()

    return jax.grad(loss, argnums=(0, 1))(params, delta)


def by_hand(shared, carried):
    params, delta, deltas = PARAMS, np.zeros((N, *SHAPE), np.float32), []
    for step in range(2 * M):
        x, y = BATCHES["image"][step], BATCHES["label"][step]
        if step % M == 0 and not carried:
            delta = np.zeros_like(delta)
        of_params, of_delta = gradients(params, delta, x, y)
        delta = np.clip(delta + EPS * np.sign(of_delta), -EPS, EPS)
        delta = np.clip(x + delta, 0, 1) - x
        if not shared:
            of_params = gradients(params, delta, x, y)[0]
        params = jax.tree.map(lambda p, g: p - RATE * g, params, of_params)
        deltas.append(delta)
    return params, np.stack(deltas)


def initial(oracle):
    return training.create_state(PARAMS, {}, SGD, KEY, oracle=oracle)


@functools.cache
def trained(shared=True, carried=True):
    oracle = free(THREAT, (N, *SHAPE), replays=M, carried=carried, shared_backward=shared)
    step = training.train_step(MODEL.apply, standard(), SGD, oracle=oracle)

    def steps(state):
        def one(state, batch):
            state, metrics = step(state, batch)
            return state, (state.oracle_state.perturbation, metrics)

        return jax.lax.scan(one, state, BATCHES)

    return jax.jit(steps)(initial(oracle))


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize(("shared", "carried"), [(True, True), (True, False), (False, True)])
def test_training_is_the_loop_by_hand(shared, carried):
    state, (deltas, metrics) = trained(shared, carried)
    params, expected = by_hand(shared, carried)
    assert_close(deltas, expected)
    assert_close(state.params, params)
    assert state.oracle_state.count == 2 * M
    np.testing.assert_array_equal(state.oracle_state.perturbation, deltas[-1])
    # The step reports the loss at the perturbed inputs: before the move, or after it.
    x, y = BATCHES["image"][0], BATCHES["label"][0]
    at = x if shared else x + deltas[0]
    loss = cross_entropy(logits(PARAMS, at), y).mean()
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_perturbations_are_feasible(shared):
    _, (deltas, _) = trained(shared)
    for delta, x in zip(deltas, BATCHES["image"], strict=True):
        assert THREAT.contains(x + delta, x).all()
    assert np.abs(deltas).max() == pytest.approx(EPS)


def test_a_new_minibatch_begins_where_the_last_one_ended_only_if_carried():
    of_carried, of_fresh = (trained(carried=carried)[1][0] for carried in (True, False))
    np.testing.assert_array_equal(of_carried[:M], of_fresh[:M])
    assert (of_carried[M] != of_fresh[M]).any()


def test_first_step_is_that_of_standard_training():
    oracle = free(THREAT, (N, *SHAPE))

    def gradient(oracle):
        grad_fn = oracle.oracle(standard()(MODEL.apply))
        return jax.jit(grad_fn)(PARAMS, {}, oracle.init(PARAMS), KEY, FIRST)

    grads, (_, state, metrics) = gradient(oracle)
    expected, (_, _, expected_metrics) = gradient(plain())
    assert_close((grads, metrics), (expected, expected_metrics))
    assert isinstance(state, FreeState)


def test_other_norms():
    threat = ThreatModel(L2(), 0.3)
    oracle = free(threat, (N, *SHAPE))
    grad_fn = jax.jit(oracle.oracle(standard()(MODEL.apply)))
    state = oracle.init(PARAMS)
    for _ in range(2):
        _, (_, state, _) = grad_fn(PARAMS, {}, state, KEY, FIRST)
    x = FIRST["image"]
    assert threat.contains(x + state.perturbation, x).all()
    assert (L2().value(state.perturbation, batch_ndim=1) > 0.05).all()


def test_cost_in_passes():
    def passes(shared):
        oracle = free(THREAT, (N, *SHAPE), shared_backward=shared)
        step = training.train_step(training.counted(MODEL.apply), standard(), SGD, oracle=oracle)
        return training.count_passes(step, initial(oracle), FIRST)

    assert passes(True) == (1, 1, 0)
    assert passes(False) == (2, 2, 0)


@pytest.mark.parametrize("shared", [True, False])
def test_two_devices_train_as_one(shared):
    mesh = parallel.device_mesh(jax.devices()[:2])
    oracle = free(THREAT, (N, *SHAPE), shared_backward=shared, axis_name=parallel.AXIS)
    step = training.train_step(MODEL.apply, standard(), SGD, oracle=oracle, axis_name=parallel.AXIS)
    same, split = parallel.REPLICATED, parallel.SPLIT_SECOND
    steps = parallel.parallel(
        training.several_steps(step), mesh, in_specs=(same, split), out_specs=same
    )
    state = parallel.replicate(initial(oracle), mesh)
    found, metrics = steps(state, parallel.split(BATCHES, mesh, split))
    expected, (_, expected_metrics) = trained(shared)
    assert_close(found.params, expected.params)
    assert_close(found.oracle_state, expected.oracle_state)
    assert_close(metrics["loss"], expected_metrics["loss"])
    shares = [np.asarray(s.data) for s in found.oracle_state.perturbation.addressable_shards]
    assert len(shares) == 2
    np.testing.assert_array_equal(*shares)


BAD = {
    "threat": (lambda: free("linf", (N, *SHAPE)), "threat must be a ThreatModel"),
    "batch_shape": (lambda: free(THREAT, N), r"batch_shape must be \(n, \.\.\.\)"),
    "sizes": (lambda: free(THREAT, (0, 3)), "batch_shape must be >= 1"),
    "replays": (lambda: free(THREAT, (N, 3), replays=0), "replays must be >= 1"),
    "shared": (lambda: free(THREAT, (N, 3), shared_backward="no"), "shared_backward must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(plain_calls, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_of_another_size():
    oracle = free(THREAT, (N + 1, *SHAPE))
    grad_fn = oracle.oracle(standard()(MODEL.apply))
    with pytest.raises(ValueError, match="images must be a batch of shape"):
        grad_fn(PARAMS, {}, oracle.init(PARAMS), KEY, FIRST)


def test_a_schedule_scales_the_radius():
    half = free(ThreatModel(LInf(), EPS / 2), (N, *SHAPE))
    scheduled = free(THREAT, (N, *SHAPE), schedule=optax.constant_schedule(0.5))
    batch = FIRST
    for _ in range(2):
        found = []
        for oracle in (half, scheduled):
            grad_fn = oracle.oracle(standard()(MODEL.apply))
            found.append(grad_fn(PARAMS, {}, oracle.init(PARAMS), KEY, batch)[1][1].perturbation)
        np.testing.assert_allclose(found[0], found[1], atol=1e-7)
        assert np.abs(found[0]).max() == pytest.approx(EPS / 2)
        batch = {**batch, "image": batch["image"][::-1]}


DIGITS = data.Dataset(DATA["image"][:, :2], DATA["label"], K, "noise")


@pytest.fixture(scope="module")
def feeds():
    """Data as they reach the step: which example stands first, and a draw of the augmentation."""

    def objective(model_fn):
        def loss_fn(params, model_state, key, batch):
            values = params["w"] * jnp.zeros(2)
            metrics = {"index": batch["index"][:1], "seen": batch["image"].mean()[None]}
            return values, (model_state, {"loss": values, **metrics})

        return loss_fn

    def augment(keys, x):
        return x + jax.vmap(lambda key: jax.random.uniform(key))(keys)[:, None, None, None]

    step = training.train_step(
        MODEL.apply, objective, SGD, augment=augment, replays=M, axis_name=parallel.AXIS
    )
    mesh = parallel.device_mesh(jax.devices()[:1])

    def fresh():
        state = training.create_state({"w": jnp.ones(())}, {}, SGD, KEY)
        return parallel.replicate(state, mesh)

    def streamed():
        return feed.streamed(
            step, lambda at: data.host_batches(DIGITS, batch_size=2, seed=0, start_step=at,
                                               num_threads=0, prefetch=0),
            steps_per_epoch=4, mesh=mesh, replays=M,
        )  # fmt: skip

    resident = feed.resident(step, DIGITS, key=KEY, batch_size=2, mesh=mesh, replays=M)
    return fresh, {"resident": lambda: resident, "streamed": streamed}


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_minibatches_are_replayed_with_the_same_augmentation(feeds, kind):
    """Three steps on each; an epoch of four steps sees a minibatch and a third."""
    fresh, kinds = feeds
    advance = kinds[kind]()
    state, seen = fresh(), []
    for at in range(0, 24, 2):
        epoch, first = divmod(at, 4)
        state, metrics = advance(state, epoch, first, 2)
        seen.append(np.stack([metrics["index"], metrics["seen"]], axis=1))
    index, draws = np.concatenate(seen).T
    assert (index.reshape(-1, M) == index[::M, None]).all()
    assert (draws.reshape(-1, M) == draws[::M, None]).all()
    assert len(set(draws)) == 24 // M
    if kind == "resident":
        order = np.concatenate([data.epoch_batches(KEY, e, 8, 2) for e in range(2)])
        np.testing.assert_array_equal(index[::M], order[:, 0])
    else:
        batches = data.host_batches(DIGITS, batch_size=2, seed=0, num_threads=0, prefetch=0)
        np.testing.assert_array_equal(index[::M], [next(batches)["index"][0] for _ in range(8)])
    # From the middle of a minibatch's replays on, in another process.
    again = fresh()._replace(step=jnp.asarray(10, jnp.int32))
    _, metrics = kinds[kind]()(again, 2, 2, 2)
    np.testing.assert_array_equal(metrics["index"], index[10:12])
    np.testing.assert_array_equal(metrics["seen"], draws[10:12].astype(np.float32))
