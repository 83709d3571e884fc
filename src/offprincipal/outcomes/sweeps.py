"""Learning rates as a sweep: how high a method stays stable, and at which rate it makes a step of a given size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from offprincipal.outcomes import Row

Pair = tuple[int | None, int]  # rank and seed
Sweeps = Mapping[Pair, Sequence[Row]]

SAME_SIZE = 1.25  # runs whose sizes differ by a larger factor are not at equal step
STABLE_LOSS = 0.02  # of accuracy: a run that ends further below its base than this has collapsed


@dataclass(frozen=True)
class TriedRate:
    """One run of a sweep.

    Args:
        learning_rate: its rate. before, after: sampled accuracy on held-out prompts, of the base and of the run.
    """

    run: str
    learning_rate: float
    before: float
    after: float

    @property
    def stable(self) -> bool:
        """Whether it ends within `STABLE_LOSS` of its base, or above."""
        return self.after >= self.before - STABLE_LOSS


def highest_stable(tried: Sequence[TriedRate]) -> TriedRate | None:
    """The run of the highest rate below which, and at which, none collapsed; None if the lowest did.

    >>> tried = [TriedRate("a", 1e-3, 0.5, 0.6), TriedRate("b", 3e-3, 0.5, 0.2), TriedRate("c", 1e-2, 0.5, 0.5)]
    >>> highest_stable(tried).run
    'a'
    """
    found = None
    for one in sorted(tried, key=lambda one: one.learning_rate):
        if not one.stable:
            break
        found = one
    return found


def rate_for(wanted: float, rates: Sequence[float], sizes: Sequence[float]) -> float | None:
    """The lowest rate at which a size is reached, by straight lines between logarithms, prolonged beyond the ends.

    Args:
        wanted: the size, an update norm or a divergence.
        rates: rising. sizes: what each rate gave; those that are not positive are passed over.

    Returns:
        The rate; None where fewer than two sizes are known, or the end does not rise towards the wanted size.

    >>> round(rate_for(4.0, [1e-3, 1e-2], [1.0, 100.0]), 6), round(rate_for(400.0, [1e-3, 1e-2], [1.0, 100.0]), 6)
    (0.002, 0.02)
    """
    known = [(math.log(rate), math.log(size)) for rate, size in zip(rates, sizes, strict=True) if size > 0]
    if len(known) < 2 or wanted <= 0:
        return None
    goal = math.log(wanted)
    pairs = list(pairwise(known))
    between = [pair for pair in pairs if pair[0][1] <= goal <= pair[1][1]]
    (x0, y0), (x1, y1) = between[0] if between else pairs[0] if goal < known[0][1] else pairs[-1]
    if y1 <= y0:
        return None
    return math.exp(x0 + (goal - y0) * (x1 - x0) / (y1 - y0))


def sweeps_of(rows: Sequence[Row], method: str) -> dict[Pair, list[Row]]:
    """Rank and seed -> the runs of a low-rank method by rising learning rate, without those at matched rates."""
    found: dict[Pair, list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["learning_rate"])):
        if row["method"] == method and row["rank"] is not None and row["matched_by"] is None:
            found.setdefault((row["rank"], row["seed"]), []).append(row)
    return dict(sorted(found.items()))


def tried_rate(row: Row) -> TriedRate:
    """A run's row as a rate that was tried."""
    return TriedRate(row["run"], row["learning_rate"], row["base_accuracy"], row["sampled_accuracy"])


def stable_run(sweep: Sequence[Row]) -> Row | None:
    """The run at the highest stable rate; None if the lowest collapsed."""
    found = highest_stable([tried_rate(row) for row in sweep])
    return None if found is None else next(row for row in sweep if row["run"] == found.run)


def open_end(sweep: Sequence[Row]) -> Literal["above", "below"] | None:
    """On which side the highest stable rate is not bounded: above where no run collapsed, below where the lowest did.

    >>> run = {"run": "a", "learning_rate": 1e-3, "base_accuracy": 0.5, "sampled_accuracy": 0.6}
    >>> open_end([run]), open_end([run | {"sampled_accuracy": 0.1}])
    ('above', 'below')
    """
    found = stable_run(sweep)
    if found is None:
        return "below"
    return "above" if found["run"] == sweep[-1]["run"] else None


def at_equal_size(row: Row) -> bool:
    """Whether a run at a matched rate came to about the size that it was to have.

    >>> at_equal_size({"matched_ratio": 0.9}), at_equal_size({"matched_ratio": 2.0})
    (True, False)
    """
    return 1 / SAME_SIZE <= float(row["matched_ratio"]) <= SAME_SIZE


def best_accuracy(sweep: Sequence[Row]) -> float:
    """The highest accuracy of its runs."""
    return max(float(row["sampled_accuracy"]) for row in sweep)
