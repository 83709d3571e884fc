"""The scaled rounding null: steps that depend on a matrix's rows and columns, but not its weights, and are then stored.

A step is modelled as r_i · c_j · z: the lengths of its row and of its column, and a random factor. So rows that move
further, and happen to have larger weights, are not an effect. Lengths are geometric means over the entries that moved;
the number of those is taken as measured for each row and column. Both are shrunk towards what all rows or columns have
in common, by the part of their scatter that the spread of their entries explains (empirical Bayes).
It needs the steps before storing, from float32 masters. Knows nothing of files, models or layers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.bits import Array, Counts, Floats
from offprincipal.geometry.compiled import compiled

_SWEEPS = 4  # of alternating means; without zero steps the first is exact
_REACH = 48  # binades of z to either side; beyond lies nothing that float32 tells apart from it
_BINS_A_BINADE = 256
_NOTHING = np.float32(-1e30)  # the logarithm of no step


@dataclass(frozen=True)
class ScaledNull:
    """How far an entry of each row and column steps, and how often.

    Args:
        rows, columns: (n,), (m,), log2 of r_i and c_j.
        moved_rows, moved_columns: (n,), (m,), share of the entries that took a step at all; the columns' over the mean.
        tail: share of the steps z beyond each edge, log2 in bins of 1/256 about whole powers of two: of steps that end
            half-way between two weights half change, as ties to even have it.
    """

    rows: Floats
    columns: Floats
    moved_rows: Floats
    moved_columns: Floats
    tail: Floats

    def expected_changes(self, codes: NDArray[np.uint16], cells: NDArray[np.uint8], count: int) -> Floats:
        """Expected changes in each cell.

        Args:
            codes: (n, m), of the base; cells: (n, m), the cell of each entry, below `count`.

        Returns:
            (count,)

        >>> from offprincipal.geometry.bits import bf16_codes
        >>> base = np.array([[1.0, 1.5], [256.0, 384.0]])
        >>> codes, cells = bf16_codes(base), np.array([[0, 0], [1, 1]], np.uint8)
        >>> scaled_null(codes, base + 0.25).expected_changes(codes, cells, 2)  # changes below 64 alone
        array([2., 0.])
        """
        found = np.zeros(count)
        lines = (self.rows, self.columns, self.moved_rows, self.moved_columns)
        _expect_by_cell(codes, cells, *lines, self.tail, found)
        return found


def scaled_null(codes: NDArray[np.uint16], masters: Array) -> ScaledNull | None:
    """The scaled rounding null of one matrix; None if nothing moved.

    Args:
        codes: (n, m), of the base, from `bf16_codes`; masters: (n, m), the weights after the step, before storing.
    """
    logs = np.empty(codes.shape, np.float32)
    _log_steps(codes, masters, logs)
    counts = tuple(np.zeros(size, np.int64) for size in codes.shape)
    rows, columns = (np.zeros(size) for size in codes.shape)
    for _ in range(_SWEEPS):
        for axis, line in enumerate((rows, columns)):
            sums: list[Floats] = [np.zeros(size) for size in codes.shape]
            _sum_lines(logs, rows, columns, *sums, *counts)
            line += np.divide(sums[axis], counts[axis], out=np.zeros(len(line)), where=counts[axis] > 0)
    moved = int(counts[0].sum())
    if moved == 0:
        return None
    spread, share = _square_rest(logs, rows, columns) / moved, moved / codes.size
    shares = []
    for line, count, length in zip((rows, columns), counts, codes.shape[::-1], strict=True):
        there = count > 0
        line[there] = _shrunk(line[there], spread / count[there])
        shares.append(there * _shrunk(count / length, np.full(len(count), share * (1 - share) / length)))
    steps: Counts = np.zeros(2 * _REACH * _BINS_A_BINADE, np.int64)
    _count_rest(logs, rows, columns, steps)
    tail = np.append(np.cumsum(steps[::-1])[::-1], 0) / moved
    return ScaledNull(rows, columns, shares[0], shares[1] / share, tail)


def _shrunk(values: Floats, variances: Floats) -> Floats:
    """Values drawn towards their mean, by the share of their scatter that their own variances explain."""
    scatter, mean = float(values.var()), float(values.mean())
    kept = max(0.0, 1 - float(variances.mean()) / scatter) if scatter > 0 else 0.0
    return mean + kept * (values - mean)


@compiled()
def _log_steps(codes, tuned, logs):  # type: ignore[no-untyped-def] # pragma: no cover
    n, m = codes.shape
    bits = np.empty(1, np.uint32)
    base = bits.view(np.float32)
    for i in range(n):
        for j in range(m):
            bits[0] = np.uint32(codes[i, j]) << np.uint32(16)
            step = abs(np.float64(tuned[i, j]) - np.float64(base[0]))
            logs[i, j] = np.float32(np.log2(step)) if step > 0 else _NOTHING


@compiled()
def _sum_lines(logs, rows, columns, of_rows, of_columns, in_rows, in_columns):  # type: ignore[no-untyped-def] # pragma: no cover # fmt: skip
    """What is left of the logarithms, summed by row and by column, and how many there are."""
    n, m = logs.shape
    in_columns[:] = 0
    for i in range(n):
        total, count = 0.0, 0
        for j in range(m):
            if logs[i, j] > _NOTHING:
                rest = logs[i, j] - rows[i] - columns[j]
                total += rest
                count += 1
                of_columns[j] += rest
                in_columns[j] += 1
        of_rows[i] = total
        in_rows[i] = count


@compiled()
def _square_rest(logs, rows, columns):  # type: ignore[no-untyped-def] # pragma: no cover
    n, m = logs.shape
    total = 0.0
    for i in range(n):
        for j in range(m):
            if logs[i, j] > _NOTHING:
                total += (logs[i, j] - rows[i] - columns[j]) ** 2
    return total


@compiled()
def _count_rest(logs, rows, columns, steps):  # type: ignore[no-untyped-def] # pragma: no cover
    n, m = logs.shape
    for i in range(n):
        for j in range(m):
            if logs[i, j] > _NOTHING:
                place = int((logs[i, j] - rows[i] - columns[j] + _REACH) * _BINS_A_BINADE + 0.5)
                steps[min(max(place, 0), len(steps) - 1)] += 1


@compiled()
def _expect_by_cell(codes, cells, rows, columns, moved_rows, moved_columns, tail, found):  # type: ignore[no-untyped-def] # pragma: no cover # fmt: skip
    n, m = codes.shape
    last = len(tail) - 2
    for i in range(n):
        for j in range(m):
            exponent = max(int((codes[i, j] >> 7) & 0xFF), 1)
            power = (codes[i, j] & 0x7F) == 0 and exponent > 1  # half as far inwards
            place = (exponent - 135 - rows[i] - columns[j] + _REACH) * _BINS_A_BINADE + 0.5
            rate = 0.0
            for k in range(2 if power else 1):
                x = min(max(place - k * _BINS_A_BINADE, 0.0), float(last))
                low = int(x)
                rate += tail[low] + (x - low) * (tail[low + 1] - tail[low])
            rate = rate / 2 if power else rate
            found[cells[i, j]] += rate * min(moved_rows[i] * moved_columns[j], 1.0)
