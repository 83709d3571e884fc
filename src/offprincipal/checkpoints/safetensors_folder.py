"""A folder with safetensors: `model.safetensors`, shards with an index or numbered, or one file by any other name.

Everything in the folder is hostile input: no pickle is opened, no path leaves the folder, every read can fail.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints import fsdp_shards, zero_shards
from offprincipal.checkpoints.alignment import aligned
from offprincipal.checkpoints.checkpoint import Array, Checkpoint, TensorInfo, without_copied_head
from offprincipal.checkpoints.float8 import (
    Block,
    block_in,
    dequantise,
    fit_block,
    scales_beside,
    scales_of_activations,
)
from offprincipal.checkpoints.hostile import is_file, read_config
from offprincipal.checkpoints.packed import Packed, dequantised_notes, packed_in, state_shape
from offprincipal.checkpoints.safetensors_file import SafetensorsFile
from offprincipal.checkpoints.shards import files_of, open_files
from offprincipal.errors import CheckpointError
from offprincipal.file_names import MASTERS

SUFFIX = ".safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_USUAL = (WEIGHTS, INDEX)
_COMPARABLE = {"float64", "float32", "float16", "bfloat16"}


def is_usual(folder: Path) -> bool:
    """Whether a folder holds a model under the names that transformers gives it."""
    return any(is_file(folder / name) for name in _USUAL)


def files_in(folder: Path) -> list[Path]:
    """The files that a model in a folder is read from; [] where it holds none.

    Raises:
        CheckpointError: shards are missing, or there are several files to choose from.
    """
    return files_of(folder, SUFFIX, _USUAL)


def _trainers_own(folder: Path) -> Checkpoint | None:
    """The float32 weights that a trainer kept beside a model that it wrote: DeepSpeed's states, or verl's shards."""
    if zero_shards.folder_at(folder) is not None:
        return zero_shards.open_zero_shards(folder, str(folder))
    above = folder.parent
    if folder.name == "huggingface" and fsdp_shards.is_at(above):
        found = fsdp_shards.open_fsdp_shards(above, str(above))
        return found if {info.dtype for info in found.tensors.values() if info.floating} == {"float32"} else None
    return None


class SafetensorsFolder:
    """A `Checkpoint` over one folder.

    Args:
        files: what is read of it, as `files_of` finds them; None finds them.

    Raises:
        CheckpointError: a file is truncated, corrupt, a pickle or missing, or the index is bad.
    """

    def __init__(self, folder: Path, source: str | None = None, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.folders: tuple[Path, ...] = (folder,)
        self.source = source or str(folder)
        self.config = read_config(folder)
        self._setup(open_files(files or files_in(folder), SafetensorsFile))

    def _setup(self, files: Mapping[str, Any]) -> None:
        """Enter the tensors by name -> the file that each lies in, which has `tensors`, `read` and `path`."""
        self._files = files
        self.stored = {name: file.tensors[name] for name, file in sorted(files.items())}
        self._scales = scales_beside(self.stored)
        self._packed = {name: self._shaped(packed) for name, packed in packed_in(self.stored, self.config).items()}
        self._last = threading.local()  # each thread unpacks a tensor of its own

    def _shaped(self, packed: Packed) -> Packed:
        """A packed weight with its shape, which bitsandbytes keeps in a tensor."""
        if "state" not in packed.members:
            return packed
        name = packed.members["state"].name
        try:
            return replace(packed, info=replace(packed.info, shape=state_shape(self.read_stored(name))))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} in {self.source} is damaged ({error}): save the model again") from error

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        infos = dict(without_copied_head(self.stored, self.config, self.read_stored))
        if self._scales:
            for name in (*self._scales.values(), *scales_of_activations(infos)):
                infos.pop(name, None)
        if self._packed:
            packed = {member.name for packed in self._packed.values() for member in packed.members.values()}
            infos = {name: info for name, info in infos.items() if name not in packed}
            infos = dict(sorted((infos | {name: packed.info for name, packed in self._packed.items()}).items()))
        for name, info in infos.items():
            if name in self._packed:
                continue
            if name in self._scales:
                self._block(name)
                infos[name] = replace(info, dtype="float32")
            elif info.floating and info.dtype not in _COMPARABLE:
                raise CheckpointError(
                    f"{name} in {self._files[name].path} is stored as {info.dtype} without scales: convert it to "
                    "bfloat16"
                )
        return infos

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(file.path for file in self._files.values()))

    @property
    def notes(self) -> list[str]:
        count = len(self._scales.keys() & self.tensors.keys())
        said = [f"{count} tensors stored in float8 with scales were dequantised"] if count else []
        return said + dequantised_notes(f"packed by {packed.method}" for packed in self._packed.values())

    def read_stored(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Entries of a tensor as they are in the file, not dequantised."""
        entries: Array = self._files[name].read(name, start, stop)
        return entries

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        if name in self._packed:
            return self._read_packed(self._packed[name], start, stop)
        entries = self.read_stored(name, start, stop)
        if name not in self._scales:
            return entries
        scale = self._scales[name]
        scales = self._files[scale].read(scale).reshape(self.stored[scale].shape)
        return dequantise(entries, start, self.stored[name].shape, scales, self._block(name))

    def _read_packed(self, packed: Packed, start: int, stop: int | None) -> Array:
        size = packed.info.numel // packed.slices
        stop = packed.info.numel if stop is None else stop
        pieces = [
            self._slice(packed, place)[max(start - place * size, 0) : stop - place * size]
            for place in range(start // size, -(-stop // size) if stop > start else 0)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.float32)

    def _slice(self, packed: Packed, place: int) -> Array:
        """The entries of one of a packed weight's slices, flat."""
        if getattr(self._last, "key", None) == (packed.info.name, place):
            kept: Array = self._last.entries
            return kept
        parts = {}
        for part, member in packed.members.items():
            size = member.numel // packed.slices
            shape = member.shape[1:] if packed.stacked else member.shape
            parts[part] = self.read_stored(member.name, place * size, (place + 1) * size).reshape(shape)
        size = packed.info.numel // packed.slices
        try:
            with np.errstate(all="ignore"):
                entries = packed.decode(parts).reshape(-1)[:size]
            if len(entries) != size:
                raise ValueError("its parts do not fit its shape")
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{packed.info.name} of {self.source} cannot be unpacked as {packed.method} ({error}): give it "
                "dequantised"
            ) from error
        self._last.key, self._last.entries = (packed.info.name, place), entries
        return entries

    def masters(self) -> Checkpoint | None:
        folder = self.folder / MASTERS
        if files_in(folder):
            return SafetensorsFolder(folder)
        found = _trainers_own(self.folder)
        return None if found is None else aligned(found, self)

    def _block(self, name: str) -> Block:
        """Rows and columns of a float8 weight that share a scale."""
        info, scale = self.stored[name], self.stored[self._scales[name]]
        block = fit_block(info.shape, scale.shape, block_in(self.config))
        if block is None:
            raise CheckpointError(
                f"{scale.name} in {self._files[scale.name].path} has shape {scale.shape}, which does not fit {name} of "
                f"shape {info.shape}: set quantization_config.weight_block_size in config.json, or convert the model "
                "to bfloat16"
            )
        return block
