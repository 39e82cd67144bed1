"""What can befall a training run, one function each; all must end as a run that was left alone."""

import json
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np

from survival import pairs
from survival.places import (
    EXIT_TOLD_TO_END,
    Outcome,
    Place,
    assert_ends_as_if_left_alone,
    has_begun,
    steps_made,
)
from survival.runs import (
    BATCH_SIZE,
    EPOCHS,
    SAVE_EVERY,
    STEPS,
    arrays,
    checkpoints,
    descendants,
    is_there,
    network,
    outcome,
    skipped_steps,
    state_before,
    wait_until,
)


def killed(place: Place, times: int = 20, seed: int = 0) -> Outcome:
    """SIGKILL at random moments, each time resumed, until the run is done; then the next run."""
    moments, lost, chain, between = random.Random(seed), [], 0, 0
    while len(lost) < times:
        assert chain < times, "runs are over before they can be killed"
        workdir = place.folder / f"killed{chain}"
        chain, newest = chain + 1, 0
        for _ in range(min(5, times - len(lost))):
            run = place.start(workdir, "--resume")
            if newest and moments.random() < 0.4:
                # Any moment from its start on: most are before its first line, while modules are
                # imported and the newest checkpoint is read.
                time.sleep(moments.uniform(0, place.starting))
            else:
                # A run that has nothing yet has nothing at stake before its first line.
                wait_until(lambda run=run: has_begun(run) or not run.running())
                left = 1 - newest / (EPOCHS * STEPS)
                time.sleep(moments.uniform(0, 0.7 * place.seconds * max(left, 0.1)))
            run.signal(signal.SIGKILL)
            code = run.wait()
            newest, reached = max(checkpoints(workdir), default=0), steps_made(workdir)
            if code != -signal.SIGKILL:  # it was faster
                assert code == 0, run.printed()
                break
            lost.append(max(0, reached - newest) if has_begun(run) else 0)
            # One is written while the next steps are made, and the next one waits for it.
            assert lost[-1] <= 3 * SAVE_EVERY, (newest, reached)
            between += 0 < newest < EPOCHS * STEPS
        ended = assert_ends_as_if_left_alone(place, workdir)
        if 0 < newest < EPOCHS * STEPS:
            assert f"resumed at step {newest} of" in ended.printed()
    assert between >= times // 4  # not only before the first checkpoint
    return Outcome("SIGKILL at a random moment", len(lost), f"{max(lost)}, {sum(lost)}")


def killed_while_streaming(place: Place, times: int = 3, seed: int = 0) -> Outcome:
    """SIGKILL of a run that reads its data on the way: the same batches come again."""
    words = ("--placement=host", "--augmentation=crop", "--epochs=3")
    alone, workdir = place.folder / "streamed", place.folder / "killed_streaming"
    run = place.start(alone, *words)
    assert run.wait() == 0, run.printed()
    moments, lost = random.Random(seed), []
    for epoch in range(times):
        run, step = place.start(workdir, "--resume", *words), epoch * STEPS + moments.randint(1, 9)
        wait_until(lambda step=step: max(checkpoints(workdir), default=0) >= step)
        time.sleep(moments.uniform(0, 0.1))
        started = descendants(run.pid)
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        lost.append(max(0, steps_made(workdir) - max(checkpoints(workdir), default=0)))
        # Neither it, with the threads that read, nor what it has started outlives it.
        wait_until(lambda run=run, started=started: not any(map(is_there, (run.pid, *started))), 10)
    run = place.start(workdir, "--resume", *words)
    assert run.wait() == 0, run.printed()
    assert "resumed at step" in run.printed()
    assert outcome(workdir) == outcome(alone)
    return Outcome("SIGKILL while data are streamed", times, f"{max(lost)}, {sum(lost)}")


