"""The matrices of a model in training that a monitor watches, and their current values.

The effective matrix is watched: an adapter's update is added to its frozen base, a sharded matrix is gathered, and a
fused one is split. Knows nothing of metrics.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from offprincipal.checkpoints.matrices import ModelMatrix, matrices_of, whole
from offprincipal.checkpoints.roles import LINEAR_ROLES
from offprincipal.errors import ArgumentError, TrainingError


@dataclass(frozen=True)
class WatchedMatrix(ModelMatrix):
    """One matrix of a model in training.

    Args:
        adapter: the PEFT layer around the module; None if there is none.
    """

    adapter: Any = None

    def now(self) -> Tensor:
        """The effective matrix, (n, m), in the trained dtype, or in float32 if there is an adapter.

        All processes of a sharded model must call it.
        """
        if self.adapter is None:
            return self.weight()
        effective = whole(self.parameter).float()
        for name in _active(self.adapter):
            effective = effective + whole(self.adapter.get_delta_weight(name)).float()  # sparse tensor for SHiRA
        return self.part.cut(effective)


def watched_matrices(model: Any, patterns: Sequence[str] | None = None) -> list[WatchedMatrix]:
    """Choose the matrices to watch.

    Args:
        model: a torch module; may be sharded by FSDP2, wrapped, or have LoRA or SHiRA adapters.
        patterns: shell-style patterns of names, such as `*.q_proj.weight`; None: one linear matrix of each role, spread
            over the layers from the first to the last.

    Raises:
        ArgumentError: a pattern matches no linear matrix.
        TrainingError: the weights are flattened, partitioned or quantized, so matrices cannot be read; or the update of
            an adapter is not additive.

    >>> layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "up_proj": torch.nn.Linear(4, 8)})
    >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    >>> [matrix.name for matrix in watched_matrices(model)]
    ['layers.0.q_proj.weight', 'layers.0.up_proj.weight']
    >>> [matrix.name for matrix in watched_matrices(model, ["*up*"])]
    ['layers.0.up_proj.weight']
    """
    linear = [matrix for matrix in _matrices(model) if matrix.part.place.role in LINEAR_ROLES]
    if not linear:
        raise TrainingError(
            f"{type(model).__name__} has no linear matrix that can be watched: its weights are flattened (FSDP1), "
            "partitioned (DeepSpeed ZeRO-3), or their names are unknown; shard it with FSDP2, or not at all"
        )
    for pattern in patterns or ():
        if not any(fnmatchcase(matrix.name, pattern) for matrix in linear):
            raise ArgumentError(f"no linear matrix is named like {pattern!r}: names are such as '{linear[0].name}'")
    if patterns is None:
        chosen = _spread(linear)
    else:
        chosen = [matrix for matrix in linear if any(fnmatchcase(matrix.name, pattern) for pattern in patterns)]
    for matrix in chosen:
        _require_readable(matrix)
    return chosen


def _matrices(model: Any) -> Iterator[WatchedMatrix]:
    """All matrices, each with the adapter around it."""
    modules = dict(model.named_modules())
    for matrix in matrices_of(model):
        owner, wrapped, _ = matrix.parameter_name.rpartition(".base_layer.")
        adapter = modules[owner] if wrapped else None
        yield WatchedMatrix(matrix.part, matrix.parameter_name, matrix.module, matrix.attribute, adapter)


def _spread(linear: Sequence[WatchedMatrix]) -> list[WatchedMatrix]:
    """One matrix of each role, in layers evenly spaced from the first to the last; of experts the first."""
    layers = sorted({matrix.part.place.layer or 0 for matrix in linear})
    roles = [role for role in LINEAR_ROLES if any(matrix.part.place.role == role for matrix in linear)]
    chosen = []
    for i, role in enumerate(roles):
        wanted = layers[round(i * (len(layers) - 1) / max(len(roles) - 1, 1))]
        own = [matrix for matrix in linear if matrix.part.place.role == role]
        chosen.append(min(own, key=lambda matrix: abs((matrix.part.place.layer or 0) - wanted)))
    return chosen


def _require_readable(matrix: WatchedMatrix) -> None:
    """Raise TrainingError if the matrix is quantized, or its adapter's update is not added to the base."""
    weight, adapter = matrix.parameter, matrix.adapter
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TrainingError(
            f"{matrix.name} is stored as {weight.dtype}: quantized weights are not watched; train from float weights, "
            "or choose other matrices"
        )
    if adapter is None:
        return
    additive = _added_by(adapter) is not None and hasattr(adapter, "get_delta_weight") and not adapter.merged
    if not additive or any(name in getattr(adapter, "lora_variant", {}) for name in _active(adapter)):
        raise TrainingError(
            f"the adapter of {matrix.name} ({type(adapter).__name__}) makes no change that is added to its base, or is "
            "merged: watch LoRA without variants such as DoRA, SHiRA, either unmerged, or full fine-tuning"
        )


def _added_by(adapter: Any) -> Any:
    """The parameters of a layer by adapter name, if it is a LoRA or SHiRA layer; otherwise None."""
    return getattr(adapter, "lora_A", getattr(adapter, "shira_weight", None))


def _active(adapter: Any) -> list[str]:
    """Names of the active adapters of a layer."""
    if getattr(adapter, "disable_adapters", False):
        return []
    return [name for name in adapter.active_adapters if name in _added_by(adapter)]
