"""Files of `torch.save`: `pytorch_model.bin`, shards with `pytorch_model.bin.index.json`, or one file by another name.

They are pickles. Those in torch's zipped format are read by `torch_objects`, which imports nothing, and their entries
from where they lie; older ones by torch's own restricted unpickler (`weights_only=True`), which refuses whatever could
run code; nothing here ever turns that off.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offprincipal.checkpoints.checkpoint import FLOATS, Array, TensorInfo, without_copied_head
from offprincipal.checkpoints.hostile import is_file, read_bytes, read_config
from offprincipal.checkpoints.pickles import require_harmless
from offprincipal.checkpoints.shards import open_files
from offprincipal.checkpoints.torch_objects import MOST_PICKLE, PickledObject, StoredPart, read_objects
from offprincipal.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_FULL = "pytorch_model_fsdp.bin"  # accelerate's full state dict
_OF_NANOCHAT = re.compile(r"model_[0-9]{1,12}\.pt")
_INNER = ("model", "module", "state_dict", "model_state_dict", "state", "actor")
_DEEPEST = 3
_MOST_DIMENSIONS = 16
_GLOBAL = re.compile(r"GLOBAL ([\w.]{1,80})")


class TorchFile:
    """The tensors of one file.

    Raises:
        CheckpointError: it is truncated or corrupt, holds code, or is not a dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = _state_dict(read_objects(path) if _is_zip(path) else load_tensors(path, path))
        if not isinstance(content, dict) or not content:
            raise CheckpointError(f"{path} is not a dictionary of tensors, as a state dict is: save the model again")
        self._tensors: dict[str, Tensor | StoredPart] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name in sorted(content, key=str):
            if not isinstance(name, str):
                raise CheckpointError(
                    f"{path} is not a dictionary of tensors, as a state dict is: save the model again"
                )
            value = content[name]
            if not isinstance(value, StoredPart):
                value = checked_tensor(value, f"{name[:80]!r} in {path}")
            self._tensors[name] = value
            self.tensors[name] = TensorInfo(name, tuple(value.shape), dtype_name(value.dtype))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Entries `start` to `stop` of a tensor, flat, as stored."""
        found = self._tensors[name]
        if not isinstance(found, StoredPart):
            return as_array(found.reshape(-1)[start:stop])
        if not found.contiguous:
            return found.entries(read_bytes(found.path, found.start, found.length, name))[start:stop]
        numel, size = self.tensors[name].numel, found.itemsize
        stop = numel if stop is None else min(stop, numel)
        content = read_bytes(found.path, found.start + start * size, max(stop - start, 0) * size, name)
        return np.frombuffer(content, found.kind)


def files_in(folder: Path) -> list[Path]:
    """The files that a model in a folder is read from; [] where it holds none."""
    usual = next(([folder / name] for name in (WEIGHTS, INDEX, _FULL) if is_file(folder / name)), [])
    return usual or _only([path for path in folder.glob("model_*.pt") if _OF_NANOCHAT.fullmatch(path.name)])


def _only(found: list[Path]) -> list[Path]:
    """One file if there is one; of several none is meant more than another."""
    return found if len(found) == 1 and is_file(found[0]) else []


class TorchFolder:
    """A `Checkpoint` over a folder that has no safetensors.

    Args:
        files: what is read of it; None finds them.

    Raises:
        CheckpointError: a file is truncated, corrupt or missing, holds code, or the index is bad.
    """

    def __init__(self, folder: Path, source: str | None = None, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.folders = (folder,)
        self.source = source or str(folder)
        self.config = read_config(folder)
        self.notes: Sequence[str] = ()
        self._files = open_files(files or files_in(folder), TorchFile)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        infos = {name: file.tensors[name] for name, file in sorted(self._files.items())}
        return without_copied_head(infos, self.config, self.read)

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(file.path for file in self._files.values()))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return self._files[name].read(name, start, stop)

    def masters(self) -> None:
        return None


def _state_dict(content: Any) -> Any:
    """The state dict inside of what a trainer stored beside other things."""
    for _ in range(_DEEPEST):
        inner = next((content[key] for key in _INNER if isinstance(content, dict) and key in content), None)
        if not isinstance(inner, dict):
            break
        content = inner
    return content


def load_tensors(file: Path | io.BytesIO, where: object) -> Any:
    """What a file of `torch.save` holds, without running anything in it.

    Args:
        where: what to call it in an error.

    Raises:
        CheckpointError: it is truncated or corrupt, or holds more than tensors.
    """
    import torch

    try:
        _require_harmless(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found is None and not ("Unsupported" in str(error) and _starts_as_pickle(file)):
            raise CheckpointError(f"{where} is truncated or corrupt: download or save it again") from error
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{where} holds more than tensors{what}, which could run code, and was not opened. Do not trust it; "
            "if it is yours, save it again as safetensors"
        ) from error
    except Exception as error:  # a corrupt pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{where} is truncated or corrupt ({reason}): download or save it again") from error


def _require_harmless(file: Path | io.BytesIO) -> None:
    """Look at the pickles of a file before torch does: one in an archive, five at the beginning of an older file."""
    with file.open("rb") if isinstance(file, Path) else io.BytesIO(file.getvalue()) as stored:
        if stored.read(2) == b"PK":
            with zipfile.ZipFile(stored) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith("/data.pkl") and entry.file_size <= MOST_PICKLE:
                        require_harmless(archive.read(entry))
        else:
            stored.seek(0)
            require_harmless(stored.read(MOST_PICKLE), streams=5)


def checked_tensor(value: object, where: str) -> "Tensor":
    """A value, if it is a plain tensor in memory whose entries lie inside its storage.

    Raises:
        CheckpointError: it is something else, or of a type that cannot be compared.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        what = value.kind if isinstance(value, PickledObject) else type(value).__name__
        raise CheckpointError(
            f"{where} is {what[:80]}, not a tensor: this is not a model's state dict. Save the weights alone"
        )
    if value.dim() > _MOST_DIMENSIONS:
        raise CheckpointError(f"{where} has {value.dim()} dimensions: it is not a weight. Do not trust it")
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{where} is not a plain tensor (sparse, quantised or without data): save it dense")
    if value.is_floating_point() and dtype_name(value.dtype) not in FLOATS:
        raise CheckpointError(f"{where} is stored as {dtype_name(value.dtype)}, which is not supported: use bfloat16")
    return value.detach()


def dtype_name(dtype: object) -> str:
    """The name of a torch type, which is that of its numpy one: 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def as_array(tensor: "Tensor") -> Array:
    """A tensor's entries, bits unchanged, as numpy has them."""
    import torch

    name = dtype_name(tensor.dtype)
    if name not in FLOATS or hasattr(np, name):
        return np.asarray(tensor.numpy())
    bits = torch.uint8 if tensor.element_size() == 1 else torch.int16
    return np.asarray(tensor.contiguous().view(bits).numpy()).view(FLOATS[name])


def _is_zip(path: Path) -> bool:
    return _first_bytes(path) == b"PK\x03\x04"


def _starts_as_pickle(file: Path | io.BytesIO) -> bool:
    """Whether a file is an old pickle, or a zipped one, and not something else under its name."""
    start = _first_bytes(file) if isinstance(file, Path) else file.getvalue()[:4]
    return start[:1] == b"\x80" or start[:2] == b"PK"


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from error
