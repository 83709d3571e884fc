"""Checkpoints of torch.distributed: a folder with `.metadata` and a `.distcp` file of every rank.

FSDP writes them, by accelerate (`pytorch_model_fsdp_0/` in a Trainer's checkpoint) and by torchtitan (`step-100/`). The
model's tensors are kept, an optimizer's and a data loader's left out.
"""

import io
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import FLOATS, Array, Checkpoint, TensorInfo, without_copied_head
from offprincipal.checkpoints.distributed_index import METADATA, Chunk, StoredTensor, read_stored_tensors
from offprincipal.checkpoints.hostile import is_file, read_json
from offprincipal.checkpoints.torch_files import as_array, checked_tensor, dtype_name, load_tensors
from offprincipal.errors import CheckpointError

_FSDP = "pytorch_model_fsdp_*"
_NOT_THE_MODEL = re.compile(r"(?:optimizers?|optim|lr_schedulers?|dataloader|train_state)(?:\.|$)")


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds one, itself or as accelerate puts it there."""
    return is_file(folder / METADATA) or len(_inside(folder)) == 1


def open_distributed(folder: Path, source: str, base: Checkpoint | None = None) -> "Distributed":
    """The checkpoint in a folder.

    Raises:
        CheckpointError: it is corrupt or incomplete, would run code, or holds no model.
    """
    at = folder if is_file(folder / METADATA) else _inside(folder)[0]
    config = next(
        (read_json(path) for path in (at / "config.json", folder / "config.json") if is_file(path)),
        dict(base.config) if base else {},
    )
    stored = {name: tensor for name, tensor in read_stored_tensors(at).items() if not _NOT_THE_MODEL.match(name)}
    if not stored:
        raise CheckpointError(f"{at} holds no model's tensors: give the folder that has them, not the optimizer's")
    return Distributed(source, at, _unwrapped(stored), config)


class Distributed:
    """A `Checkpoint` over one folder.

    Args:
        folder: which holds its files; stored: name -> tensor.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        stored: Mapping[str, StoredTensor],
        config: dict[str, Any],
    ) -> None:
        self.source, self.config, self.folders = source, config, (folder,)
        self.notes: Sequence[str] = ()
        self._stored = stored
        self.tensors: dict[str, TensorInfo] = _infos(stored)
        for name, info in self.tensors.items():
            if info.floating and info.dtype not in FLOATS:
                raise CheckpointError(f"{name} in {source} is stored as {info.dtype}, which is not read: use bfloat16")
        self._last = threading.local()  # each thread reads a tensor of its own
        self.tensors = without_copied_head(self.tensors, config, self.read)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        if stop <= start:
            return np.empty(0, FLOATS.get(info.dtype, info.dtype))
        width = info.numel // info.shape[0] if info.shape else 1
        first, last = start // width, -(-stop // width)
        return self._rows(name, first, last).reshape(-1)[start - first * width : stop - first * width]

    def masters(self) -> None:
        return None

    def _rows(self, name: str, first: int, last: int) -> Array:
        """Whole rows of a tensor, put together from the chunks that overlap them."""
        stored, info = self._stored[name], self.tensors[name]
        shape = info.shape or (1,)
        rows = np.zeros((last - first, *shape[1:]), FLOATS.get(info.dtype, info.dtype))
        filled = 0
        for chunk in stored.chunks:
            offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
            low, high = max(offsets[0], first), min(offsets[0] + sizes[0], last)
            if low >= high:
                continue
            part = self._entries(name, chunk).reshape(sizes)[low - offsets[0] : high - offsets[0]]
            box = tuple(slice(at, at + size) for at, size in zip(offsets[1:], sizes[1:], strict=True))
            rows[(slice(low - first, high - first), *box)] = part
            filled += part.size
        if filled != rows.size:
            raise CheckpointError(f"the parts of {name} in {self.source} overlap or leave gaps: do not trust it")
        return rows

    def _entries(self, name: str, chunk: Chunk) -> Array:
        """A chunk's entries; those of the tensor that was read last are kept."""
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.kept = name, {}
        kept: dict[Chunk, Array] = self._last.kept
        if chunk not in kept:
            kept[chunk] = self._load(name, chunk)
        return kept[chunk]

    def _load(self, name: str, chunk: Chunk) -> Array:
        try:
            with chunk.path.open("rb") as file:
                file.seek(chunk.start)
                content = file.read(chunk.length)
        except OSError as error:
            raise CheckpointError(f"cannot read {name} from {chunk.path}: {error.strerror or error}") from error
        where = f"{name} in {chunk.path}"
        tensor = checked_tensor(load_tensors(io.BytesIO(content), where), where)
        if tuple(tensor.shape) != chunk.sizes or dtype_name(tensor.dtype) != self.tensors[name].dtype:
            raise CheckpointError(f"{where} is not of the shape and type that {METADATA} gives: save it again")
        return as_array(tensor.reshape(-1))


def _inside(folder: Path) -> list[Path]:
    """The folders that accelerate put into a checkpoint's."""
    return sorted(path for path in folder.glob(_FSDP) if is_file(path / METADATA))


def _unwrapped(stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors without the `model.` that accelerate and torchtitan put in front of every name, if they did."""
    inner = {name.removeprefix("model."): tensor for name, tensor in stored.items() if name.startswith("model.")}
    heads = ("model.", "lm_head.", "tok_embeddings.")
    return inner if len(inner) == len(stored) and any(name.startswith(heads) for name in inner) else stored


def _infos(stored: Mapping[str, StoredTensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, tensor.info.shape, tensor.info.dtype) for name, tensor in sorted(stored.items())}
