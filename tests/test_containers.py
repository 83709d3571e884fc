"""Where people run it: containers without a home, a name or a folder to write to, and consoles of another encoding."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_folders import base_and_two_runs

from offprincipal.comparison import compare
from offprincipal.errors import FileError

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
            assert home or "base decompositions are not cached" in done.stderr


def test_loops_are_compiled_where_nothing_can_keep_them() -> None:
    program = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from offprincipal.geometry import bits, cuts\n"
        "print(bits.bf16_codes(np.ones((2, 2), np.float32)).shape, cuts.mask_size(4, 0.5))\n"
    )
    done = run([sys.executable, "-c", program], HOME="/tmp")
    assert done.returncode == 0 and done.stdout.startswith("(2, 2) 2"), done.stderr
    assert done.stderr.count("compiled loops are not cached") == 1 and "NUMBA_CACHE_DIR" in done.stderr


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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.ESTALE])
def test_a_file_system_that_does_not_lock_is_said(number: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """NFS without its lock daemon, a disk that fails."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr("fcntl.flock", refuse)
        with pytest.raises(FileError, match=rf"cannot lock .*{os.strerror(number)}"):
            compare(*pair, metrics="changes", out=tmp_path / "out")
    assert compare(*pair, metrics="changes", out=tmp_path / "out").matrices


@pytest.mark.parametrize("name", ["summary.json", "matrices.parquet", "measured.json", "report.html"])
def test_what_stands_in_an_outputs_place_is_replaced_and_not_followed(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A link, which may lead anywhere, and a pipe, which would be waited for."""
    base, tuned = pair
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("not ours")
    for what in ("a link", "a pipe"):
        out = tmp_path / what
        out.mkdir()
        (out / name).symlink_to(elsewhere) if what == "a link" else os.mkfifo(out / name)
        done = run([*COMPARE, str(base), str(tuned), "--metrics", "changes", "--out", str(out)], HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert elsewhere.read_text() == "not ours" and (out / name).is_file() and not (out / name).is_symlink()


def test_a_folder_in_an_outputs_place_is_said_and_nothing_is_measured_twice(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    out = tmp_path / "out"
    (out / "masks.parquet").mkdir(parents=True)
    command = [*COMPARE, str(base), str(tuned), "--metrics", "location", "--out", str(out)]
    done = run(command, HOME=str(tmp_path))
    assert done.returncode == 2 and "masks.parquet" in done.stderr and "Traceback" not in done.stderr
    assert (out / "journal.jsonl").exists()  # from which the next goes on
    (out / "masks.parquet").rmdir()
    assert run(command, HOME=str(tmp_path)).returncode == 0


def test_folders_and_files_of_others_are_said(pair: tuple[Path, Path]) -> None:
    import tempfile

    if shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("needs root, and setpriv")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        work = Path(folder)
        work.chmod(0o777)
        base, tuned = (Path(shutil.copytree(side, work / side.name)) for side in pair)
        for at in (base, tuned, *base.iterdir(), *tuned.iterdir()):
            at.chmod(0o755 if at.is_dir() else 0o644)
        if run([*NOBODY, sys.executable, "-c", "import numba"], HOME="/").returncode:
            pytest.skip("this interpreter is closed to other users")
        (work / "closed").mkdir(mode=0o700)  # a run's root that cannot be listed
        (work / "out").mkdir()
        (work / "out").chmod(0o777)
        (work / "out" / "summary.json").write_text("{}")  # another user's, in a folder where all may write
        for arguments, code in (
            ([str(base), str(work / "closed"), "--out", str(work / "none")], 2),
            ([str(base), str(tuned), "--out", str(work / "closed" / "out")], 2),
            ([str(base), str(tuned), "--out", str(work / "out"), "--metrics", "changes", "--overwrite"], 0),
        ):
            done = run([*NOBODY, *COMPARE, *arguments], HOME="/")
            assert done.returncode == code and "Traceback" not in done.stderr, (arguments, done.stderr)
