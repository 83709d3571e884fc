"""What a pair of matrices shows once it is decomposed: spectra, subspaces, bounds, and nulls that need drawn updates.

The base is decomposed once, by the solver that the settings choose, or comes from the cache; each tuned matrix starts
from it. Knows nothing of files or tables.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.checkpoints.checkpoint import BFLOAT16, Array
from offprincipal.comparison.cache import Kept
from offprincipal.comparison.pair import BaseMatrix, MaskCounts, MatrixPair
from offprincipal.errors import ArgumentError
from offprincipal.geometry import bounds, gaussian, scan, spectrum, subspace
from offprincipal.geometry.spectrum import Svd

_SMALL = 1 << 16  # entries up to which every Gaussian update of the settings is drawn
_CACHE_FORMAT = 3
_CERTIFICATE = ("singular_value_error", "residual", "next_value_error")
_LEAST_STEP = 1e-5  # spectral norm of an update over that of its base, below which float32 cannot tell its effect
_GPU_GRAM_UP_TO = 1024  # min(n, m) up to which a GPU solves the whole symmetric eigenproblem rather than iterate


Number = float | int | None


@dataclass(frozen=True)
class PrincipalMasks:
    """The principal masks of one base, one a density of the settings, and the counts that overlaps need.

    Args:
        bits: (a, words), the masks, packed; outside: (a, words), those of their entries that are not of low magnitude,
            which is what the safe mask leaves out.
        classes, outside_classes: (a, 512), entries of each by exponent class.
    """

    bits: NDArray[np.uint64]
    outside: NDArray[np.uint64]
    classes: NDArray[np.int64]
    outside_classes: NDArray[np.int64]


@dataclass(frozen=True)
class BaseDecomposition:
    """What the cache keeps of a base; `masks` is None where the base has no principal subspace."""

    svd: Svd
    masks: PrincipalMasks | None


@dataclass(frozen=True)
class GaussianNull:
    """Means over Gaussian updates; None where the base leaves the quantity undefined."""

    spectral_shift: float | None
    angles: tuple[float, ...] | None  # largest and mean left, largest and mean right, degrees
    energies: tuple[float, ...] | None  # in both principal subspaces, the left one, the right one


class BaseSpectrum:
    """The base's decomposition, shared by every tuned checkpoint."""

    def __init__(self, base: BaseMatrix) -> None:
        self.base = base
        self.shape = torch.Size(base.weight.shape)
        self.k = spectrum.principal_rank(self.shape, base.settings.rank_fraction)

    @cached_property
    def device(self) -> torch.device:
        """Where the matrix is worked on; LAPACK in float64 stays on the CPU."""
        return torch.device("cpu") if self.exact else chosen_device(self.base.settings.device)

    @property
    def exact(self) -> bool:
        """Whether LAPACK decomposes everything about this matrix."""
        settings = self.base.settings
        small = min(self.shape) <= settings.exact_up_to or self.k + 1 >= min(self.shape)
        return small or settings.solver == "exact" or settings.tolerance == 0

    @cached_property
    def dtype(self) -> torch.dtype:
        """What this matrix is worked on in."""
        return torch.float64 if self.exact or self.base.weight.dtype.itemsize > 4 else torch.float32

    @cached_property
    def values(self) -> Tensor:
        """(n, m), on the device."""
        return to_tensor(self.base.weight).to(self.device).to(self.dtype)

    @cached_property
    def decomposition(self) -> BaseDecomposition:
        """From the cache, or computed and put there."""
        cache = self.base.cache
        if cache is None or min(self.shape) <= self.base.settings.exact_up_to:
            return self._decompose()
        return cache.get(self._key(), self._decompose, kept, restored)

    @cached_property
    def svd(self) -> Svd:
        return self.decomposition.svd.to(self.device)

    @cached_property
    def has_principal_subspace(self) -> bool:
        return spectrum.has_principal_subspace(self.svd, self.k, self.shape)

    def solve(self, W: Tensor, certify: bool = True) -> Svd:
        """A matrix that has hardly moved from the base, by the solver of the settings."""
        settings = self.base.settings
        if self.exact:
            return spectrum.decompose(W)
        if settings.solver == "randomized":
            return self._cold(W, "randomized")
        return spectrum.decompose_warm(W, self.svd, self.k, settings.tolerance, certify)

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness that depends on the seed, the tensor's name and the purpose alone."""
        return torch.Generator().manual_seed(self.base.seed(purpose))

    def _key(self) -> str:
        """A hash of all that decides the decomposition: the matrix as stored, and the settings."""
        weight, settings = self.base.weight, self.base.settings
        decides = (settings.rank_fraction, settings.densities, settings.solver, settings.tolerance, self.exact)
        about = (_CACHE_FORMAT, weight.shape, str(weight.dtype), self.device.type, decides)
        digest = hashlib.sha256(repr(about).encode())
        digest.update(weight.view("u1").data)
        return digest.hexdigest()[:40]

    def _decompose(self) -> BaseDecomposition:
        svd = spectrum.decompose(self.values) if self.exact else self._cold(self.values, self.base.settings.solver)
        masked = spectrum.has_principal_subspace(svd, self.k, self.shape)
        return BaseDecomposition(svd, self._principal_masks(svd) if masked else None)

    def _cold(self, W: Tensor, solver: str) -> Svd:
        """With no start to go by: iterated where that pays, else the symmetric eigenproblem."""
        tolerance = self.base.settings.tolerance
        up_to = _GPU_GRAM_UP_TO if W.is_cuda else spectrum.GRAM_UP_TO
        if solver == "randomized" or min(W.shape) > up_to:
            start = torch.Generator().manual_seed(0)  # equal matrices are decomposed alike, whatever their names
            found = spectrum.decompose_randomized(W, self.k, tolerance, start)
            if spectrum.within(found, self.k, tolerance):
                return found
        return spectrum.decompose_by_gram(W, self.k)

    def _principal_masks(self, svd: Svd) -> PrincipalMasks:
        top = svd.top(self.k)
        scores = ((top.U * top.S.to(top.U)) @ top.Vh).abs_().float().cpu().numpy()
        codes = self.base.codes
        cuts = scan.largest_cuts(scores, self.base.mask_sizes)
        low_cuts = scan.low_magnitude_cuts(scan.count_codes(codes), self.base.mask_sizes)
        inside = scan.largest_levels(scores, *cuts)
        low = scan.low_magnitude_levels(self.base.weight, *low_cuts)
        counts = scan.classes_by_levels(codes, inside, low, len(self.base.mask_sizes))
        masks = range(len(self.base.mask_sizes))
        return PrincipalMasks(
            np.stack([scan.pack(inside <= a) for a in masks]),
            np.stack([scan.pack((inside <= a) & (low > a)) for a in masks]),
            np.stack([counts[: a + 1].sum(axis=(0, 1)) for a in masks]),
            np.stack([counts[: a + 1, a + 1 :].sum(axis=(0, 1)) for a in masks]),
        )


