"""The table of a monitor: one row per step and matrix, and a pooled row per step; columns have a meaning and a unit.

The whole table is rewritten under a temporary name and then renamed, so that a kill does not lose earlier rows. Knows
nothing of models or of how figures are computed.
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
    "kl_step": ("KL divergence of the policy after this step from the one before it, mean over tokens", "nats"),
    "kl_cumulative": ("KL divergence of the policy from the base, mean over tokens", "nats"),
    **WALK,
    "monitor_seconds": ("time spent observing, since training was started or resumed", "seconds"),
    "monitor_share": ("the same, divided by the training's own time", "1"),
    "setup_seconds": (
        "time spent on the base before the first step, at the last start or resume; in no share",
        "seconds",
    ),
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
    "kl_tokens": "number of tokens in the mean of the divergences",
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
        folder: of the file.
        after_step: step from which training continues; later rows are dropped. At 0 an existing file is renamed to
            `monitor-1.parquet`, or the next free number.

    Raises:
        FileError: the file is not a table of a monitor.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        self.path = folder / MONITOR
        self._table = SCHEMA.empty_table()
        if after_step == 0:
            self._put_aside()
        elif self.path.exists():
            rows = _read(self.path)
            self._table = rows.filter(pa.compute.less_equal(rows["step"], after_step))

    def _put_aside(self) -> None:
        """Rename the table of another run in this folder, so that it is kept."""
        if not self.path.exists():
            return
        numbered = (self.path.with_stem(f"{self.path.stem}-{number}") for number in itertools.count(1))
        aside = next(path for path in numbered if not path.exists())
        self.path.rename(aside)
        LOG.warning("%s held the monitor table of another run: it is %s now", self.path.parent, aside.name)

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows and write the file.

        Raises:
            FileError: the file cannot be written.
        """
        whole = [{name: row.get(name) for name in SCHEMA.names} for row in rows]
        self._table = pa.concat_tables([self._table, pa.Table.from_pylist(whole, schema=SCHEMA)])
        write_atomically(self.path, partial(pq.write_table, self._table))


class MonitorRows(Tabular, list[dict[str, Any]]):
    """The rows that a monitor wrote, in the order of steps; the last row of each step is the pooled one."""

    def to_arrow(self, table: str = "") -> pa.Table:
        """The rows as in `monitor.parquet`."""
        return pa.Table.from_pylist(list(self), schema=SCHEMA)

    def _shown(self) -> Any:
        pooled = pa.Table.from_pylist([row for row in self if row["tensor"] is None], schema=SCHEMA)
        return first_of(pooled.select([name for name in SCHEMA.names if name in _FIRST]))


def read_monitor(folder: str | Path) -> MonitorRows:
    """The rows that a monitor wrote, in the order of steps; the last row of each step is the pooled one.

    Args:
        folder: the `out` of the monitor, or that of a training run that was monitored.

    Returns:
        One dictionary per step and matrix, column -> value; `tensor` is None in pooled rows. The schema of
        `monitor.parquet` holds the meaning and unit of each column.

    Raises:
        FileError: the folder has no table of a monitor.

    >>> import tempfile
    >>> from offprincipal.training.monitor import Monitor
    >>> layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
    >>> monitor = Monitor(tempfile.mkdtemp(), every=1)
    >>> monitor.start(layer)
    >>> _ = monitor.observe(1, layer)
    >>> [(row["step"], row["tensor"], row["update_norm"]) for row in read_monitor(monitor.out)]
    [(1, 'q_proj.weight', 0.0), (1, None, 0.0)]
    """
    return MonitorRows(_read(Path(folder) / MONITOR).to_pylist())


def pooled(rows: Sequence[Row]) -> dict[str, Any]:
    """One row over all matrices, with each metric pooled as in `compare`.

    Args:
        rows: one per matrix.

    >>> two = [{"numel": 1, "update_norm": 3.0, "base_norm": 1.0}, {"numel": 3, "update_norm": 4.0, "base_norm": 0.0}]
    >>> row = pooled(two)
    >>> row["numel"], row["update_norm"], row["spectral_shift"]
    (4, 5.0, None)
    """
    whole = [{column.name: row.get(column.name) for column in COLUMNS} | {"linear": True, **row} for row in rows]
    values = {name: value.value for name, value in pool_run(whole).items()}
    return {"numel": sum(row["numel"] for row in rows)} | values


def _read(path: Path) -> Any:
    try:
        table = pq.read_table(ordinary(path))
        if not {"step", "tensor"} <= set(table.column_names):
            raise ValueError(f"it has the columns {', '.join(table.column_names)[:200]}")
        return pa.Table.from_pylist(table.to_pylist(), schema=SCHEMA)  # other versions have other columns
    except (OSError, pa.ArrowException, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that a monitor wrote, or an empty one") from error
