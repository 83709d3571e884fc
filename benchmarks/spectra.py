"""(d) The spectra of both models, against weightwatcher in a virtual environment of its own."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from harness import SIDE_BY_SIDE, Cost, NotMeasured, Table, compare_command, in_turn, number, process
from pairs import Pair

PROGRAM = Path(__file__).with_name("watch_weights.py")


def against_weightwatcher(pair: Pair, rounds: int, environment: Path) -> Table:
    """Whole processes. Weightwatcher has no subspaces and no nulls, so spectra alone are the common work."""
    python = weightwatcher_python(environment)
    version = installed_version(python)

    def watching() -> Cost:
        return process([python, PROGRAM, pair.base, pair.tuned])

    other = (
        "`analyze()` of base and of tuned with its default power-law fits and `distances()` between them, the whole "
        "process: singular values of every linear matrix, no vectors, no nulls"
    )
    rows = []
    for metrics, what in (("spectrum", "`--metrics spectrum`"), ("location,spectrum,subspace,bounds", "all metrics")):
        ours = partial(compare_command, pair.base, pair.tuned, "--metrics", metrics)
        found = in_turn(ours, watching, rounds, [ours])
        rows.append((f"`offprincipal compare`, {what}, nothing in the cache, the whole process", other, *found.cells()))
    note = (
        f"A pair of {number(pair.parameters / 1e6)} M parameters and {len(pair.linear_matrices())} linear matrices. "
        f"Weightwatcher {version} reads models that transformers loaded in float32, and leaves the embedding "
        "out, as ours does."
    )
    return Table("(d) Weightwatcher", note, SIDE_BY_SIDE, tuple(rows))


def weightwatcher_python(environment: Path) -> Path:
    """The interpreter of an environment with weightwatcher and our version of torch; made if it is not there.

    Raises:
        NotMeasured: it cannot be installed.
    """
    python = environment / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", "import weightwatcher"], capture_output=True).returncode == 0:
        return python
    release = torch.__version__.partition("+")[0]
    steps: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", "--clear", environment],
        [python, "-m", "pip", "install", "--quiet", f"torch=={release}"],  # first, or another one is taken
        [python, "-m", "pip", "install", "--quiet", "weightwatcher", "transformers", "safetensors"],
    ]
    for step in steps:
        done = subprocess.run(
            step, capture_output=True, text=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise NotMeasured(f"weightwatcher could not be installed: {said[-1]}")
    return python


def installed_version(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('weightwatcher'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
