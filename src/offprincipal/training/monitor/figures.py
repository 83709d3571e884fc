"""What one matrix shows against its base while it is trained, each figure beside its null.

Tensors in, a row of named numbers out. The base is decomposed once; each later look starts from that. Knows nothing of
models, steps or files.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offprincipal.geometry import gaussian, nulls, precision, principal, scan, spectrum, subspace
from offprincipal.geometry.spectrum import Svd

_IN_FLOAT64_UP_TO = 1024  # min(n, m) up to which a matrix is worked on in float64
_REHEARSED_STEP = 1e-3
_DRAWS = 4  # Gaussian updates behind a null
_MASTERS = (torch.float32, torch.float64)

Row = dict[str, Any]


class BaseMatrix:
    """One matrix before training, decomposed.

    Args:
        name: of the matrix; it fixes the Gaussian update of the nulls.
        weight: (n, m), in the type that it is trained in, finite; kept, and not to be changed.
        rank_fraction: rank of the principal subspace over min(n, m).

    Raises:
        NonFiniteTensor: the matrix holds NaN or infinity.
    """

    def __init__(self, name: str, weight: Tensor, rank_fraction: float) -> None:
        precision.to_bf16(weight)  # refuses what is not finite
        self.name = name
        self.weight = weight
        self.k = principal.principal_rank(weight.shape, rank_fraction)
        small = min(weight.shape) <= _IN_FLOAT64_UP_TO or weight.dtype == torch.float64
        self.values = weight.to(torch.float64 if small else torch.float32)
        self.svd = principal.principal_triplets(self.values, self.k, exact_up_to=0)  # whole: later looks start from it
        self.norm = _norm(self.values)
        self.has_principal_subspace = principal.has_principal_subspace(self.svd, self.k, weight.shape)
        stored = weight.float().cpu().numpy()
        codes = scan.bf16_codes(stored)
        self._entries = scan.count_codes(codes)
        self._off_grid = None if scan.on_bf16_grid(stored) else (codes, stored)

    def figures(self, weight: Tensor) -> Row:
        """Every figure of the matrix as it is now; None where one is undefined, none at all where it is not finite.

        Args:
            weight: (n, m), in the type of the base.
        """
        if not bool(torch.isfinite(weight.to(torch.bfloat16)).all()):
            return {}
        update = weight.to(self.values) - self.values
        norm = _norm(update)
        row: Row = {
            "k": self.k,
            "base_norm": self.norm,
            "update_norm": norm,
            "relative_update_norm": norm / self.norm if self.norm > 0 else None,
        }
        row |= self._location(weight, norm)
        return row | self._spectral(update, norm)

    def rehearse(self) -> None:
        """Measure a small random update, so that what is compiled or loaded on first use is, and its time is known."""
        noise = gaussian.isotropic_update(self.weight.shape, _REHEARSED_STEP * self.norm, self._generator())
        self.figures((self.values + noise.to(self.values)).to(self.weight.dtype))

    def _location(self, weight: Tensor, norm: float) -> Row:
        """What changed in bfloat16, what moved without showing, and what a Gaussian update would leave unchanged."""
        changed = precision.changed(self.weight, weight)
        hidden = None
        if weight.dtype in _MASTERS:
            hidden = int(((self.weight != weight) & ~changed).sum()) / weight.numel()
        return {
            "unchanged_fraction": 1 - int(changed.sum()) / weight.numel(),
            "unchanged_fraction_isotropic_null": self._unchanged_isotropic(norm, weight.dtype),
            "hidden_fraction": hidden,
        }

    def _unchanged_isotropic(self, norm: float, dtype: torch.dtype) -> float | None:
        sigma = norm / math.sqrt(self.weight.numel())
        if dtype == torch.bfloat16:
            sigma = nulls.gaussian_scale(scan.count_by_class(self._entries), norm)
        if self._off_grid is None or sigma == 0:
            return nulls.unchanged_isotropic(self._entries, sigma)
        return nulls.unchanged_isotropic_off_grid(*self._off_grid, sigma) / self.weight.numel()

    def _spectral(self, update: Tensor, norm: float) -> Row:
        """Shift, angles and energies, those of a Gaussian update of equal norm, and the certificate."""
        moved = self._solve(self.values + update) if norm > 0 else self.svd
        drawn = self._under_gaussian_updates(norm)
        shift = self._shift(moved)
        seen = norm > math.sqrt(self.k) * spectrum.rounding_floor(moved, update.shape)
        row: Row = {
            "solver": moved.solver,
            "spectral_shift": shift,
            "spectral_shift_rank": self.k,
            "spectral_shift_per_norm": shift * self.norm / norm if seen and shift is not None else None,
            "spectral_shift_isotropic_null": _mean([null["spectral_shift"] for null in drawn]),
            "singular_value_error": moved.singular_value_error,
            "angle_error_deg": moved.angle_error_deg(self.k),
        }
        if not self.has_principal_subspace:
            return row
        angles = self._angles(moved)
        nulls_of = {f"{name}_isotropic_null": _mean([null[name] for null in drawn]) for name in angles}
        return row | angles | nulls_of | self._energies(update)

    def _under_gaussian_updates(self, norm: float) -> list[Row]:
        """Shift and angles under Gaussian updates of this norm, the same draws at every look."""
        if norm == 0:
            return [self._moved(self.svd)]
        if self.svd.basis is None:
            update = gaussian.isotropic_update(self.weight.shape, norm, self._generator(), self.values.dtype)
            tuned = self.values + update.to(self.values.device)
            return [self._moved(spectrum.decompose_warm(tuned, self.svd, self.k, principal.TOLERANCE, certify=False))]
        rng, sigma = np.random.default_rng(self._seed), norm / math.sqrt(self.weight.numel())
        found = []
        for _ in range(_DRAWS):
            moved = gaussian.moved_isotropically(self.svd.S, self.weight.shape, self.k, sigma, rng)
            angles = _named(*gaussian.angles_from_axes(moved, self.k))
            found.append({"spectral_shift": self._shift(moved)} | angles)
        return found

    def _moved(self, moved: Svd) -> Row:
        return {"spectral_shift": self._shift(moved)} | self._angles(moved)

    def _shift(self, moved: Svd) -> float | None:
        return spectrum.spectral_shift(self.svd.S[: self.k], moved.S[: self.k].to(self.svd.S))

    def _angles(self, moved: Svd) -> Row:
        k, base = self.k, self.svd
        left = subspace.principal_angles(base.U[:, :k], moved.U[:, :k].to(base.U))
        right = subspace.principal_angles(base.Vh[:k].T, moved.Vh[:k].T.to(base.Vh))
        return _named(left, right)

    def _energies(self, update: Tensor) -> Row:
        (n, m), k = update.shape, self.k
        top = self.svd.top(k)
        found = subspace.principal_energies(top.U, top.Vh.T, update) or (None, None, None)
        row: Row = {}
        for side, energy, isotropic in zip(
            ("", "_left", "_right"), found, (k * k / (n * m), k / n, k / m), strict=True
        ):
            row[f"principal_energy{side}"] = energy
            row[f"principal_energy{side}_isotropic"] = isotropic
            row[f"principal_energy{side}_enrichment"] = None if energy is None else energy / isotropic
        return row

    def _solve(self, W: Tensor) -> Svd:
        """From the base's triplets; where the first correction misses the tolerance, iterated from there."""
        found = spectrum.decompose_warm(W, self.svd, self.k, principal.TOLERANCE)
        if spectrum.within(found, self.k, principal.TOLERANCE):
            return found
        return spectrum.decompose_warm(W, replace(self.svd, basis=None), self.k, principal.TOLERANCE)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)

    @property
    def _seed(self) -> int:
        """The same Gaussian directions for a matrix, whatever was looked at before."""
        digest = hashlib.blake2b(f"{self.name}/gaussian".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _named(left: Tensor, right: Tensor) -> Row:
    return {
        f"principal_angle_{side}_{which}_deg": value.item()
        for side, found in (("left", left), ("right", right))
        for which, value in (("max", found.max()), ("mean", found.mean()))
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
