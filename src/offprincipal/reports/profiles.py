"""The pages of a study's profiles that lie in one folder, each linked to the others.

The last profile's page is `report.html`; that of each before it was renamed to `report-PROFILE.html`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from offprincipal.file_names import REPORT
from offprincipal.files import write_atomically

_OPEN, _CLOSE = "<!--profiles-->", "<!--/profiles-->"
_BETWEEN = re.compile(f"{_OPEN}.*?{_CLOSE}", re.DOTALL)


def other_profiles(page: Path, profile: str) -> dict[str, str]:
    """Profile -> its page in the folder of `page`, but for the profile itself, of which an older page may lie there."""
    first = Path(REPORT)
    if page.name != first.name:
        return {}
    found = {
        path.stem.removeprefix(f"{first.stem}-"): path.name
        for path in sorted(page.parent.glob(f"{first.stem}-*{first.suffix}"))
        if path.is_file() and not path.is_symlink()
    }
    return {name: path for name, path in found.items() if name.isidentifier() and name != profile}


def linked_profiles(pages: Mapping[str, str]) -> Markup:
    """Links to the pages of other profiles, between marks by which a later page finds them; empty where there are none.

    >>> "report-quick.html" in linked_profiles({"quick": "report-quick.html"}), "<p" in linked_profiles({})
    (True, False)
    """
    links = Markup(", ").join(Markup('<a href="{}">{}</a>').format(path, name) for name, path in pages.items())
    said = Markup('<p class="lede">Other profiles of this study: {}.</p>').format(links) if pages else Markup()
    return Markup(_OPEN) + said + Markup(_CLOSE)


def link_back(page: Path, profile: str, pages: Mapping[str, str]) -> None:
    """Write into the pages of other profiles where all the others are; an older page without marks has none.

    Raises:
        FileError: a page cannot be written.
    """
    every = {profile or "the latest": page.name, **pages}
    for name, path in pages.items():
        links = linked_profiles({other: at for other, at in every.items() if other != name})
        _relink(page.parent / path, links)


def _relink(page: Path, links: Markup) -> None:
    def write(to: Path) -> None:
        text = page.read_bytes().decode("utf-8", "replace")
        to.write_bytes(_BETWEEN.sub(lambda _: str(links), text, count=1).encode())

    write_atomically(page, write)
