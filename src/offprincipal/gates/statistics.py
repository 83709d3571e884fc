"""What batches, or draws, say of a mean: bootstrap intervals, sign tests, and how many of them would be enough.

Knows nothing of models: tables of sums in, numbers out.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
_AT_ONCE = 200
LEVEL = 0.95
POWER = 0.8


def resampled_means(sums: Array, tokens: Array) -> Array:
    """Bootstrap draws of Σ sums / Σ tokens, the batches drawn with replacement.

    Args:
        sums, tokens: (batches,).

    Returns:
        (RESAMPLES,). One batch gives no spread.
    """
    batches = len(sums)
    of_batches = np.random.default_rng(batches)  # the same for all tables of so many: they stay paired
    found = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, _AT_ONCE):
        by_batch = of_batches.multinomial(batches, np.full(batches, 1 / batches), size=_AT_ONCE)
        found[start : start + _AT_ONCE] = (by_batch @ sums) / (by_batch @ tokens)
    return found


def interval(draws: Array, units: int) -> tuple[float | None, float | None]:
    """The percentile interval of bootstrap draws; None where fewer than two units were drawn from.

    >>> [round(end, 6) for end in interval(np.arange(41.0), units=16)]
    [1.0, 39.0]
    """
    if units < 2 or not np.isfinite(draws).all():
        return None, None
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_with_interval(sums: Sequence[float] | Array, tokens: Sequence[int] | Array) -> dict[str, Any]:
    """Σ sums / Σ tokens with its bootstrap interval over units, as `gates.json` has it.

    Args:
        sums, tokens: of each unit, which is a sequence or a batch.

    >>> mean_with_interval([1.0, 1.0], [2, 2])
    {'value': 0.5, 'low': 0.5, 'high': 0.5, 'tokens': 4}
    """
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    low, high = interval(resampled_means(top, bottom), len(top))
    return {"value": float(top.sum() / bottom.sum()), "low": low, "high": high, "tokens": int(bottom.sum())}


def sign_test(differences: Sequence[float] | Array) -> float | None:
    """Two-sided sign-test p-value; zeros are dropped; None if no signs remain.

    Source: Conover, Practical Nonparametric Statistics, 3.4.

    >>> sign_test([1.0, 2.0, 0.5, 1.0, 3.0, 0.1])  # six of six: 2/2**6
    0.03125
    """
    signs = np.sign(np.asarray(differences))
    above, count = int((signs > 0).sum()), int((signs != 0).sum())
    if count == 0:
        return None
    tail = sum(math.comb(count, i) for i in range(min(above, count - above) + 1))
    return min(1.0, 2 * tail / (1 << count))


def standard_errors(differences: Sequence[float] | Array) -> float | None:
    """How many standard errors the mean of paired differences lies from zero; None without spread.

    >>> standard_errors([1.0, 3.0])
    2.0
    """
    found = np.asarray(differences, dtype=np.float64)
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    return float(found.mean()) * math.sqrt(len(found)) / spread if spread > 0 else None


def units_wanted(differences: Sequence[float] | Array) -> int | None:
    """Units with which a paired test at 5 % would find a difference like this with 80 % power; None without one.

    Source: the normal approximation with Guenther's correction for the t test (The American Statistician 35, 1981).

    >>> units_wanted([1.0, 3.0])  # half as much again as its standard deviation
    6
    """
    found = np.asarray(differences, dtype=np.float64)
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    if not spread > 0 or found.mean() == 0:
        return None
    at_level, at_power = NormalDist().inv_cdf((1 + LEVEL) / 2), NormalDist().inv_cdf(POWER)
    wanted = ((at_level + at_power) * spread / found.mean()) ** 2 + at_level**2 / 2
    return math.ceil(max(wanted, 2)) if math.isfinite(wanted) else None
