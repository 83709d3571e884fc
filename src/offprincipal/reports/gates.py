"""Tables of `gates.json` for the terminal. Reads and formats; computes no metric."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table


def gates_tables(content: Mapping[str, Any]) -> Group:
    """Divergence, the curve, the norm bound, and the curvature with its paired tests.

    Args:
        content: `gates.json`.
    """
    runs = content["runs"]
    parts: list[RenderableType] = [
        "Gate I: divergence from the base, nats a token",
        _divergence_table(runs),
        "KL over ½ΔᵀFΔ along the line from the base (1 where the second order says all)",
        _curve_table(runs),
        "Gate II: curvature per unit norm, all linear matrices at once",
        _curvature_table(runs),
        "paired differences, batch by batch",
        _pairs_table(runs),
    ]
    for name, entry in runs.items():
        parts += [f"{escape(name)}: {escape(warning)}" for warning in entry["warnings"]]
    return Group(*parts)


def _divergence_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", "weights", "samples of", box=SIMPLE)
    for title in ("KL(tuned‖base)", "95 % interval", "tokens", "‖Δ‖_F(θ)", "√(2K)", "tightness"):
        table.add_column(title, justify="right")
    for name, entry in runs.items():
        for i, (samples, kl) in enumerate(entry["kl_by_samples"].items()):
            bound = entry["norm_bound"] if samples != "tuned" else {}
            cells = [_number(bound.get(key)) for key in ("fisher_norm", "bound", "tightness")]
            named = (escape(name), entry["weights"]) if i == 0 else ("", "")
            table.add_row(*named, samples, _number(kl["value"]), _interval(kl), f"{kl['tokens']:,}", *cells)
    return table


def _curve_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", box=SIMPLE)
    for point in next(iter(runs.values()))["curve"]:
        table.add_column(f"{point['fraction']:g}", justify="right")
    for name, entry in runs.items():
        ratios = [p["kl"] / p["half_quadratic"] if p["half_quadratic"] > 0 else None for p in entry["curve"]]
        table.add_row(escape(name), *(_number(ratio) for ratio in ratios))
    return table


def _curvature_table(runs: Mapping[str, Any]) -> Table:
    table = Table("direction", box=SIMPLE)
    for name in runs:
        table.add_column(escape(name), justify="right")
        table.add_column("95 % interval", justify="right")
    pooled = [_pooled(entry["curvature"]) for entry in runs.values()]
    for rows in zip(*pooled, strict=True):
        cells = [text for row in rows for text in (_number(row["value"]), _interval(row))]
        table.add_row(rows[0]["direction"], *cells)
    return table


def _pairs_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", "pair", box=SIMPLE)
    for title in ("ratio", "95 % interval", "standard errors", "sign test p", "batches for 80 % power"):
        table.add_column(title, justify="right")
    for name, entry in runs.items():
        for i, row in enumerate(_pooled(entry["curvature_pairs"])):
            ratio = {"low": row["ratio_low"], "high": row["ratio_high"]}
            table.add_row(
                escape(name) if i == 0 else "",
                f"{row['first']} / {row['second'].removeprefix('update_').removeprefix('random_')}",
                _number(row["ratio"]),
                _interval(ratio),
                _number(row["standard_errors"]),
                _number(row["sign_test_p"]),
                _number(row["batches_wanted"]),
            )
    return table


def _pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["layer"] is None and row["role"] is None]


def _interval(entry: Mapping[str, Any]) -> str:
    return "–" if entry["low"] is None else f"{_number(entry['low'])} … {_number(entry['high'])}"


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
