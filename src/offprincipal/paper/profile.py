"""A study's profile, read from YAML: of the stages that are there, the paper's own among them."""

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, ValidationError

from offprincipal.errors import StudyError, meant
from offprincipal.foreign_names import setting_called
from offprincipal.paper.stages import ClaimsStage, ReportStage
from offprincipal.plain_settings import Place, faults_told
from offprincipal.studies.expansion import expand
from offprincipal.studies.experiments import AgreementStage, GatesStage, GaussianStage, InterveneStage, PrecisionStage
from offprincipal.studies.fine_tuning import MatchedStage, OutcomesStage
from offprincipal.studies.graph import StageGraph
from offprincipal.studies.overrides import apply_override
from offprincipal.studies.stages import CompareStage, TrainStage
from offprincipal.studies.trajectories import TrajectoryStage
from offprincipal.training.settings import setting_fields

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
        told = faults_told(error, _named, lambda name: _unknown(name, content))
    raise StudyError(f"profile '{name_or_path}' is not usable: {told}")  # pydantic's own message says no more


def _named(place: Place) -> str:
    """A setting as `--set` has it: pydantic puts the kind of a stage between its name and its settings."""
    parts = (*place[:2], *place[3:]) if place[:1] == ("stages",) else place
    return ".".join(map(str, parts)) or "profile"


def _unknown(name: str, content: Mapping[str, Any]) -> str:
    """What to say of a name that is no setting of the profile, or of a stage."""
    path = name.split(".")
    if path[0] == "stages" and len(path) > 2:
        kind = content["stages"][path[1]]["kind"]
        known = [field for field in _KINDS[kind].model_fields if field != "kind"]
        hint = meant(path[2], known, f"it has {', '.join(known)}")
        return f"a stage of kind {kind} has no such setting: {hint}"
    if name in setting_fields():
        return f"there is no such setting: did you mean training.{name}?"
    if ours := setting_called(name, "training."):
        return f"there is no such setting: {ours}"
    known = list(Profile.model_fields)
    hint = meant(
        name, known, f"a profile has {', '.join(known)}; `train --list settings` has what training.NAME can be"
    )
    return f"there is no such setting: {hint}"


_KINDS = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(Stage)[0])}


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if name_or_path in profile_names():
        shipped = resources.files("offprincipal.paper") / "profiles" / f"{name_or_path}.yaml"
        text = shipped.read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        names = profile_names()
        if path.suffix in (".yaml", ".yml"):
            raise StudyError(f"profile '{name_or_path}' does not exist: give a YAML file, or one of {', '.join(names)}")
        hint = meant(name_or_path, names, f"give a YAML file, or one of {', '.join(names)}")
        raise StudyError(f"no profile '{name_or_path}': {hint}")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError(f"profile '{name_or_path}' is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"profile '{name_or_path}' is not a mapping: see the shipped profile 'quick' for an example")
    return content
