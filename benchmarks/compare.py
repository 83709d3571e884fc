"""Ratios against the alternatives, side by side in one run: `make bench`.

    python benchmarks/compare.py --only a,b
    python benchmarks/compare.py --quick --out /tmp/results.md

Machines differ and are noisy, so a result is a ratio; absolute figures stand beside it as context for one machine on
one day. Writes benchmarks/RESULTS.md after each group of rows: all of it anew, or with `--only` those groups in place
of what they were, each with the day and the machine. (a) to (g) measure `compare`, (h) to (j) training, (k) the
rules of claims, (l) the sizes of deltas, (m) `compare` against other tools, (n) trajectories.
"""

import argparse
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from adapters import adapter_costs
from calibration import calibration
from change_scan import change_scan
from decomposition import against_svd, second_tuned
from deltas import delta_sizes
from gpu import end_to_end
from harness import NotMeasured, Table, machine
from isospectral import isospectral_steps
from pairs import PairFolder
from peers import against_peers
from scaling import ALL_METRICS, Point, measure_scaling, memory_table, time_table
from sparse import sparse_steps
from spectra import against_weightwatcher
from trajectories import against_stacking

HERE = Path(__file__).parent
WORK = Path(tempfile.gettempdir()) / "offprincipal-bench"
PACKAGES = ("offprincipal", "torch", "transformers", "safetensors", "numpy")
TINY = "tiny:64,160,2,4,2,512"
HEADING = """# Benchmark

`make bench` makes this file; under each group stands when and where it was measured.

(a) to (g), (m) and (n): a ratio is the alternative's cost over ours, so above 1 ours needs less: the **median** of the
rounds, with the least and the most in brackets. Both sides run in turn on the same files. The models are synthetic,
with the shapes of Qwen2 and a power-law spectrum (`scripts/make_synthetic.py`). (h) to (j): a ratio is ours over the
other's, so below 1 ours needs less. (k) is no measurement of cost, and (l) is of sizes.
"""


@dataclass(frozen=True)
class Plan:
    """On which pairs, and with how many rounds, the groups are measured.

    Args:
        trajectories: model, checkpoints side by side, and alone.
        sparse: side of the matrix, rounds. adapters: model, (batch, length, rounds) of each size, methods.
        isospectral: rounds, steps, batch. calibration: studies of each kind.
    """

    scan: tuple[str, int | None]
    decomposition: tuple[str, int]
    spectra: tuple[str, int]
    scaling: tuple[tuple[str, str, tuple[int, ...]], ...]
    rounds: int
    loaded: int
    sparse: tuple[int, int]
    adapters: tuple[str, tuple[tuple[int, int, int], ...], tuple[str, ...]]
    isospectral: tuple[int, int, int]
    calibration: int
    deltas: tuple[str, int]
    peers: tuple[str, ...]
    trajectories: tuple[str, int, int]


