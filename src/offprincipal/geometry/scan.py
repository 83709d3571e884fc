"""The scan: one pass over two stored matrices that counts all that location metrics need, at memory speed.

A bfloat16 number without its sign is a 15-bit *magnitude code* that sorts as the magnitudes do. How many entries carry
each code, and how many of those changed, give the exponent classes, the low-magnitude masks of every density and the
isotropic null; rows, columns and the update's norm come with them. Compiled by numba at first use. Knows nothing of
files or models; the definitions it counts by are those of `offprincipal.geometry.precision`.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry.bits import CLASSES, CODES, FIRST_INFINITE, Array, Counts, values_of_codes
from offprincipal.geometry.compiled import compiled

_ZERO_CLASS = 1
_BLOCK = 1 << 15  # rows or columns that a 16-bit counter can count
_CHUNK = 1 << 30  # entries that a 32-bit counter can count
_UNPACKED = 1 << 18  # entries that are widened at once


@dataclass(frozen=True)
class Scan:
    """What one pass over a base and a tuned matrix counts.

    Args:
        entries: (32768,), entries of the base with each magnitude code.
        changed: (32768,), those of them whose bfloat16 value changed.
        rows: (n,), columns: (m,), changed entries of each.
    """

    entries: Counts
    changed: Counts
    rows: Counts
    columns: Counts

    @property
    def changed_count(self) -> int:
        return int(self.changed.sum())


def scan(base: NDArray[np.uint16], tuned: NDArray[np.uint16]) -> Scan:
    """Count what changed between two matrices of bfloat16 bits.

    Args:
        base, tuned: (n, m), from `bf16_codes`.

    Raises:
        NonFiniteTensor: one of them holds NaN or infinity.

    Source: arXiv 2511.08567, definition of update sparsity: +0 and −0 are equal.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> one, two = (bf16_codes(np.array([[1.0, x]])) for x in (2.0, 3.0))
    >>> scan(one, two).rows, scan(one, two).columns
    (array([1]), array([0, 1]))
    """
    n, m = base.shape
    table = np.zeros(2 * CODES, np.int64)
    rows, columns = np.zeros(n, np.int64), np.zeros(m, np.int64)
    step = max(_CHUNK // max(m, 1), 1)
    largest = max(
        int(_scan(base[i : i + step], tuned[i : i + step], table, rows[i : i + step], columns))
        for i in range(0, max(n, 1), step)
    )
    changed = table[1::2].copy()
    entries = table[::2] + changed
    if largest >= FIRST_INFINITE or entries[FIRST_INFINITE:].any():
        raise NonFiniteTensor("it holds NaN or infinity")
    return Scan(entries, changed, rows, columns)


def count_by_class(counts: Array) -> Counts:
    """Counts by magnitude code, summed by exponent class (`offprincipal.geometry.precision.exponent_class`).

    Args:
        counts: (32768,).

    Returns:
        (512,).

    >>> counts = np.zeros(CODES, np.int64)
    >>> counts[0x3F80], counts[0x3F81], counts[0x3F82] = 5, 1, 2  # 1.0, and the two numbers above it
    >>> count_by_class(counts)[[254, 255]]
    array([3, 5])
    """
    octaves = counts.reshape(256, 128)
    return np.stack([octaves[:, 1:].sum(axis=1), octaves[:, 0]], axis=1).reshape(CLASSES)


def classes_of_lines(codes: NDArray[np.uint16]) -> tuple[Counts, NDArray[np.uint32], NDArray[np.uint32]]:
    """How many entries of each exponent class every row and every column holds.

    Args:
        codes: (n, m), from `bf16_codes`, not empty.

    Returns:
        classes: (K,), those that occur, from the lowest up; rows: (K, n) and columns: (K, m), the counts.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> classes, rows, columns = classes_of_lines(bf16_codes(np.array([[1.0, 1.5], [1.25, 1.5]])))
    >>> classes, rows.tolist(), columns.tolist()
    (array([254, 255]), [[1, 2], [1, 0]], [[1, 2], [1, 0]])
    """
    n, m = codes.shape
    least, most = _range(codes.reshape(-1))
    lowest = 2 * (int(least) >> 7)
    span = 2 * (int(most) >> 7) + 2 - lowest + 1  # zeros come first, far below all others
    rows, columns = np.zeros((n, span), np.uint32), np.zeros((span, m), np.uint32)
    for i in range(0, n, _BLOCK):
        _classes_of_lines(codes[i : i + _BLOCK], lowest, rows[i : i + _BLOCK], columns)
    classes = np.concatenate([[_ZERO_CLASS], np.arange(lowest, lowest + span - 1)])
    occur = np.flatnonzero(columns.any(axis=1))
    return classes[occur], rows.T[occur], columns[occur]


def mark_changed(base: NDArray[np.uint16], tuned: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which entries changed.

    Args:
        base, tuned: (n, m), from `bf16_codes`.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> one, two = (bf16_codes(np.array([[0.0, 1.0, x]])) for x in (2.0, 3.0))
    >>> mark_changed(one, two)
    array([[False, False,  True]])
    """
    marks = np.empty(base.shape, np.bool_)
    _mark(base.reshape(-1), tuned.reshape(-1), marks.reshape(-1))
    return marks


