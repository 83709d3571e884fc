"""What an earlier comparison in the output folder measured of runs that are compared again, so that only new ones are.

Beside its tables a comparison leaves `measured.json`: for each run a digest of all that its rows depend on (settings,
versions, configurations, the path, size and time of every file), and digests of the tables. Rows of a run are taken
from them where its digest is the same and the tables are as they were written. Rows of two runs together are measured
again, but for those of two runs that were compared before.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints import Checkpoint
from offprincipal.comparison.journal import versions
from offprincipal.comparison.measure import BASE_CURVE, Row, TensorRows
from offprincipal.comparison.tables import TABLES, read_table
from offprincipal.comparison.work import Work
from offprincipal.errors import FileError
from offprincipal.files import Identities, ordinary, read_json, write_json

NAME = "measured.json"
LOG = logging.getLogger("offprincipal")


@dataclass(frozen=True)
class Before:
    """What is known of earlier measurements.

    Args:
        runs: whose own rows are known, of every part; all: whether nothing is left to measure.
        rows: by the name of the part.
    """

    runs: tuple[str, ...] = ()
    all: bool = False
    rows: Mapping[str, TensorRows] = field(default_factory=dict)

    def merged(self, name: str, measured: TensorRows, order: Sequence[str]) -> TensorRows:
        """The rows of a part, known and measured, as they are when its runs are measured together.

        Args:
            order: the runs as they are compared.
        """
        if not self.runs:
            return measured
        known = self.rows[name]
        place: dict[str | None, int] = {run: number for number, run in enumerate(order)} | {None: len(order)}

        def together(table: str, *keys: str) -> list[Row]:
            rows = [*getattr(known, table), *getattr(measured, table)]
            return sorted(rows, key=lambda row: [place[row[key]] for key in keys])

        return TensorRows(
            together("matrices", "run"),
            together("masks", "run"),
            together("pairs", "run_a", "run_b"),
            together("curves", "run"),
            known.fallbacks | measured.fallbacks,
        )


def measured_before(work: Work, out: Path, files: Identities) -> Before:
    """What the comparison in a folder, if there is one, measured of these runs; for who holds the folder.

    Args:
        files: what is read, as it was when it was opened.
    """
    if work.in_memory or not (out / NAME).is_file():
        return Before()
    try:
        return _found(work, out, read_json(out / NAME), _keys(work, files))
    except (FileError, OSError, LookupError, TypeError, AttributeError, ValueError):
        LOG.warning("%s was damaged: all is measured again", out / NAME)
        return Before()


def keep_measured(work: Work, out: Path, files: Identities, measured: Mapping[str, TensorRows]) -> None:
    """Leave what the next comparison in the folder needs to take these tables for its own; for who just wrote them.

    Args:
        measured: of each part, by name.
    """
    if work.in_memory:
        (out / NAME).unlink(missing_ok=True)
        return
    fallbacks = {name: rows.fallbacks for name, rows in measured.items() if rows.fallbacks}
    write_json(out / NAME, {"runs": _keys(work, files), "fallbacks": fallbacks, "tables": _digests(out)})


def _found(work: Work, out: Path, about: Mapping[str, Any], keys: Mapping[str, str]) -> Before:
    then = about["runs"]
    known = [run for run in then if keys.get(run) == then[run]]
    if not known or known != [run for run in work.runs if run in known]:  # else pairs would be named the other way
        return Before()
    if about["tables"] != _digests(out):
        LOG.warning("the tables in %s are not as they were written: all is measured again", out)
        return Before()
    everything = known == list(then) == list(work.runs)
    rows = {part.name: TensorRows(fallbacks=dict(about["fallbacks"].get(part.name, {}))) for part in work.parts}
    for table in TABLES:
        for row in read_table(out, table):
            if row["tensor"] in rows and _is_of(row, known, everything):
                getattr(rows[row["tensor"]], table).append(row)
    for part in work.parts:
        covered = [row["run"] for row in rows[part.name].matrices if row | part.keys == row]
        if covered != known:  # a tensor that was not compared, or fewer rows of it
            return Before()
    for one in rows.values():
        for run in one.fallbacks.keys() - set(known):
            del one.fallbacks[run]
        for curve in one.curves:
            curve["values"] = np.array(curve["values"], np.float64)
    return Before(tuple(known), everything, rows)


def _is_of(row: Row, known: Sequence[str], everything: bool) -> bool:
    """Whether a row is of runs that are known, or of the base; what is of all runs is, where all are."""
    if "run_a" in row:
        return row["run_a"] in known and row["run_b"] in known
    return row["run"] in known or (row["run"] is None and (everything or row["curve"] == BASE_CURVE))


def _keys(work: Work, files: Identities) -> dict[str, str]:
    """Run -> digest of all that its own rows depend on."""
    settings = asdict(work.settings)
    decisive = {name: value for name, value in settings.items() if name not in ("expect", "strict")}

    def of(*checkpoints: Checkpoint) -> list[Any]:
        paths = dict.fromkeys(path for checkpoint in checkpoints for path in checkpoint.files)
        return [[str(path), *files[path][:2]] for path in paths] + [dict(one.config) for one in checkpoints]

    found = {}
    for name, run in work.runs.items():
        masters = [work.masters[name]] if name in work.masters else []
        about = [decisive, versions(), of(work.base_checkpoint, run, *masters)]
        text = json.dumps(about, default=str, sort_keys=True)
        found[name] = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return found


def _digests(out: Path) -> dict[str, str]:
    found = {}
    for table in TABLES:
        with ordinary(out / f"{table}.parquet").open("rb") as file:
            found[table] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
