"""The scan: one pass over two stored matrices that counts all that location metrics need, at memory speed.

A bfloat16 number without its sign is a 15-bit *magnitude code* that sorts as the magnitudes do. How many entries carry
each code, and how many of those changed, give the exponent classes, the low-magnitude masks of every density and the
isotropic null; rows, columns and the update's norm come with them. Compiled by numba at first use. Knows nothing of
files or models; the definitions it counts by are those of `offprincipal.geometry.precision`.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry.compiled import compiled

MASKS = ("principal", "low_magnitude", "safe", "random")
ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5)
CODES = 1 << 15
CLASSES = 512
_FIRST_INFINITE = 0x7F80
_ZERO_CLASS = 1
_BLOCK = 1 << 15  # rows or columns that a 16-bit counter can count
_CHUNK = 1 << 30  # entries that a 32-bit counter can count
_UNPACKED = 1 << 18  # entries that are widened at once

Array = NDArray[Any]
Counts = NDArray[np.int64]
Levels = NDArray[np.uint8]
Floats = NDArray[np.float64]


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


def mask_size(numel: int, alpha: float) -> int:
    """Entries in a mask of density `alpha`.

    >>> mask_size(10, 0.25)
    2
    """
    return round(alpha * numel)


def largest_cuts(scores: NDArray[np.float32], sizes: Array) -> tuple[NDArray[np.uint32], Counts]:
    """Where the masks of the largest scores end.

    Args:
        scores: any shape, not negative; sizes: (a,), entries in each mask.

    Returns:
        keys, ties: (a,); a mask holds all entries whose bits are above its key, and the first `ties` that equal it.

    >>> keys, ties = largest_cuts(np.array([3.0, 1.0, 3.0, 2.0], np.float32), np.array([1, 3]))
    >>> keys.view(np.float32), ties
    (array([3., 2.], dtype=float32), array([1, 1]))
    """
    bits = scores.reshape(-1).view(np.uint32)
    high = np.zeros(1 << 16, np.int64)
    _count_high_halves(bits, high)
    firsts, left = zip(*(_from_top(high, int(size)) for size in sizes), strict=True)
    kept, slots = np.unique(np.array(firsts), return_inverse=True)
    slot_of = np.full(1 << 16, len(kept), np.uint32)
    slot_of[kept] = np.arange(len(kept))
    low = np.zeros((len(kept) + 1, 1 << 16), np.int64)
    _count_low_halves(bits, slot_of, np.uint32(len(kept)), low)
    seconds, ties = zip(*(_from_top(low[slot], rest) for slot, rest in zip(slots, left, strict=True)), strict=True)
    return (np.array(firsts, np.uint32) << np.uint32(16)) | np.array(seconds, np.uint32), np.array(ties, np.int64)


def largest_levels(scores: NDArray[np.float32], keys: NDArray[np.uint32], ties: Counts) -> Levels:
    """Of the nested masks of `largest_cuts`, from the smallest up, how many leave out each entry; mask a is `<= a`.

    >>> scores = np.array([3.0, 1.0, 3.0, 2.0], np.float32)
    >>> largest_levels(scores, *largest_cuts(scores, np.array([1, 3])))
    array([0, 2, 1, 1], dtype=uint8)
    """
    bits = scores.view(np.uint32)
    levels = _levels(bits, keys)
    _admit_first(bits.reshape(-1), keys, ties, levels.reshape(-1))
    return levels


def low_magnitude_levels(values: Array, codes: Counts, ties: Counts) -> Levels:
    """The same for the nested masks of `low_magnitude_cuts`; the values need not be bfloat16 numbers.

    >>> low_magnitude_levels(np.array([2.0, 1.0, -1.0]), np.array([0x3F80, 0x4000]), np.array([1, 1]))
    array([1, 0, 1], dtype=uint8)
    """
    heights = ~bf16_codes(values) & np.uint16(CODES - 1)  # large where the magnitude is small
    keys = (CODES - 1 - codes).astype(np.uint16)
    levels = _levels(heights, keys)
    flat = levels.reshape(-1)
    if on_bf16_grid(values):
        _admit_first(heights.reshape(-1), keys, ties, flat)
        return levels
    for key, count in zip(keys, ties, strict=True):
        carrying = np.flatnonzero(heights == key)
        flat[carrying[np.argsort(np.abs(values.reshape(-1)[carrying]), kind="stable")[:count]]] -= 1
    return levels


def classes_by_levels(codes: NDArray[np.uint16], one: Levels, two: Levels, masks: int) -> Counts:
    """How many entries of each exponent class have each pair of levels.

    Args:
        codes: from `bf16_codes`; one, two: as many, levels of two families of nested masks; masks: in each.

    Returns:
        (masks + 1, masks + 1, 512).

    >>> counts = classes_by_levels(bf16_codes(np.array([1.0, 1.5])), *np.array([[0, 1], [1, 1]], np.uint8), 1)
    >>> counts[0, 1, 255], counts[1, 1, 254]
    (np.int64(1), np.int64(1))
    """
    counts = np.zeros((masks + 1, masks + 1, CLASSES), np.int64)
    _count_levels(codes.reshape(-1), one.reshape(-1), two.reshape(-1), counts)
    return counts


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


def scan(base: NDArray[np.uint16], tuned: NDArray[np.uint16]) -> Scan:
    """Count what changed between two matrices of bfloat16 bits.

    Args:
        base, tuned: (n, m), from `bf16_codes`.

    Raises:
        NonFiniteTensor: one of them holds NaN or infinity.

    Source: arXiv 2511.08567, definition of update sparsity: +0 and −0 are equal.

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
    if largest >= _FIRST_INFINITE or entries[_FIRST_INFINITE:].any():
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


