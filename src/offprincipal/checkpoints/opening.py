"""From a source, as the user names it, to the checkpoint that it is. A new kind of checkpoint is entered here."""

from pathlib import Path

from offprincipal.checkpoints.checkpoint import Checkpoint
from offprincipal.checkpoints.safetensors_folder import SafetensorsFolder


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local Hugging Face folder with safetensors, one file or shards; nothing but headers is read.

    Raises:
        CheckpointError: it is no such folder; the message says what is wrong, where, and what to do.
    """
    return SafetensorsFolder(Path(source))
