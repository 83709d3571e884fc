"""A journal of the measurements of finished tensors, so that an interrupted comparison continues.

It has one line of JSON per tensor, after its digest, with exact numbers (JSON keeps every digit of a float64) and
arrays in base64. A truncated or damaged line is dropped with all that follow, and their tensors are measured again. The
first line identifies the comparison: other settings or other files start anew.
"""

import base64
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from offprincipal.checkpoints import Part
from offprincipal.comparison.work import Work
from offprincipal.errors import FileError
from offprincipal.file_names import JOURNAL
from offprincipal.files import Identities, exclusively, ordinary, require_folder, sweep, write_atomically
from offprincipal.versions import versions

LOG = logging.getLogger("offprincipal")
T = TypeVar("T")
DECISIVE = ("offprincipal", "numpy", "torch", "safetensors")  # packages that figures depend on
_DIGITS = 16  # of a line's digest, in hexadecimal


@contextmanager
def held(out: str | Path | None) -> Iterator[Path | None]:
    """An output folder, created if it does not exist, and locked against other processes; None without one."""
    if out is None:
        yield None
        return
    folder = Path(out)
    require_folder(folder)
    with exclusively(folder):
        sweep(folder)
        yield folder


@contextmanager
def resumable(
    folder: Path | None,
    work: Work,
    files: Identities,
    restore: Callable[[str, dict[str, Any]], None],
    name: str = JOURNAL,
    known: Collection[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Iterator["Journal | None"]:
    """The journal in a locked folder, after restoring its finished tensors; None without a folder.

    Args:
        files: what is read, as it was when it was opened; restore, name: as `Journal` takes them.
        known: runs of which only what they have in common with others is measured.
        about: more of what is measured, for `rewrite` to read.
    """
    if folder is None:
        yield None
        return
    journal = Journal(folder, journal_key(work, files, known), restore, name, about)
    with journal.opened():
        yield journal


def gather(
    parts: Sequence[Part],
    known: Collection[str],
    measure: Callable[[Sequence[Part]], Iterable[tuple[Part, T]]],
    keep: Callable[[str, T], None],
    journal: "Journal | None",
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Measure the parts that are not known yet, and keep each as it finishes.

    Args:
        known: names of parts measured before.
        measure: measures some parts, in any order.
        keep: called with each part's name and measurement.
        progress: called with entries done, entries in all, and the tensor's name.
    """
    waiting = [part for part in parts if part.name not in known]
    total = sum(part.numel for part in parts)
    done = total - sum(part.numel for part in waiting)
    for part, found in measure(waiting) if waiting else ():
        if journal:
            journal.add(part.name, found)
        keep(part.name, found)
        done += part.numel
        if progress:
            progress(done, total, part.name)


class Journal:
    """Measurements by tensor name, kept in a folder until all are done.

    Args:
        folder: its folder; name: its file name.
        key: identifies the comparison.
        restore: called with each tensor's name and the attributes of its measurement that `add` wrote.
        about: further entries of the first line.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        restore: Callable[[str, dict[str, Any]], None],
        name: str = JOURNAL,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = folder / name
        self._key, self._restore, self._about = key, restore, dict(about or {})
        self._file: IO[bytes] | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the journal and restore finished tensors; while open, `add` appends.

        Raises:
            FileError: it cannot be written, or is a link, a pipe or a folder.
        """
        with self._reported():
            file = _own_file(self.path)
        try:
            with self._reported():
                length = self._read(file)
                file.truncate(length)
                if not length:
                    file.write(_line({"key": self._key} | self._about))
                    file.flush()
            self._file = file
            yield
        finally:
            self._file = None
            with self._reported():
                file.close()

    def add(self, name: str, rows: object) -> None:
        """Append the measurement of one tensor, which survives this process.

        Raises:
            FileError: another process has taken the journal for itself.
        """
        file = self.require_own()
        with self._reported():
            file.write(_line({"tensor": name} | vars(rows)))
            file.flush()

    def require_own(self) -> IO[bytes]:
        """The open file, unless another process, on any machine, has taken over the journal.

        Raises:
            FileError: another process has.
        """
        if self._file is None:
            raise ValueError("the journal is not open")
        if not self._is_ours(self._file):
            raise FileError(
                f"another process is writing to {self.path.parent}: wait for it to end, or choose another --out"
            )
        return self._file

    def discard(self) -> None:
        """Remove the journal: the tables are written."""
        self.path.unlink(missing_ok=True)

    def _is_ours(self, file: IO[bytes]) -> bool:
        """Whether the journal is still the file that was opened, with the same key."""
        try:
            with self.path.open("rb") as now:
                same = os.path.sameopenfile(now.fileno(), file.fileno())
                return same and (_content(now.readline()) or {}).get("key") == self._key
        except OSError:
            return False

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(
                f"cannot write {self.path}: {error.strerror or error}. Free some space or choose another --out"
            ) from error

    def _read(self, file: IO[bytes]) -> int:
        """Restore all intact lines, and return their length; 0 if the key is another."""
        length, done = 0, 0
        file.seek(0)
        for number, line in enumerate(file):
            content = _content(line)
            if content is not None and (number > 0) != ("tensor" in content):
                content = None  # a whole line in another's place
            if content is None or (number == 0 and content.get("key") != self._key):
                if content is None and line.endswith(b"\n"):
                    LOG.warning("%s was damaged after %d tensors: the others are measured again", self.path.name, done)
                break
            length += len(line)
            if number:
                self._restore(content.pop("tensor"), content)
                done += 1
        return length


def rewrite(
    path: Path,
    head: Callable[[dict[str, Any]], dict[str, Any] | None],
    line: Callable[[dict[str, Any]], dict[str, Any] | None],
) -> None:
    """Turn a journal into that of another comparison, whole or not at all; call only while holding the folder's lock.

    Args:
        head: returns the new first line, or None to leave the journal as it is.
        line: returns each further line, or None to drop it.
    """
    if not path.exists():
        return
    with ordinary(path).open("rb") as lines:
        first = _content(next(lines, b""))
        begin = None if first is None else head(first)
        if begin is None:
            return

        def write(part: Path) -> None:
            with part.open("wb") as file:
                file.write(_line(begin))
                for content in map(_content, lines):
                    if content is None or "tensor" not in content:
                        break
                    if (kept := line(content)) is not None:
                        file.write(_line(kept))

        write_atomically(path, write)


def journal_key(work: Work, opened: Identities, known: Collection[str]) -> str:
    """A hash of everything that is compared: settings, versions, configurations, every file's path, size and time."""
    files = [[str(path.resolve()), *identity[:2]] for path, identity in opened.items()]
    configs = [dict(checkpoint.config) for checkpoint in (work.base_checkpoint, *work.runs.values())]
    about = [asdict(work.settings), list(work.tuned), list(known), files, configs, versions(*DECISIVE)]
    about += [secrets.token_hex()] if work.in_memory else []  # a model in memory cannot be recognised later
    return hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode()).hexdigest()


def _own_file(path: Path) -> IO[bytes]:
    """The file, created if it does not exist; never a link, pipe or device.

    Raises:
        OSError: it is one of these, or cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(None, "it is not a regular file")
    return os.fdopen(handle, "a+b")


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, default=_encoded).encode() + b"\n"
    return _digest(text) + b" " + text


def _content(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None if it is truncated or damaged."""
    digest, _, text = line.partition(b" ")
    if digest != _digest(text):
        return None
    found: dict[str, Any] = json.loads(text, object_hook=_decoded)
    return found


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGITS].encode()


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"float64": base64.b64encode(value.astype("<f8").tobytes()).decode("ascii")}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"no place for {type(value)} in the journal")


def _decoded(content: dict[str, Any]) -> Any:
    if content.keys() == {"float64"}:
        return np.frombuffer(base64.b64decode(content["float64"]), "<f8")
    return content
