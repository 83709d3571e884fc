"""One figure as a page of its own; and what pages are made of.

Pages hold Plotly's bundle of cartesian charts, a third of the whole.
"""

import gzip
import html
from importlib import resources
from pathlib import Path
from typing import Any

from offprincipal.files import write_atomically
from offprincipal.reports.words import plain

WEB = "web"
PLOTLY = "vendor/plotly-cartesian.min.js.gz"


def asset(name: str) -> str:
    """A file of a page: style sheet, script or template."""
    content = resources.files("offprincipal.reports").joinpath(WEB, name).read_bytes()
    return (gzip.decompress(content) if name.endswith(".gz") else content).decode()


def write_page(out: Path, figure: Any, title: str) -> Path:
    """Write a Plotly figure as one HTML file that needs no other, whole or not at all.

    Args:
        title: plain text, of whatever letters.

    Raises:
        FileError: it cannot be written.
    """
    page = str(figure.to_html(include_plotlyjs=False, full_html=True, config={"displaylogo": False}))
    head = f"<head><title>{html.escape(plain(title))}</title><script>{asset(PLOTLY)}</script>"
    titled = page.replace("<head>", head, 1)
    write_atomically(out, lambda path: path.write_text(titled, encoding="utf-8", errors="replace"))
    return out
