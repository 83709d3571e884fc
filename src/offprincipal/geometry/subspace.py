"""Subspaces: how far the principal singular subspaces turn, and how much of an update lies in them.

Knows nothing of files, models or layers.
"""

import torch
from torch import Tensor

from offprincipal.geometry.spectrum import gram


def principal_angles(basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Principal angles between two subspaces, from the smallest up.

    Below 45° the angle is the arcsine of the residual's singular value, above it the arccosine of the product's: either
    keeps all its digits where it is used.

    Args:
        basis_a, basis_b: (n, k), orthonormal columns; in float32 the residual's singular values come from its Gram
            matrix, whose rounding in float64 lies below that of the bases.

    Returns:
        float64, (k,), in degrees.

    Source: Björck and Golub, Numerical methods for computing angles between linear subspaces, 1973.

    >>> turned = torch.tensor([[0.5], [3**0.5 / 2]], dtype=torch.float64)
    >>> principal_angles(torch.tensor([[1.0], [0.0]]).double(), turned)
    tensor([60.0000], dtype=torch.float64)
    """
    product = basis_a.T @ basis_b  # (k, k)
    residual = basis_b - basis_a @ product
    if basis_b.dtype == torch.float32:
        sines = torch.linalg.eigvalsh(gram(residual, torch.float64)).clamp(0, 1).sqrt()
    else:
        sines = torch.linalg.svdvals(residual).clamp(max=1).flip(0)
    angles = torch.asin(sines)
    if sines.max() ** 2 >= 0.5:
        cosines = torch.linalg.svdvals(product.double()).clamp(max=1)
        angles = torch.where(cosines**2 > 0.5, angles, torch.acos(cosines))
    return torch.rad2deg(angles)


def rms_angle_deg(angles: Tensor) -> float:
    """arcsin(‖sin Θ‖_F/√k), in degrees: the steadiest summary of principal angles, every direction having its say.

    Args:
        angles: (k,), principal angles in degrees.

    Source: the chordal distance of subspaces, over its largest value; Björck and Golub 1973.

    >>> round(rms_angle_deg(torch.tensor([30.0, 30.0], dtype=torch.float64)), 6)
    30.0
    """
    sines = torch.sin(torch.deg2rad(angles.double()))
    return float(torch.rad2deg(torch.asin(sines.square().mean().sqrt().clamp(max=1))))


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
    total = _norm(update)
    if total == 0:
        return None
    left, right = U.T @ update, update @ V
    both, left_only, right_only = ((_norm(part) / total) ** 2 for part in (left @ V, left, right))
    return both, left_only, right_only


def _norm(x: Tensor) -> float:
    """The Frobenius norm of numbers of any scale, whose squares might be none."""
    plain = float(torch.linalg.vector_norm(x))
    if 1e-12 < plain < 1e12:
        return plain
    scale = x.abs().max()
    return float(scale * torch.linalg.vector_norm(x / scale)) if scale > 0 else 0.0
