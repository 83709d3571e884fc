"""Before training: what one optimizer step of a learning rate can move of a base, once its weights are stored.

AdamW moves a weight by about its learning rate, whatever the gradient's size; whether that shows depends on the spacing
of stored numbers about the weight alone. So the base tells it, in closed form, before anything is trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offprincipal.checkpoints import Checkpoint, Part, open_checkpoint, parts_of
from offprincipal.errors import ArgumentError, CheckpointError, NonFiniteTensor
from offprincipal.files import require_folder, write_json
from offprincipal.geometry.steps import Spacings

ALL = "all"
_AT_ONCE = 1 << 24  # entries
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Preflight:
    """What steps of a learning rate can move of a base.

    Args:
        base: where it is; storage: what weights are stored in.
        learning_rate: the length of a step.
        steps: of one run.
        spacings: role -> how its weights are spaced; `all` for all of them.
    """

    base: str
    storage: str
    learning_rate: float
    steps: int
    spacings: dict[str, Spacings]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a role: JSON-able.

        Returns:
            Rows of `role`, `parameters`; shares that are moved: `moved_by_one_step`, which is all that ever moves where
            every step is stored, since a step that is rounded away leaves its weight where it was for the next one;
            after `steps` steps in one direction `moved_masters` where float32 masters add them up, and
            `moved_stochastic` with stochastic rounding; `moved_masters_random_signs` after as many of random signs;
            `steps_to_half_masters`, `steps_to_half_stochastic`: steps in one direction until half have moved;
            `half_moved_by`: the shortest step that moves half at once. None where never, or of no weights.
        """
        return [{"role": role, "parameters": found.entries} | self._row(found) for role, found in self.spacings.items()]

    @property
    def content(self) -> dict[str, Any]:
        """What `preflight.json` holds."""
        named = {"base": self.base, "storage": self.storage, "learning_rate": self.learning_rate, "steps": self.steps}
        return {"schema": 1, **named, "roles": self.rows}

    def write(self, out: str | Path) -> Path:
        """Write `preflight.json` into a folder."""
        require_folder(Path(out))
        path = Path(out) / "preflight.json"
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
    progress: Progress | None = None,
) -> Preflight:
    """What AdamW's steps can move of a base, by role, once the weights are stored.

    Args:
        base: whatever `offprincipal compare` opens.
        learning_rate: the length of every weight's step; AdamW's first is just that.
        storage: `bfloat16`, `float16` or `float32`: what the weights are rounded to after every step.
        steps: of the run that is planned.
        progress: called with entries done, entries in all, and the tensor's name.

    Raises:
        ArgumentError: a number is out of range; CheckpointError: the base cannot be read or is not finite.

    >>> from offprincipal.assets import embedded_base
    >>> rows = {row["role"]: row for row in preflight(embedded_base(), 1e-6, steps=1000).rows}
    >>> rows["norm"]["moved_by_one_step"], rows["q"]["moved_masters"] > rows["q"]["moved_by_one_step"]
    (0.0, True)
    """
    if not 0 < learning_rate < 1:
        raise ArgumentError(f"the learning rate is {learning_rate}: give a number above 0 and below 1, 1e-6 say")
    if steps < 1:
        raise ArgumentError(f"steps is {steps}: give at least 1")
    found: dict[str, Spacings] = {}
    checkpoint, done = open_checkpoint(base), 0
    parts = [
        part for info in checkpoint.tensors.values() if info.floating for part in parts_of(info, checkpoint.config)
    ]
    if not parts:
        raise CheckpointError(f"{checkpoint.source} holds no floating-point tensor: there is nothing to look at")
    total = sum(part.numel for part in parts)
    for part in parts:
        for one in _spacings(checkpoint, part, storage):
            for role in (part.place.role, ALL):
                found[role] = found[role] + one if role in found else one
        done += part.numel
        if progress:
            progress(done, total, part.name)
    whole = found.pop(ALL)
    return Preflight(checkpoint.source, storage, learning_rate, steps, found | {ALL: whole})


def _spacings(checkpoint: Checkpoint, part: Part, storage: str) -> Iterator[Spacings]:
    """Those of a part, as many entries at a time as are held at once."""
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
