"""What parallelism costs, read off compiled programs: bytes between devices, memory on each."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import data, models, objectives, parallel, training
from robustjax.attacks import pgd
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import checkpoint, feed

KEY = jax.random.key(0)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
THREAT = ThreatModel(LInf(), 0.1)
BATCH = {
    "image": np.random.default_rng(0).random((64, 12, 12, 3), np.float32),
    "label": np.arange(64, dtype=np.int32) % 4,
    "index": np.arange(64, dtype=np.int32),
}
MODEL = models.from_linen(models.MLP((256,), num_classes=4))


def state_of(model, batch=BATCH):
    params, model_state = jax.jit(lambda x: model.init(KEY, x))(batch["image"][:1])
    return training.create_state(params, model_state, OPTIMIZER, KEY)


@functools.cache
def compiled(devices, attack_steps):
    """The step on so many devices, for one global batch, and what it is estimated to hold."""
    objective = objectives.madry(pgd(THREAT, steps=attack_steps))
    step = training.train_step(MODEL.apply, objective, OPTIMIZER, axis_name=parallel.AXIS)
    mesh = parallel.device_mesh(jax.devices()[:devices])
    mapped = parallel.parallel(
        step,
        mesh,
        in_specs=(parallel.REPLICATED, parallel.SPLIT),
        out_specs=(parallel.REPLICATED, parallel.REPLICATED),
    )
    state = parallel.replicate(state_of(MODEL), mesh)
    arguments = (state, parallel.split(BATCH, mesh))
    return mapped.lower(*arguments).compile(), training.peak_bytes(mapped, *arguments)


def all_reduced_bytes(program):
    """Bytes of the results of each all-reduce of float32 arrays."""
    found = []
    for results in re.findall(r"= (.*?) all-reduce(?:-start)?\(", program.as_text()):
        assert re.findall(r"[a-z]+\d+(?=\[)", results).count("f32") == results.count("[")
        shapes = re.findall(r"f32\[([\d,]*)\]", results)
        found.append(sum(4 * int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes))
    return found


@pytest.mark.parametrize("devices, attack_steps", [(8, 1), (8, 5), (2, 5)])
def test_a_step_moves_its_parameters_once(devices, attack_steps):
    """One all-reduce: gradients, and two float32 metrics; no more for more attack steps."""
    metrics = 2  # loss and robust accuracy
    expected = training.tree_bytes(state_of(MODEL).params) + 4 * metrics
    program, _ = compiled(devices, attack_steps)
    assert all_reduced_bytes(program) == [expected]
    others = " (all-gather|reduce-scatter|all-to-all|collective-permute)"
    assert not re.search(others, program.as_text())


def test_memory_of_a_device_falls_with_its_share_of_the_batch():
    """What a step needs beside the state: activations of 32 and 8 examples."""
    needed = {devices: compiled(devices, 5)[0].memory_analysis() for devices in (2, 8)}
    temporary = {n: analysis.temp_size_in_bytes for n, analysis in needed.items()}
    examples = {n: analysis.argument_size_in_bytes for n, analysis in needed.items()}
    state = training.tree_bytes(state_of(MODEL))
    batch = training.tree_bytes({k: jnp.asarray(v) for k, v in BATCH.items()})
    for devices in (2, 8):
        assert abs(examples[devices] - state - batch / devices) < 200
        # The estimate fuses nothing, the optimizer's update of these wide layers for one.
        held = examples[devices] + needed[devices].output_size_in_bytes + temporary[devices]
        assert 0.5 * held < compiled(devices, 5)[1] < 2 * held
    assert temporary[8] < temporary[2]


@pytest.fixture(scope="module")
def sharded():
    """A step of a wide residual network whose state is split over eight devices, and on one."""
    model = models.from_linen(models.WideResNet(10, 2, num_classes=4))
    batch = {name: value[:16] for name, value in BATCH.items()}
    step = training.train_step(model.apply, objectives.standard(), OPTIMIZER)
    state = state_of(model, batch)
    mesh = parallel.device_mesh()
    specs = parallel.shard_specs(state, mesh, at_least=1024)
    program = parallel.automatic(
        step,
        mesh,
        in_specs=(specs, parallel.SPLIT),
        out_specs=(specs, parallel.REPLICATED),
    )
    arguments = (parallel.place(state, mesh, specs), parallel.split(batch, mesh))
    program = program.lower(*arguments).compile()
    return program, program(*arguments), jax.jit(step)(state, batch), state


def test_a_sharded_state_takes_the_step_of_one_device(sharded):
    _, (many, many_metrics), (one, one_metrics), _ = sharded
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=1e-4)


def test_a_device_holds_an_eighth_of_a_sharded_state(sharded):
    program, (many, _), _, state = sharded
    whole = training.tree_bytes(state)
    held = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves((many.params, many.opt_state))
    )
    assert held < 0.15 * whole
    assert program.memory_analysis().argument_size_in_bytes < 0.2 * whole


def test_a_feed_trains_a_sharded_state_as_a_replicated_one(tmp_path):
    """And its checkpoint goes back to where it was."""
    mesh, ends = parallel.device_mesh(), {}
    dataset = data.Dataset(BATCH["image"], BATCH["label"], 4, "noise")
    for axis in (parallel.AXIS, None):
        objective = objectives.madry(pgd(THREAT, steps=2))
        step = training.train_step(MODEL.apply, objective, OPTIMIZER, axis_name=axis)
        state = state_of(MODEL)
        specs = None if axis else parallel.shard_specs(state, mesh)
        advance = feed.resident(step, dataset, key=KEY, batch_size=16, mesh=mesh, state_specs=specs)
        start = parallel.place(state, mesh, specs)
        ends[axis], _ = advance(start, 0, 0, 3)
    many, one = ends[None], ends[parallel.AXIS]
    assert not many.params["dense1"]["kernel"].is_fully_replicated
    for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with checkpoint.open_checkpoints(tmp_path, best_metric=None) as manager:
        checkpoint.save(manager, many)
        checkpoint.wait(manager)
        restored = checkpoint.restore(manager, many)
    for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(restored.params), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding


def test_small_and_odd_arrays_stay_whole():
    mesh = parallel.device_mesh()
    shapes = {"kernel": (3, 3, 16, 32), "equal": (64, 64), "odd": (63, 65), "bias": (32,)}
    specs = parallel.shard_specs({k: jnp.zeros(s) for k, s in shapes.items()}, mesh, at_least=64)
    P = jax.sharding.PartitionSpec
    assert specs == {
        "kernel": P(None, None, None, "data"),
        "equal": P(None, "data"),
        "odd": P(),
        "bias": P(),
    }
    with pytest.raises(ValueError, match="at_least must be"):
        parallel.shard_specs({}, mesh, at_least=0)
