"""What a call returns, as a table: for a program in the library of its choice, as text for a terminal or a notebook.

Knows nothing of what was measured.
"""

import importlib
from html import escape
from typing import Any

import pyarrow as pa

from offprincipal.errors import ArgumentError
from offprincipal.plain_text import plain

_WIDTH = 80  # columns of the text
_ROWS = 12  # that it has of a longer table
_WIDEST = 24  # letters of a cell


class Tabular:
    """Has `to_arrow`; gets the other libraries, and a table as its text.

    >>> class Squares(Tabular):
    ...     def to_arrow(self, table: str = "") -> pa.Table:
    ...         return pa.table({"x": [1, 2], "square": [1.0, 4.0]})
    >>> print(Squares())
     x  square
     1       1
     2       4
    """

    def to_arrow(self, table: str = "") -> pa.Table:
        """The table; of several, the one of that name, or the first."""
        raise NotImplementedError

    def to_pandas(self, table: str = "") -> Any:
        """The same as a pandas DataFrame; needs pandas."""
        _require("pandas")
        return self._named(table).to_pandas()

    def to_polars(self, table: str = "") -> Any:
        """The same as a polars DataFrame; needs polars."""
        return _require("polars").from_arrow(self._named(table))

    def _named(self, table: str) -> pa.Table:
        return self.to_arrow(table) if table else self.to_arrow()

    def __repr__(self) -> str:
        return as_text(self._shown())

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    def _shown(self) -> Any:
        """What its text is made of, for rich; the first rows and columns that a screen has room for."""
        return first_of(self.to_arrow())


def as_text(shown: Any, width: int = _WIDTH) -> str:
    """What rich would print, without colours or spaces at the end of lines."""
    from rich.console import Console

    console = Console(color_system=None, width=width, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(shown, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))


def first_of(table: pa.Table) -> Any:
    """The first rows of a table, and as many of its columns as a screen has room for; what is left out is counted."""
    from rich.table import Table
    from rich.text import Text

    rows = table.slice(0, _ROWS).to_pylist()
    columns = {name: [_cell(row[name]) for row in rows] for name in table.column_names if not _is_nested(table, name)}
    shown, room = Table(box=None, padding=(0, 1), pad_edge=True), _WIDTH
    for name, cells in columns.items():
        room -= min(max(map(len, (name, *cells))), _WIDEST) + 2
        if room < 0 and shown.columns:
            break
        numeric = not pa.types.is_string(table.schema.field(name).type)
        shown.add_column(Text(name), justify="right" if numeric else "left", max_width=_WIDEST, overflow="fold")
    kept = list(columns)[: len(shown.columns)]
    for i in range(len(rows)):
        shown.add_row(*(Text(columns[name][i]) for name in kept))
    if table.num_rows > len(rows) or len(kept) < table.num_columns:
        shown.caption = Text(f"{table.num_rows:,} rows, {table.num_columns} columns: to_pandas() has all")
        shown.caption_justify = "left"
    return shown


def _is_nested(table: pa.Table, name: str) -> bool:
    return bool(pa.types.is_nested(table.schema.field(name).type))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return plain(f"{value:.4g}" if isinstance(value, float) else str(value))


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ArgumentError(f"{package} is not installed: pip install {package}, or use to_arrow()") from error
