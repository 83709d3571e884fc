"""What a notebook shows of a comparison or a trajectory: the terminal's tables and sentences, as HTML."""

from collections.abc import Mapping
from html import escape
from typing import Any

from offprincipal.reports.page import html_table
from offprincipal.reports.terminal import LADDER, LADDER_COLUMNS, NULLS, anatomy_rows, figure_rows
from offprincipal.reports.trajectory import summary_html as trajectory_html
from offprincipal.reports.words import decisions

__all__ = ["comparison_html", "trajectory_html"]


def comparison_html(summary: Mapping[str, Any]) -> str:
    """The table of a comparison, each value with its null in brackets, the ladder, and one sentence a run.

    Args:
        summary: `summary.json`. Names in it are shown as text.
    """
    parts = ["<p>What training did to the weights (null in brackets)</p>"]
    parts.append(html_table(["", *summary["runs"]], figure_rows(summary)))
    parts.append(f"<p>{NULLS}</p>")
    if rungs := anatomy_rows(summary):
        parts.append(f"<p>Of the changed entries, % in the mask: {LADDER}</p>")
        parts.append(html_table(LADDER_COLUMNS, rungs))
    parts += [f"<p>{escape(sentence)}</p>" for sentence in decisions(summary)]
    return "\n".join(parts)
