"""Measures of a pair of matrices that need decompositions: spectra, subspaces, bounds, and nulls with drawn updates.

The base is decomposed once, by the solver that the settings choose, or comes from the cache; each tuned matrix starts
from it. Arrays and numbers in, numbers out. Knows nothing of files or tables.
"""

import functools
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.checkpoints.checkpoint import BFLOAT16, Array
from offprincipal.errors import ArgumentError
from offprincipal.geometry import bits, bounds, cuts, gaussian, principal, spectrum, subspace
from offprincipal.geometry.cuts import Levels
from offprincipal.geometry.spectrum import Svd
from offprincipal.measures.once import once
from offprincipal.measures.settings import MatrixSettings

_SMALL = 1 << 16  # entries up to which every Gaussian update of the settings is drawn
_CACHE_FORMAT = 5
_ERRORS = ("singular_value_error", "residual", "next_value_error", "tail_error")
_LEAST_STEP = 1e-5  # spectral norm of an update over that of its base, below which float32 cannot tell its effect
ANGLES = tuple((side, which) for which in ("max", "mean", "rms") for side in ("left", "right"))

Number = float | int | None
Kept = tuple[dict[str, Tensor], dict[str, str]]  # tensors by name, and words about them
T = TypeVar("T")


class DecompositionCache(Protocol):
    """A store of decompositions, by a key of everything that determines them."""

    def get(self, key: str, compute: Callable[[], T], keep: Callable[[T], Kept], restore: Callable[[Kept], T]) -> T:
        """The entry of a key; it is computed and stored if it is missing."""
        ...


@dataclass(frozen=True)
class BaseDecomposition:
    """What the cache keeps of a base.

    Args:
        masks: (a, words), its principal masks at the settings' densities, packed; None if there is no principal
            subspace.
    """

    svd: Svd
    masks: NDArray[np.uint64] | None


@dataclass(frozen=True)
class Drawn:
    """What one Gaussian update shows, or several: shift, angles as `ANGLES` has them, energies in both, left, right.

    None if the base leaves a quantity undefined, or where one draw cannot tell a spread.
    """

    spectral_shift: Number
    angles: tuple[Number, ...]
    energies: tuple[Number, ...]


NOTHING_DRAWN = Drawn(None, (None,) * len(ANGLES), (None,) * 3)


