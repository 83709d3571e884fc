"""One figure as a page of its own."""

import html
from pathlib import Path
from typing import Any

from offprincipal.files import write_atomically
from offprincipal.reports.words import plain


def write_page(out: Path, figure: Any, title: str) -> Path:
    """Write a Plotly figure as one HTML file that needs no other, whole or not at all.

    Args:
        title: plain text, of whatever letters.

    Raises:
        FileError: it cannot be written.
    """
    page = str(figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False}))
    titled = page.replace("<head>", f"<head><title>{html.escape(plain(title))}</title>", 1)
    write_atomically(out, lambda path: path.write_text(titled, encoding="utf-8", errors="replace"))
    return out
