"""Subspaces: how far the principal singular subspaces turn, and how much of an update lies in them.

Knows nothing of files, models or layers.
"""

import torch
from torch import Tensor


def principal_angles(basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Principal angles between two subspaces, from the smallest up.

    Below 45° the angle is the arcsine of the residual's singular value, above it the arccosine of the product's: either
    keeps all its digits where it is used.

    Args:
        basis_a, basis_b: (n, k), orthonormal columns.

    Returns:
        float64, (k,), in degrees.

    Source: Björck and Golub, Numerical methods for computing angles between linear subspaces, 1973.

    >>> turned = torch.tensor([[0.5], [3**0.5 / 2]], dtype=torch.float64)
    >>> principal_angles(torch.tensor([[1.0], [0.0]]).double(), turned)
    tensor([60.0000], dtype=torch.float64)
    """
    product = basis_a.T @ basis_b  # (k, k)
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    sines = torch.linalg.svdvals(basis_b - basis_a @ product).clamp(max=1).flip(0)
    sines = torch.nn.functional.pad(sines, (max(len(cosines) - len(sines), 0), 0))  # 2k > n: the angles left out are 0
    return torch.rad2deg(torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines)))


def principal_energies(U: Tensor, V: Tensor, update: Tensor) -> tuple[float, float, float] | None:
    """Shares of the update's energy in the principal subspaces; None for a zero update.

    Args:
        U: (n, k), V: (m, k), orthonormal columns; update: (n, m).

    Returns:
        ‖UᵀΔV‖²/‖Δ‖², ‖UᵀΔ‖²/‖Δ‖², ‖ΔV‖²/‖Δ‖². An isotropic update puts k²/(nm), k/n and k/m there.

    >>> e = torch.eye(2).double()
    >>> principal_energies(e[:, :1], e[:, :1], torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double())
    (0.36, 1.0, 0.36)
    """
    scale = update.abs().max()
    if scale == 0:
        return None
    update = update / scale
    total = update.square().sum()
    left, right = U.T @ update, update @ V
    return tuple((part.square().sum() / total).item() for part in (left @ V, left, right))  # type: ignore[return-value]
