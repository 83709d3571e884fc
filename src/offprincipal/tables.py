"""Write and read the files of a comparison: Parquet tables whose fields carry their meaning and unit, and JSON.

Every file is written under a temporary name and renamed, `summary.json` last.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offprincipal.errors import FileError
from offprincipal.file_names import SUMMARY
from offprincipal.files import ordinary, read_json, require_folder, write_atomically, write_json
from offprincipal.measures.columns import METRICS, RUNGS
from offprincipal.measures.location import MaskOverlap

TABLES = ("matrices", "masks", "pairs", "curves")
_TEXT = {"run", "run_a", "run_b", "tensor", "role", "dtype_base", "dtype_tuned", "solver", "mask", "curve"}
_INTEGERS = {
    *("layer", "expert", "rows", "cols", "numel", "k"),
    *("changed_count", "changed_a", "changed_b", "intersection"),
}
_TENSOR_KEYS = ("tensor", "layer", "role", "expert", "rows", "cols", "numel")
_OVERLAPS = tuple(field.name for field in fields(MaskOverlap))
_FIELDS = {
    "matrices": ("run", *_TENSOR_KEYS, "dtype_base", "dtype_tuned", "linear", "k", "alpha", "solver"),
    "masks": ("run", *_TENSOR_KEYS, "mask", "alpha", *_OVERLAPS, "changed_count"),
    "pairs": (
        *("run_a", "run_b", *_TENSOR_KEYS, "changed_a", "changed_b", "intersection"),
        *(f"intersection_{rung}" for rung in RUNGS if rung != "random"),
        *("jaccard", *(f"jaccard_{rung}" for rung in RUNGS)),
        *("jaccard_log_odds", "jaccard_log_odds_se", "jaccard_z"),
        *("update_norm_a", "update_norm_b", "update_cosine"),
    ),
    "curves": ("run", "tensor", "layer", "role", "expert", "curve", "values"),
}

_MOST_OFFSET = 2**31 - 1
_NUMPY = {pa.bool_(): np.bool_, pa.int64(): np.int64, pa.float64(): np.float64}


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
        table = arrow_table(name, rows)
        texts = [field.name for field in table.schema if field.type == pa.string()]
        write_atomically(out / f"{name}.parquet", partial(pq.write_table, table, use_dictionary=texts))
    write_json(out / SUMMARY, summary)
    return out


def arrow_table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    """The rows of one of `TABLES`, its fields with their meaning and unit."""
    return _table(rows, _schema(name, rows))


def read_table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one table of a comparison.

    Raises:
        FileError: the folder holds no such table.
    """
    path = folder / f"{name}.parquet"
    try:
        rows: list[dict[str, Any]] = pq.read_table(ordinary(path)).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that offprincipal wrote") from error
    return rows


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a comparison.

    Raises:
        FileError: the folder has none.
    """
    return read_json(folder / SUMMARY)


def require_nothing_lost(folder: Path, base: str, runs: Mapping[str, Any], groups: Collection[str]) -> None:
    """Refuse to replace a comparison of another base, of runs that are not among these, or of more metric groups.

    Args:
        runs: run -> its source, as they are to be compared; groups: of metrics, to be measured.

    Raises:
        FileError: the folder holds such a comparison.
    """
    what = "a summary.json that is not from a comparison" if _is_foreign(folder) else ""
    with suppress(FileError, LookupError, TypeError, AttributeError):
        summary = read_summary(folder)
        now = [str(source) for source in runs.values()]
        other = [run["source"] for run in summary["runs"].values() if not is_among(run["source"], now)]
        more = [group for group in summary["arguments"]["metrics"] if group not in groups]
        if not is_among(summary["base"], [base]):
            what = f"a comparison with {summary['base']}"
        elif other:
            what = f"a comparison of {other[0]}, which is not among these runs"
        elif more:
            what = f"a comparison that also measured {', '.join(more)}"
    if what:
        raise FileError(f"{folder} contains {what}: choose another --out, or replace it with --overwrite")


def require_none_replaced(
    path: Path, base: str, sources: Collection[str], earlier: Callable[[dict[str, Any]], Iterable[str]]
) -> None:
    """Refuse to replace a file of figures of another base, or of checkpoints that are not among these.

    Args:
        path: JSON with the `base`; earlier: the sources in it.

    Raises:
        FileError: it is one.
    """
    other: list[str] = []
    with suppress(FileError, LookupError, TypeError, AttributeError):
        content = read_json(path)
        other = [] if is_among(content["base"], [base]) else [content["base"]]
        other += [source for source in earlier(content) if not is_among(source, sources)]
    if other:
        raise FileError(f"{path} has figures of {other[0]}: choose another --out, or replace them with --overwrite")


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds a summary.json that nothing of ours wrote."""
    with suppress(FileError):
        return (folder / SUMMARY).is_file() and "runs" not in read_json(folder / SUMMARY)
    return False