def killed_while_writing(place: Place, times: int = 3) -> Outcome:
    """SIGKILL while a checkpoint is written: its folder is there under a temporary name."""
    caught, attempts = 0, 0
    while caught < times:
        workdir, attempts = place.folder / f"writing{attempts}", attempts + 1
        assert attempts <= 5 * times, "no write was caught"
        run = place.start(workdir)

        def unfinished(workdir=workdir, number=attempts % 3):
            found = list(network(workdir).glob("*/*orbax-checkpoint-tmp*"))
            return found and len(checkpoints(workdir)) >= number

        wait_until(unfinished)
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        caught += any(network(workdir).glob("*/*orbax-checkpoint-tmp*"))
        assert_ends_as_if_left_alone(place, workdir)
    return Outcome("SIGKILL while a checkpoint is written", caught, "")


def told_to_end(place: Place) -> Outcome:
    """SIGTERM saves, and ends with a code of its own."""
    workdir = place.folder / "told"
    run = place.start(workdir, "--save_every=0", "--checkpoint_every=6")
    wait_until(lambda: steps_made(workdir) > 2)
    run.signal(signal.SIGTERM)
    assert run.wait() == EXIT_TOLD_TO_END, run.printed()
    (step,) = checkpoints(workdir)
    assert f"told to end, saved at step {step} of {EPOCHS * STEPS}" in run.printed()
    assert steps_made(workdir) == step
    run = place.start(workdir, "--resume", "--save_every=0", "--checkpoint_every=6")
    assert run.wait() == 0, run.printed()
    assert f"resumed at step {step} of" in run.printed()
    # It has validated once, at the end, and has the same last network.
    ended = outcome(workdir)
    assert ended.results["last"] == place.whole.results["last"]
    assert ended.arrays == place.whole.arrays
    return Outcome("SIGTERM", 1, "0, 0")


def damaged(place: Place) -> Outcome:
    """The newest checkpoint is cut off, altered or incomplete: it is named, the one before used."""
    workdir = place.folder / "damaged"
    run = place.start(workdir)
    wait_until(lambda: max(checkpoints(workdir), default=0) >= 2 * STEPS)
    run.signal(signal.SIGKILL)
    run.wait()
    harms = {"cut off": _cut_off, "altered": _altered, "gone": Path.unlink}
    lost = []
    for name, harm in harms.items():
        harmed = place.folder / f"damaged-{name.replace(' ', '-')}"
        shutil.copytree(workdir, harmed)
        *_, before, newest = checkpoints(harmed)
        (folder,) = [f for f in network(harmed).glob(f"*/{newest}") if f.is_dir()]
        files = [path for path in (folder / "default").rglob("*") if path.is_file()]
        for path in files if name == "cut off" else [_of_arrays(files)]:
            harm(path)
        run = assert_ends_as_if_left_alone(place, harmed)
        assert f"resumed at step {before} of" in run.printed()
        assert f"{folder} is damaged" in run.printed()
        assert _aside(folder).is_dir()
        lost.append(newest - before)
    # And killed as soon as it has been set aside.
    *_, before, newest = checkpoints(workdir)
    (folder,) = [f for f in network(workdir).glob(f"*/{newest}") if f.is_dir()]
    _altered(_of_arrays([path for path in (folder / "default").rglob("*") if path.is_file()]))
    run = place.start(workdir, "--resume")
    wait_until(_aside(folder).is_dir)
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run = assert_ends_as_if_left_alone(place, workdir)
    assert int(re.search(r"resumed at step (\d+) of", run.printed())[1]) >= before
    return Outcome("newest checkpoint damaged", 4, f"{max(lost)}, {sum(lost)}")


def _aside(folder):
    return folder.parent.with_name(folder.parent.name + "-damaged") / folder.name


def _of_arrays(files):
    """The file that is read for the arrays: the one in default/d."""
    (found,) = [path for path in files if path.parent.parent.name == "default"
                and path.parent.name == "d"]  # fmt: skip
    return found


