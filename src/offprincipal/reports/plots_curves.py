"""Figures of the curves of one matrix for papers: singular values and angles, changes of rows and columns.

Draws what `reports.figures` prepares for the page; `reports.plots` has the figures by name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from offprincipal.errors import ArgumentError, meant
from offprincipal.reports import figures
from offprincipal.reports.nulls import NULL_WORDS
from offprincipal.reports.numbers import number
from offprincipal.reports.plots_drawing import (
    DOTTED,
    GREY,
    INK,
    NULL,
    PAGE,
    PALE,
    Drawn,
    Look,
    below,
    decades,
    defined,
    drawn_runs,
    legend,
    legend_height,
    look,
    measured,
    panels,
    percent_axis,
    text_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AROUND = 0.7  # inches that axes and notes take
_MOST_LINES = 6  # runs whose curves can be told apart in one panel
_NAMED = 3  # runs whose dispersion is said one by one


def spectra(
    matrices: pa.Table, curves: Path | pa.Table, names: Sequence[str], every: Sequence[str], tensor: str | None
) -> "Figure":
    """Singular values of base and runs of one matrix, their shifts, and the angles beside their null's largest."""
    chosen = _tensor(matrices, figures.SPECTRUM_COLUMNS, figures.SPECTRUM_MATRICES, tensor, "singular values or angles")
    (matrix,) = figures.spectra(_rows_of(matrices, chosen), curves, names)["matrices"]
    runs = drawn_runs(names, every, _MOST_LINES, [_furthest(run) for run in matrix["runs"]], "the base")
    shown = [matrix["runs"][at] for at in runs.at]
    titles = {"tuned": "singular values", "left": "principal angles, left", "shift": "shift: tuned − base"}
    titles |= {"right": "principal angles, right"}
    kinds = [kind for kind in titles if any(run[kind] for run in shown)]
    measured(kinds, f"singular values or angles of '{chosen}'")
    styles = _spectral_styles(kinds)
    columns = len({kind in ("left", "right") for kind in kinds})
    height = 1.35 + (_AROUND + legend_height(PAGE, styles, runs.legend())) / 2
    with panels(len(kinds), height, PAGE, columns=columns) as (figure, axes):
        for axis, kind in zip(axes, kinds, strict=True):
            if kind == "tuned" and matrix["base"]:
                axis.plot(matrix["base"]["x"], defined(matrix["base"]["y"]), color=INK, linewidth=1)
            for place, run in enumerate(shown):
                _spectral_curve(axis, run, kind, runs.line(place))
            axis.set(title=titles[kind], xlabel="no.")
            _scale(axis, kind)
        legend(figure, styles, runs.legend(), title=text_of(chosen))
        null = [f"stored null: {NULL_WORDS['_stored_null']}"] if len(styles) in (1, 3) else []
        below(figure, "", [*null, *runs.notes])
    return figure


def _furthest(run: Mapping[str, Any]) -> float:
    """How far a run turned a matrix, or where no angle was measured, shifted its singular values."""
    angles = [y for side in ("left", "right") if run[side] for y in run[side]["y"] if y is not None]
    shifts = [abs(y) for y in (run["shift"] or {"y": ()})["y"] if y is not None]
    return max(angles or shifts, default=0.0)


def _spectral_styles(kinds: Sequence[str]) -> list[tuple[str, Look]]:
    styles: list[tuple[str, Look]] = []
    if "tuned" in kinds:
        styles += [("base", {"color": INK, "linewidth": 1}), ("tuned", {"color": GREY, "linestyle": DOTTED})]
    if "left" in kinds or "right" in kinds:
        styles.append(("stored null, largest angle", {"color": GREY, "marker": "o", **NULL}))
    return styles


