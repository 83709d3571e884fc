"""A trajectory: checkpoints of one run in order, their figures pooled over the model, by role, layer and tensor.

One pass over the files: every tensor of every checkpoint is read once, in blocks.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offprincipal.checkpoints import Checkpoint, Part, open_checkpoint
from offprincipal.comparison.execution import run_on_ray
from offprincipal.comparison.journal import gather, held, resumable
from offprincipal.errors import ArgumentError, CheckpointError, FileError
from offprincipal.file_names import TRAJECTORY, TRAJECTORY_JOURNAL
from offprincipal.files import identities, read_json, require_folder, require_unchanged, write_atomically, write_json
from offprincipal.geometry.extrapolation import METHODS, Method
from offprincipal.measures.columns import needs_torch
from offprincipal.measures.settings import Device, MatrixSettings
from offprincipal.memory import SHARE, free_memory
from offprincipal.parallel import in_order, in_threads, one_core_each
from offprincipal.tables import require_none_replaced
from offprincipal.tabular import Tabular
from offprincipal.trajectories.measure import Moved, restored
from offprincipal.trajectories.prediction import Progress, predictions_of, require_predictable, write_prediction
from offprincipal.trajectories.scalars import Row, Sums
from offprincipal.trajectories.sources import expanded, label_of, steps_of
from offprincipal.trajectories.work import Followed, TrajectorySettings

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TABLE = "trajectory.parquet"


@dataclass(frozen=True, repr=False)
class Trajectory(Tabular):
    """The measurements of many checkpoints of one run.

    Args:
        content: the content of `trajectory.json`; rows: of `trajectory.parquet`, one per tensor and step.
    """

    content: dict[str, Any]
    rows: list[Row]

    def write(self, out: str | Path) -> Path:
        """Write `trajectory.json` and `trajectory.parquet` into a folder, each whole or not at all.

        Raises:
            FileError: they cannot be written.
        """
        folder = Path(out)
        require_folder(folder)
        write_atomically(folder / TABLE, partial(pq.write_table, self.to_arrow(), use_dictionary=["tensor", "role"]))
        write_json(folder / TRAJECTORY, self.content)
        return folder

    def to_arrow(self, table: str = "") -> pa.Table:
        """The rows of `trajectory.parquet`, one per tensor and step."""
        return pa.Table.from_pylist(self.rows)

    def _shown(self) -> Any:
        from rich.console import Group

        from offprincipal.reports.trajectory import trajectory_sentences, trajectory_table

        return Group(trajectory_table(self.content), *trajectory_sentences(self.content))

    def _repr_html_(self) -> str:
        from offprincipal.reports.trajectory import summary_html

        return summary_html(self.content)

    def plot(self) -> "Figure":
        """The figures of the report, which a notebook shows: distances, cosines, the path, shares and predictions."""
        from offprincipal.reports.trajectory import figure_of

        return figure_of(self.content)


def trajectory(
    base: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    *,
    steps: Sequence[float] | None = None,
    out: str | Path | None = None,
    subspace_rank: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    device: Device = "cpu",
    masters: bool = False,
    skip_broken: bool = False,
    predict: float | None = None,
    predict_by: Method = "linear",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Trajectory:
    """Measure how weights moved over the checkpoints of a run, compared with a random walk of the same steps.

    Args:
        base: the model that the run started from: any checkpoint that `compare` opens.
        checkpoints: any checkpoints that `compare` opens, in any order; the run's root, with `checkpoint-*` or similar
            folders; or a pattern of branches on the Hub, `org/name@step_*`.
        steps: training steps of the checkpoints, in the order given; by default parsed from their names, or 1, 2, … if
            these have none.
        out: folder for `trajectory.json` and `trajectory.parquet`; nothing is written without it. If interrupted, the
            same call continues from the journal there.
        subspace_rank: also measure the overlap of each displacement's leading singular subspaces of this rank with the
            last one's, which reads all linear matrices again and takes some minutes per hundred million weights.
        threads: number of tensors measured in parallel; all cores by default. It does not change the numbers.
        ray: address of a Ray cluster to measure on, or `local` for one on this machine, instead of threads.
        device: device that computes inner products and subspaces: `cpu`, `cuda`, or `auto` for CUDA if available.
        masters: follow the float32 weights that trainers keep with checkpoints, in which storing hides no step.
        skip_broken: skip checkpoints that cannot be opened, with a warning.
        predict: a step; the model extrapolated to it is written to `predicted-STEP` in `out`.
        predict_by: `linear`, each weight along its own line; `rank1`, all of them along one direction.
        overwrite: replace the figures of other checkpoints in the folder, or a model that was predicted there in
            another way.
        progress: called with entries done, entries in all, and the tensor's name.

    Raises:
        CheckpointError: a checkpoint cannot be read, or does not match the base.
        ArgumentError: there is no checkpoint, steps are repeated or differ in number from the checkpoints, or nothing
            can be predicted.
        FileError: the files cannot be written, or checkpoints changed meanwhile.

    >>> from offprincipal.assets import embedded_base
    >>> still = trajectory(embedded_base(), [embedded_base() / "model.safetensors"], steps=[10])
    >>> still.content["pooled"]["unchanged_fraction"], still.content["pooled"]["verdict"]
    ([1.0], 'cannot tell')
    """
    warnings: list[str] = []
    work = followed(
        base,
        checkpoints,
        steps,
        MatrixSettings(device=device),
        subspace_rank,
        masters,
        skip_broken,
        warnings,
    )
    if out is not None and not overwrite:
        read = [run.source for run in work.runs.values()]  # with masters, other files than those that were given
        path = Path(out) / TRAJECTORY
        require_none_replaced(path, str(base), [*work.tuned.values(), *read], lambda content: content["checkpoints"])
    if (subspace_rank is not None or device != "cpu") and ray is None:
        from offprincipal.measures.spectral import chosen_device

        chosen_device(device)
    if predict is not None:
        _require_prediction(work, work.steps, predict, predict_by, out)
        if out is not None and not overwrite:
            _require_no_other_prediction(Path(out), predict, predict_by)
    parts = [part for part in work.parts if part.numel]
    most = max((min(part.matrix_shape) for part in parts if work.is_linear(part)), default=0)
    if subspace_rank is not None and subspace_rank > most:
        raise ArgumentError(f"subspace_rank is {subspace_rank}, and no linear matrix has more than {most} directions")
    sums = Sums(parts, work.steps, subspace_rank)
    opened = identities(work.files)

    def measure(left: Sequence[Part]) -> Iterable[tuple[Part, Moved]]:
        needs = {part.name: work.bytes_needed(part) for part in left}
        largest_first = sorted(left, key=lambda part: (-needs[part.name], -part.numel))
        if ray:
            found = run_on_ray(work, Followed.follow, largest_first, ray)
        else:
            budget = int(SHARE * free_memory())
            found = in_threads(work.follow, largest_first, threads or os.cpu_count() or 1, needs, budget)
        return in_order(largest_first, found)

    def restore(name: str, kept: Row) -> None:
        sums.add(name, restored(kept))

    with held(out) as folder, resumable(folder, work, opened, restore, TRAJECTORY_JOURNAL) as journal:
        with one_core_each(needs_torch(work.settings.metrics)):
            gather(parts, sums.known, measure, sums.add, journal, progress)
        require_unchanged(opened)
        notes = dict.fromkeys(note for said in work.notes.values() for note in said)
        result = _result(work, sums, [*warnings, *notes])
        if folder is not None:
            result.write(folder)
            if predict is not None:
                model = _model_at(predict)
                gram = np.asarray(result.content["pooled"]["gram"])
                write_prediction(work, gram, work.steps, predict, predict_by, folder / model, progress)
                result.content["prediction"] = {"step": predict, "by": predict_by, "model": model}
                result.write(folder)
        if journal:
            journal.discard()
    return result


def followed(
    base: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    steps: Sequence[float] | None = None,
    matrix: MatrixSettings = MatrixSettings(),  # noqa: B008  # frozen
    subspace_rank: int | None = None,
    masters: bool = False,
    skip_broken: bool = False,
    notes: list[str] | None = None,
) -> Followed:
    """The work of a trajectory, before anything is measured.

    Args:
        matrix: sets the device; the other arguments are those of `trajectory`.
        notes: receives notes about checkpoints that are left out, and about names without steps.

    Raises:
        CheckpointError, ArgumentError: as `trajectory`.
    """
    said = [] if notes is None else notes
    at = steps_of(expanded(checkpoints, said), steps, said)
    labels = {label_of(step): source for source, step in sorted(at, key=lambda pair: pair[1])}
    if skip_broken:
        labels = dict(_opening(labels, open_checkpoint(base), said))
    if not labels:
        raise ArgumentError("no checkpoint is left: give at least one that can be opened")
    settings = TrajectorySettings(("changes",), matrix, subspace_rank=subspace_rank, masters=masters)
    return Followed(str(base), labels, settings)


def _require_prediction(work: Followed, steps: Sequence[float], at: float, by: str, out: str | Path | None) -> None:
    if by not in METHODS:
        raise ArgumentError(f"no prediction by '{by}': choose one of {', '.join(METHODS)}")
    if out is None:
        raise ArgumentError("a predicted model is written to the folder `out`: give one")
    require_predictable(work, steps, at)


def _model_at(step: float) -> str:
    """The folder of a predicted model."""
    return f"predicted-{label_of(step)}"


def _require_no_other_prediction(out: Path, at: float, by: str) -> None:
    """Raises FileError if the folder has a model that was predicted in another way."""
    if not (out / _model_at(at)).exists():
        return
    made: Any = None
    with suppress(FileError, LookupError, TypeError):
        made = read_json(out / TRAJECTORY)["prediction"]
    if not isinstance(made, dict) or (made.get("step"), made.get("by")) != (at, by):
        how = f"by {made['by']}" if isinstance(made, dict) and made.get("step") == at else "in another way"
        raise FileError(
            f"{out / _model_at(at)} contains a model that was predicted {how}: choose another --out, or replace it "
            "with --overwrite"
        )


def _opening(labels: dict[str, str], base: Checkpoint, warnings: list[str]) -> Iterable[tuple[str, str]]:
    for label, source in labels.items():
        try:
            open_checkpoint(source, base)
        except CheckpointError as error:
            warnings.append(f"step {label} is left out: {error}")
        else:
            yield label, source


def _result(work: Followed, sums: Sums, warnings: list[str]) -> Trajectory:
    content = {
        "schema": 1,
        "base": work.base_checkpoint.source,
        "checkpoints": [run.source for run in work.runs.values()],
        "steps": work.steps,
        "warnings": warnings,
        **sums.content(),
        "held_out": predictions_of(sums.whole.gram, work.steps),
        "prediction": None,
    }
    return Trajectory(content, sums.rows())
