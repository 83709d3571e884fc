"""Chance: what agreement and overlap come to if every entry is alike.

Knows nothing of files, models or layers.
"""

import numpy as np

from offprincipal.geometry.bits import Array, Counts


def jaccard(intersection: float, count_a: float, count_b: float) -> float | None:
    """|A ∩ B| / |A ∪ B| from the counts; None if the union is empty.

    >>> jaccard(2, 4, 4)
    0.3333333333333333
    """
    union = count_a + count_b - intersection
    return intersection / union if union > 0 else None


def bernoulli_overlap(entries: Array, changed: Array, alpha: float, rng: np.random.Generator) -> tuple[Counts, int]:
    """A Bernoulli(α) mask, by the counts that it would have: the mask itself need not be made.

    Args:
        entries, changed: per class, how many entries there are and how many changed; (classes,).

    Returns:
        in_mask: (classes,), entries in the mask; and how many of the changed entries are in it.

    Source: a sum of independent Bernoulli variables is binomial.

    >>> in_mask, overlap = bernoulli_overlap(np.array([8, 2]), np.array([3, 0]), 1.0, np.random.default_rng(0))
    >>> in_mask.tolist(), overlap
    ([8, 2], 3)
    """
    moved = rng.binomial(changed, alpha)
    return moved + rng.binomial(entries - changed, alpha), int(moved.sum())