def count_codes(codes: NDArray[np.uint16], chosen: NDArray[np.bool_] | None = None) -> Counts:
    """How many of the chosen entries, or of all, carry each magnitude code.

    Args:
        codes: from `bf16_codes`; chosen: bool, as many.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> int(count_codes(bf16_codes(np.array([1.0, -1.0, 2.0])), np.array([True, True, False]))[0x3F80])
    2
    """
    table = np.zeros(2 * CODES, np.int64)
    mask = np.ones(codes.size, np.bool_) if chosen is None else chosen.reshape(-1)
    flat = codes.reshape(-1)
    for i in range(0, len(flat), _CHUNK):
        _count_chosen(flat[i : i + _CHUNK], mask[i : i + _CHUNK], table)
    return table[1::2].copy()


def square(values: Array) -> float:
    """‖W‖_F², summed in float64.

    >>> square(np.array([[3.0, 4.0]]))
    25.0
    """
    return float(np.square(values, dtype=np.float64).sum())


def square_of_codes(entries: Counts) -> float:
    """‖W‖_F² of bfloat16 numbers, from how many entries carry each magnitude code.

    Args:
        entries: (32768,), none of them infinite.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> square_of_codes(scan(*[bf16_codes(np.array([[3.0, -4.0]]))] * 2).entries)
    25.0
    """
    occur = np.flatnonzero(entries)
    return float(entries[occur] @ values_of_codes(occur).astype(np.float64) ** 2)


def update_square(base: Array, tuned: Array) -> float:
    """‖W1 − W0‖_F², summed in float64.

    Args:
        base, tuned: (n, m), any float types.

    >>> update_square(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))
    4.0
    """
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    if base.dtype == tuned.dtype == bfloat16:
        return float(_code_difference_square(base.view(np.uint16), tuned.view(np.uint16)))
    wide = [x.astype(np.float32) if x.dtype.itemsize < 4 else x for x in (base, tuned)]
    return float(_difference_square(*wide))


