"""Learning rates as a ladder: how high a method stays stable, and at which rate it makes a step of a given size.

Knows runs by their figures; knows nothing of folders or trainers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

STABLE_LOSS = 0.02  # of accuracy: a run that ends further below its base than this has collapsed


@dataclass(frozen=True)
class Rung:
    """One run of a ladder.

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


def highest_stable(rungs: Sequence[Rung]) -> Rung | None:
    """The run of the highest rate below which, and at which, none collapsed; None where the lowest did.

    >>> rungs = [Rung("a", 1e-3, 0.5, 0.6), Rung("b", 3e-3, 0.5, 0.2), Rung("c", 1e-2, 0.5, 0.5)]
    >>> highest_stable(rungs).run
    'a'
    """
    found = None
    for rung in sorted(rungs, key=lambda rung: rung.learning_rate):
        if not rung.stable:
            break
        found = rung
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
