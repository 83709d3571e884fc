"""Short symbolic tasks for a character model: arithmetic, sequences, bases, strings.

Each task is one function `(random, level) -> (prompt, answer, working)`. Three levels grade the difficulty; an answer
has at most seven characters. `working` is what a teacher writes before the answer, in a format that the embedded
base model has never seen: `working#answer`. Knows nothing of tokenizers, models or splits.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from offprincipal.errors import TaskError, meant
from offprincipal.tasks.protocol import Problem

LEVELS = (1, 2, 3)
ANSWER_MARK = "#"

Draw = Callable[[random.Random, int], tuple[str, str, str]]
_DRAWS: dict[str, Draw] = {}


def _task(draw: Draw) -> Draw:
    _DRAWS[draw.__name__] = draw
    return draw


@dataclass(frozen=True)
class SymbolicTask:
    """One symbolic task at one level, or at all three in equal shares.

    Args:
        kind: a name of `symbolic_kinds()`.
        level: 1, 2 or 3; None mixes them.

    Raises:
        TaskError: no such kind or level.

    >>> task = SymbolicTask("add", level=1)
    >>> problem = task.problem(seed=7)
    >>> task.verify(problem, problem.answer), task.verify(problem, task.teacher_trace(problem))
    (True, True)
    """

    kind: str
    level: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _DRAWS:
            raise TaskError(f"no task '{self.kind}': {_meant(self.kind)}")
        if self.level is not None and self.level not in LEVELS:
            raise TaskError(f"task '{self.kind}' has no level {self.level}: choose 1, 2 or 3")

    @classmethod
    def parse(cls, name: str) -> "SymbolicTask":
        """`add` or `add@2`."""
        kind, at, level = name.partition("@")
        if at and level not in {"1", "2", "3"}:
            raise TaskError(f"task '{name}' has an invalid level: write {kind}@1, {kind}@2 or {kind}@3")
        return cls(kind, int(level) if at else None)

    @property
    def name(self) -> str:
        return self.kind if self.level is None else f"{self.kind}@{self.level}"

    def problem(self, seed: int) -> Problem:
        rng = random.Random(f"{self.kind}/{seed}")
        prompt, answer, working = _DRAWS[self.kind](rng, self.level or rng.choice(LEVELS))
        return Problem(self.name, prompt, answer, {"working": working})

    def verify(self, problem: Problem, completion: str) -> bool:
        return completion.rsplit(ANSWER_MARK, 1)[-1].strip() == problem.answer

    def teacher_trace(self, problem: Problem) -> str:
        return f"{problem.data['working']}{ANSWER_MARK}{problem.answer}"


def _meant(name: str) -> str:
    """Suggestions for an unknown task name, as the end of a message."""
    every = (
        f"choose one of {', '.join(_DRAWS)}; or rg:NAME of reasoning-gym; or hf:DATASET?prompt=COLUMN&answer=COLUMN, "
        "with a data set of the Hub, such as hf:openai/gsm8k?config=main, or a JSON, CSV or Parquet file"
    )
    return meant(name.lower(), _DRAWS, every)


def symbolic_kinds() -> tuple[str, ...]:
    """Names of the symbolic tasks, in the order of their definition.

    >>> len(symbolic_kinds())
    12
    """
    return tuple(_DRAWS)


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _places(number: int) -> list[int]:
    """The number by decimal places: 358 -> [300, 50, 8]."""
    text = str(number)
    return [int(digit) * 10 ** (len(text) - 1 - i) for i, digit in enumerate(text)]


def _letters(rng: random.Random, length: int, alphabet: str = string.ascii_lowercase) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


@_task
def add(rng: random.Random, level: int) -> tuple[str, str, str]:
    a, b = _number(rng, level), _number(rng, level)
    working = ";".join(f"{x}+{y}={x + y}" for x, y in zip(_places(a), _places(b), strict=True))
    return f"{a}+{b}=", str(a + b), working


@_task
def subtract(rng: random.Random, level: int) -> tuple[str, str, str]:
    a, b = _number(rng, level), _number(rng, level)
    working = ";".join(f"{x}-{y}={x - y}" for x, y in zip(_places(a), _places(b), strict=True))
    return f"{a}-{b}=", str(a - b), working


@_task
def multiply(rng: random.Random, level: int) -> tuple[str, str, str]:
    a, b = _number(rng, 1 if level == 1 else 2), _number(rng, 2 if level == 3 else 1)
    return f"{a}*{b}=", str(a * b), ";".join(f"{x}*{b}={x * b}" for x in _places(a))


@_task
def modulo(rng: random.Random, level: int) -> tuple[str, str, str]:
    a, b = _number(rng, level), rng.randrange(2, 10)
    return f"{a}%{b}=", str(a % b), f"{b}*{a // b}={a - a % b}"


@_task
def chain(rng: random.Random, level: int) -> tuple[str, str, str]:
    top = (5, 10, 20)[level - 1]
    a, b, c = rng.randrange(top), rng.randrange(2, 10), rng.randrange(2, 10)
    sign = rng.choice("+-")
    product = b * c
    return f"{a}{sign}{b}*{c}=", str(a + product if sign == "+" else a - product), f"{b}*{c}={product}"


@_task
def sequence(rng: random.Random, level: int) -> tuple[str, str, str]:
    start, step = rng.randrange(10**level), rng.randrange(1, (5, 10, 30)[level - 1])
    terms = [start + step * i for i in range(4)]
    return f"seq {' '.join(map(str, terms[:3]))}=", str(terms[3]), f"{terms[2]}-{terms[1]}={step}"


@_task
def from_base(rng: random.Random, level: int) -> tuple[str, str, str]:
    base, value = rng.randrange(3, 10), rng.randrange((20, 100, 500)[level - 1])
    digits, rest = "", value
    while rest or not digits:
        digits, rest = str(rest % base) + digits, rest // base
    terms = [f"{d}*{base ** (len(digits) - 1 - i)}" for i, d in enumerate(digits)]
    return f"base{base} {digits}=", str(value), "+".join(terms)


@_task
def sort(rng: random.Random, level: int) -> tuple[str, str, str]:
    digits = _letters(rng, level + 3, string.digits)
    answer = "".join(sorted(digits))
    return f"sort {digits}=", answer, "<".join(answer)


@_task
def reverse(rng: random.Random, level: int) -> tuple[str, str, str]:
    word = _letters(rng, level + 3)
    return f"rev {word}=", word[::-1], ".".join(word[::-1])


@_task
def count(rng: random.Random, level: int) -> tuple[str, str, str]:
    word = _letters(rng, 2 * level + 3, "abcd")
    letter = rng.choice("abcd")
    return f"count {letter} {word}=", str(word.count(letter)), "".join("+" if c == letter else "." for c in word)


@_task
def maximum(rng: random.Random, level: int) -> tuple[str, str, str]:
    numbers = [_number(rng, 2 if level == 1 else 3) for _ in range(4 if level == 3 else 3)]
    return f"max {' '.join(map(str, numbers))}=", str(max(numbers)), "<".join(map(str, sorted(numbers)))


@_task
def rotate(rng: random.Random, level: int) -> tuple[str, str, str]:
    word, shift = _letters(rng, level + 2), rng.randrange(1, 6)
    turned = [chr((ord(c) - ord("a") + shift) % 26 + ord("a")) for c in word]
    return f"rot{shift} {word}=", "".join(turned), ";".join(f"{a}>{b}" for a, b in zip(word, turned, strict=True))
