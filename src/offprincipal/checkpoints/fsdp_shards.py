"""What verl saves: `model_world_size_N_rank_R.pt`, a file of every rank with its part of every tensor.

The parts are DTensors: in addition to its entries, each records how the whole is spread over the ranks. Any other
tensor is the same in every rank. `huggingface/` in the same folder holds the configuration.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offprincipal.checkpoints.checkpoint import Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.chunked import Chunk, Chunked, StoredTensor
from offprincipal.checkpoints.hostile import is_file, read_bytes, read_config
from offprincipal.checkpoints.torch_objects import PickledObject, StoredPart, read_objects
from offprincipal.errors import CheckpointError

_FILE = re.compile(r"model_world_size_([0-9]{1,6})_rank_([0-9]{1,6})\.pt")


def is_at(folder: Path) -> bool:
    """Whether a folder holds one."""
    return any(_FILE.fullmatch(path.name) for path in folder.glob("model_world_size_*.pt"))


def open_fsdp_shards(folder: Path, source: str, base: Checkpoint | None = None) -> "FsdpShards":
    """The checkpoint in a folder.

    Raises:
        CheckpointError: a rank's file is missing, corrupt or would run code, or the parts do not make up a whole.
    """
    config = read_config(folder / "huggingface", folder, otherwise=base.config if base else None)
    ranks = [_tensors_in(path) for path in _files(folder)]
    return FsdpShards(source, folder, {name: _stored(name, ranks, folder) for name in ranks[0]}, config)


@dataclass(frozen=True)
class _RankChunk(Chunk):
    part: StoredPart


class FsdpShards(Chunked):
    """A `Checkpoint` over one folder: every chunk is some bytes of a rank's file."""

    def _load(self, name: str, chunk: Chunk) -> Array:
        assert isinstance(chunk, _RankChunk)
        return chunk.part.entries(read_bytes(chunk.path, chunk.start, chunk.length, name))


def _files(folder: Path) -> list[Path]:
    """Every rank's file, in order."""
    found = {match: path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)) and is_file(path)}
    sizes = {int(match[1]) for match in found}
    if len(sizes) != 1:
        raise CheckpointError(f"{folder} holds shards of runs with {sorted(sizes)} processes: keep those of one")
    by_rank = {int(match[2]): path for match, path in found.items()}
    missing = sorted(set(range(sizes.pop())) - by_rank.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks the shard of rank {missing[0]}: copy the folders of every machine there")
    return [by_rank[rank] for rank in sorted(by_rank)]


def _tensors_in(path: Path) -> dict[str, Any]:
    content = read_objects(path)
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} is not a dictionary of tensors, as a state dict is: save the model again")
    return content


def _stored(name: str, ranks: Sequence[Mapping[str, Any]], folder: Path) -> StoredTensor:
    parts = [rank.get(name) for rank in ranks]
    plain = [part for part in parts if isinstance(part, StoredPart)]
    if len(plain) == len(parts):  # the same in every rank
        part = plain[0]
        if any((other.shape, other.dtype) != (part.shape, part.dtype) for other in plain):
            raise CheckpointError(f"{name[:80]} in {folder} is of another shape in another rank: save it again")
        return StoredTensor(TensorInfo(name, part.shape, part.dtype), (_chunk((0,) * len(part.shape), part),))
    try:
        shape = _whole_shape(parts[0])
        boxes = [_box(part, rank, len(ranks)) for rank, part in enumerate(parts)]
        chunks = {offsets: _chunk(offsets, part) for offsets, part in boxes if math.prod(part.shape)}
        dtypes = {part.dtype for _, part in boxes}
        if sum(math.prod(chunk.sizes) for chunk in chunks.values()) != math.prod(shape) or len(dtypes) != 1:
            raise ValueError("its parts do not make up the whole")
        inside = (
            start + size <= whole
            for chunk in chunks.values()
            for start, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        )
        if not all(inside):
            raise ValueError("a part of it lies outside of it")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name[:80]} in {folder} cannot be read ({error or type(error).__name__}): merge the shards with verl's "
            "model merger, and compare its output"
        ) from error
    return StoredTensor(TensorInfo(name, shape, dtypes.pop()), tuple(chunks.values()))


def _chunk(offsets: tuple[int, ...], part: StoredPart) -> Chunk:
    return _RankChunk(offsets, part.shape, part.path, part.start, part.length, part)


def _whole_shape(part: Any) -> tuple[int, ...]:
    """The shape of the tensor of which a rank has a part."""
    shape: tuple[int, ...] = _fields(_spec(part)["tensor_meta"])["shape"]
    return shape


def _box(part: Any, rank: int, ranks: int) -> tuple[tuple[int, ...], StoredPart]:
    """Where a rank's part lies in the whole tensor.

    A dimension of n entries that is spread over w ranks is cut into pieces of ⌈n/w⌉, as torch.chunk does.
    """
    spec, local = _spec(part), part.state["_local_tensor"]
    if not isinstance(local, StoredPart):
        raise ValueError("a part of it is not a plain tensor")
    placements = spec["placements"]
    mesh = _mesh_shape(spec["mesh"], len(placements), ranks)
    sizes, offsets = list(_whole_shape(part)), [0] * len(_whole_shape(part))
    for i, placement in enumerate(placements):
        place = rank // math.prod(mesh[i + 1 :]) % mesh[i]
        if placement.kind == "Replicate":
            continue
        if placement.kind != "Shard":
            raise ValueError(f"it is spread as {placement.kind}")
        dim = _fields(placement)["dim"] if placement.state else placement.arguments[0]
        step = -(-sizes[dim] // mesh[i])
        first = min(place * step, sizes[dim])
        offsets[dim] += first
        sizes[dim] = min(step, sizes[dim] - first)
    if tuple(sizes) != local.shape:
        raise ValueError(f"rank {rank} has {local.shape} of it, where {tuple(sizes)} was expected")
    return tuple(offsets), local


def _spec(part: Any) -> dict[str, Any]:
    if not isinstance(part, PickledObject) or part.kind != "DTensor":
        raise ValueError("it is not a DTensor in every rank")
    return _fields(part.state["_spec"])


def _fields(record: Any) -> dict[str, Any]:
    """The attributes that were stored for an object, or for a named tuple."""
    if isinstance(record.state, dict):
        return record.state
    if record.kind == "TensorMeta":
        return dict(zip(("shape", "stride", "dtype"), record.arguments, strict=False))
    raise ValueError(f"a {record.kind} of another version of torch")


def _mesh_shape(mesh: Any, dimensions: int, ranks: int) -> tuple[int, ...]:
    """How many ranks there are along each dimension of the mesh."""
    fields = _fields(mesh)
    found: tuple[int, ...] | None = None
    if isinstance(fields.get("mesh"), StoredPart):
        found = fields["mesh"].shape
    elif isinstance(fields.get("_layout"), PickledObject):
        axes = _fields(fields["_layout"]).get("axes", ())
        found = tuple(math.prod(_fields(axis)["shape"]) for axis in axes)
    if dimensions == 1:
        found = (ranks,)
    if not found or len(found) != dimensions or math.prod(found) != ranks or 0 in found:
        raise ValueError("its device mesh is not recorded")
    return found
