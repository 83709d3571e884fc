"""Tables of `gates.json` for the terminal. Reads and formats; computes no metric."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table

from offprincipal.reports.numbers import UNDEFINED, number
from offprincipal.reports.words import shown

_MASKS = ("principal", "low_magnitude")


def gates_tables(content: Mapping[str, Any]) -> Group:
    """Tables of the divergence, its curve, the norm bound, curvature with paired tests, and what storing hides.

    Args:
        content: the content of `gates.json`.
    """
    runs = content["runs"]
    parts: list[RenderableType] = [
        "Gate I: divergence KL(tuned‖base) of the stored policy, nats per token",
        _divergence_table(runs),
        "KL divided by ½ΔᵀFΔ along the line from the base (1 if the second order suffices)",
        _curve_table(runs),
        "norm bound ‖Δ‖_F(θ) ≤ √(2K), up to higher order",
        _bound_table(runs),
    ]
    for name, entry in runs.items():
        parts += [
            f"Gate II: curvature per unit norm, all linear matrices at once, {shown(name)}",
            _curvature_table(entry),
        ]
    if any(entry.get("hidden_fraction") for entry in runs.values()):
        parts += [
            "Gate III: the part of the update that storing in bfloat16 hides, with both nulls",
            _hidden_table(runs),
        ]
        parts += [
            "the update in four storage formats: share of the changed entries in a mask minus its density, and minus "
            "what rounding to that format alone gives, in percentage points",
            _sweep_table(runs),
        ]
    parts.append(
        "ratio: of a direction to the one below it; units wanted: batches or draws for 80 % power at 5 %, paired"
    )
    for name, entry in runs.items():
        parts += [f"{shown(name)}: {shown(warning)}" for warning in entry["warnings"]]
    return Group(*parts)


def _divergence_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", "samples of", box=SIMPLE)
    for title in ("KL", "95 % interval", "tokens"):
        table.add_column(title, justify="right")
    for name, entry in runs.items():
        for i, (samples, kl) in enumerate(entry["kl_by_samples"].items()):
            figures = (number(kl["value"]), _interval(kl), f"{kl['tokens']:,}")
            table.add_row(shown(name) if i == 0 else "", samples, *figures)
    return table


def _bound_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", "update from", box=SIMPLE)
    for title in ("‖Δ‖_F(θ)", "√(2K)", "tightness", "95 % interval"):
        table.add_column(title, justify="right")
    for name, entry in runs.items():
        bound = entry["norm_bound"]
        interval = {"low": bound["tightness_low"], "high": bound["tightness_high"]}
        sides = (number(bound[key]) for key in ("fisher_norm", "bound", "tightness"))
        table.add_row(shown(name), entry["weights"], *sides, _interval(interval))
    return table


def _curve_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", box=SIMPLE)
    for point in next(iter(runs.values()))["curve"]:
        table.add_column(f"{point['fraction']:g}", justify="right")
    for name, entry in runs.items():
        ratios = [p["kl"] / p["half_quadratic"] if p["half_quadratic"] > 0 else None for p in entry["curve"]]
        table.add_row(shown(name), *(number(ratio) for ratio in ratios))
    return table


def _hidden_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", box=SIMPLE)
    for title in ("hidden, %", "95 % interval", "Gaussian update", "same steps, shuffled"):
        table.add_column(title, justify="right")
    for name, entry in runs.items():
        if hidden := entry.get("hidden_fraction"):
            percent = {key: None if value is None else 100 * value for key, value in hidden.items()}
            nulls = (number(percent[key]) for key in ("gaussian_null", "permuted_null"))
            table.add_row(shown(name), number(percent["value"]), _interval(percent), *nulls)
    return table


def _sweep_table(runs: Mapping[str, Any]) -> Table:
    table = Table("run", "stored in", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for title in ("unchanged, %", "principal", "− rounding", "low-magnitude", "− rounding"):
        table.add_column(title, justify="right")
    columns = ["unchanged_fraction", *(f"{m}_bias{b}" for m in _MASKS for b in ("", "_beyond_precision"))]
    for name, entry in runs.items():
        for row in entry.get("precision_sweep") or ():
            if row["step_length"] == 1:
                values = (row[column]["value"] for column in columns)
                figures = (number(None if value is None else 100 * value) for value in values)
                table.add_row(shown(name), row["format"], *figures)
    return table


def _curvature_table(entry: Mapping[str, Any]) -> Table:
    table = Table("direction", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for title in ("curvature", "95 % interval", "ratio", "sign p", "units wanted"):
        table.add_column(title, justify="right")
    pairs = {row["first"]: row for row in _pooled(entry["curvature_pairs"])}
    for row in _pooled(entry["curvature"]):
        pair = pairs.get(row["direction"], {})
        unit = "draws" if row["direction"].startswith("random_") else "batches"
        tests = (number(pair[key]) if pair else "" for key in ("ratio", "sign_test_p", f"{unit}_wanted"))
        table.add_row(row["direction"], number(row["value"]), _interval(row), *tests)
    return table


def _pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["layer"] is None and row["role"] is None]


def _interval(entry: Mapping[str, Any]) -> str:
    return UNDEFINED if entry["low"] is None else f"{number(entry['low'])} … {number(entry['high'])}"
