"""`key=value` overrides of nested settings, as the command line takes them."""

from contextlib import suppress
from typing import Any

import yaml

from offprincipal.errors import StudyError

_JINJA = ("{{", "{%")


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is read as YAML, as a number wherever it is one, and a template as text.

    Raises:
        StudyError: the text has no key or no `=`.

    >>> parse_override("training.learning_rate=1e-5")
    ('training.learning_rate', 1e-05)
    """
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise StudyError(f"'{text}' is not a setting: write KEY=VALUE, e.g. steps=200")
    if value_text.startswith(_JINJA):
        return key, value_text
    with suppress(ValueError):
        if "e" in value_text.lower():
            return key, float(value_text)
    try:
        return key, yaml.safe_load(value_text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError(f"the value of '{text[:200]}' is not valid YAML: {error}") from error


def apply_override(content: dict[str, Any], text: str) -> None:
    """Enter `key=value`, the key dotted, into nested settings.

    Raises:
        StudyError: the text is not an override, or a part of the key is a value already.

    >>> content = {"adapter": {"method": "pissa"}}
    >>> apply_override(content, "adapter.rank=16")
    >>> content
    {'adapter': {'method': 'pissa', 'rank': 16}}
    """
    key, value = parse_override(text)
    *path, last = key.split(".")
    place: Any = content
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise StudyError(f"'{text}': there is no setting {key}, since a part of it is a value")
    place[last] = value
