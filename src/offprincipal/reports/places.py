"""A summary prepared for sharing: without paths of this machine, and with the command that reproduces it."""

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
_DEEP = 3  # parts of a common folder, including the root, from which relative paths may be shown
_OPTIONS = (
    *("metrics", "rank_fraction", "alpha", "null_draws", "seed", "include_embeddings", "strict"),
    *("solver", "tolerance", "device", "expect"),
)


def without_paths(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary without absolute paths of this machine.

    Paths become relative to the folder that contains all of them. If that folder has fewer than three parts, such as
    `/home`, only the last part of each path is kept.

    Args:
        summary: the content of `summary.json`.
    """
    runs = summary["runs"]
    places = [run[key] for run in runs.values() for key in _PLACES if key in run]
    paths = [Path(place) for place in (summary["base"], *places) if Path(place).is_absolute()]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path("/")

    def named(place: str) -> str:
        if not Path(place).is_absolute():
            return place
        return place_name(place) if len(common.parts) < _DEEP else str(Path(place).relative_to(common))

    def cleaned(text: str) -> str:
        for path in sorted(map(str, paths), key=len, reverse=True):
            text = text.replace(path, named(path))
        return text

    shown = {
        name: run
        | {key: named(run[key]) for key in _PLACES if key in run}
        | {"warnings": [cleaned(warning) for warning in run.get("warnings", ())]}
        for name, run in runs.items()
    }
    return summary | {"base": named(summary["base"]), "runs": shown}


def reproducing(summary: Mapping[str, Any]) -> str:
    """The command that reproduces a comparison, with every option that differs from its default."""
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
    return f"{command}\n# and settings that only Python has: offprincipal.compare(…, {in_python})" if more else command


def _as_written(value: Any) -> Any:
    """A setting as in `summary.json`."""
    return list(value) if isinstance(value, tuple) else value
