"""The training step: against hand-written updates, on one device and on many."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from robustjax import data, keys, models, parallel
from robustjax.attacks import pgd
from robustjax.losses import cross_entropy
from robustjax.norms import L2, LInf
from robustjax.objectives import madry, scheduled, standard, trades, trades_attack
from robustjax.optim import sign_gd
from robustjax.threat import ThreatModel
from robustjax.training import (
    create_state,
    feed,
    fit,
    several_resident_steps,
    several_steps,
    train_step,
)

RNG = np.random.default_rng(0)
N, K = 16, 3
IMAGES = RNG.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
LABELS = RNG.integers(0, K, 40).astype(np.int32)
DATASET = data.Dataset(IMAGES, LABELS, K, "noise")
BATCH = data.take({"image": jnp.array(IMAGES), "label": jnp.array(LABELS)}, jnp.arange(N))
KEY = jax.random.key(0)
THREAT = ThreatModel(LInf(), 0.1)
MLP = models.from_linen(models.MLP(features=(8,), num_classes=K))
PARAMS = MLP.init(KEY, BATCH["image"])[0]


class Normalized(nn.Module):
    """A small network with batch normalisation."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = models.Conv(4, kernel_size=3, strides=2)(x)
        x = models.feature_norm("batch", x, train=train, axis_name=self.axis_name)
        return models.classify(nn.relu(x), K)


def noise(logits_fn, key, x, y):
    """In place of an attack: every example has its random numbers, and it compiles soon."""
    return THREAT.sample(keys.as_per_example(key, len(x)), x)


OBJECTIVES = {
    "standard": standard(),
    "noise": madry(noise),
    "madry": madry(pgd(THREAT, steps=2)),
    "madry-l2": madry(pgd(ThreatModel(L2(), 0.5), steps=2)),
    "trades": trades(trades_attack(THREAT, steps=2)),
}
OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)),
    "adam": optax.adam(1e-2),
    "sign_gd": sign_gd(1e-2),
}


@functools.cache
def single_step(objective, optimizer="sgd", augment=None):
    """The step on one device, compiled once for all tests that take it."""
    return jax.jit(
        train_step(MLP.apply, OBJECTIVES[objective], OPTIMIZERS[optimizer], augment=augment)
    )


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def without_key(state):
    return state._replace(key=jax.random.key_data(state.key))


def fresh(optimizer=OPTIMIZERS["sgd"], params=PARAMS):
    return create_state(params, {}, optimizer, KEY)


