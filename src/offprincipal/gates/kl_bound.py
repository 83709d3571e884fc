"""Gate I: how far the policy moved, whether half the Fisher form says so, and proposition 3.2's norm bound.

Sums over sequences in, entries of `gates.json` out. Knows no model.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from offprincipal.gates.forward import Array
from offprincipal.gates.statistics import interval, resampled_means

FRACTIONS = tuple(i / 8 for i in range(1, 9))


def curve(kl: Array, fisher: Array, tokens: Array) -> list[dict[str, float]]:
    """KL(π_s‖π_0) and ½(sΔ)ᵀF(sΔ) per token, at each fraction s of the update.

    Args:
        kl: (fractions, sequences), sums over tokens; fisher: (sequences,), those of the whole update.

    >>> curve(np.full((8, 1), 2.0), np.array([4.0]), np.array([2]))[-1]
    {'fraction': 1.0, 'kl': 1.0, 'half_quadratic': 1.0}
    """
    count = tokens.sum()
    whole = fisher.sum() / count
    return [
        {"fraction": s, "kl": float(row.sum() / count), "half_quadratic": float(s**2 * whole / 2)}
        for s, row in zip(FRACTIONS, kl, strict=True)
    ]


def norm_bound(
    kl: Array, fisher: Array, tokens: Array, update_norm: float, smallest: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Proposition 3.2 with measured constants: ‖Δ‖_F(θ) ≤ √(2K) up to higher order, K the divergence of the step.

    `tightness` = ‖Δ‖_F(θ)/√(2K). It goes to 1 as the step goes to 0, from either side, so that a value above 1 is the
    measured size of the higher-order terms, and no violation.

    Args:
        kl, fisher, tokens: (sequences,), of the whole update.
        smallest: `direction` and `value` of the smallest pooled curvature that was measured; it gives the Euclidean
            form ‖Δ‖ ≤ √(2K/μ), whose μ should be the least curvature of any direction, and is only the least measured.
    """
    count = tokens.sum()
    K, quadratic = float(kl.sum() / count), float(fisher.sum() / count)
    bound, length = math.sqrt(max(2 * K, 0)), math.sqrt(quadratic)
    divergences, forms = (resampled_means(x, tokens) for x in (kl, fisher))
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = interval(np.sqrt(forms / (2 * divergences)), len(tokens))
    euclidean = None if not smallest or not smallest["value"] else math.sqrt(max(2 * K, 0) / smallest["value"])
    return {
        "K": K,
        "fisher_norm": length,
        "bound": bound,
        "tightness": length / bound if bound > 0 else None,
        "tightness_low": low if bound > 0 else None,
        "tightness_high": high if bound > 0 else None,
        "update_norm": update_norm,
        "curvature": quadratic / update_norm**2 if update_norm > 0 else None,
        "smallest_curvature": dict(smallest) if smallest else None,
        "euclidean_bound": euclidean,
        "euclidean_tightness": update_norm / euclidean if euclidean else None,
    }
