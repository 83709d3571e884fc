"""The stages that know the paper's claims: judge them from what other stages left, and draw the page."""

import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from offprincipal.errors import FileError, StudyError
from offprincipal.file_names import RECORD, REPORT, STUDY, SUMMARY
from offprincipal.files import read_json, write_json
from offprincipal.paper.claims import CLAIMS, SOURCES, Evidence, judge
from offprincipal.paper.negative import blind_evidence, negative_controls, walk_controls
from offprincipal.studies.stages import StageKind, Workspace, base_folder
from offprincipal.training import ShowProgress, StepReport, silent


def _set_aside(space: Workspace) -> None:
    """Keep what another profile wrote in this folder, under its name: `study-quick.json` and `report-quick.html`."""
    with suppress(FileError):
        former = read_json(space.out / STUDY).get("profile")
        if isinstance(former, str) and former.isidentifier() and former != space.profile:
            for path in (space.out / STUDY, space.out / REPORT):
                if path.is_file():
                    path.replace(path.with_stem(f"{path.stem}-{former}"))


class ClaimsStage(StageKind):
    """Judge the paper's claims from a comparison's tables and other sources; writes the study's `study.json`.

    Args:
        sft: SFT runs, by kind; a list is one kind.
        sources: further sources of the theory's claims, from `SOURCES` -> the stages that produced them.
        gaussian: run -> the stage of its Gaussian update.
        beyond: runs that learn from preferences or a teacher, for C13, by kind; a list is one kind.
        negative_control: number of blind updates of every run to which the rules are applied; 0 for none.
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
            raise StudyError(f"there is no rule for claim {unknown[0]}: choose one of {', '.join(CLAIMS)}")
        odd = [source for source in self.sources if source not in SOURCES]
        if odd:
            raise StudyError(f"there is no source '{odd[0]}' for claims: choose one of {', '.join(SOURCES)}")
        for claim in self.claims:
            if CLAIMS[claim].against_sft and not self.sft:
                raise StudyError(f"claim {claim} compares RLVR with SFT: list the runs in 'sft'")
            if CLAIMS[claim].beyond and not self.beyond:
                raise StudyError(f"claim {claim} is about other recipes: list the runs in 'beyond'")
            for need in CLAIMS[claim].needs:
                if not self.sources.get(need):
                    raise StudyError(f"claim {claim} needs the source '{need}': list the stages that produce it")

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
        write_json(space.out / STUDY, study)

    def _add_negative_controls(
        self, claims: list[dict[str, Any]], evidence: Evidence, space: Workspace, progress: ShowProgress
    ) -> None:
        """For each verdict, how often its rule decides something for blind updates."""
        runs = {run: str(space.folder(run)) for run in evidence.matrices if run in self.trained}
        density = read_json(space.folder(self.comparison) / SUMMARY)["arguments"]["alpha"]
        base, threads = str(base_folder(space.base)), os.cpu_count() or 1

        def show(done: int, total: int) -> None:
            progress(StepReport("blind studies", done, total))

        found = {}
        if self.negative_control and any(CLAIMS[claim].tables for claim in self.claims):
            blind = blind_evidence(evidence, base, runs, self.negative_control, density, threads, show)
            found = negative_controls(blind, self.claims)
        found |= walk_controls(evidence, self.claims)
        for claim in claims:
            for side, counts in found.get((claim["id"], claim["of"] or "", claim["contrast"] or ""), {}).items():
                claim[side]["negative_control"] = counts

    def _matches(self, space: Workspace) -> dict[str, dict[str, str]]:
        """Kind of SFT -> another run -> the SFT run that shares its seed and its tasks."""

        def shared(run: str) -> tuple[Any, ...]:
            settings = read_json(space.folder(run) / RECORD)["settings"]
            return settings["seed"], tuple(settings["tasks"])

        others = {run: shared(run) for run in (*self.rl, *chain(*self.beyond.values()))}
        by_settings = {kind: {shared(run): run for run in runs} for kind, runs in self.sft.items()}
        return {kind: {run: sft[key] for run, key in others.items() if key in sft} for kind, sft in by_settings.items()}

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.out / STUDY]


class ReportStage(StageKind):
    """Draw `report.html` from a comparison and the judged claims."""

    kind: Literal["report"]
    comparison: str
    claims: str

    def inputs(self) -> tuple[str, ...]:
        return (self.comparison, self.claims)

    def make(self, name: str, space: Workspace, progress: ShowProgress = silent, overwrite: bool = False) -> None:
        from offprincipal.reports.report import write_report

        write_report(space.out / REPORT, space.folder(self.comparison), read_json(space.out / STUDY))

    def files(self, name: str, space: Workspace) -> list[Path]:
        return [space.out / REPORT]


def _run_entry(name: str, folder: Path) -> dict[str, Any]:
    """The entry of a training run in `study.json`, from its `run.json`."""
    record = read_json(folder / RECORD)
    settings = record["settings"]
    kept = ("recipe", "tasks", "seed", "steps", "batch", "learning_rate")
    return {
        "name": name,
        **{key: settings[key] for key in kept},
        "seconds": record["seconds"],
        **record["accuracy"],
    }
