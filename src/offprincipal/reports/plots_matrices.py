"""Figures over all matrices for papers: by role and layer, and against a null.

Draws what `reports.figures` prepares for the page; `reports.plots` has the figures by name.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from offprincipal.errors import meant
from offprincipal.measures.columns import METRICS, nulls_of
from offprincipal.reports import figures
from offprincipal.reports.plots_drawing import (
    COLUMN,
    HIGHEST,
    INK,
    PAGE,
    NothingToDraw,
    below,
    decades,
    defined,
    drawn_runs,
    folded,
    legend,
    legend_height,
    measured,
    panels,
    text_of,
    title_panel,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AROUND = 0.7  # inches that axes and notes take
_ROLE = 0.13  # inches of a row of a heatmap
_HEATMAPS = 5.2  # inches that they have across a page
_MOST_PANELS = 8  # heatmaps beside each other
_MOST_CLOUDS = 6  # runs whose points can be told apart in one panel
_ACROSS, _CLOUD = 5, 1.3  # panels of one run's points each: beside each other, and inches
_COLUMNS = {column.name: column for metric in METRICS for column in metric.columns}


def layers(matrices: pa.Table, names: Sequence[str], every: Sequence[str], metric: str) -> "Figure":
    """A figure by role and layer, a panel a run and beside it one of its null, on one scale."""
    heat = figures.heatmaps(matrices, names)
    known = [about["name"] for about in heat["metrics"]]
    if metric not in known:
        raise NothingToDraw(f"no figure '{metric}' was measured of these runs: {_hint(metric, known)}")
    about = heat["metrics"][known.index(metric)]
    sides = [heat["values"][known.index(metric)]]
    null_words = ""
    if about["nulls"]:
        at, null_words = about["nulls"][0]
        sides.append(heat["values"][at])
    rows, columns = _filled(sides)
    height = 0.42 + _ROLE * len(rows)
    lines = max(1, int((HIGHEST - _AROUND) / height))
    runs = drawn_runs(names, every, lines * (_MOST_PANELS // len(sides)))
    across = -(-len(runs.at) // lines) * len(sides)
    with panels(len(runs.at) * len(sides), height, columns=across, sharex=True, sharey=True) as (figure, axes):
        figure.set_figheight(figure.get_figheight() + _AROUND)
        grids = [
            [defined([side[at][i][j] for j in columns]) for i in rows] for at in runs.at for side in sides
        ]  # (roles, layers) each, a run's null behind it
        finite = [x for grid in grids for row in grid for x in row if x == x]
        scale = {"cmap": "cividis", "vmin": min(finite), "vmax": max(finite)}
        for axis, grid in zip(axes, grids, strict=True):
            drawn = axis.imshow(grid, aspect="auto", interpolation="none", **scale)
        titles = [title for label in runs.labels for title in (label, *(["null"] * (len(sides) - 1)))]
        for axis, title in zip(axes, titles, strict=True):
            title_panel(axis, title, _HEATMAPS / across)
            axis.set_yticks(range(len(rows)), [text_of(heat["roles"][i]) for i in rows])
        _name_layers(axes, across, [heat["layers"][j] for j in columns])
        words = folded(_words(metric), 0.85 * figure.get_figheight())
        figure.colorbar(drawn, ax=axes, label="\n".join(words), aspect=40)
        notes = [f"null: {null_words}"] if null_words else []
        if len(finite) < sum(len(row) for grid in grids for row in grid):
            notes.append("white: undefined, or no such matrix")
        below(figure, "layer", [*notes, *runs.notes])
    return figure


def _filled(sides: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Rows and columns in which any run or null has a value."""
    known = [
        (i, j)
        for grids in sides
        for grid in grids
        for i, row in enumerate(grid)
        for j, value in enumerate(row)
        if value is not None
    ]
    return sorted({i for i, _ in known}), sorted({j for _, j in known})


