"""The bits of bfloat16: codes that sort as magnitudes do, masks packed to one bit an entry. Knows no torch."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.errors import NonFiniteTensor

CODES = 1 << 15  # magnitudes that bfloat16 tells apart, those of infinities and NaN included
CLASSES = 512
FIRST_INFINITE = 0x7F80

Array = NDArray[Any]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def bf16_codes(values: Array) -> NDArray[np.uint16]:
    """The bits of each value rounded to bfloat16, ties to even; the shape of `values`, and no copy of bfloat16.

    Args:
        values: any float type; finite or not.

    >>> hex(int(bf16_codes(np.array([-1.0]))[0]))
    '0xbf80'
    """
    if values.dtype != ml_dtypes.bfloat16:
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(ml_dtypes.bfloat16)
    return values.view(np.uint16)


def values_of_codes(codes: Array) -> NDArray[np.float32]:
    """The bfloat16 numbers that have these bits.

    >>> values_of_codes(np.array([0xBF80]))
    array([-1.], dtype=float32)
    """
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def on_bf16_grid(values: Array) -> bool:
    """Whether every entry is a bfloat16 number.

    >>> on_bf16_grid(np.array([1.5])), on_bf16_grid(np.array([1.001]))
    (True, False)
    """
    if values.dtype == ml_dtypes.bfloat16:
        return True
    return bool((values_of_codes(bf16_codes(values)) == values).all())


def require_storable(values: Array) -> None:
    """Check that values are finite, and still are in bfloat16.

    Raises:
        NonFiniteTensor: the message says how many entries are not, and where the first is.

    >>> require_storable(np.array([1.0, 2.0]))
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        first = [int(i) for i in np.unravel_index(bad[0], values.shape)]
        raise NonFiniteTensor(f"{len(bad):,} of {values.size:,} entries are NaN or infinite, the first at {first}")
    if (bf16_codes(values) & np.uint16(CODES - 1) >= FIRST_INFINITE).any():
        largest = float(np.abs(values.astype(np.float64)).max())
        raise NonFiniteTensor(f"an entry of size {largest:.4g} is beyond bfloat16's largest number, 3.39e38")


def pack(mask: Array) -> NDArray[np.uint64]:
    """A mask as bits, 64 to a word, the last word filled up with zeros.

    Args:
        mask: bool, any shape.

    >>> pack(np.array([True, False, True])).tolist()
    [5]
    """
    bits = np.packbits(mask.reshape(-1), bitorder="little")
    return np.pad(bits, (0, -len(bits) % 8)).view(np.uint64)


def unpack(bits: NDArray[np.uint64], size: int) -> NDArray[np.bool_]:
    """The flat mask that was packed.

    >>> unpack(pack(np.array([True, False, True])), 3)
    array([ True, False,  True])
    """
    return np.unpackbits(bits.view(np.uint8), count=size, bitorder="little").view(np.bool_)
