"""Writing files whole or not at all. Knows nothing about their content, except that JSON has no NaN."""

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
    """Create an output folder if it does not exist.

    Raises:
        FileError: the path is a file, or the folder cannot be created or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the output folder {out}: {error.strerror}. Choose another --out") from error
    if not os.access(out, os.W_OK):
        raise FileError(f"the output folder {out} may not be written: choose another --out")


@contextmanager
def exclusively(out: Path, beside: bool = False) -> Iterator[None]:
    """Lock a folder against other processes, on this machine or another that shares it.

    A killed process releases its lock. The lock is a file in the folder, and is removed when it is released.

    Args:
        beside: put the lock next to the folder instead, which may not exist yet or may be replaced as a whole.

    Raises:
        FileError: another process holds the lock for more than five seconds; or the folder cannot be locked.
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
            path.unlink(missing_ok=True)  # a waiting process sees that it is gone, and creates another
        lock.release()


def follow_umask(folder: Path) -> None:
    """Give a folder that we created, and its content, the modes of the umask: libraries write some files as 0600."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)


@contextmanager
def new_folder(
    out: Path, marks: tuple[str, ...], overwrite: bool, kept: tuple[Path | None, ...], what: str
) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` if the block succeeds and removed if it fails.

    Args:
        out: absent or empty; with `overwrite` it may contain one of the files `marks`, and is then replaced.
        kept: folders that are read from, which must not be replaced.
        what: name of the content for messages, e.g. "an intervention".

    Raises:
        FileError: `out` contains other files or a folder that is read from, cannot be written, or another process is
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
        raise FileError(f"output path {out} is a file: give a folder")
    if not any(out.iterdir()):
        return
    if any(folder is not None and folder.resolve().is_relative_to(out.resolve()) for folder in kept):
        raise FileError(f"output folder {out} contains a model that is being read: choose another --out")
    if not any((out / mark).is_file() for mark in marks):
        raise FileError(f"output folder {out} contains other files than {what}: choose another --out")
    if not overwrite:
        raise FileError(
            f"output folder {out} contains {what}: choose another --out, or pass --overwrite (overwrite=True)"
        )


def _replace_folder(out: Path, part: Path) -> None:
    """Replace what is at `out` by a finished folder; the old content is removed only after that."""
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
    """Turn any library's disk-full or I/O error into FileError.

    Raises:
        FileError: the disk is full or failing.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _disk_fault(error)
        if reason is None:
            raise
        raise FileError(
            f"cannot write {out}: {reason}. Free some space and run the same command again: it continues from there"
        ) from error


def _disk_fault(error: Exception) -> str | None:
    """What is wrong with the disk; None if the error has another cause."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _DISK_FAULTS else None
    said = str(error)
    number = re.search(r"(?:os error|Os \{ code:) ([0-9]{1,3})", said)  # as Rust writes it, now and in safetensors 0.4
    if number is not None and int(number[1]) in _DISK_FAULTS:
        return os.strerror(int(number[1]))
    torchs = "inline_container" in said or "PytorchStreamWriter" in said or "file write failed" in said
    return "the disk is full or failing" if torchs else None


def identities(paths: Iterable[Path]) -> Identities:
    """Size, modification time and inode of each file.

    Raises:
        FileError: a file is gone.
    """
    found = {}
    for path in paths:
        try:
            about = path.stat()
        except OSError as error:
            raise FileError(
                f"{path} disappeared while it was being read: restore it and run the command again"
            ) from error
        found[path] = (about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def require_unchanged(known: Identities) -> None:
    """Check that files have not changed.

    Raises:
        FileError: a file was replaced, written to, or is gone.
    """
    for path, identity in identities(known).items():
        if identity != known[path]:
            raise FileError(
                f"{path} changed while it was being read, so the results would mix two versions: wait until nothing "
                "writes to it, and run the command again"
            )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it; nothing is left behind if it fails.

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
            raise FileError(f"cannot write {path}: there is no folder {path.parent}. Create it first") from error
        reason = error.strerror or error
        raise FileError(f"cannot write {path}: {reason}. Free some space or choose another --out") from error


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that killed processes left; call only while holding the lock.

    Args:
        folder: that of the files; without a name, the one that is locked.
        name: of the one file that is locked.
    """
    names = r"[\w.-]+\.(?:parquet|json|html)" if name is None else re.escape(name)
    for path in folder.glob(".*.????????"):
        if re.fullmatch(rf"\.{names}\.[a-z0-9_]{{8}}", path.name) and path.is_file():
            with suppress(OSError):
                path.unlink()


def ordinary(path: Path) -> Path:
    """The path, if it is an ordinary file: reading a pipe could wait forever, a device might never end.

    Raises:
        OSError: it is not an ordinary file, or does not exist.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not an ordinary file")
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON without NaN, whole or not at all.

    Raises:
        FileError: the file cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    bits = text.encode("utf-8", "backslashreplace")  # names may not be valid text
    write_atomically(path, lambda temporary: temporary.write_bytes(bits))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that we wrote.

    Raises:
        FileError: it cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(ordinary(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that offprincipal wrote") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} does not contain a JSON object. Give a folder that offprincipal wrote")
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
