"""The state file of a long evaluation: one ``.npz`` of arrays and a JSON header."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from robustjax import checks

HEADER = "header"


def fingerprint(*trees: Any) -> str:
    """A digest of arrays: their values, shapes and dtypes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write(path: str | os.PathLike, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Writes in one step: an interrupted write leaves the old file as it was.

    Raises:
      ValueError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **{HEADER: np.array(json.dumps(header))}, **arrays)
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"state file {path} cannot be written: {error.strerror}") from error


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The header and the arrays; None if there is no file.

    Raises:
      ValueError: the file is damaged or something else.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(str(arrays.pop(HEADER)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a state file, or damaged: {error}") from error
    checks.fields(f"the header of {path}", header, ("setting",))
    return header, arrays
