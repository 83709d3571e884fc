"""Damaged files of our own: tables that a report is made of, profiles and overrides. Each is used, or refused by name.

`OFFPRINCIPAL_TIMES=10 pytest tests/test_state_fuzz.py` tries ten times as many of each.
"""

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
import yaml
from checkpoint_folders import base_and_two_runs
from faults import times
from test_checkpoint_fuzz import damaged, too_long, twisted

from offprincipal import CompareSettings, compare
from offprincipal.errors import OffPrincipalError
from offprincipal.paper import load_profile
from offprincipal.reports.report import write_report_of
from offprincipal.studies.overrides import apply_override
from offprincipal.training import parse_settings

CASES = times(150)
SECONDS = 60.0


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def outcome(act: Callable[[], object]) -> str:
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        act()
    except OffPrincipalError as error:
        assert str(error)
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "used"


def test_a_report_of_damaged_tables_is_made_or_refused(tmp_path: Path) -> None:
    base, runs = base_and_two_runs(tmp_path)
    whole = tmp_path / "whole"
    compare(base, runs, CompareSettings(metrics=("location", "spectrum")), out=whole, cache=False)
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
