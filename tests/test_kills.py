"""Killed at any moment, a command leaves nothing that is half written, and the same command ends with the same bytes.

And where two hosts share a folder and their locks do not see each other, nothing of one stands among what is of the
other. `make faults` kills some hundred times.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_folders import base_weights, moved, stored, tables_in, write_model
from faults import TIMES, times

KILLS = times(1)  # of each command
PAIRS = times(2)
_TIMED = {"run.json", "trainer_state.json", "trajectory.html"}  # hold seconds, or ids that are drawn
Command = Callable[[Path, Path, Path], list[str]]  # of a folder of checkpoints, a language model, and an output folder

COMMANDS: dict[str, Command] = {
    "compare": lambda given, model, out: ["compare", f"{given}/base", f"{given}/a", "--no-report", "--out", f"{out}/c"],
    "trajectory": lambda given, model, out: ["trajectory", f"{given}/base", f"{given}/steps", "--out", f"{out}/t"],
    "delta": lambda given, model, out: ["delta", f"{given}/base", f"{given}/a", "--out", f"{out}/a.delta"],
    "apply": lambda given, model, out: ["apply", f"{given}/base", f"{given}/a.delta", "--out", f"{out}/back"],
    "intervene": lambda given, model, out: ["intervene", f"{model}", "--rotate", "0", "--out", f"{out}/turned"],
    "train": lambda given, model, out: [
        *("train", "sft_own", "--model", f"{model}", "--task", "count@1", "--steps", "4", "--batch", "8"),
        *("--set", "eval_prompts=0", "--set", "save_every=1", "--set", "device=cpu", "--out", f"{out}/run"),
    ],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of it and its delta, and three checkpoints of another."""
    folder, weights = tmp_path_factory.mktemp("kills"), base_weights()
    write_model(folder / "base", weights)
    write_model(folder / "a", stored(moved(weights, 1e-3, 5)))
    for step in (1, 2, 3):
        write_model(folder / "steps" / f"checkpoint-{step}", stored(moved(weights, 1e-3 * step, 6)))
    run(COMMANDS["delta"](folder, folder, folder))
    return folder


def start(arguments: list[str], before: str = "pass") -> subprocess.Popen[bytes]:
    program = f"import sys; {before}; from offprincipal.cli import main; sys.argv[1:] = {arguments!r}; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def run(arguments: list[str]) -> None:
    process = start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def content(out: Path) -> dict[str, bytes]:
    """What a command leaves for its reader, without what holds seconds."""
    found = (path for path in out.rglob("*") if path.is_file() and path.name not in _TIMED)
    kept = {str(path.relative_to(out)): path.read_bytes() for path in found if not is_hidden(path.relative_to(out))}
    return {name: held for name, held in kept.items() if "checkpoints" not in name and "journal" not in name}


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    name: str, given: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command, chance, killed = COMMANDS[name], random.Random(f"{name} {TIMES}"), 0
    run(command(given, tiny_model, tmp_path / "whole"))  # compiles what the others find compiled
    began = time.monotonic()
    run(command(given, tiny_model, tmp_path / "again"))
    took, whole = time.monotonic() - began, content(tmp_path / "whole")
    assert whole and content(tmp_path / "again") == whole
    for kill in range(KILLS):
        out = tmp_path / f"killed{kill}"
        for _ in range(chance.choice([1, 1, 2])):  # again on the way, now and then
            process = start(command(given, tiny_model, out))
            time.sleep(took * chance.uniform(0.2, 0.95))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
            process.wait()
            left = content(out)
            changed = [path for path, held in left.items() if held != whole.get(path)]
            assert not changed, f"kill {kill}: {changed} are not as they end"
        if content(out) != whole:  # else it was done, and some commands refuse to do it over
            run(command(given, tiny_model, out))
        assert content(out) == whole, kill
        hidden = [path for path in out.rglob(".*") if path.is_file() and not path.name.endswith(".lock")]
        assert not hidden, hidden
        shutil.rmtree(out)
    print(f"{name}: {killed} kills")


UNSEEN = "import fcntl; fcntl.flock = lambda *a: None; fcntl.lockf = lambda *a: None"  # locks of another domain


def test_two_hosts_whose_locks_do_not_see_each_other_never_mix(given: Path, tmp_path: Path) -> None:
    """Each ends with its own tables, or is told of the other; the folder holds those of one."""
    chance, expected = random.Random(PAIRS), {}
    for alpha in ("0.3", "0.5"):
        run([*COMMANDS["compare"](given, given, tmp_path / alpha), "--density", alpha])
        expected[alpha] = tables_in(tmp_path / alpha / "c")
    ended = 0
    for pair in range(PAIRS):
        out = tmp_path / f"pair{pair}"
        both = []
        for alpha in ("0.3", "0.5"):
            both.append(start([*COMMANDS["compare"](given, given, out), "--density", alpha], UNSEEN))
            time.sleep(chance.choice([0.0, 0.0, 0.2, 0.5]))
        told = [(process.communicate()[1].decode(), process.returncode) for process in both]
        assert all(code in (0, 2) for _, code in told), told
        assert all("another process is writing" in said for said, code in told if code == 2), told
        if any(code == 0 for _, code in told):
            ended += 1
            assert tables_in(out / "c") in expected.values(), pair
    assert ended
