"""How much memory of this machine or container is free; and, on a CPU, keeping freed memory for the next allocation.

A training step allocates and frees hundreds of tensors of many megabytes. glibc returns each to the kernel, which
clears every page again for the next: with a large vocabulary that takes half the time.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from offprincipal.errors import ArgumentError

SHARE = 0.6  # of the free memory, taken by default: other processes need some too
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNLIMITED = 1 << 60
_CGROUPS = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_RETURN = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 * 2**20}  # as glibc is after its first large blocks
_LEAST = 1 << 20  # bytes: below, a unit was forgotten
_held = 0


def parse_size(text: str) -> int:
    """A size in bytes, from words as `8GB`, `512 MiB` or `1.5g`; units are powers of 1024.

    Raises:
        ArgumentError: it is not a size.

    >>> parse_size("1.5GB"), parse_size("512 MiB")
    (1610612736, 536870912)
    """
    found = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*(?:([kmgt])i?)?b?\s*", text.lower())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < _LEAST:  # of a number without its unit, too
        raise ArgumentError(f"'{text}' is not a usable amount of memory: give one such as 8GB or 512MB")
    return size


def free_memory() -> int:
    """Bytes that this process could allocate: free on the machine, or in its cgroup if that allows less."""
    free = [_of_machine(), *(_left_in(folder) for folder in _cgroups())]
    return max(min(free), 0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep memory that is freed inside for later allocations, until the outermost of these blocks ends.

    No computed value depends on it. It does nothing if the C library is not glibc, or if another allocator was loaded
    first. Memory gets fragmented, so call `return_freed_memory_if_scarce` now and then.
    Source: mallopt(3).

    >>> with freed_memory_kept():
    ...     blocks = [bytearray(2**24) for _ in range(8)]
    """
    global _held
    libc = _glibc()
    if libc is None:
        yield
        return
    _held += 1
    _choose(libc, _KEEP)
    try:
        yield
    finally:
        _held -= 1
        if not _held:
            _choose(libc, _RETURN)
            return_freed_memory()


def return_freed_memory() -> None:
    """Have glibc return what it freed and keeps: what is still held lies between freed buffers, and pins them."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def return_freed_memory_if_scarce() -> bool:
    """Return freed memory to the kernel if less is free than half of what this process holds; whether it was."""
    libc = _glibc()
    if libc is None or not _held or free_memory() >= _resident() / 2:
        return False
    return_freed_memory()
    return True


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "malloc_trim") else None


def _choose(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)


def _resident() -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux: half of the whole is likely to be free
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (OSError, ValueError, AttributeError):
            return _UNLIMITED


def _cgroups() -> list[Path]:
    """The folders of this process's cgroup and of those that it lies in, of version 2 and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _CGROUPS / controllers
            own = root / path.strip("/")
            found += [own, *(above for above in own.parents if above.is_relative_to(root))]
    return list(dict.fromkeys(found))


def _left_in(folder: Path) -> int:
    """What a cgroup has left, its page cache counted as free, which the kernel takes back when it is needed."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((folder / limit).read_text(encoding="ascii"))
            taken = int((folder / used).read_text(encoding="ascii"))
            statistics = dict(
                line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            )
            return most - taken + int(statistics.get(cache, 0))
        except (OSError, ValueError):  # none of this version, or no limit
            continue
    return _UNLIMITED
