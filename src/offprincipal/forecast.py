"""Before training: which stored weights of a base an optimizer step of a given learning rate can change.

AdamW moves a weight by about its learning rate, whatever the gradient's size; whether the stored weight changes depends
only on the spacing of stored numbers around it. So the base determines it, in closed form, before any training.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from offprincipal.checkpoints import Checkpoint, Part, open_checkpoint, parts_of
from offprincipal.errors import ArgumentError, CheckpointError, NonFiniteTensor
from offprincipal.file_names import PREFLIGHT
from offprincipal.files import require_folder, write_json
from offprincipal.geometry.steps import Spacings
from offprincipal.tables import require_none_replaced
from offprincipal.tabular import Tabular

ALL = "all"
_AT_ONCE = 1 << 24  # entries
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, repr=False)
class Preflight(Tabular):
    """Which stored weights of a base can change at a learning rate.

    Args:
        base: its source.
        storage: the type in which weights are stored.
        learning_rate: the size of a step.
        steps: number of steps in the run.
        spacings: role -> the spacings of its weights; `all` for all of them.
    """

    base: str
    storage: str
    learning_rate: float
    steps: int
    spacings: dict[str, Spacings]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per role, JSON-able.

        Returns:
            Rows of `role`, `parameters`, and shares of moved weights: `moved_by_one_step`, which no number of steps
            exceeds if every step is stored, since a step that is rounded away leaves its weight unchanged for the next;
            after `steps` steps in one direction, `moved_masters` with float32 masters and `moved_stochastic` with
            stochastic rounding; `moved_masters_random_signs` after as many steps of random signs;
            `steps_to_half_masters`, `steps_to_half_stochastic`: steps in one direction until half have moved;
            `half_moved_by`: the shortest step that moves half at once. None if never, or without weights.
        """
        return [{"role": role, "parameters": found.entries} | self._row(found) for role, found in self.spacings.items()]

    def to_arrow(self, table: str = "") -> pa.Table:
        """`rows`, one per role."""
        return pa.Table.from_pylist(self.rows)

    @property
    def content(self) -> dict[str, Any]:
        """The content of `preflight.json`."""
        named = {"base": self.base, "storage": self.storage, "learning_rate": self.learning_rate, "steps": self.steps}
        return {"schema": 1, **named, "roles": self.rows}

    def write(self, out: str | Path) -> Path:
        """Write `preflight.json` into a folder."""
        require_folder(Path(out))
        path = Path(out) / PREFLIGHT
        write_json(path, self.content)
        return path

    def _row(self, found: Spacings) -> dict[str, float | None]:
        step, steps = self.learning_rate, self.steps
        return {
            "moved_by_one_step": found.share_moved(step),
            "moved_masters": found.share_moved(step * steps),
            "moved_masters_random_signs": found.share_moved_walking(step, steps),
            "moved_stochastic": found.share_moved_at_random(step, steps),
            "steps_to_half_masters": found.steps_to_half(step),
            "steps_to_half_stochastic": found.steps_to_half_at_random(step),
            "half_moved_by": found.quantile(0.5),
        }


def preflight(
    base: str | Path,
    learning_rate: float,
    storage: str = "bfloat16",
    steps: int = 100,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Preflight:
    """Forecast, by role, which stored weights of a base AdamW's steps can change.

    Args:
        base: any checkpoint that `offprincipal compare` opens.
        learning_rate: the size of every weight's step, as it is in AdamW's first.
        storage: the type to which weights are rounded: `bfloat16`, `float16` or `float32`.
        steps: number of steps planned.
        out: folder for `preflight.json`; None: nothing is written.
        overwrite: replace the forecast of another base in the folder.
        progress: called with entries done, entries in all, and the tensor's name.

    Raises:
        ArgumentError: a number is out of range, or the storage type is unknown.
        CheckpointError: the base cannot be read or is not finite.
        FileError: the folder holds the forecast of another base, or cannot be written.

    >>> from offprincipal.assets import embedded_base
    >>> rows = {row["role"]: row for row in preflight(embedded_base(), 1e-6, steps=1000).rows}
    >>> rows["norm"]["moved_by_one_step"], rows["q"]["moved_masters"] > rows["q"]["moved_by_one_step"]
    (0.0, True)
    """
    if not 0 < learning_rate < 1:
        raise ArgumentError(f"the learning rate is {learning_rate}: give a number between 0 and 1, e.g. 1e-6")
    if steps < 1:
        raise ArgumentError(f"steps is {steps}: give at least 1")
    if out is not None and not overwrite:
        require_none_replaced(Path(out) / PREFLIGHT, str(base), (), lambda content: ())
    found: dict[str, Spacings] = {}
    checkpoint, done = open_checkpoint(base), 0
    parts = [
        part for info in checkpoint.tensors.values() if info.floating for part in parts_of(info, checkpoint.config)
    ]
    if not parts:
        raise CheckpointError(f"{checkpoint.source} has no floating-point tensors: there is nothing to forecast")
    total = sum(part.numel for part in parts)
    for part in parts:
        for one in _spacings(checkpoint, part, storage):
            for role in (part.place.role, ALL):
                found[role] = found[role] + one if role in found else one
        done += part.numel
        if progress:
            progress(done, total, part.name)
    whole = found.pop(ALL)
    result = Preflight(checkpoint.source, storage, learning_rate, steps, found | {ALL: whole})
    if out is not None:
        result.write(out)
    return result


def _spacings(checkpoint: Checkpoint, part: Part, storage: str) -> Iterator[Spacings]:
    """The spacings of a part, at most `_AT_ONCE` entries at a time."""
    try:
        if part.numel != part.stop - part.start:  # interleaved with others
            yield Spacings.of(part.of(checkpoint.read(part.tensor, part.start, part.stop)), storage)
            return
        for start in range(part.start, part.stop, _AT_ONCE):
            yield Spacings.of(checkpoint.read(part.tensor, start, min(start + _AT_ONCE, part.stop)), storage)
        if part.start == part.stop:
            yield Spacings.of(checkpoint.read(part.tensor, 0, 0), storage)
    except NonFiniteTensor as error:
        raise CheckpointError(f"{part.name} of {checkpoint.source}: {error}") from error
