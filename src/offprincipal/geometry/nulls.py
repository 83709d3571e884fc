"""Nulls: what an update that ignores the weights would show.

The *precision null* is exact and in closed form: given how many entries of each exponent class changed, which of the
class they were is a draw without replacement. The *isotropic null* is a Gaussian update of equal norm, step length
without direction; the *stored null* is such an update rounded as the tuned weights were. Here are those that counts
decide; what needs a drawn update is in `offprincipal.geometry.gaussian`.
Knows nothing of files, models or layers.
"""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offprincipal.geometry.scan import CODES, Array, Counts, Floats, values_of_codes

_SHEPPARD_FROM = 4  # σ of so many spacings and more, where rounding adds ulp²/12 to within 1e-30


@dataclass(frozen=True)
class CountNull:
    """Mean and variance of a count of entries under a null hypothesis."""

    expected: float
    variance: float

    def z(self, observed: float) -> float | None:
        """(observed − expected)/sd; None where the null leaves nothing to chance.

        >>> CountNull(10.0, 4.0).z(14)
        2.0
        """
        return (observed - self.expected) / math.sqrt(self.variance) if self.variance > 0 else None


def overlap_null(entries: Array, changed: Array, in_mask: Array) -> CountNull:
    """The precision null of |mask ∩ changed|.

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
    """The precision null of |C_a ∩ C_b| of two runs.

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


def jaccard(intersection: float, count_a: float, count_b: float) -> float | None:
    """|A ∩ B| / |A ∪ B| from the counts; None where the union is empty.

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


def line_null(in_class: Array, entries: Array, changed: Array) -> tuple[Floats, Floats]:
    """Mean and variance of the change counts of lines, rows or columns, under the precision null.

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
    """How far the change counts of lines scatter beyond the precision null: mean_i (c_i − E_i)²/V_i where V_i > 0.

    Args:
        counts: (lines,), changed entries; expected, variance: (lines,), from `line_null`.

    Returns:
        About 1 for a weight-blind update without structure, large for stripes; None where nothing is left to chance.

    Source: Pearson's statistic with the hypergeometric mean and variance.

    >>> dispersion(np.array([3, 1]), np.array([2.0, 2.0]), np.array([0.5, 0.5]))
    2.0
    """
    left = variance > 0
    if not left.any():
        return None
    return float(((counts - expected)[left] ** 2 / variance[left]).mean())


