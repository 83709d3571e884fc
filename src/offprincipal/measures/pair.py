"""One matrix before and after: everything that metrics share, computed once and only on demand.

Figures from counts of stored bits need no torch; those that need a decomposition are in `measures.spectral`, reached
through `.spectral`, which takes arrays and refers back to nothing. Knows nothing of files or tables.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints.checkpoint import BFLOAT16, Array
from offprincipal.geometry import bits, cuts, nulls, scan
from offprincipal.geometry.bits import Counts, Floats
from offprincipal.geometry.draws import seed_of
from offprincipal.measures.changes import Block, ChangeCounts, TensorPair, count_changes, scan_block
from offprincipal.measures.location import (
    DENSITIES_AT_ONCE,
    MaskCells,
    MaskOverlap,
    density_groups,
    line_nulls,
    mask_cells,
)
from offprincipal.measures.once import once
from offprincipal.measures.settings import MatrixSettings

if TYPE_CHECKING:
    from offprincipal.measures.spectral import BaseSpectrum, DecompositionCache, PairSpectrum

_TELLS_STEPS = (np.float32, np.float64)  # types fine enough that a step is known although it was stored


class BaseMatrix:
    """The base's side of a pair, shared by every tuned checkpoint.

    Args:
        name: the tensor's name; with the seed it fixes the random mask and the Gaussian updates.
        weight: (n, m), in its stored type.
        decompose: whether masks that need a singular value decomposition may be made.
        cache: where decompositions of bases are kept; None keeps none.
    """

    def __init__(
        self,
        name: str,
        weight: Array,
        settings: MatrixSettings,
        decompose: bool = True,
        cache: "DecompositionCache | None" = None,
    ) -> None:
        self.name = name
        self.weight = weight
        self.settings = settings
        self.decompose = decompose
        self.cache = cache
        self.seed = partial(seed_of, settings.seed, name)  # no method, which would refer back to the matrix

    @once
    def codes(self) -> NDArray[np.uint16]:
        return bits.bf16_codes(self.weight)

    @once
    def line_classes(self) -> tuple[Counts, NDArray[np.uint32], NDArray[np.uint32]]:
        """classes (K,); rows (K, n) and columns (K, m): entries of each spacing class in every line."""
        return scan.classes_of_lines(self.codes)

    @once
    def slots(self) -> NDArray[np.uint16]:
        """(n, m), the place of each entry's class among those that occur."""
        return nulls.class_slots(self.codes, self.line_classes[0])

    @once
    def mask_cells(self) -> list[MaskCells]:
        """The matrix divided by its masks, as many densities at a time as cells can tell apart."""
        found, counted = [], scan.count_codes(self.codes)
        for densities in density_groups(self.settings.densities):
            sizes = np.array([cuts.mask_size(self.weight.size, alpha) for alpha in densities], np.int64)
            low = cuts.low_magnitude_levels(self.weight, *cuts.low_magnitude_cuts(counted, sizes))
            principal = self.spectral.principal_levels(densities) if self.decompose else None
            found.append(mask_cells(self.codes, low, principal, len(densities)))
        return found

    @once
    def spectral(self) -> "BaseSpectrum":
        """What needs torch: the decomposition, and the masks that follow from it."""
        from offprincipal.measures.spectral import BaseSpectrum

        return BaseSpectrum(self.weight, self.settings, self.seed, self.cache)


