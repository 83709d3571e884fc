"""What a verifiable task is: it makes a prompt from a seed, verifies a completion, and gives a teacher's trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One prompt with its reference answer.

    Args:
        task: the name of the task that made it.
        prompt: what the model reads.
        answer: the reference answer, in the format that a base model is expected to use.
        data: whatever the task's own verifier and teacher need; JSON-serialisable.
    """

    task: str
    prompt: str
    answer: str
    data: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A source of problems whose answers a program can check."""

    @property
    def name(self) -> str:
        """The name that `open_task` takes back."""
        ...

    def problem(self, seed: int) -> Problem:
        """The problem of this seed: the same seed gives the same problem; different seeds may repeat one."""
        ...

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether a completion (decoded, without special tokens) answers the problem."""
        ...

    def teacher_trace(self, problem: Problem) -> str:
        """A correct completion in a teacher's format, foreign to the base model where the task knows one."""
        ...
