"""What parallelism costs, read off compiled programs: bytes between devices, memory on each."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import data, gradients, models, objectives, parallel, training
from robustjax.attacks import pgd
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import checkpoint, feed

KEY = jax.random.key(0)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
THREAT = ThreatModel(LInf(), 0.1)
MODEL = models.from_linen(models.MLP((256,), num_classes=4))
STATISTICS = {"separate": None, "synchronised": parallel.AXIS}
REPLICATED, SPLIT = parallel.REPLICATED, parallel.SPLIT
LAYERS, CHANNELS = 2, 8


class Network(nn.Module):
    """Convolutions with BatchNorm."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        for i in range(LAYERS):
            x = nn.Conv(CHANNELS, (3, 3), use_bias=False, name=f"conv{i}")(x)
            across = {"axis_name": self.axis_name, "name": f"norm{i}"}
            x = nn.relu(models.feature_norm("batch", x, train=train, **across))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def batch_of(examples, size):
    return {
        "image": np.random.default_rng(0).random((examples, size, size, 3), np.float32),
        "label": np.arange(examples, dtype=np.int32) % 4,
        "index": np.arange(examples, dtype=np.int32),
    }


BATCH = batch_of(64, 12)


def madry(steps, attack_mode="eval"):
    attack = pgd(THREAT, steps=steps, step_size=0.05)
    return objectives.madry(attack, attack_mode=attack_mode)


class Method(NamedTuple):
    made: Callable  # of attack steps: objective and oracle
    scalars: str  # that are averaged over the devices, float32 each
    passes: int = 2  # through the network in training mode, forward and backward, attack aside


def penalized(penalty, **options):
    return lambda steps: (objectives.penalized(madry(steps), penalty, **options), None)


METHODS = {
    "standard": Method(lambda steps: (objectives.standard(), None), "loss accuracy"),
    "madry": Method(lambda steps: (madry(steps), None), "loss robust_accuracy"),
    "madry in training mode": Method(
        lambda steps: (madry(steps, "train"), None), "loss robust_accuracy"
    ),
    # Clean and adversarial inputs, for the ascent of AWP and for the update.
    "trades with awp": Method(
        lambda steps: (
            objectives.trades(objectives.trades_attack(THREAT, steps=steps)),
            gradients.awp(0.01, axis_name=parallel.AXIS),
        ),
        "loss accuracy robust_accuracy divergence",
        passes=2 * 2 * 2,
    ),
    "engm": Method(
        lambda steps: (madry(steps), gradients.engm(0.5)),
        "loss robust_accuracy weight parameter_norm",
    ),
    # Slope and intercept of the regression are in the state, and equal on all devices before.
    "a_engm": Method(
        lambda steps: (madry(steps), gradients.a_engm(0.5, tau=2, axis_name=parallel.AXIS)),
        "loss robust_accuracy weight input_norm predicted_norm slope intercept",
    ),
    # SOAR and GradAlign attack with one step; here, like the others, with as many as asked for.
    # Gradients for the input at two points, two passes each, and as many for the derivative of
    # these for the parameters; the loss shares those at the first point.
    "soar": Method(
        penalized(objectives.soar(0.05), weight=0.1, at="adversarial"),
        "loss robust_accuracy penalty",
        passes=4 + 4,
    ),
    # One such gradient, one that is held constant, and the loss at a third point.
    "grad_align": Method(
        penalized(objectives.grad_align(THREAT.eps), weight=0.2),
        "loss robust_accuracy penalty",
        passes=4 + 2 + 2,
    ),
}


def state_of(model, batch=BATCH, oracle=None):
    params, model_state = jax.jit(lambda x: model.init(KEY, x))(batch["image"][:1])
    return training.create_state(params, model_state, OPTIMIZER, KEY, oracle=oracle)


@functools.cache
def mapped_step(method, statistics, attack_steps, devices=8, examples=16, outer_steps=None):
    """A step, or several in one dispatch, over so many devices, and shapes of its arguments."""
    objective, oracle = METHODS[method].made(attack_steps)
    model_fn = models.from_linen(Network(STATISTICS[statistics])).apply
    axis, batch, spec = parallel.AXIS, batch_of(examples, 8), SPLIT
    # Parameters need no axis; outside of the mesh there is none.
    init = functools.partial(state_of, models.from_linen(Network()), oracle=oracle)
    state = jax.eval_shape(init, batch)
    step = training.train_step(model_fn, objective, OPTIMIZER, oracle=oracle, axis_name=axis)
    if outer_steps:
        step, spec = training.several_steps(step), parallel.SPLIT_SECOND
        batch = {name: np.stack([value] * outer_steps) for name, value in batch.items()}
    mesh = parallel.device_mesh(jax.devices()[:devices])
    specs, results = (REPLICATED, spec), (REPLICATED, REPLICATED)
    mapped = parallel.parallel(step, mesh, in_specs=specs, out_specs=results)

    def shapes(tree, spec):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        return jax.tree.map(lambda x: shape(x.shape, x.dtype), tree)

    return mapped, tuple(map(shapes, (state, batch), specs))


