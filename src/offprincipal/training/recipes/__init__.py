"""The recipes, each a thin choice of TRL trainer and data; every trainer shares the settings that matter to the update.

Knows nothing of resuming or records, and of the run's folder only where checkpoints go.
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
        opened: the base, what is trained of it, in place, and the teacher.
        checkpoints: where the trainer keeps the checkpoint that it can continue from; `dpo` and `kto` keep there what
            they sample, and make the folder for it.
        callbacks: transformers TrainerCallbacks.
        show: told of the sampling that `dpo` and `kto` begin with.

    Raises:
        TaskError: a task is unknown or has no reference answers to learn from.
        ModelError: a prompt or example does not fit the context.
        TrainingError: TRL refuses an option, or the base's completions are all alike to a verifier.
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
    """What makes TRL's trainer of a recipe."""
    module, _, function = RECIPES[recipe].build.partition(".")
    found: Callable[[RecipeRun], Any] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return found


def require_usable(settings: TrainSettings) -> None:
    """Check what can be told before a model is opened and measured.

    Raises:
        TrainingError: a logger of `report_to` is not installed, or TRL has no such option.
    """
    require_options(settings.trl, getattr(importlib.import_module("trl"), RECIPES[settings.recipe].configuration))
    available = importlib.import_module("transformers.integrations").get_available_reporting_integrations()
    for logger in settings.report_to:
        if logger not in available:
            names = ", ".join(sorted(available)) or "none"
            raise TrainingError(f"report_to '{logger}' is not installed or not known; available here: {names}")
