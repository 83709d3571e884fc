"""The stages of fine-tuning methods: train at the rate that matches another run's step, and collect all runs' outcomes.

Each leaves a table behind that claims are judged from.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from offprincipal.checkpoints import open_checkpoint
from offprincipal.checkpoints.masters import masters_of
from offprincipal.checkpoints.matrices import common_matrices
from offprincipal.errors import StudyError
from offprincipal.file_names import MONITOR, RECORD
from offprincipal.files import read_json, require_folder, write_json
from offprincipal.outcomes.sweeps import TriedRate, highest_stable, rate_for
from offprincipal.studies.experiments import Row, write_rows
from offprincipal.studies.stages import StageKind, TrainStage, Workspace, base_folder
from offprincipal.tables import read_summary, read_table
from offprincipal.training import ShowProgress, silent

MATCHED = "matched.json"
OUTCOMES_TABLE, CURVES_TABLE = "outcomes.parquet", "kl_curves.parquet"
_OF_WEIGHTS = ("update_norm", "relative_update_norm", "spectral_shift", "spectral_shift_isotropic_null")
_OF_ANSWERS = ("greedy_accuracy", "sampled_accuracy", "sampled_accuracy_se", "pass_at_k", "kl_to_base")
Size = Literal["update_norm", "kl_to_base"]


class MatchedStage(TrainStage):
    """Train at the learning rate at which another method's longest stable step is made.

    Args:
        like: runs of that method at several rates; the one of the highest stable rate is matched.
        sweep: runs of this stage's own settings at several rates, from which the rate is interpolated.
        by: what is to be equal: the norm of the update of all linear matrices, or the divergence from the base.
    """

    kind: Literal["matched"]  # type: ignore[assignment]
    like: tuple[str, ...] = Field(min_length=1)
    sweep: tuple[str, ...] = Field(min_length=2)
    by: Size

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "ladder" in values:
            raise ValueError("'ladder' is called 'sweep': a sweep of learning rates")
        return values

    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs(), *self.like, *self.sweep)

    def check(self, base: str, training: Mapping[str, Any]) -> None:
        super().check(base, training)
        if self.start is not None:
            raise StudyError(f"a matched stage starts from the study's base, not from '{self.start}': omit 'start'")
        if "learning_rate" in (self.model_extra or {}):
            raise StudyError("a matched stage computes its own learning rate: omit 'learning_rate'")

    def settings(self, space: Workspace) -> dict[str, Any]:
        return super().settings(space) | {"like": list(self.like), "sweep": list(self.sweep), "by": self.by}

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        chosen = self._match(name, space)
        settings = self.settings_in(space).model_copy(update={"learning_rate": chosen["learning_rate"]})
        self.train_with(settings, space.folder(name), space, progress, overwrite)
        write_json(space.folder(name) / MATCHED, chosen)

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [*super().files(name, space), space.folder(name) / MATCHED]

    def _match(self, name: str, space: Workspace) -> dict[str, Any]:
        """Which run is matched, in what, and the rate for it."""
        tried = [tried_rate(run, space.folder(run)) for run in self.like]
        found = highest_stable(tried) or min(tried, key=lambda one: one.learning_rate)
        wanted = self._size(found.run, space)
        sweep = sorted((tried_rate(run, space.folder(run)) for run in self.sweep), key=lambda one: one.learning_rate)
        rate = rate_for(wanted, [r.learning_rate for r in sweep], [self._size(r.run, space) for r in sweep])
        if rate is None:
            raise StudyError(
                f"stage '{name}': its sweep has no learning rate with {self.by} of {wanted:.3g}, as in {found.run}: "
                "give the sweep rates that are further apart"
            )
        return {"schema": 1, "like": found.run, "by": self.by, "wanted": wanted, "learning_rate": float(f"{rate:.4g}")}

    def _size(self, run: str, space: Workspace) -> float:
        return size_of(self.by, space.folder(run), base_folder(space.base))


class OutcomesStage(StageKind):
    """The outcome of every run, one row each, and the divergence of monitored runs, one row per step.

    Args:
        comparison: a comparison of all these runs with the base, for the figures of weights.
    """

    kind: Literal["outcomes"]
    runs: tuple[str, ...] = Field(min_length=1)
    comparison: str

    def inputs(self) -> tuple[str, ...]:
        return (*self.runs, self.comparison)

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        weights = {run: self._weights(run, name, space) for run in self.runs}
        base = base_folder(space.base)
        require_folder(space.folder(name))
        outcomes, curves = self.files(name, space)
        rows = [outcome(run, space.folder(run), weights[run], base) for run in self.runs]
        write_rows(outcomes, rows, OUTCOMES)
        watched = [run for run in self.runs if (space.folder(run) / MONITOR).is_file()]
        write_rows(curves, [row for run in watched for row in curve(run, space.folder(run))], CURVES)

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / table for table in (OUTCOMES_TABLE, CURVES_TABLE)]

    def _weights(self, run: str, name: str, space: Workspace) -> dict[str, Any]:
        compared = read_summary(space.folder(self.comparison))["runs"]
        found: dict[str, Any] = compared.get(run, {}).get("metrics", {})
        missing = [metric for metric in _OF_WEIGHTS if metric not in found]
        if missing:
            raise StudyError(
                f"stage '{name}': '{self.comparison}' has no {missing[0]} of '{run}': let it compare every run in the "
                "outcomes, with the metrics 'spectrum'"
            )
        return found


OUTCOMES = pa.schema(
    [
        *((name, pa.string()) for name in ("run", "recipe", "method", "mask")),
        ("rank", pa.int64()),
        ("density", pa.float64()),
        ("trained_share", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seed", pa.int64()),
        ("steps", pa.int64()),
        *((name, pa.string()) for name in ("matched_to", "matched_by")),
        ("matched_ratio", pa.float64()),
        ("base_accuracy", pa.float64()),
        *((name, pa.float64()) for name in (*_OF_ANSWERS, *_OF_WEIGHTS)),
    ]
)
CURVES = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        *((n, pa.float64()) for n in ("kl_cumulative", "relative_update_norm")),
    ]
)


def outcome(run: str, folder: Path, weights: dict[str, Any], base: Path) -> Row:
    """A run's row of `outcomes.parquet`.

    Args:
        weights: its pooled metrics, as of `summary.json`.

    Raises:
        StudyError: the run was not measured on held-out prompts.
    """
    record = _measured(run, folder)
    settings, after = record["settings"], record["accuracy"]["after"]
    adapter = settings.get("adapter") or {}
    row: Row = {
        "run": run,
        "recipe": settings["recipe"],
        "method": adapter.get("method", "full"),
        "mask": adapter.get("mask"),
        "rank": adapter.get("rank"),
        "density": adapter.get("density"),
        "trained_share": record["trained_parameters"] / record["parameters"],
        **{key: settings[key] for key in ("learning_rate", "seed", "steps")},
        "base_accuracy": record["accuracy"]["before"]["sampled_accuracy"],
        **{key: after[key] for key in _OF_ANSWERS},
        **{key: weights[key]["value"] for key in _OF_WEIGHTS},
    }
    if (folder / MATCHED).is_file():
        matched = read_json(folder / MATCHED)
        reached = size_of(matched["by"], folder, base)
        row |= {"matched_to": matched["like"], "matched_by": matched["by"]}
        row["matched_ratio"] = reached / matched["wanted"]
    return row


def curve(run: str, folder: Path) -> list[Row]:
    """A watched run's rows of `kl_curves.parquet`: what its monitor saw of the policy, and how far it had stepped."""
    seen = [row for row in read_table(folder, MONITOR.removesuffix(".parquet")) if row["tensor"] is None]
    columns = ("step", "kl_cumulative", "relative_update_norm")
    return [{"run": run} | {column: row[column] for column in columns} for row in seen if row["step"] > 0]


