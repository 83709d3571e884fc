"""Damaged files of our own: tables that a report is made of, profiles and overrides. Each is used, or refused by name.

`OFFPRINCIPAL_TIMES=10 pytest tests/test_state_fuzz.py` tries ten times as many of each.
"""

import json
import random
import shutil
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import yaml
from checkpoint_folders import base_and_two_runs, tables_in
from faults import outcome, times
from test_checkpoint_fuzz import damaged, twisted

from offprincipal import CompareSettings, MatrixSettings, compare
from offprincipal.file_names import JOURNAL
from offprincipal.paper import load_profile
from offprincipal.reports.report import write_report_of
from offprincipal.studies.overrides import apply_override
from offprincipal.training import parse_settings

CASES = times(150)


def test_a_report_of_damaged_tables_is_made_or_refused(tmp_path: Path) -> None:
    base, runs = base_and_two_runs(tmp_path)
    whole = tmp_path / "whole"
    compare(base, runs, CompareSettings(metrics=("location", "spectrum")), out=whole, cache=False, report=False)
    names = ["summary.json", "summary.json", "matrices.parquet", "masks.parquet", "pairs.parquet", "curves.parquet"]
    chance, seen, wrong = random.Random(CASES), Counter[str](), []
    for case in range(CASES):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        path = folder / chance.choice(names)
        content = path.read_bytes()
        if path.suffix == ".json" and chance.random() < 0.8:
            content = twisted(json.loads(content), chance).encode("utf-8", "surrogatepass")
        else:
            content = damaged(content, len(content), chance)
        path.write_bytes(content)
        found = outcome(lambda: write_report_of(folder))  # noqa: B023
        seen[found if found in ("used", "refused") else "wrong"] += 1
        if found not in ("used", "refused"):
            wrong.append(f"case {case}, {path.name}: {found}")
        elif found == "refused":
            assert not (folder / "report.html").exists()
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:12])
    assert min(seen["used"], seen["refused"]) >= CASES // 50, seen


def test_a_damaged_profile_is_used_or_refused(tmp_path: Path) -> None:
    shipped = resources.files("offprincipal.paper") / "profiles" / "quick.yaml"
    text = shipped.read_text(encoding="utf-8")
    tree, chance, seen, wrong = yaml.safe_load(text), random.Random(CASES), Counter[str](), []
    for case in range(CASES):
        path = tmp_path / "own.yaml"
        if chance.random() < 0.6:
            path.write_bytes(twisted(tree, chance).encode("utf-8", "surrogatepass"))  # JSON is YAML
        else:
            path.write_bytes(damaged(text.encode(), len(text.encode()), chance))
        found = outcome(lambda: load_profile(str(path)))  # noqa: B023
        seen[found if found in ("used", "refused") else "wrong"] += 1
        if found not in ("used", "refused"):
            wrong.append(f"case {case}: {found}\n{path.read_bytes()[:200]!r}")
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:12])
    assert min(seen["used"], seen["refused"]) >= CASES // 50, seen


KEYS = [
    "steps",
    "training.steps",
    "stages.grpo_1.seed",
    "adapter.rank",
    "adapter",
    "tasks",
    "beta",
    "a.b.c.d",
    "",
    "x" * 300,
]
VALUES = ["200", "1e-5", "", "null", "[1, [2]]", "{a: {b: 1}}", "1e999", "-1", "nan", ".inf", "&a [*a]", "!!python/x 1"]
VALUES += ["9" * 5000, "[" * 2000, "\x00", "é", "2026-01-01", "0x10", "1_000", "yes", "~", "'", ": :", "=", "*b", "e"]


def trained_with(text: str) -> object:
    content = {"recipe": "grpo", "tasks": ["add"]}
    apply_override(content, text)
    return parse_settings(content)


def test_overrides_are_taken_or_refused() -> None:
    chance, wrong = random.Random(CASES), []
    for case in range(CASES):
        text = f"{chance.choice(KEYS)}{chance.choice(['=', '=', '=', '', '=='])}{chance.choice(VALUES)}"
        for act in (lambda: load_profile("quick", [text]), lambda: trained_with(text)):  # noqa: B023
            found = outcome(act)
            if found not in ("used", "refused"):
                wrong.append(f"case {case}: {text[:80]!r}: {found}")
    assert not wrong, f"{len(wrong)} of {2 * CASES}:\n" + "\n".join(wrong[:12])


FEW = times(15)  # comparisons take longer


def mutated(path: Path, chance: random.Random) -> bytes:
    """A file's content with a line or some bytes of it changed, left out, doubled or exchanged."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    if len(lines) < 3 or chance.random() < 0.5:
        return damaged(content, len(content), chance)
    place, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    match chance.randrange(4):
        case 0:
            lines[place], lines[other] = lines[other], lines[place]
        case 1:
            del lines[place]
        case 2:
            lines.insert(other, lines[place])
        case _:
            lines[place] = lines[place].replace(b"1", b"2", 1)
    return b"".join(lines)


def test_a_damaged_journal_is_not_believed(tmp_path: Path) -> None:
    base, runs = base_and_two_runs(tmp_path)
    settings = CompareSettings(metrics=("location", "spectrum"))
    compare(base, runs, settings, out=tmp_path / "whole", cache=False)
    expected, chance, seen = tables_in(tmp_path / "whole"), random.Random(FEW), Counter[str]()

    def stop_late(done: int, total: int, tensor: str) -> None:
        if done > 0.7 * total:
            raise KeyboardInterrupt

    for _ in range(FEW):
        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            compare(base, runs, settings, out=out, cache=False, threads=1, progress=stop_late)
        path = out / JOURNAL
        path.write_bytes(mutated(path, chance))
        again: list[str] = []
        found = outcome(
            lambda: compare(base, runs, settings, out=out, cache=False, progress=lambda d, t, name: again.append(name))  # noqa: B023
        )
        assert found == "used", found
        assert tables_in(out) == expected
        seen["all again" if len(again) == 8 else "some kept"] += 1
        shutil.rmtree(out)
    assert (seen["some kept"] and seen["all again"]) or FEW < 20, seen


def test_a_damaged_cache_entry_is_not_believed(tmp_path: Path) -> None:
    """Every file of it in turn: the tables are those of a comparison without a cache."""
    base, runs = base_and_two_runs(tmp_path)
    settings = CompareSettings(("spectrum", "subspace"), MatrixSettings(exact_up_to=4))
    compare(base, runs, settings, out=tmp_path / "whole", cache=False)
    compare(base, runs, settings, out=tmp_path / "first", cache=tmp_path / "cache")
    expected, chance = tables_in(tmp_path / "whole"), random.Random(FEW)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(kept) >= 6 and tables_in(tmp_path / "first") == expected
    for case in range(2 * FEW):
        path = chance.choice(kept)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, len(whole), chance))
        out = tmp_path / f"out{case}"
        found = outcome(lambda: compare(base, runs, settings, out=out, cache=tmp_path / "cache"))  # noqa: B023
        assert found == "used", found
        assert tables_in(out) == expected, path
        path.write_bytes(whole)
        shutil.rmtree(out)
