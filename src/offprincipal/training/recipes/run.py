"""What all recipes share: the model, the problems of all steps, and the arguments of TRL's trainers.

Knows nothing of losses.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from offprincipal.errors import TrainingError, meant
from offprincipal.foreign_names import setting_called
from offprincipal.models import LanguageModel
from offprincipal.tasks import Problem, Task, mixture
from offprincipal.tasks.prompting import Prompting
from offprincipal.training.processes import processes
from offprincipal.training.progress import ShowProgress
from offprincipal.training.settings import TrainSettings

LOG = logging.getLogger("offprincipal")
# options of TRL that settings of ours decide
DECIDED = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("seed", "use_cpu", "bf16", "gradient_checkpointing", "save_steps", "report_to", "num_generations"),
    *("max_completion_length", "temperature", "use_vllm", "vllm_mode"),
)


@dataclass(frozen=True)
class RecipeRun:
    """The input of every recipe.

    Args:
        settings: of the run.
        language_model: the trained model.
        teacher: the model that is learned from; None in recipes without one.
        prompting: how the tasks' problems are presented to the model.
        checkpoints: folder of the trainer's checkpoints.
        show: gets the progress of long work before the first step.
        arguments: those of every TRL configuration.
        trainer: arguments of every TRL trainer.
    """

    settings: TrainSettings
    language_model: LanguageModel
    teacher: LanguageModel | None
    prompting: Prompting
    checkpoints: Path
    show: ShowProgress
    arguments: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Name -> task."""
        return self.prompting.tasks

    @cached_property
    def problems(self) -> Sequence[Problem]:
        """The problems of all steps in order, from the tasks in turn."""
        size = self.settings.steps * self.settings.prompts_per_step
        return mixture(list(self.tasks.values()), "train", size, self.settings.seed)

    @cached_property
    def prompts(self) -> list[str]:
        """The text of each problem as the model gets it."""
        return [self.prompting.prompt(problem) for problem in self.problems]

    def require_room(self, *language_models: LanguageModel) -> None:
        """Raise ModelError if a prompt and its longest completion exceed the context of a model."""
        for prompt in self.prompts:
            for language_model in language_models:
                language_model.prompt_ids(prompt, self.settings.max_new_tokens)

    def configured(self, configuration: Any, **own: Any) -> Any:
        """A TRL configuration with the shared arguments, those of the recipe, and the user's `trl.NAME` options.

        Later ones override earlier ones.

        Args:
            configuration: class of the configuration.
            own: arguments of the recipe.

        Raises:
            TrainingError: TRL does not have an option or refuses its value, or a setting here determines it.
        """
        given = self.settings.trl
        require_options(given, configuration)
        try:
            return configuration(**(self.arguments | own | given))
        except (TypeError, ValueError) as error:
            if not given:
                raise
            raise TrainingError(
                f"TRL refuses {', '.join(f'trl.{n}={v}' for n, v in given.items())}: {error}"
            ) from error


def require_options(given: Mapping[str, Any], configuration: Any) -> None:
    """Check the names of options of a TRL configuration.

    Args:
        given: option -> value.
        configuration: class of the configuration.

    Raises:
        TrainingError: the configuration does not have an option, or a setting here determines it.
    """
    known = {field.name for field in fields(configuration)}
    for name in given:
        if name in DECIDED:
            ours = setting_called(name) or f"here it is {name}"
            raise TrainingError(f"trl.{name} is not to be set, since a setting decides it: {ours}")
        if name not in known:
            hint = meant(name, known, "its documentation lists them")
            raise TrainingError(f"{configuration.__name__} of TRL has no option '{name}': {hint}")


def shared_arguments(settings: TrainSettings, language_model: LanguageModel, checkpoints: Path) -> dict[str, Any]:
    """The arguments of every TRL configuration, so that runs differ only in their recipe."""
    on_cuda = language_model.device.type == "cuda"
    micro_batch = settings.sequences_at_once(processes())
    return {
        "output_dir": str(checkpoints),
        "max_steps": settings.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": settings.batch // processes() // micro_batch,
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
        "bf16": on_cuda if settings.compute is None else computes_in_bfloat16(settings, on_cuda),
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


def computes_in_bfloat16(settings: TrainSettings, on_cuda: bool) -> bool:
    """Whether forward and backward passes run in bfloat16; a warning is logged if the machine cannot do so."""
    if settings.compute == "float32":
        return False
    supported = torch.cuda.is_bf16_supported() if on_cuda else bfloat16_on_cpu()
    if not supported:
        LOG.warning("compute=bfloat16 is not supported on this machine: it is computed in float32")
    return bool(supported)


def bfloat16_on_cpu() -> bool:
    """Whether this processor has bfloat16 instructions."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def dataset(columns: dict[str, Any]) -> Any:
    """A `datasets.Dataset` with the rows in the given order."""
    return importlib.import_module("datasets").Dataset.from_dict(columns)
