"""Whether a run moves straight or like a random walk, estimated during training without keeping checkpoints.

Each observation stores a count sketch of the displacement of all watched matrices: every entry is added, with a fixed
random sign, to a fixed random one of b buckets. Inner products of sketches are unbiased estimates of those of the
displacements, with a standard error of about √(2/b) of the product of the norms. Knows nothing of models.
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
LEAST = 3  # observations; with fewer, every run looks straight
_BLOCK = 1 << 20
_FIGURES = ("straightness", "rank1_share")
COLUMNS = {
    "straightness": ("distance from the base divided by the path length, over all watched matrices", "1"),
    "straightness_random_walk_null": ("the same for a random walk with the same step lengths", "1"),
    "rank1_share": ("share of the displacements along their first principal direction", "1"),
    "rank1_share_random_walk_null": ("the same for a random walk with the same step lengths", "1"),
}

Floats = NDArray[Any]


def sketch_of(name: str, displacement: Floats) -> NDArray[np.float64]:
    """The count sketch of a matrix's displacement; the sketch of several matrices is the sum of theirs.

    Args:
        name: of the matrix; it seeds buckets and signs.
        displacement: any shape.

    Returns:
        float64, (8192,), in the units of the displacement.

    Source: Charikar, Chen and Farach-Colton 2002.

    >>> moved = np.ones((40, 50), np.float32)
    >>> round(float(np.linalg.norm(sketch_of("w", moved)) / np.linalg.norm(moved)), 1)
    1.0
    """
    sketch = np.zeros(BUCKETS)
    generator = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogatepass")))
    flat = displacement.reshape(-1)
    for first in range(0, len(flat), _BLOCK):
        part = flat[first : first + _BLOCK]
        places = generator.integers(0, 2 * BUCKETS, len(part), np.uint16)
        sketch += np.bincount(places >> 1, np.where(places & 1, -part, part), BUCKETS)
    return sketch


class SketchedWalk:
    """The sketches so far, in memory and in a file.

    Args:
        folder: of the file.
        after_step: step from which training continues; later observations are dropped. At 0 the file is deleted.

    Raises:
        FileError: the file does not hold sketches of a monitor.
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
            self._known = False  # earlier observations are missing

    def add(self, step: int, sketch: Floats) -> dict[str, float | None]:
        """Add the sketch of an observation and write the file.

        Args:
            step: optimizer steps done.
            sketch: (8192,), of all matrices.

        Returns:
            Straightness and rank-1 share of the path so far, with their nulls; None with fewer than 3 observations, or
            if earlier ones are missing.

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
        content = load_file(path)
        steps, sketches = content["steps"], content["sketches"]
        if sketches.shape != (len(steps), BUCKETS) or not np.isfinite(sketches).all():
            raise ValueError("it has another shape, or holds NaN or infinity")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that a monitor wrote, or an empty one") from error
    return steps, sketches.astype(np.float32)
