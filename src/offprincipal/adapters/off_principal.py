"""Factors that cannot touch the principal subspaces of the base: A = Ã(I − V Vᵀ), B = (I − U Uᵀ)B̃.

Whatever an optimizer does to Ã and B̃, Uᵀ(BA) and (BA)V are zero to rounding. The projectors are kept as thin factors U
(n, k) and V (m, k), in float32 or better whatever the model is cast to. Knows nothing of PEFT or models.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor

from offprincipal.adapters.factors import Factor
from offprincipal.adapters.initialisations import StartSettings
from offprincipal.errors import AdapterError
from offprincipal.geometry.principal import PrincipalSubspace, principal_rank

_ANGLE = math.degrees(1e-6)  # bound on the error of the subspaces, which leaves an energy of 1e-12 in them


class ProjectedFactor(Factor):
    """A factor orthogonal to a subspace, by construction.

    Args:
        trained: Ã (r, m) or B̃ (n, r); float64 or float32, or what is projected in float32.
        basis: V (m, k) or U (n, k), orthonormal columns.
        side: `right` for A, whose rows are projected; `left` for B, whose columns are.

    A state dict holds what acts, projected in float64 and stored in float32 or better: rounding to float32 leaves about
    1e-15 of its energy in the subspace, rounding to bfloat16 about 1e-6 · k/m.

    >>> A = ProjectedFactor(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), "right")
    >>> A.weight
    tensor([[0., 4.]], grad_fn=<SubBackward0>)
    """

    basis: Tensor

    def __init__(self, trained: Tensor, basis: Tensor, side: str) -> None:
        super().__init__(trained)
        self.side = side
        self.register_buffer("basis", basis.to(_wide(trained)), persistent=False)

    def acting(self, trained: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(trained.device.type):
            return self._projected(trained.to(_wide(trained))).to(trained.dtype)
        with torch.autocast(trained.device.type, enabled=False):
            return self._projected(trained.to(_wide(trained))).to(trained.dtype)

    def anew(self, start: Tensor) -> "ProjectedFactor":
        return ProjectedFactor(start.to(self.trained), self.basis, self.side)

    def stored(self) -> Tensor:
        trained = self.trained.detach()
        return self._projected(trained.double()).to(_wide(trained))

    def trained_of(self, acting: Tensor) -> Tensor:
        return acting

    def _projected(self, trained: Tensor) -> Tensor:
        basis = self.basis.to(trained.dtype)
        if self.side == "right":
            return trained - (trained @ basis) @ basis.T  # its backward pass costs less than addmm's
        return trained - basis @ (basis.T @ trained)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As any module is moved or cast, but the basis keeps its precision."""
        before = self.basis
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.basis.dtype.itemsize < before.dtype.itemsize:
            self.basis = before.to(self.basis.device)
        return self


def off_principal(W: Tensor, settings: StartSettings) -> tuple[Tensor, Tensor]:
    """The principal subspaces of a base matrix, which the factors of its update are kept out of."""
    assert settings.rank_fraction is not None
    return principal_subspaces(W, principal_rank(W.shape, settings.rank_fraction))


def principal_subspaces(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top-k left and right singular subspaces of a matrix, float64.

    Args:
        W: (n, m), any float type, finite; k < min(n, m).

    Returns:
        U (n, k), V (m, k), orthonormal columns: LAPACK's, or with an error bound of 1e-6 radians.

    Raises:
        AdapterError: σ_k and σ_{k+1} are equal to rounding, so there is no such subspace.

    >>> U, V = principal_subspaces(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1)
    >>> V.abs().flatten()
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    found = PrincipalSubspace.of(W, k, angle_deg=_ANGLE)
    if found is None:
        raise AdapterError(
            f"singular values {k} and {k + 1} are equal to rounding, so no principal subspace of rank {k} is defined: "
            "choose another rank_fraction, or leave the matrix out of target_modules"
        )
    return found.U, found.V


def _wide(x: Tensor) -> torch.dtype:
    """float64 stays float64; anything else is worked on in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
