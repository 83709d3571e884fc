"""Training and evaluation prompts that never overlap, whatever the seeds.

A prompt belongs to the evaluation split if a hash of its text says so, and to the training split otherwise. So two runs
with any seeds, sizes or task mixtures, and the pretraining of the base, agree on what is held out.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from offprincipal.errors import TaskError
from offprincipal.tasks.protocol import Problem, Task

Split = Literal["train", "eval"]
EVAL_SHARE = 0.1
_MAX_TRIES = 10_000
_ENOUGH = 50  # prompts, of which none is held out once in two hundred times


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to; about one in ten is held out.

    >>> {split_of(f"{a}+{b}=") for a in range(10) for b in range(10)} == {"train", "eval"}
    True
    """
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") < EVAL_SHARE * 2**64 else "train"


def problems(task: Task, split: Split, seed: int = 0) -> Iterator[Problem]:
    """An endless stream of a task's problems from one split.

    Raises:
        TaskError: 10,000 seeds in a row gave no prompt of this split.
    """
    missed: list[str] = []
    for i in itertools.count():
        problem = task.problem(seed * 1_000_003 + i)
        if split_of(problem.prompt) == split:
            missed.clear()
            yield problem
            continue
        missed.append(problem.prompt)
        if len(missed) >= _MAX_TRIES:
            lacking = "held out to measure on" if split == "eval" else "left to learn from"
            raise TaskError(
                f"task '{task.name}' has too few prompts ({len(set(missed))}): none is {lacking}. One in ten is held "
                f"out, by a hash of its text: give at least {_ENOUGH}, or train with eval_prompts=0, which needs none "
                "held out"
            )


def require_problems(task: Task, *splits: Split) -> None:
    """Check that a task has problems of these splits, before anything is made of it.

    Raises:
        TaskError: it has none of one of them.
    """
    for split in splits:
        next(problems(task, split))


def mixture(tasks: Sequence[Task], split: Split, size: int, seed: int = 0) -> list[Problem]:
    """`size` problems of one split, the tasks in turn.

    Evaluation problems are distinct where a task has enough of them; training problems may repeat.

    >>> from offprincipal.tasks import open_task
    >>> [p.task for p in mixture([open_task("add"), open_task("sort")], "eval", 4)]
    ['add', 'sort', 'add', 'sort']
    """
    if not tasks:
        raise TaskError("no task is given: give at least one")
    streams = [problems(task, split, seed) for task in tasks]
    if split == "eval":
        streams = [_distinct(stream) for stream in streams]
    return list(itertools.islice((next(stream) for stream in itertools.cycle(streams)), size))


def _distinct(stream: Iterator[Problem]) -> Iterator[Problem]:
    """Drop repeated prompts, until 1,000 in a row were repeats: then the task is exhausted and they start again."""
    seen: set[str] = set()
    repeats = 0
    for problem in stream:
        if problem.prompt in seen and (repeats := repeats + 1) < 1_000:
            continue
        if repeats >= 1_000:
            seen.clear()
        repeats = 0
        seen.add(problem.prompt)
        yield problem
