"""The recipes: each chooses a TRL trainer and its data; all share the settings that affect the update.

Knows nothing of resuming or records, and of the run's folder only the place of checkpoints.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offprincipal.errors import TrainingError
from offprincipal.recipes import RECIPES, Recipe
from offprincipal.tasks import open_task
from offprincipal.tasks.prompting import prompting
from offprincipal.training.progress import ShowProgress, silent
from offprincipal.training.recipes.run import RecipeRun, require_options, shared_arguments
from offprincipal.training.settings import TrainSettings
from offprincipal.training.trained import RunModels


def build_trainer(
    settings: TrainSettings,
    opened: RunModels,
    checkpoints: Path,
    callbacks: Sequence[Any],
    show: ShowProgress = silent,
) -> Any:
    """The trainer of the settings' recipe, ready for `.train()`.

    Args:
        settings: the run.
        opened: the base, its trained part, and the teacher.
        checkpoints: folder of the trainer's checkpoints; recipes of preferences create it and keep their samples there.
        callbacks: transformers TrainerCallbacks.
        show: gets the progress of the sampling with which recipes of preferences begin.

    Raises:
        TaskError: a task is unknown or has no reference answers to learn from.
        ModelError: a prompt or example does not fit the context.
        TrainingError: TRL refuses an option, or too few of the base's completions are right or wrong for preferences.
    """
    run = RecipeRun(
        settings,
        opened.base,
        opened.teacher,
        prompting=prompting(settings.prompt, opened.base.tokenizer, map(open_task, settings.tasks)),
        checkpoints=checkpoints,
        show=show,
        arguments=shared_arguments(settings, opened.base, checkpoints),
        trainer={
            "model": opened.trained.model,
            "processing_class": opened.base.tokenizer,
            "optimizers": (opened.trained.optimizer, None),
        },
    )
    trainer = builder_of(settings.recipe)(run)
    trainer.remove_callback(importlib.import_module("transformers").PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def builder_of(recipe: Recipe) -> Callable[[RecipeRun], Any]:
    """The function that makes a recipe's trainer."""
    module, _, function = RECIPES[recipe].build.partition(".")
    builder: Callable[[RecipeRun], Any] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return builder


def require_usable(settings: TrainSettings) -> None:
    """Check TRL's options and the loggers, before a model is opened and measured.

    Raises:
        TrainingError: a logger of `report_to` is not installed, or TRL does not have an option.
    """
    require_options(settings.trl, getattr(importlib.import_module("trl"), RECIPES[settings.recipe].configuration))
    available = importlib.import_module("transformers.integrations").get_available_reporting_integrations()
    for logger in settings.report_to:
        if logger not in available:
            names = ", ".join(sorted(available)) or "none"
            raise TrainingError(f"report_to '{logger}' is not installed or not known; available here: {names}")
