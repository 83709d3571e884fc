"""The rounding null: steps that are independent of the weights, and are then stored.

A weight on the bfloat16 grid changes when its step passes half its spacing; below a power of two, a quarter. If steps
are independent of weights, the chance q_e that one changes a weight of spacing class e follows from the distribution of
*all* steps. If steps are known, from float32 masters, q_e is their empirical tail. If only stored weights are known,
*small weights serve as the ruler*: a weight d binades below shows its step in units of 2^-d of the large one's spacing,
so those at least three binades below show how often a step would change a weight of class e, without looking at class
e. Knows nothing of files, models or layers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.bits import CLASSES, Array, Counts, Floats, values_of_codes
from offprincipal.geometry.compiled import compiled

RULER_BINADES = 3  # so far below, and more, the grid is fine enough to show where in its cell a step ends
LEAST_RULER = 100  # entries: fewer leave a rate uncertain by more than .05
LEAST_JUDGED = 0.5  # of the changed entries, in classes whose rate is known without a look at them
_ROWS = 1 << 18  # entries that are unpacked at once
_LEAST_POWER = -150  # of two, below all that float32 tells apart
_BINS = 2 * (130 - _LEAST_POWER)


@dataclass(frozen=True)
class RoundingNull:
    """How often a step that ignores the weights changes one of each spacing class.

    Args:
        rates: (512,), q_e; the measured rate of classes that have no ruler.
        judged: share of the changed entries in classes that have one.
    """

    rates: Floats
    judged: float

    def changes(self, entries: Array) -> float | None:
        """Expected changed entries, Σ q_e N_e; None where too few are judged.

        Args:
            entries: (512,), entries of each class.

        >>> RoundingNull(np.array([0.5, 1.0]), 1.0).changes(np.array([4, 2]))
        4.0
        """
        return float(self.rates @ entries) if self.judged >= LEAST_JUDGED else None

    def overlap(self, entries: Array, in_mask: Array) -> float | None:
        """Expected share of the changed entries in a mask, Σ q_e M_e / Σ q_e N_e; None where too few are judged.

        Args:
            entries, in_mask: (512,), entries of each class, and those in the mask.

        >>> null = RoundingNull(np.array([0.5, 1.0]), 1.0)
        >>> null.overlap(np.array([4, 2]), np.array([4, 0]))
        0.5
        """
        expected = self.changes(entries)
        return float(self.rates @ in_mask) / expected if expected else None


def rounding_null(entries: Counts, changed: Counts, steps: Counts, known: bool) -> RoundingNull | None:
    """The rounding null of one matrix; None if nothing changed.

    Args:
        entries, changed: (512,), entries of each spacing class, and how many of them changed.
        steps: from `count_steps`: of the masters, or of the stored weights.
        known: whether they are the steps as they were before storing.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> base = np.full((8, 64), 1.0, np.float32)
    >>> base[4:] = 2.0**-5
    >>> steps = count_steps(bf16_codes(base), base + np.float32(2.0**-7))  # half of them would change a 1.5
    >>> entries = np.zeros(512, np.int64)
    >>> entries[[245, 255]] = 256
    >>> null = rounding_null(entries, entries, steps, known=False)
    >>> null.judged, null.rates[[245, 255]]
    (0.5, array([1., 1.]))
    """
    total = int(changed.sum())
    if total == 0:
        return None
    measured = np.divide(changed, entries, out=np.zeros(CLASSES), where=entries > 0)
    rates = _rates_of_known(steps) if known else _rates_by_ruler(steps)
    told = np.isfinite(rates)
    return RoundingNull(np.where(told, rates, measured), int(changed[told].sum()) / total)


def rounding_intersection(
    entries: Array, nulls: tuple[RoundingNull | None, RoundingNull | None], changed: tuple[int, int]
) -> float | None:
    """Expected |A ∩ B| of two runs, Σ q_a q_b N scaled to as many changed entries as each has; None if undefined.

    Args:
        entries: (512,); nulls: of either run; changed: entries that each changed.

    >>> null = RoundingNull(np.array([0.5, 1.0]), 1.0)
    >>> rounding_intersection(np.array([4, 2]), (null, null), (4, 4))
    3.0
    """
    a, b = nulls
    if a is None or b is None or min(a.judged, b.judged) < LEAST_JUDGED:
        return None
    expected = float(a.rates @ entries), float(b.rates @ entries)
    if min(expected) <= 0:
        return None
    return float((a.rates * b.rates) @ entries) * (changed[0] / expected[0]) * (changed[1] / expected[1])


def count_steps(codes: NDArray[np.uint16], tuned: Array) -> Counts:
    """How many entries of each exponent took a step of each size.

    Args:
        codes: (n, m), of the base, from `bf16_codes`; tuned: (n, m), the same weights after the step: bfloat16 bits
            (uint16) for stored weights, float32 or float64 for masters.

    Returns:
        (256, bins), by the base's biased exponent and the step's size: nothing, or in turn a power of two and what
        lies between it and the next.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> steps = count_steps(bf16_codes(np.array([[1.0, 1.0]])), np.array([[1.5, 1.0]]))
    >>> int(steps[127, 0]), int(steps[127, 2 * (-1 - _LEAST_POWER)])
    (1, 1)
    """
    n, m = codes.shape
    table = np.zeros((256, _BINS), np.int64)
    height = max(_ROWS // max(m, 1), 1)
    for i in range(0, n, height):
        rows = tuned[i : i + height]
        rows = values_of_codes(rows) if rows.dtype == np.uint16 else rows
        _count_steps(codes[i : i + height], rows, table)
    return table


def _rates_of_known(steps: Counts) -> Floats:
    """The tail of all steps; where one ends half-way, an even mantissa stays: half the weights, all powers of two."""
    return _rates(np.broadcast_to(steps.sum(axis=0), (CLASSES, _BINS)), np.where(np.arange(CLASSES) % 2 == 0, 0.5, 0.0))


def _rates_by_ruler(steps: Counts) -> Floats:
    """The same from the entries far enough below each class, NaN if these are too few; of half-way ones half."""
    upto = np.cumsum(steps, axis=0)
    below = np.arange(CLASSES) // 2 - RULER_BINADES  # the exponent of the coarsest ruler of each class
    rulers = np.where((below > 0)[:, None], upto[np.maximum(below, 0)], 0)  # (classes, bins)
    rates = _rates(rulers, np.full(CLASSES, 0.5))
    return np.where(rulers.sum(axis=1) >= LEAST_RULER, rates, np.nan)


def _rates(steps: Counts, of_ties: Floats) -> Floats:
    """Share of steps that change a weight of each class: past half the spacing, inwards of a power of two a quarter.

    Args:
        steps: (classes, bins), those that each class is judged by; of_ties: (classes,), how many of the half-way ones
            count.
    """
    cells = np.arange(CLASSES)
    exponents, powers = np.maximum(cells // 2, 1), cells % 2 == 1
    upwards = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]  # (classes, bins), steps of each bin and above

    def tail(distance: int) -> Floats:
        """Steps above half the spacing, or above that much less, in binades."""
        places = 2 * (exponents - 135 - distance - _LEAST_POWER)
        found: Floats = upwards[cells, places + 1] + of_ties * steps[cells, places]
        return found

    half = tail(0)
    changing = np.where(powers & (exponents > 1), (half + tail(1)) / 2, half)
    return changing / np.maximum(upwards[:, 0], 1)


@compiled()
def _count_steps(codes, tuned, table):  # type: ignore[no-untyped-def] # pragma: no cover
    n, m = codes.shape
    width = 2048
    bits = np.empty(width, np.uint32)
    base = bits.view(np.float32)
    steps = np.empty(width, np.float64)
    words = steps.view(np.uint64)
    for i in range(n):
        for first in range(0, m, width):
            wide = min(width, m - first)
            for j in range(wide):
                bits[j] = np.uint32(codes[i, first + j]) << np.uint32(16)
            for j in range(wide):
                steps[j] = abs(np.float64(tuned[i, first + j]) - np.float64(base[j]))
            for j in range(wide):
                exponent = (codes[i, first + j] >> 7) & 0xFF
                power = max(int(words[j] >> np.uint64(52)) - 1023, _LEAST_POWER + 1)
                between = (words[j] & np.uint64((1 << 52) - 1)) != 0
                table[exponent, 0 if steps[j] == 0 else 2 * (power - _LEAST_POWER) + between] += 1
