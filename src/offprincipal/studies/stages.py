"""What a stage of a study is, and the kinds that every study has: train, compare, claims, report.

A stage says what it reads, what else decides its output, and how to make it. It knows nothing of order, caching or
processes: that is the graph's work (`studies.graph`).
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from offprincipal.comparison import CompareSettings, MatrixSettings, compare
from offprincipal.errors import FileError, StudyError
from offprincipal.files import read_json, write_json
from offprincipal.measures.columns import GROUPS, Group
from offprincipal.models import model_name
from offprincipal.studies.claims import CLAIMS, SOURCES, Evidence, judge
from offprincipal.studies.claims.negative import blind_evidence, negative_controls, walk_controls
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

    def inputs(self) -> tuple[str, ...]:
        """The stages whose output this one reads."""
        return ()

    def check(self, base: str, training: Mapping[str, Any]) -> None:
        """Refuse, before anything runs, what could not run."""

    def settings(self, space: Workspace) -> dict[str, Any]:
        """What decides the output beside the inputs' content; JSON."""
        return self.model_dump(mode="json")

    @abstractmethod
    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        """Write the stage's files; a stage that was killed continues or starts again."""

    @abstractmethod
    def files(self, name: str, space: Workspace) -> list[Path]:
        """What the stage leaves behind, all of which its readers depend on."""


class TrainStage(StageKind):
    """Train a model from the study's base; its folder is a Hugging Face model with `run.json`.

    Args:
        start: the stage whose model is trained instead of the base.
        taught_by: the stage whose model is the teacher of `distill`.
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
        left = ["model.safetensors", "run.json", *(["monitor.parquet"] if watched else [])]
        return [space.folder(name) / file for file in left]


class CompareStage(StageKind):
    """Compare training stages with the study's base; its folder holds the tables, and a journal while they are made."""

    kind: Literal["compare"]
    runs: tuple[str, ...] = Field(min_length=1)
    metrics: tuple[Group, ...] = GROUPS
    rank_fraction: float = 0.125
    alpha: float = 0.5
    null_draws: int = 4
    seed: int = 0

    def inputs(self) -> tuple[str, ...]:
        return self.runs

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        matrix = MatrixSettings(self.rank_fraction, self.alpha, null_draws=self.null_draws, seed=self.seed)
        tuned = {run: space.folder(run) for run in self.runs}

        def show(done: int, total: int, _: str) -> None:
            progress(StepReport("measuring", done, total))

        settings = CompareSettings(self.metrics, matrix)
        compare(base_folder(space.base), tuned, settings, out=space.folder(name), progress=show)

    def files(self, name: str, space: Workspace) -> list[Path]:
        tables = ("matrices.parquet", "masks.parquet", "pairs.parquet", "curves.parquet", "summary.json")
        return [space.folder(name) / table for table in tables]


def _set_aside(space: Workspace) -> None:
    """Keep what another profile wrote in this folder, under its name: `study-quick.json` and `report-quick.html`."""
    with suppress(FileError):
        former = read_json(space.out / "study.json").get("profile")
        if isinstance(former, str) and former.isidentifier() and former != space.profile:
            for path in (space.out / "study.json", space.out / "report.html"):
                if path.is_file():
                    path.replace(path.with_stem(f"{path.stem}-{former}"))


