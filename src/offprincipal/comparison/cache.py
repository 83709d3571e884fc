"""The cache of decomposed bases: triplets, masks and class counts, by what they were computed from.

A file a matrix, named after the hash of its bytes and of the settings that decide the decomposition, so that a base is
decomposed once, whichever checkpoint it lies in. Files are written whole and renamed; processes may share the folder.
The least recently used go when it is full.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offprincipal.errors import FileError
from offprincipal.files import write_atomically

if TYPE_CHECKING:
    from offprincipal.comparison.pair import BaseMatrix
    from offprincipal.comparison.spectral import BaseDecomposition

DEFAULT_LIMIT = 20 * 1024**3
_FORMAT = "1"
_SUFFIX = ".safetensors"


def cache_folder() -> Path:
    """Where bases are kept: `$OFFPRINCIPAL_CACHE`, or `offprincipal/bases` under the user's cache folder."""
    if chosen := os.environ.get("OFFPRINCIPAL_CACHE"):
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "offprincipal" / "bases"


@dataclass(frozen=True)
class CacheInfo:
    """Where the cache is, how many matrices it holds, and their size on disk in bytes."""

    folder: Path
    matrices: int
    size: int
    limit: int


class BaseCache:
    """Decompositions of base matrices in a folder.

    Args:
        folder: made when first written to.
        limit: bytes that it may hold; `$OFFPRINCIPAL_CACHE_LIMIT_GB` or 20 GiB by default.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit if limit is not None else _limit()

    def get(self, base: "BaseMatrix", decompose: Callable[[], "BaseDecomposition"]) -> "BaseDecomposition":
        """The decomposition of a base, computed where it is not kept; a cache that cannot be written is no error."""
        path = self.folder / f"{_key(base)}{_SUFFIX}"
        found = _read(path)
        if found is None:
            found = decompose()
            with contextlib.suppress(FileError, OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda temporary: _write(temporary, found))
                self._shrink()
        return found

    def info(self) -> CacheInfo:
        """How full it is."""
        files = self._files()
        return CacheInfo(self.folder, len(files), sum(size for _, size, _ in files), self.limit)

    def clear(self) -> CacheInfo:
        """Remove all that it holds, and say how much that was."""
        before = self.info()
        for _, _, path in self._files():
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

    def _shrink(self) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in files[:-1]:  # the newest stays, whatever its size
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def _limit() -> int:
    try:
        return int(float(os.environ["OFFPRINCIPAL_CACHE_LIMIT_GB"]) * 1024**3)
    except (KeyError, ValueError, OverflowError):
        return DEFAULT_LIMIT


def _key(base: "BaseMatrix") -> str:
    settings = base.settings
    decides = (settings.rank_fraction, settings.densities, settings.solver, settings.tolerance, settings.seed)
    about = (
        f"{_FORMAT}/{base.weight.shape}/{base.weight.dtype}/{base.spectral.exact}/{base.spectral.device.type}/{decides}"
    )
    digest = hashlib.sha256(about.encode())
    digest.update(base.weight.view("u1").data)
    return digest.hexdigest()[:40]


def _write(path: Path, found: "BaseDecomposition") -> None:
    from safetensors.torch import save_file

    from offprincipal.comparison.spectral import to_tensors

    tensors, about = to_tensors(found)
    save_file(tensors, path, metadata=about)


def _read(path: Path) -> "BaseDecomposition | None":
    """What is kept, marked as used; None where there is nothing, or nothing that can be read."""
    from safetensors import SafetensorError, safe_open

    from offprincipal.comparison.spectral import from_tensors

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = from_tensors(tensors, file.metadata() or {})
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    with contextlib.suppress(OSError):  # it may be another user's, or have been removed since
        os.utime(path)
    return found
