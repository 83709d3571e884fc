"""Write a model as a Hugging Face folder, tensor by tensor: shards with an index, and the small files beside them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.delta import is_plain
from offprincipal.checkpoints.hostile import is_file
from offprincipal.files import write_json

_BESIDE = re.compile(  # what transformers reads beside the weights; no other file is copied into what may be shared
    r"config\.json|generation_config\.json|(.*_)?(pre)?processor_config\.json|normalizer\.json|tokenizer(_config)?\.json"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.(json|jinja)"
    r"|.*\.(model|tiktoken)"
)
_MOST_BESIDE = 1 << 26
_SHARD = 4 << 30
_STORED = FLOATS | INTEGERS

Progress = Callable[[int, int, str], None]


def write_model(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Array],
    beside: Mapping[str, bytes],
    progress: Progress | None = None,
) -> None:
    """Write every tensor, and the files beside them, into a folder that is there.

    Args:
        read: a tensor's entries, flat, in the type that `tensors` says; beside: name -> content.
        progress: called with entries done, entries in all, and the tensor's name.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: info.numel * _STORED[info.dtype].itemsize for name, info in tensors.items()}
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > _SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    placed: dict[str, str] = {}
    total, done = sum(info.numel for info in tensors.values()), 0
    for number, names in enumerate(shards, start=1):
        called = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {}
        for name in names:
            info = tensors[name]
            shard[name] = as_tensor(read(name), info.dtype, info.shape)
            done += info.numel
            if progress:
                progress(done, total, name)
        save_file(shard, folder / called, {"format": "pt"})
        placed |= dict.fromkeys(names, called)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        write_json(folder / "model.safetensors.index.json", index)
    for name, content in beside.items():
        (folder / name).write_bytes(content)


def files_beside(run: Checkpoint) -> dict[str, bytes]:
    """The small files beside the weights: configuration, tokenizer, templates."""
    found: dict[str, bytes] = {}
    for path in sorted(run.folders[0].iterdir()) if run.folders else ():
        wanted = _BESIDE.fullmatch(path.name) and is_plain(path.name)
        if wanted and is_file(path) and path.stat().st_size <= _MOST_BESIDE:
            found[path.name] = path.read_bytes()
    return found


def as_tensor(values: Array, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Entries as a tensor of the type that they are stored in."""
    kind: torch.dtype = getattr(torch, dtype)
    if not values.size:
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(values.view(np.uint8).copy()).view(kind).reshape(shape)
