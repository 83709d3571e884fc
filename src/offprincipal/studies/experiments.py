"""The stages of the theory: intervene, train on from there and compare locations; precision; gates; Gaussian updates.

Each is a thin choice of what other packages do, and leaves a table behind that claims are judged from.
"""

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from offprincipal.checkpoints import Checkpoint, open_checkpoint, pair_tensors
from offprincipal.checkpoints.masters import masters_of
from offprincipal.checkpoints.matrices import common_matrices
from offprincipal.defaults import DENSITY, RANK_FRACTION
from offprincipal.errors import StudyError
from offprincipal.file_names import GATES, INTERVENTION, MASTERS, PRECISION
from offprincipal.files import require_folder, write_atomically, write_json
from offprincipal.gates.precision_gate import (
    PrecisionSettings,
    hidden_share,
    measure_precision,
    pool_sweep,
)
from offprincipal.geometry.formats import joint_classes
from offprincipal.geometry.gaussian import isotropic_update
from offprincipal.geometry.nulls import intersection_null, jaccard
from offprincipal.geometry.precision import changed, exponent_class
from offprincipal.geometry.ulp import total
from offprincipal.studies.stages import StageKind, Workspace, base_folder
from offprincipal.training import ShowProgress, silent

Row = dict[str, Any]
WEIGHTS = "model.safetensors"
AGREEMENT, PRECISION_TABLE = "agreement.parquet", "precision.parquet"
AS_TRAINED, UNDONE = "as trained", "undone"  # views of an agreement


class InterveneStage(StageKind):
    """Rotate or reorder layers of the base at equal function; its folder is a Hugging Face model to train from."""

    kind: Literal["intervene"]
    rotate: tuple[int, ...] = ()
    permute: tuple[int, ...] = ()
    residual: bool = False
    matrix: Literal["haar", "hadamard"] = "haar"
    seed: int = Field(0, ge=0)

    def check(self, base: str, training: Any) -> None:
        if not (self.rotate or self.permute or self.residual):
            raise StudyError("the intervention does nothing: give layers to rotate or permute, or set residual")

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        from offprincipal.interventions import intervene

        chosen = self.model_dump(exclude={"kind"})
        intervene(base_folder(space.base), space.folder(name), **chosen, overwrite=True)

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / file for file in (WEIGHTS, INTERVENTION)]


class AgreementStage(StageKind):
    """Where a run from the base and a run from an intervened base changed the same locations, matrix by matrix.

    Both as trained, each against its own base; and with the second brought back to the base's coordinates.

    Args:
        run: trained from the base; intervened: trained from `intervention`.
    """

    kind: Literal["agreement"]
    run: str
    intervened: str
    intervention: str

    def inputs(self) -> tuple[str, ...]:
        return self.run, self.intervened, self.intervention

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        from offprincipal.interventions import undo

        require_folder(space.folder(name))
        base = base_folder(space.base)
        back = space.folder(name) / "undone"
        undo(space.folder(self.intervention), space.folder(self.intervened), back, base=base, overwrite=True)
        opened = [open_checkpoint(folder) for folder in (base, space.folder(self.run))]
        own = [open_checkpoint(space.folder(stage)) for stage in (self.intervention, self.intervened)]
        undone = open_checkpoint(back)
        keys = {"run_a": self.run, "run_b": self.intervened, "intervention": self.intervention}
        rows = agreement_rows([*opened, *own], [*opened, opened[0], masters_of(undone) or undone])
        write_rows(space.folder(name) / AGREEMENT, [keys | row for row in rows])

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / AGREEMENT]


class GaussianStage(StageKind):
    """The base after a Gaussian update of a run's length, tensor by tensor, stored as the run was: its null as a model.

    Args:
        like: the training stage whose length it has.
    """

    kind: Literal["gaussian"]
    like: str
    seed: int = Field(0, ge=0)

    def inputs(self) -> tuple[str, ...]:
        return (self.like,)

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        base = open_checkpoint(base_folder(space.base))
        run = open_checkpoint(space.folder(self.like), base)
        masters = gaussian_like(base, masters_of(run) or run, self.seed)
        folder = space.folder(name)
        require_folder(folder / MASTERS)
        for part, dtype in ((folder / MASTERS, torch.float32), (folder, torch.bfloat16)):
            stored = {key: tensor.to(dtype) for key, tensor in masters.items()}
            write_atomically(part / WEIGHTS, partial(save_file, stored, metadata={"format": "pt"}))
            shutil.copyfile(base_folder(space.base) / "config.json", part / "config.json")

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / WEIGHTS, space.folder(name) / MASTERS / WEIGHTS]


