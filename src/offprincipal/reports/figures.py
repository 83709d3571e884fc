"""Data of the page's figures: the tables of a comparison, reduced to what is drawn.

The results are JSON, embedded once in the page; its script draws Plotly figures from them, again when the reader
chooses another run, metric or matrix. Only sums and means for display are computed here, no metrics. Names are not
changed; the page escapes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from offprincipal.checkpoints.roles import LINEAR_ROLES
from offprincipal.reports.metric_words import group_of, is_drawn, is_listed, nulls_in, title_of
from offprincipal.reports.nulls import NOT_TOLD_APART, PARTS, shares, steps_up
from offprincipal.reports.numbers import short
from offprincipal.reports.words import metrics_of

MASKS = {
    "principal": "principal weights",
    "low_magnitude": "low-magnitude weights",
    "safe": "safe weights",
    "random": "a random mask",
}
_ANGLES = ("principal_angle_left_max_deg", "principal_angle_right_max_deg")
SPECTRUM_COLUMNS, SPECTRUM_MATRICES = (*_ANGLES, "spectral_shift"), 256  # the matrices with the largest of these
STRIPE_COLUMNS, STRIPE_MATRICES = ("row_dispersion", "column_dispersion"), 64
FINE_POINTS, COARSE_POINTS = 256, 64

Json = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A thinned curve: the values that are drawn, and their positions in the full curve."""

    positions: NDArray[np.int64]
    values: Array


Curves = Mapping[tuple[str, str | None, str], Curve]


@dataclass(frozen=True)
class Chosen:
    """The matrices whose curves are in the page, and the number of matrices from which they were chosen."""

    tensors: tuple[str, ...]
    available: int


ANATOMY_PARTS = (*PARTS.items(), NOT_TOLD_APART)  # with their colours


def anatomy(summary: Mapping[str, Any]) -> list[Json]:
    """For each mask and run, the distance of the overlap from chance and its parts, in percentage points.

    Each step from one null to the next is a part. If a null between is undefined, the steps around it are one part,
    named "not told apart".

    Args:
        summary: the content of `summary.json`.
    """
    figures = []
    for mask in ("principal", "low_magnitude"):
        rows = [_explained(metrics, mask) for metrics in map(metrics_of, summary["runs"].values())]
        if any(row["measured"] is not None for row in rows):
            figures.append({"title": MASKS[mask], "runs": rows})
    return figures


def _explained(metrics: Mapping[str, Mapping[str, Any]], mask: str) -> Json:
    """The distance of a measured overlap from chance, and each of `ANATOMY_PARTS`, in percentage points."""
    steps = steps_up(shares(lambda name: metrics.get(name, {}).get("value"), mask))
    parts: dict[str, float] = {}
    for spanned, gap in steps:
        part = spanned[0] if len(spanned) == 1 else NOT_TOLD_APART[0]
        parts[part] = parts.get(part, 0.0) + 100 * gap
    measured = 100 * sum(gap for _, gap in steps) if steps else None
    return {"measured": short(measured), "parts": _short(parts.get(part) for part, _ in ANATOMY_PARTS)}


def overlaps(summary: Mapping[str, Any]) -> list[Json]:
    """For each mask and run, the pooled overlap at the default density, chance, and the rounding null."""
    figures = []
    for mask, title in MASKS.items():
        rows = []
        for run in summary["runs"].values():
            overlap = run["metrics"].get(f"{mask}_overlap", {})
            nulls = {
                name: run["metrics"].get(f"{mask}_overlap_{suffix}", {}).get("value")
                for name, suffix in (("random", "random"), ("rounding", "rounding_null"))
            }
            rows.append({key: overlap.get(key) for key in ("value", "low", "high")} | nulls)
        if any(row["value"] is not None for row in rows):
            figures.append({"title": title, "runs": rows})
    return figures


def sweep(masks: pa.Table, runs: Sequence[str]) -> list[Json]:
    """For each mask and run, the overlap at each density, pooled over matrices by the number of changed entries.

    Only matrices with a known rounding null are pooled, so that a curve and its null are of the same entries; if it is
    known for none, all matrices are pooled.

    Args:
        masks: columns of `masks.parquet`.
        runs: names of the runs.
    """
    columns = ("overlap", "overlap_random", "overlap_rounding_null")
    known = pc.is_valid(masks["overlap_rounding_null"])
    masks = masks.filter(known if pc.any(known).as_py() else pc.is_valid(masks["overlap"]))
    counts = masks["changed_count"].cast(pa.float64())
    for column in columns:
        masks = masks.set_column(masks.schema.get_field_index(column), column, pc.multiply(masks[column], counts))
    summed = masks.group_by(["run", "mask", "alpha"]).aggregate([(c, "sum") for c in (*columns, "changed_count")])
    rows = sorted(summed.to_pylist(), key=lambda row: row["alpha"])
    figures = []
    for mask, title in MASKS.items():
        lines = [_line([row for row in rows if row["mask"] == mask and row["run"] == run], columns) for run in runs]
        if any(line["alpha"] for line in lines):
            figures.append({"title": title, "runs": lines})
    return figures


