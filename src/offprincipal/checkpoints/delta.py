"""A delta file: the changes from one checkpoint to another, safe to open, and itself a checkpoint on its base.

It is a safetensors file. Its metadata contain an index: for each tensor its shape, type, encoding, and hashes of its
base and its result. Its tensors are bytes of `checkpoints.delta_codec`.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open

from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.delta_codec import DamagedDelta, Encoded, Kind, decode, expanded
from offprincipal.checkpoints.hostile import is_file
from offprincipal.checkpoints.safetensors_file import SafetensorsFile
from offprincipal.checkpoints.safetensors_folder import SafetensorsFolder
from offprincipal.errors import CheckpointError
from offprincipal.file_names import MASTERS

SUFFIX = ".delta"
FORMAT, VERSION = "offprincipal.delta", "1"
_PARTS = {"same": (), "sparse": ("classes", "gaps", "signs", "sizes"), "dense": ("data",), "whole": ("data",)}
_STORED = FLOATS | INTEGERS
_FREELY, _RATIO = 1 << 28, 1000  # bytes that may come of anything, and of each byte beyond
_MOST_FILE = 1 << 26


class Stored(Protocol):
    """Tensors as they are stored, whatever they stand for."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape and type."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Entries of one, flat."""
        ...


class Entry(BaseModel):
    """One tensor of the index.

    Args:
        source: the base's tensor that it starts from; base: its hash; tuned: the hash of what it should come to.
        changed: how many entries differ.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    shape: list[int] = Field(max_length=16)
    dtype: str
    kind: Kind
    changed: int = Field(ge=0)
    source: str | None = None
    base: str | None = None
    tuned: str


