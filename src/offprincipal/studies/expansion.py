"""Stages that stand for several: one for each combination of some settings, and patterns that name them all.

    lora_r{rank}_s{seed}:
      kind: train
      each: {adapter.rank: [4, 16], seed: [1, 2]}
    comparison:
      kind: compare
      runs: [lora_*]

Works on the content of a profile, before it is checked. Knows nothing of what a stage does.
"""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from offprincipal.errors import StudyError

EACH = "each"
_NAMED_IN = ("runs", "rl", "sft", "beyond", "sources", "like", "sweep")  # fields that name stages and take patterns


def expand(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The stages that a profile's stages stand for.

    Args:
        stages: name -> stage, as read from YAML. `each` maps dotted settings to lists of values; the last part of a
            setting's name, in braces, stands for its value in the stage's name and in what it names.

    Raises:
        StudyError: `each` is not of that form, two stages get one name, or a pattern names no stage.

    >>> list(expand({"run_s{seed}": {"kind": "train", "each": {"seed": [1, 2]}}}))
    ['run_s1', 'run_s2']
    >>> expand({"a_1": {}, "a_2": {}, "both": {"runs": ["a_*"]}})["both"]
    {'runs': ['a_1', 'a_2']}
    """
    found: dict[str, Any] = {}
    for name, stage in stages.items():
        for own, made in _copies(name, stage):
            if own in found:
                raise StudyError(f"two stages expand to the name '{own}': use every key of 'each' in the stage's name")
            found[own] = made
    return {name: _with_names(stage, [other for other in found if other != name]) for name, stage in found.items()}


def _copies(name: str, stage: Any) -> list[tuple[str, Any]]:
    if not isinstance(stage, dict) or EACH not in stage:
        return [(name, stage)]
    each = stage[EACH]
    lists = isinstance(each, dict) and each and all(isinstance(v, list) and v for v in each.values())
    if not (lists and all(isinstance(key, str) for key in each)):
        raise StudyError(f"stage '{name}': 'each' must map settings to lists of values, e.g. each: {{seed: [1, 2]}}")
    copies = []
    for values in itertools.product(*each.values()):
        made = copy.deepcopy({key: value for key, value in stage.items() if key != EACH})
        words = {key.rpartition(".")[2]: value for key, value in zip(each, values, strict=True)}
        for key, value in zip(each, values, strict=True):
            _set(made, key.split("."), value, name)
        made = {key: _filled(value, words) if key in _NAMED_IN else value for key, value in made.items()}
        copies.append((_filled(name, words), made))
    return copies


def _set(stage: dict[str, Any], path: Sequence[str], value: Any, name: str) -> None:
    place: Any = stage
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise StudyError(f"stage '{name}': 'each' cannot set {'.'.join(path)}, since {part} is a value")
    place[path[-1]] = value


def _filled(text: Any, words: Mapping[str, Any]) -> Any:
    """A text, or texts of lists and mappings, with the values in place of their names in braces."""
    if isinstance(text, dict):
        return {key: _filled(value, words) for key, value in text.items()}
    if isinstance(text, list):
        return [_filled(one, words) for one in text]
    if not isinstance(text, str):
        return text
    return re.sub(r"\{(\w+)\}", lambda found: _word(words[found[1]]) if found[1] in words else found[0], text)


def _word(value: Any) -> str:
    """A value as a part of a name."""
    return re.sub(r"\W", "_", f"{value:g}" if isinstance(value, float) else str(value))


def _with_names(stage: Any, names: Sequence[str]) -> Any:
    """A stage whose patterns are replaced by the names, of other stages, that they stand for."""
    if not isinstance(stage, dict):
        return stage
    return {key: _named(value, names) if key in _NAMED_IN else value for key, value in stage.items()}


def _named(patterns: Any, names: Sequence[str]) -> Any:
    """The names that patterns stand for, each once; of a mapping to lists, in each list."""
    if isinstance(patterns, dict):
        return {key: _named(value, names) for key, value in patterns.items()}
    if not (isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)):
        return patterns  # which the check of the whole profile refuses
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)] if "*" in pattern else [pattern]
        if not matching:
            raise StudyError(f"no stage matches '{pattern}': stages are {', '.join(names)}")
        found |= dict.fromkeys(matching)
    return list(found)
