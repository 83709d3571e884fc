"""Nested masks as cuts: where the largest scores end, or the smallest magnitudes; how many masks leave out an entry.

A cut is a key, and how many of the entries that equal it are within, the first by index. Compiled by numba at first
use. Knows no torch.
"""

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.bits import CLASSES, CODES, Array, Counts, bf16_codes, on_bf16_grid
from offprincipal.geometry.compiled import compiled

MASKS = ("principal", "low_magnitude", "safe", "random")
ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5)

Levels = NDArray[np.uint8]


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
