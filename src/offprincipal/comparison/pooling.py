"""Pooling: one number per run and metric over its matrices, with a bootstrap interval over matrices.

Every pool is a ratio of two sums over matrices, so a resample is a reweighting of both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.comparison.registry import METRICS, Column

RESAMPLES = 1000
_LEVEL = 0.95
_SEED = 20251111

Row = Mapping[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pooled:
    """A pooled value, its 95 % bootstrap interval over matrices, and how many matrices it has; None where undefined."""

    value: float | None
    low: float | None
    high: float | None
    matrices: int

    def as_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "matrices": self.matrices}


@dataclass(frozen=True)
class _Pool:
    """f(Σ top / Σ bottom), over rows where all `needs` are known."""

    top: Callable[[Row, str], float]
    bottom: Callable[[Row, str], float]
    finish: Callable[[Array, Array], Array] = np.divide
    linear_only: bool = True


def _z_top(row: Row, name: str) -> float:
    overlap = name.removesuffix("_z")
    return float(row["changed_count"] * (row[overlap] - row[f"{overlap}_precision_null"]))


def _z_bottom(row: Row, name: str) -> float:
    return float((row["changed_count"] * row[f"{name.removesuffix('_z')}_precision_null_sd"]) ** 2)


def _over_root(top: Array, bottom: Array) -> Array:
    return top / np.sqrt(bottom)


def _root_ratio(top: Array, bottom: Array) -> Array:
    return np.sqrt(top / bottom)


_POOLS: dict[str, _Pool] = {
    "entries": _Pool(lambda r, n: r[n] * r["numel"], lambda r, n: r["numel"], linear_only=False),
    "changed": _Pool(lambda r, n: r[n] * r["changed_count"], lambda r, n: r["changed_count"]),
    "parameters": _Pool(lambda r, n: r[n] * r["numel"], lambda r, n: r["numel"]),
    "norm": _Pool(lambda r, n: r[n] ** 2, lambda r, n: 1.0, lambda top, _: np.sqrt(top)),
    "relative_norm": _Pool(lambda r, n: r["update_norm"] ** 2, lambda r, n: r["base_norm"] ** 2, _root_ratio),
    "z": _Pool(_z_top, _z_bottom, _over_root),
}


def pool_run(rows: Sequence[Row]) -> dict[str, Pooled]:
    """Metric -> pooled value over the rows of one run, for every metric that its rows have.

    Args:
        rows: of `matrices.parquet`, one run.
    """
    present = rows[0].keys() if rows else ()
    columns = [column for metric in METRICS for column in metric.columns]
    return {c.name: _pool_column(c, rows) for c in columns if c.pool != "none" and c.name in present}


def _pool_column(column: Column, rows: Sequence[Row]) -> Pooled:
    pool = _POOLS[column.pool]
    used = [row for row in rows if row[column.name] is not None and (row["linear"] or not pool.linear_only)]
    return pool_ratio(
        ((pool.top(row, column.name), pool.bottom(row, column.name)) for row in used), pool.finish
    )


def pool_ratio(parts: Iterable[tuple[float, float]], finish: Callable[[Array, Array], Array] = np.divide) -> Pooled:
    """finish(Σ top, Σ bottom) with a percentile bootstrap interval over the parts.

    >>> pool_ratio([(1.0, 2.0), (1.0, 2.0)])
    Pooled(value=0.5, low=0.5, high=0.5, matrices=2)
    """
    table = np.array(list(parts), dtype=np.float64).reshape(-1, 2)
    count = len(table)
    top, bottom = table.sum(axis=0)
    if bottom <= 0:
        return Pooled(None, None, None, count)
    resamples = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    tops, bottoms = (resamples @ table).T
    drawn = finish(tops[bottoms > 0], bottoms[bottoms > 0])
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Pooled(float(finish(top, bottom)), float(low), float(high), count)


def pool_pair(rows: Sequence[Row]) -> dict[str, float | None]:
    """Jaccard of two runs over all their matrices, by counts, with both nulls and an interval.

    Args:
        rows: of `pairs.parquet`, one pair of runs.
    """

    def ratio(intersection: Callable[[Row], float]) -> Pooled:
        parts = [(intersection(row), row["changed_a"] + row["changed_b"] - intersection(row)) for row in rows]
        return pool_ratio(parts)

    measured = ratio(lambda row: row["intersection"])
    beyond = sum(row["intersection"] - row["intersection_precision_null"] for row in rows)
    variance = sum(row["intersection_precision_null_sd"] ** 2 for row in rows)
    return {
        "jaccard": measured.value,
        "low": measured.low,
        "high": measured.high,
        "jaccard_random": ratio(lambda row: row["changed_a"] * row["changed_b"] / row["numel"]).value,
        "jaccard_precision_null": ratio(lambda row: row["intersection_precision_null"]).value,
        "jaccard_z": beyond / variance**0.5 if variance > 0 else None,
    }
