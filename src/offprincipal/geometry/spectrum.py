"""Spectrum: singular values and vectors of one matrix, and how an update shifts them.

Knows nothing of files, models or layers. Today's only solver is `exact`, LAPACK in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offprincipal.errors import NonFiniteTensor

SOLVER = "exact"


@dataclass(frozen=True)
class Svd:
    """W = U diag(S) Vh, thin: U (n, r), S (r,) from the largest down, Vh (r, m); float64."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def top(self, k: int) -> "Svd":
        """The first k triplets.

        >>> decompose(torch.eye(3)).top(2).S
        tensor([1., 1.], dtype=torch.float64)
        """
        return Svd(self.U[:, :k], self.S[:k], self.Vh[:k])


def decompose(W: Tensor) -> Svd:
    """Singular value decomposition by LAPACK in float64.

    Args:
        W: (n, m), any float type, finite, of any scale: it is decomposed after division by its largest entry.

    Raises:
        NonFiniteTensor: LAPACK did not converge.

    >>> decompose(torch.diag(torch.tensor([1.0, 2.0]))).S
    tensor([2., 1.], dtype=torch.float64)
    """
    W = W.double()
    scale = W.abs().max()
    if scale == 0:
        scale = torch.ones_like(scale)
    try:
        U, S, Vh = torch.linalg.svd(W / scale, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteTensor(f"its singular value decomposition did not converge: {error}") from error
    return Svd(U, S * scale, Vh)


def rounding_floor(S: Tensor, shape: torch.Size) -> float:
    """Below this a singular value, or a difference of two, is rounding of the decomposition: ε · max(n, m) · σ_1.

    >>> rounding_floor(torch.tensor([2.0]), torch.Size([4, 8])) < 1e-14
    True
    """
    return torch.finfo(torch.float64).eps * max(shape) * S[0].item()


def has_principal_subspace(S: Tensor, k: int, shape: torch.Size) -> bool:
    """Whether the top-k subspaces are defined: σ_k stands clear of zero and of σ_{k+1}.

    >>> S = torch.tensor([2.0, 1.0, 1.0])
    >>> has_principal_subspace(S, 1, torch.Size([3, 3])), has_principal_subspace(S, 2, torch.Size([3, 3]))
    (True, False)
    """
    floor = rounding_floor(S, shape)
    next_value = S[k].item() if k < len(S) else 0.0
    return S[k - 1].item() - next_value > floor


def principal_rank(shape: torch.Size, rank_fraction: float) -> int:
    """k = max(1, round(rank_fraction · min(n, m))), the rank of the principal subspace.

    >>> principal_rank(torch.Size([64, 192]), 0.125)
    8
    """
    return max(1, round(rank_fraction * min(shape)))


def spectral_shift(S_base: Tensor, S_tuned: Tensor) -> float | None:
    """‖σ(W1) − σ(W0)‖₂ / ‖σ(W0)‖₂; None where the base is zero.

    Args:
        S_base, S_tuned: (r,), both from the largest down.

    Source: the normalized spectral shift (NSS) of arXiv 2511.08567.

    >>> spectral_shift(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.1
    """
    size = torch.linalg.vector_norm(S_base).item()
    return torch.linalg.vector_norm(S_tuned - S_base).item() / size if size > 0 else None


def stable_rank(S: Tensor) -> float | None:
    """‖A‖_F² / ‖A‖₂² from the singular values of A; None for a zero matrix.

    Args:
        S: (r,), from the largest down.

    >>> stable_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    if S.numel() == 0 or S[0] == 0:
        return None
    return ((S / S[0]) ** 2).sum().item()


def effective_rank(S: Tensor) -> float | None:
    """exp(entropy(σ_i/Σσ)) from the singular values of A; None for a zero matrix.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
    2.0
    """
    total = S.sum().item()
    if total == 0:
        return None
    return math.exp(torch.special.entr(S.double() / total).sum().item())
