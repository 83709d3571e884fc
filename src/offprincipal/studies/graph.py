"""The stages that a study consists of, checked before anything runs."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from offprincipal.assets import EMBEDDED
from offprincipal.errors import OffPrincipalError, StudyError, meant
from offprincipal.studies.stages import StageKind, TrainStage


class StageGraph(BaseModel):
    """A base, matched training settings, and the stages that start from it, each after those that it reads.

    Args:
        name: of the profile.
        title: what the report is headed with.
        base: the model that every training stage starts from.
        training: settings for every training stage, which may override them.
        stages: name -> stage; a stage names those whose output it reads; what is read from YAML says which kinds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    base: str = EMBEDDED
    training: dict[str, Any] = Field(default_factory=dict)
    stages: Mapping[str, StageKind]

    @model_validator(mode="after")
    def _stages_fit(self) -> "StageGraph":
        for name, stage in self.stages.items():
            if not name.isidentifier():
                raise StudyError(
                    f"stage '{name}': use only letters, digits and underscores, since it is also the name of a folder"
                )
            for source in stage.inputs():
                if source not in self.stages:
                    hint = meant(source, self.stages, f"its stages are {', '.join(self.stages)}")
                    raise StudyError(
                        f"stage '{name}' reads '{source}', which is not a stage of profile '{self.name}': {hint}"
                    )
            try:
                stage.check(self.base, self.training)
            except OffPrincipalError as error:
                raise type(error)(f"stage '{name}': {error}") from error
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
            raise StudyError(f"stages depend on each other in a cycle: {' -> '.join(error.args[1])}") from error

    def training_stages(self) -> list[str]:
        """The stages that train a model, one run each."""
        return [name for name, stage in self.stages.items() if isinstance(stage, TrainStage)]
