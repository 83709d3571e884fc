"""One matrix before and after: everything that metrics share, computed once and only when asked for.

Knows nothing of files or tables.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
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
    def has_principal_subspace(self) -> bool:
        return spectrum.has_principal_subspace(self.svd.S, self.k, self.weight.shape)

    @cached_property
    def on_bf16_grid(self) -> bool:
        """Whether every entry is a bfloat16 number, as the precision null of two runs needs."""
        return bool((precision.to_bf16(self.weight).double() == self.weight.double()).all())

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
        if self.decompose and self.has_principal_subspace:
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
class GaussianNull:
    """Means over Gaussian updates; None where the base leaves the quantity undefined."""

    spectral_shift: float | None
    angles: tuple[float, ...] | None  # largest and mean left, largest and mean right, degrees
    energies: tuple[float, ...] | None  # in both principal subspaces, the left one, the right one


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
    def gaussian_scale(self) -> float:
        """σ of the Gaussian update of equal length before storing: from masters where they were kept, else solved."""
        size = math.sqrt(max(self.update.numel(), 1))
        if self.masters is not None:
            return _norm(self.masters.double() - self.base.values) / size
        if self.tuned.dtype == torch.bfloat16:
            return nulls.gaussian_scale(self.base.weight, self.update_norm)
        return self.update_norm / size

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
    def angles(self) -> tuple[Tensor, Tensor] | None:
        """Left and right principal angles of the top-k subspaces, degrees, (k,) each."""
        return _angles(self.base.svd, self.svd, self.base.k) if self.base.has_principal_subspace else None

    @property
    def is_rounding(self) -> bool:
        """Whether the update is too small for the decompositions to see."""
        return self.update_norm_2 <= spectrum.rounding_floor(self.base.svd.S, self.base.weight.shape)

    @cached_property
    def isotropic_null(self) -> GaussianNull:
        """Gaussian updates of the stored update's norm."""
        return self._gaussian_null(self._gaussian_updates("isotropic", self.update_norm))

    @cached_property
    def stored_null(self) -> GaussianNull:
        """Gaussian updates of the length that the update had before storing, stored as the tuned weights are."""
        updates = self._gaussian_updates("stored", self.gaussian_scale * math.sqrt(self.update.numel()))
        return self._gaussian_null(nulls.stored_update(self.base.weight, u, self.tuned.dtype) for u in updates)

    def _gaussian_updates(self, purpose: str, norm: float) -> Iterator[Tensor]:
        """Independent updates of one norm; a single zero one where it is zero."""
        if norm == 0:
            yield torch.zeros_like(self.update)
            return
        generator = self.base.generator(purpose)
        for _ in range(self.base.settings.null_draws):
            yield nulls.isotropic_update(self.update.shape, norm, generator)

    def _gaussian_null(self, updates: Iterator[Tensor]) -> GaussianNull:
        shifts, angles, energies = [], [], []
        for update in updates:
            moved = spectrum.decompose(self.base.values + update) if bool(update.any()) else self.base.svd
            shifts.append(spectrum.spectral_shift(self.base.svd.S, moved.S))
            if self.base.has_principal_subspace:
                sides = _angles(self.base.svd, moved, self.base.k)
                angles.append([x.item() for side in sides for x in (side.max(), side.mean())])
                energies.append(self._energies_of(update))
        mean_shift = _means_of([None if shift is None else (shift,) for shift in shifts])
        return GaussianNull(mean_shift[0] if mean_shift else None, _means_of(angles), _means_of(energies))

    @cached_property
    def energies(self) -> tuple[float, float, float] | None:
        """Shares of the update's energy in both principal subspaces, the left one, the right one."""
        return self._energies_of(self.update) if self.base.has_principal_subspace else None

    def _energies_of(self, update: Tensor) -> tuple[float, float, float] | None:
        top = self.base.svd.top(self.base.k)
        return subspace.principal_energies(top.U, top.Vh.T, update)

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


def _means_of(draws: Sequence[Sequence[float] | None]) -> tuple[float, ...] | None:
    """Means over draws, entry by entry; None where there is none or one is undefined."""
    if not draws or any(draw is None for draw in draws):
        return None
    return tuple(torch.tensor(draws, dtype=torch.float64).mean(dim=0).tolist())


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _angles(a: spectrum.Svd, b: spectrum.Svd, k: int) -> tuple[Tensor, Tensor]:
    if a is b:
        zero = torch.zeros(k, dtype=torch.float64)
        return zero, zero
    left = subspace.principal_angles(a.U[:, :k], b.U[:, :k])
    return left, subspace.principal_angles(a.Vh[:k].T, b.Vh[:k].T)
