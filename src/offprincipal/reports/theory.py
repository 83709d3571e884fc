"""Data of the figures of theory, from the stages of claims C7–C10, reduced to what the page draws.

The results are JSON, as in `reports.figures`. Only sums over matrices for display are computed here, no metrics.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offprincipal.file_names import PRECISION
from offprincipal.files import read_json
from offprincipal.reports.numbers import short
from offprincipal.tables import read_table

FORMATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8 (e4m3)"}
BOUNDS = {"weyl": "Weyl", "mirsky": "Mirsky", "ky_fan": "Ky Fan", "wedin": "Wedin"}
AS_TRAINED, UNDONE = "as trained", "undone"

Json = dict[str, Any]
Row = Mapping[str, Any]


def theory_figures(folder: Path, study: Mapping[str, Any] | None) -> Json:
    """Data of the figures of theory; empty without a study of these claims.

    Args:
        folder: of the study.
        study: the content of `study.json`; None if there is none.

    Raises:
        FileError: a table that the study names cannot be read.
    """
    sources: Mapping[str, Sequence[str]] = (study or {}).get("sources") or {}
    places = {source: [folder / Path(stage).name for stage in stages] for source, stages in sources.items()}
    drawn: Json = {}
    if places.get("agreement"):
        drawn["agreement"] = agreement([row for at in places["agreement"] for row in read_table(at, "agreement")])
    if places.get("precision"):
        runs = read_json(places["precision"][0] / PRECISION)["runs"]
        drawn["precision"] = precision(runs)
        drawn["steps"] = steps(runs)
    watched = [*places.get("watched_rl", ()), *places.get("watched_sft", ())]
    if watched:
        drawn["kl"] = [kl_of_steps(at.name, read_table(at, "monitor")) for at in watched]
    if places.get("bounds"):
        drawn["bounds"] = bounds(read_table(places["bounds"][0], "matrices"))
    return drawn


def agreement(rows: Sequence[Row]) -> list[Json]:
    """The Jaccard index with both nulls, for each intervention and layer, of intervened and of untouched matrices."""
    figures = []
    for intervention in dict.fromkeys(row["intervention"] for row in rows):
        groups: dict[tuple[int, bool], list[Row]] = {}
        for row in rows:
            if row["intervention"] == intervention and row["layer"] is not None:
                groups.setdefault((row["layer"], row["touched"]), []).append(row)
        points = [
            {"layer": layer, "touched": touched, "matrices": len(of(group, AS_TRAINED))}
            | jaccards(of(group, AS_TRAINED))
            | {"undone": jaccards(of(group, UNDONE))["measured"]}
            for (layer, touched), group in sorted(groups.items())
        ]
        figures.append({"title": intervention, "points": points})
    return figures


def of(rows: Sequence[Row], view: str) -> list[Row]:
    """The rows of one view."""
    return [row for row in rows if row["view"] == view]


def jaccards(rows: Sequence[Row]) -> dict[str, float | None]:
    """The Jaccard index pooled over matrices by counts: measured, and as expected by each null."""
    changed = sum(row["changed_a"] + row["changed_b"] for row in rows)
    both = {
        "measured": sum(row["intersection"] for row in rows),
        "random": sum(row["changed_a"] * row["changed_b"] / row["numel"] for row in rows),
        "spacing": sum(row["intersection_spacing_null"] for row in rows),
    }
    return {name: short(count / (changed - count)) if changed > count else None for name, count in both.items()}


def precision(runs: Mapping[str, Any]) -> list[Json]:
    """For each run and format, over factors of the update: the unchanged share, and the bias beyond both nulls."""
    columns = {
        "unchanged": "unchanged_fraction",
        "bias": "principal_bias",
        "beyond": "principal_bias_beyond_precision",
        "by_size": "principal_distance_bias",
    }
    figures = []
    for run, entry in runs.items():
        lines = []
        for name, title in FORMATS.items():
            rows = [row for row in entry["precision_sweep"] if row["format"] == name]
            line = {key: [short(row[column]["value"]) for row in rows] for key, column in columns.items()}
            lines.append({"title": title, "step": [row["step_length"] for row in rows], **line})
        figures.append({"run": run, "formats": [line for line in lines if line["step"]]})
    return figures


def steps(runs: Mapping[str, Any]) -> list[Json]:
    """For each run, the histogram of |ΔW|/ULP over all spacings with both nulls, and the hidden fraction."""
    figures = []
    for run, entry in runs.items():
        rows = entry["ulp_histogram"]
        entries = sum(row["entries"] for row in rows) or 1
        shares = {
            name: [short(sum(row[column][i] for row in rows) / entries) for i in range(len(rows[0][column]))]
            for name, column in (
                ("measured", "octaves"),
                ("gaussian", "octaves_gaussian_null"),
                ("permuted", "octaves_permuted_null"),
            )
        }
        figures.append({"run": run, "hidden": entry["hidden_fraction"], **shares})
    return figures


def kl_of_steps(run: str, rows: Sequence[Row]) -> Json:
    """KL divergences of a monitored run at each observed step: from the step before, and from the base."""
    seen = [row for row in rows if row["tensor"] is None and row["kl_cumulative"] is not None and row["step"] > 0]
    columns = {"step": "step", "kl_step": "kl_step", "kl_cumulative": "kl_cumulative", "length": "relative_update_norm"}
    return {"run": run} | {key: [short(row[column]) for row in seen] for key, column in columns.items()}


def bounds(rows: Sequence[Row]) -> Json:
    """For each bound and run, the tightness of each matrix: its value divided by the bound."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    return {
        "runs": runs,
        "bounds": [
            {
                "title": title,
                "runs": [
                    [
                        short(value)
                        for row in rows
                        if row["run"] == run and (value := row[f"{name}_tightness"]) is not None
                    ]
                    for run in runs
                ],
            }
            for name, title in BOUNDS.items()
        ],
    }
