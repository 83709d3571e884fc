"""Files of `torch.save` that hold more than tensors, as trainers write them, read without running anything in them.

Every object in the pickle becomes an inert record of what was stored for it: nothing is imported, not even torch, and
nothing that the file names is called; a name from outside of what trainers write is refused. Tensors become the place
of their bytes.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array
from offprincipal.checkpoints.hostile import shape_of
from offprincipal.checkpoints.pickles import require_harmless
from offprincipal.errors import CheckpointError

MOST_PICKLE = 1 << 28
_MOST_DIMENSIONS = 16
_TYPES = FLOATS | INTEGERS
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# Packages whose objects trainers store beside weights, and plain ones of Python that cannot run anything.
_PACKAGES = ("torch", "numpy", "deepspeed", "megatron", "transformers", "accelerate")
_PLAIN = {
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "complex")),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    ("argparse", "Namespace"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class StoredPart:
    """A plain tensor, and where its bytes lie.

    Args:
        start: of its first entry, in bytes from the file's beginning.
        strides: entries from one to the next along each dimension; its bytes are those from the first to the last.
    """

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def kind(self) -> "np.dtype[Any]":
        """The type of its entries."""
        found: np.dtype[Any] = _TYPES[self.dtype]
        return found

    @property
    def itemsize(self) -> int:
        return self.kind.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether its entries lie one after another, in row-major order."""
        step, wanted = 1, []
        for size in reversed(self.shape):
            wanted.append(step)
            step *= size
        return all(
            size == 1 or have == want
            for size, have, want in zip(self.shape, self.strides, reversed(wanted), strict=True)
        )

    @property
    def length(self) -> int:
        """The bytes that it spans."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return int((last + 1) * _TYPES[self.dtype].itemsize)

    def entries(self, content: bytes | bytearray) -> Array:
        """Its entries, flat in row-major order, from its bytes."""
        array = np.frombuffer(content, _TYPES[self.dtype])
        steps = tuple(step * array.itemsize for step in self.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(array, self.shape, steps)).reshape(-1)


class PickledObject:
    """What stands for an object of the pickle: what it was made of, and the state that was stored for it.

    Attributes:
        kind: the name of its class.
    """

    kind = ""

    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *arguments: Any, **named: Any) -> "PickledObject":
        made = super().__new__(cls)  # pickles make objects with and without __init__
        made.arguments, made.state, made.items = arguments, named or None, []
        return made

    def __setstate__(self, state: Any) -> None:
        pair = isinstance(state, tuple) and len(state) == 2 and all(s is None or type(s) is dict for s in state)
        self.state = {**(state[0] or {}), **(state[1] or {})} if pair else state  # attributes, and those in slots

    def append(self, item: Any) -> None:
        """Of a class that is a list: kept, like everything."""
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


@dataclass(frozen=True)
class _Storage:
    path: Path
    start: int
    size: int
    dtype: str


def read_objects(path: Path) -> Any:
    """What a file holds: dictionaries, lists and numbers, tensors as `StoredPart`, all else as `PickledObject`.

    Raises:
        CheckpointError: it is truncated or corrupt, in the format of torch before 1.6, or names what no trainer stores.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            (name,) = (entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
            if archive.getinfo(name).file_size > MOST_PICKLE:
                raise CheckpointError(f"{path} holds a pickle of more than {MOST_PICKLE >> 20} MiB. Do not trust it")
            pickled = archive.read(name)
            require_harmless(pickled)
            return _Unpickler(io.BytesIO(pickled), path, file, archive, name.removesuffix("data.pkl")).load()
    except CheckpointError:
        raise
    except Exception as error:  # a corrupt archive or pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path} is truncated or corrupt ({reason}): copy or save it again") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: Any, path: Path, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(pickled)
        self._path, self._file, self._archive, self._root = path, file, archive, root

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): partial(defaultdict, None),
            ("torch", "Size"): shape_of,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("torch._utils", "_rebuild_parameter_with_state"): _first,
            ("torch._utils", "_rebuild_wrapper_subclass"): _wrapped,
            ("torch._tensor", "_rebuild_from_type_v2"): _rebuilt,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _TYPES:
            return name
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _PLAIN or module.split(".")[0] in _PACKAGES:
            return type(name, (PickledObject,), {"kind": name})
        raise CheckpointError(
            f"{self._path} holds more than tensors ({module[:60]}.{name[:60]}), which could run code, and was not "
            "opened. Do not trust it; if it is yours, save it again as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(key, str) or "/" in key:
            raise ValueError("a storage that torch does not write")
        entry = self._archive.getinfo(f"{self._root}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed storage")
        self._file.seek(entry.header_offset)
        names = struct.unpack("<26xHH", self._file.read(30))
        start = entry.header_offset + 30 + sum(names)
        known = not isinstance(dtype, PickledObject) and dtype in _TYPES
        size = numel * _TYPES[dtype].itemsize if known else entry.file_size
        if size > entry.file_size or start + size > self._path.stat().st_size:
            raise ValueError("a storage that ends after the file")
        return _Storage(self._path, start, size, dtype if isinstance(dtype, str) else "uint8")

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
        """A plain tensor."""
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else storage.dtype  # of the third version
        sizes, steps = shape_of(shape), shape_of(stride)
        if len(sizes) > _MOST_DIMENSIONS or len(steps) != len(sizes):
            raise ValueError(f"a tensor of {len(sizes)} dimensions and {len(steps)} strides")
        if any(size > 1 and step == 0 for size, step in zip(sizes, steps, strict=True)):
            raise ValueError("a tensor that repeats its entries")
        (first,) = shape_of((offset,))
        part = StoredPart(storage.path, storage.start + first * _TYPES[dtype].itemsize, dtype, sizes, steps)
        if part.start + part.length > storage.start + storage.size:
            raise ValueError("a tensor that is larger than its storage")
        return part


def _first(value: Any, *_: Any) -> Any:
    return value


def _wrapped(kind: Any, *arguments: Any) -> PickledObject:
    """A tensor of a class of its own, such as DTensor."""
    made: PickledObject = kind(*arguments)
    return made


def _rebuilt(build: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes: those of a plain one are left out."""
    made = build(*arguments)
    if isinstance(made, PickledObject):
        made.__setstate__(state)
    return made
