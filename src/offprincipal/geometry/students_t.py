"""Student's t: the mean of a few independent repetitions, and its interval. Knows nothing of what they are."""

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95


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
