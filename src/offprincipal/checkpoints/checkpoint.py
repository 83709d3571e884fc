"""One interface for every kind of checkpoint: names, shapes and stored types at once, entries range by range.

Numbers come as numpy arrays in their stored type (bfloat16 and float8 are those of `ml_dtypes`), so that a scan of the
bits needs no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
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


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of a tensor before it is read: its name, shape, and the type that `read` gives."""

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
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape and type, in the order of the names; tied tensors once."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`; empty where there is none."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the results should know of how it was read: 'stored in float8 with scales, dequantised'."""
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


def without_tied_head(infos: dict[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors without the head, where the configuration says that it is the embedding."""
    if config.get("tie_word_embeddings") and any(name.endswith("embed_tokens.weight") for name in infos):
        return {name: info for name, info in infos.items() if name != "lm_head.weight"}
    return infos
