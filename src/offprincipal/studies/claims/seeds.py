"""Effects over repetitions: one value for each pair of runs that differ in nothing but what is asked, and Student's t.

A pair has one seed, so that prompts, samples and data order are shared as far as two policies let them be.
Knows nothing of claims.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offprincipal.comparison.pooling import Pooled

LEVEL = 0.95


@dataclass(frozen=True)
class OverPairs:
    """An effect in several pairs of runs.

    Args:
        by_pair: what tells the pair -> its effect.
        geometric: effects are ratios, so that their mean and interval are those of their logarithms.

    >>> OverPairs({"seed 1": 1.0, "seed 2": 3.0}).pooled().value
    2.0
    """

    by_pair: Mapping[str, float]
    geometric: bool = False

    @property
    def units(self) -> int:
        """How many pairs there are."""
        return len(self.by_pair)

    def pooled(self) -> Pooled:
        """Mean and interval over pairs; the interval is None for fewer than two."""
        if not self.by_pair:
            return Pooled(None, None, None, 0)
        values = list(self.by_pair.values())
        if self.geometric and min(values) <= 0:
            return Pooled(None, None, None, self.units)
        mean, low, high = student([math.log(value) for value in values] if self.geometric else values)
        back = math.exp if self.geometric else float
        ends = [None if end is None else back(end) for end in (low, high)]
        return Pooled(back(mean), ends[0], ends[1], self.units)


def student(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % interval of Student's t over independent repetitions.

    >>> mean, low, high = student([0.0, 1.0, 2.0])
    >>> mean, round(high, 3)
    (1.0, 3.484)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """The t that a Student variable stays within, either side, with probability 0.95.

    Args:
        degrees: of freedom, at least 1.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4, solved by bisection.

    >>> [round(t_quantile(degrees), 3) for degrees in (1, 3, 30)]
    [12.706, 3.182, 2.042]
    """
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < LEVEL else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    cosine, term, total = math.cos(angle), 1.0, 0.0
    power = cosine if odd else 1.0
    for place in range((degrees - odd) // 2):
        total += term * power
        top, bottom = (2 * place + 2, 2 * place + 3) if odd else (2 * place + 1, 2 * place + 2)
        term *= top / bottom
        power *= cosine**2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
