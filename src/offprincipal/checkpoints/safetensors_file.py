"""One safetensors file: what its header says, and ranges of entries read from it without mapping it into memory.

The safetensors library checks the header; entries are then read at their offsets, because a mapped page stays resident
and one checkpoint can be larger than memory. Nothing here can run a pickle.
"""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array, TensorInfo
from offprincipal.errors import CheckpointError

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("U", "uint"), ("I", "int")) for bits in (8, 16, 32, 64)},
}
_STORED = FLOATS | INTEGERS
_MOST_DIMENSIONS = 16


class SafetensorsFile:
    """The tensors of one file.

    Raises:
        CheckpointError: it is truncated, corrupt, a pickle, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        require_safetensors(path)
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"{path} is truncated or corrupt ({error}): download or save it again") from error
        for name in sorted(header.keys() - {"__metadata__"}):
            self._enter(name, header[name], 8 + length)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Entries `start` to `stop` of a tensor, flat, as stored."""
        info = self.tensors[name]
        if info.dtype not in _STORED:
            raise CheckpointError(
                f"{name} in {self.path} holds {info.dtype}, which is not supported: convert it to bfloat16"
            )
        dtype = _STORED[info.dtype]
        stop = info.numel if stop is None else stop
        raw = np.empty((stop - start) * dtype.itemsize, np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._offsets[name] + start * dtype.itemsize)
                _fill(file, raw.data)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {name} from {self.path}: {error.strerror or error}. Download or save the file again"
            ) from error
        return raw.view(dtype)

    def _enter(self, name: str, entry: dict[str, Any], data: int) -> None:
        shape, stored = tuple(entry["shape"]), entry["dtype"]
        if len(shape) > _MOST_DIMENSIONS:
            raise CheckpointError(
                f"{name} in {self.path} has {len(shape)} dimensions: it is not a weight. Do not trust it"
            )
        info = TensorInfo(name, shape, _DTYPES.get(stored, stored))
        begin, end = entry["data_offsets"]
        if info.dtype in _STORED and (end - begin) != math.prod(shape) * _STORED[info.dtype].itemsize:
            raise CheckpointError(f"{name} in {self.path} has another size than its shape says. Do not trust it")
        self.tensors[name], self._offsets[name] = info, data + begin


def require_safetensors(path: Path) -> None:
    """Let the safetensors library check a file's header.

    Raises:
        CheckpointError: it is truncated, corrupt, a pickle, or cannot be opened.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        if _looks_like_pickle(path):
            raise CheckpointError(
                f"{path} is a pickle under the name of a safetensors file, and was not opened. Do not trust it"
            ) from error
        raise CheckpointError(f"{path} is truncated or corrupt ({error}): download or save it again") from error
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error


def _fill(file: io.FileIO, buffer: memoryview) -> None:
    """Read a buffer's length; a read can come back short, and an end of file is an error."""
    done = 0
    while done < len(buffer):
        got = file.readinto(buffer[done:])
        if not got:
            raise OSError("the file ends before the tensor does")
        done += got


def _looks_like_pickle(path: Path) -> bool:
    """Whether a file that is not a safetensors file starts as `pickle.dump` or `torch.save` starts one."""
    with path.open("rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80"
