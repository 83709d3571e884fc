"""What a notebook shows of a comparison: the terminal's tables and sentences, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from offprincipal.reports.terminal import LADDER_COLUMNS, anatomy_rows, figure_rows
from offprincipal.reports.words import decisions, plain


def comparison_html(summary: Mapping[str, Any]) -> str:
    """The table of a comparison, each value with its null in brackets, the ladder, and one sentence a run.

    Args:
        summary: `summary.json`. Names in it are shown as text.
    """
    parts = ["<p>What training did to the weights (null in brackets)</p>"]
    parts.append(_table(["", *summary["runs"]], figure_rows(summary)))
    if rungs := anatomy_rows(summary):
        parts.append("<p>Of the changed entries, % in the mask; each null from left to right knows one thing more</p>")
        parts.append(_table(LADDER_COLUMNS, rungs))
    parts += [f"<p>{escape(sentence)}</p>" for sentence in decisions(summary)]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(plain(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