def test_standard_step_is_the_update_by_hand():
    step = single_step("standard")
    state, _ = step(fresh(), BATCH)
    state, metrics = step(state, BATCH)

    def loss(params):
        logits = MLP.apply(params, {}, BATCH["image"], True, None)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["label"]).mean()

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    params, velocity = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(2):
        value, gradient = value_and_gradient(params)
        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(lambda g, p: g + 5e-4 * p, gradient, params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
    assert_trees_close(state.params, params, rtol=1e-5, atol=1e-7)
    assert int(state.step) == 2
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


# The gradient is all that goes from an objective to an optimizer: each is in a pair.
@pytest.mark.parametrize(
    "objective, optimizer",
    [
        *((name, "sgd") for name in ("standard", "madry", "madry-l2", "trades")),
        ("madry", "adam"),
        ("trades", "sign_gd"),
    ],
)
def test_every_objective_and_every_optimizer_lower_the_loss(objective, optimizer):
    step = single_step(objective, optimizer)
    state, first = step(fresh(OPTIMIZERS[optimizer]), BATCH)
    for _ in range(30):
        state, metrics = step(state, BATCH)
    assert float(metrics["loss"]) < float(first["loss"])


AUGMENT = data.crop_and_flip(1)


@pytest.mark.parametrize("devices, objective", [(2, "madry"), (8, "madry"), (8, "trades")])
def test_many_devices_make_the_step_of_one(devices, objective):
    one = single_step(objective, augment=AUGMENT)
    each = train_step(
        MLP.apply,
        OBJECTIVES[objective],
        OPTIMIZERS["sgd"],
        augment=AUGMENT,
        axis_name=parallel.AXIS,
    )
    mesh = parallel.device_mesh(jax.devices()[:devices])
    many = parallel.parallel(
        each,
        mesh,
        in_specs=(parallel.REPLICATED, parallel.SPLIT),
        out_specs=(parallel.REPLICATED, parallel.REPLICATED),
    )
    state, mapped = fresh(), parallel.replicate(fresh(), mesh)
    for _ in range(3):
        state, metrics = one(state, BATCH)
        mapped, mapped_metrics = many(mapped, parallel.split(BATCH, mesh))
    assert_trees_close(mapped.params, state.params, rtol=1e-4, atol=1e-6)
    assert_trees_close(mapped_metrics, metrics, rtol=1e-4, atol=1e-6)


def test_the_same_step_under_pmap():
    step = train_step(MLP.apply, OBJECTIVES["madry"], OPTIMIZERS["sgd"], axis_name="data")
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=(None, 0))
    batch = jax.tree.map(lambda x: x.reshape(8, N // 8, *x.shape[1:]), BATCH)
    state, _ = mapped(fresh(), batch)
    expected, _ = single_step("madry")(fresh(), BATCH)
    assert_trees_close(state.params, expected.params, rtol=1e-4, atol=1e-6)


class NNXNetwork(nnx.Module):
    """A network of Flax's other interface, with statistics."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(64, K, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x.reshape(len(x), -1)))


def nnx_model():
    model, params, model_state = models.from_nnx(NNXNetwork(nnx.Rngs(0)))
    return model.apply, params, model_state


def bare_function():
    def model_fn(params, model_state, x, train, key):
        return x.reshape(len(x), -1) @ params, model_state

    return model_fn, jnp.zeros((64, K)), {}


@pytest.mark.parametrize("make", [nnx_model, bare_function])
def test_a_model_of_another_kind_trains_and_is_attacked_as_well(make):
    model_fn, params, model_state = make()
    optimizer = optax.adam(0.02)
    step = jax.jit(train_step(model_fn, OBJECTIVES["madry"], optimizer))
    state = create_state(params, model_state, optimizer, KEY)
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    logits_fn = models.eval_logits(model_fn, state.params, state.model_state)
    x, y = BATCH["image"], BATCH["label"]
    x_adv = jax.jit(lambda x: pgd(THREAT, steps=5)(logits_fn, KEY, x, y))(x)
    assert bool(THREAT.contains(x_adv, x).all())
    assert float(cross_entropy(logits_fn(x_adv), y).mean()) > float(
        cross_entropy(logits_fn(x), y).mean()
    )


def computations(hlo):
    """Name to text of every computation of a compiled program."""
    parts = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", hlo)
    return {re.match(r"(?:ENTRY )?%?([\w.\-]+)", part)[1]: part for part in parts}


@pytest.fixture(scope="module")
def compiled_step():
    """A PGD step of a convolutional network with BatchNorm on eight devices, as HLO."""
    model = models.from_linen(Normalized())
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = train_step(model.apply, madry(pgd(THREAT, steps=3)), optimizer, axis_name=parallel.AXIS)
    mesh = parallel.device_mesh()
    mapped = parallel.parallel(
        step,
        mesh,
        in_specs=(parallel.REPLICATED, parallel.SPLIT),
        out_specs=(parallel.REPLICATED, parallel.REPLICATED),
    )
    state = create_state(*model.init(KEY, BATCH["image"]), optimizer, KEY)
    state = parallel.replicate(state, mesh)
    return mapped.lower(state, parallel.split(BATCH, mesh)).compile().as_text()


def test_one_all_reduce_and_none_inside_the_attack(compiled_step):
    collectives = re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled_step,
    )
    assert collectives == ["all-reduce"]
    holders = [name for name, text in computations(compiled_step).items() if " all-reduce" in text]
    bodies = re.findall(r"body=%?([\w.\-]+)", compiled_step)
    assert bodies  # the attack is a loop
    assert not set(holders) & set(bodies)
    assert f"ENTRY %{holders[0]}" in compiled_step or f"ENTRY {holders[0]}" in compiled_step


def test_several_steps_are_steps_in_a_row():
    step = train_step(MLP.apply, OBJECTIVES["noise"], OPTIMIZERS["adam"])
    rows = jnp.arange(24).reshape(3, 8)
    arrays = {"image": jnp.array(IMAGES), "label": jnp.array(LABELS)}
    batches = [data.take(arrays, row) for row in rows]
    state, losses = fresh(OPTIMIZERS["adam"]), []
    single = jax.jit(step)
    for batch in batches:
        state, metrics = single(state, batch)
        losses.append(metrics["loss"])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    at_once, metrics = jax.jit(several_steps(step))(fresh(OPTIMIZERS["adam"]), stacked)
    assert_trees_close(without_key(at_once), without_key(state), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    resident, _ = jax.jit(several_resident_steps(step, data.take))(
        fresh(OPTIMIZERS["adam"]), arrays, rows
    )
    assert_trees_close(without_key(resident), without_key(at_once), rtol=1e-5, atol=1e-7)


def test_resident_and_streamed_data_train_alike():
    mesh = parallel.device_mesh(jax.devices()[:4])
    step = train_step(MLP.apply, OBJECTIVES["noise"], OPTIMIZERS["sgd"], axis_name=parallel.AXIS)
    order = np.concatenate([data.epoch_batches(KEY, epoch, 40, 8) for epoch in (0, 1)])
    arrays = {"image": jnp.array(IMAGES), "label": jnp.array(LABELS)}

    def batches_from(start):
        for row in order[start:]:
            yield jax.tree.map(np.asarray, data.take(arrays, jnp.array(row)))

    resident = feed.resident(step, DATASET, key=KEY, batch_size=8, mesh=mesh)
    streamed = feed.streamed(step, batches_from, steps_per_epoch=5, mesh=mesh)
    a, b = (parallel.replicate(fresh(), mesh) for _ in range(2))
    # 64 inputs, 8 units, 3 classes: forward, gradients for the weights and for the units.
    flops = 2 * 8 * (2 * (64 * 8 + 8 * 3) + 8 * 3)
    costs = [resident.cost(a, 3), streamed.cost(b, 3), streamed.cost(b, 2)]
    assert [cost.flops for cost in costs] == [flops] * 3
    for epoch, first, count in [(0, 0, 3), (0, 3, 2), (1, 0, 3)]:
        a, metrics = resident(a, epoch, first, count)
        b, _ = streamed(b, epoch, first, count)
        assert metrics["loss"].shape == (count,)
    assert_trees_close(without_key(b), without_key(a), rtol=1e-5, atol=1e-6)
    # From a position in the middle the stream starts anew and goes on alike.
    c = parallel.replicate(fresh(), mesh)
    for epoch, first, count in [(0, 0, 3), (0, 3, 2)]:
        c, _ = resident(c, epoch, first, count)
    c, _ = feed.streamed(step, batches_from, steps_per_epoch=5, mesh=mesh)(c, 1, 0, 3)
    assert_trees_close(without_key(c), without_key(a), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_program_that_was_counted_is_not_traced_again(split, streams):
    mesh, traced, read = parallel.device_mesh(jax.devices()[:2]), [], []

    def model_fn(*arguments):
        traced.append(1)
        return MLP.apply(*arguments)

    axis = None if split else parallel.AXIS
    step = train_step(model_fn, OBJECTIVES["standard"], OPTIMIZERS["sgd"], axis_name=axis)
    state = fresh()
    specs = parallel.shard_specs(state, mesh) if split else None

    def batches_from(start):
        for number in itertools.count(start):
            read.append(number)
            yield {"image": IMAGES[:8], "label": LABELS[:8], "index": np.arange(8)}

    advance = (
        feed.streamed(step, batches_from, steps_per_epoch=5, mesh=mesh, state_specs=specs)
        if streams
        else feed.resident(step, DATASET, key=KEY, batch_size=8, mesh=mesh, state_specs=specs)
    )
    state = parallel.place(state, mesh, specs)
    assert advance.cost(state, 2).flops == 2 * 8 * (2 * (64 * 8 + 8 * 3) + 8 * 3)
    before = len(traced)
    advance(state, 0, 0, 2)
    assert len(traced) == before > 0
    assert read == ([0, 1] if streams else [])


def test_a_scheduled_objective_sees_the_step():
    """With a radius of 0 up to step 2 it is standard training up to there, and not after."""
    radius = optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(0.3)], [2])
    warm = scheduled(lambda eps: madry(pgd(ThreatModel(LInf(), eps), steps=2)), radius)
    plain = single_step("standard")
    grown = jax.jit(train_step(MLP.apply, warm, OPTIMIZERS["sgd"]))
    a, b, gaps = fresh(), fresh(), []
    for _ in range(3):
        a, left = plain(a, BATCH)
        b, right = grown(b, BATCH)
        gaps.append(float(right["loss"] - left["loss"]))
    np.testing.assert_allclose(gaps[:2], 0, atol=1e-6)
    assert gaps[2] > 0.05


def test_batch_statistics_are_averaged_or_synchronised():
    """Replicas end equal; with ``axis_name`` in the model the step is that of one device."""
    brightness = jnp.where(jnp.arange(N) < N // 2, 1.0, 0.2)  # the halves differ
    batch = {**BATCH, "image": BATCH["image"] * brightness[:, None, None, None]}

    plain = models.from_linen(Normalized())
    start = create_state(*jax.jit(plain.init)(KEY, BATCH["image"]), optax.sgd(0.1), KEY)
    single, _ = jax.jit(train_step(plain.apply, standard(), optax.sgd(0.1)))(start, batch)

    def on_two_devices(axis_name):
        model = models.from_linen(Normalized(axis_name=axis_name))
        mesh = parallel.device_mesh(jax.devices()[:2])
        step = train_step(model.apply, standard(), optax.sgd(0.1), axis_name=parallel.AXIS)
        mapped = parallel.parallel(
            step,
            mesh,
            in_specs=(parallel.REPLICATED, parallel.SPLIT),
            out_specs=(parallel.REPLICATED, parallel.REPLICATED),
        )
        many, _ = mapped(parallel.replicate(start, mesh), parallel.split(batch, mesh))
        copies = [shard.data for shard in jax.tree.leaves(many.model_state)[0].addressable_shards]
        np.testing.assert_array_equal(copies[0], copies[1])
        return many

    synchronised = on_two_devices(parallel.AXIS)
    assert_trees_close(synchronised.params, single.params, rtol=1e-3, atol=1e-5)
    assert_trees_close(synchronised.model_state, single.model_state, rtol=1e-3, atol=1e-5)
    separate = on_two_devices(None)
    gaps = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), separate.model_state, single.model_state
    )
    assert max(jax.tree.leaves(gaps)) > 1e-4


def test_trained_states_need_one_gradient_of_every_parameter():
    state, metrics = single_step("madry")(fresh(), BATCH)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, PARAMS)
    assert all(jax.tree.leaves(moved))
    assert float(metrics["grad_norm"]) > 0


def test_streamed_integers_become_the_same_floats_on_the_device():
    """The same bits, whether the host or the device makes uint8 images float32."""

    def step(state, batch):
        return state._replace(step=state.step + 1), {"grad_norm": 0.0, "seen": batch["image"]}

    mesh, seen, dtypes = parallel.device_mesh(jax.devices()[:1]), [], []
    for to_float in (True, False):

        def batches_from(start, to_float=to_float):
            for batch in data.host_batches(
                DATASET, batch_size=8, seed=0, start_step=start, to_float=to_float, num_threads=0
            ):
                dtypes.append(batch["image"].dtype)
                yield batch

        advance = feed.streamed(step, batches_from, steps_per_epoch=5, mesh=mesh)
        _, metrics = advance(parallel.replicate(fresh(), mesh), 0, 0, 2)
        seen.append(np.asarray(metrics["seen"]))
    assert dtypes == [np.float32] * 2 + [np.uint8] * 2
    assert seen[1].dtype == np.float32
    np.testing.assert_array_equal(*seen)


def test_the_next_batches_are_placed_before_the_last_steps_are_waited_for():
    events = []
    mesh = parallel.device_mesh(jax.devices()[:1])
    step = train_step(MLP.apply, standard(), OPTIMIZERS["sgd"], axis_name=parallel.AXIS)

    def batches_from(start):
        for batch in data.host_batches(DATASET, batch_size=8, seed=0, start_step=start):
            events.append("read")
            yield batch

    advance = feed.streamed(step, batches_from, steps_per_epoch=5, mesh=mesh)
    fit(
        parallel.replicate(fresh(), mesh),
        advance,
        epochs=1,
        steps_per_epoch=5,
        dispatch=2,
        on_dispatch=lambda step, metrics: events.append(step),
    )
    # Two dispatches of two steps and one of one; the metrics of one come after the reading of the
    # next one.
    assert events == ["read"] * 4 + [2] + ["read"] + [4, 5]
