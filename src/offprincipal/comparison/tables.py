"""Write and read the files of a comparison: Parquet tables whose fields carry their meaning and unit, and JSON.

Every file is written under a temporary name and renamed, `summary.json` last.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offprincipal.comparison.registry import METRICS
from offprincipal.errors import FileError
from offprincipal.files import read_json, require_folder, write_atomically, write_json

TABLES = ("matrices", "masks", "pairs", "curves")
_TEXT = {"run", "run_a", "run_b", "tensor", "role", "dtype_base", "dtype_tuned", "solver", "mask", "curve"}
_INTEGERS = {
    *("layer", "expert", "rows", "cols", "numel", "k", "spectral_shift_rank"),
    *("changed_count", "changed_a", "changed_b", "intersection"),
}
_TENSOR_KEYS = ("tensor", "layer", "role", "expert", "rows", "cols", "numel")
_OVERLAPS = ("overlap", "overlap_random", "overlap_precision_null", "overlap_precision_null_sd", "overlap_z")
_FIELDS = {
    "matrices": ("run", *_TENSOR_KEYS, "dtype_base", "dtype_tuned", "linear", "k", "alpha", "solver"),
    "masks": ("run", *_TENSOR_KEYS, "mask", "alpha", "density", *_OVERLAPS, "changed_count"),
    "pairs": (
        *("run_a", "run_b", *_TENSOR_KEYS, "changed_a", "changed_b", "intersection"),
        *("intersection_precision_null", "intersection_precision_null_sd"),
        *("jaccard", "jaccard_random", "jaccard_precision_null", "jaccard_z"),
    ),
    "curves": ("run", "tensor", "layer", "role", "expert", "curve", "values"),
}


def write_tables(
    out: Path,
    matrices: list[dict[str, Any]],
    masks: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    summary: dict[str, Any],
) -> Path:
    """Write `matrices.parquet`, `masks.parquet`, `pairs.parquet`, `curves.parquet` and `summary.json` to a folder.

    Raises:
        FileError: the folder cannot be made or written.
    """
    require_folder(out)
    for name, rows in zip(TABLES, (matrices, masks, pairs, curves), strict=True):
        table = pa.Table.from_pylist(rows, schema=_schema(name, rows))
        texts = [field.name for field in table.schema if field.type == pa.string()]
        write_atomically(out / f"{name}.parquet", partial(pq.write_table, table, use_dictionary=texts))
    write_json(out / "summary.json", summary)
    return out


def read_table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one table of a comparison.

    Raises:
        FileError: the folder holds no such table.
    """
    path = folder / f"{name}.parquet"
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that offprincipal wrote") from error
    return rows


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a comparison.

    Raises:
        FileError: the folder holds none.
    """
    return read_json(folder / "summary.json")


def _schema(table: str, rows: list[dict[str, Any]]) -> pa.Schema:
    columns = {column.name: column for metric in METRICS for column in metric.columns}
    sources = {column.name: metric.source for metric in METRICS for column in metric.columns}
    names = list(_FIELDS[table])
    if table == "matrices":
        present = rows[0].keys() if rows else columns.keys()
        names += [name for name in columns if name in present]
    fields = []
    for name in names:
        about = {}
        if table == "matrices" and name in columns:
            about = {"meaning": columns[name].meaning, "unit": columns[name].unit, "source": sources[name]}
        fields.append(pa.field(name, _type(name), metadata=about or None))
    return pa.schema(fields)


def _type(name: str) -> pa.DataType:
    if name in _TEXT:
        return pa.string()
    if name in _INTEGERS:
        return pa.int64()
    if name == "linear":
        return pa.bool_()
    return pa.list_(pa.float64()) if name == "values" else pa.float64()
