"""Supervised fine-tuning: on a teacher's traces, or on reference answers in the base's own format."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from offprincipal.errors import TaskError
from offprincipal.tasks import Problem, Task
from offprincipal.training.recipes.run import RecipeRun, dataset

_IGNORED = -100


def sft_teacher(run: RecipeRun) -> Any:
    """Train on the tasks' traces, in a teacher's format.

    Raises:
        TaskError: a task's traces equal its answers, so this would be `sft_own`.
    """
    for name, task in run.tasks.items():
        own = [problem for problem in run.problems if problem.task == name]
        if own and all(task.teacher_trace(problem).strip() == problem.answer.strip() for problem in own):
            raise TaskError(
                f"task '{name}' has no traces, only answers, so sft_teacher would be the same as sft_own: give an "
                "answer column with the reasoning, then #### and the answer, as in GSM8K, or train sft_own"
            )
    return _trainer(run, lambda task, problem: task.teacher_trace(problem))


def sft_own(run: RecipeRun) -> Any:
    """Train on the tasks' reference answers."""
    return _trainer(run, _own_answer)


def _trainer(run: RecipeRun, learn: Callable[[Task, Problem], str]) -> Any:
    """Cross-entropy on the completion only, including its end token; the prompt is tokenized as for sampling."""
    trl: Any = importlib.import_module("trl")
    learned = [run.prompting.completion(learn(run.tasks[p.task], p)) for p in run.problems]
    examples = _by_length(list(zip(run.prompts, learned, strict=True)), run.settings.batch)
    tokenizer = run.language_model.tokenizer
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for prompt, completion in examples:
        answer_ids = [*tokenizer(completion, add_special_tokens=False).input_ids, run.prompting.end_id]
        prompt_ids = run.language_model.prompt_ids(prompt, len(answer_ids))
        run.language_model.require_rows(answer_ids)
        rows["input_ids"].append(prompt_ids + answer_ids)
        rows["labels"].append([_IGNORED] * len(prompt_ids) + answer_ids)
    arguments = run.configured(
        trl.SFTConfig, max_length=None, shuffle_dataset=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    return trl.SFTTrainer(**run.trainer, args=arguments, train_dataset=dataset(rows))


def _by_length(examples: Sequence[tuple[str, str]], batch: int) -> list[tuple[str, str]]:
    """Sort the examples within each step by length, so that micro-batches have little padding."""
    steps = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    return [example for step in steps for example in sorted(step, key=lambda e: len(e[0]) + len(e[1]))]


def _own_answer(task: Task, problem: Problem) -> str:
    if not problem.answer:
        raise TaskError(f"task '{task.name}' has no reference answers to learn from: train on it with the recipe grpo")
    return problem.answer
