"""When to look: every so many steps, or as often as a budget of time allows.

Knows seconds and steps alone.
"""

from typing import Literal

from offprincipal.errors import ArgumentError

_ROUND = (1, 2, 5)
_SOME = 3  # steps, of which one observation is few
_FAR = 20  # steps, before which a first observation is soon enough


class Cadence:
    """Which steps are observed.

    With a number it is every multiple of that. With `auto` it is the multiples of the smallest of 1, 2, 5, 10, 20, 50
    and so on at which an observation, at the mean cost of those so far, takes at most the budget's share of the steps'
    own time; and none that would lift the share of the whole run above it. So a run that is repeated on the same
    machine mostly looks at the same steps, but is not bound to.

    Args:
        every: steps between observations, or `auto`.
        budget: share of the training's own time that observing may take, at most all of it.

    Raises:
        ArgumentError: either is out of range.
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
        """Seconds spent observing over those of training; None before the first step."""
        return self.spent / self.trained if self.trained > 0 else None

    def expect(self, seconds: float) -> None:
        """What an observation is estimated to take before the first was made."""
        self._estimate += seconds

    def add_step(self, seconds: float) -> None:
        """A step of training took so long."""
        self.trained += seconds
        self._steps += 1

    def add_cost(self, seconds: float, observed: bool) -> None:
        """Observing took so long, or looking whether to."""
        self.spent += seconds
        self._observations += observed

    def missed(self) -> str | None:
        """Why a run of some steps was observed once at most, in words; None where it was more often, or as asked.

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
        """Said once, after some steps: that the first observation is far off; None where it is not, or at other steps.

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
        """Seconds of an observation: the mean of those so far, or the estimate."""
        return self.spent / self._observations if self._observations else self._estimate

    def _times(self) -> str:
        step = self.trained / self._steps
        return f"steps of {step:.2g} s, observations of {self._cost:.2g} s, a budget of {100 * self.budget:.3g} %"

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be observed.

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
    """The smallest of 1, 2, 5, 10, 20, 50, … that is no smaller.

    >>> _round_up(0.1), _round_up(3.2), _round_up(60.0)
    (1, 5, 100)
    """
    scale = 1
    while True:
        for factor in _ROUND:
            if factor * scale >= number:
                return factor * scale
        scale *= 10
