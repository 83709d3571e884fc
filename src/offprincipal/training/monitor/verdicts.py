"""Conditions on what a monitor measures: on any matrix, or on the pooled value alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offprincipal.measures.conditions import Threshold, parse_threshold
from offprincipal.training.monitor.table import METRICS

_POOLED = "pooled "


@dataclass(frozen=True)
class Watch:
    """A condition that is looked at whenever a model is observed.

    Args:
        threshold: metric, operator and number.
        pooled: whether only the value over all matrices counts; else that of any matrix counts too.
    """

    threshold: Threshold
    pooled: bool

    def held(self, rows: Sequence[Mapping[str, Any]], pooled: Mapping[str, Any]) -> str | None:
        """What fulfils the condition, the furthest value first; None where nothing does."""
        metric = self.threshold.metric
        looked_at = [pooled] if self.pooled else [*rows, pooled]
        found = [row for row in looked_at if self.threshold.held_by_value(row.get(metric))]
        if not found:
            return None
        furthest = max(found, key=lambda row: row[metric] if ">" in self.threshold.operator else -row[metric])
        tensors = [row for row in found if row.get("tensor")]
        at = f"at step {pooled['step']}"
        if not furthest.get("tensor"):
            return f"{self.threshold}: pooled value {furthest[metric]:.6g}, {at}"
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        return f"{self.threshold}: {furthest[metric]:.6g} in {furthest['tensor']}{more}, {at}"


def parse_watch(text: str) -> Watch:
    """The condition that a text states, such as `spectral_shift_per_norm > .5` or `pooled kl_cumulative > 1`.

    Raises:
        ArgumentError: it is no condition, or names nothing that a monitor measures.

    >>> watch = parse_watch("kl_cumulative > 1")
    >>> watch.held([], {"step": 7, "kl_cumulative": 1.5})
    'kl_cumulative > 1: pooled value 1.5, at step 7'
    """
    stripped = text.strip()
    only_pooled = stripped.startswith(_POOLED)
    return Watch(parse_threshold(stripped.removeprefix(_POOLED), list(METRICS)), only_pooled)