def is_among(source: str, others: Iterable[str]) -> bool:
    """Whether a source as it was given earlier, perhaps from another folder, is one of these.

    A relative path of two parts or more is found again wherever it was given from; of one, only from here.

    >>> is_among("runs/rl", [str(Path("runs/rl").resolve())]), is_among("rl", ["/elsewhere/rl"])
    (True, False)
    """
    parts, there = Path(source).parts, Path(source).resolve()
    return any(
        source == other
        or (here := Path(other).resolve()) == there
        or (len(parts) > 1 and here.parts[-len(parts) :] == parts)
        for other in others
    )


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The rows as columns; made from buffers, because `pa.array` imports pandas wherever it is installed."""
    columns = [_column([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """One column; None if a value is undefined; in several chunks where 32-bit offsets do not reach."""
    there = np.array([value is not None for value in values], np.bool_)
    validity = None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
    known = [value for value in values if value is not None]
    if kind in _NUMPY:
        dtype = _NUMPY[kind]
        return pa.Array.from_buffers(kind, len(values), [validity, pa.py_buffer(_spread(known, there, dtype))])
    parts = [value.encode() for value in known] if kind == pa.string() else known
    lengths = np.zeros(len(values) + 1, np.int64)
    lengths[1:][there] = [len(part) for part in parts]
    offsets = np.cumsum(lengths)
    if offsets[-1] > _MOST_OFFSET:
        halves = values[: len(values) // 2], values[len(values) // 2 :]
        return pa.chunked_array([chunk for half in halves for chunk in _chunks(_column(half, kind))])
    buffers = [validity, pa.py_buffer(offsets.astype(np.int32))]
    if kind == pa.string():
        return pa.Array.from_buffers(kind, len(values), [*buffers, pa.py_buffer(b"".join(parts))])
    entries = np.concatenate(parts, dtype=np.float64) if parts else np.zeros(0)
    child = pa.Array.from_buffers(pa.float64(), len(entries), [None, pa.py_buffer(entries)])
    return pa.Array.from_buffers(kind, len(values), buffers, children=[child])


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]


def _spread(known: list[Any], there: NDArray[np.bool_], dtype: type) -> NDArray[Any]:
    """Known values at their places, with zeros between; bits if they are truths."""
    values: NDArray[Any] = np.zeros(len(there), dtype)
    values[there] = known
    return np.packbits(values, bitorder="little") if dtype is np.bool_ else values


def _schema(table: str, rows: list[dict[str, Any]]) -> pa.Schema:
    columns = {column.name: column for metric in METRICS for column in metric.columns}
    sources = {column.name: metric.source for metric in METRICS for column in metric.columns}
    names = list(_FIELDS[table])
    if table == "matrices":
        present = rows[0].keys() if rows else columns.keys()
        names += [name for name in columns if name in present]
    found = []
    for name in names:
        about = {}
        if table == "matrices" and name in columns:
            about = {"meaning": columns[name].meaning, "unit": columns[name].unit, "source": sources[name]}
        found.append(pa.field(name, _type(name), metadata=about or None))
    return pa.schema(found)


def _type(name: str) -> pa.DataType:
    if name in _TEXT:
        return pa.string()
    if name in _INTEGERS:
        return pa.int64()
    if name == "linear":
        return pa.bool_()
    return pa.list_(pa.float64()) if name == "values" else pa.float64()
