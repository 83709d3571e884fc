"""`offprincipal show`: print the results in a folder as the command that wrote it did."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table

from offprincipal.errors import FileError
from offprincipal.file_names import (
    CHECKPOINTS,
    GATES,
    INTERVENTION,
    JOURNAL,
    MONITOR,
    PREFLIGHT,
    RECORD,
    STUDY,
    SUMMARY,
    TRAJECTORY,
    TRAJECTORY_JOURNAL,
    UNDONE,
)
from offprincipal.files import read_json
from offprincipal.reports import terminal, words
from offprincipal.reports.names import run_labels
from offprincipal.reports.numbers import number
from offprincipal.reports.report import damage_reported

_WATCHED = (
    ("KL of the step", "kl_step"),
    ("KL to base", "kl_cumulative"),
    ("relative update norm", "relative_update_norm"),
    ("unchanged, %", "unchanged_fraction"),
    ("spectral shift", "spectral_shift"),
)
_JOURNALS = {JOURNAL: "comparison", TRAJECTORY_JOURNAL: "trajectory"}
_ROWS = 12  # rows of a monitor's table, at most, with the last one


def parts_of(folder: Path, explain: bool = False) -> Iterator[RenderableType]:
    """Tables, and sentences as plain text, of all results in a folder.

    Args:
        folder: written by any command of this package; the folder of a run may also hold a monitor's table.
        explain: also give the nulls of every figure, and the details of every claim.

    Raises:
        FileError: the folder holds no results, or a file is damaged.
    """
    for name in _files_in(folder):
        with damage_reported(folder / name):
            yield from _KINDS[name](folder / name)
            yield from _EXPLAINED[name](read_json(folder / name)) if explain and name in _EXPLAINED else ()
    for path in sorted(folder.glob("study-*.json")):  # other profiles in the same folder
        with damage_reported(path):
            yield from _study(path)
            yield from terminal.claims_sentences(read_json(path)) if explain else ()


def _study(path: Path) -> Iterator[RenderableType]:
    study = read_json(path)
    yield f"study '{study['profile']}' of {words.place_name(study['base']['name'])}"
    yield terminal.runs_table(study)
    yield terminal.claims_table(study)


def _run(path: Path) -> Iterator[RenderableType]:
    record = read_json(path)
    settings = record["settings"]
    done = len(record["log"])
    steps = f"{settings['steps']} steps" if done >= settings["steps"] else f"{done} of {settings['steps']} steps"
    yield f"{settings['recipe']} on {', '.join(settings['tasks'])}: {steps}, {settings['batch']} sequences each"
    run = {"name": path.resolve().parent.name, "seconds": record["seconds"], **record["accuracy"]}
    yield terminal.runs_table({"runs": [run]})
    if stopped := record.get("stopped"):
        yield f"stopped early: {stopped}"


def _comparison(path: Path) -> Iterator[RenderableType]:
    summary = read_json(path)
    yield terminal.comparison_table(summary)
    yield from (f"note: {warning}" for warning in words.warnings_of(summary))
    yield from words.decisions(summary, words.ASK, run_labels(summary["runs"]))


def _trajectory(path: Path) -> Iterator[RenderableType]:
    from offprincipal.reports.trajectory import trajectory_sentences, trajectory_table

    content = read_json(path)
    yield trajectory_table(content)
    yield from trajectory_sentences(content)


def _gates(path: Path) -> Iterator[RenderableType]:
    from offprincipal.reports.gates import gates_tables

    yield gates_tables(read_json(path))


def _preflight(path: Path) -> Iterator[RenderableType]:
    from offprincipal.reports.preflight import preflight_sentences, preflight_table

    content = read_json(path)
    yield preflight_table(content)
    yield from preflight_sentences(content)


def _monitor(path: Path) -> Iterator[RenderableType]:
    from offprincipal.training.monitor.table import read_monitor

    rows = [row for row in read_monitor(path.parent) if row["tensor"] is None]
    every = max(1, -(-len(rows) // _ROWS))
    table = Table(box=SIMPLE, title="monitor", title_justify="left")
    for title in ("step", *(title for title, _ in _WATCHED)):
        table.add_column(title, justify="right")
    for row in rows[::-1][::every][::-1]:
        table.add_row(str(row["step"]), *(_beside_null(row, title, name) for title, name in _WATCHED))
    yield table
    yield "in brackets: a Gaussian update of the same length in the same matrices; KL in nats per token"
    if warned := [row for row in rows if row["warned"]]:
        yield f"warned at {len(warned)} of {len(rows)} observed steps, at first: {warned[0]['warned']}"
    if (stopped := rows[-1]["stopped"] if rows else None) and not (path.parent / RECORD).is_file():
        yield f"stopped early: {stopped}"  # otherwise the record of the run says so


def _beside_null(row: dict[str, Any], title: str, name: str) -> str:
    """A figure of the monitor with its isotropic null, if it has one."""
    factor = 100 if "%" in title else 1
    value, null = (None if row.get(key) is None else factor * row[key] for key in (name, f"{name}_isotropic_null"))
    return number(value) if null is None else f"{number(value)} ({number(null)})"


def _intervention(path: Path) -> Iterator[RenderableType]:
    record = read_json(path)
    yield from terminal.proof_lines(record["proof"], record["dtype"], undone=path.name == UNDONE)


_KINDS: dict[str, Callable[[Path], Iterator[RenderableType]]] = {
    STUDY: _study,
    RECORD: _run,
    MONITOR: _monitor,
    SUMMARY: _comparison,
    TRAJECTORY: _trajectory,
    GATES: _gates,
    PREFLIGHT: _preflight,
    INTERVENTION: _intervention,
    UNDONE: _intervention,
}


_EXPLAINED: dict[str, Callable[[Any], Iterable[str]]] = {
    STUDY: terminal.claims_sentences,
    SUMMARY: lambda summary: [*terminal.ladder_tables(summary), *words.verdict_paragraph(summary)],
}


def as_json(folder: Path) -> dict[str, Any]:
    """The JSON files of a folder: name -> content.

    Raises:
        FileError: the folder holds no results.
    """
    return {name: read_json(folder / name) for name in _files_in(folder, ".json")}


def _files_in(folder: Path, suffix: str = "") -> list[str]:
    found = [name for name in _KINDS if name.endswith(suffix) and (folder / name).is_file()]
    if not found and (folder / CHECKPOINTS).is_dir():
        raise FileError(
            f"{folder} holds a run that is not complete: `offprincipal train` with the same settings resumes it"
        )
    unfinished = next((what for journal, what in _JOURNALS.items() if (folder / journal).is_file()), None)
    if not found and unfinished:
        raise FileError(f"{folder} holds an unfinished {unfinished}: the same command continues with it")
    if not found and _holds_a_monitors_base(folder):
        raise FileError(
            f"{folder} holds a monitor that has observed no step: if the training is over, its steps were too fast for "
            "the budget: set every=N or a larger budget, or call observe with last=True after the last step"
        )
    if not found:
        raise FileError(f"{folder} holds none of {', '.join(_KINDS)}: give a folder that offprincipal wrote")
    return found


def _holds_a_monitors_base(folder: Path) -> bool:
    from offprincipal.training.monitor import base_file

    return (folder / base_file.NAME).is_file()
