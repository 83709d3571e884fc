"""Tables of `gates.json` for the terminal. Reads and formats; computes no metric."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from offprincipal.reports.numbers import UNDEFINED, number
from offprincipal.reports.terminal import screen_tables
from offprincipal.reports.words import shown

_MASKS = ("principal", "low_magnitude")
_DIRECTIONS = {
    "update_principal": "principal part of update",
    "update_complement": "other part of update",
    "random_principal": "random principal part",
    "random_complement": "random other part",
    "random_on_mask": "random principal weights",
    "random_off_mask": "random other weights",
}
_ALONG = "KL divergence over half of the Fisher form, ½ΔᵀFΔ, at fractions of the update (1: the second order is all)"
_SWEPT = (
    "the update stored in four formats: percentage points of its changes in a mask, beyond the mask's density and "
    "beyond rounding to that format alone"
)
_CURVATURE_NOTE = (
    "principal part: inside the base's principal subspaces; ratio: to the direction below it, with a paired sign test; "
    "needed: batches, or draws of random directions, for 80 % power at 5 %"
)


def gates_tables(content: Mapping[str, Any]) -> Group:
    """Divergence, the curve, the KL bound, the curvature with its paired tests, and what storing hides.

    Args:
        content: `gates.json`.
    """
    runs = content["runs"]
    parts: list[RenderableType] = [
        "KL divergence from the base of the policy as stored, nats a token",
        *_divergence_tables(runs),
        _ALONG,
        *_curve_tables(runs),
        "KL bound: the Fisher norm of the update is at most √(2·KL), up to higher order",
        *_bound_tables(runs),
    ]
    for name, entry in runs.items():
        parts += [
            f"curvature, the Fisher form per squared norm, over all linear matrices: {shown(name)}",
            *_curvature_tables(entry),
        ]
    if any(entry["curvature"] for entry in runs.values()):
        parts += [f"{_CURVATURE_NOTE}.", ""]
    if any(entry.get("hidden_fraction") for entry in runs.values()):
        parts += ["precision: what storing in bfloat16 hides of the update, beside two nulls", *_hidden_tables(runs)]
        parts += [_SWEPT, *_sweep_tables(runs)]
    for name, entry in runs.items():
        parts += [f"note: {shown(name)}: {shown(warning)}" for warning in entry["warnings"]]
    return Group(*parts)


def _divergence_tables(runs: Mapping[str, Any]) -> list[RenderableType]:
    rows = [
        [name, samples, number(kl["value"]), _interval(kl), f"{kl['tokens']:,}"]
        for name, entry in runs.items()
        for samples, kl in entry["kl_by_samples"].items()
    ]
    return screen_tables(["run", "samples of", "KL", "95 % interval", "tokens"], rows)


def _bound_tables(runs: Mapping[str, Any]) -> list[RenderableType]:
    rows = []
    for name, entry in runs.items():
        bound = entry["norm_bound"]
        sides = (number(bound[key]) for key in ("fisher_norm", "bound", "tightness"))
        interval = {"low": bound["tightness_low"], "high": bound["tightness_high"]}
        rows.append([name, entry["weights"], *sides, _interval(interval)])
    return screen_tables(["run", "weights", "Fisher norm", "bound", "over bound", "95 % interval"], rows)


def _curve_tables(runs: Mapping[str, Any]) -> list[RenderableType]:
    head = ["run", *(f"{point['fraction']:g}" for point in next(iter(runs.values()))["curve"])]
    rows = []
    for name, entry in runs.items():
        ratios = [p["kl"] / p["half_quadratic"] if p["half_quadratic"] > 0 else None for p in entry["curve"]]
        rows.append([name, *map(number, ratios)])
    return screen_tables(head, rows)


def _hidden_tables(runs: Mapping[str, Any]) -> list[RenderableType]:
    rows = []
    for name, entry in runs.items():
        if hidden := entry.get("hidden_fraction"):
            percent = {key: None if value is None else 100 * value for key, value in hidden.items()}
            nulls = (number(percent[key]) for key in ("gaussian_null", "permuted_null"))
            rows.append([name, number(percent["value"]), _interval(percent), *nulls])
    return screen_tables(["run", "hidden, %", "95 % interval", "Gaussian update", "own steps, shuffled"], rows)


def _sweep_tables(runs: Mapping[str, Any]) -> list[RenderableType]:
    columns = ["unchanged_fraction", *(f"{m}_bias{b}" for m in _MASKS for b in ("", "_beyond_precision"))]
    rows = []
    for name, entry in runs.items():
        for row in entry.get("precision_sweep") or ():
            if row["step_length"] == 1:
                shares = (row[column]["value"] for column in columns)
                points = (number(None if share is None else 100 * share) for share in shares)
                rows.append([name, row["format"], *points])
    head = ["run", "format", "unchanged, %", "principal", "beyond rounding", "low-magnitude", "beyond rounding"]
    return screen_tables(head, rows)


def _curvature_tables(entry: Mapping[str, Any]) -> list[RenderableType]:
    pairs = {row["first"]: row for row in _pooled(entry["curvature_pairs"])}
    rows = []
    for row in _pooled(entry["curvature"]):
        pair = pairs.get(row["direction"], {})
        unit = "draws" if row["direction"].startswith("random_") else "batches"
        tests = [number(pair[key]) if pair else "" for key in ("ratio", "sign_test_p", f"{unit}_wanted")]
        rows.append([_DIRECTIONS[row["direction"]], number(row["value"]), _interval(row), *tests])
    return screen_tables(["direction", "curvature", "95 % interval", "ratio", "sign test, p", "needed"], rows)


def _pooled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["layer"] is None and row["role"] is None]


def _interval(entry: Mapping[str, Any]) -> str:
    return UNDEFINED if entry["low"] is None else f"{number(entry['low'])} … {number(entry['high'])}"