class BaseSpectrum:
    """The base's decomposition, shared by every tuned checkpoint.

    Args:
        weight: (n, m), in its stored type.
        seed: a number for each purpose, fixed for this matrix.
        cache: where decompositions are kept; None keeps none.
    """

    def __init__(
        self,
        weight: Array,
        settings: MatrixSettings,
        seed: Callable[[str], int],
        cache: DecompositionCache | None = None,
    ) -> None:
        self.weight = weight
        self.settings = settings
        self.seed = seed
        self.cache = cache
        self.shape = torch.Size(weight.shape)
        self.k = principal.principal_rank(self.shape, settings.rank_fraction)

    @once
    def device(self) -> torch.device:
        """Where the matrix is worked on; LAPACK in float64 stays on the CPU."""
        return torch.device("cpu") if self.exact else chosen_device(self.settings.device)

    @property
    def exact(self) -> bool:
        """Whether LAPACK decomposes everything about this matrix."""
        settings = self.settings
        small = min(self.shape) <= settings.exact_up_to or self.k + 1 >= min(self.shape)
        return small or settings.solver == "exact" or settings.tolerance == 0

    @once
    def dtype(self) -> torch.dtype:
        """What this matrix is worked on in."""
        wide = self.exact or min(self.shape) <= self.settings.float64_up_to or self.weight.dtype.itemsize > 4
        return torch.float64 if wide else torch.float32

    @once
    def values(self) -> Tensor:
        """(n, m), on the device."""
        return to_tensor(self.weight).to(self.device).to(self.dtype)

    @once
    def decomposition(self) -> BaseDecomposition:
        """From the cache, or computed and put there."""
        if self.cache is None or min(self.shape) <= self.settings.exact_up_to:
            return self._decompose()
        return self.cache.get(self._key(), self._decompose, kept, self._restored)

    @once
    def svd(self) -> Svd:
        return self.decomposition.svd.to(self.device)

    @property
    def is_sharp(self) -> bool:
        """Whether it is worked on in float64, by a solver that corrects to second order."""
        return self.dtype == torch.float64 and self.settings.solver == "auto"

    @once
    def sharp(self) -> "BaseSpectrum":
        """The same worked on in float64, for what moved so little that float32 cannot tell."""
        if self.is_sharp:
            return self
        settings = replace(self.settings, float64_up_to=min(self.shape), solver="auto")
        return BaseSpectrum(self.weight, settings, self.seed, self.cache)

    @once
    def has_principal_subspace(self) -> bool:
        return principal.has_principal_subspace(self.svd, self.k, self.shape)

    def principal_levels(self, densities: Sequence[float]) -> Levels | None:
        """(n, m), how many of the principal masks at some of the settings' densities leave out each entry."""
        masks = self.decomposition.masks
        if masks is None:
            return None
        places = [self.settings.densities.index(alpha) for alpha in densities]
        levels = np.full(self.weight.size, len(places), np.uint8)
        for place in places:
            levels -= bits.unpack(masks[place], self.weight.size)
        return levels.reshape(self.weight.shape)

    def solve(self, W: Tensor, measure_error: bool = True) -> Svd:
        """A matrix that has hardly moved from the base, by the solver of the settings."""
        if self.exact:
            return spectrum.decompose(W)
        if self.settings.solver == "randomized":
            return self._cold(W)
        return spectrum.decompose_warm(W, self.svd, self.k, self.settings.tolerance, measure_error)

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness that depends on the seed, the tensor's name and the purpose alone."""
        return torch.Generator().manual_seed(self.seed(purpose))

    def _key(self) -> str:
        """A hash of all that decides the decomposition: the matrix as stored, and the settings."""
        settings = self.settings
        decides = (settings.rank_fraction, settings.densities, settings.solver, settings.tolerance, self.exact)
        worked_on = (str(self.dtype), self.device.type)
        about = (_CACHE_FORMAT, self.weight.shape, str(self.weight.dtype), *worked_on, decides)
        digest = hashlib.sha256(repr(about).encode())
        digest.update(self.weight.view("u1").data)
        return digest.hexdigest()[:40]

    def _decompose(self) -> BaseDecomposition:
        svd = (spectrum.decompose(self.values) if self.exact else self._cold(self.values)).contiguous()
        masked = principal.has_principal_subspace(svd, self.k, self.shape)
        return BaseDecomposition(svd, self._principal_masks(svd) if masked else None)

    def _restored(self, content: Kept) -> BaseDecomposition:
        """What was kept, once it is found to be of this matrix: a cache may be damaged, or written by another program.

        Raises:
            KeyError, ValueError: it is something else.
        """
        found = restored(content)
        values = self.values
        spectrum.require_decomposition(found.svd.to(values.device), values, self.k, self.generator("cache"))
        masked = principal.has_principal_subspace(found.svd, self.k, self.shape)
        shape = (len(self.settings.densities), -(-self.weight.size // 64)) if masked else None
        if shape != (None if found.masks is None else found.masks.shape):
            raise ValueError("its masks are not this matrix's")
        return found

    def _cold(self, W: Tensor) -> Svd:
        """With no start to go by."""
        tolerance = self.settings.tolerance
        if self.settings.solver == "randomized":
            found = spectrum.decompose_randomized(W, self.k, tolerance, torch.Generator().manual_seed(0))
            if spectrum.within(found, self.k, tolerance):
                return found
        return principal.principal_triplets(W, self.k, tolerance, exact_up_to=0)

    def _principal_masks(self, svd: Svd) -> NDArray[np.uint64]:
        top = svd.top(self.k)
        scores = principal.principal_scores(top.U, top.S, top.Vh).float().cpu().numpy()
        sizes = np.array([cuts.mask_size(self.weight.size, alpha) for alpha in self.settings.densities], np.int64)
        levels = cuts.largest_levels(scores, *cuts.largest_cuts(scores, sizes))
        return np.stack([bits.pack(levels <= a) for a in range(len(sizes))])


class PairSpectrum:
    """The decompositions of a base and of a matrix tuned from it, and what follows from them.

    Args:
        base: shared between runs.
        tuned: (n, m), in its stored type.
        update_norm, base_norm: Frobenius norms of the update and of the base.
        gaussian_scale: σ of the Gaussian update of equal norm before storing.
        before_storing: (n, m), the tuned weights as they were before they were stored; None if that is not known.
    """

    def __init__(
        self,
        base: BaseSpectrum,
        tuned: Array,
        update_norm: float,
        base_norm: float,
        gaussian_scale: float,
        before_storing: Array | None = None,
    ) -> None:
        self.k = base.k
        self._given, self._tuned, self._before_storing = base, tuned, before_storing
        self._norm, self._base_norm, self._scale = update_norm, base_norm, gaussian_scale

    @property
    def values(self) -> Tensor:
        """The tuned matrix, on the device; not kept."""
        return to_tensor(self._tuned).to(self.base.device).to(self.base.dtype)

    @once
    def base(self) -> BaseSpectrum:
        """As given; in float64 where the update is too small for less."""
        given = self._given
        if given.exact or given.is_sharp or self._norm == 0:
            return given
        if self._is_larger_than(_LEAST_STEP * given.svd.S[0].item()):
            return given
        sharp: BaseSpectrum = given.sharp
        return sharp

    @property
    def update(self) -> Tensor:
        """ΔW; not kept."""
        given = self._given
        return to_tensor(self._tuned).to(given.device, given.dtype, copy=True).sub_(given.values)

    @once
    def update_spectrum(self) -> Tensor:
        """(r,), float64."""
        return spectrum.update_spectrum(self.update)

    @property
    def update_norm_2(self) -> float:
        return self.update_spectrum[0].item()

    def _is_larger_than(self, size: float) -> bool:
        """Whether the update's spectral norm is above a size, which its Frobenius norm tells of most."""
        if self._norm > size * math.sqrt(min(self._given.shape)):
            return True
        return self._norm > size and self.update_norm_2 > size

    @once
    def svd(self) -> Svd:
        """Of the tuned matrix; the base's own if nothing moved; solved whole where an approximation will not do."""
        base = self.base
        if self._norm == 0:
            return base.svd
        found = base.solve(self.values)
        if spectrum.within(found, self.k, base.settings.tolerance):
            return found
        return spectrum.decompose_by_gram(self.values.double(), self.k)

    @property
    def fell_back(self) -> bool:
        """Whether the solver of the settings missed the tolerance, and the matrix was solved whole."""
        return not self.base.exact and self.svd is not self.base.svd and self.svd.solver == "exact"

    @once
    def angles(self) -> tuple[Tensor, Tensor] | None:
        """Left and right principal angles of the top-k subspaces, degrees, (k,) each."""
        return self._angles_to(self.svd) if self.base.has_principal_subspace else None

    @property
    def angle_error_deg(self) -> float | None:
        """How far the measured angles may be off, from both sides' error bounds; None if both are LAPACK's."""
        errors = [svd.angle_error_deg(self.k) for svd in (self.base.svd, self.svd)]
        return None if all(error is None for error in errors) else min(sum(error or 0.0 for error in errors), 90.0)

    @once
    def energies(self) -> tuple[Number, ...]:
        """Shares of the update's energy in both principal subspaces, the left one, the right one."""
        return self._energies_of(self.update)

    @property
    def shift(self) -> float | None:
        """Of the top k singular values, over their norm."""
        return self._shift_to(self.svd)

    def angle_summary(self) -> tuple[Number, ...]:
        """As `ANGLES` has them; None if undefined, or within the error."""
        if not self.angles:
            return NOTHING_DRAWN.angles
        whole = {"left": self.base.shape[0] == self.k, "right": self.base.shape[1] == self.k}
        least = {side: 0.0 if self._norm == 0 or whole[side] else self._angle_floor_deg for side in whole}
        return tuple(
            angle if angle >= least[side] else None
            for (side, _), angle in zip(ANGLES, _summarized(self.angles), strict=True)
        )

    def spectral_shift(self) -> tuple[Number, ...]:
        """Shift of the top k; of all; per relative update norm; under every null, each with its spread."""
        shift = self.shift
        known = shift is not None and self._norm > 0 and self._base_norm > 0
        known = known and self._is_larger_than(sum(_floor(svd, self.base.shape) for svd in (self.base.svd, self.svd)))
        nulls = (value for mean, spread in self._nulls for value in (mean.spectral_shift, spread.spectral_shift))
        per_norm = shift * self._base_norm / self._norm if known and shift is not None else None
        return shift, self._full_shift(), per_norm, *nulls

    def singular_value_errors(self) -> tuple[Number, ...]:
        """The error bound of the tuned singular values, and that over the k-th of them; None for LAPACK's."""
        error, least = self.svd.singular_value_error, self.svd.S[self.k - 1].item()
        return error, None if error is None or least == 0 else error / least

    def update_ranks(self) -> tuple[Number, ...]:
        """Stable and effective rank of the update."""
        return spectrum.stable_rank(self.update_spectrum), spectrum.effective_rank(self.update_spectrum)

    def all_angles(self) -> tuple[Number, ...]:
        """As `ANGLES` has them: measured, and under every null, each with its spread."""
        return *self.angle_summary(), *(value for null in self._nulls for drawn in null for value in drawn.angles)

    def all_energies(self) -> tuple[Number, ...]:
        """For both subspaces, the left and the right one: measured, isotropic, enrichment, stored null, its spread."""
        (n, m), k = self.base.shape, self.k
        isotropic = (k * k / (n * m), k / n, k / m)
        _, (mean, spread), _ = self._nulls
        columns = zip(self.energies, isotropic, mean.energies, spread.energies, strict=True)
        return tuple(
            value
            for found, null, stored, deviation in columns
            for value in (found, null, None if found is None else found / null, stored, deviation)
        )

    def bounds(self) -> tuple[Number, ...]:
        """Tightness of Weyl's, Mirsky's, Ky Fan's and Wedin's bound; None within the error of either side."""
        if self._norm == 0:
            return (None,) * 4
        k, norm_2 = self.k, self.update_norm_2
        count = min(self.base.shape) if self.base.exact else k  # whatever solved the run, so that runs are comparable
        sides = (self.base.svd, self.svd)
        S0, S1 = (svd.S[:count].cpu() for svd in sides)
        of_top = sum(_floor(svd, self.base.shape) for svd in sides)
        of_all = sum(spectrum.whole_floor(svd, self.base.shape) for svd in sides) if count > k else of_top
        wedin = None
        if self.angles:
            angles = (self.angles[0].max().item(), self.angles[1].max().item())
            next_tuned = self.svd.S[k].item() if k < len(self.svd.S) else 0.0
            sine_error = math.sin(math.radians(min(self._angle_floor_deg, 90.0)))
            wedin = bounds.wedin_tightness(S0[k - 1].item(), next_tuned, norm_2, angles, sine_error, of_top)
        return (
            bounds.weyl_tightness(S0, S1, norm_2, of_all),
            bounds.mirsky_tightness(S0, S1, self._norm, of_all),
            bounds.ky_fan_tightness(S0, S1, k, norm_2, of_top),
            wedin,
        )

    @once
    def _nulls(self) -> tuple[tuple[Drawn, Drawn], ...]:
        """Mean and spread under isotropic updates; under stored ones, Gaussian and shuffled, where those are wanted."""
        wanted = self.base.settings.stored_null
        stored, shuffled = (self._stored(), self._shuffled()) if wanted else ([], [])
        return _mean_and_spread(self._isotropic()), _mean_and_spread(stored), _mean_and_spread(shuffled)

    def _isotropic(self) -> list[Drawn]:
        """Gaussian updates of the stored update's norm; their energies are known without drawing them."""
        base, norm = self.base, self._norm
        if norm == 0:
            return [self._still]
        if base.exact or base.svd.basis is None or self.fell_back:
            generator = base.generator("isotropic")
            draws = (gaussian.isotropic_update(base.shape, norm, generator, base.dtype) for _ in range(self._draws))
            return [self._drawn(update.to(base.device).add_(base.values), energies=False) for update in draws]
        rng = np.random.default_rng(base.seed("isotropic"))
        sigma = norm / math.sqrt(base.shape.numel())
        moves = (gaussian.moved_isotropically(base.svd.S, base.shape, self.k, sigma, rng) for _ in range(self._draws))
        return [self._in_own_coordinates(moved) for moved in moves]

    def _stored(self) -> list[Drawn]:
        """Gaussian updates of the length that the update had before storing, stored as the tuned weights are."""
        base, found = self.base, []
        if self._norm == 0:
            return [self._still]
        generator = base.generator("gaussian")
        length = self._scale * math.sqrt(base.shape.numel())
        dtype = to_tensor(self._tuned[:1, :1]).dtype
        for _ in range(self._draws):
            update = gaussian.isotropic_update(base.shape, length, generator, base.dtype).to(base.device)
            found.append(self._drawn(gaussian.store_(update.add_(base.values), dtype)))
        return found

    def _shuffled(self) -> list[Drawn]:
        """The run's own steps, dealt out to entries of which they know nothing, and stored as the tuned weights are."""
        base = self.base
        if self._before_storing is None:
            return []
        if self._norm == 0:
            return [self._still]
        generator, dtype = base.generator("shuffled"), to_tensor(self._tuned[:1, :1]).dtype
        steps = (to_tensor(self._before_storing).to(base.dtype) - base.values.cpu()).reshape(-1)
        found = []
        for _ in range(self._draws):
            order = torch.randperm(len(steps), generator=generator, dtype=torch.int32)
            update = steps[order].reshape(base.shape).to(base.device)
            found.append(self._drawn(gaussian.store_(update.add_(base.values), dtype), energies=False))
        return found

    @property
    def _draws(self) -> int:
        """Updates behind each null: a large matrix averages over itself."""
        wanted = self.base.settings.null_draws
        return max(1, min(wanted, wanted * _SMALL // self.base.shape.numel()))

    @property
    def _still(self) -> Drawn:
        """The figures of a zero update."""
        return self._drawn(self.base.values)

    def _drawn(self, W: Tensor, energies: bool = True) -> Drawn:
        """The figures of one drawn matrix compared with the base; W is overwritten unless it equals the base."""
        base = self.base
        still = torch.equal(W, base.values)
        moved = base.svd if still else self._solve_drawn(W)
        if not base.has_principal_subspace:
            return Drawn(self._shift_to(moved), NOTHING_DRAWN.angles, NOTHING_DRAWN.energies)
        found = self._energies_of(W.sub_(base.values)) if energies and not still else NOTHING_DRAWN.energies
        return Drawn(self._shift_to(moved), _summarized(self._angles_to(moved)), found)

    def _solve_drawn(self, W: Tensor) -> Svd:
        """Solve to the same order as the tuned matrix: exactly, if an approximation did not suffice for that."""
        if self.fell_back:
            return spectrum.decompose_by_gram(W.double(), self.k)
        return self.base.solve(W, measure_error=False)

    def _in_own_coordinates(self, moved: Svd) -> Drawn:
        """What one update shows whose sum with the base is known in coordinates along the base's singular vectors."""
        angles: tuple[Number, ...] = NOTHING_DRAWN.angles
        if self.base.has_principal_subspace:
            angles = _summarized(gaussian.angles_from_axes(moved, self.k))
        return Drawn(self._shift_to(moved), angles, NOTHING_DRAWN.energies)

    @property
    def _angle_floor_deg(self) -> float:
        """How far angles may be off, that of LAPACK included."""
        return sum(spectrum.angle_floor_deg(svd, self.k, self.base.shape) for svd in (self.base.svd, self.svd))

    def _shift_to(self, moved: Svd) -> float | None:
        """Over the top k, always, so that measured values, nulls and runs are compared over the same ones."""
        return spectrum.spectral_shift(self.base.svd.S[: self.k], moved.S[: self.k].to(self.base.svd.S))

    def _full_shift(self) -> float | None:
        if not len(self.base.svd.S) == len(self.svd.S) == min(self.base.shape):
            return None
        return spectrum.spectral_shift(self.base.svd.S, self.svd.S.to(self.base.svd.S))

    def _angles_to(self, moved: Svd) -> tuple[Tensor, Tensor]:
        base, k = self.base.svd, self.k
        if moved is base:
            zero = torch.zeros(k, dtype=torch.float64)
            return zero, zero
        left = subspace.principal_angles(base.U[:, :k], moved.U[:, :k].to(base.U))
        return left, subspace.principal_angles(base.Vh[:k].T, moved.Vh[:k].T.to(base.Vh))

    def _energies_of(self, update: Tensor) -> tuple[Number, ...]:
        if not self.base.has_principal_subspace:
            return NOTHING_DRAWN.energies
        top = self.base.svd.top(self.k)
        return subspace.principal_energies(top.U, top.Vh.T, update.to(top.U)) or NOTHING_DRAWN.energies


def chosen_device(wanted: str) -> torch.device:
    """The device that a setting names, ready for several threads.

    Raises:
        ArgumentError: there is no CUDA device.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ArgumentError("there is no CUDA device: omit --device, or install a build of torch that supports it")
    if not there or wanted == "cpu":
        return torch.device("cpu")
    _load_linear_algebra()
    return torch.device("cuda")


@functools.cache
def _load_linear_algebra() -> None:
    """Have torch load its solvers for GPUs, which it does on first use, and fails where two threads are the first."""
    torch.linalg.eigvalsh(torch.eye(1, device="cuda"))


def to_tensor(array: Array) -> Tensor:
    """A numpy array as a tensor of the same type, sharing its memory."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _floor(svd: Svd, shape: torch.Size) -> float:
    return spectrum.rounding_floor(svd, shape)


def _summarized(sides: Sequence[Tensor]) -> tuple[float, ...]:
    """Angles of either side, as `ANGLES` has them."""
    summaries: dict[str, Callable[[Tensor], Any]] = {
        "max": torch.max,
        "mean": torch.mean,
        "rms": subspace.rms_angle_deg,
    }
    by_side = dict(zip(("left", "right"), sides, strict=True))
    return tuple(float(summaries[which](by_side[side])) for side, which in ANGLES)


def _mean_and_spread(draws: Sequence[Drawn]) -> tuple[Drawn, Drawn]:
    """Means over draws, and their standard deviations; None of no draws."""
    if not draws:
        return NOTHING_DRAWN, NOTHING_DRAWN
    table = [[draw.spectral_shift, *draw.angles, *draw.energies] for draw in draws]
    known = [[value for value in column if value is not None] for column in zip(*table, strict=True)]
    whole = [len(column) == len(draws) for column in known]
    means = [statistics.fmean(column) if there else None for column, there in zip(known, whole, strict=True)]
    spreads = [
        statistics.stdev(column) if there and len(column) > 1 else None
        for column, there in zip(known, whole, strict=True)
    ]
    first, last = 1, 1 + len(ANGLES)
    mean, spread = (Drawn(row[0], tuple(row[first:last]), tuple(row[last:])) for row in (means, spreads))
    return mean, spread


def kept(found: BaseDecomposition) -> Kept:
    """A decomposition as named tensors and text, for keeping."""
    svd = found.svd.to(torch.device("cpu"))
    tensors = {"U": svd.U, "S": svd.S, "Vh": svd.Vh} | ({} if svd.basis is None else {"basis": svd.basis})
    if found.masks is not None:
        tensors["masks"] = torch.from_numpy(found.masks.view(np.int64))
    about = {"solver": svd.solver} | {name: repr(getattr(svd, name)) for name in _ERRORS}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def restored(content: Kept) -> BaseDecomposition:
    """The decomposition that `kept` took apart.

    Raises:
        KeyError, ValueError: it is something else.
    """
    tensors, about = content
    errors: Any = {name: None if about[name] == "None" else float(about[name]) for name in _ERRORS}
    svd = Svd(tensors["U"], tensors["S"], tensors["Vh"], about["solver"], **errors, basis=tensors.get("basis"))
    masks = tensors["masks"].numpy().view(np.uint64) if "masks" in tensors else None
    return BaseDecomposition(svd, masks)