class PrecisionStage(StageKind):
    """Gate III of training stages: which part of each update storing hides, and where the rest is, format by format."""

    kind: Literal["precision"]
    runs: tuple[str, ...] = Field(min_length=1)
    rank_fraction: float = RANK_FRACTION
    density: float = DENSITY

    def inputs(self) -> tuple[str, ...]:
        return self.runs

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        base = open_checkpoint(base_folder(space.base))
        settings = PrecisionSettings(rank_fraction=self.rank_fraction, density=self.density)
        rows: list[Row] = []
        pooled: dict[str, Row] = {}
        for run in self.runs:
            masters = masters_of(open_checkpoint(space.folder(run), base))
            if masters is None:
                raise StudyError(
                    f"stage '{run}' kept no float32 masters, from which precision is measured: train again"
                )
            found = measure_precision(base, masters, settings)
            rows.extend({"run": run} | row for row in found.sweep)
            histograms = list(found.histograms.values())
            pooled[run] = {
                "ulp_histogram": total(histograms).rows(),
                "hidden_fraction": hidden_share(histograms),
                "precision_sweep": pool_sweep(found.sweep),
            }
        require_folder(space.folder(name))
        write_json(space.folder(name) / PRECISION, {"schema": 1, "runs": pooled})
        write_rows(space.folder(name) / PRECISION_TABLE, rows)

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / PRECISION_TABLE, space.folder(name) / PRECISION]


class GatesStage(StageKind):
    """Gates I and II of training stages, on held-out prompts of tasks; `gates.json`.

    Args:
        options: of `offprincipal.gates.measure_gates`.
    """

    kind: Literal["gates"]
    runs: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)

    def inputs(self) -> tuple[str, ...]:
        return self.runs

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        from offprincipal.gates import measure_gates

        tuned: dict[str, str | Path] = {run: space.folder(run) for run in self.runs}
        measure_gates(base_folder(space.base), tuned, task=self.tasks, **self.options).write(space.folder(name))

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / GATES]


def agreement_rows(as_trained: Sequence[Checkpoint], undone: Sequence[Checkpoint]) -> list[Row]:
    """How far two runs changed the same locations, each compared with its own base; one row per matrix and view.

    Args:
        as_trained, undone: base, run from it, other base, run from that.

    Returns:
        `view`, `tensor`, `layer`, `role`, `numel`; `touched`, whether the other base as trained differs there;
        `changed_a`, `changed_b`, `intersection`, and its spacing null over the joint classes of both bases.
    """
    rows = []
    touched: dict[str, bool] = {}
    for view, checkpoints in ((AS_TRAINED, as_trained), (UNDONE, undone)):
        for part, arrays in common_matrices(checkpoints):
            base_a, run_a, base_b, run_b = map(torch.from_numpy, arrays)
            if view == AS_TRAINED:
                touched[part.name] = not torch.equal(base_a, base_b)
            keys = {"view": view, "tensor": part.name, "layer": part.place.layer, "role": part.place.role}
            rows.append(keys | {"touched": touched[part.name]} | _agreement(base_a, run_a, base_b, run_b))
    return rows


def _agreement(base_a: Tensor, run_a: Tensor, base_b: Tensor, run_b: Tensor) -> Row:
    moved_a, moved_b = (changed(*pair).flatten().numpy() for pair in ((base_a, run_a), (base_b, run_b)))
    classes = joint_classes(exponent_class(base_a), exponent_class(base_b))
    entries = np.bincount(classes)
    counts = [np.bincount(classes[moved], minlength=len(entries)) for moved in (moved_a, moved_b)]
    null = intersection_null(entries, *counts)
    both, total_a, total_b = (int(x.sum()) for x in (moved_a & moved_b, moved_a, moved_b))
    return {
        "numel": len(classes),
        "changed_a": total_a,
        "changed_b": total_b,
        "intersection": both,
        "intersection_spacing_null": null.expected,
        "intersection_spacing_null_sd": math.sqrt(null.variance),
        "jaccard": jaccard(both, total_a, total_b),
        "jaccard_random": jaccard(total_a * total_b / len(classes), total_a, total_b),
        "jaccard_spacing_null": jaccard(null.expected, total_a, total_b),
        "jaccard_z": null.z(both),
    }


def gaussian_like(base: Checkpoint, tuned: Checkpoint, seed: int) -> dict[str, Tensor]:
    """The base's tensors in float32, each after a Gaussian update of the same norm as the tuned one's.

    Args:
        tuned: float32 masters if there are any, so that the length is that before storing.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, info in pair_tensors(base, tuned).tensors.items():
        weight = torch.from_numpy(base.read(name).astype(np.float64)).reshape(base.tensors[name].shape)
        if info.floating:
            other = torch.from_numpy(tuned.read(name).astype(np.float64)).reshape(weight.shape)
            weight = weight + isotropic_update(weight.shape, (other - weight).norm().item(), generator)
        found[name] = weight.float()
    return found


def write_rows(path: Path, rows: list[Row], schema: pa.Schema | None = None) -> None:
    """Write a table, its columns as the schema has them or as the first row does."""
    write_atomically(path, partial(pq.write_table, pa.Table.from_pylist(rows, schema)))
