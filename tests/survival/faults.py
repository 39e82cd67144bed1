"""What can befall a training run, one function each; all must end as a run that was left alone."""

import json
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from robustjax import parallel
from survival.runs import (
    EPOCHS,
    SAVE_EVERY,
    STEPS,
    Run,
    checkpoints,
    free_port,
    network,
    outcome,
    wait_until,
)

EXIT_TOLD_TO_END = 75


class Outcome(NamedTuple):
    """What came of a fault.

    Attributes:
      fault: in words.
      tried: how often it was made to happen; each time everything was as it must be.
      lost: steps that had to be made again, at most and in all.
    """

    fault: str
    tried: int
    lost: str


class Place(NamedTuple):
    """Where runs go, and what a run that was left alone has left there.

    Attributes:
      folder: for runs and the compilation cache.
      whole: ``outcome`` of the run that was left alone.
      seconds: that it took with everything compiled.
    """

    folder: Path
    whole: tuple
    seconds: float

    def start(self, workdir, *words, **options):
        cache = f"--compilation_cache={self.folder / 'cache'}"
        return Run(f"--workdir={workdir}", cache, *words, **options)


def prepare(folder: Path) -> Place:
    """Compiles everything and makes the run that is left alone."""
    began = 0.0
    for name in ("first", "whole"):
        began = time.monotonic()
        run = Place(folder, (), 0.0).start(folder / name)
        assert run.wait() == 0, run.printed()
    assert outcome(folder / "first") == outcome(folder / "whole")
    return Place(folder, outcome(folder / "whole"), time.monotonic() - began)


def assert_ends_as_if_left_alone(place, workdir, *words):
    run = place.start(workdir, "--resume", *words)
    assert run.wait() == 0, run.printed()
    assert outcome(workdir) == place.whole
    return run


