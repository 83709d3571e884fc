"""Location: which entries of a matrix changed, by mask, row and column, compared with the ladder of nulls.

Every mask of every density divides a matrix along one set of *cells*: which of the nested principal masks an entry is
in, and which of the nested low-magnitude ones. Entries by cell and class, and changes by cell, then give all overlaps.
Knows nothing of files or decompositions: principal masks are given.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry import bits, cuts, nulls
from offprincipal.geometry.bits import Counts, Floats
from offprincipal.geometry.cuts import Levels
from offprincipal.measures.changes import TensorPair

DENSITIES_AT_ONCE = 10  # so that cells fit into a byte, and the masks that they make up into 32 bits


@dataclass(frozen=True)
class MaskOverlap:
    """How much of a change falls into a mask, rung by rung of the ladder of nulls; None if one is undefined.

    Args:
        density: share of all entries in the mask.
        overlap: share of the changed entries in it; overlap_…: the same under each null.
        overlap_scaled_null: under the rounding null with every row's and column's own length of step.
        overlap_rounding_judged: share of the changed entries that the rounding null has a rate for.
        log_odds, log_odds_se, z: the score test against the margin null.
    """

    density: float
    overlap: float | None = None
    overlap_random: float | None = None
    overlap_rounding_null: float | None = None
    overlap_rounding_judged: float | None = None
    overlap_scaled_null: float | None = None
    overlap_spacing_null: float | None = None
    overlap_margin_null: float | None = None
    log_odds: float | None = None
    log_odds_se: float | None = None
    z: float | None = None


@dataclass(frozen=True)
class MaskCells:
    """A matrix divided by the nested masks of some densities.

    Args:
        cells: (n, m), the cell of each entry.
        members: (L, q), the cells that make up each mask.
        classes: (L, 512), entries of each cell by spacing class.
        names: (index of the density, mask), one per mask.
    """

    cells: NDArray[np.uint8]
    members: NDArray[np.bool_]
    classes: Counts
    names: tuple[tuple[int, str], ...]

    @property
    def entries(self) -> Counts:
        """(q, 512), entries of each mask by spacing class."""
        found: Counts = self.members.T.astype(np.int64) @ self.classes
        return found


def mask_cells(codes: NDArray[np.uint16], low: Levels, principal: Levels | None, masks: int) -> MaskCells:
    """Divide a matrix by the levels of its low-magnitude masks, and of its principal ones where it has any.

    Args:
        codes: (n, m), from `bf16_codes`; low, principal: (n, m), how many of the nested masks leave out each entry.
        masks: in each family, at most `DENSITIES_AT_ONCE`.

    >>> low, principal = np.array([[0, 1]], np.uint8), np.array([[1, 0]], np.uint8)
    >>> found = mask_cells(bits.bf16_codes(np.array([[0.5, 1.0]])), low, principal, 1)
    >>> [name for _, name in found.names], found.members[found.cells[0]].tolist()
    (['low_magnitude', 'principal', 'safe'], [[True, False, True], [False, True, False]])
    """
    inside = np.zeros_like(low) if principal is None else principal
    levels = np.arange(masks + 1)
    in_principal, in_low = (levels[:, None] <= np.arange(masks) for _ in range(2))  # (levels, masks)
    grid = (masks + 1, masks + 1, masks)
    of_low = np.broadcast_to(in_low[None], grid)
    families = {"low_magnitude": of_low}
    if principal is not None:
        of_principal = np.broadcast_to(in_principal[:, None], grid)
        families |= {"principal": of_principal, "safe": of_low | ~of_principal}
    members = np.concatenate([family.reshape(-1, masks) for family in families.values()], axis=1)
    names = tuple((place, name) for name in families for place in range(masks))
    classes = cuts.classes_by_levels(codes, inside, low, masks).reshape(-1, bits.CLASSES)
    return MaskCells((inside * np.uint8(masks + 1) + low).astype(np.uint8), members, classes, names)


def line_nulls(
    pair: TensorPair, lines: tuple[Counts, NDArray[np.uint32], NDArray[np.uint32]]
) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Mean and variance of the change counts under the spacing null, of the rows and of the columns.

    Args:
        lines: from `classes_of_lines` of the base.
    """
    classes, rows, columns = lines
    counts = pair.class_entries[classes], pair.class_changed[classes]
    return nulls.line_null(rows, *counts), nulls.line_null(columns, *counts)


def density_groups(densities: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
    """The densities, as many at a time as cells can tell apart."""
    for first in range(0, len(densities), DENSITIES_AT_ONCE):
        yield densities[first : first + DENSITIES_AT_ONCE]
