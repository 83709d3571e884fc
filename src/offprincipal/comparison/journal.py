"""The journal of a comparison: the rows of every tensor that is done, so that a killed comparison goes on where it was.

One line of JSON a tensor behind its digest, numbers as they are (JSON keeps every digit of a float64), arrays in
base64. A line that a kill cut short or that was damaged is dropped with all that follow, and their tensors are measured
again. The first line says what is being compared: other settings or other files start anew.
"""

import base64
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from offprincipal.comparison.measure import TensorRows
from offprincipal.errors import FileError

NAME = "journal.jsonl"
LOG = logging.getLogger("offprincipal")
_DIGITS = 16  # of a line's digest, in hexadecimal


class Journal:
    """Rows by the name of their tensor, kept in a folder until the comparison is whole.

    Args:
        folder: where the comparison is written.
        key: what is compared, as text.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / NAME
        self._key = key
        self._file: IO[bytes] | None = None

    @contextmanager
    def opened(self) -> Iterator[dict[str, TensorRows]]:
        """What is already done; while open, `add` keeps more.

        Raises:
            FileError: it cannot be written, or is a link, a pipe or a folder.
        """
        with self._reported():
            file = _own_file(self.path)
        try:
            with self._reported():
                done, length = self._read(file)
                file.truncate(length)
                if not length:
                    file.write(_line({"key": self._key}))
                    file.flush()
            self._file = file
            yield done
        finally:
            self._file = None
            with self._reported():
                file.close()

    def add(self, name: str, rows: TensorRows) -> None:
        """Keep the rows of one tensor; they outlive this process.

        Raises:
            FileError: another process has taken the journal for itself.
        """
        if self._file is None:
            raise ValueError("the journal is not open")
        if not self._is_ours(self._file):
            raise FileError(
                f"another process is writing to {self.path.parent}: wait for it to end, or choose another --out"
            )
        with self._reported():
            self._file.write(_line({"tensor": name} | vars(rows)))
            self._file.flush()

    def discard(self) -> None:
        """Remove the journal: the tables are written."""
        self.path.unlink(missing_ok=True)

    def _is_ours(self, file: IO[bytes]) -> bool:
        """Whether the journal is still the file that was opened, of the comparison that it was opened for."""
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

    def _read(self, file: IO[bytes]) -> tuple[dict[str, TensorRows], int]:
        """Rows by tensor, and the length of the lines that are whole; nothing where the key is another."""
        done: dict[str, TensorRows] = {}
        length = 0
        file.seek(0)
        for number, line in enumerate(file):
            content = _content(line)
            if content is None or (number == 0 and content.get("key") != self._key):
                if content is None and line.endswith(b"\n"):
                    LOG.warning("%s was damaged after %d tensors: the others are measured again", NAME, len(done))
                break
            length += len(line)
            if number:
                name = content.pop("tensor")
                done[name] = TensorRows(**content)
        return done, length


def _own_file(path: Path) -> IO[bytes]:
    """The file, made where there is none; never what a link leads to, and no pipe or device.

    Raises:
        OSError: it is one, or cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(None, "it is no file")
    return os.fdopen(handle, "a+b")


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, default=_encoded).encode() + b"\n"
    return _digest(text) + b" " + text


def _content(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None where it is cut short or not as it was written."""
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
