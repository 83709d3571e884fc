"""One matrix before and after: everything that metrics share, computed once and only when asked for.

Knows nothing of files or tables.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from offprincipal.geometry import masks, nulls, precision, spectrum, subspace


@dataclass(frozen=True)
class MatrixSettings:
    """What decides the numbers of one matrix.

    Args:
        rank_fraction: k = max(1, round(rank_fraction · min(n, m))).
        alpha: density of the masks in `matrices.parquet`.
        alphas: densities of the sweep in `masks.parquet`.
        null_draws: Gaussian updates behind each isotropic null.
        seed: of the random mask and of the Gaussian updates.
    """

    rank_fraction: float = 0.125
    alpha: float = 0.5
    alphas: tuple[float, ...] = masks.ALPHAS
    null_draws: int = 4
    seed: int = 0


class BaseMatrix:
    """The base's side of a pair, shared by every tuned checkpoint.

    Args:
        name: the tensor's name; with the seed it fixes the random mask and the Gaussian updates.
        weight: (n, m), finite.
        decompose: whether masks that need a singular value decomposition may be made.
    """

    def __init__(self, name: str, weight: Tensor, settings: MatrixSettings, decompose: bool = True) -> None:
        self.name = name
        self.weight = weight
        self.settings = settings
        self.decompose = decompose

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness that depends on the seed, the tensor's name and the purpose alone."""
        digest = hashlib.blake2b(f"{self.settings.seed}/{self.name}/{purpose}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    @cached_property
    def k(self) -> int:
        return spectrum.principal_rank(self.weight.shape, self.settings.rank_fraction)

    @cached_property
    def values(self) -> Tensor:
        """(n, m), float64."""
        return self.weight.double()

    @cached_property
    def norm(self) -> float:
        return _norm(self.values)

    @cached_property
    def svd(self) -> spectrum.Svd:
        return spectrum.decompose(self.values)

    @cached_property
    def classes(self) -> Tensor:
        return precision.exponent_class(self.weight)

    @cached_property
    def class_entries(self) -> Tensor:
        return nulls.class_counts(self.classes)

    @cached_property
    def ranks(self) -> dict[str, Tensor]:
        """Mask name -> ranks of the entries."""
        ranks = {
            "low_magnitude": masks.low_magnitude_ranks(self.weight),
            "random": masks.random_ranks(self.weight.shape, self.generator("mask")),
        }
        if self.decompose:
            top = self.svd.top(self.k)
            ranks["principal"] = masks.principal_ranks(top.U, top.S, top.Vh)
        return ranks

    def masks(self, alpha: float) -> dict[str, Tensor]:
        """Mask name -> (n, m) bool, at one density."""
        return masks.masks_at(alpha, self.ranks)


@dataclass(frozen=True)
class MaskOverlap:
    """How much of a change falls into a mask, beside what its size and what rounding alone would put there."""

    density: float
    overlap: float | None
    overlap_random: float | None
    overlap_precision_null: float | None
    overlap_precision_null_sd: float | None
    overlap_z: float | None


@dataclass(frozen=True)
class IsotropicNull:
    """Means over Gaussian updates of the same norm."""

    spectral_shift: float | None
    left_max_deg: float
    left_mean_deg: float
    right_max_deg: float
    right_mean_deg: float


class MatrixPair:
    """A base matrix and one tuned from it.

    Args:
        base: shared between runs.
        tuned: (n, m), finite, in its stored type.
        masters: float32 (n, m) of the tuned weights before they were stored, where they were kept.
    """

    def __init__(self, base: BaseMatrix, tuned: Tensor, masters: Tensor | None = None) -> None:
        self.base = base
        self.tuned = tuned
        self.masters = masters

    @cached_property
    def changed(self) -> Tensor:
        """(n, m) bool, after rounding both sides to bfloat16."""
        return precision.changed(self.base.weight, self.tuned)

    @cached_property
    def changed_count(self) -> int:
        return int(self.changed.sum())

    @cached_property
    def class_changed(self) -> Tensor:
        return nulls.class_counts(self.base.classes, self.changed)

    @cached_property
    def update(self) -> Tensor:
        """ΔW, float64."""
        return self.tuned.double() - self.base.values

    @cached_property
    def update_norm(self) -> float:
        return _norm(self.update)

    @cached_property
    def master_update_norm(self) -> float:
        """Frobenius norm of the update before it was stored, where masters were kept; else of the stored one."""
        if self.masters is None:
            return self.update_norm
        return _norm(self.masters.double() - self.base.values)

    @cached_property
    def update_spectrum(self) -> Tensor:
        singular_values: Tensor = torch.linalg.svdvals(self.update)
        return singular_values

    @cached_property
    def update_norm_2(self) -> float:
        return self.update_spectrum[0].item()

    @property
    def relative_update_norm(self) -> float | None:
        return self.update_norm / self.base.norm if self.base.norm > 0 else None

    @cached_property
    def svd(self) -> spectrum.Svd:
        """Of the tuned matrix; the base's own where nothing moved."""
        return spectrum.decompose(self.tuned) if self.update_norm > 0 else self.base.svd

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Left and right principal angles of the top-k subspaces, degrees, (k,) each."""
        return _angles(self.base.svd, self.svd, self.base.k)

    @cached_property
    def isotropic_null(self) -> IsotropicNull:
        generator = self.base.generator("isotropic")
        draws = []
        for _ in range(self.base.settings.null_draws if self.update_norm > 0 else 1):
            noise = nulls.isotropic_update(self.update.shape, self.update_norm, generator)
            moved = spectrum.decompose(self.base.values + noise) if self.update_norm > 0 else self.base.svd
            left, right = _angles(self.base.svd, moved, self.base.k)
            shift = spectrum.spectral_shift(self.base.svd.S, moved.S)
            numbers = (left.max(), left.mean(), right.max(), right.mean())
            draws.append([math.nan if shift is None else shift, *(x.item() for x in numbers)])
        shift, *angles = torch.tensor(draws, dtype=torch.float64).mean(dim=0).tolist()
        return IsotropicNull(None if math.isnan(shift) else shift, *angles)

    @cached_property
    def energies(self) -> tuple[float, float, float] | None:
        """Shares of the update's energy in both principal subspaces, the left one, the right one."""
        top = self.base.svd.top(self.base.k)
        return subspace.principal_energies(top.U, top.Vh.T, self.update)

    def overlap(self, mask: Tensor) -> MaskOverlap:
        """How much of the change falls into a mask."""
        density = mask.sum().item() / mask.numel()
        count = self.changed_count
        if count == 0:
            return MaskOverlap(density, None, None, None, None, None)
        in_mask = nulls.class_counts(self.base.classes, mask)
        null = nulls.overlap_null(self.base.class_entries, self.class_changed, in_mask)
        observed = int((mask & self.changed).sum())
        sd = math.sqrt(null.variance) / count
        return MaskOverlap(density, observed / count, density, null.expected / count, sd, null.z(observed))

    @cached_property
    def overlaps(self) -> dict[str, MaskOverlap]:
        """Mask name -> overlap, at the default density."""
        return {name: self.overlap(mask) for name, mask in self.base.masks(self.base.settings.alpha).items()}


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _angles(a: spectrum.Svd, b: spectrum.Svd, k: int) -> tuple[Tensor, Tensor]:
    if a is b:
        zero = torch.zeros(k, dtype=torch.float64)
        return zero, zero
    left = subspace.principal_angles(a.U[:, :k], b.U[:, :k])
    return left, subspace.principal_angles(a.Vh[:k].T, b.Vh[:k].T)
