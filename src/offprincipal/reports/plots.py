"""Figures for papers and notebooks, by matplotlib, from what the report's figures are drawn from.

Sizes and letters are those of a page in two columns: 3.35 or 6.9 inches across, 7 and 8 points, at most 9 inches high.
`plots_runs`, `plots_matrices` and `plots_curves` draw them, of what is in `plots_drawing`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from offprincipal.errors import ArgumentError, FileError, meant
from offprincipal.files import require_folder, write_atomically
from offprincipal.plain_text import plain
from offprincipal.reports import plots_curves, plots_matrices, plots_runs
from offprincipal.reports.plots_drawing import NothingToDraw, file_of
from offprincipal.reports.report import comparison_in, damage_reported, read_columns
from offprincipal.tables import read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")
PLOTS = ("anatomy", "overlaps", "sweep", "agreement", "layers", "against_null", "spectra", "stripes")


class Plots:
    """The figures of a comparison: `result.plot.anatomy()`, each a `matplotlib.figure.Figure`.

    Each value stands beside its null. Where a figure has no room for all runs, it says which it draws: `among` draws
    others.

    Args:
        summary: `summary.json`.
        tables: reads `matrices`, `masks` or `curves` as a table.
        curves: `curves.parquet`, of which a figure needs a few rows; by default what `tables` reads.
        runs: the runs to draw; all by default.

    >>> from offprincipal.comparison import compare
    >>> _ = torch.manual_seed(0)
    >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
    >>> compare(base, {"rl": tuned}, metrics=("location",)).plot  # doctest: +NORMALIZE_WHITESPACE
    Figures of 1 run: anatomy(), overlaps(), sweep(), agreement(), layers(), against_null(), spectra(), stripes();
    among() draws fewer runs
    """

    def __init__(
        self,
        summary: dict[str, Any],
        tables: Callable[[str], pa.Table],
        curves: Path | None = None,
        runs: Sequence[str] | None = None,
    ) -> None:
        self._summary, self._tables, self._curves = summary, tables, curves
        self._every = list(summary["runs"])
        self._runs = list(self._every if runs is None else runs)

    def __dir__(self) -> list[str]:
        return [*PLOTS, "among"]

    def __getattr__(self, name: str) -> Any:
        hint = meant(name, PLOTS, "dir() has all.")
        raise AttributeError(f"there is no figure '{name}': {hint} The figures are {', '.join(PLOTS)}")

    def __repr__(self) -> str:
        count = f"{len(self._runs)} run{'s' * (len(self._runs) != 1)}"
        return f"Figures of {count}: {', '.join(f'{name}()' for name in PLOTS)}; among() draws fewer runs"

    def among(self, *runs: str) -> "Plots":
        """The same figures of some of the runs, which keep their colours and marks.

        Args:
            runs: names of runs, in the order in which they are to be drawn.

        Raises:
            ArgumentError: a run was not compared.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, a, b = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(3))
        >>> result = compare(base, {"rl": a, "sft": b}, metrics=("location",))
        >>> [label.get_text() for label in result.plot.among("sft").anatomy().axes[0].get_yticklabels()]
        ['sft']
        """
        for name in runs:
            if name not in self._every:
                known = f"there are {', '.join(map(plain, self._every))}"
                raise ArgumentError(f"no run '{name}' was compared: {meant(name, self._every, known)}")
        if not runs:
            raise ArgumentError("no run is given: give the names of some, such as " + plain(self._every[0]))
        return Plots(self._summary, self._tables, self._curves, list(dict.fromkeys(runs)))

    def anatomy(self) -> "Figure":
        """How far the changed entries lie from chance in either mask, and what each rung of the ladder explains of it.

        Raises:
            NothingToDraw: the changed entries were not located.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        >>> figure = compare(base, {"rl": tuned}, metrics=("location", "subspace")).plot.anatomy()
        >>> [axis.get_title() for axis in figure.axes]
        ['principal weights', 'low-magnitude weights']
        """
        return plots_runs.anatomy(self._shown(), self._every)

    def overlaps(self) -> "Figure":
        """The share of the changed entries in each mask, beside chance and what rounding alone would put there.

        Raises:
            NothingToDraw: the changed entries were not located.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        >>> figure = compare(base, {"rl": tuned}, metrics=("location", "subspace")).plot.overlaps()
        >>> [axis.get_title() for axis in figure.axes]
        ['principal weights', 'low-magnitude weights', 'safe weights', 'a random mask']
        """
        return plots_runs.overlaps(self._shown(), self._every)

    def sweep(self) -> "Figure":
        """The overlaps over the sweep of mask densities, and below what is left after rounding alone.

        Of more runs than a panel has room for, those furthest from rounding alone.

        Raises:
            NothingToDraw: the changed entries were not located.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        >>> figure = compare(base, {"rl": tuned}, metrics=("location",)).plot.sweep()
        >>> [axis.get_title() for axis in figure.axes if axis.get_title()]
        ['low-magnitude weights', 'a random mask']
        """
        return plots_runs.sweep(self._shown(), self._every, self._table("masks"))

    def agreement(self) -> "Figure":
        """The Jaccard index of the changed entries of two runs each, beside chance and each rung of the ladder.

        Of more pairs than a page has room for, those furthest from what the ladder explains.

        Raises:
            NothingToDraw: the changed entries of no two runs were located.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, a, b = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(3))
        >>> figure = compare(base, {"rl": a, "sft": b}, metrics=("location",)).plot.agreement()
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['rl · sft']
        """
        return plots_runs.agreement(self._shown())

    def layers(self, metric: str = "unchanged_fraction") -> "Figure":
        """A figure by role and layer, a panel a run, beside its null, all on one scale: means over a cell's matrices.

        Args:
            metric: a column of `matrices.parquet`.

        Raises:
            NothingToDraw: it was not measured.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        >>> figure = compare(base, {"rl": tuned}, metrics=("changes",)).plot.layers()
        >>> [axis.get_title(loc="left") for axis in figure.axes]
        ['rl', 'null', '']
        """
        return plots_matrices.layers(self._table("matrices"), self._runs, self._every, metric)

    def against_null(self, metric: str = "spectral_shift", null: str = "stored") -> "Figure":
        """Every linear matrix of every run: what was measured over what a null would show; on the line they are alike.

        Args:
            metric: a column of `matrices.parquet`.
            null: one of its nulls, as `runs[…].<metric>.nulls` names them.

        Raises:
            NothingToDraw: either was not measured.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        >>> figure = compare(base, {"rl": tuned}, metrics=("spectrum",)).plot.against_null()
        >>> figure.axes[0].get_ylabel()
        'spectral shift'
        """
        return plots_matrices.against_null(self._table("matrices"), self._runs, self._every, metric, null)

    def spectra(self, tensor: str | None = None) -> "Figure":
        """Singular values of the base and of each run, how far they shifted, and the principal angles of one matrix.

        Beside the angles stands the largest after a random update as long, stored alike. Of more runs than a panel has
        room for, those that turned furthest.

        Args:
            tensor: name of a linear matrix; by default that which the page opens with.

        Raises:
            NothingToDraw: neither spectra nor subspaces were measured.
            ArgumentError: they were not of this matrix.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        >>> figure = compare(base, {"rl": tuned}, metrics=("spectrum",)).plot.spectra("weight")
        >>> [axis.get_title() for axis in figure.axes]
        ['singular values', 'shift: tuned − base']
        """
        return plots_curves.spectra(self._table("matrices"), self._curve_rows(), self._runs, self._every, tensor)

    def stripes(self, tensor: str | None = None) -> "Figure":
        """The share of each row's and column's entries that changed in one matrix, beside the spacing null.

        The mean of the runs; `among` gives that of some, or a single one.

        Args:
            tensor: name of a linear matrix; by default that which the page opens with.

        Raises:
            NothingToDraw: the changed entries were not located.
            ArgumentError: they were not in this matrix.

        >>> from offprincipal.comparison import compare
        >>> _ = torch.manual_seed(0)
        >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
        >>> figure = compare(base, {"rl": tuned}, metrics=("location",)).plot.stripes()
        >>> [axis.get_xlabel() for axis in figure.axes]
        ['row', 'column']
        """
        return plots_curves.stripes(self._table("matrices"), self._curve_rows(), self._runs, self._every, tensor)

    def _shown(self) -> dict[str, Any]:
        """The summary of the runs to draw."""
        runs = {name: self._summary["runs"][name] for name in self._runs}
        pairs = [pair for pair in self._summary["pairs"] if pair["run_a"] in runs and pair["run_b"] in runs]
        return self._summary | {"runs": runs, "pairs": pairs}

    def _table(self, name: str) -> pa.Table:
        """A table's rows of the runs to draw."""
        return self._tables(name).filter(pc.field("run").isin(self._runs))

    def _curve_rows(self) -> Path | pa.Table:
        return self._tables("curves") if self._curves is None else self._curves


