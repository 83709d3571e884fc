"""The file of a monitor: one row a step and matrix, and a pooled row a step, with each column's meaning and unit.

The whole table is written anew under a temporary name and renamed, so that a kill leaves the rows before it. Knows
nothing of models or how figures come about.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offprincipal.errors import FileError
from offprincipal.file_names import MONITOR
from offprincipal.files import ordinary, write_atomically
from offprincipal.measures.pooling import pool_run
from offprincipal.tabular import Tabular, first_of
from offprincipal.training.monitor.monitored_base import COLUMNS
from offprincipal.training.monitor.walk import COLUMNS as WALK

LOG = logging.getLogger("offprincipal")
Row = Mapping[str, Any]

_OF_THE_RUN = {
    "kl_step": ("KL of the policy after this step from that before it, mean over tokens", "nats"),
    "kl_cumulative": ("KL of the policy from the base, mean over tokens", "nats"),
    **WALK,
    "monitor_seconds": ("time spent observing so far, in this sitting", "seconds"),
    "monitor_share": ("the same over the training's own time", "1"),
    "setup_seconds": ("time spent decomposing bases before the first step, in this sitting; in no share", "seconds"),
}
DIVERGENCES = ("kl_step", "kl_cumulative")
_FIRST = ("step", *DIVERGENCES, "relative_update_norm", "unchanged_fraction", "spectral_shift", "straightness")
METRICS = _OF_THE_RUN | {column.name: (column.meaning, column.unit) for column in COLUMNS}
_INTEGERS = {
    "step": "optimizer steps done",
    "layer": "layer of the matrix",
    "expert": "expert of the matrix",
    "rows": "rows of the matrix",
    "cols": "columns of the matrix",
    "numel": "entries; of all watched matrices in a pooled row",
    "k": "rank of the principal subspace",
    "kl_tokens": "tokens that divergence is a mean over",
}
_TEXTS = {
    "tensor": "the matrix; null in the pooled row",
    "role": "role of the matrix",
    "solver": "how the singular values were found",
    "warned": "conditions of warn_if that held",
    "stopped": "the condition of stop_if that ended the training",
}
_KEYS = ("step", "tensor", "layer", "role", "expert", "rows", "cols", "numel", "k", "solver")
SCHEMA = pa.schema(
    [
        *(
            pa.field(n, pa.string() if n in _TEXTS else pa.int64(), metadata={"meaning": (_TEXTS | _INTEGERS)[n]})
            for n in _KEYS
        ),
        *(pa.field(n, pa.float64(), metadata={"meaning": m, "unit": unit}) for n, (m, unit) in METRICS.items()),
        *(pa.field(n, pa.int64(), metadata={"meaning": _INTEGERS[n]}) for n in ("kl_tokens",)),
        *(pa.field(n, pa.string(), metadata={"meaning": _TEXTS[n]}) for n in ("warned", "stopped")),
    ]
)


class MonitorTable:
    """The rows so far, in memory and in the file.

    Args:
        folder: that holds the file; after_step: rows beyond it are dropped, since training goes on from there; at 0 a
            file with rows is put aside, as `monitor-1.parquet`, and so on.

    Raises:
        FileError: the file is no table of a monitor.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        self.path = folder / MONITOR
        self._table = SCHEMA.empty_table()
        if after_step == 0:
            self._put_aside()
        elif self.path.exists():
            found = _read(self.path)
            self._table = found.filter(pa.compute.less_equal(found["step"], after_step))

    def _put_aside(self) -> None:
        """What another run left here is kept, under a number."""
        if not self.path.exists():
            return
        numbered = (self.path.with_stem(f"{self.path.stem}-{number}") for number in itertools.count(1))
        aside = next(path for path in numbered if not path.exists())
        self.path.rename(aside)
        LOG.warning("%s held what another run's monitor saw: it is %s now", self.path.parent, aside.name)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows; they outlive this process.

        Raises:
            FileError: the file cannot be written.
        """
        whole = [{name: row.get(name) for name in SCHEMA.names} for row in rows]
        self._table = pa.concat_tables([self._table, pa.Table.from_pylist(whole, schema=SCHEMA)])
        write_atomically(self.path, partial(pq.write_table, self._table))


class MonitorRows(Tabular, list[dict[str, Any]]):
    """The rows that a monitor wrote, in the order of steps; a step's pooled row, with tensor None, is its last."""

    def to_arrow(self, table: str = "") -> pa.Table:
        """The rows as they lie in `monitor.parquet`."""
        return pa.Table.from_pylist(list(self), schema=SCHEMA)

    def _shown(self) -> Any:
        pooled = pa.Table.from_pylist([row for row in self if row["tensor"] is None], schema=SCHEMA)
        return first_of(pooled.select([name for name in SCHEMA.names if name in _FIRST]))


def read_monitor(folder: str | Path) -> MonitorRows:
    """The rows that a monitor wrote.

    Args:
        folder: the monitor's, or that of a training run that was monitored.

    Raises:
        FileError: the folder holds none.
    """
    return MonitorRows(_read(Path(folder) / MONITOR).to_pylist())


def pooled(rows: Sequence[Row]) -> dict[str, Any]:
    """One row over all matrices, each metric pooled as `compare` pools it.

    >>> two = [{"numel": 1, "update_norm": 3.0, "base_norm": 1.0}, {"numel": 3, "update_norm": 4.0, "base_norm": 0.0}]
    >>> found = pooled(two)
    >>> found["numel"], found["update_norm"], found["spectral_shift"]
    (4, 5.0, None)
    """
    whole = [{column.name: row.get(column.name) for column in COLUMNS} | {"linear": True, **row} for row in rows]
    found = {name: value.value for name, value in pool_run(whole).items()}
    return {"numel": sum(row["numel"] for row in rows)} | found


def _read(path: Path) -> Any:
    try:
        found = pq.read_table(ordinary(path))
        if not {"step", "tensor"} <= set(found.column_names):
            raise ValueError(f"it has the columns {', '.join(found.column_names)[:200]}")
        return pa.Table.from_pylist(found.to_pylist(), schema=SCHEMA)  # another version's has other columns
    except (OSError, pa.ArrowException, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that a monitor wrote, or an empty one") from error
