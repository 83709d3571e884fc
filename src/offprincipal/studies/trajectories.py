"""The stage that follows runs over their checkpoints, as stored and in float32, with blind walks for comparison."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from offprincipal.errors import StudyError
from offprincipal.file_names import DELTAS, MASTERS, TRAJECTORY_PAGE
from offprincipal.files import require_folder
from offprincipal.reports.trajectory import write_figure
from offprincipal.studies.experiments import Row, write_rows
from offprincipal.studies.stages import StageKind, Workspace, base_folder
from offprincipal.training import ShowProgress, silent
from offprincipal.trajectories import trajectory
from offprincipal.trajectories.scalars import NULLS, SCALARS, SIDES, scalars_of
from offprincipal.trajectories.trajectory import followed

WEIGHTS = ("stored", "float32")
TABLE = "trajectories.parquet"


class TrajectoryStage(StageKind):
    """How training stages moved over the checkpoints that `keep_deltas` and `keep_masters` kept.

    Its folder has RUN_stored and RUN_float32, as `offprincipal trajectory` writes them, and a table with one row for
    each of those and for each of its blind walks: the same steps, shuffled over the entries.

    Args:
        subspace_rank: rank of the subspaces whose overlaps are measured; None for none.
        negative_control: number of blind walks per run.
    """

    kind: Literal["trajectory"]
    runs: tuple[str, ...] = Field(min_length=1)
    subspace_rank: int | None = Field(None, ge=1)
    negative_control: int = Field(20, ge=0)

    def inputs(self) -> tuple[str, ...]:
        return self.runs

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        require_folder(space.folder(name))
        base = base_folder(space.base)
        rows: list[Row] = []
        for run in self.runs:
            kept = space.folder(run) / DELTAS
            if not (kept / MASTERS).is_dir():
                raise StudyError(
                    f"stage '{run}' saved no intermediate checkpoints: set keep_deltas and keep_masters, and train "
                    "again"
                )
            for weights in WEIGHTS:
                masters = weights == "float32"
                out = space.folder(name) / f"{run}_{weights}"
                options: Any = {"masters": masters, "subspace_rank": self.subspace_rank}
                found = trajectory(base, kept, out=out, overwrite=True, **options).content
                write_figure(out / TRAJECTORY_PAGE, found)
                keys = {"run": run, "weights": weights, "checkpoints": len(found["steps"])}
                rows.append(keys | {"draw": None} | _row(found["pooled"]))
                blind = self._blind(base, kept, masters)
                nulls = {key: value for key, value in rows[-1].items() if key.endswith(NULLS)}
                for draw, G in enumerate(blind):
                    told = scalars_of(G, found["steps"], rows[-1]["drift_stored_line_null"])
                    rows.append(dict.fromkeys(rows[-1]) | nulls | keys | {"draw": draw} | told)
        write_rows(space.folder(name) / TABLE, rows)

    def _blind(self, base: Path, kept: Path, masters: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
        if not self.negative_control:
            return np.zeros((0, 0, 0))
        work = followed(base, kept, masters=masters)
        walks = [work.walk_blindly(part, self.negative_control) for part in work.parts if part.numel]
        found: np.ndarray[Any, np.dtype[np.float64]] = np.sum(walks, axis=0)
        return found

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / TABLE]


def _row(pooled: Row) -> Row:
    """Of a whole model: every scalar with its nulls, and what its leading directions share halfway with the last."""
    row = {scalar: pooled[scalar]["value"] for scalar in SCALARS}
    row |= {f"{scalar}_{null}": pooled[scalar][null] for scalar in SCALARS for null in NULLS}
    drift = pooled["drift"]
    row |= {"drift": drift["value"], "drift_low": drift["low"], "drift_high": drift["high"]}
    row |= {f"drift_{null}": drift[null] for null in NULLS if null in drift}
    row |= {"verdict": pooled["verdict"], "relative_norm": pooled["relative_norms"][-1]}
    if overlap := pooled["subspace_overlap"]:
        half = (len(pooled["norms"]) - 1) // 2
        for side in SIDES:
            row |= {f"subspace_overlap_{side}_{kind}": values[half] for kind, values in overlap[side].items()}
    return row
