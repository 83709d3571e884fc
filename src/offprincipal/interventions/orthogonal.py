"""Random orthogonal matrices: Haar, and Hadamard with random signs. Knows nothing of models."""

import math

import torch
from torch import Tensor

from offprincipal.errors import InterventionError

MATRICES = ("haar", "hadamard")


def random_orthogonal(n: int, matrix: str, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix of order n.

    Args:
        n: rows and columns.
        matrix: `haar` or `hadamard`.
        generator: advanced by the call.

    Returns:
        float64, (n, n).

    Raises:
        InterventionError: `hadamard`, and no Hadamard matrix of that order is constructed here.

    >>> Q = random_orthogonal(12, "hadamard", torch.Generator().manual_seed(0))
    >>> torch.allclose(Q @ Q.T, torch.eye(12, dtype=torch.float64))
    True
    """
    return haar(n, generator) if matrix == "haar" else randomized_hadamard(n, generator)


def haar(n: int, generator: torch.Generator) -> Tensor:
    """A draw from the uniform distribution over the orthogonal group; float64, (n, n).

    It is Q of the QR decomposition of a Gaussian matrix, with signs that make R's diagonal positive; without these
    signs the distribution is not uniform.

    Source: Mezzadri, How to generate random matrices from the classical compact groups, 2007.
    """
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    signs: Tensor = torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
    return torch.mul(Q, signs)


def randomized_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """H·diag(s)/√n with random signs s, where H is a Hadamard matrix; float64, (n, n).

    Every entry is ±1/√n, so each coordinate is spread evenly over all coordinates.

    Raises:
        InterventionError: no Hadamard matrix of that order is constructed here.
    """
    signs = torch.randint(2, (n,), generator=generator).double() * 2 - 1
    return hadamard(n) * signs / math.sqrt(n)


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix: entries ±1, orthogonal rows; float64, (n, n).

    It is built by Paley's constructions over prime fields and by Sylvester's doubling. They cover powers of two, and
    orders such as 12, 20, 28, 96, 192, 896, 1536, 2560.

    Raises:
        InterventionError: they do not give this order; above 2, no Hadamard matrix exists unless 4 divides n.

    >>> hadamard(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    H = _sylvester_or_paley(n)
    if H is None:
        raise InterventionError(
            f"no Hadamard matrix of order {n} is constructed here (a power of two times 1, or p + 1 or 2(p + 1) for "
            "certain primes p): choose the matrix haar"
        )
    return H


def _sylvester_or_paley(n: int) -> Tensor | None:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n < 1 or (n > 2 and n % 4):
        return None
    if n & (n - 1) and (paley := _paley(n)) is not None:
        return paley
    half = _sylvester_or_paley(n // 2) if n % 2 == 0 else None
    return None if half is None else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)


def _paley(n: int) -> Tensor | None:
    """Paley's first construction for n = p + 1, p ≡ 3 mod 4, or the second for n = 2(p + 1), p ≡ 1 mod 4."""
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, -1.0)
    p = n // 2 - 1
    if n % 2 == 0 and _is_prime(p) and p % 4 == 1:
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(p, 1.0), off) + torch.kron(torch.eye(p + 1, dtype=torch.float64), on)
    return None


def _bordered(p: int, below: float) -> Tensor:
    """Paley's Jacobsthal matrix of order p with a border: ones above, `below` on the left, zero in the corner."""
    symbol = torch.full((p,), -1.0, dtype=torch.float64)
    symbol[torch.arange(p) ** 2 % p] = 1.0
    symbol[0] = 0.0
    S = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0] = 1.0, below
    index = torch.arange(p)
    S[1:, 1:] = symbol[(index[:, None] - index) % p]
    return S


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % divisor for divisor in range(2, math.isqrt(p) + 1))
