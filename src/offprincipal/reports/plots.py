"""Figures for papers and notebooks, by matplotlib, from what the report's figures are drawn from.

Sizes and letters are those of a page in two columns: 6.9 inches across, 8 points. Text stays text in PDF and SVG.
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
_HIGHEST = 9.0  # of a page
_LEGEND = 3  # runs beside each other
_MARKERS = dict(zip(SYMBOLS, ("o", "D", "^", "*"), strict=True))
_LOWEST = 1.8
FORMATS = ("pdf", "svg", "png")
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True, "pdf.fonttype": 42, "svg.fonttype": "none",
    "svg.hashsalt": "offprincipal",
}  # fmt: skip
_GREY, _INK = "#9aa3ad", "#1f2733"


def _look(colour: str, marker: str, filled: bool = True) -> dict[str, Any]:
    """Of one mark, in a panel and in its legend."""
    shape = {"marker": marker, "markersize": 5, "markeredgewidth": 0.7, "linestyle": ""}
    return shape | {"color": colour, "markerfacecolor": colour if filled else "none"}


_RING, _DIAMOND = _look(_INK, "o", filled=False), _look(_INK, "D", filled=False)


_MOST_PAIRS = int((_HIGHEST - 0.6) / 0.16)


class NothingToDraw(ArgumentError):
    """A comparison did not measure what a figure shows."""


class Plots:
    """The figures of a comparison: `result.plot.anatomy()`, each a `matplotlib.figure.Figure`.

    Args:
        summary: `summary.json`.
        matrices: reads columns of `matrices.parquet` as a table.
    """

    def __init__(self, summary: Mapping[str, Any], matrices: Callable[[], pa.Table]) -> None:
        self._summary, self._matrices = summary, matrices
        self._runs = list(summary["runs"])
        self._labels = [plain(name).replace("$", r"\$") for name in short_names(self._runs)]

    def __dir__(self) -> list[str]:
        return list(PLOTS)

    def anatomy(self) -> "Figure":
        """How far the changed entries lie from chance in either mask, and what each rung of the ladder explains."""
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
        """The share of the changed entries in each mask, beside chance and what rounding alone would put there."""
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
        """The Jaccard index of the changed entries of two runs each, beside chance and each rung of the ladder.

        Of more pairs than a page has room for, those furthest from what the ladder explains, which is said below them.
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
        """A figure by role and layer, a panel a run, on one scale: the mean over the matrices of a cell.

        Panels stand in as many columns as keep the figure on a page.

        Raises:
            NothingToDraw: it was not measured.
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
                axis.tick_params(labelbottom=True)  # of a column that ends above the others, too
                axis.set_xlabel("layer")
            unit = heat["metrics"][place]["unit"]
            figure.colorbar(drawn, ax=axes, label=metric if unit == "1" else f"{metric}, {unit}", aspect=40)
        return figure

    def against_null(self, metric: str = "spectral_shift", null: str = "stored") -> "Figure":
        """Every linear matrix of every run: what was measured over what a null would show; on the line they are alike.

        Args:
            metric: a figure of `matrices.parquet`; null: one of its nulls, as `runs[…].<metric>.nulls` names them.

        Raises:
            NothingToDraw: either was not measured.
        """
        table = self._matrices()
        if metric not in table.column_names:
            hint = meant(metric, table.column_names, "`offprincipal compare --list` has all")
            raise NothingToDraw(f"no figure '{metric}' was measured of these runs: {hint}")
        nulls = {name: of for name, of in nulls_of(metric).items() if of in table.column_names}
        null = null.removesuffix("_null")
        if null not in nulls:
            raise NothingToDraw(f"{metric} has no null '{null}': it has {', '.join(nulls) or 'none'}")
        beside = nulls[null]
        rows = table.select(["run", metric, beside]).to_pylist()
        known = [row for row in rows if row[metric] and row[beside] and row[metric] > 0 and row[beside] > 0]
        self._measured(known, "it, beside its null")
        lines = -(-len(self._runs) // _LEGEND)  # of the legend, above a square
        with _figure(1, COLUMN + 0.2 + 0.16 * lines, width=COLUMN) as (figure, (axis,)):
            for place, run in enumerate(self._runs):
                own = [(row[beside], row[metric]) for row in known if row["run"] == run]
                colour, label = COLOURS[place % len(COLOURS)], self._labels[place]
                marker = _MARKERS[SYMBOLS[place // len(COLOURS) % len(SYMBOLS)]]
                places = zip(*own, strict=True) if own else ([], [])
                axis.scatter(*places, s=6, alpha=0.6, linewidths=0, color=colour, marker=marker, label=label)
            ends = [f(r[name] for r in known for name in (metric, beside)) for f in (min, max)]
            axis.plot(ends, ends, color=_INK, linewidth=0.6)
            room = [ends[0] / 1.5, ends[1] * 1.5]
            axis.set(xscale="log", yscale="log", xlabel=beside, ylabel=metric, xlim=room, ylim=room, box_aspect=1)
            for each in (axis.xaxis, axis.yaxis):
                each.set_minor_formatter("")
            figure.legend(loc="outside upper center", ncols=_LEGEND, markerscale=2)
        return figure

    def _measured(self, found: Sequence[Any], what: str) -> Sequence[Any]:
        if not found:
            raise NothingToDraw(f"nothing to draw: this comparison has not measured {what}, or nothing changed")
        return found

    def _name_rows(self, axis: Any) -> None:
        axis.set_yticks(range(len(self._labels)))
        axis.set_yticklabels(self._labels)
        axis.set_ylim(len(self._labels) - 0.4, -0.6)


PLOTS = ("anatomy", "overlaps", "agreement", "layers", "against_null")


def write_plots(folder: Path, formats: Sequence[str], out: Path | None = None) -> list[Path]:
    """Write every figure of a comparison's or study's folder that can be drawn, in each format.

    Args:
        formats: of `FORMATS`; out: the folder for them; by default `figures` in the folder.

    Raises:
        ArgumentError: a format is unknown, or matplotlib is not installed.
        FileError: the folder holds no comparison, or one that is damaged, or a file cannot be written.
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
    """A figure as a file of that kind, which is the same whenever it is drawn."""
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
    """A figure and its panels, each so high, in so many columns, in our style; no window, no global state."""
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
        figure._repr_png_ = partial(_drawn, figure, "png", 110)  # for notebooks, whatever backend they have


def _with_interval(axis: Any, row: int, found: Mapping[str, Any], colour: str, factor: float) -> None:
    if found.get("value") is None:
        return
    if None not in (found.get("low"), found.get("high")):
        axis.plot([factor * found["low"], factor * found["high"]], [row, row], color=colour, linewidth=1)
    axis.plot(factor * found["value"], row, ".", color=colour, markersize=6)


def _legend(figure: Any, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        (Line2D([], [], label=label, **look) if "marker" in look else Patch(label=label, **look))
        for label, look in entries
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
