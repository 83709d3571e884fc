"""The linear matrices of a checkpoint, and those of a model that is open: fused projections and experts one by one."""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from offprincipal.checkpoints.checkpoint import Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.pairing import pair_tensors
from offprincipal.checkpoints.parts import Part, parts_of
from offprincipal.checkpoints.roles import WRAPPERS

if TYPE_CHECKING:
    from torch import Tensor

_OUTER = re.compile(r"^(?:module\.)?(?:base_model\.model\.)?")


def linear_parts(checkpoint: Checkpoint) -> Iterator[tuple[TensorInfo, Part]]:
    """Every linear matrix of a checkpoint, with the tensor that it lies in."""
    for info in checkpoint.tensors.values():
        for part in parts_of(info, checkpoint.config) if info.floating else ():
            if part.is_linear:
                yield info, part


def common_parts(checkpoints: Sequence[Checkpoint]) -> list[Part]:
    """The linear matrices that checkpoints have in common; fused tensors come in parts.

    Args:
        checkpoints: the base first.

    Raises:
        CheckpointError: the checkpoints do not belong together.
    """
    base, *others = checkpoints
    pairings = [pair_tensors(base, other).tensors for other in others]
    return [part for info, part in linear_parts(base) if all(info.name in tensors for tensors in pairings)]


def read_part(checkpoints: Sequence[Checkpoint], part: Part) -> list[Array]:
    """The values of a part in float32, (n, m), of each checkpoint.

    Raises:
        CheckpointError: one cannot be read.
    """
    read = [part.of(checkpoint.read(part.tensor, part.start, part.stop)) for checkpoint in checkpoints]
    return [array.astype(np.float32) for array in read]


def common_matrices(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[Part, list[Array]]]:
    """The linear matrices that checkpoints have in common, and their values in float32: one matrix at a time is held.

    Raises:
        CheckpointError: the checkpoints do not belong together, or one cannot be read.
    """
    for part in common_parts(checkpoints):
        yield part, read_part(checkpoints, part)


@dataclass(frozen=True)
class ModelMatrix:
    """One matrix of an open model.

    Args:
        part: what it is, and where it lies in a parameter; named as a checkpoint of the model names it, without the
            names of what is wrapped around its modules.
        parameter_name: the model's own name of that parameter.
        module: what owns the parameter; attribute: its name there.
    """

    part: Part
    parameter_name: str
    module: Any
    attribute: str

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def parameter(self) -> "Tensor":
        found: Tensor = getattr(self.module, self.attribute)
        return found

    def weight(self) -> "Tensor":
        """(n, m), as it is now, outside of autograd; every process of a sharded model calls it."""
        return self.part.cut(whole(self.parameter))


def matrices_of(model: Any) -> Iterator[ModelMatrix]:
    """Every matrix of a torch module, in the order of its parameters; embeddings and heads too.

    >>> import torch
    >>> [matrix.name for matrix in matrices_of(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}))]
    ['q_proj.weight']
    """
    settings: Mapping[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    seen = set()
    for path, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            name = f"{path}.{attribute}" if path else attribute
            info = TensorInfo(_OUTER.sub("", WRAPPERS.sub("", name)), tuple(weight.shape), str(weight.dtype))
            for part in parts_of(info, settings):
                if part.is_matrix:
                    yield ModelMatrix(part, name, module, attribute)


def whole(tensor: "Tensor") -> "Tensor":
    """A tensor outside of autograd, gathered where it is sharded: every process calls it then.

    Of a parameter whose float32 values DeepSpeed keeps apart (ZeRO 1 and 2), those.
    """
    detached = tensor.detach()
    if hasattr(tensor, "_hp_mapping"):
        apart: Tensor | None = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param(tensor)
        if apart is not None:
            return apart.reshape(tensor.shape)
    gathered: Tensor = getattr(detached, "full_tensor", lambda: detached)()
    return gathered
