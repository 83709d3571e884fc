"""What every recipe starts from: the model, the problems of all steps, and the arguments that runs are matched in.

Knows nothing of losses.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from offprincipal.models import LanguageModel
from offprincipal.tasks import Problem, Task, mixture
from offprincipal.training.progress import ShowProgress
from offprincipal.training.settings import TrainSettings


@dataclass(frozen=True)
class Run:
    """What every recipe starts from.

    Args:
        settings: the run's.
        language_model: what is trained.
        teacher: what `distill` learns from; None in other recipes.
        tasks: by name.
        checkpoints: where the trainer keeps the checkpoint that it can continue from.
        show: told of whatever takes long before the first step.
        arguments: of any of TRL's configurations.
        trainer: of any of TRL's trainers.
    """

    settings: TrainSettings
    language_model: LanguageModel
    teacher: LanguageModel | None
    tasks: dict[str, Task]
    checkpoints: Path
    show: ShowProgress
    arguments: dict[str, Any]
    trainer: dict[str, Any]

    @cached_property
    def problems(self) -> Sequence[Problem]:
        """Those of all steps, in order, the tasks in turn."""
        size = self.settings.steps * self.settings.prompts_per_step
        return mixture(list(self.tasks.values()), "train", size, self.settings.seed)

    def require_room(self, *language_models: LanguageModel) -> None:
        """Raises ModelError where a problem and the longest completion of it exceed a model's context."""
        for problem in self.problems:
            for language_model in language_models:
                language_model.prompt_ids(problem.prompt, self.settings.max_new_tokens)


def shared_arguments(settings: TrainSettings, language_model: LanguageModel, checkpoints: Path) -> dict[str, Any]:
    """What any of TRL's configurations is told, so that runs differ in the recipe alone."""
    on_cuda = language_model.device.type == "cuda"
    micro_batch = settings.sequences_at_once
    return {
        "output_dir": str(checkpoints),
        "max_steps": settings.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": settings.batch // micro_batch,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "adam_beta1": settings.adam_betas[0],
        "adam_beta2": settings.adam_betas[1],
        "adam_epsilon": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "use_cpu": not on_cuda,
        "bf16": on_cuda,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_cuda,
        "train_sampling_strategy": "sequential",
    }


def dataset(columns: dict[str, Any]) -> Any:
    """A data set of the `datasets` library, in the order given."""
    return importlib.import_module("datasets").Dataset.from_dict(columns)
