"""Predict a run's checkpoint at another step, measure the error of such predictions, and write the model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints import Array
from offprincipal.checkpoints.checkpoint import FLOATS
from offprincipal.checkpoints.safetensors_folder import INDEX, WEIGHTS
from offprincipal.comparison.work import Work
from offprincipal.errors import ArgumentError
from offprincipal.files import new_folder
from offprincipal.geometry import extrapolation, walks
from offprincipal.geometry.extrapolation import Method

Progress = Callable[[int, int, str], None]
_BLOCK = 1 << 22  # entries of one checkpoint that are held at once


def predictions_of(gram: NDArray[np.float64], steps: Sequence[float]) -> list[dict[str, Any]] | None:
    """Errors of predicting the last checkpoints, with those of a random walk; None if there are too few.

    Returns:
        One dict per held-out checkpoint: `step`, and `linear`, `rank1`, `last`, each with `value` and
        `random_walk_null`, relative to the checkpoint's distance from the base.
    """
    if len(steps) < extrapolation.LEAST:
        return None
    walk = walks.random_walk_gram(walks.walk_of(gram, steps).increments)
    pairs = zip(extrapolation.held_out(gram, steps), extrapolation.held_out(walk, steps), strict=True)
    return [
        {
            "step": steps[found.place],
            **{
                name: {"value": getattr(found, name), "random_walk_null": getattr(null, name)}
                for name in (*extrapolation.METHODS, "last")
            },
        }
        for found, null in pairs
    ]


def require_predictable(work: Work, steps: Sequence[float], at: float) -> None:
    """Check that a prediction is possible, before anything is read.

    Raises:
        ArgumentError: there are too few checkpoints, the step is invalid, or the base is quantised.
    """
    if len(steps) < 2:
        raise ArgumentError("a prediction needs at least two checkpoints: give more, or omit --predict")
    if not 0 < at < float("inf"):
        raise ArgumentError(f"--predict {at:g} is not a step: give a number above 0")
    if "quantization_config" in work.base_checkpoint.config:
        raise ArgumentError(
            f"--predict cannot write {work.base_checkpoint.source}, which is quantised: give the base unquantised"
        )


def write_prediction(
    work: Work,
    gram: NDArray[np.float64],
    steps: Sequence[float],
    at: float,
    method: Method,
    out: Path,
    progress: Progress | None = None,
) -> None:
    """Write the model extrapolated to a step, in the base's stored types; tensors that did not move are the base's.

    Args:
        gram: of the whole model's displacements.

    Raises:
        FileError: the folder cannot be written, or holds something else than a model.
    """
    from offprincipal.checkpoints.writing import files_beside, write_model  # needs torch, which measuring does not

    weights = extrapolation.coefficients_of(gram, steps, at, method)
    base = work.base_checkpoint
    sources = (*base.folders, *(folder for run in work.runs.values() for folder in run.folders))
    with new_folder(out, (WEIGHTS, INDEX), True, sources, "a model") as folder:
        write_model(folder, base.tensors, _predicting(work, weights), files_beside(base), progress)


def _predicting(work: Work, weights: NDArray[np.float64]) -> Callable[[str], Array]:
    """How to read a tensor as it is predicted: W_0 + Σ_t c_t (W_t − W_0), block by block."""
    base, common = work.base_checkpoint, work.common

    def read(name: str) -> Array:
        info = base.tensors[name]
        found = base.read(name)
        if not info.floating or name not in common:
            return found
        found = found.copy()
        for first in range(0, common[name].numel, _BLOCK):
            last = min(first + _BLOCK, common[name].numel)
            origin = found[first:last].astype(np.float64)
            moved = np.zeros_like(origin)
            for weight, run in zip(weights, work.runs.values(), strict=True):
                moved += weight * (run.read(work.stored_as(run, name), first, last).astype(np.float64) - origin)
            found[first:last] = (origin + moved).astype(FLOATS[info.dtype])
        return found

    return read
