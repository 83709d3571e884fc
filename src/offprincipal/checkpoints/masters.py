"""Master weights: the tuned weights in float32, before they were rounded for storage."""

from collections.abc import Mapping

import numpy as np

from offprincipal.checkpoints.checkpoint import Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.opening import open_checkpoint
from offprincipal.errors import CheckpointError


def masters_of(tuned: Checkpoint) -> Checkpoint | None:
    """The masters of a checkpoint: those kept with it, or itself if it is stored in float32; otherwise None."""
    beside = tuned.masters()
    if beside is not None:
        return beside
    kinds = {info.dtype for info in tuned.tensors.values() if info.floating}
    return tuned if kinds == {"float32"} else None


def open_masters(source: str, base: Checkpoint) -> Checkpoint:
    """Masters given by their own path: any checkpoint in float32, under the base's names.

    Raises:
        CheckpointError: it cannot be read, or is not stored in float32.
    """
    found = open_checkpoint(source, base)
    for name, info in found.tensors.items():
        if info.floating and info.dtype not in ("float32", "float64"):
            raise CheckpointError(
                f"{source} is given as masters, but stores {name} in {info.dtype}: masters are float32"
            )
    return found


def require_all_masters(tuned: Checkpoint, masters: Checkpoint, wanted: Mapping[str, TensorInfo]) -> None:
    """Check that there is a master of every tensor that is compared.

    Args:
        wanted: the base's names of those; heads that `tuned` has under the name of an embedding are passed over.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    for name, info in tuned.tensors.items():
        if name in wanted and (name not in masters.tensors or masters.tensors[name].shape != info.shape):
            raise CheckpointError(
                f"the masters of {tuned.source} have no {name} of the shape that it stores: save both again, or remove "
                "its masters folder"
            )


def require_own_masters(name: str, whose: str, stored: Array, masters: Array) -> None:
    """Check that masters round to the weights that they are the masters of.

    Raises:
        CheckpointError: they are of another checkpoint.

    >>> require_own_masters("w", "run", np.array([1.5], np.float16), np.array([1.50001], np.float32))
    """
    if not np.array_equal(masters.astype(stored.dtype), stored):
        raise CheckpointError(
            f"{name}: the masters of '{whose}' do not round to its stored weights, so they are of another "
            "checkpoint: move them away (its folder masters/, or a trainer's own states), or save both again"
        )
