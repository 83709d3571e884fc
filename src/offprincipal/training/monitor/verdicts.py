"""Conditions on the figures of a monitor, for any matrix or only for the pooled value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offprincipal.measures.conditions import Threshold, parse_threshold
from offprincipal.training.monitor.table import METRICS

_POOLED = "pooled "


@dataclass(frozen=True)
class Watch:
    """A condition that is evaluated at every observation.

    Args:
        threshold: metric, operator and number.
        pooled: true: only the pooled value over all matrices counts; false: also the value of each matrix.
    """

    threshold: Threshold
    pooled: bool

    def held(self, rows: Sequence[Mapping[str, Any]], pooled: Mapping[str, Any]) -> str | None:
        """A message with the most extreme value that fulfils the condition; None if no value does.

        Args:
            rows: one per matrix.
            pooled: the pooled row.
        """
        metric = self.threshold.metric
        candidates = [pooled] if self.pooled else [*rows, pooled]
        holding = [row for row in candidates if self.threshold.held_by_value(row.get(metric))]
        if not holding:
            return None
        furthest = max(holding, key=lambda row: row[metric] if ">" in self.threshold.operator else -row[metric])
        tensors = [row for row in holding if row.get("tensor")]
        at = f"at step {pooled['step']}"
        if not furthest.get("tensor"):
            return f"{self.threshold}: pooled value {furthest[metric]:.6g}, {at}"
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        return f"{self.threshold}: {furthest[metric]:.6g} in {furthest['tensor']}{more}, {at}"


def parse_watch(text: str) -> Watch:
    """Parse a condition.

    Args:
        text: such as `spectral_shift_per_norm > .5` or `pooled kl_cumulative > 1`.

    Raises:
        ArgumentError: it is not a condition, or a monitor does not measure the metric.

    >>> watch = parse_watch("kl_cumulative > 1")
    >>> watch.held([], {"step": 7, "kl_cumulative": 1.5})
    'kl_cumulative > 1: pooled value 1.5, at step 7'
    """
    stripped = text.strip()
    only_pooled = stripped.startswith(_POOLED)
    return Watch(parse_threshold(stripped.removeprefix(_POOLED), list(METRICS)), only_pooled)