FULL = Plan(
    scan=("0.5b", None),
    decomposition=("0.5b", 4),
    spectra=("0.5b", 8),
    scaling=(
        ("0.5b", "location", (6, 12, 24)),
        ("1.5b", "location", (7, 14, 28)),
        ("0.5b", ALL_METRICS, (2, 4, 8)),
        ("1.5b", ALL_METRICS, (2, 4)),
    ),
    rounds=5,
    loaded=4,
    sparse=(2048, 21),
    adapters=("embedded", ((240, 24, 7), (16, 24, 31)), ("lora", "off_principal", "pissa", "geora")),
    isospectral=(3, 4, 240),
    calibration=100,
    deltas=("0.5b", 4),
    peers=("0.5b-24:896,4864,24,14,2,512", "1.5b-2:1536,8960,2,12,2,512", "7b-1:4096,11008,1,32,8,512"),
    trajectories=("0.5b-4:896,4864,4,14,2,512", 20, 200),
)
QUICK = Plan(
    scan=(TINY, None),
    decomposition=(TINY, 1),
    spectra=(TINY, 1),
    scaling=((TINY, "location", (1, 2)), (TINY, ALL_METRICS, (1,))),
    rounds=1,
    loaded=1,
    sparse=(64, 1),
    adapters=("embedded", ((2, 4, 1),), ("off_principal",)),
    isospectral=(1, 1, 8),
    calibration=1,
    deltas=(TINY, 1),
    peers=(TINY,),
    trajectories=(TINY, 3, 6),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: RESULTS.md beside this file; none with --quick")
    parser.add_argument("--only", help="groups of rows, such as a,b; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, one round, without d, g, l and m: does it run?"
    )
    parser.add_argument("--rounds", type=int, help="ratios behind each median of (a) to (g)")
    parser.add_argument("--work", type=Path, default=WORK, help="keeps the models and weightwatcher's environment")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    groups = groups_of(plan, arguments.work, arguments.rounds or plan.rounds)
    wanted = (
        arguments.only.split(",")
        if arguments.only
        else [key for key in groups if not (arguments.quick and key in "dglm")]
    )
    unknown = [key for key in wanted if key not in groups]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}: choose one of {', '.join(groups)}")
    out = arguments.out or (None if arguments.quick else HERE / "RESULTS.md")
    arguments.work.mkdir(parents=True, exist_ok=True)
    sections = sections_of(out.read_text()) if arguments.only and out and out.exists() else {}
    for key in wanted:
        table = measured(key, groups[key])
        print(table, flush=True)
        sections[key] = f"{table}\n{circumstances()}\n"
        if out:
            write(out, render(sections))


def groups_of(plan: Plan, work: Path, rounds: int) -> dict[str, Callable[[], Table]]:
    """Every group of rows by its letter; (e) and (f) are two views of one set of runs."""
    folder = PairFolder(work)
    points: list[Point] = []

    def scaling() -> list[Point]:
        if not points:
            points.extend(measure_scaling(folder, plan.scaling, rounds))
        return points

    return {
        "a": lambda: change_scan(folder.pair(*plan.scan), rounds, plan.loaded),
        "b": lambda: against_svd(folder.pair(*plan.decomposition), rounds),
        "c": lambda: second_tuned(folder.pair(*plan.decomposition), folder.second(*plan.decomposition), rounds),
        "d": lambda: against_weightwatcher(folder.pair(*plan.spectra), min(rounds, 3), work / "weightwatcher"),
        "e": lambda: memory_table(scaling()),
        "f": lambda: time_table(scaling()),
        "g": lambda: end_to_end(folder, rounds),
        "h": lambda: sparse_steps(*plan.sparse),
        "i": lambda: adapter_costs(*plan.adapters),
        "j": lambda: isospectral_steps(*plan.isospectral),
        "l": lambda: delta_sizes(folder.pair(*plan.deltas), work),
        "m": lambda: against_peers(folder, plan.peers, min(rounds, 3), work),
        "n": lambda: against_stacking(folder.pair(plan.trajectories[0]), *plan.trajectories[1:], min(rounds, 3), work),
        "k": lambda: calibration(plan.calibration, kept=work / f"calibration-{plan.calibration}.jsonl"),
    }


def measured(key: str, group: Callable[[], Table]) -> Table:
    try:
        return group()
    except NotMeasured as reason:
        return Table(f"({key})", f"Not measured: {reason}.")


def render(sections: Mapping[str, str]) -> str:
    return "\n".join([HEADING, *(sections[key] for key in sorted(sections))])


def sections_of(results: str) -> dict[str, str]:
    """The groups of rows of a file of results, by letter."""
    _, *rest = re.split(r"^## \((\w)\)", results, flags=re.MULTILINE)
    return {key: f"## ({key}){body.rstrip()}\n" for key, body in zip(rest[::2], rest[1::2], strict=True)}


def circumstances() -> str:
    """When, where and with what a group was measured."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"*{date.today()}; {machine()}; Python {platform.python_version()}, {versions}.*"


def write(out: Path, text: str) -> None:
    """All of it or nothing: a killed benchmark keeps what was measured."""
    whole = out.with_name(f"{out.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(out)


if __name__ == "__main__":
    main()
