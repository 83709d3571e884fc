"""A griffe extension: the doctests that end our docstrings become their `Examples:` section."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> ", re.MULTILINE)


class Examples(griffe.Extension):
    """Head the first doctest of each docstring, and indent it and what follows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        found = _DOCTEST.search(obj.docstring.value) if obj.docstring else None
        if obj.docstring and found:
            text = obj.docstring.value
            examples = "\n".join(f"    {line}".rstrip() for line in text[found.start() :].splitlines())
            obj.docstring.value = f"{text[: found.start()]}Examples:\n{examples}\n"
