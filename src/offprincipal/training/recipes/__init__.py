"""The recipes, each a thin choice of TRL trainer and data; every trainer shares the settings that matter to the update.

Knows nothing of resuming or records, and of the run's folder only where checkpoints go.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offprincipal.errors import TrainingError
from offprincipal.recipe_names import Recipe
from offprincipal.tasks import open_task
from offprincipal.tasks.prompting import prompting
from offprincipal.training.progress import ShowProgress, silent
from offprincipal.training.recipes import distillation, online, preference, supervised
from offprincipal.training.recipes.run import RecipeRun, shared_arguments
from offprincipal.training.settings import TrainSettings
from offprincipal.training.trained import RunModels

_BUILDERS: dict[Recipe, Callable[[RecipeRun], Any]] = {
    "grpo": online.grpo,
    "dr_grpo": online.dr_grpo,
    "rloo": online.rloo,
    "dpo": preference.dpo,
    "kto": preference.kto,
    "distill": distillation.distill,
    "sft_teacher": supervised.sft_teacher,
    "sft_own": supervised.sft_own,
}


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
        TrainingError: a logger of `report_to` is not installed, or the base's completions are all alike to a verifier.
    """
    _require_loggers(settings)
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
    trainer = _BUILDERS[settings.recipe](run)
    trainer.remove_callback(importlib.import_module("transformers").PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def _require_loggers(settings: TrainSettings) -> None:
    available = importlib.import_module("transformers.integrations").get_available_reporting_integrations()
    for logger in settings.report_to:
        if logger not in available:
            names = ", ".join(sorted(available)) or "none"
            raise TrainingError(f"report_to '{logger}' is not installed or not known; available here: {names}")
