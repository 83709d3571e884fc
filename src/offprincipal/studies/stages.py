"""What a stage of a study is, and the kinds that every study has: train and compare.

A stage says what it reads, what else decides its output, and how to make it. It knows nothing of order, caching or
processes: that is the graph's work (`studies.running`).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from offprincipal.comparison import CompareSettings, MatrixSettings, compare
from offprincipal.defaults import DENSITY, NULL_DRAWS, RANK_FRACTION
from offprincipal.errors import StudyError
from offprincipal.file_names import MONITOR, RECORD, SUMMARY
from offprincipal.measures.columns import GROUPS, Group
from offprincipal.models import model_name
from offprincipal.tables import TABLES
from offprincipal.tasks import open_task
from offprincipal.training import ShowProgress, StepReport, TrainSettings, parse_settings, silent, train


@dataclass(frozen=True)
class Workspace:
    """Where a study lives and what it starts from.

    Args:
        out: the study's folder; a stage's own folder is in it, under the stage's name.
        base: the model, as the profile names it.
        training: the profile's settings for every training stage.
        profile: the profile's name; title: its title.
    """

    out: Path
    base: str
    training: Mapping[str, Any]
    profile: str
    title: str

    def folder(self, stage: str) -> Path:
        return self.out / stage

    def folders(self) -> list[Path]:
        """Those of all stages that have begun."""
        return sorted(path for path in self.out.iterdir() if path.is_dir())


class StageKind(BaseModel, ABC):
    """What every kind of stage answers to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Any

    def inputs(self) -> tuple[str, ...]:
        """The stages whose output this one reads."""
        return ()

    def check(self, base: str, training: Mapping[str, Any]) -> None:
        """Refuse, before anything runs, what could not run."""

    def settings(self, space: Workspace) -> dict[str, Any]:
        """Everything except the inputs' content that determines the output; JSON."""
        return self.model_dump(mode="json")

    @abstractmethod
    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        """Write the stage's files; a stage that was killed continues or starts again."""

    @abstractmethod
    def files(self, name: str, space: Workspace) -> list[Path]:
        """The files that the stage writes, on all of which its readers depend."""


class TrainStage(StageKind):
    """Train a model from the study's base; its folder is a Hugging Face model with `run.json`.

    Args:
        start: the stage whose model is trained instead of the base.
        taught_by: the stage whose model is the teacher.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: Literal["train"]
    start: str | None = None
    taught_by: str | None = None

    def inputs(self) -> tuple[str, ...]:
        return tuple(stage for stage in (self.start, self.taught_by) if stage is not None)

    def train_settings(self, base: str, training: Mapping[str, Any]) -> TrainSettings:
        """Those of the profile and the stage; a stage that teaches is named in place of its folder."""
        taught = {} if self.taught_by is None else {"teacher": self.taught_by}
        return parse_settings({"model": base, **training, **(self.model_extra or {}), **taught})

    def check(self, base: str, training: Mapping[str, Any]) -> None:
        for task in self.train_settings(base, training).tasks:
            open_task(task)

    def settings(self, space: Workspace) -> dict[str, Any]:
        settings = self.train_settings(space.base, space.training)
        found = settings.model_dump(mode="json")
        if settings.teacher is not None and self.taught_by is None:
            found["teacher_content"] = content_digest(base_folder(settings.teacher))
        if self.start is not None:  # the content of that stage is part of the key anyway, wherever it lies
            return found | {"model": None, "start": self.start}
        return found | {"base_content": content_digest(base_folder(settings.model))}

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        self.train_with(self.settings_in(space), space.folder(name), space, progress, overwrite)

    def train_with(
        self, settings: TrainSettings, folder: Path, space: Workspace, progress: ShowProgress, overwrite: bool
    ) -> None:
        """Train, taking over what other stages found of the same base."""
        train(settings, folder, overwrite=overwrite, progress=progress, siblings=space.folders())

    def settings_in(self, space: Workspace) -> TrainSettings:
        """The settings, with the folders of the stages that it starts from and learns from."""
        base = space.base if self.start is None else str(space.folder(self.start))
        settings = self.train_settings(base, space.training)
        if self.taught_by is None:
            return settings
        return settings.model_copy(update={"teacher": str(space.folder(self.taught_by))})

    def files(self, name: str, space: Workspace) -> list[Path]:
        watched = {**space.training, **(self.model_extra or {})}.get("monitor") is not None
        left = ["model.safetensors", RECORD, *([MONITOR] if watched else [])]
        return [space.folder(name) / file for file in left]


class CompareStage(StageKind):
    """Compare training stages with the study's base; its folder holds the tables, and a journal while they are made."""

    kind: Literal["compare"]
    runs: tuple[str, ...] = Field(min_length=1)
    metrics: tuple[Group, ...] = GROUPS
    rank_fraction: float = RANK_FRACTION
    density: float = DENSITY
    null_draws: int = NULL_DRAWS
    seed: int = 0

    def inputs(self) -> tuple[str, ...]:
        return self.runs

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        matrix = MatrixSettings(self.rank_fraction, self.density, null_draws=self.null_draws, seed=self.seed)
        tuned = {run: space.folder(run) for run in self.runs}

        def show(done: int, total: int, _: str) -> None:
            progress(StepReport("measuring", done, total))

        settings = CompareSettings(self.metrics, matrix)
        compare(
            base_folder(space.base),
            tuned,
            settings,
            out=space.folder(name),
            report=False,
            overwrite=True,
            progress=show,
        )

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.folder(name) / file for file in (*(f"{table}.parquet" for table in TABLES), SUMMARY)]


def base_folder(base: str) -> Path:
    """The local folder of a model: a folder, the embedded one, or the Hub's cache of an id.

    Raises:
        StudyError: the Hub has no such model, or cannot be reached.
    """
    name = model_name(base)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except Exception as error:  # the Hub's own errors, and those of any connection
        raise StudyError(
            f"cannot download model '{name}' from the Hub: {error}. Give its folder, or check the id"
        ) from error


def content_digest(*paths: Path) -> str:
    """A hash of files, or of all the weights and the configuration in a folder, by name and content."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".json"} and p.is_file())
        for file in files:
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()
