"""Runs that are told to end: SIGTERM, as clusters send it before they take a machine away."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

# What a program that was told to end exits with, after it has saved what it had: "temporary
# failure; try again" (EX_TEMPFAIL of sysexits.h).
EXIT_CODE = 75


# Counts the questions of the whole process: JAX remembers the last number of each process, and lets
# all of them stop at the first number that none has asked yet.
_ASKED = itertools.count(1)


class Interrupted(Exception):
    """A run was told to end, and has saved its state."""


@contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """``should_stop(step)``, true once this process, or any other one of the run, got SIGTERM.

    All processes of a run stop at the same step, if all of them ask equally often, as ``fit`` does
    after each dispatch. The signal does nothing else meanwhile; afterwards it does what it did
    before (with several processes, nothing: ``jax.distributed`` has taken it over).

    In a thread other than the main one of the process, signals are left alone, and the answer is
    no.
    """
    if jax.process_count() > 1:
        yield lambda step: multihost_utils.reached_preemption_sync_point(next(_ASKED))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        # None: not installed from Python, and not to be put back from it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
