"""Pooling: one number per run and metric over its matrices, with a bootstrap interval over matrices.

Every pool is a ratio of two sums over matrices, so a resample is a reweighting of both. The interval speaks of the
spread between matrices of one run; it says nothing of how another seed would have turned out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.cuts import MASKS
from offprincipal.measures.columns import METRICS, RUNGS

RESAMPLES = 1000
STEPS = ("random", "rounding", "spacing", "margins", "measured")
_LEVEL = 0.95
_SEED = 20251111

_COLUMNS = {column.name: column for metric in METRICS for column in metric.columns}

Row = Mapping[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pooled:
    """A pooled value, its 95 % bootstrap interval over matrices, and how many matrices it has; None if undefined."""

    value: float | None
    low: float | None
    high: float | None
    matrices: int

    def as_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "matrices": self.matrices}


@dataclass(frozen=True)
class _Pool:
    """f(Σ top / Σ bottom), over rows if all `needs` are known."""

    top: Callable[[Row, str], float]
    bottom: Callable[[Row, str], float]
    finish: Callable[[Array, Array], Array] = np.divide
    linear_only: bool = True


def _information(row: Row, name: str) -> float:
    """What a matrix tells of a log-odds."""
    return float(row[f"{_stem(name)}_log_odds_se"] ** -2)


def _score(row: Row, name: str) -> float:
    return float(row[f"{_stem(name)}_log_odds"]) * _information(row, name)


def _stem(name: str) -> str:
    return name.removesuffix("_se").removesuffix("_log_odds").removesuffix("_z")


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
    "log_odds": _Pool(_score, _information),
    "log_odds_se": _Pool(_information, _information, lambda _, bottom: 1 / np.sqrt(bottom)),
    "z": _Pool(_score, _information, _over_root),
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
    """One metric over the rows of one run; a null over the matrices of its figure, so that both are of the same ones.

    Args:
        name: a pooled column of the registry.
        rows: of `matrices.parquet`, one run.
    """
    column = _COLUMNS[name]
    pool = _POOLS[column.pool]
    counted = [row for row in rows if row["linear"] or not pool.linear_only]
    known = "update_norm" if column.pool == "relative_norm" else name  # of a zero base that is defined, too
    needs = (known, column.beside or known)
    parts = [
        (0.0, 0.0) if any(row[need] is None for need in needs) else (pool.top(row, name), pool.bottom(row, name))
        for row in counted
    ]
    return estimate_ratio(parts, pool.finish)


def anatomy(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mask -> what each rung of the ladder of nulls puts into it, up to what was measured: pooled by counts.

    Over the linear matrices if every rung is defined, so that differences of rungs compare the same entries.

    Args:
        rows: of `matrices.parquet`, one run.
    """
    found = {}
    for mask in MASKS:
        names = [f"{mask}_overlap_{rung}" for rung in RUNGS] + [f"{mask}_overlap"]
        known = [row for row in rows if row["linear"] and all(row.get(name) is not None for name in names)]
        changed = sum(row["changed_count"] for row in known)
        if changed:
            pooled = (sum(row[name] * row["changed_count"] for row in known) / changed for name in names)
            found[mask] = dict(zip(STEPS, pooled, strict=True))
    return found


def pool_pair(rows: Sequence[Row]) -> dict[str, float | None]:
    """Jaccard of two runs over all their matrices, by counts, with every rung of the ladder and an interval.

    Args:
        rows: of `pairs.parquet`, one pair of runs.
    """
    measured = jaccard_estimate(rows, "measured").pooled()
    tested = [row for row in rows if row["jaccard_log_odds"] is not None]
    information = sum(_information(row, "jaccard_z") for row in tested)
    score = sum(_score(row, "jaccard_z") for row in tested)
    moved = [row for row in rows if row["update_cosine"] is not None]
    product = sum(row["update_cosine"] * row["update_norm_a"] * row["update_norm_b"] for row in moved)
    norms = [math.sqrt(sum(row[f"update_norm_{side}"] ** 2 for row in rows)) for side in ("a", "b")]
    return {
        "jaccard": measured.value,
        "low": measured.low,
        "high": measured.high,
        **{f"jaccard_{rung}": jaccard_estimate(rows, rung).pooled().value for rung in RUNGS},
        "jaccard_z": score / math.sqrt(information) if information else None,
        "jaccard_log_odds": score / information if information else None,
        "jaccard_log_odds_se": 1 / math.sqrt(information) if information else None,
        "update_cosine": product / (norms[0] * norms[1]) if moved else None,
    }


def jaccard_estimate(rows: Sequence[Row], which: str) -> "Estimate":
    """Jaccard of two runs over all their matrices by counts: as measured, or as a null expects it.

    Args:
        rows: of `pairs.parquet`, one pair of runs.
        which: `measured`, or a rung: `random`, `rounding_null`, `spacing_null`, `margin_null`.
    """

    def intersection(row: Row) -> float | None:
        if which == "random":
            return float(row["changed_a"] * row["changed_b"] / row["numel"])
        found: float | None = row["intersection" if which == "measured" else f"intersection_{which}"]
        return found

    found = [(intersection(row), row) for row in rows]
    return estimate_ratio(
        [(0.0, 0.0) if both is None else (both, row["changed_a"] + row["changed_b"] - both) for both, row in found]
    )


@dataclass(frozen=True)
class Estimate:
    """A pooled value with its bootstrap draws over matrices; arithmetic keeps draws together: differences are paired.

    Args:
        value: the pooled value; NaN if undefined.
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
        """Value and percentile interval; None if undefined, the interval also where too many draws are."""
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
    """finish(Σ top, Σ bottom) over matrices, with its bootstrap draws; a matrix with bottom 0 is ignored.

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
    """How often each matrix is drawn, (1 + RESAMPLES, count): once each for the value, then in every resample."""
    if not count:
        return np.ones((1 + RESAMPLES, 0))
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.vstack([np.ones(count), drawn])