def _cut_off(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _altered(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def not_finite(place: Place) -> Outcome:
    """A loss that explodes ends the run with the step, its examples and the state before it.

    Where such steps are skipped, each is recorded once, whatever happens on the way.
    """
    workdir, alone = place.folder / "exploded", place.folder / "skipped"
    words = ("--learning_rate=1e18", "--optimizer=sgd", "--epochs=3")
    skip = "--nonfinite=skip"
    run = place.start(workdir, *words)
    assert run.wait() == 1
    (record,) = network(workdir).glob("nonfinite/step-*.json")
    found = json.loads(record.read_text())
    step = found["step"]
    assert f"at step {step + 1} must be finite" in run.printed()
    assert len(set(found["examples"])) == BATCH_SIZE
    state, loss_of = state_before(workdir, step)
    assert int(state.step) == step
    before = arrays(network(workdir) / "nonfinite")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert not np.isfinite(loss_of(state, found["examples"]))

    run = place.start(alone, *words, skip)
    assert run.wait() == 0, run.printed()
    run = place.start(workdir, *words, skip, "--resume")
    wait_until(lambda: steps_made(workdir) >= STEPS)
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run = place.start(workdir, *words, skip, "--resume")
    assert run.wait() == 0, run.printed()
    skipped = skipped_steps(workdir)
    assert skipped == skipped_steps(alone)
    assert outcome(workdir) == outcome(alone)
    assert skipped[0] == {"step": step, "examples": found["examples"]}
    lines = map(json.loads, outcome(alone).metrics.splitlines())
    in_metrics = sum(line.get("skipped", 0) for line in lines)  # means over three steps each
    assert [x["step"] for x in skipped] == sorted({x["step"] for x in skipped})
    assert len(skipped) == round(3 * in_metrics) > 2 * STEPS
    assert f"{len(skipped)} steps skipped, not finite" in run.printed()
    assert arrays(network(alone) / "nonfinite") == before
    return Outcome("loss not finite: stopped, then skipped", 3, "")


def no_space(place: Place) -> Outcome:
    """Writes fail from some moment on: an error, and what was written before is whole."""
    # No file may grow beyond so many bytes: the system refuses the write, as on a full disk.
    # Checkpoints are larger than the other files.
    workdir = place.folder / "full"
    run = place.start(workdir)
    wait_until(lambda: checkpoints(workdir))
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (12_000, 12_000))
    assert_ends_for(run, f"checkpoint in {network(workdir)}/")
    newest = max(checkpoints(workdir))

    # The next line of metrics is the first thing to be written.
    run = place.start(workdir, "--resume", "--save_every=0")
    wait_until(lambda: has_begun(run))
    lines = (network(workdir) / "metrics.jsonl").read_text().splitlines(keepends=True)
    limit = sum(len(line) for line in lines if json.loads(line)["step"] <= newest) + 20
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert_ends_for(run, f"{network(workdir)}/metrics.jsonl")
    assert max(checkpoints(workdir)) == newest
    assert_ends_as_if_left_alone(place, workdir)
    return Outcome("no space (limit on file size): checkpoints, metrics", 2, "")


def assert_ends_for(run, refused):
    """With an error that names what cannot be written, and why."""
    assert run.wait() == 1, run.printed()
    # Threads that were writing a checkpoint print between the lines, and after the last one.
    assert re.search(f"error: {re.escape(refused)}.* cannot be written: .", run.printed()), (
        run.printed()
    )


def read_only(place: Place) -> Outcome:
    """A folder that may not be written is refused at once, and one that was begun stays whole."""
    parent = place.folder / "readonly"
    parent.mkdir(mode=0o555)
    run = place.start(parent / "run", privileged=False)
    assert run.wait() == 1
    assert f"workdir {parent}/run cannot be written: Permission denied" in run.printed()
    assert not (parent / "run").exists()
    begun = place.folder / "begun"
    run = place.start(begun)
    wait_until(lambda: checkpoints(begun))
    run.signal(signal.SIGKILL)
    run.wait()
    folders = [begun, *(f for f in begun.rglob("*") if f.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    run = place.start(begun, "--resume", privileged=False)
    assert run.wait() == 1
    assert "cannot be written: Permission denied" in run.printed()
    for folder in folders:
        folder.chmod(0o755)
    assert_ends_as_if_left_alone(place, begun)
    return Outcome("folder is read-only", 2, "")


FAULTS = (killed, killed_while_writing, killed_while_streaming, told_to_end, damaged, not_finite,
          no_space, read_only, *pairs.FAULTS)  # fmt: skip
