"""The cache of base decompositions: named tensors under a key, in a folder of limited size.

A file an entry, written whole and renamed, so that processes may share the folder. The least recently used go when it
is full. Knows nothing of what the tensors are.
"""

import contextlib
import os
import stat
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from offprincipal.errors import FileError
from offprincipal.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_LIMIT = 20 * 1024**3
_SUFFIX = ".safetensors"
_CHECKSUM = "crc32"
_ABANDONED = 3600.0  # seconds after which a temporary file is assumed to be left by a killed process

T = TypeVar("T")
Kept = tuple[dict[str, "Tensor"], dict[str, str]]  # tensors by name, and their metadata


@dataclass(frozen=True)
class CacheInfo:
    """Where the cache is, how many matrices it holds, and their size on disk in bytes."""

    folder: Path
    matrices: int
    size: int
    limit: int

    def __str__(self) -> str:
        size, limit = (f"{amount / 1024**3:.2f} GiB" for amount in (self.size, self.limit))
        return f"{self.folder}: {self.matrices:,} matrices, {size} of at most {limit}"


class BaseCache:
    """Decompositions of base matrices in a folder.

    Args:
        folder: created when first written to.
        limit: maximum size in bytes; `$OFFPRINCIPAL_CACHE_LIMIT_GB` or 20 GiB by default.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit if limit is not None else _limit()

    def get(self, key: str, compute: Callable[[], T], keep: Callable[[T], Kept], restore: Callable[[Kept], T]) -> T:
        """The entry of a key, computed if it is missing; a cache that cannot be written is not an error.

        Args:
            key: name of the entry's file, without its ending.
            keep: converts to what is stored.
            restore: converts back, and raises KeyError or ValueError if that is invalid.
        """
        from safetensors import SafetensorError

        path = self.folder / f"{key}{_SUFFIX}"
        with contextlib.suppress(KeyError, ValueError, OSError):
            if (kept := _read(path)) is not None:
                return restore(kept)
        found = compute()
        with contextlib.suppress(FileError, OSError, SafetensorError):  # the disk is full, or the folder has vanished
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: _write(temporary, keep(found)))
            self._shrink(path)
        return found

    def info(self) -> CacheInfo:
        """The number and size of its entries."""
        files = self._files()
        return CacheInfo(self.folder, len(files), sum(size for _, size, _ in files), self.limit)

    def clear(self) -> CacheInfo:
        """Remove all entries, and return their number and size."""
        before = self.info()
        for path in (
            *self.folder.glob(f"*{_SUFFIX}"),
            *self.folder.glob(f".*{_SUFFIX}.*"),
        ):  # and temporary files of killed processes
            path.unlink(missing_ok=True)
        return before

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of last use, size and path of each, the least recently used first."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may just have removed it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _shrink(self, newest: Path) -> None:
        """Evict until within the limit, never the newest entry, which timestamps are too coarse to identify."""
        for left in self.folder.glob(f".*{_SUFFIX}.*"):  # by a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.limit:
                break
            if path == newest:
                continue
            path.unlink(missing_ok=True)
            total -= size


def _limit() -> int:
    try:
        return int(float(os.environ["OFFPRINCIPAL_CACHE_LIMIT_GB"]) * 1024**3)
    except (KeyError, ValueError, OverflowError):
        return DEFAULT_LIMIT


def _write(path: Path, kept: Kept) -> None:
    from safetensors.torch import save_file

    tensors, about = kept
    save_file(tensors, path, metadata=about | {_CHECKSUM: _checksum(tensors, about)})


def _read(path: Path) -> Kept | None:
    """The content of an entry, marked as used; None unless it is intact and owned by this user."""
    from safetensors import SafetensorError, safe_open

    try:
        if not _is_own(path):
            return None
        with safe_open(path, framework="pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if about.pop(_CHECKSUM, None) != _checksum(tensors, about):
        return None
    with contextlib.suppress(OSError):  # it may be another user's, or have been removed since
        os.utime(path)
    return tensors, about


def _is_own(path: Path) -> bool:
    """Whether the file is a regular file owned by this user; others' files are not trusted."""
    about = path.lstat()
    return stat.S_ISREG(about.st_mode) and (not hasattr(os, "getuid") or about.st_uid == os.getuid())


def _checksum(tensors: dict[str, "Tensor"], told: dict[str, str]) -> str:
    """A checksum of all tensors and their metadata, so that a damaged file is computed again."""
    found = zlib.crc32(repr(sorted(told.items())).encode())
    for name in sorted(tensors):
        about = f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}"
        found = zlib.crc32(tensors[name].numpy().reshape(-1).view("u1").data, zlib.crc32(about.encode(), found))
    return f"{found:08x}"
