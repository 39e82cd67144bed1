"""What a run leaves behind: its folder, metrics as JSONL and TensorBoard events, results, tables.

Only the first process of a multi-host run writes.
"""

import contextlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from robustjax import checks

CONFIG = "config.json"
METRICS = "metrics.jsonl"


def is_writer() -> bool:
    """True on the process that writes files and prints."""
    return jax.process_index() == 0


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON in one step: an interrupted write leaves the old file as it was."""
    _replace(Path(path), json.dumps(_plain(value), indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also if the power fails."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def open_workdir(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    resume: bool,
    may_change: Sequence[str] = (),
) -> Path:
    """Makes or re-enters a run's folder and keeps its configuration in ``config.json``.

    Args:
      workdir: the folder.
      config: the run's settings, JSON values.
      resume: go on with the run that is there; start it if there is none.
      may_change: settings that may differ from those that the run was started with.

    Returns:
      The folder.

    Raises:
      ValueError: the folder cannot be written, holds something that is no run of ours, holds a run
        and ``resume`` is off, its run has other settings, it is in a store that has no path, or the
        processes of the run do not see the same folder.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(workdir)):
        raise ValueError(
            "workdir must be a folder of a file system; one that all hosts have mounted, if there "
            f"are several; got {workdir}"
        )
    workdir, refused = Path(workdir), None
    if is_writer():
        try:
            _enter(workdir, _plain(dict(config)), resume, may_change)
        except (ValueError, OSError) as error:
            refused = error
    if jax.process_count() > 1:
        # The others wait until the folder is there, and end if it is refused.
        any_refused = multihost_utils.broadcast_one_to_all(np.int32(refused is not None))
        if any_refused and not is_writer():
            raise ValueError(f"workdir {workdir} was refused by process 0, which says why")
    if refused is not None:
        raise refused
    if jax.process_count() > 1:
        _seen_by_all(workdir)
    return workdir


# How long another host's new file may take to be seen on a network file system.
SEEN_AFTER = 15.0  # seconds


def _seen_by_all(workdir: Path) -> None:
    """Refuses a workdir that is another folder on another host: checkpoints have parts of all."""
    number = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))
    mark = workdir / f".seen-{number}.partial"
    if is_writer():
        with contextlib.suppress(OSError):  # it is not seen then, by anyone
            mark.touch()
    multihost_utils.sync_global_devices("marked")
    until, seen = time.monotonic() + SEEN_AFTER, False
    while not seen and time.monotonic() < until:
        # What was not there before is remembered as missing, until its folder is read again.
        for folder in (workdir.parent, workdir):
            with contextlib.suppress(OSError):
                seen = mark.name in os.listdir(folder)
        if not seen:
            time.sleep(0.1)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(seen)))
    if is_writer():
        mark.unlink(missing_ok=True)
    if blind.size:
        raise ValueError(
            f"workdir {workdir} must be one folder that all processes see; what process 0 writes "
            f"there is not seen by {blind.tolist()}"
        )


def _enter(workdir: Path, config: dict[str, Any], resume: bool, may_change: Sequence[str]) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    path = workdir / CONFIG
    if not path.exists():
        others = sorted(p.name for p in workdir.iterdir() if not p.name.endswith(".partial"))
        if others:
            raise ValueError(
                f"workdir {workdir} must be empty or hold a run ({CONFIG}), "
                f"got a folder with {others[0]!r} and no {CONFIG}"
            )
    elif not resume:
        raise ValueError(
            f"workdir {workdir} already holds a run: pass --resume to go on with it, "
            "or another workdir"
        )
    else:
        old = _read_object(str(path), _read_text(path))
        for name in sorted({*old, *config} - {*may_change}):
            if old.get(name) != config.get(name):
                raise ValueError(
                    f"workdir {workdir} holds a run with {name}={checks.shown(old.get(name))}, "
                    f"got {name}={checks.shown(config.get(name))}"
                )
    write_json(path, config)


class MetricsWriter:
    """Appends scalars to ``metrics.jsonl`` and to TensorBoard events; a context manager.

    Args:
      workdir: the run's folder.
      from_step: the step that the run starts from. Lines of later steps, left by a run that was
        interrupted after its last checkpoint, are dropped: they are about to be made again.
    """

    def __init__(self, workdir: str | os.PathLike, *, from_step: int = 0):
        self._lines = self._events = None
        self._folder, self._purge = Path(workdir) / "tensorboard", from_step + 1
        if not is_writer():
            return
        path = Path(workdir) / METRICS
        kept = [r for r in read_metrics(workdir) if r["step"] <= from_step]
        try:
            _replace(path, "".join(json.dumps(record) + "\n" for record in kept))
            self._lines = path.open("a")
        except OSError as error:
            raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}") from error

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One record: ``{"step": ..., "split": ..., name: value, ...}``.

        A value that is not finite is written as the string that names it: JSON has no NaN.

        Raises:
          ValueError: a file cannot be written, for a full disk, say.
        """
        if self._lines is None:
            return
        path = self._lines.name
        try:
            self._lines.write(json.dumps({"step": step, "split": split, **_plain(values)}) + "\n")
            self._lines.flush()
            path = self._folder
            if self._events is None:
                # It imports PyTorch where that is installed. That takes seconds, in which the
                # devices work on the next dispatch by now.
                self._events = _Events(self._folder, self._purge)
            for name, value in values.items():
                self._events.write(f"{split}/{name}", float(value), step)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # What could not be written is tried again: the error that is on its way has said so.
        for file in (self._lines, self._events):
            try:
                if file is not None:
                    file.close()
            except OSError as failed:
                if error is None:
                    raise ValueError(
                        f"{self._folder.parent} cannot be written: {failed.strerror}"
                    ) from failed


class _Events:
    """TensorBoard events, written without the library's thread: on a full disk it would wait.

    Args:
      folder: where they go.
      purge_step: from which step on those of earlier files do not count.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(folder / "events")), time.monotonic()
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, tag: str, value: float, step: int) -> None:
        """Adds a scalar; at most half a minute later it is in the file."""
        from tensorboardX.summary import scalar

        self._add(step, summary=scalar(tag, value))
        if time.monotonic() > self._flushed + 30:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, oldest first, without a last line that a crash cut off.

    Raises:
      ValueError: another line is damaged.
    """
    path = Path(workdir) / METRICS
    if not path.exists():
        return []
    lines = _read_text(path).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _read_object(f"{path} line {number}", line)
        except ValueError:
            if number < len(lines):
                raise
            break
        checks.fields(f"{path} line {number}", record, ("step", "split"))
        checks.integer(f"step in {path} line {number}", record["step"])
        records.append(record)
    return records


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise ValueError(f"{path} must be a readable file: {error.strerror}") from error


def _read_object(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {checks.shown(text)}")
    return value


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table; the first column on the left, numbers on the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # A file or a pipe has no width of its own, and rich would squeeze the table into 80 columns.
    width = None if Console().is_terminal else 160
    Console(quiet=not is_writer(), width=width).print(table)


def print_lines(*lines: str) -> None:
    """Prints plain lines, on the writing process alone."""
    for line in lines:
        Console(quiet=not is_writer(), highlight=False).print(line, soft_wrap=True)


def percent(accuracy: float) -> str:
    """A share as per cent with two decimals."""
    return f"{100 * accuracy:.2f} %"


def _plain(value: Any) -> Any:
    """JSON values from numpy ones, paths and tuples; numbers that are not finite as strings."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
