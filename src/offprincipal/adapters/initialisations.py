"""Initialisations of the factors of ΔW = s·B A, computed from the base matrix alone.

There are two kinds. `mica`, `rlpo` and `rlmo` start at A = 0 or B = 0, so the update is zero. `pissa`, `olora`,
`milora` and `geora` start at a part s·B0 A0 of the base. The published methods subtract that part from the base; here
it is subtracted from the update, ΔW = s·(B A − B0 A0), which gives the same function and leaves the base unchanged.
`pissa`, `olora` and `mica` call PEFT's implementations.

All seven take the same arguments: one base matrix `W`, (n, m), of any float type and finite; and `settings`, see
`StartSettings`. They return A (r, m) and B (n, r) as a `Start`. Knows nothing of models.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offprincipal.geometry import masks, principal, spectrum
from offprincipal.geometry.spectrum import Svd

_RESIDUAL = 1e-10  # largest accepted error of singular triplets from the Gram matrix, relative


@dataclass(frozen=True)
class Start:
    """The factors at the start of training.

    Args:
        A: (r, m).
        B: (n, r).
        train_a_only: B is frozen.
    """

    A: Tensor
    B: Tensor
    train_a_only: bool = False


@dataclass(frozen=True)
class StartSettings:
    """The settings of an initialisation.

    Args:
        rank: r, 1 <= r <= min(n, m).
        scale: s = alpha/r, positive.
        rank_fraction: k/min(n, m), with k the rank of the principal subspaces; required by `geora`, otherwise unused.
        density: fraction of the entries in each of the two masks; required by `geora`, otherwise unused.
    """

    rank: int
    scale: float
    rank_fraction: float | None = None
    density: float | None = None


def pissa(W: Tensor, settings: StartSettings) -> Start:
    """PiSSA: the top-r singular triplets of the base, √(Σ/s) in each factor, so that s·B A = U_r Σ_r V_rᵀ.

    Returns:
        A (r, m), B (n, r), float32.

    Source: arXiv 2404.02948; PEFT's implementation.

    >>> start = pissa(torch.diag(torch.tensor([3.0, 2.0, 1.0])), StartSettings(rank=1, scale=1.0))
    >>> (start.B @ start.A).diagonal().round(decimals=3).tolist()
    [3.0, 0.0, 0.0]
    """
    return Start(*_by_peft("pissa", W, settings))


def olora(W: Tensor, settings: StartSettings) -> Start:
    """OLoRA: the QR decomposition of the base, W = Q R: the first r rows of R in A and columns of Q in B.

    Returns:
        A (r, m), B (n, r), float32.

    Source: arXiv 2406.01775; PEFT's implementation.

    >>> start = olora(torch.diag(torch.tensor([3.0, 2.0, 1.0])), StartSettings(rank=1, scale=1.0))
    >>> (start.B @ start.A).diagonal().abs().tolist()
    [3.0, 0.0, 0.0]
    """
    return Start(*_by_peft("olora", W, settings))


def mica(W: Tensor, settings: StartSettings) -> Start:
    """MiCA: B holds the r left singular vectors with the smallest singular values and is frozen; A = 0.

    Returns:
        A (r, m), B (n, r), float32; only A is trained.

    Source: arXiv 2604.01694; PEFT's implementation.

    >>> start = mica(torch.diag(torch.tensor([3.0, 2.0, 1.0])), StartSettings(rank=1, scale=1.0))
    >>> start.B.abs().round(decimals=3).flatten().tolist(), start.A.tolist(), start.train_a_only
    ([0.0, 0.0, 1.0], [[0.0, 0.0, 0.0]], True)
    """
    A, B = _by_peft("mica", W, settings)
    return Start(A, B, train_a_only=True)


def milora(W: Tensor, settings: StartSettings) -> Start:
    """MiLoRA: as `pissa`, with the bottom-r singular triplets of the base instead of the top ones.

    The triplets are those of the thin decomposition: if n ≠ m, the null space that follows from the shape alone is not
    used.

    Returns:
        A (r, m), B (n, r), float64.

    Source: arXiv 2406.09044.

    >>> start = milora(torch.diag(torch.tensor([3.0, 2.0, 1.0])), StartSettings(rank=1, scale=1.0))
    >>> (start.B @ start.A).diagonal().round(decimals=3).tolist()
    [0.0, 0.0, 1.0]
    """
    return _from_triplets(bottom_triplets(W, settings.rank), settings.scale)


def rlpo(W: Tensor, settings: StartSettings) -> Start:
    """LoRA-RLPO: the rows of A are the top-r right singular vectors of the base; B = 0.

    Both factors are trained, and A is not kept orthonormal after the start; this is our reading of the paper.

    Returns:
        A (r, m), B (n, r), float64.

    Source: PMLR v306; arXiv 2606.31813.

    >>> start = rlpo(torch.diag(torch.tensor([3.0, 2.0, 1.0])), StartSettings(rank=1, scale=1.0))
    >>> start.A.abs().tolist(), start.B.flatten().tolist()
    ([[1.0, 0.0, 0.0]], [0.0, 0.0, 0.0])
    """
    return _from_rows(top_triplets(W, settings.rank).Vh, W)


def rlmo(W: Tensor, settings: StartSettings) -> Start:
    """LoRA-RLMO: as `rlpo`, with the bottom-r right singular vectors.

    The vectors are those of the thin decomposition: if n < m, the null space that follows from the shape alone is not
    used; this is our reading of the paper.

    Returns:
        A (r, m), B (n, r), float64.

    Source: PMLR v306; arXiv 2606.31813.

    >>> start = rlmo(torch.diag(torch.tensor([3.0, 2.0, 1.0])), StartSettings(rank=1, scale=1.0))
    >>> start.A.abs().tolist(), start.B.flatten().tolist()
    ([[0.0, 0.0, 1.0]], [0.0, 0.0, 0.0])
    """
    return _from_rows(bottom_triplets(W, settings.rank).Vh, W)


def geora(W: Tensor, settings: StartSettings) -> Start:
    """GeoRA: the top-r singular triplets of the masked base M ⊙ W, split between the factors as in `pissa`.

    The paper combines a spectral and a Euclidean mask in M and has no public code. Here M is the `safe` mask: the union
    of the low-magnitude weights and of the weights that are not principal, with both masks at `density` and the
    principal weights at the rank that follows from `rank_fraction`.

    Returns:
        A (r, m), B (n, r), float64.

    Source: arXiv 2601.09361.

    >>> settings = StartSettings(rank=1, scale=1.0, rank_fraction=0.5, density=0.25)
    >>> start = geora(torch.diag(torch.tensor([3.0, 1.0])), settings)  # its only principal weight is the 3
    >>> (start.B @ start.A).diagonal().round(decimals=3).tolist()
    [0.0, 1.0]
    """
    assert settings.rank_fraction is not None and settings.density is not None
    svd = top_triplets(W, principal.principal_rank(W.shape, settings.rank_fraction))
    ranks = {
        "principal": principal.principal_ranks(svd.U, svd.S, svd.Vh),
        "low_magnitude": masks.low_magnitude_ranks(W),
    }
    safe = masks.masks_at(settings.density, ranks)["safe"]
    return _from_triplets(top_triplets(W.double() * safe, settings.rank), settings.scale)


def top_triplets(W: Tensor, rank: int) -> Svd:
    """The top singular triplets: by LAPACK, or with a relative error bound of 1e-10 on the singular values.

    Args:
        W: (n, m), any float type, finite.
        rank: r, at most min(n, m).

    Returns:
        U (n, r), S (r,), Vh (r, m), float64.

    >>> top_triplets(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).S
    tensor([3., 2.], dtype=torch.float64)
    """
    return _first(principal.principal_triplets(W.double(), rank, _RESIDUAL), rank)


def bottom_triplets(W: Tensor, rank: int) -> Svd:
    """The bottom singular triplets of the thin decomposition, in descending order of singular values.

    Args:
        W: (n, m), any float type, finite.
        rank: r, at most min(n, m).

    Returns:
        U (n, r), S (r,), Vh (r, m), float64.

    >>> bottom_triplets(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).S
    tensor([2., 1.], dtype=torch.float64)
    """
    if min(W.shape) > principal.EXACT_UP_TO:
        svd = _bottom_by_gram(W.double(), rank)
        if svd.residual <= _RESIDUAL * spectrum.largest_entry(W):
            return svd
    svd = spectrum.decompose(W)
    return Svd(svd.U[:, -rank:], svd.S[-rank:], svd.Vh[-rank:])


def _bottom_by_gram(W: Tensor, rank: int) -> Svd:
    """The bottom triplets by Rayleigh–Ritz in the span of the last eigenvectors of the smaller Gram matrix."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    basis = spectrum.decompose_by_gram(tall, 1).basis
    assert basis is not None
    last = basis[:, -rank:]
    ritz = spectrum.decompose(tall @ last)
    U, V = ritz.U, last @ ritz.Vh.T
    residual = torch.linalg.matrix_norm(tall.T @ U - V * ritz.S, 2).item()
    left, right = (U, V) if tall is W else (V, U)
    return Svd(left, ritz.S, right.T, residual=residual)


def _first(svd: Svd, rank: int) -> Svd:
    return Svd(svd.U[:, :rank], svd.S[:rank], svd.Vh[:rank])


def _from_triplets(svd: Svd, scale: float) -> Start:
    """Factors with s·B A = U Σ Vᵀ, √(Σ/s) in each."""
    root = (svd.S / scale).sqrt()
    return Start(root[:, None] * svd.Vh, svd.U * root)


def _from_rows(A: Tensor, W: Tensor) -> Start:
    """A as given and B = 0."""
    return Start(A, A.new_zeros(W.shape[0], A.shape[0]))


def _by_peft(name: str, W: Tensor, settings: StartSettings) -> tuple[Tensor, Tensor]:
    """A and B as PEFT initialises them on a copy of one matrix, float32."""
    lora: Any = importlib.import_module("peft.tuners.lora")
    n, m = W.shape
    base = nn.Linear(m, n, bias=False, device="meta")
    base.weight = nn.Parameter(W.detach().float().clone(), requires_grad=False)
    config = lora.LoraConfig(init_lora_weights=name)
    alpha = settings.scale * settings.rank
    layer = lora.Linear(base, "default", config=config, r=settings.rank, lora_alpha=alpha)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
