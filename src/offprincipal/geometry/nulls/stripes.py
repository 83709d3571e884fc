"""Stripes: how unevenly changes are distributed over rows and columns, compared with the spacing null.

Knows nothing of files, models or layers.
"""

import numpy as np

from offprincipal.geometry.bits import Array, Floats
from offprincipal.geometry.compiled import compiled


def line_null(in_class: Array, entries: Array, changed: Array) -> tuple[Floats, Floats]:
    """Mean and variance of the change counts of lines, rows or columns, under the spacing null.

    E_i = Σ_e C_e n_ie/N_e and V_i = Σ_e n_ie (C_e/N_e)(1 − C_e/N_e)(N_e − n_ie)/(N_e − 1).

    Args:
        in_class: (K, lines), entries n_ie of each line in each class; entries, changed: (K,), N_e > 0 and C_e.

    Returns:
        expected, variance: (lines,).

    Source: the hypergeometric mean and variance.

    >>> line_null(np.array([[2, 2]]), np.array([4]), np.array([2]))
    (array([1., 1.]), array([0.33333333, 0.33333333]))
    """
    rate = changed / entries
    spread = rate * (1 - rate) / np.maximum(entries - 1, 1)
    expected, variance = np.zeros(in_class.shape[1]), np.zeros(in_class.shape[1])
    _add_line_moments(in_class, rate, spread, entries.astype(np.float64), expected, variance)
    return expected, variance


def dispersion(counts: Array, expected: Floats, variance: Floats) -> float | None:
    """How far the change counts of lines scatter beyond the spacing null: mean_i (c_i − E_i)²/V_i where V_i > 0.

    Args:
        counts: (lines,), changed entries; expected, variance: (lines,), from `line_null`.

    Returns:
        About 1 for a weight-blind update without structure, large for stripes; None if nothing is left to chance.

    Source: Pearson's statistic with the hypergeometric mean and variance.

    >>> dispersion(np.array([3, 1]), np.array([2.0, 2.0]), np.array([0.5, 0.5]))
    2.0
    """
    left = variance > 0
    if not left.any():
        return None
    return float(((counts - expected)[left] ** 2 / variance[left]).mean())


def gini(rates: Array) -> float | None:
    """Gini coefficient of non-negative rates: 0 if all are equal, towards 1 if one has all; None if all are 0.

    Args:
        rates: (n,), non-negative.

    Source: the mean absolute difference over twice the mean.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 0.0, 0.0, 1.0]))
    (0.0, 0.75)
    """
    ordered = np.sort(rates)
    total = float(ordered.sum())
    if total == 0:
        return None
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered) / (n * total)


@compiled()
def _add_line_moments(in_class, rate, spread, entries, expected, variance):  # type: ignore[no-untyped-def] # pragma: no cover
    for e in range(len(rate)):
        for i in range(len(expected)):
            n = np.float64(in_class[e, i])
            expected[i] += rate[e] * n
            variance[i] += spread[e] * n * (entries[e] - n)
