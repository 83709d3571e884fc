"""From a source, as the user names it, to the checkpoint that it is. A new kind of checkpoint is entered here."""

from collections.abc import Callable
from pathlib import Path

from offprincipal.assets import EMBEDDED, embedded_base
from offprincipal.checkpoints import adapter, distributed, hub, safetensors_folder, torch_files
from offprincipal.checkpoints.alignment import aligned
from offprincipal.checkpoints.checkpoint import Checkpoint
from offprincipal.checkpoints.hostile import is_file
from offprincipal.errors import CheckpointError

_PICKLES = ("*.pt", "*.pth", "*.ckpt", "*.pkl")
_Opener = Callable[[Path, str, Checkpoint | None], Checkpoint]
_KINDS: tuple[tuple[Callable[[Path], bool], _Opener], ...] = (
    (
        safetensors_folder.SafetensorsFolder.is_at,
        lambda folder, source, base: safetensors_folder.SafetensorsFolder(folder, source),
    ),
    (
        adapter.is_adapter,
        lambda folder, source, base: adapter.open_adapter(folder, source, base, _open_model),
    ),
    (torch_files.TorchFolder.is_at, lambda folder, source, base: torch_files.TorchFolder(folder, source)),
    (distributed.is_distributed, distributed.open_distributed),
)


def open_checkpoint(source: str | Path, base: Checkpoint | None = None) -> Checkpoint:
    """Open a model: nothing but headers is read.

    Args:
        source: a local folder; a model on the Hugging Face Hub, 'org/name' or 'org/name@revision'; or `embedded`, the
            base that is shipped. A folder holds safetensors or `pytorch_model.bin` (one file or shards), a PEFT
            adapter, or a checkpoint of torch.distributed.
        base: the model that it was trained from, on which an adapter sits, and whose names and layout the tensors are
            given as far as they can be told; without it an adapter sits on the base that it names.

    Raises:
        CheckpointError: it is no such checkpoint; the message says what is wrong, where, and what to do.
    """
    folder = _folder_of(source)
    for is_at, opened in _KINDS:
        if is_at(folder):
            found = opened(folder, str(source), base)
            return found if base is None else aligned(found, base)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickles ({pickles[0]}), which can run code when opened and are not read: "
            "convert it with save_pretrained(…, safe_serialization=True)"
        )
    raise CheckpointError(
        f"{folder} is no model: it has neither {safetensors_folder.WEIGHTS} nor {safetensors_folder.INDEX}, nor "
        f"{torch_files.WEIGHTS}, an adapter, or a distributed checkpoint"
    )


def _open_model(source: str) -> Checkpoint:
    """Open what an adapter names as its base."""
    folder = _folder_of(source)
    if adapter.is_adapter(folder) and not safetensors_folder.SafetensorsFolder.is_at(folder):
        raise CheckpointError(f"{folder} is an adapter too: merge it into its own base first")
    return open_checkpoint(folder)


def _folder_of(source: str | Path) -> Path:
    """The local folder of a source; that of an id is downloaded."""
    if str(source) == EMBEDDED:
        return embedded_base()
    folder = Path(source)
    if _is_folder(folder):
        return folder
    if is_file(folder):
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and the weights")
    if isinstance(source, str) and hub.is_id(source):
        return hub.download(source)
    raise CheckpointError(f"{folder} does not exist: give the folder of a Hugging Face model, or its id on the Hub")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
