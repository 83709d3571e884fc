"""The commands and snippets of the documentation, as the tests run them."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

SMALLER = {
    "--steps": "2",
    "--batch": "8",
    "--rank": "2",
    "max_new_tokens": "3",
    "eval_max_new_tokens": "3",
    "eval_prompts": "2",
    "micro_batch": "4",
    "keep_deltas": "1",
    "monitor": "1",
}
ON_GPUS = ("vllm", "trl.vllm_gpu_memory_utilization")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[list[str]]:
    """The words of every command in a page's `sh` blocks, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines for words in joined_by_and(shlex.split(line, comments=True)) if words]


def joined_by_and(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `offprincipal`, whichever launcher starts it."""
    return [line[line.index("offprincipal") + 1 :] for line in command_lines(page) if "offprincipal" in line]


def made_small(arguments: Sequence[str], folders: dict[str, str]) -> list[str]:
    """The command on a tiny model: the same options, smaller numbers, and without what only a GPU has."""
    small: list[str] = []
    for word in arguments:
        key, equals, value = word.partition("=")
        before = small[-1] if small else ""
        if before == "--set" and key in ON_GPUS:
            small.pop()
        elif before == "--set" and key in SMALLER:
            small.append(f"{key}={SMALLER[key]}")
        elif before in SMALLER and word.isdigit():
            small.append(SMALLER[before])
        else:
            place = value if equals and before not in ("--set", "--task") else word
            root = next((root for root in folders if place == root or place.startswith(root + "/")), None)
            changed = place if root is None else folders[root] + place[len(root) :]
            small.append(f"{key}={changed}" if place is value else changed)
    return small
