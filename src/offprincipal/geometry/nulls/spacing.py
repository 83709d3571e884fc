"""The spacing null: the number of changed entries of each spacing class is as measured; which ones is random.

Whether storing hides a step depends on the spacing of bfloat16 at the weight, so entries of one spacing are one class.
Exact and in closed form: within a class, the changed entries are drawn without replacement. For a mask of small weights
it is almost what was measured by construction, since whether a weight is small *is* its class: there the rounding null
(`nulls.rounding`) is the control. Knows nothing of files, models or layers.
"""

import math
from dataclasses import dataclass

import numpy as np

from offprincipal.geometry.bits import Array, Floats


@dataclass(frozen=True)
class CountNull:
    """Mean and variance of a count of entries under a null hypothesis."""

    expected: float
    variance: float

    def z(self, observed: float) -> float | None:
        """(observed − expected)/sd; None if the null leaves nothing to chance.

        >>> CountNull(10.0, 4.0).z(14)
        2.0
        """
        return (observed - self.expected) / math.sqrt(self.variance) if self.variance > 0 else None


def overlap_null(entries: Array, changed: Array, in_mask: Array) -> CountNull:
    """The spacing null of |mask ∩ changed|.

    Args:
        entries, changed, in_mask: per class, how many entries there are, changed, and are in the mask; (classes,).

    Returns:
        Σ C·M/N, and the hypergeometric variance Σ C (M/N)(1 − M/N)(N − C)/(N − 1).

    Source: the hypergeometric distribution, class by class.

    >>> overlap_null(np.array([9]), np.array([3]), np.array([6]))
    CountNull(expected=2.0, variance=0.5)
    """
    N, C, M = _occupied(entries, changed, in_mask)
    share = M / N
    variance = C * share * (1 - share) * (N - C) / np.maximum(N - 1, 1)
    return CountNull(float((C * share).sum()), float(variance.sum()))


def intersection_null(entries: Array, changed_a: Array, changed_b: Array) -> CountNull:
    """The spacing null of |C_a ∩ C_b| of two runs.

    Args:
        entries, changed_a, changed_b: per class, how many entries there are, and how many each run changed; (classes,).

    Returns:
        Σ C_a C_b/N, and Σ C_a C_b (N − C_a)(N − C_b)/(N²(N − 1)).

    Source: the hypergeometric distribution, class by class.

    >>> intersection_null(np.array([9]), np.array([3]), np.array([6]))
    CountNull(expected=2.0, variance=0.5)
    """
    N, A, B = _occupied(entries, changed_a, changed_b)
    variance = A * B * (N - A) * (N - B) / (N**2 * np.maximum(N - 1, 1))
    return CountNull(float((A * B / N).sum()), float(variance.sum()))


def _occupied(entries: Array, *counts: Array) -> tuple[Floats, ...]:
    keep = entries > 0
    return tuple(count[keep].astype(np.float64) for count in (entries, *counts))
