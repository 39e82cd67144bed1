"""The loop, checkpoints, evaluation and what a run leaves behind."""

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import data, models, parallel
from robustjax.attacks import fgsm, pgd
from robustjax.norms import L2, LInf
from robustjax.objectives import madry
from robustjax.threat import ThreatModel
from robustjax.training import (
    adversarial_panel,
    checkpoint,
    count_flops,
    create_state,
    feed,
    figures,
    fit,
    interruption,
    make_evaluator,
    parameter_count,
    progress,
    report,
    steps_per_dispatch,
    train_step,
)

RNG = np.random.default_rng(0)
K = 3
IMAGES = RNG.uniform(size=(44, 4, 4, 1)).astype(np.float32)
LABELS = RNG.integers(0, K, 44).astype(np.int32)
DATASET = data.Dataset(IMAGES, LABELS, K, "noise")
KEY = jax.random.key(0)
MODEL = models.from_linen(models.MLP(features=(8,), num_classes=K))
OPTIMIZER = optax.adam(1e-2)
THREAT = ThreatModel(LInf(), 0.1)


def fresh(mesh):
    params, model_state = MODEL.init(KEY, jnp.zeros((1, 4, 4, 1)))
    return parallel.replicate(create_state(params, model_state, OPTIMIZER, KEY), mesh)


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state._replace(key=0))]


