"""Versions of the packages that a figure was made with."""

import platform
from importlib import metadata


def versions(*packages: str) -> dict[str, str]:
    """Package -> its installed version; `python` is the interpreter's.

    Raises:
        PackageNotFoundError: one is not installed.

    >>> sorted(versions("python", "offprincipal"))
    ['offprincipal', 'python']
    """
    return {name: platform.python_version() if name == "python" else metadata.version(name) for name in packages}