class MatrixPair(TensorPair):
    """A base matrix and one tuned from it: what linear matrices are measured for.

    Args:
        base: shared between runs.
        tuned: (n, m), in its stored type.
        masters: float32 (n, m) of the tuned weights before they were stored, where they were kept.
    """

    def __init__(self, base: BaseMatrix, tuned: Array, masters: Array | None = None) -> None:
        block = Block(base.weight, tuned, masters)
        super().__init__(lambda: [block])
        self.block = block
        self.base = base
        self.tuned = tuned

    @once
    def scan(self) -> scan.Scan:
        """Which entries changed after rounding both sides to bfloat16, counted."""
        return scan_block(self.block, self.base.codes, self.codes)

    @once
    def counts(self) -> ChangeCounts:
        return count_changes(self.block, self.scan)

    @once
    def codes(self) -> NDArray[np.uint16]:
        return bits.bf16_codes(self.tuned)

    @once
    def changed(self) -> NDArray[np.bool_]:
        """(n, m), which entries changed."""
        return scan.mark_changed(self.base.codes, self.codes)

    @once
    def line_nulls(self) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
        """Mean and variance of the change counts under the spacing null, of the rows and of the columns."""
        return line_nulls(self, self.base.line_classes)

    @property
    def finest(self) -> Array:
        """The tuned weights as precisely as they are known: the masters, where they were kept."""
        return self.tuned if self.block.masters is None else self.block.masters

    @once
    def rounding_null(self) -> nulls.RoundingNull | None:
        """Steps that ignore the weights, and are then stored; None off the bfloat16 grid, or if nothing changed."""
        known = self.finest.dtype in _TELLS_STEPS
        if not self.counts.on_grid or not self.changed_count or (not known and self.finest.dtype != BFLOAT16):
            return None
        steps = nulls.count_steps(self.base.codes, self.finest if known else self.codes)
        return nulls.rounding_null(self.class_entries, self.class_changed, steps, known)

    @once
    def scaled_changes(self) -> list[Floats | None]:
        """Expected changes under the scaled rounding null in each cell of each of the base's `mask_cells`.

        None off the bfloat16 grid, without masters, or if nothing would change.
        """
        null = None
        if self.counts.on_grid and self.changed_count and self.finest.dtype in _TELLS_STEPS:
            null = nulls.scaled_null(self.base.codes, self.finest)
        if null is None:
            return [None] * len(self.base.mask_cells)
        found = [null.expected_changes(self.base.codes, d.cells, len(d.classes)) for d in self.base.mask_cells]
        return [changes if changes.sum() > 0 else None for changes in found]

    @once
    def margins(self) -> nulls.MarginModel:
        """Changes by class, row and column, and nothing else."""
        classes, rows, columns = self.base.line_classes
        hits = (self.scan.rows, self.scan.columns, self.class_changed[classes])
        return nulls.fit_margins(self.base.slots, self.changed, hits, (rows, columns))

    def score_tests(self, cells: NDArray[np.uint8], members: NDArray[np.bool_]) -> list[nulls.ScoreTest]:
        """Masks, given by cells, held against the margin null."""
        return nulls.score_tests(self.margins, self.base.slots, self.changed, cells, members)

    @once
    def overlaps(self) -> dict[float, dict[str, MaskOverlap]]:
        """Density -> mask -> overlap; the principal and the safe mask only where decompositions are allowed."""
        settings, found = self.base.settings, {}
        rng = np.random.default_rng(self.base.seed("mask"))
        for alpha in settings.densities:
            found[alpha] = {"random": self._random_overlap(alpha, rng)}
        for first, divided in enumerate(self.base.mask_cells):
            densities = settings.densities[first * DENSITIES_AT_ONCE :]
            tests: Sequence[nulls.ScoreTest | None] = [None] * len(divided.names)
            if settings.mask_tests:
                found_tests = self.score_tests(divided.cells, divided.members)
                tests, hits = found_tests, [test.count for test in found_tests]
            else:
                in_cells = np.bincount(divided.cells[self.changed], minlength=len(divided.members))
                hits = (in_cells @ divided.members).tolist()
            scaled = self.scaled_changes[first]
            shares = [None] * len(tests) if scaled is None else (scaled @ divided.members / scaled.sum()).tolist()
            masks = zip(divided.names, divided.entries, hits, tests, shares, strict=True)
            for (place, name), in_mask, observed, test, share in masks:
                found[densities[place]][name] = self._overlap(in_mask, observed, test, share)
        return {alpha: {name: masks[name] for name in cuts.MASKS if name in masks} for alpha, masks in found.items()}

    def _random_overlap(self, alpha: float, rng: np.random.Generator) -> MaskOverlap:
        """Of a mask that was drawn without a look at rows or columns: the spacing null is its margin null too."""
        in_mask, observed = nulls.bernoulli_overlap(self.class_entries, self.class_changed, alpha, rng)
        null = nulls.overlap_null(self.class_entries, self.class_changed, in_mask)
        test = nulls.ScoreTest(observed, observed - null.expected, null.variance)
        return self._overlap(in_mask, observed, test, alpha if self.scaled_changes[0] is not None else None)

    def _overlap(
        self, in_mask: Counts, observed: int, test: nulls.ScoreTest | None, scaled: float | None
    ) -> MaskOverlap:
        density, count = int(in_mask.sum()) / self.numel, self.changed_count
        if count == 0:
            return MaskOverlap(density)
        rounding, spacing = self.rounding_null, None
        if self.counts.on_grid:
            spacing = nulls.overlap_null(self.class_entries, self.class_changed, in_mask).expected / count
        return MaskOverlap(
            density,
            observed / count,
            density,
            rounding.overlap(self.class_entries, in_mask) if rounding else None,
            rounding.judged if rounding else None,
            scaled,
            spacing,
            *(() if test is None else (test.expected / count, test.log_odds, test.log_odds_se, test.z)),
        )

    @once
    def spectral(self) -> "PairSpectrum":
        """What needs torch: the decompositions of both sides, and the nulls that follow from them."""
        from offprincipal.measures.spectral import PairSpectrum

        known = self.finest if self.finest.dtype in _TELLS_STEPS else None
        lengths = (self.update_norm, self.base_norm, self.gaussian_scale)
        return PairSpectrum(self.base.spectral, self.tuned, *lengths, known)