def gini(rates: Array) -> float | None:
    """Gini coefficient of non-negative rates: 0 where all are equal, towards 1 where one has all; None if all are 0.

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


def unchanged_isotropic(entries: Counts, sigma: float) -> float | None:
    """Expected share of bfloat16 values that a Gaussian update leaves as they are; None if there are none.

    The mean of Φ(out/σ) − Φ(−in/σ) over the entries, `out` and `in` being the distances to where rounding changes.

    Args:
        entries: (32768,), entries of each magnitude code, all bfloat16 numbers.
        sigma: standard deviation of each entry of the update, before it is stored.

    Source: ours; the normal distribution function at bfloat16's rounding boundaries.

    >>> entries = np.zeros(CODES, np.int64)
    >>> entries[0x3F80] = 4  # of 1.0
    >>> round(unchanged_isotropic(entries, 0.00390625), 4)  # half the spacing up, the spacing down
    0.5328
    """
    total = int(entries.sum())
    if total == 0:
        return None
    if sigma == 0:
        return 1.0
    occur = np.flatnonzero(entries)
    return float(entries[occur] @ _stay(occur, np.zeros(len(occur)), sigma)) / total


def unchanged_isotropic_off_grid(codes: NDArray[np.uint16], values: Array, sigma: float) -> float:
    """Expected number of values that a Gaussian update leaves in their bfloat16 rounding cells.

    Args:
        codes: of the values rounded; values: float32 or float64, as many, not bfloat16 numbers themselves; sigma > 0.

    Source: as `unchanged_isotropic`; where in its cell a value lies counts too.

    >>> round(unchanged_isotropic_off_grid(np.array([0x3F80], np.uint16), np.array([1.0]), 0.00390625), 4)
    0.5328
    """
    magnitudes = codes.reshape(-1) & np.uint16(CODES - 1)
    offsets = np.abs(values.reshape(-1)).astype(np.float64) - values_of_codes(magnitudes)
    return float(_stay(magnitudes, offsets, sigma).sum())


def gaussian_scale(entries: Counts, stored_norm: float) -> float:
    """The σ of the Gaussian update whose *stored* size is expected to be a given norm.

    A bfloat16 weight moves in whole spacings, so a small update that is stored has a larger norm than it had before:
    σ solves Σ E[round(σz)²] = norm², with E[round(δ)²] = ulp² Σ_j (2j + 1) P(|δ| > (j + ½) ulp).

    Args:
        entries: (512,), entries of each exponent class.
        stored_norm: Frobenius norm of the stored update.

    Returns:
        σ; norm/√numel where nothing is lost in storing.

    Source: ours; summation by parts, and Sheppard's correction where σ is several spacings.

    >>> entries = np.zeros(512, np.int64)
    >>> entries[122] = 100  # of about 1e-20
    >>> round(gaussian_scale(entries, 2.0), 6)
    0.2
    """
    if stored_norm == 0 or not entries.any():
        return 0.0
    occur = np.flatnonzero(entries)
    ulp = np.exp2(np.maximum(occur // 2, 1) - 134.0)
    return float(_solve_scale(entries[occur].astype(np.float64), ulp, stored_norm))


def _occupied(entries: Array, *counts: Array) -> tuple[Floats, ...]:
    keep = entries > 0
    return tuple(count[keep].astype(np.float64) for count in (entries, *counts))


@njit(nogil=True, cache=True)
def _add_line_moments(in_class, rate, spread, entries, expected, variance):  # type: ignore[no-untyped-def] # pragma: no cover
    for e in range(len(rate)):
        for i in range(len(expected)):
            n = np.float64(in_class[e, i])
            expected[i] += rate[e] * n
            variance[i] += spread[e] * n * (entries[e] - n)


@njit(nogil=True, cache=True)
def _stay(codes, offsets, sigma):  # type: ignore[no-untyped-def] # pragma: no cover
    """P(a Gaussian step leaves each value in its rounding cell); the cell is half as deep inwards at a power of two."""
    found = np.empty(len(codes))
    for i in range(len(codes)):
        exponent, mantissa = codes[i] >> 7, codes[i] & 127
        ulp = 2.0 ** (max(exponent, 1) - 134.0)
        inwards = ulp / 4 if mantissa == 0 and exponent > 1 else ulp / 2
        root = sigma * math.sqrt(2.0)
        found[i] = (math.erf((ulp / 2 - offsets[i]) / root) + math.erf((inwards + offsets[i]) / root)) / 2
    return found


@njit(nogil=True, cache=True)
def _stored_square(entries, ulp, sigma):  # type: ignore[no-untyped-def] # pragma: no cover
    total = 0.0
    for e in range(len(entries)):
        if sigma > _SHEPPARD_FROM * ulp[e]:
            total += entries[e] * (sigma**2 + ulp[e] ** 2 / 12)
            continue
        summed = 0.0
        for j in range(_SHEPPARD_FROM * 8):
            beyond = math.erfc((j + 0.5) * ulp[e] / (sigma * math.sqrt(2.0)))
            if beyond == 0:
                break
            summed += (2 * j + 1) * beyond
        total += entries[e] * ulp[e] ** 2 * summed
    return total


@njit(nogil=True, cache=True)
def _solve_scale(entries, ulp, norm):  # type: ignore[no-untyped-def] # pragma: no cover
    """Bisection for the magnitude, then the secant, on logarithms, kept inside its bracket."""
    target = 2 * math.log(norm)
    low, high = math.log(norm) - 12 * math.log(10.0), math.log(norm)
    above, below = math.inf, -math.inf
    for step in range(100):
        middle = (low + high) / 2
        if step > 8 and math.isfinite(below) and math.isfinite(above):
            middle = low + (high - low) * min(max(-below / (above - below), 0.001), 0.999)
        square = _stored_square(entries, ulp, math.exp(middle))
        error = math.log(square) - target if square > 0 else -math.inf
        if error < 0:
            low, below = middle, error
            above = above / 2 if step > 8 else above
        else:
            high, above = middle, error
            below = below / 2 if step > 8 else below
        if high - low < 1e-15 * max(abs(low), 1.0) or error == 0:
            break
    return math.exp((low + high) / 2)
