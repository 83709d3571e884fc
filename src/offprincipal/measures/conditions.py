"""Conditions on named values, and on the pooled figures of a comparison: `principal_angle_left_max_deg > 10`."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offprincipal.errors import ArgumentError, meant
from offprincipal.measures.columns import GROUPS, Group, metrics_of

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_LEFT_OUT = ("only_in_base", "only_in_run", "differing_unmeasured")  # counts of tensors that were not compared
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
        """Whether a value of the metric satisfies it; an undefined value does not.

        >>> parse_threshold("x > 1", ["x"]).held_by_value(2.0), parse_threshold("x > 1", ["x"]).held_by_value(None)
        (True, False)
        """
        return value is not None and _OPERATORS[self.operator](value, self.threshold)


def parse_threshold(text: str, names: Sequence[str]) -> Threshold:
    """The condition that a text states.

    Args:
        names: the metrics that are measured.

    Raises:
        ArgumentError: it does not have the form `METRIC > NUMBER`, or the metric is not one of these.

    >>> str(parse_threshold("spectral_shift > .5", ["spectral_shift"]))
    'spectral_shift > 0.5'
    """
    match = _FORM.match(text)
    if not match:
        raise ArgumentError(f"'{text}' is not a condition: write METRIC > NUMBER, with one of > >= < <=")
    if match[1] not in names:
        close = [name for name in names if match[1] in name or name in match[1]]
        few = f"there are {', '.join(close)}" if close else "`offprincipal compare --list` lists all metrics"
        hint = meant(match[1], names, few)
        raise ArgumentError(f"no metric '{match[1]}' is measured for '{text}': {hint}")
    return Threshold(match[1], match[2], float(match[3]))


@dataclass(frozen=True)
class Condition(Threshold):
    """`metric operator threshold`, on the pooled value of a run."""

    def undefined_in(self, summary: dict[str, Any]) -> list[str]:
        """The runs whose value is undefined, so that the condition could not be checked."""
        return [run for run in summary["runs"] if self._value(summary, run) is None]

    def held_by(self, summary: dict[str, Any]) -> list[str]:
        """One phrase for each run in which the condition is true; an undefined metric satisfies no condition."""
        found = []
        for run in summary["runs"]:
            value = self._value(summary, run)
            if self.held_by_value(value):
                found.append(f"{run}: {self.metric} is {value:.6g}, {self.operator} {self.threshold:g}")
        return found

    def _value(self, summary: dict[str, Any], run: str) -> float | None:
        entry = summary["runs"][run]
        if self.metric in _LEFT_OUT:
            found = (summary if self.metric == "only_in_base" else entry)[self.metric]
            return len(found) if isinstance(found, list) else float(found)
        value: float | None = entry["metrics"].get(self.metric, {}).get("value")
        return value


def parse_condition(text: str, groups: tuple[Group, ...] = GROUPS) -> Condition:
    """The condition that a text states.

    Args:
        groups: the metric groups that are measured.

    Raises:
        ArgumentError: it does not have the form `METRIC > NUMBER`, or the metric is neither a pooled metric of these
            groups nor a count of tensors that were not compared: `only_in_base`, `only_in_run`, `differing_unmeasured`.

    >>> str(parse_condition("principal_angle_left_max_deg > 10"))
    'principal_angle_left_max_deg > 10'
    """
    pooled = [column.name for metric in metrics_of(groups) for column in metric.columns if column.pool != "none"]
    return Condition(**vars(parse_threshold(text, [*pooled, *_LEFT_OUT])))
