"""(m) Whole processes against what people would otherwise use: modeldelta, weightscope, and scripts of full SVDs."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness import SIDE_BY_SIDE, Cost, Table, compare_command, in_turn, process, python_with
from pairs import Pair, PairFolder

HERE = Path(__file__).parent


def against_peers(folder: PairFolder, shapes: tuple[str, ...], rounds: int, work: Path) -> Table:
    """Every shape has a small vocabulary, so that both sides measure the same matrices."""
    modeldelta, weightscope = (python_with(work / name, (name,)) for name in ("modeldelta", "weightscope"))
    rows: list[tuple[str, ...]] = []
    for shape in shapes:
        pair = folder.pair(shape)
        of = f"{shape.partition(':')[0]}, {len(pair.linear_matrices())} matrices"
        deltas = partial(run_modeldelta, modeldelta, pair)
        with tempfile.TemporaryDirectory() as kept:
            cached = partial(compare_command, pair.base, pair.tuned, cache=Path(kept))
            sides: tuple[tuple[str, Callable[[], Cost], str, Callable[[], Cost], bool], ...] = (
                (
                    "all metrics, nothing in the cache",
                    partial(compare_command, pair.base, pair.tuned),
                    MD,
                    deltas,
                    False,
                ),
                ("all metrics, the base in the cache", cached, MD, deltas, True),
                ("`--metrics update`", partial(ours, pair, "update"), MD, deltas, False),
                (
                    "`--metrics changes`",
                    partial(ours, pair, "changes"),
                    WS,
                    partial(run_weightscope, weightscope, pair),
                    False,
                ),
                (
                    "all metrics, nothing in the cache",
                    partial(compare_command, pair.base, pair.tuned),
                    SVD,
                    partial(full_svds, pair),
                    False,
                ),
            )
            for what, mine, other, theirs, warm in sides:
                found = in_turn(mine, theirs, rounds, [mine] if warm else [])
                print(of, what, other, *found.cells(), sep=" | ", file=sys.stderr, flush=True)
                rows.append(
                    (f"{of}: {what}", other.format(*map(installed_version, (modeldelta, weightscope))), *found.cells())
                )
    note = (
        "`offprincipal compare --no-report`. Ours measures every matrix of both sides, beside its nulls; modeldelta "
        "the singular values of every update; weightscope counts. The script is as they are usually written: both "
        "sides decomposed, the shift of their values, angles of their leading subspaces, and how much of what "
        "changed is in masks of principal and of small weights."
    )
    return Table("(m) Peers", note, ("ours", *SIDE_BY_SIDE[1:]), tuple(rows))


MD = "modeldelta {0}: singular values of every update"
WS = "weightscope {1} `diff`"
SVD = "full SVDs of both sides in float32, with masks and angles, all cores (`alternatives.py full-svd`)"


def ours(pair: Pair, metrics: str) -> Cost:
    return compare_command(pair.base, pair.tuned, "--metrics", metrics)


def run_modeldelta(python: Path, pair: Pair) -> Cost:
    with tempfile.TemporaryDirectory() as out:
        return process([python, "-m", "modeldelta", pair.base, pair.tuned, "-o", f"{out}/report.json"])


def run_weightscope(python: Path, pair: Pair) -> Cost:
    return process([python.with_name("weightscope"), "diff", pair.base, pair.tuned])


def full_svds(pair: Pair) -> Cost:
    return process([sys.executable, HERE / "alternatives.py", "full-svd", pair.base, pair.tuned])


def installed_version(python: Path) -> str:
    """Of what an environment was made for, by its folder's name."""
    code = f"from importlib.metadata import version; print(version({python.parents[1].name!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
