"""What the figures for papers are made of: style, panels, legends, notes, and how runs are told apart.

Knows no metric. Runs differ in colour and mark, curves in dashes, parts in hatches, so that a figure printed in grey
can be read. Text stays text in PDF and SVG. matplotlib is imported where something is drawn.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from offprincipal.errors import ArgumentError, install_command
from offprincipal.plain_text import plain
from offprincipal.reports.names import common_beginning, labels, short_names
from offprincipal.reports.numbers import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, COLUMN, HIGHEST = 6.9, 3.35, 9.0  # inches of a page in two columns
COLOURS = (  # of runs, in the page's order of hues; the first six are Okabe and Ito's, for every kind of eye
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#332288", "#999933", "#882255", "#7a6f5d",
)  # fmt: skip
INK, GREY, PALE = "#1f2733", "#6f7a86", "#dfe3e8"
DOTTED, DASHED = (0, (1, 1.5)), (0, (4, 2))
_LOWEST = 1.8
_LONGEST = 26  # letters of a label, as on the page
_LETTER = 0.058  # inches, of 7 points
_MARKERS = ("o", "s", "^", "D", "v", "P", "<", "X", ">", "*")
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 7, "legend.fontsize": 7, "legend.title_fontsize": 8,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "figure.labelsize": 7, "axes.linewidth": 0.6, "hatch.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.constrained_layout.use": True, "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "offprincipal",
}  # fmt: skip

Look = dict[str, Any]


class NothingToDraw(ArgumentError):
    """A comparison did not measure what a figure shows."""


def look(colour: str, marker: str, filled: bool = True, size: float = 5) -> Look:
    """Of one mark, in a panel and in its legend."""
    shape = {"marker": marker, "markersize": size, "markeredgewidth": 0.7, "linestyle": ""}
    return shape | {"color": colour, "markerfacecolor": colour if filled else "none"}


MEASURED, CHANCE = look(INK, ".", size=6), look(GREY, "|", size=6)
NULL = {"linestyle": DASHED, "markerfacecolor": "none", "markeredgewidth": 0.6, "markersize": 5, "linewidth": 0.8}
RING, DIAMOND = look(INK, "o", filled=False), look(INK, "D", filled=False)


@dataclass(frozen=True)
class Drawn:
    """The runs that a figure draws, and how.

    Args:
        at: their places among the runs to choose from.
        places: by which colours and marks go: those among all that were compared, or where colours repeat among these,
            those among the runs that are drawn.
        labels: of each; notes: what the labels and the choice leave out.
    """

    at: tuple[int, ...]
    places: tuple[int, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def colours(self) -> list[str]:
        """Another for each of ten runs."""
        return [COLOURS[place % len(COLOURS)] for place in self.places]

    @property
    def markers(self) -> list[str]:
        """Another for each of ten runs, so that a print in grey tells them apart."""
        return [_MARKERS[(place + place // len(COLOURS)) % len(_MARKERS)] for place in self.places]

    def line(self, row: int) -> Look:
        """How a curve of a run is drawn."""
        return {"color": self.colours[row], "marker": self.markers[row], "markersize": 3, "linewidth": 1}

    def legend(self) -> list[tuple[str, Look]]:
        """Of the runs."""
        return [
            (label, look(colour, marker))
            for label, colour, marker in zip(self.labels, self.colours, self.markers, strict=True)
        ]


def drawn_runs(
    names: Sequence[str],
    every: Sequence[str],
    most: int,
    distances: Sequence[float | None] | None = None,
    from_what: str = "",
) -> Drawn:
    """The runs that a figure has room for: all, or those furthest from something, or without distances the first.

    Args:
        names: the runs to choose from; every: all that were compared, by which colours and marks go.

    >>> drawn_runs(["a", "b", "c"], ["a", "b", "c"], 2, [0.1, None, 0.3], "chance").notes
    ('2 of 3 runs: those furthest from chance',)
    """
    order = list(range(len(names)))
    if (far := distances) is not None:
        order.sort(key=lambda at: -abs(far[at] or 0.0))
    kept = tuple(sorted(order[:most]))
    chosen = f"those furthest from {from_what}" if distances is not None else "the first"
    left_out = (f"{len(kept)} of {len(names)} runs: {chosen}",) if len(kept) < len(names) else ()
    labels, said = labels_of([names[at] for at in kept])
    places = tuple(every.index(names[at]) for at in kept)
    repeat = len({place % len(COLOURS) for place in places}) < len(places) <= len(COLOURS)
    return Drawn(kept, tuple(range(len(kept))) if repeat else places, tuple(labels), left_out + said)


def labels_of(names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """A label for each name, and what the labels leave out: a beginning that all have, and the middle of a long one.

    No two names share a label. None is read as a formula, and none holds control characters.

    >>> labels_of(["llama-3-8b-grpo-step-100", "llama-3-8b-grpo-step-200"])
    (['…100', '…200'], ('… stands for llama-3-8b-grpo-step-',))
    """
    short, common = labels(names, _LONGEST), common_beginning(names)
    said = [f"… stands for {text_of(common)}"] if common else []
    if short != short_names(names):
        said.append("long names are cut in the middle")
    return [text_of(label) for label in short], tuple(said)


def text_of(name: str) -> str:
    """A name that matplotlib shows as it is: without control characters, and no formula."""
    return plain(name).replace("$", r"\$")


@contextmanager
def panels(
    count: int, height: float, width: float = PAGE, columns: int | None = None, **shared: Any
) -> Iterator[tuple["Figure", Sequence[Any]]]:
    """A figure and its panels, each so high, in so many columns, in our style; no window, no global state."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(f"figures need matplotlib: {install_command('figures')}") from error
    with matplotlib.rc_context(_STYLE):
        columns = columns or count
        rows = -(-count // columns)
        figure: Any = Figure(figsize=(width, max(_LOWEST, height * rows)))
        axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
        for unused in axes[count:]:
            unused.remove()
        yield figure, axes[:count]
        figure._repr_png_ = partial(file_of, figure, "png", 110)  # for notebooks, whatever backend they have


def file_of(figure: "Figure", kind: str, dpi: int = 300) -> bytes:
    """A figure as a file of that kind, which is the same whenever it is drawn."""
    import matplotlib

    dateless: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    content = BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format=kind, dpi=dpi, metadata=dateless[kind])
    return content.getvalue()


