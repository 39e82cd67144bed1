"""Losses that are not finite: the step is named and not taken, or skipped and recorded."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import training_fit
from robustjax import data, parallel
from robustjax.training import NonFiniteLoss, create_state, feed, fit, guarded_step

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(44, 4, 4, 1)).astype(np.float32)
DATASET = data.Dataset(IMAGES, RNG.integers(0, 3, 44).astype(np.int32), 3, "noise")
KEY = jax.random.key(0)


def test_a_loss_that_is_not_finite_ends_the_run_after_it_was_reported(plain_calls):
    seen = []

    def advance(state, epoch, first, count):
        loss = np.where(np.arange(first, first + count) == 3, np.nan, 1.0)
        return state, {"loss": loss}

    state = create_state({}, {}, optax.identity(), KEY)
    with pytest.raises(ValueError, match="loss at step 4 must be finite, got nan"):
        fit(
            state,
            advance,
            epochs=2,
            steps_per_epoch=5,
            dispatch=5,
            on_dispatch=lambda step, metrics: seen.append(step),
        )
    assert seen == [5]


def failing_step(*examples):
    """Adds one to ``w``; the gradient, then all, is NaN where one of these examples is seen."""

    def step(state, batch):
        found = jnp.any(jnp.isin(batch["index"], jnp.array(examples)))
        bad = jax.lax.pmax(found.astype(jnp.int32), parallel.AXIS) > 0
        params = {"w": state.params["w"] + jnp.where(bad, jnp.nan, 1.0)}
        new = state._replace(step=state.step + 1, params=params)
        return new, {"loss": jnp.float32(1), "grad_norm": jnp.where(bad, jnp.inf, 1.0)}

    return step


@pytest.fixture(params=["resident", "streamed"])
def failing(request):
    """``failing(nonfinite, *examples) -> (advance, state)`` on two devices, 5 steps an epoch."""
    mesh = parallel.device_mesh(jax.devices()[:2])
    start = create_state({"w": jnp.zeros(())}, {}, optax.identity(), KEY)

    def failing(nonfinite, *examples):
        how = {"mesh": mesh, "nonfinite": nonfinite}
        step = failing_step(*examples)
        if request.param == "resident":
            advance = feed.resident(step, DATASET, key=KEY, batch_size=8, **how)
        else:
            batches = functools.partial(data.host_batches, DATASET, batch_size=8, seed=0)
            advance = feed.streamed(
                step, lambda at: batches(start_step=at, num_threads=0, prefetch=0),
                steps_per_epoch=5, **how,
            )  # fmt: skip
        return advance, parallel.replicate(start, mesh)

    return failing


def test_a_step_into_nan_is_not_taken(plain_calls, failing):
    """The state stays before the step that fails; that step and its examples are known."""
    advance, state = failing("stop", 5)
    failed = next(i for i in range(5) if 5 in advance.indices(i))
    with pytest.raises(NonFiniteLoss, match=f"grad_norm at step {failed + 1} must") as error:
        fit(state, advance, epochs=1, steps_per_epoch=5, dispatch=5)
    assert error.value.step == failed
    assert int(error.value.state.step) == float(error.value.state.params["w"]) == failed
    with pytest.raises(ValueError, match="nonfinite must be"):
        guarded_step(failing_step(5), nonfinite="ignore")


@pytest.mark.parametrize("dispatch", [1, 2, 5])
def test_steps_into_nan_are_skipped_and_told_of(plain_calls, caplog, failing, dispatch):
    """The first one hands out the state before it; no program is compiled for it."""
    advance, state = failing("skip", 5, 17, 30)
    failed = [i for i in range(10) if {5, 17, 30} & {*advance.indices(i).tolist()}]
    assert len(failed) > 2
    halts, skipped, metrics, saved = [], [], [], []
    with jax.log_compiles():
        state = fit(
            state,
            advance,
            epochs=2,
            steps_per_epoch=5,
            dispatch=dispatch,
            on_dispatch=lambda step, values: metrics.append((step, values)),
            on_state=lambda step, state: saved.append((int(state.step), *metrics[-1:])),
            saves=lambda step: step >= 7,
            on_halt=lambda error: halts.append(
                (error.step, int(error.state.step), float(error.state.params["w"]))
            ),
            on_skipped=skipped.extend,
        )
    assert (int(state.step), float(state.params["w"])) == (10, 10 - len(failed))
    assert halts == [(failed[0], failed[0], failed[0])]
    assert skipped == failed
    told = np.concatenate([values["skipped"] for _, values in metrics])
    assert told.tolist() == [float(i in failed) for i in range(10)]
    norms = np.concatenate([values["grad_norm"] for _, values in metrics])
    assert np.isfinite(norms).tolist() == [i not in failed for i in range(10)]
    steps = [step for step, _ in metrics]
    ends = [*range(dispatch, 5, dispatch), 5]
    assert steps == [*ends, *(5 + end for end in ends)]
    # What is saved has all its metrics recorded before.
    assert all(at == told_of[0] for at, *rest in saved if at >= 7 for told_of in rest)
    compiled = [r for r in caplog.messages if re.search(r"compilation of jit\((steps|<lambda>)", r)]
    assert len(compiled) == len({dispatch, 5 % dispatch or dispatch}), caplog.messages
    other, _ = failing("skip")
    np.testing.assert_array_equal(
        [advance.indices(i) for i in failed], [other.indices(i) for i in failed]
    )


def test_a_run_told_to_end_in_a_dispatch_that_halts_makes_it_again(plain_calls, failing):
    advance, state = failing("skip", 5)
    failed = next(i for i in range(5) if 5 in advance.indices(i))
    state = fit(
        state,
        advance,
        epochs=2,
        steps_per_epoch=5,
        dispatch=1,
        should_stop=lambda step: step == failed + 1,
    )
    assert (int(state.step), float(state.params["w"])) == (failed + 1, failed)


def test_the_record_of_skipped_steps_goes_on_after_a_crash(tmp_path):
    folder = tmp_path / "nonfinite"
    skipped = training_fit.SkippedSteps(folder, from_step=0)
    assert skipped.count == 0 and not folder.exists()
    skipped.write([2, 3, 7], np.arange(6).reshape(3, 2))
    with skipped.path.open("a") as file:
        file.write('{"step": 8, "exam')
    skipped = training_fit.SkippedSteps(folder, from_step=7)
    skipped.write([7], np.array([[8, 9]]))
    assert skipped.count == 3
    skipped.WHOLE = 3
    skipped.write([9], np.array([[1, 2]]))
    lines = [json.loads(line) for line in skipped.path.read_text().splitlines()]
    assert lines == [
        {"step": 2, "examples": [0, 1]},
        {"step": 3, "examples": [2, 3]},
        {"step": 7, "examples": [8, 9]},
        {"step": 9},
    ]
    skipped.path.write_text("{}\n" + skipped.path.read_text())
    with pytest.raises(ValueError, match=r"skipped.jsonl line 1 must be"):
        training_fit.SkippedSteps(folder, from_step=9)
