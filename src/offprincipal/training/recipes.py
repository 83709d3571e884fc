"""The recipes, each a thin choice of TRL trainer and data; every trainer shares the settings that matter to the update.

Knows nothing of folders, resuming or records.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offprincipal.errors import TaskError, TrainingError
from offprincipal.models import LanguageModel
from offprincipal.tasks import Problem, Task, mixture, open_task
from offprincipal.training.settings import TrainSettings
from offprincipal.training.trained import Trained

RIGHT, WRONG = 1.0, -1.0
_IGNORED = -100


@dataclass(frozen=True)
class _Run:
    """What every recipe starts from.

    Args:
        model: what is trained. tasks: by name. problems: those of all steps, in order.
        arguments: of any of TRL's configurations. trainer: of any of its trainers.
    """

    settings: TrainSettings
    language_model: LanguageModel
    tasks: dict[str, Task]
    problems: Sequence[Problem]
    arguments: dict[str, Any]
    trainer: dict[str, Any]


def build_trainer(
    settings: TrainSettings,
    language_model: LanguageModel,
    trained: Trained,
    checkpoints: Path,
    callbacks: Sequence[Any],
) -> Any:
    """The trainer of the settings' recipe, ready for `.train()`.

    Args:
        settings: the run.
        language_model: the base, float32.
        trained: what is trained of it, in place.
        checkpoints: where the trainer keeps the checkpoint that it can continue from.
        callbacks: transformers TrainerCallbacks.

    Raises:
        TaskError: a task is unknown or has no reference answers to learn from.
        TrainingError: a prompt or example does not fit the context, or a logger of `report_to` is not installed.
    """
    _require_loggers(settings)
    tasks = {task.name: task for task in map(open_task, settings.tasks)}
    problems = mixture(list(tasks.values()), "train", settings.steps * settings.prompts_per_step, settings.seed)
    run = _Run(
        settings,
        language_model,
        tasks,
        problems,
        arguments=_shared_arguments(settings, language_model, checkpoints),
        trainer={
            "model": trained.model,
            "processing_class": language_model.tokenizer,
            "optimizers": (trained.optimizer, None),
        },
    )
    trainer = _grpo(run) if settings.recipe == "grpo" else _sft(run)
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


def _shared_arguments(settings: TrainSettings, language_model: LanguageModel, checkpoints: Path) -> dict[str, Any]:
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
        "shuffle_dataset": False,
    }


def _grpo(run: _Run) -> Any:
    """DAPO's token-level loss, without a KL term: the reward is +1 for a verified completion and -1 for any other."""
    trl: Any = importlib.import_module("trl")
    settings, tasks, problems = run.settings, run.tasks, run.problems
    for problem in problems:
        run.language_model.prompt_ids(problem.prompt, settings.max_new_tokens)

    def verified(completions: Sequence[str], row: Sequence[int], **_: Any) -> list[float]:
        return [
            RIGHT if tasks[problems[i].task].verify(problems[i], completion) else WRONG
            for i, completion in zip(row, completions, strict=True)
        ]

    arguments = trl.GRPOConfig(
        **run.arguments,
        loss_type="dapo",
        beta=0.0,
        num_generations=settings.rollouts_per_prompt,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
    )
    data = _dataset({"prompt": [p.prompt for p in problems], "row": list(range(len(problems)))})
    return trl.GRPOTrainer(**run.trainer, reward_funcs=verified, args=arguments, train_dataset=data)


def _sft(run: _Run) -> Any:
    """Cross-entropy on the completion alone, end of sequence included; the prompt is tokenized as for sampling."""
    trl: Any = importlib.import_module("trl")
    learn = _teacher_trace if run.settings.recipe == "sft_teacher" else _own_answer
    examples = _by_length([(p.prompt, learn(run.tasks[p.task], p)) for p in run.problems], run.settings.batch)
    tokenizer = run.language_model.tokenizer
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for prompt, completion in examples:
        answer_ids = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        prompt_ids = run.language_model.prompt_ids(prompt, len(answer_ids))
        rows["input_ids"].append(prompt_ids + answer_ids)
        rows["labels"].append([_IGNORED] * len(prompt_ids) + answer_ids)
    arguments = trl.SFTConfig(
        **run.arguments,
        max_length=None,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return trl.SFTTrainer(**run.trainer, args=arguments, train_dataset=_dataset(rows))


def _by_length(examples: Sequence[tuple[str, str]], batch: int) -> list[tuple[str, str]]:
    """The examples of each step from short to long, so that micro-batches are padded little; steps stay as they are."""
    steps = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    return [example for step in steps for example in sorted(step, key=lambda e: len(e[0]) + len(e[1]))]


def _dataset(columns: dict[str, Any]) -> Any:
    return importlib.import_module("datasets").Dataset.from_dict(columns)


def _teacher_trace(task: Task, problem: Problem) -> str:
    return task.teacher_trace(problem)


def _own_answer(task: Task, problem: Problem) -> str:
    if not problem.answer:
        raise TaskError(f"task '{task.name}' has no reference answers to learn from: train on it with the recipe grpo")
    return problem.answer
