"""Verifiable tasks: prompts from seeds, verifiers, teacher's traces, and splits that never overlap."""

from collections.abc import Iterable

from offprincipal.errors import TaskError
from offprincipal.tasks.protocol import Problem, Task
from offprincipal.tasks.split import Split, mixture, problems, require_problems, split_of
from offprincipal.tasks.symbolic import SymbolicTask, symbolic_kinds

__all__ = [
    "Problem",
    "Split",
    "SymbolicTask",
    "Task",
    "mixture",
    "open_task",
    "problems",
    "require_problems",
    "split_of",
    "symbolic_kinds",
    "task_names",
]


def task_names(given: str | Iterable[str]) -> list[str]:
    """Tasks that were named one by one or several at once; a name with a colon is one, commas and all.

    Raises:
        TaskError: they are not names, or there is none.

    >>> task_names(["add,sort@2", "hf:data.jsonl?prompt=a,b"]), task_names("add, sort")
    (['add', 'sort@2', 'hf:data.jsonl?prompt=a,b'], ['add', 'sort'])
    """
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not all(isinstance(text, str) for text in texts):
        texts = []
    names = [name.strip() for text in texts for name in ([text] if ":" in text else text.split(",")) if name.strip()]
    if not names:
        raise TaskError(f"tasks are {given!r}: name one or more, such as 'add' or ['add', 'sort@2']")
    return names


def open_task(name: str) -> Task:
    """The task of a name.

    Args:
        name: a symbolic task (`add`, or `add@2` for one level); `rg:NAME` for a reasoning-gym data set;
            `hf:DATASET` for a Hugging Face data set or local data files, with the columns and the verifier's options
            after a question mark: `hf:openai/gsm8k?config=main&prompt=question&answer=answer`.

    Raises:
        TaskError: no such task, or it needs a package that is not installed.

    >>> open_task("add@2").name
    'add@2'
    """
    kind, _, rest = name.partition(":")
    if rest and kind == "rg":
        from offprincipal.tasks.reasoning_gym import ReasoningGymTask

        return ReasoningGymTask(rest)
    if rest and kind == "hf":
        from offprincipal.tasks.hub_datasets import HubTask

        return HubTask.parse(rest)
    return SymbolicTask.parse(name)