def low_magnitude_cuts(entries: Counts, sizes: Array) -> tuple[Counts, Counts]:
    """Where the masks of the smallest magnitudes end.

    Args:
        entries: (32768,), entries of each magnitude code.
        sizes: (a,), entries in each mask, none above the sum of `entries`.

    Returns:
        codes, ties: (a,); a mask holds all entries below its code, and the first `ties` that carry it.

    >>> entries = np.zeros(CODES, np.int64)
    >>> entries[[3, 7]] = 2, 5
    >>> low_magnitude_cuts(entries, np.array([2, 4]))
    (array([3, 7]), array([2, 2]))
    """
    upto = np.cumsum(entries)
    codes = np.searchsorted(upto, sizes)
    return codes, sizes - (upto - entries)[codes]


def mark_changed(base: NDArray[np.uint16], tuned: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which entries changed.

    Args:
        base, tuned: (n, m), from `bf16_codes`.

    >>> one, two = (bf16_codes(np.array([[0.0, 1.0, x]])) for x in (2.0, 3.0))
    >>> mark_changed(one, two)
    array([[False, False,  True]])
    """
    marks = np.empty(base.shape, np.bool_)
    _mark(base.reshape(-1), tuned.reshape(-1), marks.reshape(-1))
    return marks


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


def count_codes(codes: NDArray[np.uint16], chosen: NDArray[np.bool_] | None = None) -> Counts:
    """How many of the chosen entries, or of all, carry each magnitude code.

    Args:
        codes: from `bf16_codes`; chosen: bool, as many.

    >>> int(count_codes(bf16_codes(np.array([1.0, -1.0, 2.0])), np.array([True, True, False]))[0x3F80])
    2
    """
    table = np.zeros(2 * CODES, np.int64)
    mask = np.ones(codes.size, np.bool_) if chosen is None else chosen.reshape(-1)
    flat = codes.reshape(-1)
    for i in range(0, len(flat), _CHUNK):
        _count_chosen(flat[i : i + _CHUNK], mask[i : i + _CHUNK], table)
    return table[1::2].copy()


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
    if (bf16_codes(values) & np.uint16(CODES - 1) >= _FIRST_INFINITE).any():
        largest = float(np.abs(values.astype(np.float64)).max())
        raise NonFiniteTensor(f"an entry of size {largest:.4g} is beyond bfloat16's largest number, 3.39e38")


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


def _from_top(counts: Counts, size: int) -> tuple[int, int]:
    """The bin in which the `size` largest end, and how many of it are among them."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, size))
    return len(counts) - 1 - place, size - int(above[place] - counts[::-1][place])


def _levels(heights: Array, keys: Array) -> Levels:
    """How many of the falling keys each entry is not above; the shape of `heights`."""
    levels = np.zeros(heights.shape, np.uint8)
    _add_levels(heights.reshape(-1), keys, levels.reshape(-1))
    return levels


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
def _add_levels(heights, keys, levels):  # type: ignore[no-untyped-def] # pragma: no cover
    width = 4096
    for first in range(0, len(heights), width):
        block, found = heights[first : first + width], levels[first : first + width]
        for a in range(len(keys)):
            key = keys[a]
            for j in range(len(block)):
                found[j] = np.uint8(found[j] + np.uint8(block[j] <= key))


@compiled()
def _admit_first(heights, keys, ties, levels):  # type: ignore[no-untyped-def] # pragma: no cover
    """Let the first `ties` entries that equal each key into its mask."""
    for a in range(len(keys)):
        key, left, j = keys[a], ties[a], 0
        while left > 0:
            if heights[j] == key:
                levels[j] -= np.uint8(1)
                left -= 1
            j += 1


@compiled()
def _count_levels(codes, one, two, counts):  # type: ignore[no-untyped-def] # pragma: no cover
    for j in range(len(codes)):
        code = codes[j] & np.uint16(0x7FFF)
        counts[one[j], two[j], 2 * (code >> 7) + ((code & 127) == 0)] += 1


@compiled()
def _count_high_halves(words, counts):  # type: ignore[no-untyped-def] # pragma: no cover
    for j in range(len(words)):
        counts[words[j] >> np.uint32(16)] += 1


@compiled()
def _count_low_halves(words, slot_of, none, counts):  # type: ignore[no-untyped-def] # pragma: no cover
    """Count the low halves of those words whose high half has a slot."""
    for j in range(len(words)):
        slot = slot_of[words[j] >> np.uint32(16)]
        if slot != none:
            counts[slot, words[j] & np.uint32(0xFFFF)] += 1


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
