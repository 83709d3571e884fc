"""Master weights: the tuned weights in float32, as they were before they were stored."""

import numpy as np

from offprincipal.checkpoints.checkpoint import Array, Checkpoint
from offprincipal.errors import CheckpointError


def masters_of(tuned: Checkpoint) -> Checkpoint | None:
    """The masters of a checkpoint: beside it, or itself where it is stored in float32; None if neither."""
    beside = tuned.masters()
    if beside is not None:
        return beside
    kinds = {info.dtype for info in tuned.tensors.values() if info.floating}
    return tuned if kinds == {"float32"} else None


def require_own_masters(name: str, whose: str, stored: Array, masters: Array) -> None:
    """Check that masters round to the weights that they are the masters of.

    Raises:
        CheckpointError: they are of another checkpoint.

    >>> require_own_masters("w", "run", np.array([1.5], np.float16), np.array([1.50001], np.float32))
    """
    if not np.array_equal(masters.astype(stored.dtype), stored):
        raise CheckpointError(
            f"{name}: the masters of '{whose}' do not round to its stored weights, so they are of another "
            "checkpoint: remove its masters folder, or save both again"
        )
