"""Conditions on named values: `principal_angle_left_max_deg > 10`. Knows nothing of where the values come from."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offprincipal.errors import ArgumentError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_FORM = re.compile(r"^\s*(\w+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$")


@dataclass(frozen=True)
class Threshold:
    """`metric operator threshold`."""

    metric: str
    operator: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.threshold:g}"

    def held_by_value(self, value: float | None) -> bool:
        """Whether a value of the metric fulfils it; an undefined one does not.

        >>> parse_threshold("x > 1", ["x"]).held_by_value(2.0), parse_threshold("x > 1", ["x"]).held_by_value(None)
        (True, False)
        """
        return value is not None and _OPERATORS[self.operator](value, self.threshold)


def parse_threshold(text: str, names: Sequence[str]) -> Threshold:
    """The condition that a text states.

    Args:
        names: the metrics that are measured.

    Raises:
        ArgumentError: it is not of the form `METRIC > NUMBER`, or names no metric of these.

    >>> str(parse_threshold("spectral_shift > .5", ["spectral_shift"]))
    'spectral_shift > 0.5'
    """
    match = _FORM.match(text)
    if not match:
        raise ArgumentError(f"'{text}' is no condition: write METRIC > NUMBER, with one of > >= < <=")
    if match[1] not in names:
        close = [name for name in names if match[1] in name or name in match[1]]
        raise ArgumentError(f"no metric '{match[1]}' is measured for '{text}': choose of {', '.join(close or names)}")
    return Threshold(match[1], match[2], float(match[3]))
