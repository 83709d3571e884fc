"""What a model answers before anything is trained: some held-out prompts, its completions, and their verdicts."""

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
    """One prompt and what a model made of it.

    Args:
        task, prompt: as the model read it; answer: the reference.
        greedy, sampled: what it wrote, cut at the stop; right: whether the verifier takes either.
        ended: whether both ended by themselves within the length.
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
    """Some problems put to a model.

    Args:
        settings: how, with everything said; max_new_tokens: the longest completion.
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
    """Put some held-out problems of tasks to a model, one greedy and one sampled completion each.

    Args:
        model, device, trust_remote_code: as `open_language_model` takes them; tasks: names for `open_task`.
        prompt: how problems are put to it; None: as its tokenizer suggests, as in training.
        count: of problems, the tasks in turn; max_new_tokens: as training would have it where not given.

    Raises:
        TaskError, ModelError: a task, a template or the model is not usable.

    >>> found = preview("embedded", ["add"], count=1)
    >>> found.settings.template, found.shown[0].task
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
        found = complete(opened, encoded, 1, longest, torch.Generator().manual_seed(seed))
    texts = opened.tokenizer.batch_decode(found.whole, skip_special_tokens=True)
    shown = []
    for place, (problem, text) in enumerate(zip(problems, prompts, strict=True)):
        own = slice(2 * place, 2 * place + 2)
        greedy, sampled = texts[own]
        right = asking.verify(problem, greedy), asking.verify(problem, sampled)
        ended = None not in found.ends[own]
        shown.append(
            Previewed(problem.task, text, problem.answer, asking.cut(greedy), asking.cut(sampled), right, ended)
        )
    return Preview(asking.settings, longest, shown)
