"""What DeepSpeed saves under ZeRO: `global_stepN/`, with files of every rank that hold its part of the float32 weights.

The optimizer's states hold the weights as they are trained, flat and cut into ranks: at the stages 1 and 2 all tensors
of a group one after another, cut once; at stage 3 each tensor cut on its own. The model's states hold names, shapes,
and what is not trained. Nothing in the files is run, and DeepSpeed is not needed.

Source: `zero_to_fp32.py`, which DeepSpeed writes beside them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array, Checkpoint, TensorInfo, without_copied_head
from offprincipal.checkpoints.hostile import is_file, read_bytes, read_config
from offprincipal.checkpoints.torch_objects import StoredPart, read_objects
from offprincipal.errors import CheckpointError

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]{1,6})_mp_rank_([0-9]{1,6})_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]{1,6})_)?mp_rank_([0-9]{1,6})_model_states\.pt")
_LATEST = "latest"
_LONGEST_NAME = 200
_TYPES = FLOATS | INTEGERS


@dataclass(frozen=True)
class _Piece:
    """Some of a tensor's entries: those from `first` of what lies at a place."""

    part: StoredPart
    first: int
    count: int


def folder_at(folder: Path) -> Path | None:
    """The folder with the ranks' files: itself, or the one that `latest` beside it names; None if there is none."""
    if _matches(folder, _OPTIMIZER):
        return folder
    try:
        if not is_file(folder / _LATEST):
            return None
        with (folder / _LATEST).open(encoding="utf-8") as file:
            name = file.read(_LONGEST_NAME).strip()
    except (OSError, ValueError):
        return None
    inside = re.fullmatch(r"[\w-]+", name) is not None and bool(_matches(folder / name, _OPTIMIZER))
    return folder / name if inside else None


def open_zero_shards(folder: Path, source: str, base: Checkpoint | None = None) -> "ZeroShards":
    """The weights in a folder.

    Raises:
        CheckpointError: a rank's file is missing, corrupt or would run code, or the model was cut by tensor or pipeline
            parallelism too.
    """
    at = folder_at(folder)
    assert at is not None
    config = read_config(at, at.parent, otherwise=base.config if base else None)
    try:
        pieces = _pieces(at)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{at} does not have the layout of a ZeRO checkpoint ({type(error).__name__}: {error}): run the "
            "zero_to_fp32.py that DeepSpeed wrote there, and compare its output"
        ) from error
    return ZeroShards(source, at, pieces, config)


