"""The principal subspace of a matrix: how it is found, how well it is known, and the weights that it singles out.

Tables, masks, gates, adapters and the monitor all find it here, so that they speak of the same one. Knows nothing of
files, models or layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from offprincipal.defaults import EXACT_UP_TO as EXACT_UP_TO  # as this module's own, too
from offprincipal.defaults import TOLERANCE
from offprincipal.geometry.masks import entry_ranks
from offprincipal.geometry.spectrum import (
    Svd,
    decompose,
    decompose_by_gram,
    decompose_randomized,
    rounding_floor,
    within,
)

WHOLE_UP_TO = 6144  # min(n, m) up to which the whole symmetric eigenproblem is solved rather than iterated


@dataclass(frozen=True)
class PrincipalSubspace:
    """The first singular triplets of a matrix, where the next singular value stands clear of them.

    Args:
        U: (n, k), V: (m, k), orthonormal columns; S: (k,), float64.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @classmethod
    def of(cls, W: Tensor, k: int, tolerance: float = TOLERANCE, angle_deg: float = 90.0) -> Self | None:
        """That of a matrix (n, m), worked out in float64; None if it is not defined.

        Args:
            tolerance, angle_deg: as `principal_triplets` takes them.

        >>> PrincipalSubspace.of(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1).V.abs().flatten()
        tensor([0., 1., 0.], dtype=torch.float64)
        >>> PrincipalSubspace.of(torch.eye(3), 1) is None
        True
        """
        svd = principal_triplets(W.double(), k, tolerance, angle_deg)
        if not has_principal_subspace(svd, k, W.shape):
            return None
        return cls(svd.U[:, :k].contiguous(), svd.S[:k], svd.Vh[:k].T.contiguous())

    def scores(self) -> Tensor:
        """|U S Vᵀ|, (n, m): the larger, the more principal is a weight."""
        return principal_scores(self.U, self.S, self.V.T)


def principal_rank(shape: Sequence[int], rank_fraction: float) -> int:
    """k = max(1, round(rank_fraction · min(n, m))), the rank of the principal subspace.

    >>> principal_rank((64, 192), 0.125)
    8
    """
    return max(1, round(rank_fraction * min(shape)))


def principal_triplets(
    W: Tensor,
    k: int,
    tolerance: float = TOLERANCE,
    angle_deg: float = 90.0,
    exact_up_to: int | None = None,
    whole_up_to: int | None = None,
) -> Svd:
    """The first k singular triplets, and a few more, by the cheapest solver whose error bound is good enough.

    LAPACK up to `exact_up_to`, by default `EXACT_UP_TO`; above, the symmetric eigenproblem of the Gram matrix; above
    `whole_up_to`, by default `WHOLE_UP_TO`, first iterated from a random start, the same for every matrix, so that
    equal ones are decomposed alike. In float64, what misses its bounds goes to LAPACK; in float32 it is returned, and
    says so.

    Args:
        W: (n, m), float32 or float64, finite.
        tolerance: on the singular values, relative; angle_deg: on the subspaces of rank k, degrees.

    >>> principal_triplets(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).S[:2]
    tensor([3., 2.], dtype=torch.float64)
    """

    def good(found: Svd) -> bool:
        return within(found, k, tolerance) and (found.angle_error_deg(k) or 0.0) <= angle_deg

    if min(W.shape) <= (EXACT_UP_TO if exact_up_to is None else exact_up_to) or k + 1 >= min(W.shape):
        return decompose(W)
    if min(W.shape) > (WHOLE_UP_TO if whole_up_to is None else whole_up_to):
        found = decompose_randomized(W, k, tolerance, torch.Generator().manual_seed(0))
        if good(found):
            return found
    found = decompose_by_gram(W, k)
    return found if good(found) or W.dtype != torch.float64 else decompose(W)


def has_principal_subspace(svd: Svd, k: int, shape: torch.Size) -> bool:
    """Whether the top-k subspaces are defined: σ_k stands clear of zero and of σ_{k+1}.

    >>> svd = decompose(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    >>> has_principal_subspace(svd, 1, torch.Size([3, 3])), has_principal_subspace(svd, 2, torch.Size([3, 3]))
    (True, False)
    """
    next_value = svd.S[k].item() if k < len(svd.S) else 0.0
    return svd.S[k - 1].item() - next_value > rounding_floor(svd, shape)


def principal_scores(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """|U S Vh|, (n, m), of the top-k singular triplets: the larger, the more principal is a weight.

    Args:
        U: (n, k), S: (k,), Vh: (k, m).

    Source: principal weights, LIFT (arXiv 2506.00772), as used by arXiv 2511.08567.
    """
    return ((U * S.to(U)) @ Vh).abs_()


def principal_ranks(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Ranks of the principal mask: the entries of the largest scores come first; int64, (n, m).

    >>> U, S, Vh = torch.linalg.svd(torch.diag(torch.tensor([3.0, 1.0])))
    >>> principal_ranks(U[:, :1], S[:1], Vh[:1]) < 1
    tensor([[ True, False],
            [False, False]])
    """
    return entry_ranks(principal_scores(U, S, Vh))