class ClaimsStage(StageKind):
    """Judge the paper's claims from a comparison's tables, and what else they need; writes the study's `study.json`.

    Args:
        sft: SFT runs, by kind; a list is one kind.
        sources: of what the theory's claims need, of `SOURCES`, the stages that made it.
        gaussian: run -> the stage of the Gaussian update that stands beside it.
        beyond: runs that learn from preferences or a teacher, of which C13 speaks, by kind; a list is one kind.
        negative_control: blind updates of every run that the rules are tried on; 0: none.
    """

    kind: Literal["claims"]
    comparison: str
    rl: tuple[str, ...] = Field(min_length=1)
    sft: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    beyond: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    claims: tuple[str, ...] = Field(min_length=1)
    sources: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    gaussian: dict[str, str] = Field(default_factory=dict)
    negative_control: int = Field(20, ge=0)

    @field_validator("sft", "beyond", mode="before")
    @classmethod
    def _one_kind(cls, value: Any, field: ValidationInfo) -> Any:
        kind = "SFT" if field.field_name == "sft" else "beyond RLVR"
        return {kind: value} if isinstance(value, list | tuple) and value else value or {}

    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.comparison, *self.trained)) | dict.fromkeys(chain(*self.sources.values())))

    @property
    def trained(self) -> tuple[str, ...]:
        """The training stages that `study.json` speaks of."""
        watched = (self.sources.get(f"watched_{kind}", ()) for kind in ("rl", "sft"))
        return tuple(dict.fromkeys((*self.rl, *chain(*self.beyond.values(), *self.sft.values(), *watched))))

    def check(self, base: str, training: Mapping[str, Any]) -> None:
        unknown = [claim for claim in self.claims if claim not in CLAIMS]
        if unknown:
            raise StudyError(f"no rule judges claim {unknown[0]}: choose of {', '.join(CLAIMS)}")
        odd = [source for source in self.sources if source not in SOURCES]
        if odd:
            raise StudyError(f"claims have no source '{odd[0]}': choose of {', '.join(SOURCES)}")
        for claim in self.claims:
            if CLAIMS[claim].against_sft and not self.sft:
                raise StudyError(f"claim {claim} compares RLVR with SFT: name the runs in 'sft'")
            if CLAIMS[claim].beyond and not self.beyond:
                raise StudyError(f"claim {claim} is about other ways to learn: name the runs in 'beyond'")
            for need in CLAIMS[claim].needs:
                if not self.sources.get(need):
                    raise StudyError(f"claim {claim} needs the source '{need}': name the stages that make it")

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        sources = {source: [space.folder(stage) for stage in stages] for source, stages in self.sources.items()}
        evidence = Evidence.read(
            space.folder(self.comparison),
            self.rl,
            self.sft,
            self.comparison,
            matches=self._matches(space),
            sources=sources,
            gaussian=self.gaussian,
            beyond=self.beyond,
        )
        claims = [entry for claim in self.claims for entry in judge(claim, evidence)]
        self._add_negative_controls(claims, evidence, space, progress)
        study = {
            "schema": 2,
            "profile": space.profile,
            "title": space.title,
            "base": {"name": space.base, "parameters": evidence.parameters},
            "comparison": self.comparison,
            "sources": {source: list(stages) for source, stages in self.sources.items()},
            "claims": claims,
            "runs": [_run_entry(run, space.folder(run)) for run in self.trained],
        }
        _set_aside(space)
        write_json(space.out / "study.json", study)

    def _add_negative_controls(
        self, claims: list[dict[str, Any]], evidence: Evidence, space: Workspace, progress: ShowProgress
    ) -> None:
        """Beside each verdict, what its rule says of updates that know nothing."""
        runs = {run: str(space.folder(run)) for run in evidence.matrices if run in self.trained}
        alpha = read_json(space.folder(self.comparison) / "summary.json")["arguments"]["alpha"]
        base, threads = str(base_folder(space.base)), os.cpu_count() or 1

        def show(done: int, total: int) -> None:
            progress(StepReport("blind studies", done, total))

        found = {}
        if self.negative_control and any(CLAIMS[claim].tables for claim in self.claims):
            blind = blind_evidence(evidence, base, runs, self.negative_control, alpha, threads, show)
            found = negative_controls(blind, self.claims)
        found |= walk_controls(evidence, self.claims)
        for claim in claims:
            for side, counts in found.get((claim["id"], claim["of"] or "", claim["contrast"] or ""), {}).items():
                claim[side]["negative_control"] = counts

    def _matches(self, space: Workspace) -> dict[str, dict[str, str]]:
        """Kind of SFT -> another run -> the SFT run that shares its seed and its tasks."""

        def shared(run: str) -> tuple[Any, ...]:
            settings = read_json(space.folder(run) / "run.json")["settings"]
            return settings["seed"], tuple(settings["tasks"])

        others = {run: shared(run) for run in (*self.rl, *chain(*self.beyond.values()))}
        by_settings = {kind: {shared(run): run for run in runs} for kind, runs in self.sft.items()}
        return {kind: {run: sft[key] for run, key in others.items() if key in sft} for kind, sft in by_settings.items()}

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.out / "study.json"]


class ReportStage(StageKind):
    """Draw `report.html` from a comparison and the judged claims."""

    kind: Literal["report"]
    comparison: str
    claims: str

    def inputs(self) -> tuple[str, ...]:
        return (self.comparison, self.claims)

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        from offprincipal.reports.report import write_report

        write_report(space.out / "report.html", space.folder(self.comparison), read_json(space.out / "study.json"))

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.out / "report.html"]


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
            f"cannot get model '{name}' from the Hub: {error}. Give its folder, or check the id"
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


def _run_entry(name: str, folder: Path) -> dict[str, Any]:
    """What `study.json` says of a training run, from its `run.json`."""
    record = read_json(folder / "run.json")
    settings = record["settings"]
    kept = ("recipe", "tasks", "seed", "steps", "batch", "learning_rate")
    return {
        "name": name,
        **{key: settings[key] for key in kept},
        "seconds": record["seconds"],
        **record["accuracy"],
    }
