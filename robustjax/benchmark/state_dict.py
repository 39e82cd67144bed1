"""The tensors in a checkpoint of another library, read without running any code it may hold."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def read_state_dict(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors in a file, by name; nothing else may be in it.

    Args:
      path: an archive of arrays (``.npz``), a file of tensors (``.safetensors``), or any other
        name: a file of ``torch.save``, which needs PyTorch to be read. None is allowed to run code:
        ``allow_pickle=False``, ``weights_only=True``. A dict that holds one dict, as
        ``{"state_dict": {...}}``, stands for the inner one.
      entry: of a file that holds more beside the weights, such as an optimizer or the epoch, the
        entry that holds them.

    Raises:
      ValueError: there is no such file, it holds anything but a dict of tensors, or PyTorch is
        missing or too old to be safe.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path must be a file that exists, got {path}")
    read = {".npz": _read_npz, ".safetensors": _read_safetensors}.get(path.suffix, _read_torch)
    content = read(path)
    if entry is not None:
        if not isinstance(content, Mapping) or entry not in content:
            held = ", ".join(map(str, content)) if isinstance(content, Mapping) else "no dict"
            raise ValueError(f"entry must be one of those in {path}, {held}; got {entry!r}")
        content = content[entry]
    while isinstance(content, Mapping) and len(content) == 1:
        (inner,) = content.values()
        if not isinstance(inner, Mapping):
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    arrays = {name: as_array(value) for name, value in content.items()}
    others = [
        f"{name} ({type(content[name]).__name__})"
        for name, array in arrays.items()
        if array is None or not isinstance(name, str)
    ]
    if others or not arrays:
        inner = [repr(name) for name, value in content.items() if isinstance(value, Mapping)]
        hint = f"; choose the weights with entry={' or '.join(inner)}" if inner else ""
        raise ValueError(
            f"{path} must hold nothing but named tensors, got {', '.join(others) or 'none'}{hint}"
        )
    return arrays


def _read_npz(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever a damaged or malicious file makes numpy raise
        raise ValueError(f"{path} must be an archive of plain arrays: {error}") from error


_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
           "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
           "BOOL": np.bool_}  # fmt: skip


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Length of the header, header in JSON, raw arrays: the format is no more than that."""
    content = path.read_bytes()
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        arrays = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                if not 0 <= first <= last <= len(content) - start:
                    raise ValueError(f"{name} lies outside of the file")
                part = content[start + first : start + last]
                array = np.frombuffer(part, np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<"))
                arrays[name] = array.reshape(entry["shape"])
    except Exception as error:  # whatever a damaged or malicious file makes the reading raise
        raise ValueError(f"{path} must be a file of safetensors: {error}") from error
    return arrays


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "path must end in .safetensors or .npz where PyTorch is not installed (pip install "
            f"torch), got {path}"
        ) from error
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if version < (2, 6):
        # Before 2.6 weights_only=True could be made to run code (CVE-2025-32434).
        raise ValueError(f"PyTorch must be >= 2.6 to read {path} safely, got {torch.__version__}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes PyTorch raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} must be a checkpoint of tensors alone: {reason}") from error


def as_array(value: Any) -> np.ndarray | None:
    """An array or PyTorch tensor as a NumPy array; ``None`` if it is neither, or not dense."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value)
    if not hasattr(value, "detach"):
        return None
    tensor = value.detach()
    try:
        # NumPy has no bfloat16.
        return tensor.float().numpy() if "bfloat16" in str(tensor.dtype) else tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError):  # sparse, quantised, without values
        return None
