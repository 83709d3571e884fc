"""Changes: what is counted of any tensor, block by block, from its stored bits. Needs no torch."""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints.checkpoint import BFLOAT16, Array
from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry import bits, nulls, scan
from offprincipal.geometry.bits import Counts
from offprincipal.measures.once import once


class Block(NamedTuple):
    """Some of a tensor's entries, as lines, on each side; masters are the tuned ones before they were stored."""

    base: Array
    tuned: Array
    masters: Array | None


@dataclass(frozen=True)
class ChangeCounts:
    """What is counted of any tensor, block by block: counts of its blocks add up to its own.

    Args:
        entries, changed: (32768,), entries of the base with each magnitude code, and how many of them changed.
        base_square, update_square: squared Frobenius norms.
        masters_square: ‖masters − base‖_F²; None without masters.
        unchanged_stored: entries that are the same in the stored type; None if the sides are stored in two types.
        hidden: entries whose float32 master moved but whose bfloat16 value did not; None without masters.
        on_grid: whether every entry of the base is a bfloat16 number.
        dtypes: what base and tuned are stored in.
    """

    entries: Counts
    changed: Counts
    base_square: float
    update_square: float
    masters_square: float | None
    unchanged_stored: int | None
    hidden: int | None
    on_grid: bool
    dtypes: tuple[str, str]

    def __add__(self, other: "ChangeCounts") -> "ChangeCounts":
        return ChangeCounts(
            self.entries + other.entries,
            self.changed + other.changed,
            self.base_square + other.base_square,
            self.update_square + other.update_square,
            _sum(self.masters_square, other.masters_square),
            _sum(self.unchanged_stored, other.unchanged_stored),
            _sum(self.hidden, other.hidden),
            self.on_grid and other.on_grid,
            self.dtypes,
        )


def count_changes(block: Block, counted: scan.Scan) -> ChangeCounts:
    """The counts of one block, given its scan."""
    base, tuned, masters = block
    on_grid = bits.on_bf16_grid(base)
    unchanged = None
    if tuned.dtype == base.dtype:
        unchanged = base.size - counted.changed_count if tuned.dtype == BFLOAT16 else int((tuned == base).sum())
    hidden = None
    if masters is not None:
        moved = masters != base.astype(np.float32)
        hidden = int((moved & (bits.bf16_codes(masters) == bits.bf16_codes(base))).sum())
    return ChangeCounts(
        counted.entries,
        counted.changed,
        scan.square_of_codes(counted.entries) if on_grid else scan.square(base),
        scan.update_square(base, tuned),
        None if masters is None else scan.update_square(base, masters),
        unchanged,
        hidden,
        on_grid,
        (str(base.dtype), str(tuned.dtype)),
    )


def scan_block(block: Block, base_codes: NDArray[np.uint16], tuned_codes: NDArray[np.uint16]) -> scan.Scan:
    """The scan of one block, given both sides rounded to bfloat16.

    Raises:
        NonFiniteTensor: a side holds NaN, infinity, or a number beyond bfloat16's largest; the message says where.
    """
    try:
        return scan.scan(base_codes, tuned_codes)
    except NonFiniteTensor:
        bits.require_storable(block.base)
        bits.require_storable(block.tuned)
        raise


class TensorPair:
    """A tensor before and after, of any size: what every tensor is measured for.

    Args:
        blocks: gives the blocks of the tensor, anew at each call.
    """

    def __init__(self, blocks: Callable[[], Iterable[Block]]) -> None:
        self._blocks = blocks

    @once
    def counts(self) -> ChangeCounts:
        return functools.reduce(operator.add, map(_counts_alone, self._blocks()))

    @once
    def numel(self) -> int:
        return int(self.counts.entries.sum())

    @once
    def changed_count(self) -> int:
        return int(self.counts.changed.sum())

    @once
    def class_entries(self) -> Counts:
        """(512,), entries of each spacing class."""
        return scan.count_by_class(self.counts.entries)

    @once
    def class_changed(self) -> Counts:
        """(512,), how many of them changed."""
        return scan.count_by_class(self.counts.changed)

    @property
    def base_norm(self) -> float:
        return math.sqrt(self.counts.base_square)

    @property
    def update_norm(self) -> float:
        return math.sqrt(self.counts.update_square)

    @property
    def relative_update_norm(self) -> float | None:
        return self.update_norm / self.base_norm if self.base_norm > 0 else None

    @once
    def gaussian_scale(self) -> float:
        """σ of the Gaussian update of equal norm before storing: from masters where they were kept, else solved."""
        size = math.sqrt(max(self.numel, 1))
        if self.counts.masters_square is not None:
            return math.sqrt(self.counts.masters_square) / size
        if self.counts.dtypes[1] == str(BFLOAT16):
            return nulls.gaussian_scale(self.class_entries, self.update_norm)
        return self.update_norm / size

    @once
    def unchanged_isotropic(self) -> float | None:
        """Share of the entries that a Gaussian update of equal norm would leave."""
        sigma = self.gaussian_scale
        if self.numel == 0 or sigma == 0 or self.counts.on_grid:
            return nulls.unchanged_isotropic(self.counts.entries, sigma)
        stay = (nulls.unchanged_isotropic_off_grid(bits.bf16_codes(b.base), b.base, sigma) for b in self._blocks())
        return sum(stay) / self.numel


def _counts_alone(block: Block) -> ChangeCounts:
    return count_changes(block, scan_block(block, bits.bf16_codes(block.base), bits.bf16_codes(block.tuned)))


def _sum(a: Any, b: Any) -> Any:
    """None if either is."""
    return None if a is None or b is None else a + b
