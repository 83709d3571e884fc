"""The one error hierarchy: every message says what is wrong, where, and what to do.

The command line turns any `OffPrincipalError` into a message and exit code 2; nothing else is caught.
"""

import json
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlparse
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """The command that installs one of our extras from the same source: an index, or a folder such as a clone.

    >>> "[train]" in install_command("train")
    True
    """
    try:
        origin = json.loads(distribution("offprincipal").read_text("direct_url.json") or "{}")
        url = urlparse(origin.get("url", ""))
        if url.scheme == "file":
            editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
            return f"pip install {editable}'{url2pathname(url.path)}[{extra}]'"
    except (
        PackageNotFoundError,
        ValueError,
        AttributeError,
        OSError,
    ):  # not installed, or by an installer that records no source
        pass
    return f"pip install 'offprincipal[{extra}]'"


def meant(given: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown name: the known names that are close to it, or `otherwise` if none is.

    >>> meant("loaction", ["location", "spectrum"], "choose one of location, spectrum")
    'did you mean location?'
    """
    near = get_close_matches(given, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


class OffPrincipalError(Exception):
    """Bad input or arguments. Its message is written for the user."""


class CheckpointError(OffPrincipalError):
    """A folder is not a usable checkpoint, or two checkpoints do not belong together."""


class NonFiniteTensor(OffPrincipalError):
    """A tensor holds NaN or infinity."""


class FileError(OffPrincipalError):
    """A file or folder that offprincipal writes cannot be read or written."""


class TaskError(OffPrincipalError):
    """A task's name, level, columns or prompts are not usable."""


class ModelError(OffPrincipalError):
    """A language model cannot be opened, or cannot be run as asked."""


class TrainingError(OffPrincipalError):
    """A training run cannot start or continue with these settings."""


class StudyError(OffPrincipalError):
    """A study's profile is not usable, or one of its stages failed."""


class InterventionError(OffPrincipalError):
    """A model's weights cannot be changed as requested without changing its function, or a record does not fit it."""


class AdapterError(OffPrincipalError):
    """An adapter, its masks or its optimizer do not fit the model, the base or the settings that they are used with."""


class ArgumentError(OffPrincipalError):
    """An argument is invalid or out of range."""
