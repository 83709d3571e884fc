"""A preflight as a table and sentences on the terminal, and as a figure. Reads and formats; computes no metric."""

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from plotly import graph_objects
from plotly.subplots import make_subplots
from rich.box import SIMPLE
from rich.table import Column, Table

from offprincipal.forecast import ALL, Preflight
from offprincipal.plain_text import plain
from offprincipal.reports import numbers
from offprincipal.reports.page import write_page
from offprincipal.reports.words import place_name, shown

_CURVE = 120  # points


def preflight_table(content: Mapping[str, Any]) -> Table:
    """The shares of weights that steps change, one row per role.

    Args:
        content: the content of `preflight.json`.
    """
    planned = f"{content['steps']:,} steps of {content['learning_rate']:g}"
    table = Table(
        Column("role", no_wrap=True),
        box=SIMPLE,
        title=f"share of the weights that {planned} move, stored in {content['storage']}",
    )
    titles = ("each step\nstored", "masters,\none sign", "masters,\nrandom", "stochastic\nrounding", "steps\nto half")
    for title in ("weights", *titles):
        table.add_column(title, justify="right")
    for row in content["roles"]:
        shares = ("moved_by_one_step", "moved_masters", "moved_masters_random_signs", "moved_stochastic")
        half = row["steps_to_half_masters"]
        table.add_row(
            shown(row["role"]),
            f"{row['parameters']:,}",
            *(numbers.percent(row[share]) for share in shares),
            "never" if half is None else f"{half:,}",
        )
    return table


def preflight_sentences(content: Mapping[str, Any]) -> list[str]:
    """A summary of the table."""
    whole = next(row for row in content["roles"] if row["role"] == ALL)
    step, storage, half = f"{content['learning_rate']:g}", content["storage"], whole["steps_to_half_masters"]
    if whole["moved_by_one_step"] is None:
        return ["The base has no weights."]
    moved = numbers.percent(whole["moved_by_one_step"])
    sentences = [
        f"Stored in {storage} after every step, steps of {step} move {moved} of the weights, however many are taken: "
        "the rest are rounded back each time."
    ]
    if half is not None:
        kept = f"half of the weights have moved after {half:,} steps of one sign."
        sentences.append(f"Float32 masters keep what is rounded away: {kept}")
    stuck = [
        row["role"] for row in content["roles"] if row["parameters"] and (row["moved_masters_random_signs"] or 0) < 1e-3
    ]
    if stuck and ALL not in stuck:
        sentences.append(
            f"Of {', '.join(stuck)} fewer than one in a thousand have moved after {content['steps']:,} steps of random "
            "signs even so: their weights are too large for this learning rate."
        )
    return sentences


def write_figure(out: Path, found: Preflight) -> Path:
    """Write one HTML file: the share of weights that change by step length, and over the steps of a run.

    Raises:
        FileError: the file cannot be written.
    """
    return write_page(out, _figure(found), f"offprincipal preflight: {place_name(found.base)}")


def _figure(found: Preflight) -> graph_objects.Figure:
    titles = ("moved by one step, by its length", f"moved over a run, steps of {found.learning_rate:g}, all weights")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.09)
    whole = found.spacings[ALL]
    ends = [end for end in (whole.quantile(0.001), whole.quantile(1.0)) if end]
    lengths = np.geomspace(min([*ends, found.learning_rate]) / 4, max([*ends, found.learning_rate]) * 4, _CURVE)
    for role, one in found.spacings.items():
        if one.entries:
            line = {"width": 4, "color": "#1c2733"} if role == ALL else {"width": 1.5}
            shares = [one.share_moved(float(x)) for x in lengths]
            figure.add_scatter(x=lengths, y=shares, name=role, line=line, row=1, col=1)
    figure.add_vline(x=found.learning_rate, line_dash="dot", row=1, col=1)
    steps = np.unique(np.geomspace(1, max(found.steps, 2), _CURVE).round())
    step = found.learning_rate
    kinds: dict[str, Callable[[float], float | None]] = {
        "stored after every step": lambda n: whole.share_moved(step),
        "float32 masters, one sign": lambda n: whole.share_moved(step * n),
        "float32 masters, random signs": lambda n: whole.share_moved_walking(step, n),
        "stochastic rounding, one sign": lambda n: whole.share_moved_at_random(step, n),
    }
    for name, share in kinds.items():
        figure.add_scatter(x=steps, y=[share(float(n)) for n in steps], name=name, row=1, col=2, legend="legend2")
    figure.update_xaxes(type="log", title="length of a step", exponentformat="power", row=1, col=1)
    figure.update_xaxes(type="log", title="steps", row=1, col=2)
    figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")
    text = html.escape(plain(place_name(found.base)))
    figure.update_layout(
        template="plotly_white",
        title=f"What steps can move of {text}, stored in {found.storage}",
        height=560,
        legend={"x": 0.01, "y": 0.99, "bgcolor": "rgba(255,255,255,.7)"},
        legend2={"x": 0.56, "y": 0.99, "bgcolor": "rgba(255,255,255,.7)"},
    )
    return figure
