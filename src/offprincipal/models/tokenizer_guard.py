"""What a tokenizer file may not ask for: steps that make a letter into gigabytes, and files that are none."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offprincipal.checkpoints.hostile import is_file, read_json
from offprincipal.errors import CheckpointError, ModelError

TOKENIZER = "tokenizer.json"
_MOST_BYTES = 1 << 28  # those of the largest vocabularies take 35 MB
_MOST_STEPS, _MOST_GROWTH = 1000, 4096.0  # letters that become of one, over all steps of a part
_MOST_PATTERN = 1 << 14  # letters of a regular expression
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def require_tame(folder: Path) -> None:
    """Check the tokenizer file of a folder, if there is one, before a library runs what it says.

    Raises:
        ModelError: it is too large, no JSON object, or its steps would not end or fill the memory.
    """
    path = folder / TOKENIZER
    if not is_file(path):
        return
    try:
        content = read_json(path, _MOST_BYTES)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    for part in _PARTS:
        growth = 1.0
        for count, step in enumerate(_steps(content.get(part)), 1):
            growth *= _growth(step)
            if count > _MOST_STEPS or growth > _MOST_GROWTH:
                what = f"more than {_MOST_STEPS} steps" if count > _MOST_STEPS else "steps that multiply every letter"
                raise ModelError(f"{path}: its {part} has {what}. Do not trust it, or take the base's own tokenizer")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part, sequences and what stands in them; not by recursion, since JSON may be deep."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, list):
            waiting += reversed(step)
        elif isinstance(step, dict):
            waiting += [
                value for key, value in step.items() if isinstance(value, list) and key.endswith(("ers", "ors"))
            ]
            yield step


def _growth(step: dict[str, Any]) -> float:
    """How many letters a step makes of one, at most; 1 of a step that only takes away or looks."""
    given = step.get("pattern")
    pattern: dict[str, Any] = given if isinstance(given, dict) else {}
    regex = pattern.get("Regex")
    if isinstance(regex, str) and len(regex) > _MOST_PATTERN:
        raise ModelError(f"{TOKENIZER} has a regular expression of {len(regex):,} letters: do not trust it")
    content = step.get("content")
    if "pattern" not in step or not isinstance(content, str):
        return 1.0
    plain = pattern.get("String")
    if isinstance(plain, str):
        return max(1.0, len(content) / max(1, len(plain)))
    return max(1.0, len(content) + _matches_nothing(regex))


def _matches_nothing(regex: object) -> bool:
    """Whether an expression finds the empty text, between any two letters; yes where Python cannot read it."""
    try:
        return re.fullmatch(str(regex), "") is not None
    except (re.error, RecursionError, OverflowError):
        return True
