"""Conditions on pooled metrics, for pipelines: `principal_angle_left_max_deg > 10`."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offprincipal.comparison.registry import GROUPS, Group, metrics_of
from offprincipal.errors import ArgumentError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_FORM = re.compile(r"^\s*(\w+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$")


@dataclass(frozen=True)
class Condition:
    """`metric operator threshold`, on the pooled value of a run."""

    metric: str
    operator: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.threshold:g}"

    def undefined_in(self, summary: dict[str, Any]) -> list[str]:
        """The runs whose value is undefined, so that the condition could not be checked."""
        runs = summary["runs"].items()
        return [run for run, entry in runs if entry["metrics"].get(self.metric, {}).get("value") is None]

    def held_by(self, summary: dict[str, Any]) -> list[str]:
        """One phrase for each run in which the condition holds; an undefined metric holds no condition."""
        found = []
        for run, entry in summary["runs"].items():
            value = entry["metrics"].get(self.metric, {}).get("value")
            if value is not None and _OPERATORS[self.operator](value, self.threshold):
                found.append(f"{run}: {self.metric} is {value:.6g}, {self.operator} {self.threshold:g}")
        return found


def parse_condition(text: str, groups: tuple[Group, ...] = GROUPS) -> Condition:
    """The condition that a text states.

    Args:
        groups: the metric groups that are measured.

    Raises:
        ArgumentError: it is not of the form `METRIC > NUMBER`, or names no pooled metric of these groups.

    >>> str(parse_condition("principal_angle_left_max_deg > 10"))
    'principal_angle_left_max_deg > 10'
    """
    match = _FORM.match(text)
    if not match:
        raise ArgumentError(f"'{text}' is no condition: write METRIC > NUMBER, with one of > >= < <=")
    pooled = [column.name for metric in metrics_of(groups) for column in metric.columns if column.pool != "none"]
    if match[1] not in pooled:
        close = [name for name in pooled if match[1] in name or name in match[1]]
        raise ArgumentError(f"no metric '{match[1]}' is measured for '{text}': choose of {', '.join(close or pooled)}")
    return Condition(match[1], match[2], float(match[3]))
