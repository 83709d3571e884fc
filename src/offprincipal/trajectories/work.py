"""The work of a trajectory: checkpoints opened in order, and what is measured of one tensor in all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints import Array, Checkpoint, Part, open_checkpoint
from offprincipal.comparison.work import Work
from offprincipal.errors import ArgumentError, CheckpointError, NonFiniteTensor
from offprincipal.measures.compare_settings import CompareSettings
from offprincipal.trajectories.measure import Floats, Moved, Read, in_float64, measure, walk_blindly

_OF_MATRIX, _IN_BLOCKS = 40, 1 << 26  # bytes per entry if subspaces are computed; bytes if not


@dataclass(frozen=True)
class TrajectorySettings(CompareSettings):
    """Settings of a trajectory.

    Args:
        subspace_rank: rank of the leading subspaces whose overlaps are measured; None for none.
        masters: follow the float32 weights that are kept with the checkpoints.

    Raises:
        ArgumentError: the rank is not at least 1.
    """

    subspace_rank: int | None = None
    masters: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace_rank is not None and self.subspace_rank < 1:
            raise ArgumentError(f"subspace_rank is {self.subspace_rank}: give at least 1")


@dataclass(frozen=True)
class Followed(Work):
    """Checkpoints of one run by their steps, in order."""

    settings: TrajectorySettings

    @cached_property
    def steps(self) -> list[float]:
        return [float(step) for step in self.tuned]

    @cached_property
    def runs(self) -> dict[str, Checkpoint]:
        opened = {step: open_checkpoint(source, self.base_checkpoint) for step, source in self.tuned.items()}
        if not self.settings.masters:
            return opened
        found = {}
        for step, checkpoint in opened.items():
            kept = checkpoint.masters()
            if kept is None:
                floats = {info.dtype for info in checkpoint.tensors.values() if info.floating}
                hint = "it is float32 itself: omit --masters" if floats == {"float32"} else "omit --masters"
                raise CheckpointError(f"{checkpoint.source} has no float32 masters; {hint}, or keep them in training")
            found[step] = kept
        return found

    def called(self, run: str) -> str:
        return f"step {run}"

    def bytes_needed(self, part: Part) -> int:
        """Upper bound on the memory for measuring one tensor."""
        return max(part.numel * _OF_MATRIX * self._has_subspaces(part), _IN_BLOCKS)

    def follow(self, part: Part) -> Moved:
        """How a part moved over the checkpoints.

        Raises:
            CheckpointError: it cannot be read, or contains NaN or infinity.
        """
        base, *checkpoints = self._reads(part)
        try:
            moved = measure(part.name, base, checkpoints, *_span(part), self.steps, self._products)
        except NonFiniteTensor as error:
            raise self.not_finite(part, error) from error
        return moved.with_overlaps(*self._overlaps(part, moved)) if self._has_subspaces(part) else moved

    def walk_blindly(self, part: Part, draws: int) -> Floats:
        """Inner products, (draws, T, T), of walks with a part's own steps, shuffled over entries and stored alike."""
        base, *checkpoints = self._reads(part)
        return walk_blindly(part.name, base, checkpoints, *_span(part), draws)

    @cached_property
    def _products(self) -> Callable[[NDArray[np.float32]], Floats]:
        if self.settings.matrix.device == "cpu":
            return in_float64
        import torch

        from offprincipal.measures.spectral import chosen_device

        device = chosen_device(self.settings.matrix.device)

        def there(moves: NDArray[np.float32]) -> Floats:
            wide = torch.from_numpy(moves).to(device).double()
            found: Floats = (wide @ wide.T).cpu().numpy()
            return found

        return there if device.type != "cpu" else in_float64

    def _has_subspaces(self, part: Part) -> bool:
        return self.settings.subspace_rank is not None and self.is_linear(part)

    def _reads(self, part: Part) -> list[Read]:
        read = self._in_place if _is_in_place(part) else self._put_together
        return [read(side, part) for side in (self.base_checkpoint, *self.runs.values())]

    def _in_place(self, side: Checkpoint, part: Part) -> Read:
        name = self.stored_as(side, part.tensor)
        return lambda first, last: side.read(name, first, last)

    def _put_together(self, side: Checkpoint, part: Part) -> Read:
        whole = self.read(side, part).reshape(-1)
        return lambda first, last: whole[first:last]

    def _overlaps(self, part: Part, moved: Moved) -> tuple[Floats, float]:
        import torch

        from offprincipal.geometry.draws import generator_of
        from offprincipal.geometry.overlaps import subspace_overlaps
        from offprincipal.measures.spectral import chosen_device

        base, runs = _wide(self.read(self.base_checkpoint, part)), list(self.runs.values())
        rank = self.settings.subspace_rank or 0

        def on(device: torch.device) -> tuple[Floats, float]:
            generator = generator_of(0, "overlaps", part.name)
            return subspace_overlaps(
                lambda t: torch.from_numpy(_wide(self.read(runs[t], part)) - base).to(device),
                moved.gram,
                rank,
                generator,
            )

        try:
            return on(chosen_device(self.settings.matrix.device))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return on(torch.device("cpu"))


def _is_in_place(part: Part) -> bool:
    return part.numel == part.stop - part.start  # else it is interleaved with others


def _span(part: Part) -> tuple[int, int]:
    return (part.start, part.stop) if _is_in_place(part) else (0, part.numel)


def _wide(values: Array) -> NDArray[np.float32]:
    return values.astype(np.float32)
