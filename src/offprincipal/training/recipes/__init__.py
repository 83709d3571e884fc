"""The recipes, each a thin choice of TRL trainer and data; every trainer shares the settings that matter to the update.

Knows nothing of resuming or records, and of the run's folder only where checkpoints go.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offprincipal.errors import TrainingError
from offprincipal.models import LanguageModel
from offprincipal.recipe_names import Recipe
from offprincipal.tasks import open_task
from offprincipal.training.progress import ShowProgress, silent
from offprincipal.training.recipes import distillation, online, preference, supervised
from offprincipal.training.recipes.run import Run, shared_arguments
from offprincipal.training.settings import TrainSettings

_BUILDERS: dict[Recipe, Callable[[Run], Any]] = {
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
    language_model: LanguageModel,
    checkpoints: Path,
    callback: Any,
    teacher: LanguageModel | None = None,
    show: ShowProgress = silent,
) -> Any:
    """The trainer of the settings' recipe, ready for `.train()`.

    Args:
        settings: the run.
        language_model: the base, float32; it is trained in place.
        checkpoints: where the trainer keeps the checkpoint that it can continue from; `dpo` and `kto` keep there what
            they sample, and make the folder for it.
        callback: a transformers TrainerCallback.
        teacher: of `distill`, float32, with the base's vocabulary.
        show: told of the sampling that `dpo` and `kto` begin with.

    Raises:
        TaskError: a task is unknown or has no reference answers to learn from.
        ModelError: a prompt or example does not fit the context.
        TrainingError: a logger of `report_to` is not installed, or the base's completions are all alike to a verifier.
    """
    _require_loggers(settings)
    run = Run(
        settings,
        language_model,
        teacher,
        tasks={task.name: task for task in map(open_task, settings.tasks)},
        checkpoints=checkpoints,
        show=show,
        arguments=shared_arguments(settings, language_model, checkpoints),
        trainer={"model": language_model.model, "processing_class": language_model.tokenizer},
    )
    trainer = _BUILDERS[settings.recipe](run)
    trainer.remove_callback(importlib.import_module("transformers").PrinterCallback)
    trainer.add_callback(callback)
    return trainer


def _require_loggers(settings: TrainSettings) -> None:
    available = importlib.import_module("transformers.integrations").get_available_reporting_integrations()
    for logger in settings.report_to:
        if logger not in available:
            names = ", ".join(sorted(available)) or "none"
            raise TrainingError(f"report_to '{logger}' is not installed or not known; available here: {names}")
