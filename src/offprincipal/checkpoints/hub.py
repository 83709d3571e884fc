"""Models on the Hugging Face Hub, by id and revision: downloaded into its own cache, or found there when offline."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from offprincipal.checkpoints import adapter, safetensors_folder, torch_files
from offprincipal.checkpoints.shards import INDEX, shards_of
from offprincipal.errors import CheckpointError

_ID = re.compile(
    r"(?P<repo>(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95})(?:@(?P<revision>(?!.*\.\.)[\w./-]{1,200}))?",
    re.ASCII,
)
_SMALL = ["config.json", "adapter_config.json", "*.safetensors.index.json", "adapter_model.safetensors"]
_PICKLED = ["pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.bin"]
_SECONDS = 10


def is_id(source: str) -> bool:
    """Whether a source reads as one: 'org/name', 'org/name@revision', or 'name' alone, as the first models have it."""
    return _ID.fullmatch(source) is not None


def download(source: str) -> Path:
    """The local folder of a model's snapshot: what its index names; pickles only if there are no safetensors.

    The library's own settings hold: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN, HF_ENDPOINT.

    Raises:
        CheckpointError: there is no such model or revision, it needs a token, or it cannot be reached.
    """
    match = _ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source} is not a Hub id: write org/name, or org/name@revision")

    def fetched(patterns: list[str]) -> Path:
        return _snapshot(source, match["repo"], match["revision"], patterns)

    wanted = [*_SMALL, safetensors_folder.WEIGHTS]
    for more in ([], [f"*{safetensors_folder.SUFFIX}"], _PICKLED):  # the next only if there is nothing yet
        wanted += more
        folder = fetched(wanted)
        files = safetensors_folder.files_in(folder) or torch_files.files_in(folder)
        if len(files) == 1 and files[0].name.endswith(INDEX):
            return fetched([*wanted, *sorted({_literally(name) for name in shards_of(files[0])})])
        if files or any((folder / name).is_file() for name in (adapter.WEIGHTS, adapter.PICKLED)):
            return folder
    raise CheckpointError(f"{source} on the Hub has no weights in a supported format: give another model or revision")


def _literally(name: str) -> str:
    """A pattern that matches a name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def revisions(source: str) -> list[str]:
    """Ids of the branches and tags that a pattern names, in the order of the Hub: `org/name@step_*`.

    Raises:
        CheckpointError: there is no such model, none of its revisions fits, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    repo, _, pattern = source.partition("@")
    if _ID.fullmatch(repo) is None:
        raise CheckpointError(f"{source} is not a Hub id: write org/name@PATTERN")
    with _reported(source, repo, None):
        refs = HfApi().list_repo_refs(repo)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    found = [name for name in dict.fromkeys(names) if fnmatchcase(name, pattern)]
    if not found:
        some = ", ".join(names[:8])
        raise CheckpointError(f"{source}: none of the {len(names)} revisions of {repo} on the Hub matches ({some} …)")
    return [f"{repo}@{name}" for name in found]


def _snapshot(source: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    arguments: dict[str, Any] = {"allow_patterns": patterns, "etag_timeout": _SECONDS}
    arguments["local_files_only"] = constants.HF_HUB_OFFLINE  # of a commit, some versions ask all the same
    with _reported(source, repo, revision):
        return Path(snapshot_download(repo, revision=revision, **arguments))


@contextmanager
def _reported(source: str, repo: str, revision: str | None) -> Iterator[None]:
    """What goes wrong with the Hub, in our words."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{source} is gated on the Hub: accept its terms there, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{source}: {repo} on the Hub has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source} is neither a local folder nor a model on the Hub that you can access: check the name, or run "
            "`hf auth login` if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        where = f"it is not (wholly) in the cache, {constants.HF_HUB_CACHE}"
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{source} is not a local folder, and as a Hub id {where}, while HF_HUB_OFFLINE is set: "
                "unset it, or download the model first"
            ) from error
        raise CheckpointError(
            f"{source} is not a local folder, and as a Hub id {where}, and the Hub cannot be reached: check the name "
            "and the network"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{source} is not a Hub id ({error}): write org/name, or org/name@revision") from error
    except Exception as error:  # proxies, TLS, disks: the library passes on what its own parts raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"cannot download {source} from the Hub ({type(error).__name__}: {reason}): check name, network and disk"
        ) from error
