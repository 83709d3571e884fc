"""Layers as they are named on the command line."""

import re
from typing import Literal

from offprincipal.errors import InterventionError

_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)

Layers = tuple[int, ...] | Literal["all"]


def parse_layers(text: str) -> Layers:
    """The layers that a text names: `3`, `0,2`, `4-7`, `0,4-7` or `all`; counted from 0, both ends included.

    Raises:
        InterventionError: it names none.

    >>> parse_layers("0,4-6")
    (0, 4, 5, 6)
    """
    if text.strip() == "all":
        return "all"
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InterventionError(f"'{text}' does not name layers: write 3; 0,2; 4-7; or all")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))
