"""Pooling: one number per run and metric over its matrices, with a bootstrap interval over matrices.

Every pool is a ratio of two sums over matrices, so a resample is a reweighting of both. The interval speaks of the
spread between matrices of one run; it says nothing of how another seed would have turned out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from offprincipal.comparison.registry import METRICS

RESAMPLES = 1000
_LEVEL = 0.95
_SEED = 20251111

_COLUMNS = {column.name: column for metric in METRICS for column in metric.columns}

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
    pooled = [c.name for metric in METRICS for c in metric.columns if c.pool != "none" and c.name in present]
    return {name: pool_column(name, rows).pooled() for name in pooled}


def pool_column(name: str, rows: Sequence[Row]) -> "Estimate":
    """One metric over the rows of one run.

    Args:
        name: a pooled column of the registry.
        rows: of `matrices.parquet`, one run.
    """
    column = _COLUMNS[name]
    pool = _POOLS[column.pool]
    counted = [row for row in rows if row["linear"] or not pool.linear_only]
    parts = [(pool.top(row, name), pool.bottom(row, name)) if row[name] is not None else (0.0, 0.0) for row in counted]
    return estimate_ratio(parts, pool.finish)


def pool_pair(rows: Sequence[Row]) -> dict[str, float | None]:
    """Jaccard of two runs over all their matrices, by counts, with both nulls and an interval.

    Args:
        rows: of `pairs.parquet`, one pair of runs.
    """
    measured = jaccard_estimate(rows, "measured").pooled()
    known = [row for row in rows if row["intersection_precision_null"] is not None]
    beyond = sum(row["intersection"] - row["intersection_precision_null"] for row in known)
    variance = sum(row["intersection_precision_null_sd"] ** 2 for row in known)
    return {
        "jaccard": measured.value,
        "low": measured.low,
        "high": measured.high,
        "jaccard_random": jaccard_estimate(rows, "random").pooled().value,
        "jaccard_precision_null": jaccard_estimate(rows, "precision_null").pooled().value,
        "jaccard_z": beyond / variance**0.5 if variance > 0 else None,
    }


def jaccard_estimate(rows: Sequence[Row], which: Literal["measured", "random", "precision_null"]) -> "Estimate":
    """Jaccard of two runs over all their matrices by counts: as measured, or as a null expects it.

    Args:
        rows: of `pairs.parquet`, one pair of runs.
    """
    intersections: dict[str, Callable[[Row], float | None]] = {
        "measured": lambda row: row["intersection"],
        "random": lambda row: row["changed_a"] * row["changed_b"] / row["numel"],
        "precision_null": lambda row: row["intersection_precision_null"],
    }
    intersection = intersections[which]
    found = [(intersection(row), row) for row in rows]
    return estimate_ratio(
        [(0.0, 0.0) if both is None else (both, row["changed_a"] + row["changed_b"] - both) for both, row in found]
    )


@dataclass(frozen=True)
class Estimate:
    """A pooled value with its bootstrap draws over matrices; arithmetic keeps draws together: differences are paired.

    Args:
        value: the pooled value; NaN where undefined.
        draws: (RESAMPLES,), the same resamples for every estimate over the same number of matrices.
        matrices: how many matrices it has.

    >>> a = estimate_ratio([(1.0, 2.0), (2.0, 2.0)])
    >>> (a - a).pooled()
    Pooled(value=0.0, low=0.0, high=0.0, matrices=2)
    """

    value: float
    draws: Array
    matrices: int

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value + other.value, self.draws + other.draws, min(self.matrices, other.matrices))

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - other.draws, min(self.matrices, other.matrices))

    def __truediv__(self, other: "Estimate") -> "Estimate":
        value = self.value / other.value if other.value else math.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(value, self.draws / other.draws, min(self.matrices, other.matrices))

    def scaled(self, factor: float) -> "Estimate":
        """The estimate times a number."""
        return Estimate(self.value * factor, self.draws * factor, self.matrices)

    def pooled(self) -> Pooled:
        """Value and percentile interval; None where undefined, the interval also where too many draws are."""
        if not math.isfinite(self.value):
            return Pooled(None, None, None, self.matrices)
        drawn = self.draws[np.isfinite(self.draws)]
        if self.matrices < 2 or len(drawn) < (1 + _LEVEL) / 2 * len(self.draws):
            return Pooled(self.value, None, None, self.matrices)
        low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        return Pooled(self.value, float(low), float(high), self.matrices)


def estimate_ratio(
    parts: Sequence[tuple[float, float]], finish: Callable[[Array, Array], Array] = np.divide
) -> Estimate:
    """finish(Σ top, Σ bottom) over matrices, with its bootstrap draws; a matrix with bottom 0 has no say.

    >>> estimate_ratio([(1.0, 2.0), (1.0, 2.0)]).value
    0.5
    """
    table = np.array(parts, dtype=np.float64).reshape(-1, 2)
    count = len(table)
    tops, bottoms = (_weights(count) @ table).T
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(bottoms > 0, finish(tops, bottoms), math.nan)
    return Estimate(float(found[0]), found[1:], int((table[:, 1] > 0).sum()))


@lru_cache(maxsize=8)
def _weights(count: int) -> Array:
    """How often each of so many matrices is drawn: once each for the value, then in every resample."""
    if not count:
        return np.ones((1 + RESAMPLES, 0))
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.vstack([np.ones(count), drawn])
