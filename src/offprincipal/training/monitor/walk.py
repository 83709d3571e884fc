"""Whether a run that goes on moves straight ahead or as a random walk would, without its checkpoints being kept.

Each observation leaves a count sketch of the displacement of all watched matrices: entries are dealt out to buckets
with random signs, always the same ones, and summed. Inner products of sketches are those of displacements on the
average, off by √(2/b) of the product of their norms in b buckets. Knows nothing of models.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from offprincipal.errors import FileError
from offprincipal.files import write_atomically
from offprincipal.geometry import walks

NAME = "monitor.walk.safetensors"
BUCKETS = 8192
LEAST = 3  # observations: of fewer every run looks straight
_BLOCK = 1 << 20
_FIGURES = ("straightness", "rank1_share")
COLUMNS = {
    "straightness": ("distance from the base over the length of the path, of all watched matrices", "1"),
    "straightness_random_walk_null": ("the same of a random walk of the same steps", "1"),
    "rank1_share": ("share of the displacements along their first direction", "1"),
    "rank1_share_random_walk_null": ("the same of a random walk of the same steps", "1"),
}

Floats = NDArray[Any]


def sketch_of(name: str, displacement: Floats) -> NDArray[np.float64]:
    """The count sketch of a matrix's displacement; that of several is the sum of theirs.

    Args:
        name: fixes how entries are dealt out; displacement: of any shape.

    Returns:
        (8192,).

    Source: Charikar, Chen and Farach-Colton 2002.

    >>> moved = np.ones((40, 50), np.float32)
    >>> round(float(np.linalg.norm(sketch_of("w", moved)) / np.linalg.norm(moved)), 1)
    1.0
    """
    found = np.zeros(BUCKETS)
    dealt = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogatepass")))
    flat = displacement.reshape(-1)
    for first in range(0, len(flat), _BLOCK):
        part = flat[first : first + _BLOCK]
        places = dealt.integers(0, 2 * BUCKETS, len(part), np.uint16)
        found += np.bincount(places >> 1, np.where(places & 1, -part, part), BUCKETS)
    return found


class SketchedWalk:
    """The sketches so far, in memory and in a file.

    Args:
        folder: that holds the file; after_step: observations beyond it are dropped, since training goes on from there;
            at 0 the file goes.

    Raises:
        FileError: the file is no sketch of a monitor.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        self._path = folder / NAME
        self._steps: list[int] = []
        self._sketches = np.zeros((0, BUCKETS), np.float32)
        self._known = True
        if after_step == 0:
            self._path.unlink(missing_ok=True)
        elif self._path.exists():
            steps, sketches = _read(self._path)
            kept = steps <= after_step
            self._steps, self._sketches = steps[kept].tolist(), sketches[kept]
        else:
            self._known = False  # the way so far is not

    def add(self, step: int, sketch: Floats) -> dict[str, float | None]:
        """Keep the sketch of an observation, and say what the way so far is like; None where it cannot be told.

        Args:
            sketch: (8192,), of all matrices.

        Raises:
            FileError: the file cannot be written.
        """
        if not self._known:
            return dict.fromkeys(COLUMNS)
        self._steps.append(step)
        self._sketches = np.vstack([self._sketches, sketch.astype(np.float32)])
        content: dict[str, Floats] = {"steps": np.array(self._steps, np.int64), "sketches": self._sketches}
        write_atomically(self._path, partial(save_file, content))
        if len(self._steps) < LEAST:
            return dict.fromkeys(COLUMNS)
        wide = self._sketches.astype(np.float64)
        walk = walks.walk_of(wide @ wide.T, self._steps)
        null = walks.walk_of(walks.random_walk_gram(walk.increments), self._steps)
        return {
            f"{figure}{ending}": getattr(of, figure)
            for figure in _FIGURES
            for ending, of in (("", walk), ("_random_walk_null", null))
        }


def _read(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    try:
        found = load_file(path)
        steps, sketches = found["steps"], found["sketches"]
        if sketches.shape != (len(steps), BUCKETS) or not np.isfinite(sketches).all():
            raise ValueError("it is of another shape, or holds what is no number")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that a monitor wrote, or an empty one") from error
    return steps, sketches.astype(np.float32)