@functools.cache
def compiled(*which, **options):
    mapped, arguments = mapped_step(*which, **options)
    return quickly_compiled(mapped, *arguments)


def quickly_compiled(fn, *arguments):
    """The usual collectives, loops and (up to some bytes) buffers; the code is not optimised."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return fn.lower(*arguments).compile(options)


def operations(program):
    """Each operation of a compiled program, a line, and the number of loops around it."""
    computations, entry, lines = {}, None, []
    for line in program.as_text().splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    depth = {}

    def visit(name, loops):
        if depth.get(name, -1) >= loops:
            return
        depth[name] = loops
        for line in computations[name]:
            for named in re.findall(r"=(%[\w.-]+|\{%[^}]*\})", line):
                for other in re.findall(r"%([\w.-]+)", named):
                    if other in computations:
                        visit(other, loops + (" while(" in line))

    visit(entry, 0)
    # One that is not found from the entry is an error, not one without loops.
    return [(line, depth[name]) for name, lines in computations.items() for line in lines]


class Collective(NamedTuple):
    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of the float32 results
    loops: int  # around it

    @property
    def bytes(self):
        return sum(4 * math.prod(shape) for shape in self.shapes)


def collectives(program):
    """What goes between devices in a compiled program."""
    kinds = "all-reduce|all-gather|(?:ragged-)?all-to-all|reduce-scatter|collective-[a-z]+"
    found = []
    for line, loops in operations(program):
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            assert {dtype for dtype, _ in arrays} == {"f32"}
            shapes = [tuple(int(n) for n in shape.split(",") if n) for _, shape in arrays]
            found.append(Collective(match[2], tuple(shapes), loops))
    return found


def loops_around_the_network(program):
    """The most loops around a product with a kernel."""
    product = re.compile(r" (dot|convolution)\(")
    return max(loops for line, loops in operations(program) if product.search(line))


def reduced_by(method):
    """Shapes in the all-reduce that all methods have, and those in each that this one adds."""
    state = mapped_step(method, "separate", 5)[1][0]
    arrays = [x.shape for x in jax.tree.leaves((state.params, state.model_state))]
    arrays += [()] * len(METHODS[method].scalars.split())
    added = {
        # The ascent direction is that of the whole batch. It moves kernels only; XLA drops what is
        # not used, the gradients of biases and scales.
        "trades with awp": [[x.shape for x in jax.tree.leaves(state.params) if x.ndim > 1]],
        # The regression over the whole batch: two means, then variance and covariance about them;
        # in a conditional, so that the steps without a regression go without.
        "a_engm": [[(), ()], [(), ()]],
    }
    return arrays, added.get(method, [])


def assert_same_arrays(found, expected):
    """The same lists of shapes, in any order."""
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


@pytest.mark.parametrize("attack_steps", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reduces_its_gradients_once(method, attack_steps):
    """With all else that is averaged; and nothing in a loop, for any number of attack steps."""
    program = compiled(method, "separate", attack_steps)
    found, (common, added) = collectives(program), reduced_by(method)
    assert {(c.kind, c.loops) for c in found} == {("all-reduce", 0)}
    assert_same_arrays([c.shapes for c in found], [common, *added])
    state = mapped_step(method, "separate", attack_steps)[1][0]
    averaged = training.tree_bytes((state.params, state.model_state))
    assert max(c.bytes for c in found) == averaged + 4 * len(METHODS[method].scalars.split())
    # There are loops to look into; XLA unrolls those of one step.
    assert loops_around_the_network(program) == (attack_steps > 1 and method != "standard")


@pytest.mark.parametrize("method", METHODS)
def test_synchronised_statistics_are_reduced_in_every_pass_in_training_mode(method):
    """In each layer its two statistics at once, and their derivatives; in attacks if they train."""
    program = compiled(method, "synchronised", 5)
    found, (common, added) = collectives(program), reduced_by(method)
    assert {c.kind for c in found} == {"all-reduce"}
    # XLA joins the reductions of passes that do not wait for one another, and AWP's with them; what
    # is averaged at the end of the step stays on its own.
    (last,) = [c for c in found if sorted(c.shapes) == sorted(common)]
    others = [shape for c in found if c is not last and not c.loops for shape in c.shapes]
    statistics = [(2, CHANNELS)] * LAYERS
    expected = [*itertools.chain(*added), *statistics * METHODS[method].passes]
    assert sorted(others) == sorted(expected)
    in_attack = [shape for c in found if c.loops for shape in c.shapes]
    assert in_attack == (2 * statistics if method == "madry in training mode" else [])


@pytest.mark.parametrize("devices", [2, 8])
def test_neither_devices_nor_examples_change_what_is_reduced(devices):
    (found,) = collectives(compiled("madry", "separate", 5, devices=devices, examples=256))
    assert [found] == collectives(compiled("madry", "separate", 5))


def test_several_steps_in_one_dispatch_reduce_once_each():
    """Inside the loop of outer steps, and outside of that of the attack."""
    program = compiled("madry", "separate", 5, outer_steps=3)
    (found,), (once,) = collectives(program), collectives(compiled("madry", "separate", 5))
    assert found == once._replace(loops=1)
    assert loops_around_the_network(program) == 2


@pytest.mark.parametrize("loops", [0, 1, 2])
def test_a_collective_in_loops_is_found(loops):
    """Also in a conditional in them."""

    def reduced(x):
        def some(x):
            return jax.lax.psum(jnp.sin(x), parallel.AXIS)

        return jax.lax.cond(x.sum() > 0, some, lambda x: x, x)

    def looped(x, loops):
        if not loops:
            return reduced(x)
        return jax.lax.scan(lambda x, _: (looped(x, loops - 1), None), x, length=3)[0]

    fn = functools.partial(looped, loops=loops)
    mapped = parallel.parallel(fn, parallel.device_mesh(), in_specs=SPLIT, out_specs=SPLIT)
    found = collectives(quickly_compiled(mapped, jnp.ones((16, 3))))
    assert found == [Collective("all-reduce", ((2, 3),), loops)]


def test_memory_of_a_device_is_its_share_of_the_batch():
    """What a step needs beside the state: activations, which outweigh these parameters."""
    shares = {}
    for devices in (1, 2, 4, 8):
        which = {"devices": devices, "examples": 256}
        mapped, arguments = mapped_step("madry", "separate", 5, **which)
        needed = compiled("madry", "separate", 5, **which).memory_analysis()
        state, batch = map(training.tree_bytes, arguments)
        temporary, parameters = needed.temp_size_in_bytes, training.tree_bytes(arguments[0].params)
        assert abs(needed.argument_size_in_bytes - state - batch / devices) < 200
        # The estimate fuses nothing.
        held = needed.argument_size_in_bytes + needed.output_size_in_bytes + temporary
        assert held < training.peak_bytes(mapped, *arguments) < 2 * held
        assert temporary > 100 * parameters
        shares[devices] = devices * (temporary - parameters)
    assert shares == pytest.approx(dict.fromkeys(shares, shares[1]), rel=0.05)


@pytest.mark.parametrize(
    "network, at_least, in_attack",
    [(Network(), 200, False), (models.MLP((256, 256), num_classes=4), 2**14, True)],
)
def test_what_a_sharded_state_moves_depends_on_the_network(network, at_least, in_attack):
    """The compiler decides. It gathers kernels of convolutions, for each pass, before the attack.

    Between dense layers it divides features as well as examples, and then the attack moves
    activations in every step.
    """
    model, mesh = models.from_linen(network), parallel.device_mesh()
    state = jax.eval_shape(functools.partial(state_of, model), BATCH)
    specs = parallel.shard_specs(state, mesh, at_least=at_least)
    step = training.train_step(model.apply, madry(5), OPTIMIZER)
    given, results = (specs, SPLIT), (specs, REPLICATED)
    divided = parallel.automatic(step, mesh, in_specs=given, out_specs=results)
    program = quickly_compiled(divided, state, BATCH)
    found = collectives(program)
    assert loops_around_the_network(program) == 1
    assert any(c.loops for c in found) == in_attack
    if not in_attack:
        kernels = [x.shape for x in jax.tree.leaves(state.params) if x.size >= at_least]
        assert len(kernels) == LAYERS
        gathered = [shape for c in found if c.kind == "all-gather" for shape in c.shapes]
        reduced = [shape for c in found if c.kind == "all-reduce" for shape in c.shapes]
        assert {*gathered} == {*kernels}
        # Gradients are reduced whole, and then each device keeps its share.
        assert sorted(shape for shape in reduced if shape in kernels) == sorted(kernels)


@pytest.fixture(scope="module")
def sharded():
    """A step of a wide residual network whose state is split over eight devices, and on one."""
    model = models.from_linen(models.WideResNet(10, 2, num_classes=4))
    batch = {name: value[:16] for name, value in BATCH.items()}
    step = training.train_step(model.apply, objectives.standard(), OPTIMIZER)
    state = state_of(model, batch)
    mesh = parallel.device_mesh()
    specs = parallel.shard_specs(state, mesh, at_least=1024)
    given, results = (specs, SPLIT), (specs, REPLICATED)
    program = parallel.automatic(step, mesh, in_specs=given, out_specs=results)
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
