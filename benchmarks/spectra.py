"""(d) The spectra of both models, against weightwatcher in a virtual environment of its own."""

import subprocess
from functools import partial
from pathlib import Path

from harness import SIDE_BY_SIDE, Cost, Table, compare_command, in_turn, number, process, python_with
from pairs import Pair

PROGRAM = Path(__file__).with_name("watch_weights.py")


def against_weightwatcher(pair: Pair, rounds: int, environment: Path) -> Table:
    """Whole processes. Weightwatcher has no subspaces and no nulls, so spectra alone are the common work."""
    python = python_with(environment, ("weightwatcher", "transformers", "safetensors"))
    version = installed_version(python)

    def watching() -> Cost:
        return process([python, PROGRAM, pair.base, pair.tuned])

    other = (
        "`analyze()` of base and of tuned with its default power-law fits and `distances()` between them, the whole "
        "process: singular values of every linear matrix, no vectors, no nulls"
    )
    rows = []
    for metrics, what in (
        ("spectrum", "`--metrics spectrum`"),
        ("changes,location,update,spectrum,subspace,bounds", "all metrics"),
    ):
        ours = partial(compare_command, pair.base, pair.tuned, "--metrics", metrics)
        found = in_turn(ours, watching, rounds, [ours])
        rows.append((f"`offprincipal compare`, {what}, nothing in the cache, the whole process", other, *found.cells()))
    note = (
        f"A pair of {number(pair.parameters / 1e6)} M parameters and {len(pair.linear_matrices())} linear matrices. "
        f"Weightwatcher {version} reads models that transformers loaded in float32, and leaves the embedding "
        "out, as ours does."
    )
    return Table("(d) Weightwatcher", note, SIDE_BY_SIDE, tuple(rows))


def installed_version(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('weightwatcher'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
