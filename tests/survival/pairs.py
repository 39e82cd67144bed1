"""What can befall a run of two processes, and a process that waits for others in vain."""

import json
import signal

import jax
import numpy as np

from robustjax import parallel
from survival.places import EXIT_TOLD_TO_END, Outcome, Place, has_begun
from survival.runs import STEPS, checkpoints, free_port, network, outcome, skipped_steps, wait_until


def start_pair(place, workdir, *words, first_privileged=True, own=((), ()), folders=(None, None)):
    """Two processes of one run; the first may lack the right to write where nobody may.

    Args:
      place: where runs go.
      workdir: of the run.
      *words: flags of both.
      first_privileged: False for that.
      own: flags of each.
      folders: in which each is started.
    """
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    words = ("--epochs=3", "--num_processes=2", address, "--heartbeat_timeout=10", *words)
    return [
        place.start(
            workdir,
            *words,
            *own[i],
            f"--process_id={i}",
            folder=folders[i],
            privileged=first_privileged or i > 0,
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
        # Once process 0 has gone, which runs JAX's service, a thread of JAX aborts the other one.
        expected = "another process of this run has stopped" if victim else "another task died"
        assert "another process of this run has stopped" in said or expected in said, said
        assert max(checkpoints(workdir)) >= newest
        runs[victim].wait()
    # Told to end, both do so at the same step.
    runs = pair(workdir)
    wait_until(lambda: has_begun(runs[0]))
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
    first, *_ = skipped_steps(workdir)
    assert first == {"step": found["step"], "examples": found["examples"]}
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


def hosts_that_differ(place: Place) -> Outcome:
    """Other flags, or another folder under the same name, end both processes with what differs."""
    runs = start_pair(place, place.folder / "differ", own=(("--seed=1",), ("--seed=2",)))
    assert ends_of(runs) == [1, 1], runs[0].printed()
    for run in runs:
        assert "got seed=1 on process 0 and 2 on process 1" in run.printed()
    assert not (place.folder / "differ").exists()

    hosts = [place.folder / f"host{i}" for i in range(2)]
    for host in hosts:
        (host / "run").mkdir(parents=True)
    runs = start_pair(place, "run", folders=hosts)
    assert ends_of(runs) == [1, 1], runs[0].printed()
    for run in runs:
        assert "workdir run must be one folder that all processes see" in run.printed()
        assert "is not seen by [1]" in run.printed()
    assert not list(hosts[1].rglob("*.*"))
    return Outcome("two processes with other flags, with other folders", 2, "")


FAULTS = (one_of_two_killed, pair_with_parameters_sharded, pair_meets_errors, cluster_mis_set,
          hosts_that_differ)  # fmt: skip
