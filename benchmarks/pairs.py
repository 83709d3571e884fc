"""The synthetic pairs that the rows are measured on, made once and kept in a folder between runs."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

MAKER = Path(__file__).parents[1] / "scripts" / "make_synthetic.py"


@dataclass(frozen=True)
class Pair:
    """A base and a model tuned from it."""

    base: Path
    tuned: Path

    @property
    def files(self) -> list[Path]:
        return sorted([*self.base.glob("*.safetensors"), *self.tuned.glob("*.safetensors")])

    @property
    def stored_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def parameters(self) -> int:
        """Of one of the two: every weight takes two bytes."""
        return self.stored_bytes // 4

    def linear_matrices(self) -> list[str]:
        """Names of the matrices that the full comparison decomposes."""
        names = []
        for file in sorted(self.base.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                names += [name for name in opened.keys() if name.endswith("_proj.weight")]  # noqa: SIM118
        return names

    def read_once(self) -> "Pair":
        """Leave the files in the page cache, so that no row measures the disk."""
        for file in self.files:
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass
        return self


@dataclass(frozen=True)
class PairFolder:
    """Where pairs are kept; a pair that is not there is made."""

    folder: Path

    def pair(self, shape: str, layers: int | None = None, device: str = "cpu") -> Pair:
        """Base and tuned at that shape, cut to so many layers."""
        made = self._made(shape, layers, device, tuned_seed=0)
        return Pair(made / "base", made / "tuned").read_once()

    def second(self, shape: str, layers: int | None = None) -> Pair:
        """The same base with another model tuned from it."""
        first = self._made(shape, layers, "cpu", tuned_seed=0)
        other = self._made(shape, layers, "cpu", tuned_seed=1)
        return Pair(first / "base", other / "tuned").read_once()

    def _made(self, shape: str, layers: int | None, device: str, tuned_seed: int) -> Path:
        depth = "" if layers is None else f"-{layers}-layers"
        made = self.folder / f"{shape.partition(':')[0]}{depth}-{device}-{tuned_seed}"
        if made.exists() and made.stat().st_mtime < MAKER.stat().st_mtime:
            shutil.rmtree(made)  # made by another version of the script
        if not made.exists():
            making = made.with_name(f"{made.name}.making")
            command: list[str | Path] = [sys.executable, MAKER, "--shape", shape, "--out", making, "--device", device]
            command += ["--tuned-seed", str(tuned_seed), *(["--tuned-only"] if tuned_seed else [])]
            command += [] if layers is None else ["--layers", str(layers)]
            subprocess.run(command, check=True)
            making.rename(made)
        return made
