"""Gaussian updates: length without direction, as drawn, as it would be stored, and what it does to a spectrum.

Knows nothing of files, models or layers.
"""

import numpy as np
import torch
from torch import Tensor

from offprincipal.geometry.spectrum import Svd, block_size, first_order_steps, gram, roots
from offprincipal.geometry.subspace import principal_angles


def isotropic_update(
    shape: torch.Size, norm: float, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A Gaussian update of a given Frobenius norm: length without direction.

    Args:
        shape: of the result; norm: its Frobenius norm; generator: its randomness, on the CPU.

    Returns:
        (n, m), of `dtype`, on the CPU.

    >>> update = isotropic_update(torch.Size([3, 4]), 2.0, torch.Generator().manual_seed(0))
    >>> round(update.norm().item(), 12)
    2.0
    """
    noise = torch.randn(shape, generator=generator, dtype=dtype)
    return noise.mul_(norm / noise.norm())


def store_(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Round weights, in place, to what is left of them once they are stored in a type.

    >>> store_(torch.tensor([1.001, 1.01]), torch.bfloat16)
    tensor([1.0000, 1.0078])
    """
    return weights.copy_(weights.to(dtype))


def moved_isotropically(S: Tensor, shape: torch.Size, k: int, sigma: float, rng: np.random.Generator) -> Svd:
    """What a Gaussian update does to a matrix of known singular values, without drawing the update.

    A Gaussian matrix looks the same in every orthonormal basis, so in that of the base's own singular vectors the base
    is diag(S) and the update is Gaussian still. The warm solver (`decompose_warm`) looks at it in few directions only;
    what it sees there is drawn from its exact law, one product after the other given those before, and the rest never.

    Args:
        S: (r,), all singular values of the base, from the largest down.
        shape: (n, m) of the base; k: triplets that matter.
        sigma: standard deviation of each entry of the update.

    Returns:
        The first k triplets of the sum, float64, on the device of `S`, in coordinates along the base's singular
        vectors: the long side has r of them and then some along directions that the base does not reach.

    Source: ours; invariance of the Gaussian under rotation, Bartlett's decomposition for what lies beyond the base.

    >>> S = torch.linspace(2.0, 1.0, 40, dtype=torch.float64)
    >>> moved = moved_isotropically(S, torch.Size([90, 40]), 4, 1e-9, np.random.default_rng(0))
    >>> torch.allclose(moved.S[:4], S[:4]), torch.allclose(moved.Vh[:4, :4].abs(), torch.eye(4).double(), atol=1e-6)
    (True, True)
    """
    S = S.double()
    r, b = len(S), block_size(k, len(S))

    def noise(rows: int, columns: int, dtype: type = np.float64) -> Tensor:
        return torch.from_numpy(rng.standard_normal((rows, columns), dtype)).to(S.device)

    def beyond(dimensions: int, columns: int) -> Tensor:
        return sigma * torch.from_numpy(_triangular(dimensions, columns, rng)).to(S.device)

    outside = max(shape) - r
    first = beyond(outside, b)  # (t, b), the update's first b columns outside the base's column space
    Y = torch.cat([torch.diag(S)[:, :b] + sigma * noise(r, b), first])  # (r + t, b), A V_b
    ritz, Q = roots(gram(Y, torch.float64))
    image = Y @ Q
    U = image / ritz.clamp(min=torch.finfo(torch.float64).tiny)

    H = noise(r - b, b)  # the update's other columns, along U, over sigma
    steps = first_order_steps(S[b:, None] * U[b:r] + sigma * H, ritz, S[b:])  # (r − b, b)
    taken = gram(steps, torch.float64)
    lengths, along = roots(taken)
    spread = (along * lengths)[:, : len(steps)].T  # (q, b), so that spreadᵀ spread is stepsᵀ steps
    # The other columns taken `steps` far, but for their part along U: of second order, so that float32 will do.
    near = U.float()
    Z = noise(len(U), len(spread), np.float32) @ spread.float()
    second = near @ ((H.T @ steps).float() - near.T @ Z) + Z
    moved = image + sigma * second
    moved[b:r] += S[b:, None] * steps
    moved = torch.cat([moved, beyond(outside - len(first), len(spread)) @ spread])
    corrected = torch.cat([Q, steps])  # (r, b), of which `moved` is the product
    upper = torch.linalg.cholesky(torch.eye(b, dtype=S.dtype, device=S.device) + taken).T  # of correctedᵀ corrected
    half = torch.linalg.solve_triangular(upper, gram(moved, torch.float64), upper=True, left=False)
    values, Q = roots(torch.linalg.solve_triangular(upper.T, half, upper=False))
    turn = torch.linalg.solve_triangular(upper, Q[:, :k], upper=True)
    U = (moved @ turn) / values[:k].clamp(min=torch.finfo(torch.float64).tiny)
    return Svd(*_by_side(shape, U, values[:k], corrected @ turn), "warm")


def angles_from_axes(moved: Svd, k: int) -> tuple[Tensor, Tensor]:
    """Left and right principal angles between the base's top-k subspaces and those of `moved_isotropically`.

    Returns:
        float64, (k,) each, in degrees.

    >>> S = torch.linspace(2.0, 1.0, 40, dtype=torch.float64)
    >>> moved = moved_isotropically(S, torch.Size([90, 40]), 4, 1e-6, np.random.default_rng(0))
    >>> left, right = angles_from_axes(moved, 4)
    >>> len(left), bool(0 < right.max() < 0.01)
    (4, True)
    """
    left, right = (
        principal_angles(torch.eye(len(side), k, device=side.device), side[:, :k])
        for side in (moved.U.float(), moved.Vh.T.float())
    )
    return left, right


def _by_side(shape: torch.Size, long: Tensor, S: Tensor, short: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (long, S, short.T) if shape[0] >= shape[1] else (short, S, long.T)


def _triangular(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """A standard Gaussian matrix (rows, columns), turned so that all below row `columns` is zero, and cut there.

    Source: Bartlett's decomposition.
    """
    height = min(rows, columns)
    R = np.triu(rng.standard_normal((height, columns)), 1)
    R[np.diag_indices(height)] = np.sqrt(rng.chisquare(rows - np.arange(height)))
    return R
