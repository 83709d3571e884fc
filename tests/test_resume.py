"""A comparison can be killed at any moment: the next one finishes the rest, and the tables are the same to the byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_folders import base_and_two_runs, base_weights, moved, stored, tables_in, write_model
from safetensors.torch import save_file
from torch import Tensor

from offprincipal.comparison import CompareSettings, compare
from offprincipal.comparison.journal import Journal
from offprincipal.comparison.measure import TensorRows
from offprincipal.errors import CheckpointError, FileError
from offprincipal.file_names import JOURNAL
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
        while process.poll() is None and lines_in(out / JOURNAL) < wanted:
            time.sleep(0.001)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        done = lines_in(out / JOURNAL)
        assert done >= wanted or (out / "summary.json").exists()
    assert kills >= 2
    finished = start(sources, out)
    _, errors = finished.communicate()
    assert finished.returncode == 0, errors
    assert tables_in(out) == tables_in(whole)
    assert not (out / JOURNAL).exists()


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
    journal = (out / JOURNAL).read_bytes()
    assert journal.count(b"\n") == 9  # what is compared, and eight tensors
    for length in range(0, len(journal), len(journal) // 12):
        (out / JOURNAL).write_bytes(journal[:length])
        compare(*sources, out=out, cache=False)  # which takes nothing of the tables that are there by then
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
    (out / JOURNAL).write_text(json.dumps({"key": "another comparison"}) + '\n{"tensor": "model.norm.weight"}\n')
    done: list[str] = []
    compare(base, runs, out=out, progress=lambda _done, _total, tensor: done.append(tensor))
    assert len(done) == 8


def test_two_comparisons_do_not_write_to_one_folder(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    with exclusively(tmp_path), pytest.raises(FileError, match="another process is writing"):
        compare(*sources, out=tmp_path)


def write_safetensors(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    return replaced(folder / "model.safetensors", lambda path: save_file(weights, path))


def write_bin(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    return replaced(folder / "pytorch_model.bin", lambda path: torch.save(weights, path))


def write_shard_below(folder: Path, weights: dict[str, Tensor]) -> Path:
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    index = {"weight_map": dict.fromkeys(weights, "shards/one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return replaced(folder / "shards" / "one.safetensors", lambda path: save_file(weights, path))


def write_distributed(folder: Path, weights: dict[str, Tensor]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(weights), checkpoint_id=folder)
    return folder / "__0_0.distcp"


def replaced(path: Path, write: Callable[[Path], object]) -> Path:
    """As a trainer replaces a file: under another name first."""
    write(path.with_name("new"))
    path.with_name("new").replace(path)
    return path


@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_shard_below, write_distributed])
def test_files_that_are_replaced_in_mid_run_give_no_tables(
    write: Callable[[Path, dict[str, Tensor]], Path], tmp_path: Path
) -> None:
    weights = base_weights()
    base = write_model(tmp_path / "base", weights)
    old, new = (stored(moved(weights, size, 1)) for size in (1e-3, 3e-3))
    file = write(tmp_path / "run", old)
    settings, done = CompareSettings(metrics=("changes",)), []

    def replace_once(count: int, total: int, tensor: str) -> None:
        done.append(tensor)
        if len(done) == 3:
            write(tmp_path / "run", new)

    says = f"{file.name} (changed while it was being read|ends before)"  # torch writes over the file itself
    with pytest.raises((FileError, CheckpointError), match=says):
        compare(base, {"run": tmp_path / "run"}, settings, out=tmp_path / "out", threads=1, progress=replace_once)
    assert not (tmp_path / "out" / "summary.json").exists()
    again = compare(base, {"run": tmp_path / "run"}, settings, out=tmp_path / "out")
    assert again.matrices == compare(base, {"run": tmp_path / "run"}, settings).matrices
    file.unlink()
    with pytest.raises((FileError, CheckpointError), match=r"gone|cannot|missing|neither|holds no|contain|is no"):
        compare(base, {"run": tmp_path / "run"}, settings)


def test_the_lock_lies_in_the_folder_and_goes_with_its_holder(tmp_path: Path) -> None:
    """So that two hosts or containers that share the folder share the lock too."""
    with exclusively(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".offprincipal.lock"]
    assert not list(tmp_path.iterdir())
    with exclusively(tmp_path / "new", beside=True):
        assert [path.name for path in tmp_path.iterdir()] == [".new.offprincipal.lock"]
    assert not list(tmp_path.iterdir())
    holder = "import sys, time; from pathlib import Path; from offprincipal.files import exclusively\n"
    holder += "with exclusively(Path(sys.argv[1])):\n    print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    with pytest.raises(FileError, match="another process is writing"), exclusively(tmp_path):
        pass
    process.kill()
    process.wait()
    with exclusively(tmp_path):  # what a kill left behind holds nobody up
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "out" / ".offprincipal.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(FileError, match="it is a link"), exclusively(tmp_path / "out"):
        pass
    assert (tmp_path / "victim").read_text() == "kept"


def test_what_a_killed_process_left_half_written_is_swept(
    sources: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    for name in (
        ".matrices.parquet.ab12_x9z",
        ".summary.json.abcdefgh",
        ".notes.txt.abcdefgh",
        ".matrices.parquet.short",
    ):
        (tmp_path / name).write_text("half")
    compare(*sources, CompareSettings(metrics=("changes",)), out=tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == {".notes.txt.abcdefgh", ".matrices.parquet.short"}


def journal_of(folder: Path, found: dict[str, TensorRows]) -> Journal:
    """Which gives what it holds back into `found`."""

    def restore(name: str, kept: dict[str, Any]) -> None:
        found[name] = TensorRows(**kept)

    return Journal(folder, "ours", restore)


@pytest.mark.parametrize("what", ["a link", "a pipe", "a folder"])
def test_a_journal_that_is_no_file_is_refused_and_left_alone(what: str, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / JOURNAL, tmp_path / "elsewhere"
    elsewhere.write_text("not ours")
    {"a link": lambda: path.symlink_to(elsewhere), "a pipe": lambda: os.mkfifo(path), "a folder": path.mkdir}[what]()
    with pytest.raises(FileError, match="cannot write"), journal_of(tmp_path, {}).opened():
        pass
    assert elsewhere.read_text() == "not ours"


def test_a_damaged_journal_is_believed_up_to_the_damage(tmp_path: Path) -> None:
    """Whatever byte is another, no row that is given back is."""
    rows = {f"tensor {i}": TensorRows(matrices=[{"value": 0.1 * i}]) for i in range(4)}
    with journal_of(tmp_path, {}).opened():
        pass
    journal = journal_of(tmp_path, {})
    with journal.opened():
        for name, row in rows.items():
            journal.add(name, row)
    whole = journal.path.read_bytes()
    chance = random.Random(0)
    kept = Counter[int]()
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(len(damaged))
            match chance.randrange(3):
                case 0:
                    damaged[at] ^= 1 << chance.randrange(8)
                case 1:
                    del damaged[at : at + chance.choice((1, 2, 30))]
                case _:
                    damaged[at:at] = chance.choice((b"0", b"\n", b"{}\n", bytes(damaged[at : at + 9])))
        journal.path.write_bytes(bytes(damaged))
        found: dict[str, TensorRows] = {}
        with journal_of(tmp_path, found).opened():
            assert all(found[name] == rows[name] for name in found)
            assert list(found) == list(rows)[: len(found)]
            kept[len(found)] += 1
    assert set(kept) >= {0, 1, 2, 3}


@pytest.mark.parametrize("how", ["replaced", "rewritten", "removed"])
def test_no_row_lands_in_a_journal_that_another_process_has_taken(tmp_path: Path, how: str) -> None:
    """Where a file system has no locks, the key decides."""
    journal = journal_of(tmp_path, {})
    with journal.opened():
        journal.add("a", TensorRows())
        if how == "removed":
            journal.path.unlink()
        elif how == "rewritten":
            journal.path.write_text('{"key": "theirs"}\n')
        else:
            (tmp_path / "other").write_text('{"key": "ours"}\n')
            (tmp_path / "other").replace(journal.path)
        before = journal.path.read_bytes() if how != "removed" else b""
        with pytest.raises(FileError, match="another process is writing"):
            journal.add("b", TensorRows())
    assert (journal.path.read_bytes() if journal.path.exists() else b"") == before