class ZeroShards:
    """A `Checkpoint` over one folder.

    Args:
        stored: name -> shape, and the pieces that make it up, in order.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        stored: Mapping[str, tuple[tuple[int, ...], Sequence[_Piece]]],
        config: dict[str, Any],
    ) -> None:
        self.source, self.config, self.folders = source, config, (folder,)
        self.notes: Sequence[str] = ()
        self._stored = stored
        self.tensors: dict[str, TensorInfo] = {}
        for name, (shape, pieces) in sorted(stored.items()):
            dtypes = {piece.part.dtype for piece in pieces}
            if sum(piece.count for piece in pieces) != math.prod(shape) or len(dtypes) > 1:
                raise CheckpointError(f"the parts of {name[:80]} in {folder} do not make up the whole: save it again")
            self.tensors[name] = TensorInfo(name, shape, dtypes.pop() if dtypes else "float32")
        self.tensors = without_copied_head(self.tensors, config, self.read)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        info = self.tensors[name]
        stop = info.numel if stop is None else min(stop, info.numel)
        found, at = [np.empty(0, _TYPES[info.dtype])], 0
        for piece in self._stored[name][1]:
            low, high = max(start - at, 0), min(stop - at, piece.count)
            if low < high:
                found.append(_entries(name, piece, low, high))
            at += piece.count
        return np.concatenate(found)

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(piece.part.path for _, pieces in self._stored.values() for piece in pieces))

    def masters(self) -> None:
        return None


def _entries(name: str, piece: _Piece, low: int, high: int) -> Array:
    dtype = _TYPES[piece.part.dtype]
    start = piece.part.start + (piece.first + low) * dtype.itemsize
    return np.frombuffer(read_bytes(piece.part.path, start, (high - low) * dtype.itemsize, name), dtype)


def _matches(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    """(rank of the data, rank of the model) -> file."""
    try:
        names = sorted(path.name for path in folder.glob("*mp_rank_*") if is_file(path))
    except OSError:
        return {}
    found = ((pattern.fullmatch(name), folder / name) for name in names)
    return {(int(match[1] or 0), int(match[2])): path for match, path in found if match}


def _ranks(folder: Path, pattern: re.Pattern[str], what: str) -> list[Any]:
    """What the files of every rank hold, in order."""
    found = _matches(folder, pattern)
    if any(model for _, model in found):
        raise CheckpointError(
            f"{folder} is also split by tensor parallelism, which is not supported: convert it with DeepSpeed's "
            "ds_to_universal"
        )
    missing = sorted(set(range(max(rank for rank, _ in found) + 1)) - {rank for rank, _ in found}) if found else [0]
    if missing:
        raise CheckpointError(
            f"{folder} lacks the {what} states of rank {missing[0]}: copy every machine's files there"
        )
    return [read_objects(path) for _, path in sorted(found.items())]


def _pieces(folder: Path) -> dict[str, tuple[tuple[int, ...], list[_Piece]]]:
    optimizers = [state["optimizer_state_dict"] for state in _ranks(folder, _OPTIMIZER, "optimizer")]
    models = _ranks(folder, _MODEL, "model")
    world = _world(optimizers[0]["partition_count"])
    if world != len(optimizers):
        raise CheckpointError(f"{folder} has the states of {len(optimizers)} of {world} ranks: copy all of them there")
    found: dict[str, tuple[tuple[int, ...], list[_Piece]]] = {}
    for name in models[0]["buffer_names"]:
        part = models[0]["module"][name]
        found[name] = part.shape, [_Piece(part, 0, math.prod(part.shape))]
    frozen = models[0].get("frozen_param_shapes") or {}
    fragments = [model.get("frozen_param_fragments") or {} for model in models]
    for name, shape in frozen.items():
        parts = [fragment[name] for fragment in fragments]
        found[name] = tuple(shape), _in_order(parts, math.prod(shape))
    if "fp32_flat_groups" in optimizers[0]:
        found |= _stage_three(models[0]["param_shapes"], [state["fp32_flat_groups"] for state in optimizers], world)
    else:
        whole = {name: part for name, part in models[0]["module"].items() if isinstance(part, StoredPart)}
        found = {name: (part.shape, [_Piece(part, 0, math.prod(part.shape))]) for name, part in whole.items()} | found
        groups = [state["single_partition_of_fp32_groups"] for state in optimizers]
        paddings = optimizers[0].get("param_alignment_paddings")
        for i, shapes in enumerate(models[0]["param_shapes"]):
            found |= _stages_one_and_two(shapes, [group[i] for group in groups], paddings[i] if paddings else None)
    shared = models[0].get("shared_params") or {}
    for alias, name in shared.items() if isinstance(shared, dict) else shared:
        if name in found:
            found[alias] = found[name]
    return found


def _world(count: Any) -> int:
    """Ranks over which the weights are cut: one number, or one for every group of parameters."""
    return max(count) if isinstance(count, list) else int(count)


def _stages_one_and_two(
    shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[StoredPart], paddings: Sequence[int] | None
) -> dict[str, tuple[tuple[int, ...], list[_Piece]]]:
    """The tensors of one group, one after another in what the ranks hold, one after another."""
    found, at = {}, 0
    for i, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        found[name] = tuple(shape), _range(ranks, at, at + count)
        at += count + (paddings[i] if paddings else 0)
    return found


def _stage_three(
    groups: Iterable[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[StoredPart]], world: int
) -> dict[str, tuple[tuple[int, ...], list[_Piece]]]:
    """The tensors of all groups, of each an equal part in every rank, the last one filled up."""
    found, at = {}, 0
    for name, shape in (pair for shapes in groups for pair in shapes.items()):
        count = math.prod(shape)
        each = -(-count // world)
        pieces = [piece for rank in ranks for piece in _range(rank, at, at + each)]
        found[name] = tuple(shape), _cut(pieces, count)
        at += each
    return found


def _range(parts: Sequence[StoredPart], start: int, stop: int) -> list[_Piece]:
    """Entries `start` to `stop` of some flat tensors, one after another."""
    found, at = [], 0
    for part in parts:
        count = math.prod(part.shape)
        low, high = max(start - at, 0), min(stop - at, count)
        if low < high:
            found.append(_Piece(part, low, high - low))
        at += count
    return found


def _in_order(parts: Sequence[StoredPart], count: int) -> list[_Piece]:
    """The first entries of some tensors: of one that every rank holds whole, or of the ranks' parts of it."""
    whole = [part for part in parts if math.prod(part.shape) == count][:1]
    return _cut([_Piece(part, 0, math.prod(part.shape)) for part in (whole or parts)], count)


def _cut(pieces: Iterable[_Piece], count: int) -> list[_Piece]:
    """The first `count` entries of some pieces; what fills up the last is left out."""
    found = []
    for piece in pieces:
        taken = min(piece.count, count)
        if taken > 0:
            found.append(_Piece(piece.part, piece.first, taken))
        count -= taken
    return found
