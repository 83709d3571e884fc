"""Files that we write: whole or absent. Knows nothing of what is in them, but that JSON holds no NaN."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from offprincipal.errors import FileError

_LOCK = ".offprincipal.lock"
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_UMASK = os.umask(0o077)  # it can only be asked for by setting it
os.umask(_UMASK)
Identities = dict[Path, tuple[int, int, int]]
_PATIENCE = 5.0  # seconds: a process that was just killed may still be on its way out


def require_folder(out: Path) -> None:
    """Make an output folder, or say why that cannot be.

    Raises:
        FileError: it is a file, or it may not be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the output folder {out}: {error.strerror}. Choose another --out") from error
    if not os.access(out, os.W_OK):
        raise FileError(f"the output folder {out} may not be written: choose another --out")


@contextmanager
def exclusively(out: Path, beside: bool = False) -> Iterator[None]:
    """Hold a folder against other processes, of this machine or another that sees it; a killed one lets go by itself.

    The lock lies in the folder and goes when it is let go.

    Args:
        beside: the lock lies beside the folder, which may not be there yet, or is replaced as a whole.

    Raises:
        FileError: another process holds it, and did not let go within five seconds; or it cannot be locked.
    """
    path = out.parent / f".{out.name}{_LOCK}" if beside else out / _LOCK
    lock = FileLock(path, timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileError(f"another process is writing to {out}: wait for it to end, or choose another --out") from error
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror or error
        raise FileError(f"cannot lock {path}: {reason}. Remove it, or choose another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # who waits for it sees that it is gone, and makes another
        lock.release()


def follow_umask(folder: Path) -> None:
    """Give a folder that we made, and what is in it, the modes that the umask leaves: libraries write some 0600."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)


@contextmanager
def new_folder(
    out: Path, marks: tuple[str, ...], overwrite: bool, kept: tuple[Path | None, ...], what: str
) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when the block ends well and removed when it does not.

    Args:
        out: absent or empty; with `overwrite` it may hold one of the files `marks`, and is then replaced.
        kept: folders that are read from, which may not be replaced.
        what: is written there: "an intervention".

    Raises:
        FileError: `out` holds something else or a folder that is read from, cannot be written, or another process is
            writing there.
    """
    out = out.expanduser().resolve()
    require_folder(out.parent)
    with exclusively(out, beside=True):
        _require_replaceable(out, marks, overwrite, kept, what)
        part = out.parent / f".{out.name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        require_folder(part)
        try:
            yield part
            follow_umask(part)
            _replace_folder(out, part)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FileError(f"cannot write {out}: {reason}. Free some space or choose another --out") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _require_replaceable(
    out: Path, marks: tuple[str, ...], overwrite: bool, kept: tuple[Path | None, ...], what: str
) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileError(f"output path {out} is a file: name a folder")
    if not any(out.iterdir()):
        return
    if any(folder is not None and folder.resolve().is_relative_to(out.resolve()) for folder in kept):
        raise FileError(f"output folder {out} holds a model that is read: choose another --out")
    if not any((out / mark).is_file() for mark in marks):
        raise FileError(f"output folder {out} holds files that are not {what}'s: choose another --out")
    if not overwrite:
        raise FileError(f"output folder {out} holds {what}: choose another --out, or --overwrite (overwrite=True) it")


def _replace_folder(out: Path, part: Path) -> None:
    """Put a finished folder in the place of what is there, which is gone only when the other is in its place."""
    if not out.exists():
        part.rename(out)
        return
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    part.rename(out)
    shutil.rmtree(old)


@contextmanager
def disk_faults_reported(out: Path) -> Iterator[None]:
    """Whatever library meets a full or failing disk, and in whatever words, it is said in ours.

    Raises:
        FileError: one did.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _disk_fault(error)
        if reason is None:
            raise
        raise FileError(
            f"cannot write {out}: {reason}. Free some space and run the same command again: it goes on where it was"
        ) from error


def _disk_fault(error: Exception) -> str | None:
    """What is wrong with the disk; None where something else is."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _DISK_FAULTS else None
    said = str(error)
    number = re.search(r"(?:os error|Os \{ code:) ([0-9]{1,3})", said)  # as Rust writes it, now and in safetensors 0.4
    if number is not None and int(number[1]) in _DISK_FAULTS:
        return os.strerror(int(number[1]))
    torchs = "inline_container" in said or "PytorchStreamWriter" in said or "file write failed" in said
    return "the disk is full or failing" if torchs else None


def identities(paths: Iterable[Path]) -> Identities:
    """Size, time and number of each file.

    Raises:
        FileError: one is gone.
    """
    found = {}
    for path in paths:
        try:
            about = path.stat()
        except OSError as error:
            raise FileError(f"{path} is gone while it was being read: put it back and run the command again") from error
        found[path] = (about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def require_unchanged(known: Identities) -> None:
    """Check that files are those that they were.

    Raises:
        FileError: one was replaced, written to, or is gone.
    """
    for path, identity in identities(known).items():
        if identity != known[path]:
            raise FileError(
                f"{path} changed while it was being read, so that what was measured is of two files: let the writing "
                "end, and run the command again"
            )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it; nothing is left behind if it fails.

    Raises:
        FileError: the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_UMASK)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if not path.parent.is_dir():
            raise FileError(f"cannot write {path}: there is no folder {path.parent}. Make it first") from error
        reason = error.strerror or error
        raise FileError(f"cannot write {path}: {reason}. Free some space or choose another --out") from error


def sweep(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder when its process was killed; for who holds the folder alone."""
    for path in folder.glob(".*.????????"):
        if re.fullmatch(r"\.[\w.-]+\.(?:parquet|json|html)\.[a-z0-9_]{8}", path.name) and path.is_file():
            with suppress(OSError):
                path.unlink()


def ordinary(path: Path) -> Path:
    """The path of a file that may be read: a pipe would be waited for, a device has no end.

    Raises:
        OSError: it is no ordinary file, or is not there.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no ordinary file")
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that holds no NaN, whole or not at all.

    Raises:
        FileError: the file cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    bits = text.encode("utf-8", "backslashreplace")  # of names that are no text; JSON writes them so
    write_atomically(path, lambda temporary: temporary.write_bytes(bits))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that we wrote.

    Raises:
        FileError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(ordinary(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that offprincipal wrote") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} holds no JSON object. Give a folder that offprincipal wrote")
    return content


def cache_folder() -> Path:
    """Where bases are kept: `$OFFPRINCIPAL_CACHE`, or `offprincipal/bases` under the user's cache folder.

    Raises:
        FileError: the user has no home, and neither variable is set.
    """
    if chosen := os.environ.get("OFFPRINCIPAL_CACHE"):
        return Path(chosen)
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise FileError("there is no home folder to keep bases in: set OFFPRINCIPAL_CACHE to a folder") from error
    return user / "offprincipal" / "bases"