def tried_rate(run: str, folder: Path) -> TriedRate:
    """A run as a rate of a sweep that was tried.

    Raises:
        StudyError: the run was not measured on held-out prompts.
    """
    record = _measured(run, folder)
    before, after = (record["accuracy"][when]["sampled_accuracy"] for when in ("before", "after"))
    return TriedRate(run, record["settings"]["learning_rate"], before, after)


def size_of(by: Size, folder: Path, base: Path) -> float:
    """How far a run went: ‖ΔW‖_F over all linear matrices of its masters, or its divergence from the base."""
    if by == "kl_to_base":
        return float(read_json(folder / RECORD)["accuracy"]["after"]["kl_to_base"])
    start = open_checkpoint(base)
    tuned = open_checkpoint(folder, start)
    squares = [
        float(np.linalg.norm(one.astype(np.float64) - zero.astype(np.float64))) ** 2
        for _, (zero, one) in common_matrices([start, masters_of(tuned) or tuned])
    ]
    return math.sqrt(sum(squares))


def _measured(run: str, folder: Path) -> dict[str, Any]:
    record = read_json(folder / RECORD)
    accuracy = record["accuracy"]
    if any(accuracy[when] is None for when in ("before", "after")):
        raise StudyError(f"stage '{run}' was not evaluated on held-out prompts: set its eval_prompts above 0")
    return record
