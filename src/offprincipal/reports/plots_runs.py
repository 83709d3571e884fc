"""Figures of whole runs for papers: what explains where their changes fell, and which they share.

Draws what `reports.figures` prepares for the page; `reports.plots` has the figures by name.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from offprincipal.reports import figures
from offprincipal.reports.nulls import PARTS
from offprincipal.reports.plots_drawing import (
    CHANCE,
    COLOURS,
    COLUMN,
    DIAMOND,
    DOTTED,
    GREY,
    HIGHEST,
    INK,
    MEASURED,
    NULL,
    PAGE,
    RING,
    Drawn,
    Look,
    below,
    defined,
    drawn_runs,
    labels_of,
    legend,
    legend_height,
    measured,
    name_rows,
    panels,
    percent_axis,
    with_interval,
)
from offprincipal.reports.words import agreement_left_over

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AROUND = 0.85  # inches that titles, axes and notes take of a figure of rows
_ROW, _LOWEST_ROW, _PAIR = 0.2, 0.14, 0.16  # inches
_MOST_RUNS = int((HIGHEST - _AROUND) / _LOWEST_ROW)
_MOST_PAIRS = int((HIGHEST - _AROUND) / _PAIR)
_MOST_LINES = 10  # runs whose curves can be told apart in one panel
_NARROW = 24  # letters of a pair that leave room for it in a column
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")  # of the parts of an anatomy, for prints in grey


def anatomy(summary: Mapping[str, Any], every: Sequence[str]) -> "Figure":
    """How far the changed entries lie from chance in either mask, and what each null explains of it."""
    masks = measured(figures.anatomy(summary), "location")
    far = [max(abs(mask["runs"][at]["measured"] or 0.0) for mask in masks) for at in range(len(summary["runs"]))]
    runs = drawn_runs(list(summary["runs"]), every, _MOST_RUNS, far, "chance")
    parts = [(*part, hatch) for part, hatch in zip(figures.ANATOMY_PARTS, _HATCHES, strict=True)]
    there = [any(run["parts"][place] is not None for mask in masks for run in mask["runs"]) for place in range(5)]
    spans = _spans([[mask["runs"][at] for at in runs.at] for mask in masks])
    widths = {"width_ratios": [high - low for low, high in spans]}  # so that all masks have one scale
    with panels(len(masks), _height_of_rows(runs), sharey=True, gridspec_kw=widths) as (figure, axes):
        for axis, mask, span in zip(axes, masks, spans, strict=True):
            for row, at in enumerate(runs.at):
                _stack(axis, row, mask["runs"][at], parts)
            axis.axvline(0, color=INK, linewidth=0.5)
            axis.set(title=mask["title"], xlim=span)
            axis.locator_params(axis="x", nbins=7, steps=(1, 2, 5, 10))
            name_rows(axis, runs.labels)
        shown = [
            (name, _filled(colour, hatch))
            for (name, colour, hatch), is_there in zip(parts, there, strict=True)
            if is_there or name in PARTS
        ]
        legend(figure, [*shown, ("measured", {"color": INK, "linewidth": 1.2})])
        below(figure, "percentage points beyond chance", runs.notes)
    return figure


def _stack(axis: Any, row: int, run: Mapping[str, Any], parts: Sequence[tuple[str, str, str]]) -> None:
    """The parts of one run to the left and right of chance, and where they end together."""
    ends = [0.0, 0.0]  # so far, to the left and to the right
    for part, (_, colour, hatch) in zip(run["parts"], parts, strict=True):
        if part:
            axis.barh(row, part, left=ends[part > 0], height=0.7, **_filled(colour, hatch))
            ends[part > 0] += part
    if run["measured"] is not None:
        axis.plot([run["measured"]] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=1.2)


def _spans(masks: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[float, float]]:
    """What the axis of each mask spans: its bars, at least a point to either side, and room for its title."""
    ends = []
    for runs in masks:
        sums = [
            sum(part for part in run["parts"] if part and (part > 0) == right)
            for run in runs
            for right in (False, True)
        ]
        ends.append((1.05 * min(-1.0, *sums), 1.05 * max(1.0, *sums)))
    room = 0.45 * max(high - low for low, high in ends)
    lacks = [max(0.0, room - (high - low)) / 2 for low, high in ends]
    return [(low - lack, high + lack) for (low, high), lack in zip(ends, lacks, strict=True)]


def _filled(colour: str, hatch: str) -> Look:
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def _height_of_rows(runs: Drawn) -> float:
    return _AROUND + min(_ROW, (HIGHEST - _AROUND) / len(runs.at)) * len(runs.at)


def overlaps(summary: Mapping[str, Any], every: Sequence[str]) -> "Figure":
    """The share of the changed entries in each mask, beside chance and what rounding alone would put there."""
    masks = measured(figures.overlaps(summary), "location")
    far = [max(_distance(mask["runs"][at]) for mask in masks) for at in range(len(summary["runs"]))]
    runs = drawn_runs(list(summary["runs"]), every, _MOST_RUNS, far, "chance")
    with panels(len(masks), _height_of_rows(runs), sharex=True, sharey=True) as (figure, axes):
        for axis, mask in zip(axes, masks, strict=True):
            for row, (at, colour) in enumerate(zip(runs.at, runs.colours, strict=True)):
                run = mask["runs"][at]
                for null, mark in (("random", CHANCE), ("rounding", RING)):
                    if run[null] is not None:
                        axis.plot(100 * run[null], row, **mark)
                with_interval(axis, row, run, colour, 100)
            axis.set(title=mask["title"], xlim=(0, 102), xticks=(0, 25, 50, 75, 100))
            name_rows(axis, runs.labels)
        legend(figure, [("measured", MEASURED), ("chance", CHANCE), ("rounding alone", RING)])
        below(figure, "changed entries in the mask, % of all changed entries", runs.notes)
    return figure


def _distance(run: Mapping[str, float | None]) -> float:
    found, chance = run["value"], run["random"]
    return 0.0 if found is None or chance is None else abs(found - chance)


def agreement(summary: Mapping[str, Any]) -> "Figure":
    """The Jaccard index of the changed entries of two runs each, beside chance, rounding alone and margins."""
    pairs_of_all = [pair for pair in summary["pairs"] if pair["jaccard"] is not None]
    all_pairs = measured(pairs_of_all, "location, of two runs or more")
    kept = sorted(sorted(range(len(all_pairs)), key=lambda i: _left_over(all_pairs[i]), reverse=True)[:_MOST_PAIRS])
    pairs = [all_pairs[i] for i in kept]
    drawn = [run for run in summary["runs"] if any(run in (pair["run_a"], pair["run_b"]) for pair in pairs)]
    short, said = labels_of(drawn)
    labels = dict(zip(drawn, short, strict=True))
    names = [f"{labels[pair['run_a']]} · {labels[pair['run_b']]}" for pair in pairs]
    nulls = (("random", CHANCE), ("rounding_null", RING), ("margin_null", DIAMOND))
    width = COLUMN if max(map(len, names)) <= _NARROW else PAGE
    with panels(1, _AROUND + _PAIR * len(pairs), width) as (figure, (axis,)):
        for row, pair in enumerate(pairs):
            for null, mark in nulls:
                if pair.get(f"jaccard_{null}") is not None:
                    axis.plot(pair[f"jaccard_{null}"], row, **mark)
            with_interval(axis, row, pair | {"value": pair["jaccard"]}, COLOURS[0], 1)
        axis.set_xlim(-0.02, 1.02)
        name_rows(axis, names)
        legend(figure, [("measured", MEASURED), ("chance", CHANCE), ("rounding alone", RING), ("margins", DIAMOND)])
        left_out = [f"{len(pairs)} of {len(all_pairs)} pairs: those furthest from the nulls"]
        below(figure, "Jaccard index of the changed entries", [*(left_out if pairs != all_pairs else []), *said])
    return figure


def _left_over(pair: Mapping[str, Any]) -> tuple[float, float]:
    """What the nulls leave of an agreement, and of those of which it leaves nothing, how far they lie from chance."""
    chance = pair.get("jaccard_random")
    return agreement_left_over(pair), 0.0 if chance is None else abs(pair["jaccard"] - chance)


def sweep(summary: Mapping[str, Any], every: Sequence[str], masks_table: pa.Table) -> "Figure":
    """Over the sweep of densities the overlap beside its nulls, and below what rounding alone leaves of it."""
    names = list(summary["runs"])
    masks = measured(figures.sweep(masks_table, names), "location")
    far = [max(_reach(mask["runs"][at]) for mask in masks) for at in range(len(names))]
    runs = drawn_runs(names, every, _MOST_LINES, far, "rounding alone")
    rounded = any(points is not None for mask in masks for at in runs.at for points in _beyond(mask["runs"][at]))
    styles = [("measured", {"color": INK, "linewidth": 1})]
    styles += [("rounding alone", {"color": INK, "marker": "o", **NULL})] if rounded else []
    styles += [("chance", {"color": GREY, "linewidth": 1, "linestyle": DOTTED})]
    rows = 1 + rounded
    height = (1.45 * rows + _AROUND - 0.3 + legend_height(PAGE, styles, runs.legend())) / rows
    with panels(rows * len(masks), height, columns=len(masks), sharex=True, sharey="row") as (figure, axes):
        for place, mask in enumerate(masks):
            own = axes[place :: len(masks)]  # the overlap, and below it what is beyond rounding
            for row, at in enumerate(runs.at):
                _curves(own, mask["runs"][at], runs.line(row))
            own[0].set_title(mask["title"])
            own[-1].set(xlim=(0, 0.53), xticks=(0.1, 0.3, 0.5))
            percent_axis(own[-1].xaxis)
        axes[0].set(ylim=(-0.03, 1.05), ylabel="overlap")
        percent_axis(axes[0].yaxis)
        if rounded:
            reach = 1.1 * max(1.0, *(_reach(mask["runs"][at]) for mask in masks for at in runs.at))
            axes[-1].set_ylim(-reach, reach)
            axes[len(masks)].set_ylabel("beyond rounding, points")
        legend(figure, styles, runs.legend())
        undefined = () if rounded else ("rounding alone is undefined here",)
        below(figure, "density of the mask", [*undefined, *runs.notes])
    return figure


def _curves(own: Sequence[Any], run: Mapping[str, Any], line: Look) -> None:
    overlap, *beyond = own
    chance = {"color": GREY, "linestyle": DOTTED, "linewidth": 1}
    overlap.plot(run["alpha"], defined(run["overlap_random"]), **chance)
    overlap.plot(run["alpha"], defined(run["overlap_rounding_null"]), **(line | NULL))
    overlap.plot(run["alpha"], defined(run["overlap"]), **line)
    for axis in beyond:
        axis.axhline(0, color=INK, linewidth=0.5)
        axis.plot(run["alpha"], defined(_beyond(run)), **line)


def _beyond(run: Mapping[str, Any]) -> list[float | None]:
    """Percentage points at each density; undefined where the rounding null is."""
    pairs = zip(run["overlap"], run["overlap_rounding_null"], strict=True)
    return [None if found is None or null is None else 100 * (found - null) for found, null in pairs]


def _reach(run: Mapping[str, Any]) -> float:
    return max((abs(points) for points in _beyond(run) if points is not None), default=0.0)
