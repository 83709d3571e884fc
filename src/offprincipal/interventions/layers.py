"""Parse lists of layers from the command line."""

import re
from typing import Literal

from offprincipal.errors import InterventionError

_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)

Layers = tuple[int, ...] | Literal["all"]


def parse_layers(text: str) -> Layers:
    """Parse a list of layers.

    Args:
        text: `3`, `0,2`, `4-7`, `0,4-7` or `all`; layers count from 0, and ranges include both ends.

    Returns:
        The layers in ascending order, or "all".

    Raises:
        InterventionError: the text is not such a list.

    >>> parse_layers("0,4-6")
    (0, 4, 5, 6)
    """
    if text.strip() == "all":
        return "all"
    layers: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InterventionError(f"'{text}' does not name layers: write 3; 0,2; 4-7; or all")
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))
