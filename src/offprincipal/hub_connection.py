"""The Hugging Face Hub, asked once: its libraries ask five times for each file, with pauses, before they say that it
does not answer, or read their cache.

Knows names on the Hub; knows nothing of what is there.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from offprincipal.errors import OffPrincipalError

_SECONDS = 10
_OFFLINE = "HF_HUB_OFFLINE"


@contextmanager
def asked_once(name: str, kind: Literal["model", "dataset"], refusal: type[OffPrincipalError]) -> Iterator[bool]:
    """While it lasts, the libraries read their cache alone where the Hub does not answer; gives whether it does.

    The libraries' own settings hold: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN, HF_ENDPOINT.

    Raises:
        refusal: the Hub answers that it has nothing of that name.
    """
    with ExitStack() as held:
        answers = _answers(name, kind, refusal)
        if not answers:
            held.enter_context(_offline())
        yield answers


def is_cached(model: str) -> bool:
    """Whether anything of a model is in the Hub library's cache."""
    hub: Any = importlib.import_module("huggingface_hub")
    folder: str = hub.file_download.repo_folder_name(repo_id=model, repo_type="model")
    return Path(hub.constants.HF_HUB_CACHE, folder).is_dir()


def _answers(name: str, kind: Literal["model", "dataset"], refusal: type[OffPrincipalError]) -> bool:
    hub: Any = importlib.import_module("huggingface_hub")
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        hub.HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except errors.GatedRepoError:
        return True  # which the library that wants it says, with what to do
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise refusal(
            f"{name} is neither a local file or folder nor a {kind} on the Hub that you may see: check the name, or "
            "`hf auth login` if it is private"
        ) from error
    except errors.HfHubHTTPError:  # it is there, and answers otherwise, as to too many questions
        return True
    except Exception:  # names that are not resolved, proxies, time that is up, HF_HUB_OFFLINE: of several libraries
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    modules = [importlib.import_module("huggingface_hub.constants"), sys.modules.get("datasets.config")]
    before = [(module, getattr(module, _OFFLINE)) for module in modules if module is not None]
    try:
        for module, _ in before:
            setattr(module, _OFFLINE, True)
        yield
    finally:
        for module, value in before:
            setattr(module, _OFFLINE, value)
