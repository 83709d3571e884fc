"""Tables of the page as data for CSV files: full numbers, one per column, with a row of titles.

Reads what the page shows; computes no metric. Columns have the names of `summary.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offprincipal.reports import nulls, words

Table = list[list[Any]]
_SIDES = ("as_published", "controlled")


def tables(summary: Mapping[str, Any], study: Mapping[str, Any] | None, data: Mapping[str, Any]) -> dict[str, Table]:
    """The tables.

    Args:
        summary: the content of `summary.json`.
        study: the content of `study.json`; None if there is none.
        data: the data of the page, with `training` and `fine_tuning`.

    Returns:
        Name of the table -> its titles and rows.
    """
    found = {"runs": _runs(summary), "location": _location(summary), "pairs": _of_dicts(summary["pairs"])}
    if study:
        found["training"] = _of_dicts(map(_trained, data["training"]))
        found["claims"] = _of_dicts(map(_claim, study["claims"]))
        for place, claim in enumerate(study["claims"], start=1):
            if rungs := claim.get("anatomy"):
                found[f"claim-{place}-anatomy"] = _of_dicts({"run": name} | shares for name, shares in rungs.items())
    if sweeps := (data["fine_tuning"] or {}).get("sweeps"):
        keys = ("seed", "open", "stable", "best", "shift", "shift_null")
        found["sweeps"] = _of_dicts(
            {"method": group["method"], "rank": group["rank"]} | {key: sweep[key] for key in keys}
            for group in sweeps["groups"]
            for sweep in group["sweeps"]
        )
        found["matched"] = _of_dicts(
            {key: value for key, value in run.items() if key != "like"}
            | {f"like_{key}": value for key, value in run["like"].items()}
            for run in sweeps["matched"]
        )
    return found


def _runs(summary: Mapping[str, Any]) -> Table:
    figures = nulls.measured(summary)
    titles = ["run"]
    for figure in figures:
        titles += [figure.metric, f"{figure.metric}_low", f"{figure.metric}_high", f"{figure.metric}_matrices"]
        titles += [figure.null_metric] if figure.null_metric else []
    rows = []
    for name, run in summary["runs"].items():
        row = [name]
        for figure in figures:
            found = run["metrics"].get(figure.metric, {})
            row += [found.get(key) for key in ("value", "low", "high", "matrices")]
            row += [run["metrics"].get(figure.null_metric, {}).get("value")] if figure.null_metric else []
        rows.append(row)
    return [titles, *rows]


def _location(summary: Mapping[str, Any]) -> Table:
    """One row per run and mask: the measured overlap, its interval, every rung of the ladder, and the score test."""
    rungs = list(nulls.RUNG_TITLES)
    rows: Table = [["run", "mask", "low", "high", *rungs, "z"]]
    for name, run in summary["runs"].items():
        metrics = words.metrics_of(run)
        for mask in words.MASKS:
            found = metrics.get(f"{mask}_overlap", {})
            shares = [metrics.get(f"{mask}_overlap{ending}", {}).get("value") for ending in nulls.ENDINGS]
            ends = [found.get("low"), found.get("high")]
            rows.append([name, mask, *ends, *shares, metrics.get(f"{mask}_z", {}).get("value")])
    return rows


def _trained(run: Mapping[str, Any]) -> dict[str, Any]:
    moments = {f"{when}_{key}": value for when in ("before", "after") for key, value in run[when].items()}
    own = {key: value for key, value in run.items() if key not in ("before", "after", "colour", "symbol", "tasks")}
    return own | {"tasks": " ".join(run["tasks"] or ())} | moments


def _claim(claim: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: claim.get(key) for key in ("id", "title", "of", "contrast", "statement")}
    for side in _SIDES:
        judged = claim[side]
        row |= {f"{side}_{key}": judged.get(key) for key in ("verdict", "effect", "low", "high", "measure", "control")}
        blind = judged.get("negative_control") or {}
        row |= {f"{side}_blind_{key}": blind.get(key) for key in ("draws", "supported", "contradicted")}
    return row


def _of_dicts(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table of dictionaries; its titles are the keys of all of them."""
    every: Sequence[Mapping[str, Any]] = list(rows)
    titles = list(dict.fromkeys(key for row in every for key in row))
    return [titles, *([row.get(title) for title in titles] for row in every)]
