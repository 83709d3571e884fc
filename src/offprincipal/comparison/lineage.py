"""Whether a run was trained from a base, judged from records and distances.

A comparison with another base, or the wrong way round, looks like any other: its figures are of another update.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offprincipal.assets import EMBEDDED, embedded_base
from offprincipal.checkpoints import Checkpoint
from offprincipal.checkpoints.adapter import Adapter
from offprincipal.checkpoints.hostile import is_file, read_json
from offprincipal.checkpoints.hub import is_id
from offprincipal.errors import CheckpointError
from offprincipal.file_names import CHECKPOINTS, DELTAS, MASTERS, RECORD, STARTED

_FAR = 0.5  # of the base's norm: fine-tuning moves weights by hundredths of it; unrelated weights are 1.4 apart


def lineage_warnings(base: Checkpoint, run: Checkpoint, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Evidence that the run was not trained from this base.

    Args:
        rows: of `matrices.parquet`, of this run.
    """
    found = []
    linear = [row for row in rows if row["linear"]]
    norms = [math.sqrt(math.fsum((row[side] or 0.0) ** 2 for row in linear)) for side in ("update_norm", "base_norm")]
    if norms[1] and norms[0] > _FAR * norms[1]:
        found.append(
            f"its distance from the base is {norms[0] / norms[1]:.2g} times the base's norm (unrelated weights: about "
            "1.4). Was it really trained from this base?"
        )
    if told := _told_by_records(base, run):
        found.append(f"according to {told}")
    if begun := next((folder for folder in run.folders if _is_of_a_run_under_way(folder)), None):
        found.append(f"it is {begun.name} of an incomplete training run: rerun the same `train` command to continue it")
    if isinstance(base, Adapter):
        found.append("the base is a model with an adapter: the adapter is not part of the update")
    return found


def _is_of_a_run_under_way(folder: Path) -> bool:
    """Whether a folder is a checkpoint that `train` continues from, of a run that has not written its result."""
    above = folder.resolve().parent
    return above.name == CHECKPOINTS and is_file(above / STARTED) and not is_file(above.parent / RECORD)


@dataclass(frozen=True)
class _Origin:
    """What a run of `train` started from, as its record says.

    Args:
        place: the folder, or an id on the Hub.
        weights: a hash of its weights; None in older records.
    """

    place: Path | str
    weights: str | None

    @property
    def name(self) -> str:
        if isinstance(self.place, str):
            return self.place
        return EMBEDDED if self.place == embedded_base().resolve() else self.place.name

    def is_that_of(self, other: "_Origin") -> bool:
        """Whether both are one model, whatever it was called."""
        return self.place == other.place or (self.weights is not None and self.weights == other.weights)


def _told_by_records(base: Checkpoint, run: Checkpoint) -> str | None:
    """What the records of `train` say against this pair of base and run; None if nothing."""
    of_base, of_run, here, there = _origin(base), _origin(run), _place(base), _place(run)
    if of_base and of_base.place == there:
        return (
            f"its run.json the base is a run that was trained from '{of_base.name}', this model: are the two swapped?"
        )
    if of_run is None or here is None or here in (there, of_run.place):
        return None
    if of_base and of_base.is_that_of(of_run):
        return (
            f"their run.json both it and the base are runs that were trained from '{of_run.name}': the figures are of "
            "the difference between two runs, not of what training did"
        )
    apart = _are_apart(of_run.place, here)
    return f"its run.json it was trained from '{of_run.name}', not from this base" if apart else None


def _are_apart(origin: Path | str, base: Path | str) -> bool:
    """Whether an origin that is named otherwise is another model, surely.

    A folder may be a copy of what the Hub has, and a commit that of the branch.
    """
    if isinstance(origin, str) and isinstance(base, str):
        (name, _, revision), (other, _, others) = origin.partition("@"), base.partition("@")
        return name != other or bool(revision and others)
    return isinstance(origin, Path)


def _origin(checkpoint: Checkpoint) -> _Origin | None:
    """Where a run of `train` started; None if there is no record, or what it names is neither there nor an id."""
    with suppress(CheckpointError, OSError, ValueError, TypeError, KeyError, IndexError):
        record = read_json(_home(checkpoint.folders[0]) / RECORD)["base"]
        place, weights = _place_of(record["source"]), record.get("weights_blake2b")
        if place is not None:
            return _Origin(place, weights if isinstance(weights, str) else None)
    return None


def _place(checkpoint: Checkpoint) -> Path | str | None:
    """Where a checkpoint lies, so that two names of it are one; None if in memory."""
    if not checkpoint.folders:
        return None
    place = _place_of(checkpoint.source)
    return place if isinstance(place, str) else _home(checkpoint.folders[0]).resolve()


def _place_of(source: str) -> Path | str | None:
    """A folder, wherever it is named from, or an id on the Hub, whose main branch needs no name."""
    if source == EMBEDDED:
        return embedded_base().resolve()
    if Path(source).exists():
        return _home(Path(source)).resolve()
    return source.removesuffix("@main") if is_id(source) else None


def _home(folder: Path) -> Path:
    """The folder of the run whose masters or deltas lie in this one; any other folder as it is."""
    return folder.parent if folder.name in (MASTERS, DELTAS) and is_file(folder.parent / RECORD) else folder
