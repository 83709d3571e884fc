"""What running a model on a CPU asks of the C library's allocator. Knows nothing of models.

A step of training makes and frees hundreds of tensors of many megabytes. glibc hands each back to the kernel, which
clears every page anew when the next is made: for a model with a large vocabulary that is half the time.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_RETURN = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 * 2**20}  # as glibc is after its first large blocks
_held = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Memory freed inside stays with the process for what is made next, and goes back when the outermost of these ends.

    No computed value depends on it. Nothing happens where the C library is not glibc, nor to an allocator that was
    loaded before it. Source: mallopt(3).

    >>> with freed_memory_kept():
    ...     tensors = [torch.zeros(2**22) for _ in range(8)]
    """
    global _held
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
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
            libc.malloc_trim(0)


def _choose(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