def _line(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> Json:
    def pooled(column: str) -> list[float | None]:
        sums = ((row[f"{column}_sum"], row["changed_count_sum"]) for row in rows)
        return _short(None if total is None or not count else total / count for total, count in sums)

    return {"alpha": [row["alpha"] for row in rows], **{column: pooled(column) for column in columns}}


def heatmaps(matrices: pa.Table, runs: Sequence[str]) -> Json:
    """Every metric of every run by role and layer; the mean if a cell has several matrices, such as experts.

    Nulls are among them, each known to its metric by its place, and are not listed themselves.
    """
    described = [field for field in matrices.schema if field.metadata and b"meaning" in field.metadata]
    fields = [f for f in described if is_drawn(f.name) and matrices[f.name].null_count < len(matrices)]
    metrics = [field.name for field in fields]
    cells = matrices.group_by(["run", "layer", "role"]).aggregate(
        [(m, "mean") for m in metrics] + [("tensor", "count")]
    )
    rows = cells.to_pylist()
    layers = sorted({row["layer"] for row in rows}, key=lambda layer: (layer is None, layer))
    roles = sorted({row["role"] for row in rows}, key=_role_order)
    cell_of = {(row["run"], row["role"], row["layer"]): row for row in rows}

    def grid(run: str, column: str) -> list[list[float | None]]:
        return [_short(cell_of.get((run, role, layer), {}).get(column) for layer in layers) for role in roles]

    return {
        "layers": [_layer_name(layer) for layer in layers],
        "roles": roles,
        "metrics": [_about(field, metrics) for field in fields],
        "values": [[grid(run, f"{metric}_mean") for run in runs] for metric in metrics],
        "counts": grid(runs[0], "tensor_count"),
    }


def _layer_name(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def _places(matrices: pa.Table) -> Mapping[str, Json]:
    """Tensor -> its role, and its layer as named in the heatmap."""
    rows = matrices.select(["tensor", "role", "layer"]).to_pylist()
    return {row["tensor"]: {"role": row["role"], "layer": _layer_name(row["layer"])} for row in rows}


def _role_order(role: str) -> tuple[int, str]:
    return (LINEAR_ROLES.index(role) if role in LINEAR_ROLES else len(LINEAR_ROLES), role)


def _about(field: pa.Field, metrics: Sequence[str]) -> Json:
    text = {key.decode(): value.decode() for key, value in field.metadata.items()}
    return {
        "name": field.name,
        "title": title_of(field.name, text.get("meaning", "")),
        "listed": is_listed(field.name),
        "group": group_of(field.name),
        "nulls": [[metrics.index(null), words] for null, words in nulls_in(field.name, metrics)],
        "unit": text.get("unit", ""),
        "source": text.get("source", ""),
    }


def choose_matrices(matrices: pa.Table, columns: Sequence[str], limit: int) -> Chosen:
    """The matrices with the largest value of any of `columns` in any run, in the order of the table.

    Args:
        matrices: columns of `matrices.parquet`.
        columns: metrics; those that the table lacks are ignored.
        limit: number of matrices.
    """
    present = [column for column in columns if column in matrices.schema.names]
    if not present:
        return Chosen((), 0)
    largest = pc.max_element_wise(*(matrices[column] for column in present))
    ranked = pa.table({"tensor": matrices["tensor"], "largest": largest}).filter(pc.field("largest").is_valid())
    per_tensor = ranked.group_by("tensor", use_threads=False).aggregate([("largest", "max")]).to_pylist()
    kept = {row["tensor"] for row in sorted(per_tensor, key=lambda row: -row["largest_max"])[:limit]}
    return Chosen(tuple(row["tensor"] for row in per_tensor if row["tensor"] in kept), len(per_tensor))


def read_curves(source: Path | pa.Table, tensors: Sequence[str], points: int, whole: str | None = None) -> Curves:
    """Read the curves of some matrices, a few rows at a time, and thin each to at most `points` values.

    Args:
        source: `curves.parquet`, or what it holds.
        tensors: names of the matrices.
        points: largest number of values per curve.
        whole: name of a curve that is not thinned.

    Returns:
        (matrix, run, curve) -> the curve.
    """
    wanted = ds.dataset(source).scanner(
        columns=["tensor", "run", "curve", "values"],
        filter=ds.field("tensor").isin(pa.array(tensors, pa.string())),
        batch_size=64,
    )
    curves = {}
    for batch in wanted.to_batches():
        keys = zip(*(batch[name].to_pylist() for name in ("tensor", "run", "curve")), strict=True)
        for key, values in zip(keys, batch["values"], strict=True):
            every = values.values.to_numpy(zero_copy_only=False)
            positions = _evenly(len(every), len(every) if key[2] == whole else points)
            curves[key] = Curve(positions, every[positions])
    return curves


def spectra(matrices: pa.Table, source: Path | pa.Table, runs: Sequence[str]) -> Json:
    """Singular values of base and runs, their shifts, and the principal angles with the largest of the stored null."""
    chosen = choose_matrices(matrices, SPECTRUM_COLUMNS, SPECTRUM_MATRICES)
    points = FINE_POINTS if len(chosen.tensors) <= STRIPE_MATRICES else COARSE_POINTS
    curves = read_curves(source, chosen.tensors, points, whole="singular_values_base")
    nulls = _lookup(matrices, tuple(f"{name}_stored_null" for name in _ANGLES))
    places = _places(matrices)

    def of_run(tensor: str, run: str) -> Json:
        sides = {side: _drawn(curves.get((tensor, run, f"principal_angles_{side}_deg"))) for side in ("left", "right")}
        tuned, base = curves.get((tensor, run, "singular_values")), curves.get((tensor, None, "singular_values_base"))
        return {"tuned": _drawn(tuned), "shift": _difference(tuned, base), "nulls": nulls[tensor, run], **sides}

    return {
        "available": chosen.available,
        "matrices": [
            {
                "tensor": tensor,
                **places[tensor],
                "base": _drawn(_thinned(curves.get((tensor, None, "singular_values_base")), points)),
                "runs": [of_run(tensor, run) for run in runs],
            }
            for tensor in chosen.tensors
        ],
    }


def stripes(matrices: pa.Table, source: Path | pa.Table, runs: Sequence[str]) -> Json:
    """Change rates of rows and columns with the spacing null, for the matrices with the largest dispersion."""
    chosen = choose_matrices(matrices, STRIPE_COLUMNS, STRIPE_MATRICES)
    curves = read_curves(source, chosen.tensors, FINE_POINTS)
    dispersion = _lookup(matrices, STRIPE_COLUMNS) if chosen.tensors else {}
    places = _places(matrices)

    def of_side(tensor: str, side: str) -> Json:
        rates = [_drawn(curves.get((tensor, run, f"{side}_change_rate"))) for run in runs]
        nulls = [_drawn(curves.get((tensor, run, f"{side}_change_rate_spacing_null"))) for run in runs]
        return {"rates": rates, "nulls": nulls}

    return {
        "available": chosen.available,
        "matrices": [
            {
                "tensor": tensor,
                **places[tensor],
                "row": of_side(tensor, "row"),
                "column": of_side(tensor, "column"),
                "dispersion": [dispersion[tensor, run] for run in runs],
            }
            for tensor in chosen.tensors
        ],
    }


def _lookup(matrices: pa.Table, columns: Sequence[str]) -> Mapping[tuple[str, str], list[float | None]]:
    """(tensor, run) -> the values of some columns; None for columns that the table lacks."""
    present = [name for name in columns if name in matrices.schema.names]
    rows = matrices.select(["tensor", "run", *present]).to_pylist()
    return {(row["tensor"], row["run"]): _short(row.get(name) for name in columns) for row in rows}


def _drawn(curve: Curve | None) -> Json | None:
    """A curve as JSON, with positions counted from 1, as for singular values."""
    return None if curve is None else {"x": (curve.positions + 1).tolist(), "y": _short(curve.values.tolist())}


def _difference(curve: Curve | None, whole: Curve | None) -> Json | None:
    """A curve minus another one that is not thinned, as far as both reach; None if one is missing."""
    if curve is None or whole is None:
        return None
    positions = curve.positions[curve.positions < len(whole.values)]
    return _drawn(Curve(positions, curve.values[: len(positions)] - whole.values[positions]))


def _thinned(curve: Curve | None, points: int) -> Curve | None:
    if curve is None:
        return None
    kept = _evenly(len(curve.values), points)
    return Curve(curve.positions[kept], curve.values[kept])


def _evenly(length: int, points: int) -> NDArray[np.int64]:
    """Positions to draw, evenly spread over a curve, with both ends."""
    return np.unique(np.linspace(0, length - 1, min(points, length)).round().astype(np.int64))


def _short(values: Iterable[float | None]) -> list[float | None]:
    return [short(value) for value in values]
