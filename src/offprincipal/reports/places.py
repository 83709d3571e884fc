"""What a summary says of places on this machine, as it may be shared: no path, and a command that makes it again."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offprincipal.measures.compare_settings import CompareSettings
from offprincipal.measures.settings import FROM_FILES, MatrixSettings, as_in_files
from offprincipal.reports.words import place_name

_PLACES = ("source", "masters")
_DEEP = 3  # parts of a path, the root among them, of which the last may be named
_OPTIONS = (
    *("metrics", "rank_fraction", "alpha", "null_draws", "seed", "include_embeddings", "strict"),
    *("solver", "tolerance", "device", "expect"),
)


def without_paths(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary without this machine's paths, since a page is made to be shared.

    They are as seen from the folder that all of them lie in; where that is a machine's own, as `/home`, their last
    parts alone.
    """
    runs = summary["runs"]
    places = [run[key] for run in runs.values() for key in _PLACES if key in run]
    paths = [Path(place) for place in (summary["base"], *places) if Path(place).is_absolute()]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path("/")

    def named(place: str) -> str:
        if not Path(place).is_absolute():
            return place
        return place_name(place) if len(common.parts) < _DEEP else str(Path(place).relative_to(common))

    def said(text: str) -> str:
        for path in sorted(map(str, paths), key=len, reverse=True):
            text = text.replace(path, named(path))
        return text

    shown = {
        name: run
        | {key: named(run[key]) for key in _PLACES if key in run}
        | {"warnings": [said(warning) for warning in run.get("warnings", ())]}
        for name, run in runs.items()
    }
    return summary | {"base": named(summary["base"]), "runs": shown}


def reproducing(summary: Mapping[str, Any]) -> str:
    """What makes the comparison again: every option that is not as it usually is."""
    runs = [f"{name}={run['source']}" for name, run in summary["runs"].items()]
    usual = as_in_files(asdict(CompareSettings()) | asdict(MatrixSettings()))
    options: list[str] = []
    for name in _OPTIONS:
        value, flag = summary["arguments"].get(name), f"--{FROM_FILES.get(name, name).replace('_', '-')}"
        if value is None or value == _as_written(usual[name]):
            continue
        if name == "expect":
            options += [word for text in value for word in (flag, text)]
        else:
            options += [flag] if value is True else [flag, ",".join(value) if isinstance(value, list) else str(value)]
    for name, run in summary["runs"].items():
        options += ["--masters", f"{name}={run['masters']}"] if "masters" in run else []
    command = shlex.join(["offprincipal", "compare", summary["base"], *runs, *options])
    more = {
        FROM_FILES.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in summary["arguments"].items()
        if name in usual and name not in _OPTIONS and value != _as_written(usual[name])
    }
    in_python = ", ".join(f"{name}={value!r}" for name, value in more.items())
    return f"{command}\n# and what only Python can set: offprincipal.compare(…, {in_python})" if more else command


def _as_written(value: Any) -> Any:
    """A setting as `summary.json` has it."""
    return list(value) if isinstance(value, tuple) else value