def update_product(base: Array, one: Array, two: Array) -> float:
    """⟨W1 − W0, W2 − W0⟩ of two matrices tuned from one base, summed in float64.

    Args:
        base, one, two: (n, m), any float types.

    >>> update_product(np.array([[1.0, 2.0]]), np.array([[2.0, 4.0]]), np.array([[4.0, 4.0]]))
    7.0
    """
    total, step = 0.0, max(_UNPACKED // max(base.shape[1], 1), 1)
    for i in range(0, len(base), step):
        origin, first, second = (side[i : i + step].astype(np.float64) for side in (base, one, two))
        total += float(((first - origin) * (second - origin)).sum())
    return total


@compiled()
def _scan(base, tuned, table, rows, columns):  # type: ignore[no-untyped-def] # pragma: no cover
    """Add to `table` by 2·code + changed, to `rows` and to `columns`; return the largest code of `tuned`."""
    n, m = base.shape
    width = 4096
    sign = np.uint16(0x7FFF)
    counts = np.zeros(1 << 16, np.uint32)
    marked = np.empty(width, np.uint16)
    block_columns = np.zeros(m, np.uint16)
    largest = np.uint16(0)
    for i in range(n):
        for first in range(0, m, width):
            wide = min(width, m - first)
            w0, w1 = base[i, first : first + wide], tuned[i, first : first + wide]
            moved = block_columns[first : first + wide]
            in_block = np.uint16(0)
            for j in range(wide):
                x, y = w0[j], w1[j]
                differs = np.uint16((x != y) & (((x | y) & sign) != 0))
                marked[j] = np.uint16(np.uint16(x << np.uint16(1)) | differs)
                moved[j] = np.uint16(moved[j] + differs)
                in_block = np.uint16(in_block + differs)
                largest = max(largest, np.uint16(y & sign))
            rows[i] += in_block
            for j in range(wide):
                counts[marked[j]] += np.uint32(1)
        if (i + 1) % (1 << 15) == 0 or i + 1 == n:
            for j in range(m):
                columns[j] += block_columns[j]
            block_columns[:] = 0
    for code in range(1 << 16):
        table[code] += counts[code]
    return largest


@compiled()
def _range(codes):  # type: ignore[no-untyped-def] # pragma: no cover
    """The least magnitude code that is not zero, and the largest."""
    below, most = np.uint16(0x7FFE), np.uint16(0)
    for j in range(len(codes)):
        magnitude = np.uint16(codes[j] & np.uint16(0x7FFF))
        below = min(below, np.uint16(magnitude - np.uint16(1)))  # zero wraps round to the largest
        most = max(most, magnitude)
    return min(np.uint16(below + np.uint16(1)), max(most, np.uint16(1))), most


@compiled()
def _classes_of_lines(codes, lowest, rows, columns):  # type: ignore[no-untyped-def] # pragma: no cover
    """Eight tables for a row, taken in turn, so that a class met again at once is not waited for."""
    n, m = codes.shape
    width, span = 4096, rows.shape[1]
    offset = np.uint16(lowest)
    in_row, in_column = np.empty(width, np.uint16), np.empty(width, np.uint32)
    table_of, place = np.empty(width, np.uint16), np.empty(width, np.uint32)
    for j in range(width):
        table_of[j], place[j] = (j & 7) * span, j
    by_row = np.zeros(8 * span, np.uint16)
    by_column = np.zeros(span * min(m, width), np.uint16)
    for first in range(0, m, width):
        wide = min(width, m - first)
        by_column[:] = 0
        for i in range(n):
            line = codes[i, first : first + wide]
            for j in range(wide):
                x = line[j]
                power = np.uint16((x & np.uint16(127)) == 0)
                shifted = np.uint16(np.uint16(((x >> np.uint16(6)) & np.uint16(0x1FE)) | power) - offset)
                in_class = np.uint16(0) if (x & np.uint16(0x7FFF)) == 0 else np.uint16(shifted + np.uint16(1))
                in_row[j] = np.uint16(in_class + table_of[j])
                in_column[j] = np.uint32(in_class) * np.uint32(wide) + place[j]
            for j in range(wide):
                by_row[in_row[j]] += np.uint16(1)
            for j in range(wide):
                by_column[in_column[j]] += np.uint16(1)
            for c in range(span):
                for lane in range(8):
                    rows[i, c] += by_row[lane * span + c]
            by_row[:] = 0
        for c in range(span):
            for j in range(wide):
                columns[c, first + j] += by_column[c * wide + j]


@compiled()
def _mark(base, tuned, marks):  # type: ignore[no-untyped-def] # pragma: no cover
    sign = np.uint16(0x7FFF)
    for j in range(len(base)):
        marks[j] = (base[j] != tuned[j]) & (((base[j] | tuned[j]) & sign) != 0)


@compiled()
def _count_chosen(codes, chosen, table):  # type: ignore[no-untyped-def] # pragma: no cover
    counts = np.zeros(1 << 16, np.uint32)
    for j in range(len(codes)):
        counts[np.uint16(np.uint16(codes[j] << np.uint16(1)) | np.uint16(chosen[j]))] += np.uint32(1)
    for code in range(1 << 16):
        table[code] += counts[code]


@compiled(fastmath={"reassoc", "contract"})
def _code_difference_square(base, tuned):  # type: ignore[no-untyped-def] # pragma: no cover
    n, m = base.shape
    left, right = np.empty(m, np.uint32), np.empty(m, np.uint32)
    w0, w1 = left.view(np.float32), right.view(np.float32)
    total = 0.0
    for i in range(n):
        for j in range(m):
            left[j] = np.uint32(base[i, j]) << np.uint32(16)
            right[j] = np.uint32(tuned[i, j]) << np.uint32(16)
        row = 0.0
        for j in range(m):
            step = np.float64(w1[j]) - np.float64(w0[j])
            row += step * step
        total += row
    return total


@compiled(fastmath={"reassoc", "contract"})
def _difference_square(base, tuned):  # type: ignore[no-untyped-def] # pragma: no cover
    n, m = base.shape
    total = 0.0
    for i in range(n):
        row = 0.0
        for j in range(m):
            step = np.float64(tuned[i, j]) - np.float64(base[i, j])
            row += step * step
        total += row
    return total
