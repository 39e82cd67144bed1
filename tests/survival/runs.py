"""Training runs in processes of their own, forked from one that has imported everything."""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A small network on real digits: six epochs of twelve steps, checkpoints every three steps.
EPOCHS, STEPS, SAVE_EVERY, BATCH_SIZE = 6, 12, 3, 100
FLAGS = (
    f"--batch_size={BATCH_SIZE}",
    "--dataset=digits", "--model=mlp", "--width=16", "--objective=madry", f"--epochs={EPOCHS}",
    "--eps_warmup=0", "--learning_rate=0.02", "--attack_steps=1", "--validation_steps=1",
    "--test_steps=1",
    "--test_restarts=1", "--dispatch=3", f"--save_every={SAVE_EVERY}", "--checkpoint_every=1",
)  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "experiments.adversarial_training",
        "orbax.checkpoint",
        "sklearn.datasets",
        "matplotlib.pyplot",
        "tensorboardX",
        "grain",
    ]
)


class Run:
    """A started process; what it prints is kept, and goes through no file.

    Args:
      *words: flags, after those of ``FLAGS``.
      privileged: False gives up what lets the superuser write where nobody may.
      environment: variables.
      folder: in which it is started.
    """

    def __init__(self, *words, privileged=True, environment=(), folder=None):
        self._printed, (reading, writing) = [], _context.Pipe(duplex=False)
        words = (*FLAGS, *words)
        self._process = _context.Process(
            target=_child,
            args=(words, writing, privileged, dict(environment), folder or Path.cwd()),
            daemon=True,
        )
        self._process.start()
        writing.close()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()
        self.pid = self._process.pid

    def running(self):
        return self._process.is_alive()

    def signal(self, number):
        """To this process alone, by its id, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds=120):
        """The exit code; negative for a signal. The process is ended after so many seconds."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still running after {seconds} s: {self.printed()[-2000:]}")
        self._reader.join()
        return self._process.exitcode

    def printed(self):
        return b"".join(self._printed).decode(errors="replace")

    def _read(self, reading):
        while data := os.read(reading.fileno(), 2**16):
            self._printed.append(data)


def _child(words, writing, privileged, environment, folder):
    for stream in (1, 2):
        os.dup2(writing.fileno(), stream)
    writing.close()
    # What JAX reads when it starts; importing it has not started it.
    os.environ.update({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment})
    os.chdir(folder)
    if not privileged:
        # capset(2), version 3: all capabilities of this process become none.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
    sys.argv = ["adversarial_training", *words]
    from experiments import adversarial_training, command_line

    command_line.run(
        adversarial_training.main,
        adversarial_training.Settings,
        adversarial_training.PRESETS,
        adversarial_training.__doc__,
    )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def network(workdir):
    return Path(workdir) / "madry"


def checkpoints(workdir):
    """Steps of the finished checkpoints, those in between included."""
    folders = [network(workdir) / name for name in ("checkpoints", "recovery")]
    found = [f.name for folder in folders if folder.is_dir() for f in folder.iterdir()]
    return sorted({int(name) for name in found if name.isdigit()})


class Left(NamedTuple):
    """What must not depend on what happened on the way.

    Attributes:
      results: accuracies of the best and the last network, and their steps.
      metrics: text of every recorded metric.
      arrays: check sum of the last checkpoint's arrays: weights, optimizer, key, step.
    """

    results: dict[str, Any]
    metrics: str
    arrays: str


def outcome(workdir):
    """What a run has left that has ended."""
    results = json.loads((network(workdir) / "results.json").read_text())
    lines = (network(workdir) / "metrics.jsonl").read_text()
    results = {name: results[name] for name in ("best", "last")}
    return Left(results, lines, arrays(network(workdir) / "checkpoints"))


def arrays(folder):
    """Check sum of the arrays of the newest checkpoint in a folder."""
    import orbax.checkpoint as ocp

    newest = max(int(f.name) for f in folder.iterdir() if f.name.isdigit())
    handler, folder = ocp.PyTreeCheckpointHandler(), folder / str(newest) / "default"
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree
    )
    held = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    found = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(held):
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def skipped_steps(workdir):
    """The records of the steps that were skipped."""
    lines = (network(workdir) / "nonfinite" / "skipped.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def state_before(workdir, step):
    """The state that was saved before a step that failed, and what makes the step again.

    Returns:
      The state and ``loss_of(state, examples)``: the loss of the step on these examples.
    """
    from experiments import trained_models, training_run
    from robustjax import data, training
    from robustjax.training import checkpoint

    # Parameters that may be divided are trained by a step that is written without an axis.
    settings = dataclasses.replace(
        trained_models.read_settings(network(workdir)), parameters="sharded"
    )
    train = training_run.load_split(settings, "train")
    parts = training_run.build(settings, "madry", training_run.facts_of(settings, train))
    params, model_state = parts.model.init(
        jax.random.key(0), jnp.zeros((1, *train.image.shape[1:]))
    )
    like = training.create_state(
        params, model_state, parts.optimizer, jax.random.key(0), oracle=parts.oracle
    )
    with checkpoint.open_checkpoints(
        network(workdir) / "nonfinite", best_metric=None, read_only=True
    ) as manager:
        state = checkpoint.restore(manager, like, step=step)

    def loss_of(state, examples):
        batch = data.take(data.on_device(train), jnp.array(examples))
        return jax.jit(parts.step)(state, batch)[1]["loss"]

    return state, loss_of


def descendants(pid):
    """Processes that a process has started, and that those have started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def is_there(pid):
    """Whether there is a process of this number."""
    return Path(f"/proc/{pid}").exists()


def wait_until(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.005)
