"""Whether a run was trained from a base, judged from records and distances.

A comparison with another base, or the wrong way round, looks like any other: its figures are of another update.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from offprincipal.checkpoints import Checkpoint
from offprincipal.checkpoints.adapter import Adapter
from offprincipal.checkpoints.hostile import is_file, read_json
from offprincipal.errors import CheckpointError
from offprincipal.file_names import CHECKPOINTS, RECORD, STARTED

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
    if _origin(base) in _folders(run):
        found.append("according to its run.json the base was trained from this run: are the two swapped?")
    elif (origin := _origin(run)) and origin not in _folders(base):
        found.append(f"according to its run.json it was trained from '{origin.name}', not from this base")
    if begun := next((folder for folder in run.folders if _is_of_a_run_under_way(folder)), None):
        found.append(f"it is {begun.name} of an incomplete training run: rerun the same `train` command to continue it")
    if isinstance(base, Adapter):
        found.append("the base is a model with an adapter: the adapter is not part of the update")
    return found


def _is_of_a_run_under_way(folder: Path) -> bool:
    """Whether a folder is a checkpoint that `train` continues from, of a run that has not written its result."""
    above = folder.resolve().parent
    return above.name == CHECKPOINTS and is_file(above / STARTED) and not is_file(above.parent / RECORD)


def _origin(checkpoint: Checkpoint) -> Path | None:
    """The local folder from which a run of `train` started; None if no record names an existing one."""
    for folder in checkpoint.folders:
        with suppress(CheckpointError, OSError, ValueError, TypeError, KeyError):
            if is_file(folder / RECORD) and (origin := Path(read_json(folder / RECORD)["base"]["source"])).is_dir():
                return origin.resolve()
    return None


def _folders(checkpoint: Checkpoint) -> set[Path | None]:
    return {folder.resolve() for folder in checkpoint.folders}