def assert_same_bits(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def run():
    """``run(state, epochs, ...)``: 5 steps an epoch, two a dispatch, on two devices."""
    mesh = parallel.device_mesh(jax.devices()[:2])
    step = train_step(MODEL.apply, madry(pgd(THREAT, steps=2)), OPTIMIZER, axis_name=parallel.AXIS)
    advance = feed.resident(step, DATASET, key=KEY, batch_size=8, mesh=mesh)

    def run(state=None, epochs=3, **callbacks):
        state = fresh(mesh) if state is None else state
        return fit(state, advance, epochs=epochs, steps_per_epoch=5, dispatch=2, **callbacks)

    run.mesh, run.advance = mesh, advance
    return run


def test_the_loop_calls_in_order_and_counts(run):
    calls = []
    state = run(
        epochs=2,
        on_dispatch=lambda step, metrics: calls.append((step, len(metrics["loss"]))),
        on_epoch=lambda epoch, state: calls.append(("epoch", epoch, int(state.step))),
    )
    first = [(2, 2), (4, 2), (5, 1), ("epoch", 1, 5)]
    assert calls == [*first, (7, 2), (9, 2), (10, 1), ("epoch", 2, 10)]
    assert int(state.step) == 10
    assert run(state, epochs=2) is state  # nothing left to do


def test_the_same_bits_again_and_after_an_interruption(run, tmp_path):
    """Two runs agree; so does one that stops after 7 steps and goes on from its checkpoint."""
    whole = run()
    assert_same_bits(run(), whole)

    class Stop(Exception):
        pass

    with checkpoint.open_checkpoints(tmp_path, best_metric="loss", best_mode="min") as manager:
        losses = []

        def interrupt(step, metrics):
            losses.append(float(metrics["loss"][-1]))
            if step == 7:
                raise Stop

        def save(epoch, state):
            checkpoint.save(manager, state, {"loss": losses[-1]})

        with pytest.raises(Stop):
            run(on_dispatch=interrupt, on_epoch=save)
        manager.wait_until_finished()
        assert manager.latest_step() == 5
        restored = checkpoint.restore(manager, fresh(run.mesh))
        assert int(restored.step) == 5
        assert restored.key == KEY
    assert_same_bits(run(restored), whole)
    # From the middle of an epoch as well.
    middle = fresh(run.mesh)
    for first, count in [(0, 2), (2, 1)]:
        middle, _ = run.advance(middle, 0, first, count)
    assert_same_bits(run(middle), whole)


def test_a_run_that_is_told_to_end_has_a_state_to_go_on_from(run):
    seen, states = [], []
    state = run(
        on_dispatch=lambda step, metrics: seen.append(step),
        on_state=lambda step, state: states.append((step, int(state.step))),
        should_stop=lambda step: step >= 7,
    )
    assert int(state.step) == 7
    assert seen == [2, 4, 5, 7]
    assert states == [(step, step) for step in seen]
    assert_same_bits(run(state), run())


def test_sigterm_is_watched_for_and_then_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with interruption.watch() as should_stop:
        assert not should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop(2)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("harm", ["cut off", "altered", "gone", "metric"])
def test_the_newest_checkpoint_that_can_be_read_is_used(run, tmp_path, harm, capsys):
    state, folder = fresh(run.mesh), tmp_path / "checkpoints"
    between = tmp_path / "between"

    def opened():
        return (
            checkpoint.open_checkpoints(folder, best_metric="pgd"),
            checkpoint.open_checkpoints(between, best_metric=None),
        )

    for manager, steps in zip(opened(), [(1, 4), (2,)], strict=True):
        with manager:
            assert checkpoint.restore_latest([manager], state) is None
            for step in steps:
                metrics = {"pgd": 0.1} if len(steps) > 1 else None
                checkpoint.save(manager, state._replace(step=jnp.int32(step)), metrics)
            checkpoint.wait(manager)
    root = folder / "4" / ("metrics" if harm == "metric" else "default")
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_size:
            data = bytearray(path.read_bytes())
            middle = len(data) // 2
            data[middle] ^= 0x10
            path.write_bytes(bytes(data if harm == "altered" else data[:middle]))
            if harm == "gone":
                path.unlink()
    one, two = opened()
    with one, two:
        restored = checkpoint.restore_latest([one, two], state)
        assert int(restored.step) == 2
        assert f"checkpoint {folder}/4 is damaged" in capsys.readouterr().err
        assert (tmp_path / "checkpoints-damaged" / "4").is_dir()
        checkpoint.save(one, state._replace(step=jnp.int32(4)), {"pgd": 0.3})
        checkpoint.wait(one)
        assert int(checkpoint.restore_latest([one, two], state).step) == 4


def test_values_that_changed_on_the_disk_are_seen(run, tmp_path, monkeypatch):
    """Also where the storage library reads them without complaint."""
    state = fresh(run.mesh)
    with checkpoint.open_checkpoints(tmp_path, best_metric=None) as manager:
        checkpoint.save(manager, state)
        checkpoint.wait(manager)
        read = manager.restore

        def altered(step, args):
            stored = read(step, args=args)
            stored.params["head"]["bias"] = jnp.nextafter(stored.params["head"]["bias"], 1.0)
            return stored

        monkeypatch.setattr(manager, "restore", altered)
        with pytest.raises(ValueError, match="check sums"):
            checkpoint.restore(manager, state)


@pytest.mark.parametrize(
    "steps, limit, expected", [(40, 50, 40), (40, 7, 5), (390, 50, 39), (7, 5, 1), (1, 1, 1)]
)
def test_dispatches_have_one_shape(steps, limit, expected):
    assert steps_per_dispatch(steps, limit) == expected


def test_the_best_and_the_last_checkpoints_are_kept(run, tmp_path):
    state = fresh(run.mesh)
    accuracies = [0.1, 0.9, 0.3, 0.4, 0.2, 0.1]
    with checkpoint.open_checkpoints(tmp_path, best_metric="pgd", keep_last=2) as manager:
        for step, accuracy in enumerate(accuracies, start=1):
            stepped = state._replace(step=jnp.int32(step))
            checkpoint.save(manager, stepped, {"pgd": accuracy})
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [2, 5, 6]
        assert manager.best_step() == 2
        assert_same_bits(
            checkpoint.restore(manager, state, step=2), state._replace(step=jnp.int32(2))
        )
        with pytest.raises(ValueError, match="no checkpoint of step 3"):
            checkpoint.restore(manager, state, step=3)


def test_a_damaged_or_foreign_checkpoint_is_refused(run, tmp_path):
    state = fresh(run.mesh)
    with checkpoint.open_checkpoints(tmp_path, best_metric="pgd") as manager:
        checkpoint.save(manager, state, {"pgd": 0.5})
        manager.wait_until_finished()
        wider = models.from_linen(models.MLP(features=(9,), num_classes=K))
        params, _ = wider.init(KEY, jnp.zeros((1, 4, 4, 1)))
        other = parallel.replicate(create_state(params, {}, OPTIMIZER, KEY), run.mesh)
        with pytest.raises(ValueError, match="damaged or of another model"):
            checkpoint.restore(manager, other)
        for path in (tmp_path / "0" / "default").rglob("*"):
            if path.is_file() and path.stat().st_size > 0:
                path.write_bytes(b"\0" * path.stat().st_size)
    with (
        pytest.raises(ValueError, match="damaged"),
        checkpoint.open_checkpoints(tmp_path, best_metric="pgd") as manager,
    ):
        checkpoint.restore(manager, state, step=0)


def test_evaluation_depends_neither_on_batches_nor_on_devices():
    params, _ = MODEL.init(KEY, jnp.zeros((1, 4, 4, 1)))
    attacks = {"fgsm": fgsm(THREAT), "pgd": pgd(ThreatModel(L2(), 0.3), steps=2, restarts=2)}
    results = []
    for devices, batch_size in [(1, 44), (2, 6), (8, 24)]:
        mesh = parallel.device_mesh(jax.devices()[:devices])
        evaluate = make_evaluator(MODEL.apply, attacks, mesh)
        batches = data.eval_batches(DATASET, batch_size)
        results.append(evaluate(params, {}, KEY, batches))
        assert evaluate.compiled._cache_size() == 1
    for result in results:
        assert {name: v.shape for name, v in result.items()} == dict.fromkeys(
            ("clean", "fgsm", "pgd"), (44,)
        )
        for name in result:
            np.testing.assert_array_equal(result[name], results[0][name])
    logits = MODEL.apply(params, {}, jnp.asarray(IMAGES), False, None)[0]
    np.testing.assert_array_equal(results[0]["clean"], np.argmax(logits, axis=1) == LABELS)
    assert results[0]["pgd"].mean() < results[0]["clean"].mean()


@pytest.mark.parametrize(
    "fn, shapes, expected",
    [
        (lambda a, b: a @ b, [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        (lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, length=7)[0], [(3, 3)], 7 * 54),
        (jax.jit(lambda a: jax.nn.relu(a @ a)), [(3, 3)], 54),
        (lambda a: jnp.sin(a), [(8, 8)], 0),
        # Valid 3x3 convolution of 6x6: 16 positions, 9 taps, 2 to 5 channels.
        (
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            [(1, 6, 6, 2), (3, 3, 2, 5)],
            2 * 16 * 9 * 2 * 5,
        ),
        # Padding does not count: per axis 2 + 3 + 3 + 2 taps.
        (
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            [(1, 4, 4, 1), (3, 3, 1, 1)],
            2 * 10 * 10,
        ),
        # The gradient of a product costs two more.
        (jax.grad(lambda a, b: (a @ b).sum(), argnums=(0, 1)), [(3, 4), (4, 5)], 3 * 120),
    ],
)
def test_flops_of_known_programs(fn, shapes, expected):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert count_flops(fn, *arguments) == expected


def test_flops_of_the_two_convolutions_agree():
    def cost(conv):
        model = models.from_linen(models.SmallCNN(num_classes=K, channels=(3, 5), conv=conv))
        x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
        params, _ = jax.eval_shape(model.init, KEY, x)

        def loss(params, x):
            return model.apply(params, {}, x, False, None)[0].sum()

        return count_flops(jax.grad(loss, argnums=(0, 1)), params, x)

    assert cost("canonical") == cost("plain") > 10_000


def test_flops_of_attacks_grow_with_their_steps():
    params, _ = MODEL.init(KEY, jnp.zeros((1, 4, 4, 1)))

    def cost(steps):
        return count_flops(
            lambda x: pgd(THREAT, steps=steps)(
                lambda z: MODEL.apply(params, {}, z, False, None)[0], KEY, x, jnp.array(LABELS[:8])
            ),
            jax.ShapeDtypeStruct((8, 4, 4, 1), jnp.float32),
        )

    assert cost(6) - cost(4) == 2 * (cost(5) - cost(4)) > 0
    assert parameter_count(params) == 16 * 8 + 8 + 8 * 3 + 3


def test_a_run_folder_is_entered_once_and_again_only_to_resume(tmp_path, plain_calls):
    folder = tmp_path / "run"
    config = {"eps": 0.1, "path": Path("x"), "seeds": (1, 2), "scale": np.float32(0.5)}
    assert report.open_workdir(folder, config, resume=False) == folder
    assert json.loads((folder / "config.json").read_text())["seeds"] == [1, 2]
    report.open_workdir(folder, config, resume=True)
    with pytest.raises(ValueError, match="--resume"):
        report.open_workdir(folder, config, resume=False)
    with pytest.raises(ValueError, match=r"eps=0\.1, got eps=0\.2"):
        report.open_workdir(folder, {**config, "eps": 0.2}, resume=True)
    report.open_workdir(folder, {**config, "eps": 0.2}, resume=True, may_change=("eps",))
    assert not list(folder.glob("*.partial"))


def test_metrics_of_steps_after_the_checkpoint_are_made_again(tmp_path):
    with report.MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": 1.0 / step, "broken": float("nan")})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "spl')  # a crash in the middle of a line
    assert [r["step"] for r in report.read_metrics(tmp_path)] == [1, 2, 3]
    with report.MetricsWriter(tmp_path, from_step=2) as writer:
        writer.write(3, "train", {"loss": 7.0})
    records = report.read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert records[0]["broken"] == "nan"
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_figures_are_written(tmp_path):
    records = [
        {"step": s, "split": split, "loss": 1.0, "pgd20": 0.5, "clean": 0.7}
        for s in (1, 2)
        for split in ("train", "validation")
    ]
    figures.training_curves(records, tmp_path / "curves.png", title="t")
    params, _ = MODEL.init(KEY, jnp.zeros((1, 4, 4, 1)))
    x, y = jnp.array(IMAGES[:3]), jnp.array(LABELS[:3])
    panel = adversarial_panel(models.eval_logits(MODEL.apply, params, {}), fgsm(THREAT), KEY, x, y)
    assert np.abs(panel["adversarial"] - panel["image"]).max() == pytest.approx(0.1, abs=1e-5)
    figures.image_panel(panel, tmp_path / "panel.png")
    for name in ("curves", "panel"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    shown = progress.Progress(10, label="madry")
    shown(4, {"loss": 0.5})
    shown(5, {"clean": 0.25}, keep=True)
    out = capsys.readouterr().out
    assert out.startswith("madry 5/10  clean 0.25")
    assert out.count("\n") == 1
