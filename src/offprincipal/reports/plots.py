"""Figures for papers and notebooks by matplotlib, from the same data as the report's figures.

Sizes fit a page of two columns, 6.9 inches wide, with 8-point letters. Text stays text in PDF and SVG.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from offprincipal.errors import ArgumentError, FileError, install_command, meant
from offprincipal.files import require_folder, write_atomically
from offprincipal.measures.columns import nulls_of
from offprincipal.reports import figures
from offprincipal.reports.names import short_names
from offprincipal.reports.report import COLOURS, SYMBOLS, comparison_in, damage_reported, read_columns
from offprincipal.reports.words import agreement_left_over, plain
from offprincipal.tables import read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, COLUMN = 6.9, 3.35  # inches
_HIGHEST = 9.0  # largest height on a page, inches
_LEGEND = 3  # runs in a row of a legend
_MARKERS = dict(zip(SYMBOLS, ("o", "D", "^", "*"), strict=True))
_LOWEST = 1.8  # smallest height, inches
FORMATS = ("pdf", "svg", "png")
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True, "pdf.fonttype": 42, "svg.fonttype": "none",
    "svg.hashsalt": "offprincipal",
}  # fmt: skip
_GREY, _INK = "#9aa3ad", "#1f2733"


def _look(colour: str, marker: str, filled: bool = True) -> dict[str, Any]:
    """The style of a marker, in a panel and in its legend."""
    shape = {"marker": marker, "markersize": 5, "markeredgewidth": 0.7, "linestyle": ""}
    return shape | {"color": colour, "markerfacecolor": colour if filled else "none"}


_RING, _DIAMOND = _look(_INK, "o", filled=False), _look(_INK, "D", filled=False)


_MOST_PAIRS = int((_HIGHEST - 0.6) / 0.16)  # of runs, on a page


class NothingToDraw(ArgumentError):
    """A comparison did not measure the data of a figure."""


class Plots:
    """The figures of a comparison, such as `result.plot.anatomy()`; each is a `matplotlib.figure.Figure`.

    Every method raises NothingToDraw if its data were not measured, and ArgumentError if matplotlib is not installed.

    Args:
        summary: the content of `summary.json`.
        matrices: returns columns of `matrices.parquet` as a table.

    >>> rungs = {"": 0.3, "_random": 0.5, "_rounding_null": 0.4, "_spacing_null": 0.35, "_margin_null": 0.32}
    >>> metrics = {f"principal_overlap{ending}": {"value": value} for ending, value in rungs.items()}
    >>> Plots({"runs": {"grpo": {"metrics": metrics}}}, lambda: pa.table({})).anatomy().axes[0].get_title()
    'principal weights'
    """

    def __init__(self, summary: Mapping[str, Any], matrices: Callable[[], pa.Table]) -> None:
        self._summary, self._matrices = summary, matrices
        self._runs = list(summary["runs"])
        self._labels = [plain(name).replace("$", r"\$") for name in short_names(self._runs)]

    def __dir__(self) -> list[str]:
        return list(PLOTS)

    def anatomy(self) -> "Figure":
        """The distance from chance of the overlap with each mask, decomposed along the ladder of nulls.

        Raises:
            NothingToDraw: location was not measured, or nothing changed.
        """
        masks = self._measured(figures.anatomy(self._summary), "location")
        with _figure(len(masks), 0.6 + 0.2 * len(self._runs), sharey=True) as (figure, axes):
            for axis, mask in zip(axes, masks, strict=True):
                for row, run in enumerate(mask["runs"]):
                    ends = [0.0, 0.0]  # so far, to the left and to the right
                    for part, (_, colour) in zip(run["parts"], figures.ANATOMY_PARTS, strict=True):
                        if part:
                            axis.barh(row, part, left=ends[part > 0], height=0.7, color=colour)
                            ends[part > 0] += part
                    if run["measured"] is not None:
                        axis.plot([run["measured"]] * 2, [row - 0.42, row + 0.42], color=_INK, linewidth=1.2)
                axis.axvline(0, color=_INK, linewidth=0.5)
                axis.set(title=mask["title"], xlabel="points beyond chance")
                self._name_rows(axis)
            _legend(figure, [(name, {"facecolor": colour}) for name, colour in figures.ANATOMY_PARTS])
        return figure

    def overlaps(self) -> "Figure":
        """The share of the changed entries in each mask, with chance and the rounding null.

        Raises:
            NothingToDraw: location was not measured, or nothing changed.
        """
        masks = self._measured(figures.overlaps(self._summary), "location")
        with _figure(len(masks), 0.6 + 0.2 * len(self._runs), sharey=True) as (figure, axes):
            for axis, mask in zip(axes, masks, strict=True):
                for row, run in enumerate(mask["runs"]):
                    for null, look in (("random", _look(_GREY, "|")), ("rounding", _RING)):
                        if run[null] is not None:
                            axis.plot(100 * run[null], row, **look)
                    _with_interval(axis, row, run, COLOURS[row % len(COLOURS)], 100)
                axis.set(title=mask["title"], xlabel="% of the changed entries", xlim=(0, 102))
                self._name_rows(axis)
            _legend(figure, [("measured", _look(_INK, ".")), ("chance", _look(_GREY, "|")), ("rounding alone", _RING)])
        return figure

    def agreement(self) -> "Figure":
        """The Jaccard index of the changed entries of each pair of runs, with chance and the rounding and margin nulls.

        If there are more pairs than fit on a page, those furthest from the margin null are drawn, and a note says so.

        Raises:
            NothingToDraw: there are not two runs, or location was not measured.
        """
        every = self._measured(self._summary["pairs"], "location, of two runs or more")
        kept = sorted(sorted(range(len(every)), key=lambda i: -agreement_left_over(every[i]))[:_MOST_PAIRS])
        pairs = [every[i] for i in kept]
        labels = dict(zip(self._runs, self._labels, strict=True))
        names = [f"{labels[pair['run_a']]} · {labels[pair['run_b']]}" for pair in pairs]
        nulls = (("random", _look(_GREY, "|")), ("rounding_null", _RING), ("margin_null", _DIAMOND))
        with _figure(1, 0.6 + 0.16 * len(pairs), width=COLUMN + 0.6) as (figure, (axis,)):
            for row, pair in enumerate(pairs):
                for null, look in nulls:
                    if pair.get(f"jaccard_{null}") is not None:
                        axis.plot(pair[f"jaccard_{null}"], row, **look)
                _with_interval(axis, row, pair | {"value": pair["jaccard"]}, COLOURS[0], 1)
            left_out = f"\n{len(pairs)} of {len(every)} pairs: those furthest from the nulls" if pairs != every else ""
            axis.set(xlabel=f"Jaccard index of the changed entries{left_out}", xlim=(-0.02, 1.02))
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            marks_of = (("chance", _look(_GREY, "|")), ("rounding", _RING), ("rows and columns", _DIAMOND))
            _legend(figure, [("measured", _look(COLOURS[0], ".")), *marks_of])
        return figure

    def layers(self, metric: str = "unchanged_fraction") -> "Figure":
        """A metric by role and layer, with a panel for each run and one scale; the mean if a cell has several matrices.

        Panels are arranged in as many columns as needed for the figure to fit on a page.

        Args:
            metric: a column of `matrices.parquet`.

        Raises:
            NothingToDraw: the metric was not measured.
        """
        heat = figures.heatmaps(self._matrices(), self._runs)
        names = [about["name"] for about in heat["metrics"]]
        if metric not in names:
            raise NothingToDraw(f"no figure '{metric}' was measured of these runs: choose one of {', '.join(names)}")
        place = names.index(metric)
        grids = [[[float("nan") if x is None else x for x in row] for row in grid] for grid in heat["values"][place]]
        known = [x for grid in grids for row in grid for x in row if x == x]
        low, high = min(known), max(known)
        height = 0.5 + 0.13 * len(heat["roles"])
        columns = -(-len(grids) // max(1, int(_HIGHEST / height)))
        with _figure(len(grids), height, columns=columns, sharex=True, sharey=True) as (figure, axes):
            for axis, grid, label in zip(axes, grids, self._labels, strict=True):
                drawn = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=low, vmax=high, interpolation="none")
                axis.set(yticks=range(len(heat["roles"])), yticklabels=heat["roles"])
                axis.set_title(label, loc="left")
            step = max(1, len(heat["layers"]) // 12)
            for axis in axes[-columns:]:
                axis.set_xticks(range(0, len(heat["layers"]), step), heat["layers"][::step])
                axis.tick_params(labelbottom=True)  # also in columns with fewer panels
                axis.set_xlabel("layer")
            unit = heat["metrics"][place]["unit"]
            figure.colorbar(drawn, ax=axes, label=metric if unit == "1" else f"{metric}, {unit}", aspect=40)
        return figure

    def against_null(self, metric: str = "spectral_shift", null: str = "stored") -> "Figure":
        """The measured value of every linear matrix against its null, on logarithmic axes; on the line they are equal.

        Args:
            metric: a column of `matrices.parquet`.
            null: one of its nulls, as named in `runs[…].<metric>.nulls`.

        Raises:
            NothingToDraw: the metric or its null was not measured.
        """
        table = self._matrices()
        if metric not in table.column_names:
            hint = meant(metric, table.column_names, "`offprincipal compare --list` has all")
            raise NothingToDraw(f"no figure '{metric}' was measured of these runs: {hint}")
        nulls = {name: of for name, of in nulls_of(metric).items() if of in table.column_names}
        null = null.removesuffix("_null")
        if null not in nulls:
            raise NothingToDraw(f"{metric} has no null '{null}': it has {', '.join(nulls) or 'none'}")
        expected = nulls[null]
        rows = table.select(["run", metric, expected]).to_pylist()
        known = [row for row in rows if row[metric] and row[expected] and row[metric] > 0 and row[expected] > 0]
        self._measured(known, f"{metric} with this null")
        lines = -(-len(self._runs) // _LEGEND)  # of the legend, above a square
        with _figure(1, COLUMN + 0.2 + 0.16 * lines, width=COLUMN) as (figure, (axis,)):
            for place, run in enumerate(self._runs):
                own = [(row[expected], row[metric]) for row in known if row["run"] == run]
                colour, label = COLOURS[place % len(COLOURS)], self._labels[place]
                marker = _MARKERS[SYMBOLS[place // len(COLOURS) % len(SYMBOLS)]]
                places = zip(*own, strict=True) if own else ([], [])
                axis.scatter(*places, s=6, alpha=0.6, linewidths=0, color=colour, marker=marker, label=label)
            ends = [f(r[name] for r in known for name in (metric, expected)) for f in (min, max)]
            axis.plot(ends, ends, color=_INK, linewidth=0.6)
            room = [ends[0] / 1.5, ends[1] * 1.5]
            axis.set(xscale="log", yscale="log", xlabel=expected, ylabel=metric, xlim=room, ylim=room, box_aspect=1)
            for each in (axis.xaxis, axis.yaxis):
                each.set_minor_formatter("")
            figure.legend(loc="outside upper center", ncols=_LEGEND, markerscale=2)
        return figure

    def _measured(self, data: Sequence[Any], what: str) -> Sequence[Any]:
        """The data; raises NothingToDraw if there are none."""
        if not data:
            raise NothingToDraw(f"nothing to draw: this comparison has not measured {what}, or nothing changed")
        return data

    def _name_rows(self, axis: Any) -> None:
        axis.set_yticks(range(len(self._labels)))
        axis.set_yticklabels(self._labels)
        axis.set_ylim(len(self._labels) - 0.4, -0.6)


PLOTS = ("anatomy", "overlaps", "agreement", "layers", "against_null")


def write_plots(folder: Path, formats: Sequence[str], out: Path | None = None) -> list[Path]:
    """Write every figure of a comparison or study that can be drawn, in each format.

    Args:
        folder: that `offprincipal compare` or `offprincipal study` wrote.
        formats: of `FORMATS`: pdf, svg, png.
        out: the folder for the figures; by default `figures` in the folder.

    Returns:
        Paths of the files.

    Raises:
        ArgumentError: a format is unknown, or matplotlib is not installed.
        FileError: the folder holds no comparison or a damaged one, no figure can be drawn, or a file cannot be written.

    >>> import tempfile
    >>> from offprincipal import compare
    >>> base, tuned = (torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)}) for _ in range(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = compare(base, tuned, out=f"{folder}/out")
    ...     [path.name for path in write_plots(Path(folder) / "out", ["svg"])]
    ['anatomy.svg', 'overlaps.svg', 'layers.svg', 'against_null.svg']
    """
    odd = [name for name in formats if name not in FORMATS]
    if odd or not formats:
        raise ArgumentError(f"no format '{odd[0] if odd else ''}': choose one of {', '.join(FORMATS)}")
    comparison, into = comparison_in(folder), out or folder / "figures"
    written: list[Path] = []
    with damage_reported(comparison):
        plots = Plots(read_summary(comparison), partial(read_columns, comparison, "matrices"))
        require_folder(into)
        for name in PLOTS:
            with suppress(NothingToDraw):
                figure = getattr(plots, name)()
                written += [_save(figure, into / f"{name}.{kind}") for kind in formats]
    if not written:
        raise FileError(f"{folder} holds no figure that can be drawn: compare with --metrics location or spectrum")
    return written


def _save(figure: "Figure", path: Path) -> Path:
    write_atomically(path, lambda part: part.write_bytes(_drawn(figure, path.suffix[1:])))
    return path


def _drawn(figure: "Figure", kind: str, dpi: int = 300) -> bytes:
    """The bytes of a figure in a format, without dates, so that they are reproducible."""
    import matplotlib

    dateless: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    content = BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format=kind, dpi=dpi, metadata=dateless[kind])
    return content.getvalue()


@contextmanager
def _figure(
    panels: int, height: float, width: float = PAGE, columns: int | None = None, **shared: bool
) -> Iterator[tuple["Figure", Sequence[Any]]]:
    """A figure and its panels in our style; `height` is of a row, in inches. No window and no global state are used."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(f"figures need matplotlib: {install_command('figures')}") from error
    with matplotlib.rc_context(_STYLE):
        columns = columns or panels
        rows = -(-panels // columns)
        figure: Any = Figure(figsize=(width, max(_LOWEST, height * rows)))
        axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
        for unused in axes[panels:]:
            unused.remove()
        yield figure, axes[:panels]
        figure._repr_png_ = partial(_drawn, figure, "png", 110)  # for notebooks, with any backend


def _with_interval(axis: Any, row: int, pooled: Mapping[str, Any], colour: str, factor: float) -> None:
    """Draw a value with its interval."""
    if pooled.get("value") is None:
        return
    if None not in (pooled.get("low"), pooled.get("high")):
        axis.plot([factor * pooled["low"], factor * pooled["high"]], [row, row], color=colour, linewidth=1)
    axis.plot(factor * pooled["value"], row, ".", color=colour, markersize=6)


def _legend(figure: Any, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        (Line2D([], [], label=label, **look) if "marker" in look else Patch(label=label, **look))
        for label, look in entries
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
