"""Spectrum: singular values and vectors of one matrix, and how an update shifts them.

Four solvers, from the surest to the fastest. `decompose` is LAPACK in float64. `decompose_by_gram` takes all singular
values from the symmetric eigenproblem of the smaller Gram matrix in float64. `decompose_randomized` finds the first few
triplets by Chebyshev-filtered subspace iteration. `decompose_warm` corrects the triplets of a base that has hardly
moved. All but the first carry error bounds. Knows nothing of files, models or layers.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offprincipal.errors import NonFiniteTensor

_DEGREE = 8
_AMPLIFICATION = 1e5  # of the largest direction over the unwanted ones in one round, which float32 survives
_ROUNDS = 24
_OVERSAMPLING = 16
_GRAM_BLOCKS, _GRAM_ROWS = 4, 2048
_AS_GOOD = 8  # float32 roundings of the largest value that the residual of a decomposition by float32 squares may be
_SQUARES_FIT = 1e-10  # float32 sums the squares of entries of this size and more
_SQUARING = 16  # roundings of the largest eigenvalue of a Gram matrix that each may be off
_PROBES, _PROBED = 4, 16.0  # random combinations, and how many times what rounding gives they may be off


@dataclass(frozen=True)
class Svd:
    """W ≈ U diag(S) Vh: the first b triplets, from the largest down.

    Args:
        U: (n, b); S: (b,) or longer where more singular values than vectors are known; Vh: (b, m).
        solver: `exact`, `randomized` or `warm`.
        singular_value_error: each S_i with i ≤ k is within that of a singular value of W, in the units of W; None for
            LAPACK's. It is max_i ‖[W v_i − σ_i u_i; Wᵀ u_i − σ_i v_i]‖₂/√2.
        residual: ‖[W V_k − U_k Σ_k; Wᵀ U_k − V_k Σ_k]‖₂, from which the error of the subspaces follows.
        next_value_error: what `singular_value_error` is to the first k, of the (k + 1)-th, which bounds the gap.
        tail_error: what it is to those that come from squares alone, without vectors.
        basis: orthonormal basis of all singular directions of the shorter side, (r, r), where it is known: what a warm
            start corrects with.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    solver: str = "exact"
    singular_value_error: float | None = None
    residual: float = 0.0
    next_value_error: float = 0.0
    tail_error: float = 0.0
    basis: Tensor | None = None

    def contiguous(self) -> "Svd":
        """The same, row by row in memory, as one that was kept in a file: products of either are the same bits."""
        basis = None if self.basis is None else self.basis.contiguous()
        return replace(self, U=self.U.contiguous(), S=self.S.contiguous(), Vh=self.Vh.contiguous(), basis=basis)

    def top(self, k: int) -> "Svd":
        """The first k triplets.

        >>> decompose(torch.eye(3)).top(2).S
        tensor([1., 1.], dtype=torch.float64)
        """
        return replace(self, U=self.U[:, :k], S=self.S[:k], Vh=self.Vh[:k])

    def resolved(self, k: int) -> Tensor:
        """The singular values that are known: the top k of an approximation, whose others have not converged.

        Of a whole decomposition all, except those without vectors that may be nothing but their error.

        >>> W = torch.diag(torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
        >>> len(decompose(W).resolved(1)), len(decompose_by_gram(torch.diag(0.1 ** torch.arange(40.0)), 1).resolved(1))
        (3, 17)
        """
        if len(self.S) < min(self.U.shape[0], self.Vh.shape[1]):
            return self.S[:k]
        told = self.tail_error < self.S
        told[: self.U.shape[1]] = True
        return self.S[told]

    def to(self, device: torch.device) -> "Svd":
        """The same on another device."""
        basis = None if self.basis is None else self.basis.to(device)
        return replace(self, U=self.U.to(device), S=self.S.to(device), Vh=self.Vh.to(device), basis=basis)

    def angle_error_deg(self, k: int) -> float | None:
        """How far the top-k subspaces may be from the true ones, degrees; None for LAPACK's.

        No residual can tell that a direction was missed altogether. Where all singular values are known (`exact`, and
        `warm` from there) none was; `randomized` leaves that to its random start.

        Source: Davis and Kahan, Wedin: arcsin(residual/gap), the gap being σ_k − σ_{k+1} less what these may be off.

        >>> decompose(torch.eye(3)).angle_error_deg(1) is None
        True
        """
        if self.singular_value_error is None:
            return None
        gap = (self.S[k - 1] - self.S[k]).item() if k < len(self.S) else self.S[k - 1].item()
        gap -= self.singular_value_error + self.next_value_error
        return math.degrees(math.asin(min(self.residual / gap, 1.0))) if gap > 0 else 90.0


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
    scale = largest_entry(W) or 1.0
    try:
        U, S, Vh = torch.linalg.svd(W / scale, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteTensor(f"its singular value decomposition did not converge: {error}") from error
    return Svd(U, S * scale, Vh)


def decompose_by_gram(W: Tensor, k: int) -> Svd:
    """All singular values and the first triplets, from the symmetric eigenproblem of the smaller Gram matrix.

    For float32 that of the Gram matrix in float32, whose first triplets are then corrected to first order, as those of
    a matrix that has hardly moved are; or, where the largest value drowns the others' squares, that in float64.

    Args:
        W: (n, m), float32 or float64; k: triplets whose errors are bounded; a few more come with them.

    Returns:
        S (r,) in float64; vectors in the type of `W`.

    Source: Golub and Van Loan, Matrix Computations, 8.6.3, the correction by Davidson 1975; the error bound is measured
    afterwards.

    >>> svd = decompose_by_gram(torch.diag(torch.tensor([1.0, 2.0, 4.0])), 1)
    >>> svd.S.tolist(), svd.singular_value_error < 1e-5
    ([4.0, 2.0, 1.0], True)
    """
    A = _tall(W)
    if W.dtype == torch.float32 and (found := _by_float32_gram(A, k, W)):
        return found
    S, basis = roots(gram(A, torch.float64))
    b = block_size(k, len(S))
    found = _with_error_bound(A, _ritz(A, basis[:, :b].to(W.dtype)), k, W, "exact")
    return replace(found, S=S, tail_error=_tail_error(S, torch.float64), basis=basis.to(W.dtype))


def decompose_randomized(W: Tensor, k: int, tolerance: float, generator: torch.Generator) -> Svd:
    """The first k triplets, from a random start, until their error bound is within the tolerance.

    Args:
        W: (n, m), float32 or float64; k < min(n, m).
        tolerance: on singular values, relative; the caller looks at the error bound, because a flat spectrum may need
            more than the rounds spent here.
        generator: of the random start, on the CPU.

    Source: Halko, Martinsson and Tropp 2011; Zhou and Saad 2007 (Chebyshev-filtered subspace iteration).

    >>> W = torch.diag(0.5 ** torch.arange(40.0))
    >>> svd = decompose_randomized(W, 2, 1e-3, torch.Generator().manual_seed(0))
    >>> [round(x, 5) for x in svd.S[:2].tolist()]
    [1.0, 0.5]
    """
    A = _tall(W)
    b = min(k + max(_OVERSAMPLING, k // 2), A.shape[1])
    start = torch.randn(A.shape[1], b, generator=generator, dtype=torch.float64).to(A)
    Y = A @ orthonormal(start)
    once = A.T @ (Y / max(largest_entry(Y), torch.finfo(Y.dtype).tiny))  # the square of W may overflow
    found = _with_error_bound(A, _ritz(A, orthonormal(once)), k, W, "randomized")
    return _filtered(A, found, k, tolerance, W)


def decompose_warm(W: Tensor, base: Svd, k: int, tolerance: float, bound_errors: bool = True) -> Svd:
    """The first k triplets of a matrix that has hardly moved, from those of its base.

    Rayleigh–Ritz in the base's leading basis; then each direction is corrected by perturbation theory to first order in
    the rest of the base's basis, so that what is left is of second order. Where the base's whole basis is not known,
    the block is filtered instead, with as many steps as the error bound asks for.

    Args:
        W: (n, m), float32 or float64; base: with at least k vectors, on the same device.
        tolerance: on singular values, relative.
        bound_errors: whether to measure the error after the correction (one more product).

    Source: Davidson 1975 (the preconditioned correction), with the base's decomposition as preconditioner.

    >>> W = torch.diag(0.5 ** torch.arange(40.0))
    >>> moved = decompose_warm(W + 1e-4, decompose_by_gram(W, 2), 2, 1e-3)
    >>> (moved.S[:2] - decompose(W + 1e-4).S[:2]).abs().max().item() < 1e-6
    True
    """
    A = _tall(W)
    short = _short(base, W).to(A.dtype)
    b = block_size(k, A.shape[1]) if base.basis is not None else short.shape[1]
    ritz = _ritz(A, short[:, :b], refined=base.basis is None)
    if base.basis is None:
        return _filtered(A, _with_error_bound(A, ritz, k, W, "warm"), k, tolerance, W)
    found = _ritz(A, _corrected(A, ritz, base.basis[:, b:].to(A.dtype), base.S[b:]))
    return _with_error_bound(A, found, k, W, "warm") if bound_errors else _oriented(*found, W, "warm")


def update_spectrum(update: Tensor) -> Tensor:
    """Singular values of an update, from the largest down, float64.

    By LAPACK in float64; for float32 from its Gram matrix, or from that in float64 where too much of the spectrum lies
    below what float32 resolves.

    Args:
        update: (n, m), float32 or float64.

    >>> update_spectrum(torch.diag(torch.tensor([1.0, 2.0])))
    tensor([2., 1.], dtype=torch.float64)
    """
    if update.dtype == torch.float64:
        found: Tensor = torch.linalg.svdvals(update)
        return found
    A, scale = _tall(update), largest_entry(update)
    if scale == 0:
        return torch.zeros(A.shape[1], dtype=torch.float64, device=A.device)
    if _SQUARES_FIT <= scale <= 1 / _SQUARES_FIT:
        scale = 1.0
    else:
        A = A / scale
    values = torch.linalg.eigvalsh(gram(A, A.dtype)).flip(0).double()
    floor = 8 * torch.finfo(A.dtype).eps * values[0]
    unresolved = (values < floor).sum() * floor.sqrt()
    if unresolved > 0.001 * values.clamp(min=0).sqrt().sum():
        values = torch.linalg.eigvalsh(gram(A, torch.float64)).flip(0)
    roots: Tensor = values.clamp(min=0).sqrt() * scale
    return roots


def block_size(k: int, r: int) -> int:
    """How many triplets are worked with so that the first k converge, of r in all.

    >>> block_size(112, 896)
    128
    """
    return min(k + max(_OVERSAMPLING, k // 8), r)


def orthonormal(X: Tensor) -> Tensor:
    """An orthonormal basis of the columns of X, worked out in float64: the first j columns span what X's first j do.

    By Cholesky of the Gram matrix, or by Householder reflections where its columns are too nearly dependent for that.

    >>> orthonormal(torch.tensor([[3.0], [4.0]])).flatten()
    tensor([0.6000, 0.8000])
    """
    wide = X.double()
    gram = wide.T @ wide
    factor, failed = torch.linalg.cholesky_ex(gram)
    spread = factor.diagonal()
    if bool(failed) or (spread.min() < 1e-5 * spread.max()):
        reflected: Tensor = torch.linalg.qr(wide)[0].to(X.dtype)
        return reflected
    Q: Tensor = torch.linalg.solve_triangular(factor, wide.T, upper=False).T.to(X.dtype)
    return Q


def first_order_steps(along: Tensor, S: Tensor, S_rest: Tensor) -> Tensor:
    """How far approximate right singular vectors v_i have to move along the rest of a basis, to first order.

    (w_jᵀ r_i) σ_i/(σ_i² − s_j²), r_i = Aᵀu_i − σ_i v_i being the residual of the pair (u_i, v_i).

    Args:
        along: (q, b), float64, w_jᵀ r_i for the other basis vectors w_j; S: (b,), σ_i; S_rest: (q,), s_j.

    Returns:
        (q, b), at most 1 in size.

    Source: first-order perturbation theory of singular vectors.

    >>> first_order_steps(torch.tensor([[0.3]]).double(), torch.tensor([2.0]), torch.tensor([1.0]))
    tensor([[0.2000]], dtype=torch.float64)
    """
    gaps = S**2 - S_rest[:, None] ** 2
    least = (torch.finfo(torch.float64).eps * S[0] ** 2).clamp(min=torch.finfo(torch.float64).tiny)
    return (along * S / torch.where(gaps.abs() > least, gaps, least)).clamp(-1, 1)


def gram(A: Tensor, dtype: torch.dtype) -> Tensor:
    """Aᵀ A in a type: blocks on and above the diagonal, some rows at a time, the rest mirrored.

    Args:
        A: (l, r).

    Returns:
        (r, r), symmetric.

    >>> gram(torch.tensor([[1.0, 2.0]]), torch.float64)
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    r = A.shape[1]
    step = -(-r // _GRAM_BLOCKS)
    G = A.new_zeros(r, r, dtype=dtype)
    height = max(A.shape[0], 1) if A.dtype == dtype else _GRAM_ROWS
    for first in range(0, A.shape[0], height):
        rows = A[first : first + height].to(dtype)
        for i in range(0, r, step):
            G[i : i + step, i:] += rows[:, i : i + step].T @ rows[:, i:]
    for i in range(0, r, step):
        G[i + step :, i : i + step] = G[i : i + step, i + step :].T
    return G


def roots(G: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of the eigenvalues of a positive semidefinite matrix, from the largest down, and its eigenvectors.

    Args:
        G: (r, r), symmetric.

    Returns:
        (r,), float64, 0 where rounding left an eigenvalue below; (r, r), in the type of `G`.

    >>> roots(torch.diag(torch.tensor([1.0, 4.0])))[0]
    tensor([2., 1.], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(G)
    return values.double().flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def largest_entry(x: Tensor) -> float:
    """max |x|, without a copy of x; 0 if it is empty.

    >>> largest_entry(torch.tensor([1.0, -2.0]))
    2.0
    """
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    return max(-low.item(), high.item())


def _by_float32_gram(A: Tensor, k: int, W: Tensor) -> Svd | None:
    """As `decompose_by_gram`, from squares in float32; None if these are too coarse for the first k."""
    if not _SQUARES_FIT <= largest_entry(A) <= 1 / _SQUARES_FIT:
        return None
    S, basis = roots(gram(A, torch.float32))
    b = block_size(k, len(S))
    corrected = _corrected(A, _ritz(A, basis[:, :b], refined=False), basis[:, b:], S[b:])
    found = _with_error_bound(A, _ritz(A, corrected), k, W, "exact")
    if found.residual > _AS_GOOD * torch.finfo(torch.float32).eps * S[0].item():
        return None
    S = torch.cat([found.S, S[b:].clamp(max=found.S[-1])])
    return replace(found, S=S, tail_error=_tail_error(S, torch.float32), basis=basis)


def _tail_error(S: Tensor, squared_in: torch.dtype) -> float:
    """What squaring costs the smallest singular values: the root of a few roundings of σ_1²."""
    return math.sqrt(_SQUARING * torch.finfo(squared_in).eps) * S[0].item()


def _tall(W: Tensor) -> Tensor:
    return W if W.shape[0] >= W.shape[1] else W.T


def _short(svd: Svd, W: Tensor) -> Tensor:
    """The leading singular vectors of the shorter side, (r, b)."""
    return svd.Vh.T if W.shape[0] >= W.shape[1] else svd.U


def _ritz(A: Tensor, V: Tensor, refined: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh–Ritz: the best triplets of A (l, r) with right vectors in the span of the orthonormal V (r, b).

    Args:
        refined: whether to turn the vectors in float64, which those that are corrected afterwards do not need.

    Returns:
        U (l, b), S (b,) in float64, V (r, b).
    """
    Y = A @ V  # (l, b)
    S, Q = roots(gram(Y, torch.float64))
    work = torch.float64 if refined else A.dtype
    tiny = torch.finfo(work).eps * S[0].clamp(min=torch.finfo(work).tiny)
    U = (Y.to(work) @ Q.to(work)).div_(S.clamp(min=tiny).to(work))
    return U.to(A.dtype), S, (V.to(work) @ Q.to(work)).to(A.dtype)


def _residuals(A: Tensor, ritz: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Aᵀ U − V Σ, (r, b), float64; A V − U Σ is zero but for rounding."""
    U, S, V = ritz
    return (A.T @ U).double() - V.double() * S


def _with_error_bound(A: Tensor, ritz: tuple[Tensor, Tensor, Tensor], k: int, W: Tensor, solver: str) -> Svd:
    U, S, V = ritz
    R = _residuals(A, ritz)[:, : k + 1]
    next_error = math.sqrt(R[:, k:].square().sum().item() / 2)  # 0 where k is all there is
    squares = R[:, :k].T @ R[:, :k]  # (k, k)
    rounding = torch.finfo(A.dtype).eps * S[0].item() * math.sqrt(2) + _gram_rounding(S, k)
    error = math.sqrt(squares.diagonal().max().item() / 2) + rounding
    residual = math.sqrt(max(torch.linalg.eigvalsh(squares)[-1].item(), 0.0)) + rounding
    bounds: Any = {"singular_value_error": error, "residual": residual, "next_value_error": next_error}
    return replace(_oriented(U, S, V, W, solver), **bounds)


def _gram_rounding(S: Tensor, k: int) -> float:
    """What squaring costs the least of the first k values: eigenvalues of a Gram matrix are off by a few ε σ_1²."""
    lost = _SQUARING * torch.finfo(torch.float64).eps * S[0].item() ** 2
    return lost / max(S[k - 1].item(), math.sqrt(lost)) if lost > 0 else 0.0


def _oriented(U: Tensor, S: Tensor, V: Tensor, W: Tensor, solver: str) -> Svd:
    """Long and short side as left and right, as W has them."""
    return Svd(U, S, V.T, solver) if W.shape[0] >= W.shape[1] else Svd(V, S, U.T, solver)


def _corrected(A: Tensor, ritz: tuple[Tensor, Tensor, Tensor], rest: Tensor, S_rest: Tensor) -> Tensor:
    """Right Ritz vectors with their first-order components along the rest of the base's basis, orthonormal."""
    _, S, V = ritz
    R = _residuals(A, ritz)  # (r, b)
    steps = first_order_steps((rest.T @ R.to(rest.dtype)).double(), S, S_rest.to(S))
    return orthonormal(V + rest @ steps.to(rest.dtype))


def _filtered(A: Tensor, found: Svd, k: int, tolerance: float, W: Tensor) -> Svd:
    """Chebyshev-filtered subspace iteration until the error bound holds or stops falling."""
    for _ in range(_ROUNDS):
        cut = found.S[-1].item() ** 2 / 2  # the filter damps [0, 2·cut], the part of the spectrum that is unwanted
        if within(found, k, tolerance) or cut == 0:
            break
        reach = math.acosh(found.S[0].item() ** 2 / cut - 1)
        degree = min(max(int(math.acosh(_AMPLIFICATION) / reach), 1), _DEGREE) if reach > 0 else _DEGREE
        V = _short(found, W)
        root = math.sqrt(cut)
        before, now = V, A.T @ (A @ V / root) / root - V
        for _ in range(degree - 1):
            before, now = now, 2 * (A.T @ (A @ now / root) / root - now) - before
        better = _with_error_bound(A, _ritz(A, orthonormal(now)), k, W, found.solver)
        if better.residual > 0.9 * found.residual:
            break
        found = better
    return found


def within(svd: Svd, k: int, tolerance: float) -> bool:
    """Whether the error bound of the first k singular values is within a relative tolerance.

    >>> within(decompose(torch.eye(2)), 1, 0.0)
    True
    """
    if svd.singular_value_error is None:
        return True
    return svd.singular_value_error <= tolerance * svd.S[k - 1].item()


def require_decomposition(svd: Svd, W: Tensor, k: int, generator: torch.Generator) -> None:
    """Check triplets that come from elsewhere against their matrix, by random combinations: a few passes over it.

    The first k have to be orthonormal, to be what W makes of each other within their residual, and, if all singular
    values are known, these have to go with the basis. One small value that is off alone is not found: it drowns in the
    rounding of the large ones.

    Raises:
        ValueError: they are not its decomposition.

    Source: Freivalds 1977.

    >>> W = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> require_decomposition(decompose_by_gram(W, 1), W, 1, torch.Generator().manual_seed(0))
    >>> require_decomposition(decompose_by_gram(W + 1, 1), W, 1, torch.Generator().manual_seed(0))
    Traceback (most recent call last):
    ...
    ValueError: its triplets are not the matrix's
    """
    (n, m), b, r = W.shape, svd.U.shape[-1], min(W.shape)
    shapes = svd.U.shape == (n, b) and svd.Vh.shape == (b, m) and svd.S.dim() == 1 and k <= b <= len(svd.S) <= r
    shapes = shapes and (svd.basis is None or (svd.basis.shape == (r, r) and len(svd.S) == r))
    if not shapes or not all(bool(torch.isfinite(x).all()) for x in (svd.U, svd.S, svd.Vh)):
        raise ValueError("it has other shapes, or is not finite")
    S = svd.S.double()
    if bool((S < 0).any()) or bool((S[1:] > S[:-1]).any()):
        raise ValueError("its singular values are not in order")
    eps = torch.finfo(W.dtype).eps
    allowed = _PROBED * (eps * math.sqrt(max(n, m)) * S[0].item() + svd.residual) + torch.finfo(W.dtype).tiny
    near = _PROBED * eps * math.sqrt(max(n, m))
    U, V = svd.U[:, :k].to(W.dtype), svd.Vh[:k].T.to(W.dtype)
    z = torch.randn(k, _PROBES, generator=generator, dtype=torch.float64).to(W)
    length, scaled = z.norm().item(), S[:k, None].to(W) * z
    apart = ((W @ (V @ z) - U @ scaled).norm().item(), (W.T @ (U @ z) - V @ scaled).norm().item())
    if max(apart) > allowed * length:
        raise ValueError("its triplets are not the matrix's")
    if S[k - 1] > 0 and max((X.T @ (X @ z) - z).norm().item() for X in (U, V)) > near * length:
        raise ValueError("its vectors are not orthonormal")
    if svd.basis is not None:
        A, basis = _tall(W), svd.basis.to(W.dtype)
        z = torch.randn(r, _PROBES, generator=generator, dtype=torch.float64).to(W)
        moved, wanted = (A @ (basis @ z)).double().square().sum(0), (S[:, None] * z.double()).square().sum(0)
        if bool(((moved - wanted).abs() > _PROBED * 10 * eps * math.sqrt(r) * wanted.max()).any()):
            raise ValueError("its basis does not go with its singular values")
        if (basis.T @ (basis @ z) - z).norm().item() > near * z.norm().item():
            raise ValueError("its basis is not orthonormal")


def rounding_floor(svd: Svd, shape: torch.Size) -> float:
    """Below this a singular value, or a difference of two, is rounding: ε · max(n, m) · σ_1, or the error bound.

    >>> rounding_floor(decompose(2 * torch.eye(4, 8)), torch.Size([4, 8])) < 1e-14
    True
    """
    return max(torch.finfo(torch.float64).eps * max(shape) * svd.S[0].item(), svd.singular_value_error or 0.0)


def whole_floor(svd: Svd, shape: torch.Size) -> float:
    """The same for the whole spectrum, whose small values may come from squares alone.

    >>> svd = decompose_by_gram(2 * torch.eye(4, 8, dtype=torch.float64), 1)
    >>> rounding_floor(decompose(2 * torch.eye(4, 8)), torch.Size([4, 8])) < whole_floor(svd, torch.Size([4, 8])) < 1e-6
    True
    """
    return max(rounding_floor(svd, shape), svd.tail_error)


def angle_floor_deg(svd: Svd, k: int, shape: torch.Size) -> float:
    """Below this an angle between top-k subspaces is rounding: the error bound, or LAPACK's rounding over the gap.

    >>> angle_floor_deg(decompose(torch.diag(torch.tensor([2.0, 1.0]))), 1, torch.Size([2, 2])) < 1e-12
    True
    """
    error = svd.angle_error_deg(k)
    if error is not None:
        return error
    gap = (svd.S[k - 1] - svd.S[k]).item() if k < len(svd.S) else svd.S[k - 1].item()
    floor = rounding_floor(svd, shape)
    return math.degrees(math.asin(floor / gap)) if gap > floor else 90.0


def spectral_shift(S_base: Tensor, S_tuned: Tensor) -> float | None:
    """‖σ(W1) − σ(W0)‖₂ / ‖σ(W0)‖₂; None if the base is zero.

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
