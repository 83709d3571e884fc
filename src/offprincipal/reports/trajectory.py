"""A trajectory as tables and sentences on the terminal, and as a page of figures. Formats; computes no metric."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly import graph_objects
from plotly.subplots import make_subplots
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Column, Table

from offprincipal.plain_text import plain
from offprincipal.reports import numbers
from offprincipal.reports.page import html_table, write_page
from offprincipal.reports.words import place_name, shown

FIGURES = {
    "straightness": "straightness",
    "rank1_share": "rank-1 share",
    "rank2_share": "rank-2 share",
    "linearity_r2": "linearity R²",
}
PREDICTED = {"linear": "line of\neach weight", "rank1": "line along\none direction", "last": "last one\nas it was"}
BESIDE = "the run, between a random walk of its steps and a straight line"
BESIDE_COLUMNS = ("run", "random walk", "random walk, stored", "straight line, stored")
_WALK, _RUN = "#8899a6", "#1c2733"
_NULLS = ("random_walk_null", "stored_walk_null", "stored_line_null")
_OVERLAPS = {
    "value": ("run", "solid"),
    "random_walk_null": ("random walk", "dash"),
    "own_cosines_null": ("its own cosines alone", "dot"),
}
_SIDES = {"left": "#0b6e99", "right": "#c2570c"}
_LINES = 24  # most rows of a table
_CELLS = 100  # most cells on a side of a heatmap
_METHODS = ("#0b6e99", "#c2570c", "#1c2733")


def trajectory_table(content: Mapping[str, Any]) -> Group:
    """The whole model with its nulls, then one row per checkpoint and one per role; empty for a single checkpoint.

    Args:
        content: the content of `trajectory.json`.
    """
    whole = content["pooled"]
    if len(content["steps"]) < 2:
        return Group()
    beside = Table(Column("", no_wrap=True), box=SIMPLE, title=BESIDE)
    for title in BESIDE_COLUMNS:
        beside.add_column(title.replace(", ", ",\n"), justify="right")
    for cells in beside_rows(content):
        beside.add_row(*cells)
    steps = Table(Column("step", no_wrap=True, justify="right"), box=SIMPLE)
    for title in (
        "‖ΔW‖/‖W‖\nfrom base",
        "‖ΔW‖\nof a step",
        "unchanged\nsince base",
        "unchanged\nsince last",
        "gone back",
    ):
        steps.add_column(title, justify="right")
    for t, step in _some_of(content["steps"]):
        shares = ("unchanged_fraction", "unchanged_since_last", "reverted_fraction")
        steps.add_row(
            f"{step:g}",
            numbers.number(whole["relative_norms"][t]),
            numbers.number(whole["increments"][t]),
            *(numbers.percent(whole[share][t]) for share in shares),
        )
    roles = Table(Column("role", no_wrap=True), box=SIMPLE, title="by role (random walk in brackets)")
    for title in ("straight", "rank 1", "rank 2", "line R²", "verdict"):
        roles.add_column(title, justify="right")
    for role, found in content["by_role"].items():
        roles.add_row(shown(role), *(_with_null(found[name]) for name in FIGURES), found["verdict"])
    more = [] if whole["subspace_overlap"] is None else [_overlap_table(content)]
    more += [] if content["held_out"] is None else [_held_out_table(content)]
    return Group(beside, steps, roles, *more)


def beside_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """For each figure of the whole model its title and the cells of `BESIDE_COLUMNS`."""
    whole = content["pooled"]
    rows = [
        [title, *(numbers.number(whole[name][key]) for key in ("value", *_NULLS))] for name, title in FIGURES.items()
    ]
    drift = whole["drift"]
    return [
        *rows,
        ["cosine of far steps", _interval(drift), "0", *(numbers.decimals(drift[null]) for null in _NULLS[1:])],
    ]


def _overlap_table(content: Mapping[str, Any]) -> Table:
    found = content["pooled"]["subspace_overlap"]
    title = f"leading {found['rank']} directions of either side in common with the last checkpoint's"
    table = Table(Column("step", no_wrap=True, justify="right"), box=SIMPLE, title=title)
    for side in _SIDES:
        for heading in (side, "random\nwalk", "own\ncosines"):
            table.add_column(heading, justify="right")
    for t, step in _some_of(content["steps"]):
        values = (found[side][kind][t] for side in _SIDES for kind in _OVERLAPS)
        table.add_row(f"{step:g}", *(numbers.decimals(value) for value in values))
    return table


def _held_out_table(content: Mapping[str, Any]) -> Table:
    title = "checkpoints predicted from those before: how far off, over their distance from the base (random walk)"
    table = Table(Column("step", no_wrap=True, justify="right"), box=SIMPLE, title=title)
    for method in PREDICTED.values():
        table.add_column(method, justify="right")
    for row in content["held_out"]:
        table.add_row(f"{row['step']:g}", *(_with_null(row[method]) for method in PREDICTED))
    return table


def trajectory_sentences(content: Mapping[str, Any]) -> list[str]:
    """A summary of the tables in sentences."""
    whole, count = content["pooled"], len(content["steps"])
    if whole["path_length"] == 0:
        return ["No weight moved at any checkpoint."]
    if count < 2:
        return [
            f"One checkpoint, {numbers.number(whole['relative_norms'][0])} times the base's norm from the base, with "
            f"{numbers.percent(whole['unchanged_fraction'][0])} of its weights unchanged: no way to follow; give two "
            "or more, or `offprincipal compare` it."
        ]
    drift, share, line = whole["drift"], whole["rank1_share"], whole["linearity_r2"]
    said = {
        "ballistic": "Ballistic: steps far apart in time go the same way",
        "diffusive with drift": "Diffusive with drift: steps far apart share some direction",
        "diffusive": "Diffusive: steps far apart share next to no direction",
        "cannot tell": f"{count} checkpoints, as stored, cannot tell a walk from a line",
    }[whole["verdict"]]
    line_cosine = numbers.decimals(drift["stored_line_null"])
    cosine = (
        f" (mean cosine {_interval(drift)}; a random walk's is 0, that of a straight line of this length, stored "
        f"alike, {line_cosine})"
        if drift["value"] is not None
        else ""
    )
    return [
        f"{said}{cosine}.",
        f"One direction holds {numbers.percent(share['value'])} of the displacements; a random walk of the same steps "
        f"has {numbers.percent(share['random_walk_null'])} along one, a straight line, stored, "
        f"{numbers.percent(share['stored_line_null'])}. A line through the checkpoints explains "
        f"{numbers.percent(line['value'])} of where they are; of where a random walk's would be, "
        f"{numbers.percent(line['random_walk_null'])}, and a straight line's, stored, "
        f"{numbers.percent(line['stored_line_null'])}.",
        *_overlap_sentences(content),
        *_prediction_sentences(content),
    ]


def _overlap_sentences(content: Mapping[str, Any]) -> list[str]:
    """Whether the leading directions are found early; empty if subspaces were not compared."""
    found = content["pooled"]["subspace_overlap"]
    if found is None:
        return []
    half = (len(content["steps"]) - 1) // 2
    said = [
        f"{numbers.percent(found[side]['value'][half])} ({side}; a random walk of the same steps "
        f"{numbers.percent(found[side]['random_walk_null'][half])}, displacements with these cosines and no structure "
        f"but lengths of rows and columns {numbers.percent(found[side]['own_cosines_null'][half])})"
        for side in _SIDES
    ]
    return [
        f"At step {content['steps'][half]:g} the leading {found['rank']} directions share {said[0]} and {said[1]} with "
        "those of the last checkpoint."
    ]


def _prediction_sentences(content: Mapping[str, Any]) -> list[str]:
    """How accurate predicted models are; empty if none was requested."""
    wanted, rows = content["prediction"], content["held_out"]
    if not wanted or not rows:
        return []
    ours, kept = (rows[-1][name]["value"] for name in (wanted["by"], "last"))
    if ours is None:
        return []
    worse = "no nearer than" if ours >= kept else "nearer than"
    return [
        f"Predicted from the checkpoints before it in the same way, step {rows[-1]['step']:g} is missed by "
        f"{numbers.percent(ours)} of its distance from the base: {worse} the last of those as it was, which misses it "
        f"by {numbers.percent(kept)}."
    ]


def write_figure(out: Path, content: Mapping[str, Any]) -> Path:
    """Write one HTML file: distance from the base, cosines of the steps, shares, the path, and predictions.

    Raises:
        FileError: the file cannot be written.
    """
    title = f"offprincipal trajectory: {place_name(content['base'])}"
    return write_page(out, figure_of(content), title, summary_html(content))


def summary_html(content: Mapping[str, Any]) -> str:
    """The sentences, and each figure with its nulls, as HTML; names are escaped."""
    said = [*content["warnings"], *trajectory_sentences(content)]
    text = "".join(f"<p>{html.escape(plain(sentence))}</p>" for sentence in said)
    several = len(content["steps"]) > 1
    return text + html_table(["", *BESIDE_COLUMNS], beside_rows(content), BESIDE) if several else text


def figure_of(content: Mapping[str, Any]) -> graph_objects.Figure:
    """All panels, first of the whole model; a menu selects a role or a layer instead."""
    overlap = content["pooled"]["subspace_overlap"]
    titles = (
        "distance from the base",
        "cosine of every two steps",
        "first two principal components",
        "rank-1 share by role",
        "displacements along each principal component",
        "checkpoints predicted from those before",
        *([f"leading {overlap['rank']} directions in common with the last"] if overlap else []),
    )
    rows = 4 if overlap else 3
    figure = make_subplots(
        rows=rows,
        cols=2,
        specs=[[{}, {}]] * 3 + [[{"colspan": 2}, None]] * (rows - 3),
        subplot_titles=titles,
        horizontal_spacing=0.12,
        vertical_spacing=0.1,
    )
    chosen = {"the whole model": content["pooled"]}
    chosen |= {plain(role): found for role, found in content["by_role"].items()}
    chosen |= {f"layer {layer}": found for layer, found in content["by_layer"].items()}
    of: list[str | None] = []  # for each trace, the choice that shows it; None: always shown
    for name, found in chosen.items():
        before = len(figure.data)
        _add_way(figure, found, content["steps"], shown=name == "the whole model")
        of += [name] * (len(figure.data) - before)
    _name_axes(figure, overlap is not None)
    _add_roles(figure, content["by_role"])
    _add_held_out(figure, content["held_out"] or ())
    of += [None] * (len(figure.data) - len(of))
    buttons = [
        {"label": name, "method": "restyle", "args": ["visible", [owner in (None, name) for owner in of]]}
        for name in chosen
    ]
    count, base = len(content["steps"]), html.escape(plain(place_name(content["base"])))
    figure.update_layout(
        template="plotly_white",
        title=f"{count} checkpoints from {base}: {content['pooled']['verdict']}",
        height=1150 if rows == 3 else 1500,
        barmode="group",
        margin={"t": 150, "r": 190},
        legend={"orientation": "h", "x": 0, "y": 1.03, "yanchor": "bottom"},
        legend2=_beside(figure.layout.yaxis6),
        legend3=_beside(figure.layout.yaxis7) if overlap else {},
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.03, "yanchor": "bottom"}],
    )
    return figure


def _beside(axis: Any) -> dict[str, Any]:
    """A legend to the right of a panel."""
    return {"x": 1.01, "y": axis.domain[1], "yanchor": "top", "font": {"size": 11}}


def _add_way(figure: graph_objects.Figure, found: Mapping[str, Any], steps: Sequence[float], shown: bool) -> None:
    """Add the panels of one choice: distances, cosines, the path, shares of components, and shared directions."""
    reached, squares = [], 0.0
    for increment in found["increments"]:
        squares += increment**2
        reached.append(squares**0.5)
    straight = [sum(found["increments"][: t + 1]) for t in range(len(steps))]
    for name, values, line in (
        ("run", found["norms"], {"color": _RUN, "width": 3}),
        ("random walk of its steps", reached, {"color": _WALK, "dash": "dash"}),
        ("straight line of its steps", straight, {"color": _WALK, "dash": "dot"}),
    ):
        style: dict[str, Any] = {"mode": "lines+markers", "visible": shown, "legendgroup": name}
        figure.add_scatter(x=steps, y=values, name=name, line=line, row=1, col=1, **style)
    labels = [f"{step:g}" for step in steps]
    scale: dict[str, Any] = {"colorscale": "RdBu", "reversescale": True, "visible": shown}
    top, bottom = reversed(figure.layout.yaxis2.domain)
    bar = {"len": top - bottom, "y": top, "yanchor": "top", "x": 1.01, "title": "cosine"}
    if found["increment_cosine"] is not None:
        some = slice(None, None, -(-len(steps) // _CELLS))
        cells = [row[some] for row in found["increment_cosine"][some]]
        cells = [[None if i == j else c for j, c in enumerate(row)] for i, row in enumerate(cells)]
        most = max((abs(c) for row in cells for c in row if c is not None), default=1.0) or 1.0
        scale |= {"zmin": -most, "zmax": most}  # without the diagonal, where each step's cosine with itself is 1
        figure.add_heatmap(z=cells, x=labels[some], y=labels[some], colorbar=bar, row=1, col=2, **scale)
    for key, name, colour in (("components", "run", _RUN), ("components_random_walk_null", "random walk", _WALK)):
        x, y = zip(*([[0.0, 0.0], *found[key]]), strict=True)
        line = {"color": colour, "dash": "solid" if key == "components" else "dash"}
        style = {"mode": "lines+markers", "visible": shown, "text": ["base", *labels], "showlegend": False}
        figure.add_scatter(x=x, y=y, name=f"path of the {name}", line=line, row=2, col=1, **style)
    for key, name, colour in (("", "run", _RUN), ("_random_walk_null", "random walk", _WALK)):
        shares = found[f"eigenvalue_shares{key}"]
        style = {"visible": shown, "marker_color": colour, "showlegend": False}
        at = list(range(1, len(shares) + 1))
        figure.add_bar(x=at, y=shares, name=f"share of the {name}", row=3, col=1, **style)
    overlap = found["subspace_overlap"]
    for side, colour in _SIDES.items() if overlap else ():
        for kind, (name, dash) in _OVERLAPS.items():
            style = {"mode": "lines+markers", "visible": shown, "line": {"color": colour, "dash": dash}}
            style["legend"] = "legend3"
            figure.add_scatter(x=steps, y=overlap[side][kind], name=f"{side}: {name}", row=4, col=1, **style)


def _name_axes(figure: graph_objects.Figure, with_overlaps: bool) -> None:
    figure.update_xaxes(title="step", row=1, col=1)
    figure.update_yaxes(title="‖W − base‖", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(type="category", title="step", row=1, col=2)
    figure.update_yaxes(type="category", title="step", row=1, col=2)
    figure.update_xaxes(title="first", row=2, col=1)
    figure.update_yaxes(title="second", row=2, col=1)
    figure.update_xaxes(title="principal component", dtick=1, row=3, col=1)
    figure.update_yaxes(type="log", tickformat=".2~%", row=3, col=1)
    if with_overlaps:
        figure.update_xaxes(title="step", row=4, col=1)
        figure.update_yaxes(title="share in common", range=[0, 1.02], tickformat=".0%", row=4, col=1)


def _add_roles(figure: graph_objects.Figure, by_role: Mapping[str, Any]) -> None:
    for key, name, colour in (("value", "rank-1 share", _RUN), ("random_walk_null", "that of its random walk", _WALK)):
        values = [found["rank1_share"][key] for found in by_role.values()]
        figure.add_bar(
            x=[plain(role) for role in by_role],
            y=values,
            name=name,
            marker_color=colour,
            showlegend=False,
            row=2,
            col=2,
        )
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", row=2, col=2)


def _add_held_out(figure: graph_objects.Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    for (method, words), colour in zip(PREDICTED.items(), _METHODS, strict=True):
        for key, dash, ending in (("value", "solid", ""), ("random_walk_null", "dash", "; of a walk")):
            values = [row[method][key] for row in rows]
            line = {"color": colour, "dash": dash}
            name = words.replace("\n", " ") + ending
            marker = {"symbol": "circle" if key == "value" else "circle-open"}
            style = {"mode": "lines+markers", "legend": "legend2", "marker": marker}
            figure.add_scatter(x=steps, y=values, name=name, line=line, row=3, col=2, **style)
    figure.update_xaxes(title="step", row=3, col=2)
    figure.update_yaxes(title="missed by, of its distance", rangemode="tozero", tickformat=".0%", row=3, col=2)


def _some_of(steps: Sequence[float]) -> list[tuple[int, float]]:
    """Steps with their positions, at most `_LINES`, evenly spread, with the first and the last."""
    count = len(steps)
    places = range(count) if count <= _LINES else [round(i * (count - 1) / (_LINES - 1)) for i in range(_LINES)]
    return [(place, steps[place]) for place in places]


def _with_null(row: Mapping[str, Any]) -> str:
    return f"{numbers.decimals(row['value'])} ({numbers.decimals(row['random_walk_null'])})"


def _interval(drift: Mapping[str, Any]) -> str:
    value = numbers.decimals(drift["value"])
    return (
        value
        if drift["low"] is None
        else f"{value} [{numbers.decimals(drift['low'])}, {numbers.decimals(drift['high'])}]"
    )
