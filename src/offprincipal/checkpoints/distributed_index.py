"""The `.metadata` of a torch.distributed checkpoint: which chunks a tensor has, and where in which file each lies.

It is a pickle, and is read by an unpickler that makes inert records of what torch and Megatron put there: it imports
nothing, not even torch, and calls nothing that the file chooses.
"""

import io
import math
import pickle
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from offprincipal.checkpoints.checkpoint import FLOATS, TensorInfo
from offprincipal.checkpoints.chunked import Chunk, StoredTensor
from offprincipal.checkpoints.hostile import brief, is_file, shape_of
from offprincipal.checkpoints.pickles import require_harmless
from offprincipal.checkpoints.shards import is_inside
from offprincipal.errors import CheckpointError

METADATA = ".metadata"
_MOST_DIMENSIONS = 16
_MOST_BYTES = 1 << 30
# Whose objects become records: those of torch's own metadata and plans, and of Megatron's, which it puts beside them.
_PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.")
_PATHS = {
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_DTYPES = (
    *FLOATS,
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "complex64", "complex128"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


class _Record:
    """What stands for an object of the pickle: the state that was stored for it, and nothing that it could do."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RestrictedUnpickler(pickle.Unpickler):
    """Makes records of what torch and Megatron write into `.metadata`, and refuses all else."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path
        self._kinds: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_PACKAGES):
            return self._kinds.setdefault(name, type(name, (_Record,), {}))
        if (module, name) in _PATHS:
            return type(name, (_Record,), {})
        if module == "torch" and name in _DTYPES:
            return name
        plain: dict[tuple[str, str], Any] = {
            ("torch", "Size"): shape_of,
            ("torch.serialization", "_get_layout"): _layout,
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): partial(defaultdict, None),
            ("builtins", "getattr"): self._member,
        }
        if (module, name) in plain:
            return plain[module, name]
        raise self._refused(module, name)

    def _member(self, kind: Any, name: Any) -> _Record:
        """A member of an enumeration, inert: Python 3.11.0 to 3.11.3 write one as `getattr(kind, name)`."""
        if not isinstance(kind, type) or kind not in self._kinds.values():
            raise self._refused("builtins", "getattr")
        made: _Record = kind(name)
        return made

    def _refused(self, module: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} names {module[:60]}.{name[:60]}, which no checkpoint's metadata needs and which could run "
            "code; it was not run. Do not trust it"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id")


def read_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, for every tensor of a checkpoint: the model's, the optimizer's and others.

    Raises:
        CheckpointError: the metadata is corrupt, would run code, or places a chunk outside the folder or the tensor.
    """
    path = folder / METADATA
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        stored = path.read_bytes()
        require_harmless(stored)
        content = _RestrictedUnpickler(io.BytesIO(stored), path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a corrupt pickle can raise anything
        raise CheckpointError(f"{path} is truncated or corrupt ({error}): download or save it again") from error
    try:
        return _tensors_of(content, folder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not the metadata of a distributed checkpoint ({type(error).__name__}: {error}): save it again"
        ) from error


def _tensors_of(content: Any, folder: Path) -> dict[str, StoredTensor]:
    state = _state(content, "Metadata")
    places = {}
    for index, info in state["storage_data"].items():
        if type(index).__name__ == "MetadataIndex":
            key = _state(index, "MetadataIndex")
            places[key["fqn"], key.get("offset")] = _state(info, "_StorageInfo")
    found = {}
    for name, stored in state["state_dict_metadata"].items():
        if type(stored).__name__ == "TensorStorageMetadata":
            found[_text(name)] = _tensor_of(_text(name), _state(stored, "TensorStorageMetadata"), places, folder)
    return found


def _tensor_of(name: str, stored: Any, places: dict[Any, Any], folder: Path) -> StoredTensor:
    properties = _state(stored["properties"], "TensorProperties")
    dtype = _text(properties["dtype"] if isinstance(properties, dict) else properties[0])
    if dtype not in _DTYPES:
        raise ValueError(f"{brief(dtype)} in place of a type of torch")
    shape = shape_of(stored["size"])
    if len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{name} in {folder} has {len(shape)} dimensions: it is not a weight. Do not trust it")
    chunks = []
    for record in stored["chunks"]:
        box = _state(record, "ChunkStorageMetadata")
        offsets, sizes = shape_of(box["offsets"]), shape_of(box["sizes"])
        if not len(offsets) == len(sizes) == len(shape) or any(
            start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise CheckpointError(f"{folder / METADATA} places a part of {name} outside it. Do not trust it")
        if math.prod(sizes):
            chunks.append(_chunk_of(name, offsets, sizes, places, folder))
            if dtype in FLOATS and math.prod(sizes) * FLOATS[dtype].itemsize > chunks[-1].length:
                raise CheckpointError(f"{folder / METADATA} gives {name} fewer bytes than it needs. Do not trust it")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise CheckpointError(f"{folder / METADATA} does not place every part of {name}: a rank's part was not saved")
    return StoredTensor(TensorInfo(name, shape, dtype), tuple(chunks))


def _chunk_of(
    name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], places: dict[Any, Any], folder: Path
) -> Chunk:
    place = places.get((name, offsets)) or places.get((name, None))
    if place is None:
        raise CheckpointError(f"{folder / METADATA} does not say where {name} at {offsets} is stored: save it again")
    shard, start, length = place["relative_path"], place["offset"], place["length"]
    if not is_inside(shard):
        raise CheckpointError(
            f"{folder / METADATA} places {name} in {brief(shard)}, which is not a file inside its folder. Do not trust "
            "it"
        )
    if place.get("transform_descriptors"):
        raise CheckpointError(f"{name} in {folder} is compressed, which is not supported: save it without extensions")
    path = folder / shard
    if not is_file(path):
        raise CheckpointError(f"{path} is missing, though {METADATA} places {name} there: a rank's file was not copied")
    start, length = shape_of((start, length))
    if start + length > path.stat().st_size:
        raise CheckpointError(f"{path} is truncated: it ends before {name} does. Copy or save it again")
    return Chunk(offsets, sizes, path, start, length)


def _state(record: Any, kind: str) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise TypeError(f"a {type(record).__name__} in place of a {kind}")
    return record.state


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a name")
    return value


def _layout(name: Any) -> str:
    return _text(name)
