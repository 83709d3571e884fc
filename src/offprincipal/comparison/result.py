"""What a comparison found: its tables, and each run's pooled figures, as a program or a notebook reads them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from offprincipal.comparison.measure import Row
from offprincipal.errors import ArgumentError, meant
from offprincipal.measures.columns import METRICS, nulls_of
from offprincipal.tables import TABLES, arrow_table, read_summary, read_table, write_tables
from offprincipal.tabular import Tabular

if TYPE_CHECKING:
    from offprincipal.reports.plots import Plots

_NULLS = {
    name for metric in METRICS for column in metric.columns for name in nulls_of(column.name, pooled=True).values()
}
_EACH = {column.name for metric in METRICS for column in metric.columns}  # figures of single matrices


@dataclass(frozen=True)
class Measured:
    """A figure pooled over a run's matrices.

    Args:
        value: None if it is undefined; low, high: its 95 % interval, a bootstrap over matrices.
        nulls: what it would be of updates that know less, over the same matrices: name of the null -> value.
    """

    value: float | None
    low: float | None
    high: float | None
    nulls: Mapping[str, float | None]

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        nulls = "".join(f", {null} {_short(value)}" for null, value in self.nulls.items())
        return f"{_short(self.value)}{interval}{nulls}"


class Run:
    """The pooled figures of one run, each an attribute by its name in `summary.json`.

    >>> pooled = {"value": 0.3, "low": 0.2, "high": 0.4}
    >>> Run({"metrics": {"principal_energy": pooled, "principal_energy_isotropic": {"value": 0.1}}}).principal_energy
    Measured(value=0.3, low=0.2, high=0.4, nulls={'isotropic': 0.1})
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def __getattr__(self, name: str) -> Measured:
        metrics = {} if name == "content" else self.content["metrics"]
        if name not in metrics and name in _EACH:
            raise AttributeError(
                f"'{name}' is not pooled over a run, or was not measured: `to_pandas('matrices')` has what is of each "
                "matrix"
            )
        if name not in metrics:
            raise AttributeError(
                f"no figure '{name}' was measured of this run: {meant(name, metrics, 'dir() has all')}"
            )
        found = metrics[name]
        nulls = {null: metrics[of]["value"] for null, of in nulls_of(name, pooled=True).items() if of in metrics}
        return Measured(found["value"], found.get("low"), found.get("high"), nulls)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.content["metrics"]]

    def __repr__(self) -> str:
        names = [name for name in self.content["metrics"] if name not in _NULLS]
        lines = [f"  {name}: {getattr(self, name)}" for name in names]
        return "\n".join([f"Run of {len(names)} figures, with 95 % intervals and nulls:", *lines])


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """The tables of one comparison: rows as dicts, and the pooled summary, as `METRICS` in the docs define them.

    Its text is the table that the terminal shows, each value with its null, and the sentences that decide; a notebook
    shows the same as HTML.

    Args:
        measured_before: runs whose own rows an earlier comparison in the same folder had.
    """

    matrices: list[Row]
    masks: list[Row]
    pairs: list[Row]
    curves: list[Row]
    summary: dict[str, Any]
    measured_before: tuple[str, ...] = ()

    @property
    def runs(self) -> "Runs":
        """The pooled figures of each run: `result.runs["rl"].unchanged_fraction.value`."""
        return Runs(self.summary["runs"])

    def to_arrow(self, table: str = "matrices") -> pa.Table:
        """One of the tables `matrices`, `masks`, `pairs` and `curves`, its fields with their meaning and unit.

        Raises:
            ArgumentError: there is no such table.
        """
        if table not in TABLES:
            raise ArgumentError(f"a comparison has no table '{table}': choose one of {', '.join(TABLES)}")
        return arrow_table(table, getattr(self, table))

    @property
    def plot(self) -> "Plots":
        """Figures by matplotlib, such as `result.plot.anatomy()`; `dir(result.plot)` lists them."""
        from offprincipal.reports.plots import Plots

        return Plots(self.summary, self.to_arrow)

    def write(self, out: str | Path) -> Path:
        """Write the four Parquet tables and `summary.json`, each under a temporary name first."""
        return write_tables(Path(out), self.matrices, self.masks, self.pairs, self.curves, self.summary)

    def _shown(self) -> Any:
        from rich.console import Group

        from offprincipal.reports.names import run_labels
        from offprincipal.reports.terminal import comparison_table
        from offprincipal.reports.words import decisions

        return Group(comparison_table(self.summary), *decisions(self.summary, labels=run_labels(self.summary["runs"])))

    def _repr_html_(self) -> str:
        from offprincipal.reports.terminal import comparison_html

        return comparison_html(self.summary)


class NoSuchRun(ArgumentError, KeyError):
    """A run was not compared; a KeyError too, so that `runs.get(name)` gives None."""

    __str__ = Exception.__str__  # a KeyError shows its message's repr


class Runs(Mapping[str, Run]):
    """Runs by name; the error for an unknown name lists the known ones."""

    def __init__(self, contents: Mapping[str, Mapping[str, Any]]) -> None:
        self._contents = contents

    def __getitem__(self, name: str) -> Run:
        if name not in self._contents:
            raise NoSuchRun(f"no run '{name}' was compared: there are {', '.join(self._contents)}")
        return Run(self._contents[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._contents)

    def __len__(self) -> int:
        return len(self._contents)

    def __repr__(self) -> str:
        return f"Runs {', '.join(self)}"


def read_comparison(folder: str | Path) -> Comparison:
    """Read the comparison that `compare` wrote to a folder: the tables and the pooled figures.

    Raises:
        FileError: the folder has none, or a table is damaged.

    >>> import tempfile
    >>> from offprincipal.assets import embedded_base
    >>> from offprincipal.comparison import compare
    >>> out = tempfile.mkdtemp()
    >>> _ = compare(embedded_base(), {"same": embedded_base()}, metrics=("changes",), out=out)
    >>> read_comparison(out).runs["same"].unchanged_fraction.value
    1.0
    """
    summary = read_summary(Path(folder))
    tables: dict[str, list[Row]] = {table: read_table(Path(folder), table) for table in TABLES}
    return Comparison(tables["matrices"], tables["masks"], tables["pairs"], tables["curves"], summary)
