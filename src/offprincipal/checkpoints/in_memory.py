"""A model that is open in torch, as a checkpoint: nothing is copied until it is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array, Checkpoint, TensorInfo
from offprincipal.errors import CheckpointError

_BYTES = {1: torch.uint8, 2: torch.int16}  # of types that numpy has not


class InMemory:
    """The tensors of a module as they are when they are read; tied ones once, under their first name.

    Args:
        model: whole on this process, its adapters merged.

    Raises:
        CheckpointError: it is sharded, has an adapter, or holds weights of no known type.

    >>> InMemory(torch.nn.Linear(2, 3)).tensors["weight"].shape
    (3, 2)
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, torch.nn.Module):
            kind = type(model).__name__
            raise CheckpointError(f"an object of type {kind} is not a model: give a folder, an id or a torch.nn.Module")
        self.source = f"{type(model).__name__} in memory"
        self.folders: Sequence[Path] = ()
        self.files: Sequence[Path] = ()
        self.notes: Sequence[str] = ()
        if hasattr(model, "peft_config"):
            raise CheckpointError(f"{self.source} has an adapter: give model.merge_and_unload(), or the saved adapter")
        self.config: Mapping[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
        self._state = _once(model.state_dict(keep_vars=True))
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in sorted(self._state.items()):
            kind = str(tensor.dtype).removeprefix("torch.")
            if hasattr(tensor, "full_tensor") or tensor.is_meta or kind not in FLOATS | INTEGERS:
                what = "sharded" if hasattr(tensor, "full_tensor") else "not loaded" if tensor.is_meta else f"of {kind}"
                raise CheckpointError(f"{name} of {self.source} is {what}: save the model, and give its folder")
            self.tensors[name] = TensorInfo(name, tuple(tensor.shape), kind)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """As of `Checkpoint`."""
        flat = self._state[name].detach().reshape(-1)[start:stop].cpu().contiguous()
        kind = (FLOATS | INTEGERS)[self.tensors[name].dtype]
        if kind.kind == "V" or kind.name not in np.sctypeDict:
            return flat.view(_BYTES[kind.itemsize]).numpy().view(kind)
        found: Array = flat.numpy()
        return found

    def masters(self) -> Checkpoint | None:
        """None: what is in memory is all there is."""
        return None


def _once(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in state.items():
        there = tensor.numel() and not tensor.is_meta
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if there else (name,)
        if place not in seen:
            seen.add(place)
            found[name] = tensor
    return found
