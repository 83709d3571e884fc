"""(l) The size of a delta: against places and values, zstd's patches, and weightscope in an environment of its own."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from harness import NotMeasured, Table, number, python_with
from pairs import Pair
from safetensors.torch import load_file, save_file

from offprincipal.deltas import make_delta
from offprincipal.geometry.steps import Spacings

SHARES = (0.01, 0.1)
COLUMNS = ("changed", "as", "MB", "bits a changed entry", "times ours")
_STEPS = 100  # of random signs, as Adam's are


def delta_sizes(pair: Pair, work: Path) -> Table:
    """Sizes at shares of changed entries, by the lengths of steps that change so many."""
    rows = []
    weightscope = python_with(work / "weightscope", ("weightscope",))
    for share in SHARES:
        folder = moved(pair.base, work / f"delta-{share}", share)
        ours = make_delta(pair.base, folder, work / "run.delta")
        sparse = make_delta(pair.base, folder, work / "run.safetensors", "sparse-safetensors")
        files = {
            "`offprincipal delta`": ours.path,
            "`NAME.idx` and `NAME.val`, as TRL exchanges them with vLLM": sparse.path,
            "the same, `zstd -19`": zstd("-19", sparse.path, out=work / "run.zst"),
            "`zstd --patch-from BASE`": patch(pair.base, folder, work / "patch.zst"),
            "weightscope's `.wsp`": wsp(weightscope, pair.base, folder, work / "run.wsp"),
        }
        for words, path in files.items():
            size = path.stat().st_size
            bits, times = 8 * size / ours.changed, size / files["`offprincipal delta`"].stat().st_size
            cells = (f"{100 * ours.changed / ours.entries:.2f} %", words, number(size / 1e6), f"{bits:.1f}")
            rows.append((*cells, f"{times:.1f}"))
    note = (
        f"A pair of {number(pair.parameters / 1e6)} M parameters in bfloat16, {_STEPS} steps of AdamW's length and "
        "random signs, kept in float32 and stored at the end. Sizes of files; all of them are without loss."
    )
    return Table("(l) Deltas", note, COLUMNS, tuple(rows))


def moved(base: Path, out: Path, share: float) -> Path:
    """The base after steps of the one length that changes about so many entries."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out)
    rng = np.random.default_rng(0)
    for file in sorted(out.glob("*.safetensors")):
        weights = load_file(file)
        spacings = [Spacings.of(weight.float().numpy(), "bfloat16") for weight in weights.values()]
        length = length_for(sum(spacings[1:], spacings[0]), share)
        for name, weight in weights.items():
            walk = rng.binomial(_STEPS, 0.5, weight.shape) * 2 - _STEPS
            weights[name] = (weight.float() + torch.from_numpy(length * walk).float()).to(weight.dtype)
        save_file(weights, file, {"format": "pt"})
    return out


def length_for(spacings: Spacings, share: float) -> float:
    """The length of steps that moves a share, by halving."""
    low, high = 1e-12, 1.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if (spacings.share_moved_walking(middle, _STEPS) or 0) > share else (middle, high)
    return high


def zstd(*arguments: str | Path, out: Path) -> Path:
    program = shutil.which("zstd")
    if program is None:
        raise NotMeasured("there is no zstd")
    subprocess.run([program, "-q", "-f", "-T0", *arguments, "-o", out], check=True)
    return out


def patch(base: Path, tuned: Path, out: Path) -> Path:
    names = [path.name for path in sorted(base.glob("*.safetensors"))]
    if len(names) != 1:
        raise NotMeasured("zstd takes one file")
    return zstd("--long=31", f"--patch-from={base / names[0]}", tuned / names[0], out=out)


def wsp(python: Path, base: Path, tuned: Path, out: Path) -> Path:
    code = "import sys; from pathlib import Path; from weightscope import export_patch; "
    code += "export_patch(sys.argv[1], sys.argv[2], out_path=Path(sys.argv[3]))"
    done = subprocess.run([python, "-c", code, base, tuned, out], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMeasured(f"weightscope failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return out
