"""When the monitor observes the model: every N steps, or as often as a time budget allows.

Knows only seconds and steps.
"""

from typing import Literal

from offprincipal.errors import ArgumentError

_ROUND = (1, 2, 5)
_SOME = 3  # steps; in a run of at least this many, one observation is few
_FAR = 20  # steps; a first observation before this one needs no warning


class Cadence:
    """Decides which steps are observed.

    With a number N these are the multiples of N. With `auto` they are the multiples of the smallest of 1, 2, 5, 10, 20,
    50, … at which observing, at the mean cost of the observations so far, takes at most the budget's share of the time
    of the steps. An observation that would raise the share of the whole run above the budget is skipped. When a run is
    repeated on the same machine, mostly the same steps are observed; this is not guaranteed.

    Args:
        every: steps between observations, or `auto`.
        budget: largest time of observing as a share of the training's own time, above 0 and at most 1.

    Raises:
        ArgumentError: an argument is out of range.
    """

    def __init__(self, every: int | Literal["auto"], budget: float) -> None:
        if every != "auto" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ArgumentError(f"every={every!r}: give a number of steps of at least 1, or 'auto'")
        if not (isinstance(budget, int | float) and 0 < budget <= 1):
            raise ArgumentError(
                f"budget={budget!r}: give a share of the training's time, above 0 and at most 1, such as 0.03"
            )
        self.every = every
        self.budget = budget
        self.spent = self.trained = 0.0
        self._steps = self._observations = 0
        self._estimate = 0.0

    @property
    def share(self) -> float | None:
        """Seconds of observing divided by seconds of training; None before the first step."""
        return self.spent / self.trained if self.trained > 0 else None

    def expect(self, seconds: float) -> None:
        """Add to the estimated seconds of an observation, which is used until the first one is made."""
        self._estimate += seconds

    def add_step(self, seconds: float) -> None:
        """Record the seconds of a training step."""
        self.trained += seconds
        self._steps += 1

    def add_cost(self, seconds: float, observed: bool) -> None:
        """Record the seconds of an observation, or of the decision not to observe."""
        self.spent += seconds
        self._observations += observed

    def missed(self) -> str | None:
        """A message if `auto` observed a run of several steps at most once; None otherwise.

        >>> cadence = Cadence("auto", 0.03)
        >>> for _ in range(20): cadence.add_step(0.05)
        >>> cadence.add_cost(0.3, observed=True)
        >>> print(cadence.missed())
        Only 1 of 20 steps were observed (steps of 0.05 s, observations of 0.3 s, a budget of 3 %)
        """
        if self.every != "auto" or self._observations > 1 or self._steps < _SOME:
            return None
        return f"Only {self._observations} of {self._steps} steps were observed ({self._times()})"

    def idle(self) -> str | None:
        """A message, once after the third step, if the first observation will be at step 20 or later; else None.

        >>> cadence = Cadence("auto", 0.03)
        >>> cadence.expect(0.3)
        >>> for _ in range(3): cadence.add_step(0.05)
        >>> print(cadence.idle().partition(". ")[0])
        No step before 200 will be observed (steps of 0.05 s, observations of 0.3 s, a budget of 3 %)
        """
        if self.every != "auto" or self._observations or self._steps != _SOME or self.trained <= 0:
            return None
        first = _round_up(self._cost / (self.budget * self.trained / self._steps))
        if first < _FAR:
            return None
        return (
            f"No step before {first} will be observed ({self._times()}). Set every=N or a larger budget, or pass "
            "last=True with the last step"
        )

    @property
    def _cost(self) -> float:
        """Seconds of an observation: the mean so far, or the estimate."""
        return self.spent / self._observations if self._observations else self._estimate

    def _times(self) -> str:
        step = self.trained / self._steps
        return f"steps of {step:.2g} s, observations of {self._cost:.2g} s, a budget of {100 * self.budget:.3g} %"

    def due(self, step: int) -> bool:
        """Whether the model is observed after this step.

        >>> cadence = Cadence("auto", 0.03)
        >>> cadence.expect(0.3); cadence.add_step(2.5)
        >>> [step for step in range(2, 30) if cadence.due(step)]
        []
        >>> for _ in range(9): cadence.add_step(2.5)
        >>> [step for step in range(2, 30) if cadence.due(step)]
        [5, 10, 15, 20, 25]
        """
        if self.every != "auto":
            return step % self.every == 0
        if self._steps == 0:
            return False
        mean = self.trained / self._steps
        cost = self._cost
        if self.spent + cost > self.budget * (self.trained + mean):
            return False
        return step % _round_up(cost / (self.budget * mean)) == 0 if mean > 0 else False


def _round_up(number: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is at least the number.

    >>> _round_up(0.1), _round_up(3.2), _round_up(60.0)
    (1, 5, 100)
    """
    scale = 1
    while True:
        for factor in _ROUND:
            if factor * scale >= number:
                return factor * scale
        scale *= 10
