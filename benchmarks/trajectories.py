"""(n) Many checkpoints of one run: `trajectory` against loading every model and stacking the differences."""

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from harness import SIDE_BY_SIDE, Cost, Table, in_turn, offprincipal, process
from pairs import Pair
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
_STEP = 2e-5  # standard deviation of a checkpoint's steps, as far as bfloat16 weights of that size show them


def against_stacking(pair: Pair, checkpoints: int, many: int, rounds: int, work: Path) -> Table:
    """Time and memory for some checkpoints, side by side; ours alone for many, whose memory is to be the same.

    Args:
        pair: whose base walks; many: checkpoints of the second row, links to those of the first.
    """
    run = walk_from(pair.base, work / f"walk-{pair.base.parent.name}", checkpoints)
    ours, theirs = (partial(side, pair.base, run) for side in (follow, stack))
    found = in_turn(ours, theirs, rounds, [])
    alone = follow(pair.base, linked(run, work / f"{run.name}-{many}", many))
    memory = (alone.peak_bytes or 0) / 1e9
    rows = (
        (
            f"`offprincipal trajectory --no-report`, {checkpoints} checkpoints: the inner products, nulls, drifts and "
            "counts, of the model, each role, layer and tensor",
            "every model loaded, the differences stacked in float32, their inner products (`alternatives.py stack`)",
            *found.cells(),
        ),
        (
            f"the same of {many} checkpoints",
            "",
            "",
            "",
            f"{alone.seconds:.0f} s, {memory:.2f} GB",
        ),
    )
    note = f"{pair.parameters / 1e6:.0f} M parameters in bfloat16, the files in the page cache where they fit."
    return Table("(n) Trajectories", note, SIDE_BY_SIDE, rows)


def follow(base: Path, run: Path) -> Cost:
    with tempfile.TemporaryDirectory() as out:
        return offprincipal("trajectory", base, run, "--no-report", "--out", out)


def stack(base: Path, run: Path) -> Cost:
    return process([sys.executable, HERE / "alternatives.py", "stack", base, run])


def walk_from(base: Path, out: Path, checkpoints: int) -> Path:
    """Checkpoints `step_1` … of a random walk with a drift; made once."""
    if len(list(out.glob("step_*"))) == checkpoints:
        return out
    shutil.rmtree(out, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(base.glob("*.safetensors")):
        start = load_file(file)
        now = {name: weight.float() for name, weight in start.items()}
        drift = {name: torch.randn(weight.shape, generator=generator) for name, weight in start.items()}
        for step in range(1, checkpoints + 1):
            folder = out / f"step_{step}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(base / "config.json", folder)
            for name, weight in now.items():
                weight += _STEP * (torch.randn(weight.shape, generator=generator) + 0.3 * drift[name])
            stored = {name: weight.to(start[name].dtype) for name, weight in now.items()}
            save_file(stored, folder / file.name, {"format": "pt"})
    return out


def linked(run: Path, out: Path, many: int) -> Path:
    """A run of many checkpoints that are those of another over and over."""
    shutil.rmtree(out, ignore_errors=True)
    given = sorted(run.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    for step in range(1, many + 1):
        folder = out / f"step_{step}"
        folder.mkdir(parents=True)
        for file in given[(step - 1) % len(given)].iterdir():
            (folder / file.name).hardlink_to(file)
    return out
