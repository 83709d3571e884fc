"""Preview of a model before training: a few held-out prompts, its completions, and their verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from offprincipal.models import open_language_model
from offprincipal.models.decoding import complete
from offprincipal.models.quiet import quiet_libraries
from offprincipal.tasks import mixture, open_task, task_names
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.tasks.prompting import prompting
from offprincipal.training.settings_by_model import longest_completion


@dataclass(frozen=True)
class Previewed:
    """One prompt and a model's completions of it.

    Args:
        task: name of the task.
        prompt: the text that the model got.
        answer: the reference answer.
        greedy: the greedy completion, cut at the stop.
        sampled: a completion at temperature 1, cut at the stop.
        right: whether the verifier accepts the greedy and the sampled completion.
        ended: whether both completions ended within `max_new_tokens`.
    """

    task: str
    prompt: str
    answer: str
    greedy: str
    sampled: str
    right: tuple[bool, bool]
    ended: bool


@dataclass(frozen=True)
class Preview:
    """A few problems and a model's completions of them.

    Args:
        settings: how the problems were presented, with all defaults resolved.
        max_new_tokens: longest completion, in tokens.
        shown: the problems and completions.
    """

    settings: PromptSettings
    max_new_tokens: int
    shown: list[Previewed]


def preview(
    model: str | Path,
    tasks: str | Sequence[str],
    prompt: PromptSettings | None = None,
    count: int = 3,
    max_new_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Preview:
    """One greedy and one sampled completion of a few held-out problems.

    Args:
        model: a folder, a Hugging Face id, or `embedded`.
        tasks: names for `open_task`, as a list or a string such as "add,sort@2".
        prompt: how problems are presented to the model; None: as its tokenizer suggests, as in training.
        count: number of problems, from the tasks in turn.
        max_new_tokens: longest completion, in tokens; None: as in training.
        seed: of problems and samples.
        device: `auto`, `cpu` or `cuda`.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        The problems, completions and verdicts, with the resolved settings.

    Raises:
        TaskError, ModelError: a task, a template or the model is not usable.

    >>> seen = preview("embedded", ["add"], count=1)
    >>> seen.settings.template, seen.shown[0].task
    ('plain', 'add')
    """
    named = [open_task(name) for name in task_names(tasks)]
    opened = open_language_model(model, device, trust_remote_code)
    asking = prompting(prompt, opened.tokenizer, named)
    opened = replace(opened, stops=asking.stop_ids)
    longest = max_new_tokens or longest_completion(asking.settings)
    problems = mixture(named, "eval", count, seed)
    prompts = [asking.prompt(problem) for problem in problems]
    encoded = [opened.prompt_ids(text, longest) for text in prompts]
    with quiet_libraries():
        batch = complete(opened, encoded, 1, longest, torch.Generator().manual_seed(seed))
    texts = opened.tokenizer.batch_decode(batch.whole, skip_special_tokens=True)
    shown = []
    for place, (problem, text) in enumerate(zip(problems, prompts, strict=True)):
        own = slice(2 * place, 2 * place + 2)
        greedy, sampled = texts[own]
        right = asking.verify(problem, greedy), asking.verify(problem, sampled)
        ended = None not in batch.ends[own]
        shown.append(
            Previewed(problem.task, text, problem.answer, asking.cut(greedy), asking.cut(sampled), right, ended)
        )
    return Preview(asking.settings, longest, shown)
