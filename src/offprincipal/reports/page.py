"""Write a figure as a page, and the parts of pages.

Pages contain Plotly's bundle for cartesian charts, which has a third of the size of the full one.
"""

import gzip
import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from offprincipal.files import write_atomically
from offprincipal.plain_text import plain

WEB = "web"
_STYLE = (
    "<style>body{font:16px/1.5 system-ui,sans-serif;color:#1f2733;background:#fff}main{max-width:60rem;margin:0 auto}"
    "table{border-collapse:collapse;font-size:.9rem}caption{text-align:left;font-weight:600}"
    "th,td{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #dde3ea}"
    "tbody th{text-align:left;font-weight:400}</style>"
)
PLOTLY = "vendor/plotly-cartesian.min.js.gz"


def asset(name: str) -> str:
    """The content of an asset of pages: style sheet, script or template."""
    content = resources.files("offprincipal.reports").joinpath(WEB, name).read_bytes()
    return (gzip.decompress(content) if name.endswith(".gz") else content).decode()


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """An HTML table whose first column names its rows; all cells are escaped."""

    def line(cells: Sequence[str], first: str, rest: str) -> str:
        tags = [first, *[rest] * (len(cells) - 1)]
        shown = (html.escape(plain(cell)) for cell in cells)
        return "<tr>" + "".join(f"<{t}>{s}</{t.split()[0]}>" for t, s in zip(tags, shown, strict=True)) + "</tr>"

    column, row_name = 'th scope="col"', 'th scope="row"'
    top = line(head, column if head[0] else "td", column)
    body = "".join(line(row, row_name, "td") for row in rows)
    named = f"<caption>{html.escape(plain(caption))}</caption>" if caption else ""
    return f"<table>{named}<thead>{top}</thead><tbody>{body}</tbody></table>"


def write_page(out: Path, figure: Any, title: str, above: str = "") -> Path:
    """Write a Plotly figure as one self-contained HTML file; the file is complete or not written.

    Args:
        out: the HTML file.
        figure: of Plotly.
        title: plain text; it is escaped.
        above: HTML above the figure.

    Raises:
        FileError: the file cannot be written.
    """
    page = str(figure.to_html(include_plotlyjs=False, full_html=True, config={"displaylogo": False}))
    head = f"<head><title>{html.escape(plain(title))}</title>{_STYLE}<script>{asset(PLOTLY)}</script>"
    titled = page.replace("<head>", head, 1).replace("<body>", f"<body><main>{above}</main>", 1)
    write_atomically(out, lambda path: path.write_text(titled, encoding="utf-8", errors="replace"))
    return out
