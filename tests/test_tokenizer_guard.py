"""Tokenizer files that would not end or fill the memory are refused before a library runs what they say."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults import outcome, times
from test_checkpoint_fuzz import damaged, twisted

from offprincipal.errors import ModelError
from offprincipal.models import open_tokenizer
from offprincipal.models.tokenizer_guard import TOKENIZER, require_tame

CASES = times(60)


def doubling(pattern: dict[str, str], content: str, steps: int) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": pattern, "content": content}] * steps}


@pytest.mark.parametrize(
    "normalizer",
    [
        doubling({"String": "a"}, "aa", 40),
        doubling({"String": ""}, "aaaa", 20),
        doubling({"Regex": ""}, "a", 40),
        doubling({"Regex": "b*"}, "ab", 13),
        doubling({"Regex": "\\p{L}"}, "aa", 40),
        {"type": "Sequence", "normalizers": [doubling({"String": "a"}, "aa", 20)] * 2},
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa", "normalizers": []}] * 40,
        },
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000},
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 2000},
        {"type": "Replace", "pattern": {"Regex": "(a|" * 9000}, "content": ""},
    ],
)
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_steps_that_fill_the_memory_are_refused(
    normalizer: dict[str, Any], part: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    content = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(content | {part: normalizer}))
    with pytest.raises(ModelError, match="o not trust it"):
        open_tokenizer(folder)


def test_what_real_tokenizers_have_is_not_refused(tmp_path: Path) -> None:
    """Llama's, Gemma's, T5's and ALBERT's own steps."""
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
        {"type": "NFKD"},
        {"type": "StripAccents"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"Regex": "\\p{Zs}+"}, "content": " "},
    ]
    (tmp_path / TOKENIZER).write_text(json.dumps({"normalizer": {"type": "Sequence", "normalizers": steps}}))
    require_tame(tmp_path)


def test_a_damaged_tokenizer_is_opened_or_refused(tiny_model: Path, tmp_path: Path) -> None:
    """By the way that every command takes: whatever transformers raises is told as an error of ours."""
    from offprincipal.models.opening import _with_tokenizer, open_language_model

    opened = open_language_model(tiny_model, "cpu")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    names = [path.name for path in folder.iterdir() if path.name.startswith("tokenizer") or "special" in path.name]
    chance, seen, wrong = random.Random(CASES), Counter[str](), []
    for case in range(CASES):
        path = folder / chance.choice(names)
        whole = path.read_bytes()
        if chance.random() < 0.7:
            path.write_bytes(twisted(json.loads(whole), chance).encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(damaged(whole, len(whole), chance))
        found = outcome(lambda: _with_tokenizer(opened, str(folder), False), seconds=30)
        seen[found] += 1
        if found not in ("used", "refused"):
            wrong.append(f"case {case}, {path.name}: {found}")
        path.write_bytes(whole)
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:12])
    assert min(seen["used"], seen["refused"]) >= CASES // 20, seen
