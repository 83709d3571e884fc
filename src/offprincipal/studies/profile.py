"""A study's profile: the stages that it consists of, read from YAML and checked before anything runs."""

from collections.abc import Iterable
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from offprincipal.assets import EMBEDDED
from offprincipal.errors import StudyError
from offprincipal.studies.expansion import expand
from offprincipal.studies.experiments import AgreementStage, GatesStage, GaussianStage, InterveneStage, PrecisionStage
from offprincipal.studies.fine_tuning import MatchedStage, OutcomesStage
from offprincipal.studies.stages import ClaimsStage, CompareStage, ReportStage, TrainStage
from offprincipal.studies.trajectories import TrajectoryStage

_JINJA = ("{{", "{%")
Stage = Annotated[
    TrainStage
    | MatchedStage
    | OutcomesStage
    | InterveneStage
    | GaussianStage
    | CompareStage
    | AgreementStage
    | PrecisionStage
    | GatesStage
    | TrajectoryStage
    | ClaimsStage
    | ReportStage,
    Field(discriminator="kind"),
]


class Profile(BaseModel):
    """A study: a base, matched training settings, and a graph of stages.

    Args:
        name: of the profile.
        title: what the report is headed with.
        base: the model that every training stage starts from.
        training: settings for every training stage, which may override them.
        stages: name -> stage; a stage names those whose output it reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    base: str = EMBEDDED
    training: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, Stage]

    @model_validator(mode="after")
    def _stages_fit(self) -> "Profile":
        for name, stage in self.stages.items():
            if not name.isidentifier():
                raise StudyError(
                    f"stage '{name}': name it with letters, digits and underscores, since it names a folder"
                )
            for source in stage.inputs():
                if source not in self.stages:
                    raise StudyError(f"stage '{name}' reads '{source}', which is no stage of profile '{self.name}'")
            stage.check(self.base, self.training)
        self.order()
        return self

    def order(self) -> list[str]:
        """The stages, each after those that it reads.

        Raises:
            StudyError: stages read each other in a circle.
        """
        try:
            return list(TopologicalSorter({name: stage.inputs() for name, stage in self.stages.items()}).static_order())
        except CycleError as error:
            raise StudyError(f"stages read each other in a circle: {' -> '.join(error.args[1])}") from error


def profile_names() -> list[str]:
    """Names of the profiles that are shipped.

    >>> "quick" in profile_names()
    True
    """
    folder = resources.files("offprincipal.studies") / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_profile(name_or_path: str, overrides: Iterable[str] = ()) -> Profile:
    """A shipped profile by name, or one's own by path, with `key=value` overrides.

    Args:
        overrides: dotted keys into the profile: `training.steps=200`, `base=Qwen/Qwen3-0.6B`, `stages.grpo_a.seed=7`.

    Raises:
        StudyError: no such profile, it is no YAML, or a key or value does not fit.

    >>> load_profile("quick", ["training.steps=8"]).training["steps"]
    8
    """
    content = _read(name_or_path)
    for override in overrides:
        apply_override(content, override)
    if isinstance(content.get("stages"), dict):
        content["stages"] = expand(content["stages"])
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'profile'}: {e['msg']}" for e in error.errors())
        raise StudyError(f"profile '{name_or_path}' is not usable: {faults}") from error


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if name_or_path in profile_names():
        shipped = resources.files("offprincipal.studies") / "profiles" / f"{name_or_path}.yaml"
        text = shipped.read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        raise StudyError(f"no profile '{name_or_path}': give a YAML file, or one of {', '.join(profile_names())}")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError(f"profile '{name_or_path}' is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"profile '{name_or_path}' holds no mapping: see the shipped profile 'quick' for the form")
    return content


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is read as YAML, as a number wherever it is one, and a template as text.

    Raises:
        StudyError: the text has no key or no `=`.

    >>> parse_override("training.learning_rate=1e-5")
    ('training.learning_rate', 1e-05)
    """
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise StudyError(f"'{text}' is no override: write KEY=VALUE, for instance steps=200")
    if value_text.startswith(_JINJA):
        return key, value_text
    with suppress(ValueError):
        if "e" in value_text.lower():
            return key, float(value_text)
    try:
        return key, yaml.safe_load(value_text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError(f"the value of '{text[:200]}' is not readable as YAML: {error}") from error


def apply_override(content: dict[str, Any], text: str) -> None:
    """Enter `key=value`, the key dotted, into nested settings.

    Raises:
        StudyError: the text is no override, or a part of the key is a value already.

    >>> content = {"adapter": {"method": "pissa"}}
    >>> apply_override(content, "adapter.rank=16")
    >>> content
    {'adapter': {'method': 'pissa', 'rank': 16}}
    """
    key, value = parse_override(text)
    *path, last = key.split(".")
    place: Any = content
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise StudyError(f"'{text}': there is no {key}, since a part of it is a value and has no settings of its own")
    place[last] = value
