"""One matrix before and after: everything that metrics share, computed once and only when asked for.

What counts of stored bits give is here and needs no torch; what needs a decomposition is in `comparison.spectral`, and
is reached through `.spectral`. Knows nothing of files or tables.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints.checkpoint import BFLOAT16, Array
from offprincipal.errors import ArgumentError, NonFiniteTensor
from offprincipal.geometry import nulls, scan
from offprincipal.geometry.scan import ALPHAS, MASKS, Counts, Floats

if TYPE_CHECKING:
    from offprincipal.comparison.cache import BaseCache
    from offprincipal.comparison.spectral import BaseSpectrum, PairSpectrum

MaskCounts = tuple[Counts, int]  # entries of a mask by exponent class, and how many changed entries are in it
Solver = Literal["auto", "exact", "randomized"]
Device = Literal["cpu", "cuda", "auto"]


@dataclass(frozen=True)
class MatrixSettings:
    """What decides the numbers of one matrix.

    Args:
        rank_fraction: k = max(1, round(rank_fraction · min(n, m))).
        alpha: density of the masks in `matrices.parquet`.
        alphas: densities of the sweep in `masks.parquet`.
        null_draws: Gaussian updates behind each isotropic null of a matrix of up to 65,536 entries; a larger one
            averages over itself, and takes as many fewer.
        seed: of the random mask and of the Gaussian updates.
        solver: `exact` is LAPACK in float64 for every matrix; `auto` is that up to min(n, m) = `exact_up_to`, and above
            it warm starts from a base that is decomposed once; `randomized` starts cold for every matrix above.
        exact_up_to: where LAPACK is as fast as anything.
        tolerance: on the singular values, relative, that the certificate of an approximation has to meet; a matrix
            that misses it is solved exactly. 0 means exact everywhere.
        device: where matrices are decomposed; `auto` takes a CUDA device where there is one.
    """

    rank_fraction: float = 0.125
    alpha: float = 0.5
    alphas: tuple[float, ...] = ALPHAS
    null_draws: int = 4
    seed: int = 0
    solver: Solver = "auto"
    exact_up_to: int = 256
    tolerance: float = 1e-3
    device: Device = "cpu"

    def __post_init__(self) -> None:
        densities = [("alphas", alpha) for alpha in self.alphas]
        for name, value in (("rank_fraction", self.rank_fraction), ("alpha", self.alpha), *densities):
            if not 0 < value <= 1:
                raise ArgumentError(f"{name} is {value}: give a number above 0, at most 1")
        if self.null_draws < 1:
            raise ArgumentError(f"null_draws is {self.null_draws}: give at least 1")
        if not 0 <= self.tolerance < 1:
            raise ArgumentError(f"tolerance is {self.tolerance}: give a number from 0, below 1")
        for name, chosen, kinds in (("solver", self.solver, Solver), ("device", self.device, Device)):
            if chosen not in get_args(kinds):
                raise ArgumentError(f"no {name} '{chosen}': choose of {', '.join(get_args(kinds))}")

    @property
    def densities(self) -> tuple[float, ...]:
        """The sweep and the default, each once, from the sparsest up."""
        return tuple(sorted({*self.alphas, self.alpha}))


@dataclass(frozen=True)
class MaskOverlap:
    """How much of a change falls into a mask, beside what its size and what rounding alone would put there."""

    density: float
    overlap: float | None
    overlap_random: float | None
    overlap_precision_null: float | None
    overlap_precision_null_sd: float | None
    overlap_z: float | None


class Block(NamedTuple):
    """Some of a tensor's entries, as lines, on each side; masters are the tuned ones before they were stored."""

    base: Array
    tuned: Array
    masters: Array | None


