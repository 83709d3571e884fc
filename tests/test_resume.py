"""A comparison can be killed at any moment: the next one finishes the rest, and the tables are the same to the byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_folders import base_and_two_runs, tables_in

from offprincipal.comparison import compare
from offprincipal.comparison.journal import NAME
from offprincipal.errors import FileError
from offprincipal.files import exclusively


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base and two runs."""
    return base_and_two_runs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(sources: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of an uninterrupted comparison."""
    out = tmp_path_factory.mktemp("whole")
    compare(*sources, out=out)
    return out


def start(sources: tuple[Path, dict[str, Path]], out: Path) -> subprocess.Popen[bytes]:
    base, runs = sources
    named = [f"{name}={path}" for name, path in runs.items()]
    command = [sys.executable, "-m", "offprincipal", "compare", str(base), *named, "--out", str(out), "--no-report"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_killed_again_and_again_a_comparison_ends_with_the_same_bytes(
    sources: tuple[Path, dict[str, Path]], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    kills = 0
    for wanted in (1, 2, 4, 7):  # lines in the journal at which it is killed; the first says what is compared
        process = start(sources, out)
        while process.poll() is None and lines_in(out / NAME) < wanted:
            time.sleep(0.001)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        done = lines_in(out / NAME)
        assert done >= wanted or (out / "summary.json").exists()
    assert kills >= 2
    finished = start(sources, out)
    _, errors = finished.communicate()
    assert finished.returncode == 0, errors
    assert tables_in(out) == tables_in(whole)
    assert not (out / NAME).exists()


def test_wherever_the_journal_was_cut_short_the_rest_is_measured_again(
    sources: tuple[Path, dict[str, Path]], whole: Path, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop_late(done: int, total: int, tensor: str) -> None:
        if done == total:
            raise Stopped

    out = tmp_path / "cut"
    with pytest.raises(Stopped):
        compare(*sources, out=out, progress=stop_late)
    journal = (out / NAME).read_bytes()
    assert journal.count(b"\n") == 9  # what is compared, and eight tensors
    for length in range(0, len(journal), len(journal) // 12):
        (out / NAME).write_bytes(journal[:length])
        compare(*sources, out=out)
        assert tables_in(out) == tables_in(whole)


def test_what_is_done_is_not_done_again(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    seen: list[str] = []

    def stop_third(done: int, total: int, tensor: str) -> None:
        seen.append(tensor)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(*sources, out=tmp_path, threads=1, progress=stop_third)
    again: list[str] = []
    compare(*sources, out=tmp_path, threads=1, progress=lambda done, total, tensor: again.append(tensor))
    assert not set(seen) & set(again)
    assert len(seen) + len(again) == 8


def test_other_settings_or_other_weights_start_anew(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, runs = sources
    out = tmp_path / "out"
    out.mkdir()
    (out / NAME).write_text(json.dumps({"key": "another comparison"}) + '\n{"tensor": "model.norm.weight"}\n')
    done: list[str] = []
    compare(base, runs, out=out, progress=lambda _done, _total, tensor: done.append(tensor))
    assert len(done) == 8


def test_two_comparisons_do_not_write_to_one_folder(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    with exclusively(tmp_path), pytest.raises(FileError, match="another process is writing"):
        compare(*sources, out=tmp_path)
