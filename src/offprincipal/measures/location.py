"""Location: which entries of a matrix changed, by mask, row and column, compared with the ladder of nulls.

Every mask of every density divides a matrix along one set of *cells*: which of the nested principal masks an entry is
in, and which of the nested low-magnitude ones. Entries by cell and class, and changes by cell, then give all overlaps.
Knows nothing of files or decompositions: principal masks are given.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry import bits, cuts, nulls, scan
from offprincipal.geometry.bits import Counts, Floats
from offprincipal.geometry.cuts import Levels
from offprincipal.measures.changes import TensorPair

if TYPE_CHECKING:
    from offprincipal.measures.pair import MatrixPair

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


def overlaps(pair: "MatrixPair") -> dict[float, dict[str, MaskOverlap]]:
    """Density -> mask -> overlap; the principal and the safe mask only where the base's are known."""
    settings, found = pair.base.settings, {}
    rng = np.random.default_rng(pair.base.seed("mask"))
    for alpha in settings.densities:
        found[alpha] = {"random": _random_overlap(pair, alpha, rng)}
    for first, divided in enumerate(pair.base.mask_cells):
        densities = settings.densities[first * DENSITIES_AT_ONCE :]
        tests: Sequence[nulls.ScoreTest | None] = [None] * len(divided.names)
        if settings.mask_tests:
            found_tests = pair.score_tests(divided.cells, divided.members)
            tests, hits = found_tests, [test.count for test in found_tests]
        else:
            in_cells = np.bincount(divided.cells[pair.changed], minlength=len(divided.members))
            hits = (in_cells @ divided.members).tolist()
        scaled = pair.scaled_changes[first]
        shares = [None] * len(tests) if scaled is None else (scaled @ divided.members / scaled.sum()).tolist()
        masks = zip(divided.names, divided.entries, hits, tests, shares, strict=True)
        for (place, name), in_mask, observed, test, share in masks:
            found[densities[place]][name] = _overlap(pair, in_mask, observed, test, share)
    return {alpha: {name: masks[name] for name in cuts.MASKS if name in masks} for alpha, masks in found.items()}


def _random_overlap(pair: "MatrixPair", alpha: float, rng: np.random.Generator) -> MaskOverlap:
    """Of a mask that was drawn without a look at rows or columns: the spacing null is its margin null too."""
    in_mask, observed = nulls.bernoulli_overlap(pair.class_entries, pair.class_changed, alpha, rng)
    null = nulls.overlap_null(pair.class_entries, pair.class_changed, in_mask)
    test = nulls.ScoreTest(observed, observed - null.expected, null.variance)
    return _overlap(pair, in_mask, observed, test, alpha if pair.scaled_changes[0] is not None else None)


def _overlap(
    pair: "MatrixPair", in_mask: Counts, observed: int, test: nulls.ScoreTest | None, scaled: float | None
) -> MaskOverlap:
    density, count = int(in_mask.sum()) / pair.numel, pair.changed_count
    if count == 0:
        return MaskOverlap(density)
    rounding, spacing = pair.rounding_null, None
    if pair.counts.on_grid:
        spacing = nulls.overlap_null(pair.class_entries, pair.class_changed, in_mask).expected / count
    return MaskOverlap(
        density,
        observed / count,
        density,
        rounding.overlap(pair.class_entries, in_mask) if rounding else None,
        rounding.judged if rounding else None,
        scaled,
        spacing,
        *(() if test is None else (test.expected / count, test.log_odds, test.log_odds_se, test.z)),
    )


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


def pair_row(run_a: str, run_b: str, pairs: Mapping[str, "MatrixPair"]) -> dict[str, float | int | str | None]:
    """How the changes of two runs agree, in place and in direction: a row of `pairs.parquet`.

    Args:
        pairs: run -> its matrix, all of one base.
    """
    a, b = pairs[run_a], pairs[run_b]
    counts = (a.changed_count, b.changed_count)
    both = int((a.changed & b.changed).sum())
    test, spacing, margins = nulls.ScoreTest(both, 0.0, 0.0), None, None
    if a.counts.on_grid and min(counts):  # off it, two runs share where in its rounding cell each weight lies
        (test,) = a.score_tests(b.changed.view(np.uint8), np.array([[False], [True]]))
        spacing = nulls.intersection_null(a.class_entries, a.class_changed, b.class_changed).expected
        margins = nulls.expected_in_common((a.margins, b.margins), a.base.slots, (a.changed, b.changed))
    rungs = {
        "rounding": nulls.rounding_intersection(a.class_entries, (a.rounding_null, b.rounding_null), counts),
        "spacing": spacing,
        "margin": margins,
    }
    norms = (a.update_norm, b.update_norm)
    product = scan.update_product(a.base.weight, a.tuned, b.tuned) if min(norms) > 0 else None
    return {
        "run_a": run_a,
        "run_b": run_b,
        "changed_a": counts[0],
        "changed_b": counts[1],
        "intersection": both,
        **{f"intersection_{rung}_null": expected for rung, expected in rungs.items()},
        "jaccard": nulls.jaccard(both, *counts),
        "jaccard_random": nulls.jaccard(counts[0] * counts[1] / a.numel, *counts),
        **{f"jaccard_{rung}_null": expected and nulls.jaccard(expected, *counts) for rung, expected in rungs.items()},
        "jaccard_log_odds": test.log_odds,
        "jaccard_log_odds_se": test.log_odds_se,
        "jaccard_z": test.z,
        "update_norm_a": norms[0],
        "update_norm_b": norms[1],
        "update_cosine": None if product is None else product / (norms[0] * norms[1]),
    }


def density_groups(densities: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
    """The densities, as many at a time as cells can tell apart."""
    for first in range(0, len(densities), DENSITIES_AT_ONCE):
        yield densities[first : first + DENSITIES_AT_ONCE]
