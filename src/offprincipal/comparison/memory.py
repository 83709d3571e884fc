"""How much memory a comparison may take: a budget, what is free of this machine or container, what a matrix needs.

The budget decides how many matrices are measured at once, never how: the numbers do not depend on it.
"""

import os
import re
from pathlib import Path

from offprincipal.checkpoints import Part
from offprincipal.comparison.work import Work
from offprincipal.errors import ArgumentError
from offprincipal.measures.columns import decomposes_base

SHARE = 0.6  # of what is free, by default: other processes want some too
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNLIMITED = 1 << 60
_CGROUPS = Path("/sys/fs/cgroup")


def parse_size(text: str) -> int:
    """A size in bytes, from words as `8GB`, `512 MiB` or `1.5g`; units are powers of 1024.

    Raises:
        ArgumentError: it is no such size.

    >>> parse_size("1.5GB"), parse_size("512 MiB")
    (1610612736, 536870912)
    """
    found = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([kmgt]?)i?b?\s*", text.lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ArgumentError(f"'{text}' is no amount of memory: give one such as 8GB or 512MB")
    return size


def free_memory() -> int:
    """Bytes that this process could take: of the machine, or of its cgroup where that allows less."""
    free = [_of_machine(), *(_left_in(folder) for folder in _cgroups())]
    return max(min(free), 0)


def bytes_needed(work: Work, part: Part) -> int:
    """What measuring one tensor takes at most, beside what every comparison takes.

    Measured on matrices of 1 to 45 million entries (`benchmarks/RESULTS.md`, e), and rounded up.
    """
    if not work.is_linear(part) or work.settings.metrics == ("changes",):
        return 1 << 26  # read in blocks
    runs, masters = len(work.runs), len(work.masters)
    if decomposes_base(work.settings.metrics):
        entry, each = 48, 8
    elif "update" in work.settings.metrics:
        entry, each = 18, 8
    else:
        entry, each = 10, 6
    return part.numel * (entry + (each + 2) * runs + 12 * masters)


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
