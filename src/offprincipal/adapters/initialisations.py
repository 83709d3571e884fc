"""Initialisations: where the factors of ΔW = s·B A start, from the base matrix alone.

Three kinds. Some start at B = 0 or A = 0, so that nothing changes. Some start at a part of the base itself and train on
from there; the published methods take that part out of the base, here the start is subtracted from the update instead
(s·(B A − B0 A0)), which is the same function and leaves the base as it is. What PEFT has is PEFT's. Knows nothing of
models.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offprincipal.geometry import masks, principal, spectrum
from offprincipal.geometry.spectrum import Svd

_RESIDUAL = 1e-10  # relative: how well triplets from the Gram matrix have to hold


@dataclass(frozen=True)
class Start:
    """The factors at the start of training.

    Args:
        A: (r, m); B: (n, r).
        train_a_only: only A is trained.
    """

    A: Tensor
    B: Tensor
    train_a_only: bool = False


@dataclass(frozen=True)
class StartSettings:
    """What an initialisation may depend on beside the base.

    Args:
        rank: r. scale: s.
        rank_fraction, density: k over min(n, m) for principal weights, and of the masks; for `geora`.
    """

    rank: int
    scale: float
    rank_fraction: float | None = None
    density: float | None = None


def pissa(W: Tensor, settings: StartSettings) -> Start:
    """PiSSA (arXiv 2404.02948), PEFT's: the top-r singular triplets of the base, √Σ in either factor."""
    return Start(*_by_peft("pissa", W, settings))


def olora(W: Tensor, settings: StartSettings) -> Start:
    """OLoRA (arXiv 2406.01775), PEFT's: the first r columns of Q and rows of R of the base's QR decomposition."""
    return Start(*_by_peft("olora", W, settings))


def mica(W: Tensor, settings: StartSettings) -> Start:
    """MiCA (arXiv 2604.01694), PEFT's: B the r left singular vectors of the smallest singular values, frozen; A = 0."""
    A, B = _by_peft("mica", W, settings)
    return Start(A, B, train_a_only=True)


def milora(W: Tensor, settings: StartSettings) -> Start:
    """MiLoRA (arXiv 2406.09044): PiSSA with the bottom-r singular triplets of the base instead of the top ones.

    Of the thin decomposition: where n ≠ m, directions that the base maps to zero are not among them.
    """
    return _from_triplets(bottom_triplets(W, settings.rank), settings.scale)


def rlpo(W: Tensor, settings: StartSettings) -> Start:
    """LoRA-RLPO (PMLR v306; arXiv 2606.31813): A the top-r right singular vectors, orthonormal; B = 0.

    Taken here: both factors are trained, and nothing keeps A orthonormal after the start.
    """
    return _from_rows(top_triplets(W, settings.rank).Vh, W)


def rlmo(W: Tensor, settings: StartSettings) -> Start:
    """LoRA-RLMO (PMLR v306; arXiv 2606.31813): as `rlpo`, with the bottom-r right singular vectors.

    Taken here: those of the thin decomposition; where n < m, not of the directions that the base maps to zero.
    """
    return _from_rows(bottom_triplets(W, settings.rank).Vh, W)


def geora(W: Tensor, settings: StartSettings) -> Start:
    """GeoRA (arXiv 2601.09361): the top-r singular triplets of the geometry-constrained part of the base, M ⊙ W.

    There is no public code. M joins a spectral and a Euclidean mask; taken here: the `safe` mask, which is the entries
    of low magnitude and those that are not principal, either mask at `density`, principal weights from rank
    `rank_fraction`. The factors get √Σ each, as in PiSSA, and the rest of the base is frozen.
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
    """The first singular triplets, float64: LAPACK's, or with a relative error bound of 1e-10 on singular values.

    >>> top_triplets(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).S
    tensor([3., 2.], dtype=torch.float64)
    """
    return _first(principal.principal_triplets(W.double(), rank, _RESIDUAL), rank)


def bottom_triplets(W: Tensor, rank: int) -> Svd:
    """The last singular triplets of the thin decomposition, from the largest down, float64.

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
    """From the last eigenvectors of the smaller Gram matrix, by Rayleigh–Ritz in their span, with the residual."""
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
    """s·B A = U Σ Vᵀ, with √Σ in either factor."""
    root = (svd.S / scale).sqrt()
    return Start(root[:, None] * svd.Vh, svd.U * root)


def _from_rows(A: Tensor, W: Tensor) -> Start:
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
