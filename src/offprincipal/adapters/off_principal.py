"""Factors orthogonal to the principal subspaces of the base: A = Ã(I − V Vᵀ), B = (I − U Uᵀ)B̃.

For any values of the trained Ã and B̃, Uᵀ(BA) and (BA)V are zero to rounding. The bases U (n, k) and V (m, k) of the
principal subspaces stay in float32 or float64 when the model is cast. Knows nothing of PEFT or models.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor

from offprincipal.adapters.factors import Factor
from offprincipal.adapters.initialisations import StartSettings
from offprincipal.errors import AdapterError
from offprincipal.geometry.principal import PrincipalSubspace, principal_rank

_ANGLE = math.degrees(1e-6)  # error bound of the subspaces; it leaves at most 1e-12 of the energy in the true ones


class ProjectedFactor(Factor):
    """A factor that is orthogonal to a subspace by construction.

    A state dict holds the effective factor, projected in float64 and stored in float32 (float64 if `trained` is
    float64). Rounding to float32 leaves about 1e-15 of its energy in the subspace; rounding to bfloat16 would leave
    about 1e-6 · k/m.

    Args:
        trained: Ã (r, m) or B̃ (n, r); types below float32 are projected in float32.
        basis: V (m, k) or U (n, k), orthonormal columns.
        side: `right` for A, whose rows are projected; `left` for B, whose columns are projected.

    >>> A = ProjectedFactor(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), "right")
    >>> A.weight
    tensor([[0., 4.]], grad_fn=<SubBackward0>)
    """

    basis: Tensor

    def __init__(self, trained: Tensor, basis: Tensor, side: str) -> None:
        super().__init__(trained)
        self.side = side
        self.register_buffer("basis", basis.to(_wide(trained)), persistent=False)

    def effective(self, trained: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(trained.device.type):
            return self._projected(trained.to(_wide(trained))).to(trained.dtype)
        with torch.autocast(trained.device.type, enabled=False):
            return self._projected(trained.to(_wide(trained))).to(trained.dtype)

    def another(self, start: Tensor) -> "ProjectedFactor":
        return ProjectedFactor(start.to(self.trained), self.basis, self.side)

    def stored(self) -> Tensor:
        trained = self.trained.detach()
        return self._projected(trained.double()).to(_wide(trained))

    def trained_of(self, effective: Tensor) -> Tensor:
        return effective

    def _projected(self, trained: Tensor) -> Tensor:
        basis = self.basis.to(trained.dtype)
        if self.side == "right":
            return trained - (trained @ basis) @ basis.T  # the backward pass is cheaper than that of addmm
        return trained - basis @ (basis.T @ trained)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the module as usual, but never lower the precision of the basis."""
        before = self.basis
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.basis.dtype.itemsize < before.dtype.itemsize:
            self.basis = before.to(self.basis.device)
        return self


def off_principal(W: Tensor, settings: StartSettings) -> tuple[Tensor, Tensor]:
    """The principal subspaces of a base matrix, to which the factors of its update are kept orthogonal.

    Args:
        W: (n, m), any float type, finite.
        settings: `rank_fraction` gives k = max(1, round(rank_fraction · min(n, m))); the rest is unused.

    Returns:
        U (n, k), V (m, k), float64, orthonormal columns.

    Raises:
        AdapterError: as in `principal_subspaces`.

    >>> settings = StartSettings(rank=1, scale=1.0, rank_fraction=0.5)
    >>> off_principal(torch.diag(torch.tensor([1.0, 3.0])), settings)[1].abs().flatten()
    tensor([0., 1.], dtype=torch.float64)
    """
    assert settings.rank_fraction is not None
    return principal_subspaces(W, principal_rank(W.shape, settings.rank_fraction))


def principal_subspaces(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top-k left and right singular subspaces of a matrix, float64.

    Args:
        W: (n, m), any float type, finite; k < min(n, m).

    Returns:
        U (n, k), V (m, k), orthonormal columns: LAPACK's, or with an error bound of 1e-6 radians.

    Raises:
        AdapterError: σ_k and σ_{k+1} are equal to rounding, so the subspaces are not defined.

    Source: the principal subspaces of arXiv 2511.08567; see `offprincipal.geometry.principal`.

    >>> U, V = principal_subspaces(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1)
    >>> V.abs().flatten()
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    subspace = PrincipalSubspace.of(W, k, angle_deg=_ANGLE)
    if subspace is None:
        raise AdapterError(
            f"singular values {k} and {k + 1} are equal to rounding, so no principal subspace of rank {k} is defined: "
            "choose another rank_fraction, or leave the matrix out of target_modules"
        )
    return subspace.U, subspace.V


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of computations: float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