def steps_made(workdir):
    path = network(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def killed(place: Place, times: int = 20, seed: int = 0) -> Outcome:
    """SIGKILL at random moments, each time resumed, until the run is done; then the next run."""
    moments, lost, chain, between = random.Random(seed), [], 0, 0
    while len(lost) < times:
        assert chain < times, "runs are over before they can be killed"
        workdir = place.folder / f"killed{chain}"
        chain, newest = chain + 1, 0
        for _ in range(5):
            run = place.start(workdir, "--resume")
            # From the first line on: before it nothing of the run is at stake.
            wait_until(lambda run=run: "parameters" in run.printed() or not run.running())
            left = 1 - newest / (EPOCHS * STEPS)
            time.sleep(moments.uniform(0, 0.7 * place.seconds * max(left, 0.1)))
            if not run.running():  # it was faster
                newest = max(checkpoints(workdir), default=0)
                break
            run.signal(signal.SIGKILL)
            assert run.wait() in (-signal.SIGKILL, 0), run.printed()
            newest, reached = max(checkpoints(workdir), default=0), steps_made(workdir)
            lost.append(max(0, reached - newest))
            # One is written while the next steps are made, and the next one waits for it.
            assert lost[-1] <= 3 * SAVE_EVERY, (newest, reached)
            between += 0 < newest < EPOCHS * STEPS
        ended = assert_ends_as_if_left_alone(place, workdir)
        if 0 < newest < EPOCHS * STEPS:
            assert f"resumed at step {newest} of" in ended.printed()
    assert between >= times // 4  # not only before the first checkpoint
    return Outcome("SIGKILL at a random moment", len(lost), f"{max(lost)}, {sum(lost)}")


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
    results, _ = outcome(workdir)
    assert results["last"] == place.whole[0]["last"]
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
        assert (folder.parent.with_name(folder.parent.name + "-damaged") / str(newest)).is_dir()
        lost.append(newest - before)
    return Outcome("newest checkpoint damaged", 3, f"{max(lost)}, {sum(lost)}")


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
    """A loss that explodes ends the run with the step, its examples and the state before it."""
    workdir = place.folder / "exploded"
    words = ("--learning_rate=1e18", "--optimizer=sgd")
    run = place.start(workdir, *words)
    assert run.wait() == 1
    (record,) = network(workdir).glob("nonfinite/step-*.json")
    found = json.loads(record.read_text())
    assert f"at step {found['step'] + 1} must be finite" in run.printed()
    assert len(set(found["examples"])) == 100
    assert (network(workdir) / "nonfinite" / str(found["step"])).is_dir()
    skipping = place.start(workdir, *words, "--resume", "--nonfinite=skip")
    assert skipping.wait() == 0, skipping.printed()
    last = [json.loads(x) for x in (network(workdir) / "metrics.jsonl").read_text().splitlines()]
    assert sum(x.get("skipped", 0) for x in last) > 0
    assert "steps skipped, not finite" in skipping.printed()
    return Outcome("loss not finite: stopped, then skipped", 2, "")


def full_disk(place: Place) -> Outcome:
    """Writes fail from some moment on: an error, and what was written before is whole."""
    # No file may grow beyond so many bytes: the system refuses the write, as on a full disk. The
    # first limit meets lines of metrics, the second one checkpoints, which are larger.
    for limit in (300, 12_000):
        workdir = place.folder / f"full{limit}"
        run = place.start(workdir)
        wait_until(lambda workdir=workdir: checkpoints(workdir))
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert run.wait() == 1, run.printed()
        # Threads that were writing a checkpoint print between the lines, and after the last one.
        reasons = r"cannot be written|File too large" if limit == 300 else "cannot be written"
        assert re.search(f"error: .*({reasons})", run.printed()), run.printed()
        assert checkpoints(workdir)
        assert_ends_as_if_left_alone(place, workdir)
    return Outcome("disk full", 2, "")


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


def start_pair(place, workdir, *words, first_privileged=True, **options):
    """Two processes of one run; the first may lack the right to write where nobody may."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    words = ("--epochs=3", "--num_processes=2", address, "--heartbeat_timeout=10", *words)
    return [
        place.start(
            workdir, *words, f"--process_id={i}", privileged=first_privileged or i > 0, **options
        )
        for i in range(2)
    ]


def ends_of(pair):
    """Exit codes of both."""
    return [run.wait() for run in pair]


def one_of_two_killed(place: Place) -> Outcome:
    """One process of two is killed: the other ends with an error; both go on together again."""
    workdir, undisturbed = place.folder / "pair", place.folder / "undisturbed_pair"

    def pair(folder):
        return start_pair(place, folder, "--save_every=6", "--resume")

    for victim in range(2):
        runs = pair(workdir)
        wait_until(
            lambda victim=victim: max(checkpoints(workdir), default=0) >= (1 + victim) * STEPS
        )
        newest = max(checkpoints(workdir))
        runs[victim].signal(signal.SIGKILL)
        assert runs[1 - victim].wait(60) != 0
        said = runs[1 - victim].printed()
        assert "another process of this run has stopped" in said or "another task died" in said
        assert max(checkpoints(workdir)) >= newest
        runs[victim].wait()
    # Told to end, both do so at the same step.
    runs = pair(workdir)
    wait_until(lambda: "parameters" in runs[0].printed())
    runs[1].signal(signal.SIGTERM)
    assert ends_of(runs) == [EXIT_TOLD_TO_END] * 2, runs[0].printed()
    for folder in (workdir, undisturbed):
        runs = pair(folder)
        assert ends_of(runs) == [0, 0], runs[0].printed()
    assert outcome(workdir) == outcome(undisturbed)
    return Outcome("one of two processes killed, or told to end", 3, "")


def pair_with_parameters_sharded(place: Place) -> Outcome:
    """Both processes, each with parts of the parameters, are killed; they go on from the parts."""
    workdir, undisturbed = place.folder / "sharded", place.folder / "undisturbed_sharded"

    def pair(folder):
        # 64 pixels by 256 units: as many parameters as are worth to be divided.
        words = ("--parameters=sharded", "--width=256", "--save_every=6", "--resume")
        return start_pair(place, folder, *words)

    kernel = jax.ShapeDtypeStruct((64, 256), np.float32)
    assert parallel.shard_specs(kernel, parallel.device_mesh()) != parallel.REPLICATED
    runs = pair(workdir)
    wait_until(lambda: checkpoints(workdir))
    for run in runs:
        run.signal(signal.SIGKILL)
    ends_of(runs)
    for folder in (undisturbed, workdir):
        runs = pair(folder)
        assert ends_of(runs) == [0, 0], runs[0].printed()
    assert "resumed at step" in runs[0].printed()
    assert outcome(workdir) == outcome(undisturbed)
    return Outcome("two processes with sharded parameters killed", 1, "")


def pair_meets_errors(place: Place) -> Outcome:
    """What only the writing process can see, and what both see, ends both with the reason."""
    parent = place.folder / "readonly_pair"
    parent.mkdir(mode=0o555)
    runs = start_pair(place, parent / "run", first_privileged=False)
    assert ends_of(runs) == [1, 1], runs[0].printed()
    assert f"workdir {parent}/run cannot be written: Permission denied" in runs[0].printed()
    assert f"workdir {parent}/run was refused by process 0, which says why" in runs[1].printed()
    assert not (parent / "run").exists()

    workdir = place.folder / "exploded_pair"
    words = ("--learning_rate=1e18", "--optimizer=sgd")
    runs = start_pair(place, workdir, *words)
    assert ends_of(runs) == [1, 1], runs[0].printed()
    (record,) = network(workdir).glob("nonfinite/step-*.json")
    found = json.loads(record.read_text())
    for run in runs:
        assert f"at step {found['step'] + 1} must be finite" in run.printed()
    assert len(set(found["examples"])) == 100  # of the whole batch, not of one process's half
    runs = start_pair(place, workdir, *words, "--resume", "--nonfinite=skip")
    assert ends_of(runs) == [0, 0], runs[0].printed()
    return Outcome("two processes: folder refused, loss not finite", 3, "")


def cluster_mis_set(place: Place) -> Outcome:
    """A process that waits for others in vain ends with a message, in the time that was set."""
    for process in range(2):
        address = f"127.0.0.1:{free_port()}"
        run = place.start(
            place.folder / "alone", f"--coordinator_address={address}", "--num_processes=2",
            f"--process_id={process}", "--join_timeout=2",
        )  # fmt: skip
        assert run.wait(60) == 1
        said = run.printed()
        assert address in said
        assert ("did not answer for 2 seconds" if process else "within 2 seconds") in said
    run = place.start(place.folder / "alone", "--coordinator_address=127.0.0.1:1")
    assert run.wait() == 1
    assert "num_processes must be given" in run.printed()
    return Outcome("cluster mis-set", 3, "")


FAULTS = (killed, killed_while_writing, told_to_end, damaged, not_finite, full_disk, read_only,
          one_of_two_killed, pair_with_parameters_sharded, pair_meets_errors,
          cluster_mis_set)  # fmt: skip
