"""One interface for every kind of checkpoint: names, shapes and stored types at once, entries range by range.

Numbers come as numpy arrays in their stored type (bfloat16 and float8 are those of `ml_dtypes`), so that a scan of the
bits needs no torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 1 << 24
FLOATS = {
    str(dtype): dtype
    for dtype in (
        *map(np.dtype, ("float64", "float32", "float16")),
        BFLOAT16,
        np.dtype(ml_dtypes.float8_e4m3fn),
        np.dtype(ml_dtypes.float8_e5m2),
        np.dtype(ml_dtypes.float8_e8m0fnu),
    )
}

INTEGERS = {
    name: np.dtype(name) for name in ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and type of a tensor, known before it is read; `dtype` is the type that `read` returns."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Checkpoint(Protocol):
    """A model's tensors, read a range of entries at a time."""

    @property
    def source(self) -> str:
        """Where it is, as the user named it."""
        ...

    @property
    def folders(self) -> Sequence[Path]:
        """The local folders whose files it is read from."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The local files that its entries are read from."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape and type, in the order of the names; tied tensors once."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`; empty if there is none."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Warnings about how it was read, e.g. 'stored in float8 with scales, dequantised'."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Entries `start` to `stop` of a tensor, flat in row-major order, as stored; not yet checked for NaN.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...

    def masters(self) -> "Checkpoint | None":
        """The float32 master weights kept beside the stored ones, if any."""
        ...


def without_copied_head(
    infos: dict[str, TensorInfo], config: Mapping[str, Any], read: Callable[..., Array]
) -> dict[str, TensorInfo]:
    """The tensors without the head, where the configuration says that it is the embedding, and it is, bit for bit.

    Args:
        read: as a checkpoint's, of any of `infos`.
    """
    nested = config.get("text_config")
    tied = any(c.get("tie_word_embeddings") is True for c in (config, nested if isinstance(nested, dict) else {}))
    embedding = next((name for name in infos if name.endswith("embed_tokens.weight")), None)
    head = next((name for name in infos if name.endswith("lm_head.weight")), None)
    if not tied or embedding is None or head is None or not equal_tensors(infos, read, head, embedding):
        return infos
    return {name: info for name, info in infos.items() if name != head}


def equal_tensors(infos: Mapping[str, TensorInfo], read: Callable[..., Array], one: str, two: str) -> bool:
    """Whether two tensors of a checkpoint hold the same bits."""
    return infos[one].floating and same_bits(infos[one], infos[two], read, read)


def same_bits(one: TensorInfo, two: TensorInfo, read_one: Callable[..., Array], read_two: Callable[..., Array]) -> bool:
    """Whether two tensors, each with how its checkpoint reads, are of one shape and type and hold the same bits."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    ranges = ((start, min(start + _CHUNK, one.numel)) for start in range(0, one.numel, _CHUNK))
    return all(
        np.array_equal(read_one(one.name, *span).view(np.uint8), read_two(two.name, *span).view(np.uint8))
        for span in ranges
    )
