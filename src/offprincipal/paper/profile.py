"""A study's profile, read from YAML: of the stages that are there, the paper's own among them."""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from offprincipal.errors import StudyError
from offprincipal.paper.stages import ClaimsStage, ReportStage
from offprincipal.studies.expansion import expand
from offprincipal.studies.experiments import AgreementStage, GatesStage, GaussianStage, InterveneStage, PrecisionStage
from offprincipal.studies.fine_tuning import MatchedStage, OutcomesStage
from offprincipal.studies.graph import StageGraph
from offprincipal.studies.overrides import apply_override
from offprincipal.studies.stages import CompareStage, TrainStage
from offprincipal.studies.trajectories import TrajectoryStage

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


class Profile(StageGraph):
    """A study of any of these stages."""

    stages: dict[str, Stage]


def profile_names() -> list[str]:
    """Names of the profiles that are shipped.

    >>> "quick" in profile_names()
    True
    """
    folder = resources.files("offprincipal.paper") / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_profile(name_or_path: str, overrides: Iterable[str] = ()) -> Profile:
    """A shipped profile by name, or one's own by path, with `key=value` overrides.

    Args:
        overrides: dotted keys into the profile: `training.steps=200`, `base=Qwen/Qwen3-0.6B`, `stages.grpo_a.seed=7`.

    Raises:
        StudyError: no such profile, it is not valid YAML, or a key or value does not fit.

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
        raise StudyError(f"profile '{name_or_path}' is invalid: {faults}") from error


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if name_or_path in profile_names():
        shipped = resources.files("offprincipal.paper") / "profiles" / f"{name_or_path}.yaml"
        text = shipped.read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        raise StudyError(f"no profile '{name_or_path}': give a YAML file, or one of {', '.join(profile_names())}")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError(f"profile '{name_or_path}' is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"profile '{name_or_path}' is not a mapping: see the shipped profile 'quick' for an example")
    return content
