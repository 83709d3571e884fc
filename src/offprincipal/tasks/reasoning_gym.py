"""Tasks from reasoning-gym: any of its procedural data sets by name, judged by the data set's own scorer.

A problem carries only its seed: the entry that the scorer needs is made again from it, so problems stay
JSON-serialisable whatever a data set keeps in its metadata. Knows nothing of models or splits.
"""

import functools
import importlib
import re
from dataclasses import dataclass
from typing import Any

from offprincipal.errors import TaskError, install_command, meant
from offprincipal.tasks.protocol import Problem

PREFIX = "rg:"
_SEEDS = 2**32  # some data sets seed numpy, which takes no more
_TAGGED_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class ReasoningGymTask:
    """One reasoning-gym data set with its default configuration.

    Args:
        dataset: its name in reasoning-gym, such as `chain_sum`.

    Raises:
        TaskError: reasoning-gym is not installed, or has no such data set, or needs a configuration for it.

    >>> task = ReasoningGymTask("chain_sum")
    >>> problem = task.problem(seed=7)
    >>> task.verify(problem, problem.answer), task.verify(problem, task.teacher_trace(problem))
    (True, True)
    """

    dataset: str

    def __post_init__(self) -> None:
        names = _datasets()
        if self.dataset not in names:
            hint = meant(self.dataset, names, f"it has {', '.join(sorted(names))}")
            raise TaskError(f"reasoning-gym has no data set '{self.dataset}': {hint}")
        try:
            _entry(self.dataset, 0)
        except Exception as error:  # whatever a data set raises that needs a configuration or another package
            raise TaskError(f"reasoning-gym cannot create '{self.dataset}' with its defaults: {error}") from error

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.dataset}"

    @functools.cached_property
    def _scorer(self) -> Any:
        return _make(self.dataset, 0)

    def problem(self, seed: int) -> Problem:
        """The problem of a seed; its answer is empty if the data set has a scorer but no reference answer."""
        entry = _entry(self.dataset, seed)
        return Problem(self.name, entry["question"], entry["answer"] or "", {"seed": seed})

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the text of the last `<answer>` tag, or the whole completion if there is none, scores 1."""
        tagged = _TAGGED_ANSWER.findall(completion)
        answer = (tagged[-1] if tagged else completion).strip()
        if not answer:
            return False
        try:
            score = self._scorer.score_answer(answer, _entry(self.dataset, problem.data["seed"]))
        except Exception:  # the scorers raise whatever they like on a malformed answer, and that is a wrong answer
            return False
        return bool(score == 1.0)

    def teacher_trace(self, problem: Problem) -> str:
        """The reference answer in reasoning-gym's own tag, which a base model has no reason to write.

        Raises:
            TaskError: the data set has no reference answers.
        """
        if not problem.answer:
            raise TaskError(f"task '{self.name}' has no reference answers to teach: train on it with the recipe grpo")
        return f"The answer is <answer>{problem.answer}</answer>"


def _datasets() -> list[str]:
    try:
        return list(importlib.import_module("reasoning_gym.factory").DATASETS)
    except ImportError as error:
        raise TaskError(f"tasks 'rg:…' need reasoning-gym: {install_command('train')}") from error


@functools.lru_cache(maxsize=8192)
def _entry(dataset: str, seed: int) -> dict[str, Any]:
    made: dict[str, Any] = _make(dataset, seed)[0]
    return made


def _make(dataset: str, seed: int) -> Any:
    create = importlib.import_module("reasoning_gym").create_dataset
    return create(dataset, size=1, seed=seed % _SEEDS)