def _name_layers(axes: Sequence[Any], across: int, names: Sequence[str]) -> None:
    """At the foot of each column, as many as there is room for."""
    room = max(1, int(_HEATMAPS / across / 0.22))
    step = -(-len(names) // room)
    ticks = [place for place, name in enumerate(names) if place % step == 0 and (name != "none" or step == 1)]
    for axis in axes[-across:]:
        axis.set_xticks(ticks, [names[place].replace("none", "–") for place in ticks])
        axis.tick_params(labelbottom=True)  # of a column that ends above the others, too


def _hint(metric: str, known: Sequence[str]) -> str:
    return meant(metric, known, "`offprincipal compare --list` has all")


def _words(metric: str) -> str:
    """What a column of `matrices.parquet` holds, and its unit, on an axis."""
    column = _COLUMNS.get(metric)
    if column is None:
        return metric.replace("_", " ")
    if column.null_of:
        return _with_null(column.null_of, metric)[1]
    refers = column.meaning.startswith(("the same", "its ", "standard deviation of that"))
    return (f"{metric.replace('_', ' ')}: " if refers else "") + column.meaning + _unit(column.unit)


def _with_null(metric: str, null: str) -> tuple[str, str]:
    """What a figure and its null are, in words that fit each other.

    >>> _with_null("spectral_shift", "spectral_shift_stored_null")
    ('spectral shift', 'spectral shift after a Gaussian update of equal norm, stored alike')
    """
    measured_words, null_words = _COLUMNS[metric].meaning, _COLUMNS[null].meaning
    if null_words.startswith("the same"):
        null_words = measured_words + null_words.removeprefix("the same")
    elif " after " in null_words:
        measured_words = null_words.partition(" after ")[0]
    unit = _unit(_COLUMNS[metric].unit)
    return measured_words + unit, null_words + unit


def _unit(unit: str) -> str:
    return "" if unit == "1" else f", {unit}"


def against_null(matrices: pa.Table, names: Sequence[str], every: Sequence[str], metric: str, null: str) -> "Figure":
    """Every linear matrix of every run: what was measured over what a null would show; on the line they are alike."""
    if metric not in matrices.column_names:
        raise NothingToDraw(f"no figure '{metric}' was measured of these runs: {_hint(metric, matrices.column_names)}")
    nulls = {name: of for name, of in nulls_of(metric).items() if of in matrices.column_names}
    if null.removesuffix("_null") not in nulls:
        raise NothingToDraw(f"{metric} has no null '{null.removesuffix('_null')}': it has {', '.join(nulls) or 'none'}")
    beside = nulls[null.removesuffix("_null")]
    rows = matrices.select(["run", metric, beside]).to_pylist()
    known = [
        row for row in rows if row["run"] in names and (row[metric] or 0) > 0 and (row[beside] or 0) > 0
    ]  # on logarithmic scales
    measured(known, "it, beside its null")
    clouds = {name: [(row[beside], row[metric]) for row in known if row["run"] == name] for name in names}
    ends = [f(r[name] for r in known for name in (metric, beside)) for f in (min, max)]
    draw = _clouds_together if len(names) <= _MOST_CLOUDS else _clouds_apart
    return draw(clouds, every, ends, _with_null(metric, beside))


_Clouds = Mapping[str, Sequence[tuple[float, float]]]


def _clouds_together(clouds: _Clouds, every: Sequence[str], ends: Sequence[float], words: tuple[str, str]) -> "Figure":
    """Few runs in one square."""
    runs = drawn_runs(list(clouds), every, len(clouds))
    height = COLUMN - 0.1 + legend_height(COLUMN, runs.legend())
    with panels(1, height, COLUMN) as (figure, (axis,)):
        for (colour, marker), points in zip(zip(runs.colours, runs.markers, strict=True), clouds.values(), strict=True):
            _cloud(axis, points, colour, marker, ends)
        _as_square(axis, ends)
        axis.set_ylabel("\n".join(folded(words[0], 2.4)))
        legend(figure, runs.legend())
        below(figure, words[1], runs.notes)
    return figure


def _clouds_apart(clouds: _Clouds, every: Sequence[str], ends: Sequence[float], words: tuple[str, str]) -> "Figure":
    """A panel a run."""
    runs = drawn_runs(list(clouds), every, _ACROSS * int((HIGHEST - _AROUND) / _CLOUD))
    shown = [list(clouds.values())[at] for at in runs.at]
    shape = {"columns": _ACROSS, "sharex": True, "sharey": True}
    with panels(len(shown), _CLOUD, PAGE, **shape) as (figure, axes):
        figure.set_figheight(figure.get_figheight() + _AROUND)
        for axis, points, label, colour in zip(axes, shown, runs.labels, runs.colours, strict=True):
            _cloud(axis, points, colour, "o", ends)
            _as_square(axis, ends)
            title_panel(axis, label, 0.85 * PAGE / _ACROSS)
        for axis in axes[-_ACROSS:]:
            axis.tick_params(labelbottom=True)
        figure.supylabel(words[0])
        below(figure, words[1], runs.notes)
    return figure


def _cloud(axis: Any, points: Sequence[tuple[float, float]], colour: str, marker: str, ends: Sequence[float]) -> None:
    across, up = zip(*points, strict=True) if points else ((), ())
    axis.scatter(across, up, s=8, alpha=0.7, linewidths=0, color=colour, marker=marker)
    axis.plot(ends, ends, color=INK, linewidth=0.6)


def _as_square(axis: Any, ends: Sequence[float]) -> None:
    """Both axes alike, and logarithmic."""
    room = (ends[0] / 1.5, ends[1] * 1.5)
    axis.set(xscale="log", yscale="log", xlim=room, ylim=room, box_aspect=1)
    for each in (axis.xaxis, axis.yaxis):
        decades(each)
