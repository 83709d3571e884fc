"""Reuse of an earlier comparison in the output folder, so that only new runs are measured.

In addition to its tables a comparison writes `measured.json`: for each run a digest of everything its rows depend on
(settings, versions, configurations, the path, size and time of every file), and digests of the tables. A run's rows are
reused if its digest is the same and the tables are unchanged. Rows of a pair of runs are measured again, unless both
were compared before.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints import Checkpoint
from offprincipal.comparison.journal import DECISIVE, rewrite
from offprincipal.comparison.measure import BASE_CURVE, Row, TensorRows, consensus_of, counts_of
from offprincipal.comparison.work import Work
from offprincipal.errors import FileError
from offprincipal.file_names import JOURNAL
from offprincipal.files import Identities, ordinary, read_json, write_json
from offprincipal.tables import TABLES, read_table
from offprincipal.versions import versions

NAME = "measured.json"
LOG = logging.getLogger("offprincipal")


@dataclass(frozen=True)
class Before:
    """Earlier measurements that are reused.

    Args:
        runs: runs whose own rows are known, for every part; all: whether nothing is left to measure.
        rows: part name -> its known rows.
    """

    runs: tuple[str, ...] = ()
    all: bool = False
    rows: Mapping[str, TensorRows] = field(default_factory=dict)

    def merged(self, name: str, measured: TensorRows, order: Sequence[str]) -> TensorRows:
        """The known and measured rows of a part, in the order in which they would be measured together.

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


def measured_before(work: Work, out: Path, keys: Mapping[str, str]) -> Before:
    """The reusable rows of an earlier comparison in a folder; call only while holding the folder's lock.

    Args:
        keys: as `run_keys` gives them.
    """
    if not keys or not (out / NAME).is_file():
        return Before()
    try:
        return _found(work, out, read_json(out / NAME), keys)
    except (FileError, OSError, LookupError, TypeError, AttributeError, ValueError):
        LOG.warning("%s was damaged: everything is measured again", out / NAME)
        return Before()


def adopt_journal(work: Work, out: Path, key: str, runs: Mapping[str, str]) -> None:
    """Continue the journal of a comparison of more runs, dropping the others.

    Call only while holding the folder's lock. Leaving out a run thus keeps the measurements of the others.

    Args:
        key: of this comparison's journal; runs: as `run_keys` gives them.
    """

    def head(content: dict[str, Any]) -> dict[str, Any] | None:
        theirs = content.get("runs")
        if not isinstance(theirs, dict) or content.get("known") != [] or len(theirs) <= len(runs):
            return None
        if [name for name in theirs if name in runs] != list(runs) or any(theirs[run] != runs[run] for run in runs):
            return None
        LOG.warning("continuing with the measurements made together with %s", ", ".join(theirs.keys() - runs.keys()))
        return {"key": key, **journal_about(runs)}

    parts = {part.name: part.keys for part in work.parts}  # which may have more rows now

    def line(content: dict[str, Any]) -> dict[str, Any] | None:
        keys = parts.get(content["tensor"])
        if keys is None or any(row | keys != row for row in content["matrices"]):
            return None
        own = {table: [row for row in content[table] if _is_of(row, list(runs), False)] for table in TABLES}
        if any(row["curve"].startswith("consensus_") for row in content["curves"]) and len(runs) > 1:
            own["curves"] += consensus_of(counts_of(own["curves"]), own["matrices"][0] | {"run": None})
        fallbacks = {run: why for run, why in content["fallbacks"].items() if run in runs}
        return {"tensor": content["tensor"], **own, "fallbacks": fallbacks}

    try:
        rewrite(out / JOURNAL, head, line)
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        LOG.warning("%s cannot be continued: %s", out / JOURNAL, error)


def journal_about(runs: Mapping[str, str], known: Collection[str] = ()) -> dict[str, Any]:
    """The entries of a journal's first line that `adopt_journal` reads."""
    return {"runs": dict(runs), "known": list(known)}


def keep_measured(out: Path, keys: Mapping[str, str], measured: Mapping[str, TensorRows]) -> None:
    """Write the file that lets the next comparison in the folder reuse these tables; call after writing them.

    Args:
        keys: as `run_keys` gives them; measured: of each part, by name.
    """
    if not keys:
        (out / NAME).unlink(missing_ok=True)
        return
    fallbacks = {name: rows.fallbacks for name, rows in measured.items() if rows.fallbacks}
    write_json(out / NAME, {"runs": dict(keys), "fallbacks": fallbacks, "tables": _digests(out)})


def _found(work: Work, out: Path, about: Mapping[str, Any], keys: Mapping[str, str]) -> Before:
    then = about["runs"]
    known = [run for run in then if keys.get(run) == then[run]]
    if not known or known != [run for run in work.runs if run in known]:  # else pairs would be named the other way
        return Before()
    if about["tables"] != _digests(out):
        LOG.warning("the tables in %s were modified: everything is measured again", out)
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
    """Whether a row is of runs that are known, or of the base; what is of all runs is, if all are."""
    if "run_a" in row:
        return row["run_a"] in known and row["run_b"] in known
    return row["run"] in known or (row["run"] is None and (everything or row["curve"] == BASE_CURVE))


def run_keys(work: Work, files: Identities) -> dict[str, str]:
    """Run -> digest of all that its own rows depend on; nothing where a side is a model in memory, which no file tells.

    Args:
        files: what is read, as it was when it was opened.
    """
    if work.in_memory:
        return {}
    settings = asdict(work.settings)
    decisive = {name: value for name, value in settings.items() if name not in ("expect", "strict")}

    def of(*checkpoints: Checkpoint) -> list[Any]:
        paths = dict.fromkeys(path for checkpoint in checkpoints for path in checkpoint.files)
        return [[str(path.resolve()), *files[path][:2]] for path in paths] + [dict(one.config) for one in checkpoints]

    found = {}
    for name, run in work.runs.items():
        masters = [work.masters[name]] if name in work.masters else []
        about = [decisive, versions(*DECISIVE), of(work.base_checkpoint, run, *masters)]
        text = json.dumps(about, default=str, sort_keys=True)
        found[name] = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return found


def _digests(out: Path) -> dict[str, str]:
    found = {}
    for table in TABLES:
        with ordinary(out / f"{table}.parquet").open("rb") as file:
            found[table] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