@dataclass(frozen=True)
class Tally:
    """What is counted of any tensor, block by block: tallies of its blocks add up to its own.

    Args:
        entries, changed: (32768,), entries of the base with each magnitude code, and how many of them changed.
        base_square, update_square: squared Frobenius norms.
        masters_square: ‖masters − base‖_F²; None without masters.
        unchanged_stored: entries that are the same in the stored type; None where the sides are stored in two types.
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

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
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


def tally(block: Block, counted: scan.Scan) -> Tally:
    """The tally of one block, given its scan."""
    base, tuned, masters = block
    on_grid = scan.on_bf16_grid(base)
    unchanged = None
    if tuned.dtype == base.dtype:
        unchanged = base.size - counted.changed_count if tuned.dtype == BFLOAT16 else int((tuned == base).sum())
    hidden = None
    if masters is not None:
        moved = masters != base.astype(np.float32)
        hidden = int((moved & (scan.bf16_codes(masters) == scan.bf16_codes(base))).sum())
    return Tally(
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
        scan.require_storable(block.base)
        scan.require_storable(block.tuned)
        raise


def _tally_alone(block: Block) -> Tally:
    return tally(block, scan_block(block, scan.bf16_codes(block.base), scan.bf16_codes(block.tuned)))


class TensorPair:
    """A tensor before and after, of any size: what every tensor is measured for.

    Args:
        blocks: gives the blocks of the tensor, anew at each call.
    """

    def __init__(self, blocks: Callable[[], Iterable[Block]]) -> None:
        self._blocks = blocks

    @cached_property
    def tally(self) -> Tally:
        return functools.reduce(operator.add, map(_tally_alone, self._blocks()))

    @cached_property
    def numel(self) -> int:
        return int(self.tally.entries.sum())

    @cached_property
    def changed_count(self) -> int:
        return int(self.tally.changed.sum())

    @cached_property
    def class_entries(self) -> Counts:
        return scan.count_by_class(self.tally.entries)

    @cached_property
    def class_changed(self) -> Counts:
        return scan.count_by_class(self.tally.changed)

    @property
    def base_norm(self) -> float:
        return math.sqrt(self.tally.base_square)

    @property
    def update_norm(self) -> float:
        return math.sqrt(self.tally.update_square)

    @property
    def relative_update_norm(self) -> float | None:
        return self.update_norm / self.base_norm if self.base_norm > 0 else None

    @cached_property
    def gaussian_scale(self) -> float:
        """σ of the Gaussian update of equal length before storing: from masters where they were kept, else solved."""
        size = math.sqrt(max(self.numel, 1))
        if self.tally.masters_square is not None:
            return math.sqrt(self.tally.masters_square) / size
        if self.tally.dtypes[1] == str(BFLOAT16):
            return nulls.gaussian_scale(self.class_entries, self.update_norm)
        return self.update_norm / size

    @cached_property
    def unchanged_isotropic(self) -> float | None:
        """Share of the entries that a Gaussian update of equal length would leave."""
        sigma = self.gaussian_scale
        if self.numel == 0 or sigma == 0 or self.tally.on_grid:
            return nulls.unchanged_isotropic(self.tally.entries, sigma)
        stay = (nulls.unchanged_isotropic_off_grid(scan.bf16_codes(b.base), b.base, sigma) for b in self._blocks())
        return sum(stay) / self.numel


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
        cache: "BaseCache | None" = None,
    ) -> None:
        self.name = name
        self.weight = weight
        self.settings = settings
        self.decompose = decompose
        self.cache = cache

    def seed(self, purpose: str) -> int:
        """A 63-bit seed that depends on the settings' seed, the tensor's name and the purpose alone."""
        digest = hashlib.blake2b(f"{self.settings.seed}/{self.name}/{purpose}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    @cached_property
    def codes(self) -> NDArray[np.uint16]:
        return scan.bf16_codes(self.weight)

    @cached_property
    def line_classes(self) -> tuple[Counts, NDArray[np.uint32], NDArray[np.uint32]]:
        """classes (K,); rows (K, n) and columns (K, m): entries of each exponent class in every line."""
        return scan.classes_of_lines(self.codes)

    @cached_property
    def mask_sizes(self) -> Counts:
        """Entries of a mask at each of the settings' densities."""
        return np.array([scan.mask_size(self.weight.size, alpha) for alpha in self.settings.densities], np.int64)

    @cached_property
    def spectral(self) -> "BaseSpectrum":
        """What needs torch: the decomposition, and the masks that follow from it."""
        from offprincipal.comparison.spectral import BaseSpectrum

        return BaseSpectrum(self)

    def release(self) -> None:
        """Let go of the decomposition: it refers back, and a cycle stays in memory until it happens to be collected."""
        self.__dict__.pop("spectral", None)


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

    @cached_property
    def scan(self) -> scan.Scan:
        """Which entries changed after rounding both sides to bfloat16, counted."""
        return scan_block(self.block, self.base.codes, self.codes)

    @cached_property
    def tally(self) -> Tally:
        return tally(self.block, self.scan)

    @cached_property
    def codes(self) -> NDArray[np.uint16]:
        return scan.bf16_codes(self.tuned)

    @cached_property
    def changed_bits(self) -> NDArray[np.uint64]:
        """Which entries changed, a bit each."""
        return scan.pack_changed(self.base.codes, self.codes)

    @cached_property
    def line_nulls(self) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
        """Mean and variance of the change counts under the precision null, of the rows and of the columns."""
        classes, rows, columns = self.base.line_classes
        counts = self.class_entries[classes], self.class_changed[classes]
        return nulls.line_null(rows, *counts), nulls.line_null(columns, *counts)

    @cached_property
    def overlaps(self) -> dict[float, dict[str, MaskOverlap]]:
        """Density -> mask -> overlap; the principal and the safe mask only where decompositions are allowed."""
        found: dict[float, dict[str, MaskOverlap]] = {}
        low, random = self._low_magnitude_counts(), self._random_counts()
        principal = self.spectral.mask_counts if self.base.decompose else {}
        for i, alpha in enumerate(self.base.settings.densities):
            counts = {"low_magnitude": low[i], "random": random[i], **principal.get(alpha, {})}
            found[alpha] = {name: self._overlap(*counts[name]) for name in MASKS if name in counts}
        return found

    @cached_property
    def spectral(self) -> "PairSpectrum":
        """What needs torch: the decompositions of both sides, and the nulls that follow from them."""
        from offprincipal.comparison.spectral import PairSpectrum

        return PairSpectrum(self)

    def release(self) -> None:
        """Let go of the decompositions, as a base does."""
        self.__dict__.pop("spectral", None)

    def _low_magnitude_counts(self) -> list[MaskCounts]:
        entries, changed = self.tally.entries, self.tally.changed
        codes, ties = scan.low_magnitude_cuts(entries, self.base.mask_sizes)
        if self.tally.on_grid:
            tied = scan.changed_ties(self.base.codes, self.codes, codes, ties)
            overlaps = [int(changed[:code].sum() + moved) for code, moved in zip(codes, tied, strict=True)]
        else:
            levels = scan.low_magnitude_levels(self.base.weight, codes, ties)
            overlaps = [scan.count_common(self.changed_bits, scan.pack(levels <= a)) for a in range(len(codes))]
        cuts = zip(codes, ties, overlaps, strict=True)
        return [(scan.classes_below(entries, code, count), overlap) for code, count, overlap in cuts]

    def _random_counts(self) -> list[MaskCounts]:
        rng = np.random.default_rng(self.base.seed("mask"))
        counts = self.class_entries, self.class_changed
        return [nulls.bernoulli_overlap(*counts, alpha, rng) for alpha in self.base.settings.densities]

    def _overlap(self, in_mask: Counts, observed: int) -> MaskOverlap:
        density = int(in_mask.sum()) / self.numel
        count = self.changed_count
        if count == 0:
            return MaskOverlap(density, None, None, None, None, None)
        null = nulls.overlap_null(self.class_entries, self.class_changed, in_mask)
        sd = math.sqrt(null.variance) / count
        return MaskOverlap(density, observed / count, density, null.expected / count, sd, null.z(observed))


def _sum(a: Any, b: Any) -> Any:
    """None where either is."""
    return None if a is None or b is None else a + b
