"""What the gates are measured on: prompts with continuations sampled from a policy, or sequences that are given.

Knows models and tasks; knows nothing of weights.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offprincipal.errors import ArgumentError, FileError, ModelError
from offprincipal.models import LanguageModel
from offprincipal.models.decoding import complete
from offprincipal.models.quiet import quiet_libraries
from offprincipal.tasks import mixture
from offprincipal.tasks.prompting import Prompting

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Sequences:
    """Tokens that a model reads, and where the measured distributions begin.

    Args:
        ids: of each sequence.
        first: the first position of each whose next-token distribution counts; all later ones do.
        samples: whose continuations they are: `base`, `tuned` or `given`.
    """

    ids: list[list[int]]
    first: list[int]
    samples: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> list[int]:
        """Measured distributions of each sequence."""
        return [len(row) - start for row, start in zip(self.ids, self.first, strict=True)]


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a file: one per line, or JSON lines `{"prompt": …}` if its name ends in `.jsonl`.

    Raises:
        FileError: it cannot be read, has no prompts, or a line is not such an object.
    """
    file = Path(path)
    if file.suffix != ".jsonl":
        prompts = [line for _, line in _lines(file)]
    else:
        prompts = [_field(file, number, _object(file, number, line), "prompt") for number, line in _lines(file)]
    if not prompts:
        raise FileError(f'{file} has no prompts: write one per line, or JSON lines {{"prompt": …}} in a .jsonl file')
    return prompts


def task_prompts(asking: Prompting, count: int, seed: int) -> list[str]:
    """Held-out prompts of tasks, in equal shares, as the model is asked.

    Raises:
        TaskError: a task has no held-out prompts.
    """
    return [asking.prompt(problem) for problem in mixture(list(asking.tasks.values()), "eval", count, seed)]


def read_sequences(path: str | Path, language_model: LanguageModel) -> Sequences:
    """Sequences from JSON lines, `{"text": …}` or `{"input_ids": […]}`, measured at every position after the first.

    Raises:
        FileError: the file cannot be read, is empty, or a line is not such an object.
        ModelError: a sequence does not fit the model's context or vocabulary.
    """
    file = Path(path)
    vocabulary = int(language_model.model.get_input_embeddings().weight.shape[0])
    found: list[list[int]] = []
    for number, line in _lines(file):
        where, content = f"line {number} of {file}", _object(file, number, line)
        if "input_ids" in content:
            ids = content["input_ids"]
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise FileError(f'{where}: input_ids is not a list of integers. Write {{"input_ids": [1, 2, 3]}}')
        else:
            if language_model.tokenizer is None:
                raise ModelError(f"{where} is text, and the model has no usable tokenizer: give input_ids")
            with quiet_libraries():
                ids = language_model.tokenizer(_field(file, number, content, "text")).input_ids
        if len(ids) < 2:
            raise FileError(f"{where} has {len(ids)} tokens: a sequence needs at least two, one of them to predict")
        if any(not 0 <= i < vocabulary for i in ids):
            raise ModelError(f"{where} has token {max(ids)} or one below 0; the model's vocabulary has {vocabulary}")
        if language_model.context is not None and len(ids) > language_model.context:
            raise ModelError(
                f"{where} has {len(ids)} tokens, and the model's context has {language_model.context}: shorten it"
            )
        found.append(ids[:-1])
    if not found:
        raise FileError(f'{file} has no sequences: write JSON lines {{"text": …}} or {{"input_ids": […]}}')
    return Sequences(found, [0] * len(found), "given")


def encode_prompts(language_model: LanguageModel, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Tokens of prompts, each with room for a continuation.

    Raises:
        ModelError: one has no token, or does not fit the context with its continuation.
    """
    with quiet_libraries():
        encoded = [language_model.prompt_ids(prompt, max_new_tokens) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ModelError(f"prompt {prompt[:60]!r} has no tokens for this model: remove it")
    return encoded


def sample_continuations(
    language_model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int, samples: str
) -> Sequences:
    """One continuation of each prompt, sampled at temperature 1; the distribution of the ending token counts too.

    Two policies with one seed are sampled with the same random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows: dict[int, list[int]] = {}
    for start in range(0, len(order), _PROMPTS_AT_ONCE):
        chosen = order[start : start + _PROMPTS_AT_ONCE]
        with quiet_libraries():
            found = complete(language_model, [prompts[i] for i in chosen], 1, max_new_tokens, generator)
        for place, i in enumerate(chosen):
            written = found.ids[2 * place + 1]  # after the greedy one
            rows[i] = [*prompts[i], *written[: max_new_tokens - 1]]  # what follows the last token is not sampled
    ids = [rows[i] for i in range(len(prompts))]
    return Sequences(ids, [len(prompt) - 1 for prompt in prompts], samples)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, numbered from 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}. Give a text file") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    numbered = enumerate(text.split("\n"), 1)  # splitlines would cut JSON strings at rarer line ends too
    return ((number, line.removesuffix("\r")) for number, line in numbered if line.strip())


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileError(f"line {number} of {path} is not valid JSON: {error}. Write one object per line") from error
    if not isinstance(content, dict):
        raise FileError(f"line {number} of {path} is not a JSON object: write one per line")
    return content


def _field(path: Path, number: int, content: dict[str, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value:
        raise FileError(f'line {number} of {path} has no text under \'{key}\': write {{"{key}": "…"}}')
    return value


def shuffled_batches(count: int, batches: int, seed: int) -> list[int]:
    """The batch of each of `count` sequences: a seeded shuffle dealt out in equal shares.

    >>> sorted(shuffled_batches(6, 3, seed=0))
    [0, 0, 1, 1, 2, 2]
    """
    if batches < 1:
        raise ArgumentError(f"batches is {batches}: give at least 1")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    place = [0] * count
    for rank, i in enumerate(order):
        place[i] = rank * batches // count
    return place
