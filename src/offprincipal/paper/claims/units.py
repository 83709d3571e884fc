"""Effects over units: one value for each run, or for each pair of runs that differ in what is asked; Student's t.

The run is the unit. Matrices of one run, its steps and its tensors share all that happened to it, and draws of one
direction share that: they are not counted. A pair has one seed and one set of tasks, so that prompts, samples and data
order are shared as far as two policies let them be; where runs are not paired, two samples are compared.
Knows nothing of claims.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offprincipal.geometry.students_t import student, t_quantile


@dataclass(frozen=True)
class Interval:
    """A mean over units with its 95 % interval, None if it is undefined, and how many units it has."""

    value: float | None
    low: float | None
    high: float | None
    units: int


@dataclass(frozen=True)
class OverUnits:
    """An effect in several units.

    Args:
        by_unit: what tells the unit -> its effect.
        geometric: effects are ratios, so that their mean and interval are those of their logarithms.
        what: the units, in words.

    >>> OverUnits({"seed 1": 1.0, "seed 2": 3.0}).interval().value
    2.0
    """

    by_unit: Mapping[str, float]
    geometric: bool = False
    what: str = "runs"

    def interval(self) -> Interval:
        """Mean and Student's interval over units; the interval is None for fewer than two."""
        values = list(self.by_unit.values())
        if not values or (self.geometric and min(values) <= 0):
            return Interval(None, None, None, len(values))
        return _back(student(_logarithms(values) if self.geometric else values), self.geometric, len(values))


@dataclass(frozen=True)
class TwoSamples:
    """The mean of one set of runs minus that of another, or over it where effects are ratios.

    Args:
        one, two: an effect of each run, of either set.

    Source: Welch 1947, with the degrees of freedom rounded down.

    >>> TwoSamples([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]).interval().value
    2.0
    """

    one: Sequence[float]
    two: Sequence[float]
    geometric: bool = False
    what: str = "runs of either kind"

    def interval(self) -> Interval:
        """The difference and its interval, which is None with fewer than two runs on either side."""
        units = min(len(self.one), len(self.two))
        if not units or (self.geometric and min(*self.one, *self.two) <= 0):
            return Interval(None, None, None, units)
        sides = [_logarithms(side) if self.geometric else side for side in (self.one, self.two)]
        mean = statistics.fmean(sides[0]) - statistics.fmean(sides[1])
        if units < 2:
            return _back((mean, None, None), self.geometric, units)
        parts = [statistics.variance(side) / len(side) for side in sides]
        freedom = sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
        degrees = math.floor(sum(parts) ** 2 / freedom) if freedom > 0 else units - 1
        half = t_quantile(max(degrees, 1)) * math.sqrt(sum(parts))
        return _back((mean, mean - half, mean + half), self.geometric, units)


Effect = OverUnits | TwoSamples


def over_runs_of_pairs(by_pair: Mapping[tuple[str, str], float], geometric: bool = False) -> OverUnits:
    """An effect of pairs of runs, as one value a run: pairs that share a run are not independent, runs are.

    The jackknife's pseudo-values: R times the mean over all pairs, less R − 1 times that over the pairs without a run.

    Args:
        by_pair: every pair of R runs -> its effect; of two runs there is one pair, and no interval. Nor is there one
            where a pair is missing, as that of two runs that changed nothing: the jackknife needs them all.

    Source: Arvesen 1969, jackknifing U-statistics.

    >>> over_runs_of_pairs({("a", "b"): 1.0, ("a", "c"): 2.0, ("b", "c"): 3.0}).by_unit
    {'a': 0.0, 'b': 2.0, 'c': 4.0}
    """
    runs = list(dict.fromkeys(run for pair in by_pair for run in pair))
    if len(runs) < 3 or (geometric and min(by_pair.values(), default=1.0) <= 0):
        return OverUnits({" and ".join(pair): value for pair, value in by_pair.items()}, geometric)
    values = {pair: math.log(value) if geometric else value for pair, value in by_pair.items()}
    whole, pseudo = statistics.fmean(values.values()), {}
    if len(values) < math.comb(len(runs), 2):
        return OverUnits({"the pairs that are defined": math.exp(whole) if geometric else whole}, geometric)
    for run in runs:
        without = statistics.fmean(value for pair, value in values.items() if run not in pair)
        pseudo[run] = len(runs) * whole - (len(runs) - 1) * without
    return OverUnits({run: math.exp(value) if geometric else value for run, value in pseudo.items()}, geometric)


def _logarithms(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values]


def _back(found: tuple[float, float | None, float | None], geometric: bool, units: int) -> Interval:
    mean, low, high = (None if end is None else math.exp(end) if geometric else end for end in found)
    return Interval(mean, low, high, units)
