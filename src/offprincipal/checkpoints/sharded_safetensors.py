"""Safetensors of several ranks, as torch's `HuggingFaceStorageWriter` leaves them: each file holds boxes of tensors.

`shard-00001-model-00001-of-00002.safetensors` and its like; where a box begins in its tensor stands in the metadata.
Exports of NeMo and torchtitan are so, before they are consolidated.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from offprincipal.checkpoints.checkpoint import Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.chunked import Chunk, Chunked, StoredTensor
from offprincipal.checkpoints.hostile import is_file, read_config
from offprincipal.checkpoints.safetensors_file import SafetensorsFile
from offprincipal.errors import CheckpointError

_NAME = re.compile(r"shard-[0-9]{1,6}-model-[0-9]{1,6}-of-[0-9]{1,6}\.safetensors")
_WHERE = "DCP_SHARDING_INFO"
_INSIDE = "sharded"


def files_in(folder: Path) -> list[Path]:
    """The files of a checkpoint in a folder, or in its folder `sharded`."""
    for place in (folder, folder / _INSIDE):
        found = sorted(
            path for path in place.glob("shard-*.safetensors") if _NAME.fullmatch(path.name) and is_file(path)
        )
        if found:
            return found
    return []


def open_sharded(folder: Path, source: str, base: Checkpoint | None = None) -> "ShardedSafetensors":
    """The checkpoint in a folder.

    Raises:
        CheckpointError: a file is damaged, or its metadata do not say where its boxes lie.
    """
    files = {path: SafetensorsFile(path) for path in files_in(folder)}
    config = read_config(folder, next(iter(files)).parent, otherwise=base.config if base else None)
    return ShardedSafetensors(source, folder, files, config)


class ShardedSafetensors(Chunked):
    """A `Checkpoint` over the files of all ranks."""

    def __init__(
        self, source: str, folder: Path, files: Mapping[Path, SafetensorsFile], config: dict[str, Any]
    ) -> None:
        self._files = files
        chunks: dict[str, list[tuple[Chunk, str]]] = {}
        for path, file in files.items():
            offsets = _offsets(path)
            for name, info in file.tensors.items():
                at = _offset_of(path, name, offsets, info)
                chunks.setdefault(name, []).append((Chunk(at, info.shape, path, 0, info.numel), info.dtype))
        super().__init__(source, folder, {name: _whole(source, name, found) for name, found in chunks.items()}, config)

    def _load(self, name: str, chunk: Chunk) -> Array:
        return self._files[chunk.path].read(name)


def _offsets(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(_WHERE, "")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say where its parts lie ({_WHERE}): save it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not say where its parts lie ({_WHERE}): save it again")
    return found


def _offset_of(path: Path, name: str, offsets: Mapping[str, Any], info: TensorInfo) -> tuple[int, ...]:
    entry = offsets.get(name)
    found = entry.get("saved_offsets") if isinstance(entry, dict) else None
    sane = isinstance(found, list) and len(found) == len(info.shape)
    if not sane or not all(type(at) is int and 0 <= at < 1 << 40 for at in found or ()):
        raise CheckpointError(f"{path} does not say where its part of {name[:200]} lies: save it again")
    return tuple(found or ())


def _whole(source: str, name: str, found: list[tuple[Chunk, str]]) -> StoredTensor:
    """A tensor as large as its boxes reach; gaps are found when it is read."""
    boxes = [chunk for chunk, _ in found]
    if len({dtype for _, dtype in found}) > 1 or len({len(box.sizes) for box in boxes}) > 1:
        raise CheckpointError(f"the parts of {name[:200]} in {source} are of several types or shapes: save it again")
    dimensions = range(len(boxes[0].sizes))
    shape = tuple(max(box.offsets[d] + box.sizes[d] for box in boxes) for d in dimensions)
    unique = dict.fromkeys((box.offsets, box.sizes) for box in boxes)  # what every rank has lies in every file
    kept = tuple(next(box for box in boxes if (box.offsets, box.sizes) == key) for key in unique)
    return StoredTensor(TensorInfo(name, shape, found[0][1]), kept)
