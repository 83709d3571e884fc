"""Compiled loops: numba's, kept between processes if there is a folder to keep them in."""

import logging
from collections.abc import Callable
from typing import Any

from numba import njit

_LOG = logging.getLogger("offprincipal")
_told = False


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at first use, to run without the interpreter's lock, and cache the result.

    If neither the package's folder nor the user's can be written, as in a container without a home, it is compiled
    again in every process, with a warning.

    Args:
        options: options of `numba.njit`.

    >>> @compiled()
    ... def double(x):
    ...     return 2 * x
    >>> double(21)
    42
    """

    def decorate(function: Callable[..., Any]) -> Any:
        global _told
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder to keep it in
            if not _told:
                _told = True
                _LOG.warning(
                    "compiled loops are not cached, which costs some seconds in every process: neither the package's "
                    "folder nor a home can be written. Set NUMBA_CACHE_DIR to a writable folder"
                )
            return njit(nogil=True, **options)(function)

    return decorate
