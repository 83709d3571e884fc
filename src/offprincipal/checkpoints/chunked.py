"""Tensors that lie in pieces: boxes of them, each somewhere in a file, put together a range of rows at a time."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import FLOATS, Array, TensorInfo, without_copied_head
from offprincipal.errors import CheckpointError


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and its chunks, which fill it."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]


class Chunked(ABC):
    """A `Checkpoint` over the files of one folder; a kind of it says how a chunk's bytes are read.

    Args:
        folder: which holds its files; stored: name -> tensor; masters: the same in float32, where the files hold them.

    Raises:
        CheckpointError: a tensor is of a type that is not read.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        stored: Mapping[str, StoredTensor],
        config: dict[str, Any],
        masters: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        self.source, self.config, self.folders = source, config, (folder,)
        self.notes: Sequence[str] = ()
        self._stored, self._masters = stored, masters
        self.tensors: dict[str, TensorInfo] = _infos(stored)
        for name, info in self.tensors.items():
            if info.floating and info.dtype not in FLOATS:
                raise CheckpointError(
                    f"{name} in {source} is stored as {info.dtype}, which is not supported: use bfloat16"
                )
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

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(chunk.path for tensor in self._stored.values() for chunk in tensor.chunks))

    def masters(self) -> "Chunked | None":
        return type(self)(self.source, self.folders[0], self._masters, self.config) if self._masters else None

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

    @abstractmethod
    def _load(self, name: str, chunk: Chunk) -> Array:
        """A chunk's entries, flat."""


def _infos(stored: Mapping[str, StoredTensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, tensor.info.shape, tensor.info.dtype) for name, tensor in sorted(stored.items())}
