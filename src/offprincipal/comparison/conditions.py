"""Conditions on pooled metrics, for pipelines: `principal_angle_left_max_deg > 10`."""

from dataclasses import dataclass
from typing import Any

from offprincipal.conditions import Threshold, parse_threshold
from offprincipal.measures.columns import GROUPS, Group, metrics_of

_LEFT_OUT = ("only_in_base", "only_in_run", "differing_unmeasured")  # numbers of tensors that were not compared


@dataclass(frozen=True)
class Condition(Threshold):
    """`metric operator threshold`, on the pooled value of a run."""

    def undefined_in(self, summary: dict[str, Any]) -> list[str]:
        """The runs whose value is undefined, so that the condition could not be checked."""
        return [run for run in summary["runs"] if self._value(summary, run) is None]

    def held_by(self, summary: dict[str, Any]) -> list[str]:
        """One phrase for each run in which the condition holds; an undefined metric holds no condition."""
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
        ArgumentError: it is not of the form `METRIC > NUMBER`, or names no pooled metric of these groups, nor a number
            of tensors that were left out: `only_in_base`, `only_in_run`, `differing_unmeasured`.

    >>> str(parse_condition("principal_angle_left_max_deg > 10"))
    'principal_angle_left_max_deg > 10'
    """
    pooled = [column.name for metric in metrics_of(groups) for column in metric.columns if column.pool != "none"]
    return Condition(**vars(parse_threshold(text, [*pooled, *_LEFT_OUT])))
