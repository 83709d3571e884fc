"""Overlaps of the leading singular subspaces of displacements with those of the last: whether they are found early.

Beside them two nulls that know nothing of direction but what the inner products tell: a random walk of the same steps,
and displacements with the run's own cosines. Knows nothing of files, models or layers.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.geometry.principal import has_principal_subspace, principal_triplets
from offprincipal.geometry.walks import increment_gram

Floats = NDArray[np.float64]
Subspaces = tuple[Tensor, Tensor]
_BINARY = 100
_LAPACK_UP_TO, _WHOLE_UP_TO = 64, 1024  # min(n, m): of a few directions, where each solver is the fastest
_ANGLE = 1.0  # degrees that an iterated subspace may be off; one that may be more is solved whole


def subspace_overlaps(
    displacement: Callable[[int], Tensor], G: Floats, k: int, generator: torch.Generator
) -> tuple[Floats, float]:
    """‖U_tᵀU_T‖²/k of the leading k left directions of D_t and D_T, the same of the right ones, and of both nulls.

    A null's pair of displacements is Gaussian, of one cosine at each t, with D_T's own lengths of rows and columns: for
    `random_walk` the cosine that independent steps of the measured lengths have on the average, for `own_cosines` that
    of D_t and D_T. So the second is what their direction alone says of their subspaces.

    Args:
        displacement: D_t, (n, m), float32, finite, for t = 0 … T − 1; G: (T, T), their inner products.
        generator: of the nulls, on the CPU.

    Returns:
        (3, 2, T): as measured, of `random_walk`, of `own_cosines`; left, right; NaN where k directions are not defined.
        And how far the approximated subspaces may be from the true ones, in degrees.

    >>> D = torch.zeros(3, 8, 6)
    >>> D[0, 0, 0], D[1, 1, 1], D[2, 1, 1] = 1.0, 1.0, 2.0
    >>> G = torch.einsum("snm,tnm->st", D, D).double().numpy()
    >>> found, error = subspace_overlaps(D.__getitem__, G, 1, torch.Generator().manual_seed(0))
    >>> found[0].tolist(), error
    ([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]], 0.0)
    """
    count = len(G)
    found = np.full((3, 2, count), np.nan)
    last = displacement(count - 1)
    reference, error = _leading(last, k)
    if reference is None:
        return found, error
    profile, (walk, own) = _profile(last), _cosines(G)
    start = torch.randn(last.shape, generator=generator).to(last)
    start_subspaces, angle = _leading(start * profile, k)
    error = max(error, angle)
    for t in range(count):
        subspaces, angle = (reference, 0.0) if t == count - 1 else _leading(displacement(t), k)
        error = max(error, angle)
        if subspaces is None:
            continue
        found[0, :, t] = _overlap(subspaces, reference)
        if start_subspaces is None:
            continue
        other = torch.randn(last.shape, generator=generator).to(last)
        for null, cosine in ((1, walk[t]), (2, own[t])):
            drawn = (float(cosine) * start + math.sqrt(max(1 - cosine**2, 0.0)) * other) * profile
            like, angle = (start_subspaces, 0.0) if cosine >= 1 else _leading(drawn, k)
            error = max(error, angle)
            if like is not None:
                found[null, :, t] = _overlap(like, start_subspaces)
    return found, error


def _leading(D: Tensor, k: int) -> tuple[Subspaces | None, float]:
    """The leading k directions of either side, None if they are not defined; and their error in degrees."""
    largest = float(D.abs().max()) if D.numel() else 0.0
    if k >= min(D.shape) or largest == 0:
        return None, 0.0
    exponent = min(max(-math.frexp(largest)[1], -_BINARY), _BINARY)  # a power of two rounds nothing
    svd = principal_triplets(
        D * 2.0**exponent, k, angle_deg=_ANGLE, exact_up_to=_LAPACK_UP_TO, whole_up_to=_WHOLE_UP_TO
    )
    if not has_principal_subspace(svd, k, D.shape):
        return None, 0.0
    return (svd.U[:, :k], svd.Vh[:k].T), svd.angle_error_deg(k) or 0.0


def _overlap(one: Subspaces, two: Subspaces) -> list[float]:
    k = one[0].shape[1]
    return [min(float((a.to(b.dtype).T @ b).square().sum()) / k, 1.0) for a, b in zip(one, two, strict=True)]


def _profile(D: Tensor) -> Tensor:
    """What an entry's size would be, (n, m), did only its row and its column decide it."""
    scaled = D / D.abs().max()
    return torch.outer(torch.linalg.vector_norm(scaled, dim=1), torch.linalg.vector_norm(scaled, dim=0))


def _cosines(G: Floats) -> tuple[Floats, Floats]:
    """Of every displacement and the last: in a random walk of the same steps, and as they are; 0 if there is none.

    >>> [cosines.tolist() for cosines in _cosines(np.outer([1.0, 2.0], [1.0, 2.0]))]
    [[0.7071067811865476, 1.0], [1.0, 1.0]]
    """
    reached = np.cumsum(np.clip(np.diag(increment_gram(G)), 0.0, None))
    squares = np.diag(G)
    lengths = np.sqrt(squares * squares[-1])
    own = np.divide(G[-1], lengths, out=np.zeros(len(G)), where=lengths > 0)
    return np.sqrt(reached / reached[-1]), np.clip(own, -1.0, 1.0)
