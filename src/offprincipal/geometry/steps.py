"""Which stored weights a step of a given length changes: closed forms from the spacing of weights.

A stored weight changes when its step exceeds half the distance to a neighbour, or equals it if the mantissa is odd,
since ties round to even; below a power of two the neighbour is half as far. So weights are counted by exponent, whether
they are powers of two, and by the mantissa's last bit, and everything follows from the counts. Steps are of either sign
with equal chance. Knows nothing of files, models or layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.errors import ArgumentError, NonFiniteTensor
from offprincipal.geometry.bits import Array, Counts, Floats
from offprincipal.geometry.compiled import compiled

_CELLS = 1 << 10  # exponent, power of two, odd
_MOST_STEPS = 10**15


@dataclass(frozen=True)
class Storage:
    """A format that weights are stored in.

    Args:
        dtype: of numpy; mantissa: its stored bits; bias: of its exponent.
    """

    dtype: "np.dtype[np.generic]"
    mantissa: int
    bias: int


STORAGES = {
    "bfloat16": Storage(np.dtype(ml_dtypes.bfloat16), 7, 127),
    "float16": Storage(np.dtype(np.float16), 10, 15),
    "float32": Storage(np.dtype(np.float32), 23, 127),
}


@dataclass(frozen=True)
class Spacings:
    """How the weights of some tensors are spaced; those of several add up.

    Args:
        storage: a key of `STORAGES`.
        counts: (1024,), weights by 4·exponent + 2·(a power of two) + (an odd mantissa).

    Source: ours; the rounding is that of IEEE 754, to nearest with ties to even.

    >>> of_ones = Spacings.of(np.ones(4), "bfloat16")
    >>> of_ones.share_moved(0.003), of_ones.share_moved(0.005)  # half the spacing is .0039 above 1, and .00195 below
    (0.5, 1.0)
    """

    storage: str
    counts: Counts

    @classmethod
    def of(cls, values: Array, storage: str) -> "Spacings":
        """Those of some weights, once they are stored.

        Args:
            values: any shape, floating.

        Raises:
            ArgumentError: no such storage; NonFiniteTensor: a weight is not finite there.
        """
        if storage not in STORAGES:
            raise ArgumentError(f"no storage type '{storage}': choose one of {', '.join(STORAGES)}")
        kind, counts = STORAGES[storage], np.zeros(_CELLS, np.int64)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values).astype(kind.dtype, copy=False).reshape(-1)
        _count_cells(stored.view(f"u{kind.dtype.itemsize}"), kind.mantissa, counts)
        top = 4 * ((1 << (8 * kind.dtype.itemsize - 1 - kind.mantissa)) - 1)
        if counts[top : top + 4].any():
            raise NonFiniteTensor(f"it holds NaN, infinity, or a number beyond the largest of {storage}")
        return cls(storage, counts)

    def __add__(self, other: "Spacings") -> "Spacings":
        return Spacings(self.storage, self.counts + other.counts)

    @property
    def entries(self) -> int:
        return int(self.counts.sum())

    def share_moved(self, step: float) -> float | None:
        """Share of the weights that one step of a length moves; None of no weights.

        Args:
            step: of every weight, in either direction.
        """
        cells, odd, weights = self._cells
        return self._mean(weights, (step > cells) | ((step == cells) & odd))

    def share_moved_at_random(self, step: float, steps: float = 1) -> float | None:
        """The same with stochastic rounding, after some steps in one direction: each moves by its part of a spacing.

        >>> Spacings.of(np.full(4, 1.5), "bfloat16").share_moved_at_random(2**-7)
        1.0
        """
        cells, _, weights = self._cells
        with np.errstate(divide="ignore"):
            stay = steps * np.log1p(-np.minimum(step / (2 * cells), 1.0))
        return self._mean(weights, -np.expm1(stay))

    def share_moved_walking(self, step: float, steps: float) -> float | None:
        """The same of float32 masters after some steps of random signs, for many steps: a Gaussian of step·√steps."""
        cells, _, weights = self._cells
        size = step * math.sqrt(2 * steps)
        return self._mean(weights, [math.erfc(cell / size) if size > 0 else 0.0 for cell in cells])

    def steps_to_half(self, step: float) -> int | None:
        """Steps in one direction until half of the weights have moved, where masters add them up; None if never.

        >>> Spacings.of(np.full(4, 1.5), "bfloat16").steps_to_half(1e-6)
        3907
        """
        return _least(lambda steps: self.share_moved(step * steps))

    def steps_to_half_at_random(self, step: float) -> int | None:
        """The same with stochastic rounding, on the average."""
        return _least(lambda steps: self.share_moved_at_random(step, steps))

    def quantile(self, share: float) -> float | None:
        """The shortest step that moves a share of the weights at least; None of no weights."""
        cells, _, weights = self._cells
        if not weights.sum():
            return None
        order = np.argsort(cells)
        place = np.searchsorted(np.cumsum(weights[order]), share * weights.sum())
        return float(cells[order][min(place, len(order) - 1)])

    @property
    def _cells(self) -> tuple[Floats, NDArray[np.bool_], Floats]:
        """Half the way to a neighbour, whether just that suffices, and how many weights; outwards, then inwards."""
        kind, places = STORAGES[self.storage], np.flatnonzero(self.counts)
        exponents, powers, odd = places >> 2, places & 2 != 0, places & 1 != 0
        half = np.exp2(np.maximum(exponents, 1) - kind.bias - kind.mantissa - 1.0)
        inwards = np.where(powers & (exponents > 1), half / 2, half)
        weights = self.counts[places].astype(np.float64)
        return np.concatenate([half, inwards]), np.tile(odd, 2), np.tile(weights, 2)

    @staticmethod
    def _mean(weights: Floats, shares: object) -> float | None:
        total = float(weights.sum())
        return float(weights @ np.asarray(shares, np.float64)) / total if total else None


def _least(share_after: Callable[[int], float | None]) -> int | None:
    """The fewest steps after which a share that only grows is half."""

    def enough(steps: int) -> bool:
        return (share_after(steps) or 0.0) >= 0.5

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if low > _MOST_STEPS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@compiled()
def _count_cells(words, mantissa, counts):  # type: ignore[no-untyped-def] # pragma: no cover
    bits = 8 * words.itemsize - 1
    low = (1 << mantissa) - 1
    for i in range(len(words)):
        magnitude = np.int64(words[i]) & ((1 << bits) - 1)
        power = 2 if (magnitude & low) == 0 else 0
        counts[4 * (magnitude >> mantissa) + power + (magnitude & 1)] += 1
