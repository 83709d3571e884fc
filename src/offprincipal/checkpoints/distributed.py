"""Checkpoints of torch.distributed: a folder with `.metadata` and a `.distcp` file of every rank.

FSDP writes them, by accelerate (`pytorch_model_fsdp_0/` in a Trainer's checkpoint) and by torchtitan (`step-100/`), and
Megatron (`iter_0000100/`). The model's tensors are kept, an optimizer's and a data loader's left out.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path

from offprincipal.checkpoints import megatron
from offprincipal.checkpoints.checkpoint import Array, Checkpoint
from offprincipal.checkpoints.chunked import Chunk, Chunked, StoredTensor
from offprincipal.checkpoints.distributed_index import METADATA, read_stored_tensors
from offprincipal.checkpoints.hostile import is_file, read_bytes, read_config
from offprincipal.checkpoints.torch_files import as_array, checked_tensor, dtype_name, load_tensors
from offprincipal.errors import CheckpointError

_FSDP = "pytorch_model_fsdp_*"
_NOT_THE_MODEL = re.compile(r"(?:optimizers?|optim|lr_schedulers?|dataloader|train_state)(?:\.|$)")


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds one, itself or as accelerate puts it there."""
    return is_file(folder / METADATA) or len(_inside(folder)) == 1


def open_distributed(folder: Path, source: str, base: Checkpoint | None = None) -> "Distributed":
    """The checkpoint in a folder.

    Raises:
        CheckpointError: it is corrupt or incomplete, would run code, or holds no model.
    """
    at = folder if is_file(folder / METADATA) else _inside(folder)[0]
    config = read_config(at, folder, otherwise=base.config if base else None)
    everything = read_stored_tensors(at)
    if megatron.is_megatron(everything):
        masters = megatron.masters_in(everything, at)
        config = config or megatron.config_in(at)
        return Distributed(source, at, megatron.weights_in(everything, at), config, masters)
    stored = {name: tensor for name, tensor in everything.items() if not _NOT_THE_MODEL.match(name)}
    if not stored:
        raise CheckpointError(f"{at} does not contain a model's tensors: give the model's folder, not the optimizer's")
    return Distributed(source, at, _unwrapped(stored), config)


class Distributed(Chunked):
    """A `Checkpoint` over one folder: every chunk is a file of torch.save inside of a larger one."""

    def _load(self, name: str, chunk: Chunk) -> Array:
        where = f"{name} in {chunk.path}"
        tensor = checked_tensor(
            load_tensors(io.BytesIO(read_bytes(chunk.path, chunk.start, chunk.length, name)), where), where
        )
        shape = tuple(tensor.shape)
        stacked = len(shape) - len(chunk.sizes)  # Megatron's chunks are stacks of one layer, and of one expert
        if shape != (1,) * stacked + chunk.sizes or dtype_name(tensor.dtype) != self.tensors[name].dtype:
            raise CheckpointError(f"{where} is not of the shape and type that {METADATA} gives: save it again")
        return as_array(tensor.reshape(-1))


def _inside(folder: Path) -> list[Path]:
    """The folders that accelerate put into a checkpoint's."""
    return sorted(path for path in folder.glob(_FSDP) if is_file(path / METADATA))


def _unwrapped(stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors without the `model.` that accelerate and torchtitan put in front of every name, if they did."""
    inner = {name.removeprefix("model."): tensor for name, tensor in stored.items() if name.startswith("model.")}
    heads = ("model.", "lm_head.", "tok_embeddings.")
    return inner if len(inner) == len(stored) and any(name.startswith(heads) for name in inner) else stored