def write_plots(folder: Path, formats: Sequence[str], out: Path | None = None) -> list[Path]:
    """Write every figure of a comparison's or study's folder that can be drawn, in each format.

    Args:
        formats: of `FORMATS`; out: the folder for them; by default `figures` in the folder.

    Raises:
        ArgumentError: a format is unknown, or matplotlib is not installed.
        FileError: the folder holds no comparison, or one that is damaged, or a file cannot be written.

    >>> import tempfile
    >>> from offprincipal.comparison import compare
    >>> _ = torch.manual_seed(0)
    >>> base, tuned = (torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
    >>> folder = compare(base, {"rl": tuned}, metrics=("changes",)).write(tempfile.mkdtemp())
    >>> [path.name for path in write_plots(folder, ["pdf"])]
    ['layers.pdf']
    """
    odd = [name for name in formats if name not in FORMATS]
    if odd or not formats:
        raise ArgumentError(f"no format '{odd[0] if odd else ''}': choose one of {', '.join(FORMATS)}")
    comparison, into = comparison_in(folder), out or folder / "figures"
    written: list[Path] = []
    with damage_reported(comparison):
        tables = cache(partial(read_columns, comparison))  # several figures are of one
        plots = Plots(read_summary(comparison), tables, comparison / "curves.parquet")
        require_folder(into)
        for name in PLOTS:
            with suppress(NothingToDraw):
                figure = getattr(plots, name)()
                written += [_save(figure, into / f"{name}.{kind}") for kind in formats]
    if not written:
        raise FileError(f"{folder} holds no figure that can be drawn: compare with --metrics location or spectrum")
    return written


def _save(figure: "Figure", path: Path) -> Path:
    write_atomically(path, lambda part: part.write_bytes(file_of(figure, path.suffix[1:])))
    return path