class PairSpectrum:
    """The decompositions of a pair, and what follows from them."""

    def __init__(self, pair: MatrixPair) -> None:
        self.pair = pair
        self.base = pair.base.spectral
        self.k = self.base.k

    @property
    def values(self) -> Tensor:
        """The tuned matrix, on the device; not kept."""
        return to_tensor(self.pair.tuned).to(self.base.device).to(self.base.dtype)

    @cached_property
    def update(self) -> Tensor:
        """ΔW."""
        return self.values - self.base.values

    @cached_property
    def update_spectrum(self) -> Tensor:
        """(r,), float64."""
        return spectrum.update_spectrum(self.update)

    @property
    def update_norm_2(self) -> float:
        return self.update_spectrum[0].item()

    @cached_property
    def svd(self) -> Svd:
        """Of the tuned matrix; the base's own where nothing moved; solved whole where an approximation will not do."""
        base = self.base
        if self.pair.update_norm == 0:
            return base.svd
        if base.exact or self.update_norm_2 >= _LEAST_STEP * base.svd.S[0].item():
            found = base.solve(self.values)
            if spectrum.within(found, self.k, base.base.settings.tolerance):
                return found
        return spectrum.decompose_by_gram(self.values.double(), self.k)

    @property
    def fell_back(self) -> bool:
        """Whether the solver of the settings missed the tolerance, and the matrix was solved whole."""
        return not self.base.exact and self.svd is not self.base.svd and self.svd.solver == "exact"

    @property
    def is_rounding(self) -> bool:
        """Whether the update is too small for the decompositions to see."""
        return self.update_norm_2 <= spectrum.rounding_floor(self.svd, self.base.shape)

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor] | None:
        """Left and right principal angles of the top-k subspaces, degrees, (k,) each."""
        return self._angles_to(self.svd) if self.base.has_principal_subspace else None

    @property
    def angle_error_deg(self) -> float | None:
        """How far the measured angles may be off, from both sides' certificates."""
        errors = [svd.angle_error_deg(self.k) for svd in (self.base.svd, self.svd)]
        return None if all(error is None for error in errors) else sum(error or 0.0 for error in errors)

    @cached_property
    def energies(self) -> tuple[float, float, float] | None:
        """Shares of the update's energy in both principal subspaces, the left one, the right one."""
        return self._energies_of(self.update) if self.base.has_principal_subspace else None

    def spectral_shift(self) -> tuple[Number, ...]:
        """Shift, values compared, shift per relative step length, and the shift under both nulls."""
        shift, relative = self._shift_to(self.svd), self.pair.relative_update_norm
        per_norm = shift / relative if shift is not None and relative and not self.is_rounding else None
        nulls = (self.isotropic_null.spectral_shift, self.stored_null.spectral_shift)
        return shift, self._compared(self.svd), per_norm, *nulls

    def singular_value_errors(self) -> tuple[Number, ...]:
        """The certificate of the tuned singular values, and that over the k-th of them; None for LAPACK's."""
        error, least = self.svd.singular_value_error, self.svd.S[self.k - 1].item()
        return error, None if error is None or least == 0 else error / least

    def update_ranks(self) -> tuple[Number, ...]:
        """Stable and effective rank of the update."""
        return spectrum.stable_rank(self.update_spectrum), spectrum.effective_rank(self.update_spectrum)

    def all_angles(self) -> tuple[Number, ...]:
        """Largest and mean angle of either side: measured, and under both nulls."""
        undefined = (None,) * 4
        measured = _summarized(self.angles) if self.angles else undefined
        return *measured, *(self.isotropic_null.angles or undefined), *(self.stored_null.angles or undefined)

    def all_energies(self) -> tuple[Number, ...]:
        """For both subspaces, the left and the right one: measured, isotropic, enrichment, stored null."""
        (n, m), k = self.base.shape, self.k
        isotropic = (k * k / (n * m), k / n, k / m)
        undefined = (None, None, None)
        columns = zip(self.energies or undefined, isotropic, self.stored_null.energies or undefined, strict=True)
        return tuple(
            value
            for found, null, stored in columns
            for value in (found, null, None if found is None else found / null, stored)
        )

    def bounds(self) -> tuple[Number, ...]:
        """Tightness of Weyl's, Mirsky's, Ky Fan's and Wedin's bound."""
        if self.is_rounding:
            return (None,) * 4
        count = self._compared(self.svd)
        k, norm_2 = self.k, self.update_norm_2
        S0, S1 = self.base.svd.S[:count], self.svd.S[:count]
        wedin = None
        if self.angles:
            angles = (self.angles[0].max().item(), self.angles[1].max().item())
            wedin = bounds.wedin_tightness(self.base.svd.S, self.svd.S, k, norm_2, angles)
        return (
            bounds.weyl_tightness(S0, S1, norm_2),
            bounds.mirsky_tightness(S0, S1, self.pair.update_norm),
            bounds.ky_fan_tightness(S0, S1, k, norm_2),
            wedin,
        )

    @cached_property
    def mask_counts(self) -> dict[float, dict[str, MaskCounts]]:
        """Density -> the principal and the safe mask, by the counts that overlaps need."""
        masks = self.base.decomposition.masks
        if masks is None:
            return {}
        entries, changed, bits = self.pair.class_entries, self.pair.changed_count, self.pair.changed_bits
        found = {}
        for i, alpha in enumerate(self.base.base.settings.densities):
            safe = changed - scan.count_common(bits, masks.outside[i])
            found[alpha] = {
                "principal": (masks.classes[i], scan.count_common(bits, masks.bits[i])),
                "safe": (entries - masks.outside_classes[i], safe),
            }
        return found

    @cached_property
    def isotropic_null(self) -> GaussianNull:
        """Gaussian updates of the stored update's norm; their energies are known without drawing them."""
        base, norm = self.base, self.pair.update_norm
        if norm == 0:
            return self._still
        if base.exact or base.svd.basis is None:
            generator = base.generator("isotropic")
            draws = (gaussian.isotropic_update(base.shape, norm, generator, base.dtype) for _ in range(self._draws))
            return _mean([self._null_of(update.to(base.device), energies=False) for update in draws])
        rng = np.random.default_rng(base.base.seed("isotropic"))
        sigma = norm / math.sqrt(base.shape.numel())
        moves = (gaussian.moved_isotropically(base.svd.S, base.shape, self.k, sigma, rng) for _ in range(self._draws))
        return _mean([self._null_in_own_coordinates(moved) for moved in moves])

    @cached_property
    def stored_null(self) -> GaussianNull:
        """Gaussian updates of the length that the update had before storing, stored as the tuned weights are."""
        base, found = self.base, []
        if self.pair.update_norm == 0:
            return self._still
        generator = base.generator("gaussian")
        length = self.pair.gaussian_scale * math.sqrt(base.shape.numel())
        dtype = to_tensor(self.pair.tuned[:1, :1]).dtype
        for _ in range(self._draws):
            update = gaussian.isotropic_update(base.shape, length, generator, base.dtype).to(base.device)
            found.append(self._null_of(gaussian.stored_update(base.values, update, dtype)))
        return _mean(found)

    @property
    def _draws(self) -> int:
        """Updates behind each null: a large matrix averages over itself."""
        wanted = self.base.base.settings.null_draws
        return max(1, min(wanted, wanted * _SMALL // self.base.shape.numel()))

    @property
    def _still(self) -> GaussianNull:
        """What no update at all shows."""
        base = self.base
        return self._null_of(torch.zeros(base.shape, dtype=base.dtype, device=base.device))

    def _null_of(self, update: Tensor, energies: bool = True) -> GaussianNull:
        """What one drawn update shows."""
        base = self.base
        moved = base.solve(base.values + update, certify=False) if update.any() else base.svd
        if not base.has_principal_subspace:
            return GaussianNull(self._shift_to(moved), None, None)
        angles = _summarized(self._angles_to(moved))
        return GaussianNull(self._shift_to(moved), angles, self._energies_of(update) if energies else None)

    def _null_in_own_coordinates(self, moved: Svd) -> GaussianNull:
        """What one update shows whose sum with the base is known in coordinates along the base's singular vectors."""
        shift = self._shift_to(moved)
        if not self.base.has_principal_subspace:
            return GaussianNull(shift, None, None)
        return GaussianNull(shift, _summarized(gaussian.angles_from_axes(moved, self.k)), None)

    def _compared(self, moved: Svd) -> int:
        """How many singular values are compared: all where both sides know all, else the top k."""
        r = min(self.base.shape)
        return r if len(self.base.svd.S) == len(moved.S) == r else self.k

    def _shift_to(self, moved: Svd) -> float | None:
        count = self._compared(moved)
        return spectrum.spectral_shift(self.base.svd.S[:count], moved.S[:count].to(self.base.svd.S))

    def _angles_to(self, moved: Svd) -> tuple[Tensor, Tensor]:
        base, k = self.base.svd, self.k
        if moved is base:
            zero = torch.zeros(k, dtype=torch.float64)
            return zero, zero
        left = subspace.principal_angles(base.U[:, :k], moved.U[:, :k].to(base.U))
        return left, subspace.principal_angles(base.Vh[:k].T, moved.Vh[:k].T.to(base.Vh))

    def _energies_of(self, update: Tensor) -> tuple[float, float, float] | None:
        top = self.base.svd.top(self.k)
        return subspace.principal_energies(top.U, top.Vh.T, update)


def chosen_device(wanted: str) -> torch.device:
    """The device that a setting names.

    Raises:
        ArgumentError: there is no CUDA device.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ArgumentError("no CUDA device is at hand: leave --device out, or install a build of torch that sees it")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def to_tensor(array: Array) -> Tensor:
    """A numpy array as a tensor of the same type, sharing its memory."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _summarized(sides: Sequence[Tensor]) -> tuple[float, ...]:
    """Largest and mean angle of the left side, and of the right."""
    return tuple(x.item() for side in sides for x in (side.max(), side.mean()))


def _mean(draws: Sequence[GaussianNull]) -> GaussianNull:
    shift = _means_of([None if draw.spectral_shift is None else (draw.spectral_shift,) for draw in draws])
    angles, energies = (_means_of([getattr(draw, name) for draw in draws]) for name in ("angles", "energies"))
    return GaussianNull(shift[0] if shift else None, angles, energies)


def _means_of(draws: Sequence[Sequence[float] | None]) -> tuple[float, ...] | None:
    """Means over draws, entry by entry; None where one is undefined."""
    if any(draw is None for draw in draws):
        return None
    return tuple(np.mean(np.array(draws, dtype=np.float64), axis=0).tolist())


def kept(found: BaseDecomposition) -> Kept:
    """A decomposition as named tensors and text, for keeping."""
    svd = found.svd.to(torch.device("cpu"))
    tensors = {"U": svd.U, "S": svd.S, "Vh": svd.Vh} | ({} if svd.basis is None else {"basis": svd.basis})
    if found.masks:
        masks = vars(found.masks).items()
        tensors |= {f"masks.{name}": torch.from_numpy(array.view(np.int64)) for name, array in masks}
    about = {"solver": svd.solver} | {name: repr(getattr(svd, name)) for name in _CERTIFICATE}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def restored(content: Kept) -> BaseDecomposition:
    """The decomposition that `kept` took apart.

    Raises:
        KeyError, ValueError: it is something else.
    """
    tensors, about = content
    certificate: Any = {name: None if about[name] == "None" else float(about[name]) for name in _CERTIFICATE}
    svd = Svd(tensors["U"], tensors["S"], tensors["Vh"], about["solver"], **certificate, basis=tensors.get("basis"))
    if "masks.bits" not in tensors:
        return BaseDecomposition(svd, None)
    arrays = {name: tensors[f"masks.{name}"].numpy() for name in ("bits", "outside", "classes", "outside_classes")}
    packed = {name: arrays[name].view(np.uint64) for name in ("bits", "outside")}
    return BaseDecomposition(svd, PrincipalMasks(**(arrays | packed)))
