"""The polar factor: the nearest matrix with orthonormal columns, and how far a matrix is from one.

Knows nothing of files, models or optimizers.
"""

import torch
from torch import Tensor

_MOST_ROUNDS = 20
_WELL_CONDITIONED = 4.0  # largest over smallest eigenvalue of XᵀX up to which its inverse root loses no digit
_CONVERGES_BELOW = 1.0  # ‖XᵀX − I‖_F at which Newton–Schulz is sure to converge


def polar_factor(X: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to X in the Frobenius norm, by LAPACK in float64.

    Args:
        X: (n, r), n ≥ r, of full rank.

    Returns:
        (n, r), in the type of X: X (XᵀX)^(−1/2) where the columns are nearly orthonormal, and else U Vᵀ of the singular
        value decomposition, which is three times the work.

    Source: Fan and Hoffman 1955; Higham, Functions of Matrices, chapter 8.

    >>> polar_factor(torch.tensor([[2.0, 0.0], [0.0, -3.0]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    Y = X.double()
    values, vectors = torch.linalg.eigh(Y.T @ Y)
    if 0 < values[-1] <= _WELL_CONDITIONED * values[0]:
        found: Tensor = Y @ ((vectors / values.sqrt()) @ vectors.T)
    else:
        U, _, Vh = torch.linalg.svd(Y, full_matrices=False)
        found = U @ Vh
    return found.to(X.dtype)


def newton_schulz(X: Tensor) -> Tensor:
    """The polar factor of a matrix whose columns are nearly orthonormal, by products alone.

    X ← X (3I − XᵀX)/2 doubles the correct digits each round: in the type of X until they are all there, and once more
    in float64. A matrix too far from orthonormal for that is left to `polar_factor`.

    Args:
        X: (n, r), n ≥ r.

    Source: Björck and Bowie 1971; Higham, Functions of Matrices, chapter 8.

    >>> X = torch.eye(3, 2) + 0.01
    >>> torch.allclose(newton_schulz(X), polar_factor(X))
    True
    """
    defect = orthogonality_error(X)
    if not defect < _CONVERGES_BELOW:
        return polar_factor(X)
    enough = torch.finfo(X.dtype).eps ** 0.5
    for _ in range(_MOST_ROUNDS):
        if defect <= enough:
            break
        X = _round(X)
        defect = orthogonality_error(X)
    return _round(X.double()).to(X.dtype)


def orthogonality_error(X: Tensor) -> float:
    """‖XᵀX − I‖_F, in float64.

    >>> orthogonality_error(torch.eye(3, 2))
    0.0
    """
    gram = (X.T @ X).double()
    gram.diagonal().sub_(1)
    return float(torch.linalg.matrix_norm(gram))


def tangent(X: Tensor, G: Tensor) -> Tensor:
    """A gradient without what would only stretch the columns: its projection on the tangent space at X.

    Args:
        X: (n, r), orthonormal columns; G: (n, r).

    Returns:
        G − X sym(XᵀG).

    Source: Edelman, Arias and Smith 1998, the Stiefel manifold with the Euclidean metric.

    >>> X = torch.eye(2, 1)
    >>> tangent(X, torch.tensor([[3.0], [4.0]])).flatten()
    tensor([0., 4.])
    """
    product = X.T @ G
    return G - X @ ((product + product.T) / 2)


def _round(X: Tensor) -> Tensor:
    return 1.5 * X - 0.5 * X @ (X.T @ X)
