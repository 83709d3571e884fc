"""Masks: which coordinates of a weight matrix a claim speaks of.

A mask of density α holds exactly round(α·nm) entries, ties broken by index. Every mask is given as the *rank* of each
entry, 0 for the first to enter, so that one sort serves the whole sweep of densities. Knows nothing of models or files.
"""

import torch
from torch import Tensor

from offprincipal.geometry.cuts import ALPHAS, MASKS, mask_size

__all__ = [
    "ALPHAS",
    "MASKS",
    "entry_ranks",
    "low_magnitude_ranks",
    "mask_size",
    "masks_at",
    "random_ranks",
]


def entry_ranks(scores: Tensor) -> Tensor:
    """The place of each entry when the scores are sorted from largest to smallest, ties by index.

    Args:
        scores: any real tensor, any shape.

    Returns:
        int64, the shape of `scores`: a permutation of 0 … numel − 1.

    >>> entry_ranks(torch.tensor([[0.1, 0.3], [0.3, 0.2]]))
    tensor([[3, 0],
            [1, 2]])
    """
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(order.numel(), device=order.device)
    return ranks.view(scores.shape)


def low_magnitude_ranks(W: Tensor) -> Tensor:
    """Ranks of the low-magnitude mask: the entries smallest in magnitude come first.

    >>> low_magnitude_ranks(torch.tensor([[0.5, -0.1], [0.2, 3.0]])) < 2
    tensor([[False,  True],
            [ True, False]])
    """
    return entry_ranks(-W.abs())


def random_ranks(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Ranks of a random mask: a uniformly drawn permutation, so that every density is a uniform draw of its size.

    >>> g = torch.Generator().manual_seed(0)
    >>> int((random_ranks(torch.Size([4, 5]), g) < 7).sum())
    7
    """
    return torch.randperm(shape.numel(), generator=generator).view(shape)


def masks_at(alpha: float, ranks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks of one density.

    Args:
        alpha: the density, 0 < alpha <= 1.
        ranks: name -> ranks, of any of `principal`, `low_magnitude`, `random`; all of one shape.

    Returns:
        name -> bool tensor; with `safe` = low_magnitude ∪ ¬principal added if both are given.

    >>> W = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    >>> {name: int(mask.sum()) for name, mask in masks_at(0.5, {"low_magnitude": low_magnitude_ranks(W)}).items()}
    {'low_magnitude': 2}
    """
    masks = {name: rank < mask_size(rank.numel(), alpha) for name, rank in ranks.items()}
    if "principal" in masks and "low_magnitude" in masks:
        masks["safe"] = masks["low_magnitude"] | ~masks["principal"]
    return {name: masks[name] for name in MASKS if name in masks}