class Index(BaseModel):
    """What the metadata of a delta say.

    Args:
        base, tuned: what was compared, as it was named. files: name -> size of a file beside the tuned weights.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    base: str
    tuned: str
    tensors: dict[str, Entry]
    files: dict[str, int] = {}


class DeltaFile:
    """The tensors that a delta leads to.

    Args:
        base: what it starts from.

    Raises:
        CheckpointError: it is damaged, no delta, or one from another base.
    """

    def __init__(self, path: Path, base: Stored) -> None:
        self.path, self.base = path, base
        self._file, self.index = SafetensorsFile(path), read_index(path)
        self._numbers = {name: number for number, name in enumerate(self.index.tensors)}
        self.tensors = {
            name: TensorInfo(name, tuple(entry.shape), entry.dtype)
            for name, entry in sorted(self.index.tensors.items())
        }
        for name, entry in self.index.tensors.items():
            self._require_sane(name, entry)
        self._sure: set[str] = set()
        self._last = threading.local()  # each thread reads a tensor of its own

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Entries `start` to `stop` of a tensor, flat, as stored."""
        entry = self.index.tensors[name]
        if entry.kind == "same" and name in self._sure:
            return self.base.read(str(entry.source), start, stop)
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.entries = None, self._decoded(name, entry)
            self._last.name = name
        entries: Array = self._last.entries[start:stop]
        return entries

    def text(self, name: str) -> bytes:
        """A file that was beside the tuned weights."""
        key = f"file.{name}"
        try:
            return expanded(self._file.read(key).tobytes(), self.index.files[name])
        except (KeyError, DamagedDelta) as error:
            raise self._damaged(name, error) from error

    def _decoded(self, name: str, entry: Entry) -> Array:
        info = self.tensors[name]
        before = None
        if entry.source is not None:
            before = self.base.read(entry.source)
            if digest(before, info) != entry.base:
                raise CheckpointError(
                    f"{self.path} starts from another {entry.source} than this base has: give the base that it was "
                    f"made from, {self.index.base[:200]!r}"
                )
        parts = {part: self._file.read(f"{self._numbers[name]}.{part}").tobytes() for part in _PARTS[entry.kind]}
        try:
            words = decode(Encoded(entry.kind, parts, entry.changed), before, entry.dtype, info.numel)
        except DamagedDelta as error:
            raise self._damaged(name, error) from error
        values = words.view(_STORED[entry.dtype])
        if digest(values, info) != entry.tuned:
            raise self._damaged(name, DamagedDelta("it comes to other bits than those that were kept"))
        self._sure.add(name)
        return values

    def _require_sane(self, name: str, entry: Entry) -> None:
        info, keys = self.tensors[name], [f"{self._numbers[name]}.{part}" for part in _PARTS[entry.kind]]
        missing = [key for key in keys if key not in self._file.tensors]
        if missing or entry.dtype not in _STORED or any(size < 0 for size in entry.shape):
            raise self._damaged(name, DamagedDelta(f"its {missing[0] if missing else 'shape or type'} is wrong"))
        if entry.source is None:
            size = info.numel * _STORED[entry.dtype].itemsize
            if entry.kind != "whole" or size > max(_FREELY, _RATIO * self._file.tensors[keys[0]].numel):
                raise self._damaged(name, DamagedDelta("it would grow beyond belief"))
            return
        base = self.base.tensors.get(entry.source)
        if base is None or (base.shape, base.dtype) != (info.shape, info.dtype):
            raise CheckpointError(
                f"{self.path} starts from {entry.source[:200]} of shape {info.shape} in {entry.dtype}, which this base "
                f"lacks: give the base that it was made from, {self.index.base[:200]!r}"
            )

    def _damaged(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{name[:200]} in {self.path} is damaged ({error}): copy or make the delta again")


class DeltaCheckpoint(SafetensorsFolder):
    """A `Checkpoint` that is a base and a delta; read as the folder is that it was made from."""

    def __init__(self, path: Path, source: str, base: Checkpoint) -> None:
        self.folder, self.folders, self.source = path.parent, (path.parent, *base.folders), source
        self._name = path.stem
        file = DeltaFile(path, as_stored(base))
        self.config = json.loads(file.text("config.json")) if "config.json" in file.index.files else dict(base.config)
        self._base_files = list(base.files)
        self._setup(dict.fromkeys(file.tensors, file))

    @property
    def files(self) -> list[Path]:
        return [*super().files, *self._base_files]

    @property
    def notes(self) -> list[str]:
        return [*super().notes, f"{self.source} is a delta, applied to the given base"]

    def masters(self) -> Checkpoint | None:
        kept = self.folder / MASTERS / f"{self._name}.safetensors"
        return SafetensorsFolder(kept.parent, str(kept), [kept]) if is_file(kept) else None


def open_delta(path: Path, source: str, base: Checkpoint | None) -> DeltaCheckpoint:
    """The checkpoint that a delta leads to from its base.

    Raises:
        CheckpointError: there is no base, it is another, or the file is damaged.
    """
    if base is None:
        raise CheckpointError(
            f"{path} is a delta: give the base that it starts from, {read_index(path).base[:200]!r}, first"
        )
    return DeltaCheckpoint(path, source, base)


def read_index(path: Path) -> Index:
    """The index of a delta.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    SafetensorsFile(path)  # refuses what is not such a file
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a delta made by offprincipal, as {SUFFIX} files have to be: rename it if it is safetensors"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {metadata.get('version', '')[:20]!r}: install a newer offprincipal"
        )
    try:
        index = Index.model_validate_json(metadata.get("index", ""))
    except ValidationError as error:
        raise CheckpointError(f"the index of {path} is damaged ({error.errors()[0]['msg']}): copy it again") from error
    for name, size in index.files.items():
        if not is_plain(name) or not 0 <= size <= _MOST_FILE:
            raise CheckpointError(f"{path} names a file {name[:80]!r} that must not be written. Do not trust it")
    return index


def as_stored(checkpoint: Any) -> Stored:
    """The tensors of a checkpoint as they are stored: not dequantised, and with all copies of the embedding."""
    return _AsStored(checkpoint) if isinstance(checkpoint, SafetensorsFolder) else checkpoint


def digest(values: Array, info: TensorInfo) -> str:
    """A hash of a tensor's type, shape and bits."""
    found = hashlib.blake2b(f"{info.dtype}{list(info.shape)}".encode(), digest_size=16)
    found.update(np.ascontiguousarray(values).view(np.uint8).data)
    return found.hexdigest()


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder, and no path, nor hidden."""
    return 0 < len(name) <= 100 and not name.startswith(".") and all(c.isalnum() or c in "._-" for c in name)


class _AsStored:
    def __init__(self, folder: SafetensorsFolder) -> None:
        self.tensors, self.read = folder.stored, folder.read_stored
