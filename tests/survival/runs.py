"""Training runs in processes of their own, forked from one that has imported everything."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path

# A small network on real digits: six epochs of twelve steps, checkpoints every three steps.
EPOCHS, STEPS, SAVE_EVERY = 6, 12, 3
FLAGS = (
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
    ]
)


class Run:
    """A started process; what it prints is kept, and goes through no file.

    Args:
      *words: flags, after those of ``FLAGS``.
      privileged: False gives up what lets the superuser write where nobody may.
      environment: variables.
    """

    def __init__(self, *words, privileged=True, environment=()):
        self._printed, (reading, writing) = [], _context.Pipe(duplex=False)
        words = (*FLAGS, *words)
        self._process = _context.Process(
            target=_child, args=(words, writing, privileged, dict(environment)), daemon=True
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


def _child(words, writing, privileged, environment):
    for stream in (1, 2):
        os.dup2(writing.fileno(), stream)
    writing.close()
    # What JAX reads when it starts; importing it has not started it.
    os.environ.update({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment})
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


def outcome(workdir):
    """What must not depend on what happened on the way: results and every recorded metric."""
    results = json.loads((network(workdir) / "results.json").read_text())
    lines = (network(workdir) / "metrics.jsonl").read_text()
    return {name: results[name] for name in ("best", "last")}, lines


def wait_until(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.005)