def _spectral_curve(axis: Any, run: Mapping[str, Any], kind: str, line: Look) -> None:
    """One curve of a run, and for an angle the line of its null."""
    curve = run[kind]
    if curve is None:
        return
    every = max(1, len(curve["x"]) // 6)
    dash = {"linestyle": DOTTED} if kind == "tuned" else {}
    axis.plot(curve["x"], defined(curve["y"]), markevery=every, **line, **dash)
    null = run["nulls"][("left", "right").index(kind)] if kind in ("left", "right") else None
    if null is not None:
        axis.plot((curve["x"][0], curve["x"][-1]), (null, null), **(line | NULL))


def _scale(axis: Any, kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if kind == "tuned":
        axis.set_yscale("log")
        decades(axis.yaxis)
    elif kind == "shift":
        axis.axhline(0, color=INK, linewidth=0.5)
    else:
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}°")


def stripes(
    matrices: pa.Table, curves: Path | pa.Table, names: Sequence[str], every: Sequence[str], tensor: str | None
) -> "Figure":
    """The share of each row's and column's entries that changed in one matrix, beside the spacing null."""
    chosen = _tensor(matrices, figures.STRIPE_COLUMNS, figures.STRIPE_MATRICES, tensor, "changes of rows and columns")
    (matrix,) = figures.stripes(_rows_of(matrices, chosen), curves, names)["matrices"]
    used = _with_both(matrix["row"]["rates"], matrix["row"]["nulls"])
    measured(used, f"rows and columns of '{chosen}'")
    runs = drawn_runs(names, every, len(names))
    colour = runs.colours[0] if len(names) == 1 else INK
    with panels(2, 2.2, PAGE) as (figure, axes):
        for axis, side in zip(axes, ("row", "column"), strict=True):
            rates, null = (_mean([matrix[side][kind][at] for at in used]) for kind in ("rates", "nulls"))
            if null:
                axis.fill_between(null["x"], null["y"], color=PALE, linewidth=0)
                axis.plot(null["x"], null["y"], color=GREY, linewidth=0.8)
            if rates:
                axis.plot(rates["x"], rates["y"], ".", color=colour, markersize=2.5, alpha=0.8)
            axis.set(title=f"{side}s", xlabel=side)
            axis.set_ylim(bottom=0)
            percent_axis(axis.yaxis)
        axes[0].set_ylabel("entries changed")
        mean = "measured" if len(used) == 1 else f"measured, mean of {len(used)} runs"
        legend(
            figure,
            [(mean, look(colour, ".")), ("spacing null", {"facecolor": PALE, "edgecolor": GREY, "linewidth": 0.8})],
            title=text_of(chosen),
        )
        below(figure, "", _dispersions(matrix["dispersion"], runs))
    return figure


def _with_both(rates: Sequence[Any], nulls: Sequence[Any]) -> list[int]:
    """The runs that have a null too, so that measurement and null are of the same; all where none has."""
    measured_runs = [at for at, rate in enumerate(rates) if rate]
    return [at for at in measured_runs if nulls[at]] or measured_runs


def _mean(curves: Sequence[Any]) -> Any:
    """None where a curve is not there."""
    if None in curves:
        return None
    at_each = zip(*(defined(curve["y"]) for curve in curves), strict=True)
    return {"x": curves[0]["x"], "y": [sum(values) / len(values) for values in at_each]}


def _dispersions(found: Sequence[Sequence[float | None]], runs: Drawn) -> list[str]:
    """Those of rows and columns, of each of a few runs, or their range."""
    if len(found) <= _NAMED:
        each = [
            f"{label} {number(row)} and {number(column)}"
            for label, (row, column) in zip(runs.labels, found, strict=True)
        ]
        return [f"dispersion over rows and columns (1 is the spacing null): {', '.join(each)}", *runs.notes]
    sides = [sorted(value for value in side if value is not None) for side in zip(*found, strict=True)]
    spans = [f"{number(side[0])} to {number(side[-1])}" if side else number(None) for side in sides]
    return [f"dispersion (1 is the spacing null): over rows {spans[0]}, over columns {spans[1]}"]


def _rows_of(matrices: pa.Table, tensor: str) -> pa.Table:
    return matrices.filter(pc.field("tensor") == tensor)


def _tensor(matrices: pa.Table, columns: Sequence[str], limit: int, tensor: str | None, what: str) -> str:
    """The matrix to draw: that of the name, or that which the page opens with.

    Raises:
        NothingToDraw: no matrix has such curves.
        ArgumentError: this one has none.
    """
    known = figures.choose_matrices(matrices, columns, len(matrices)).tensors
    measured(known, what)
    if tensor is None:
        return figures.choose_matrices(matrices, columns, limit).tensors[0]
    if tensor not in known:
        there = tensor in matrices["tensor"].to_pylist()
        fault = f"of '{tensor}' no {what} were measured" if there else f"no tensor '{tensor}' was compared"
        within = [name for name in known if all(word in name.lower() for word in tensor.lower().split())][:3]
        hint = f"did you mean {' or '.join(within)}?" if within else f"{len(known)} have them, such as {known[0]}"
        raise ArgumentError(f"{fault}: {hint if within or there else meant(tensor, known, hint)}")
    return tensor