def legend(figure: Any, *groups: Sequence[tuple[str, Look]], title: str | None = None) -> None:
    """Marks, lines and parts with their names above the panels, in rows as wide as the figure; a group begins a row.

    Args:
        title: above them.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    across = min(_across(figure.get_figwidth(), groups), max(map(len, groups)))
    entries: list[tuple[str, Look]] = []
    for group in groups:
        entries += [("", {"linestyle": ""})] * (-len(entries) % across) + list(group)
    by_column = [entries[i] for column in range(across) for i in range(column, len(entries), across)]
    handles = [
        Patch(label=label, **style) if "facecolor" in style else Line2D([], [], label=label, **style)
        for label, style in by_column
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=across, title=title, columnspacing=1.2, handletextpad=0.5,
        handlelength=1.8,
    )  # fmt: skip


def legend_height(width: float, *groups: Sequence[tuple[str, Look]]) -> float:
    """Inches that `legend` takes of a figure of that width."""
    return 0.15 * sum(-(-len(group) // _across(width, groups)) for group in groups) + 0.1


def _across(width: float, groups: Sequence[Sequence[tuple[str, Look]]]) -> int:
    """Entries of a legend that stand beside each other in so many inches."""
    widest = max(len(label) for group in groups for label, _ in group)
    return max(1, int(width / (0.42 + _LETTER * widest)))


def below(figure: Any, label: str, notes: Sequence[str]) -> None:
    """Below all panels, what their axes show, and notes."""
    lines = [*folded(label, figure.get_figwidth()), *folded("; ".join(notes), figure.get_figwidth())]
    if lines:
        figure.supxlabel("\n".join(lines))


def folded(text: str, inches: float) -> list[str]:
    """A text in lines of so many inches."""
    whole = text.replace(r"\$", "\ue000")  # which no line end may part
    return [line.replace("\ue000", r"\$") for line in wrap(whole, int(inches / _LETTER), break_on_hyphens=False)]


def title_panel(axis: Any, label: str, inches: float) -> None:
    """A run's label over its panel, in lines where that is narrow."""
    axis.set_title("\n".join(folded(label, inches)), loc="left", fontsize=7)


def with_interval(axis: Any, row: int, found: Mapping[str, Any], colour: str, factor: float) -> None:
    """A value as a point in a row, and its interval as a line; nothing where it is undefined."""
    if found.get("value") is None:
        return
    if None not in (found.get("low"), found.get("high")):
        axis.plot([factor * found["low"], factor * found["high"]], [row, row], color=colour, linewidth=1)
    axis.plot(factor * found["value"], row, ".", color=colour, markersize=6)


def name_rows(axis: Any, labels: Sequence[str]) -> None:
    """Rows from the top, each by its label."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)


def defined(values: Sequence[float | None]) -> list[float]:
    """Values as matplotlib draws them: a gap where one is undefined."""
    return [float("nan") if value is None else value for value in values]


def measured(found: Sequence[Any], what: str) -> Sequence[Any]:
    """What was found.

    Raises:
        NothingToDraw: it is nothing.
    """
    if not found:
        raise NothingToDraw(
            f"nothing to draw: this comparison has not measured {what}, or it is undefined, as where nothing changed"
        )
    return found


def percent_axis(axis: Any) -> None:
    """Ticks of shares, in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))


def decades(axis: Any) -> None:
    """Few ticks of a scale of logarithms: powers of ten, or where fewer than two are in view 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = (math.log10(end) for end in axis.get_view_interval())
    powers = math.floor(high) - math.ceil(low) + 1
    axis.set_major_locator(LogLocator(subs=(1.0,) if powers > 1 else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(lambda value, _: number(float(value), 1).replace("e-", "e−"))
    axis.set_minor_formatter(NullFormatter())
