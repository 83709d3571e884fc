"""Where people run it: containers without a home, a name or a folder to write to, and consoles of another encoding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_folders import base_and_two_runs

COMPARE = [sys.executable, "-m", "offprincipal", "compare"]
NOBODY = ["setpriv", "--reuid", "2000", "--regid", "2000", "--clear-groups"]


def run(command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        command, env=kept | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, errors="replace"
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, runs = base_and_two_runs(tmp_path / "models")
    return base, runs["a"]


def test_a_user_without_home_or_name_measures_and_is_told_what_is_not_kept(pair: tuple[Path, Path]) -> None:
    import tempfile

    if shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("needs root, and setpriv")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is closed to others
        work = Path(folder)
        work.chmod(0o777)
        base, tuned = (Path(shutil.copytree(side, work / side.name)) for side in pair)
        for at in work.rglob("*"):
            at.chmod(0o777 if at.is_dir() else 0o644)
        if run([*NOBODY, sys.executable, "-c", "import numba"], HOME="/").returncode:
            pytest.skip("this interpreter is closed to other users")
        for i, home in enumerate(({"HOME": "/"}, {"HOME": "/nonexistent"}, {})):
            (work / str(i)).mkdir()
            (work / str(i)).chmod(0o777)
            command = [*COMPARE, str(base), str(tuned), "--out", str(work / str(i)), "--metrics", "location"]
            done = run([*NOBODY, *command], **home)
            assert done.returncode == 0, done.stderr
            assert (work / str(i) / "summary.json").exists()
            assert home or "decomposed bases are not kept" in done.stderr


def test_loops_are_compiled_where_nothing_can_keep_them() -> None:
    program = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from offprincipal.geometry import scan\n"
        "print(scan.bf16_codes(np.ones((2, 2), np.float32)).shape, scan.mask_size(4, 0.5))\n"
    )
    done = run([sys.executable, "-c", program], HOME="/tmp")
    assert done.returncode == 0 and done.stdout.startswith("(2, 2) 2"), done.stderr
    assert done.stderr.count("compiled loops are not kept") == 1 and "NUMBA_CACHE_DIR" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_of_another_encoding_shows_what_it_can(
    encoding: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    console = {"HOME": str(tmp_path), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = run([*COMPARE, str(base), f"größe→🙂={tuned}", "--out", str(tmp_path / "out")], **console)
    assert done.returncode == 0, done.stderr
    assert "spectral shift" in done.stdout and "?" in done.stdout
    wrong = run(
        [*COMPARE, str(base), "größe→🙂", "--out", str(tmp_path / "x")], HOME=str(tmp_path), PYTHONIOENCODING=encoding
    )
    assert wrong.returncode == 2 and "error:" in wrong.stderr


def test_a_path_that_holds_an_equals_sign_is_named_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    shutil.copytree(tuned, tmp_path / "lr=1e-5,seed=0" / "checkpoint-5")
    there, absent = (str(tmp_path / f"lr=1e-5,seed={seed}" / "checkpoint-5") for seed in (0, 1))
    command = [*COMPARE, str(base), "--metrics", "location", "--out", str(tmp_path / "out")]
    assert run([*command, there, f"rl={there}"], HOME=str(tmp_path)).returncode == 0
    wrong = run([*command, absent], HOME=str(tmp_path))
    assert wrong.returncode == 2 and absent in wrong.stderr.replace("\n", "")
