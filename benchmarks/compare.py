"""Ratios against the alternatives, side by side in one run: `make bench`.

    python benchmarks/compare.py --only a,b
    python benchmarks/compare.py --quick --out /tmp/results.md

Machines differ and are noisy, so a result is a ratio; absolute figures stand beside it as context for one machine on
one day. Writes benchmarks/RESULTS.md after each group of rows, with what is measured so far.
"""

import argparse
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from change_scan import change_scan
from decomposition import against_svd, second_tuned
from gpu import end_to_end
from harness import NotMeasured, Table, machine
from pairs import PairFolder
from scaling import ALL_METRICS, Point, measure_scaling, memory_table, time_table
from spectra import against_weightwatcher

HERE = Path(__file__).parent
WORK = Path(tempfile.gettempdir()) / "offprincipal-bench"
PACKAGES = ("offprincipal", "torch", "transformers", "safetensors", "numpy")
TINY = "tiny:64,160,2,4,2,512"


@dataclass(frozen=True)
class Plan:
    """On which pairs the groups are measured."""

    scan: tuple[str, int | None]
    decomposition: tuple[str, int]
    spectra: tuple[str, int]
    scaling: tuple[tuple[str, str, tuple[int, ...]], ...]
    rounds: int
    loaded: int


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
)
QUICK = Plan(
    scan=(TINY, None),
    decomposition=(TINY, 1),
    spectra=(TINY, 1),
    scaling=((TINY, "location", (1, 2)), (TINY, ALL_METRICS, (1,))),
    rounds=1,
    loaded=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: RESULTS.md beside this file, if every group is measured")
    parser.add_argument("--only", help="groups of rows, such as a,b; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, without d and g: does it run?")
    parser.add_argument("--rounds", type=int, help="ratios behind each median")
    parser.add_argument("--work", type=Path, default=WORK, help="keeps the models and weightwatcher's environment")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    groups = groups_of(plan, arguments.work, arguments.rounds or plan.rounds)
    wanted = (
        arguments.only.split(",")
        if arguments.only
        else [key for key in groups if not (arguments.quick and key in "dg")]
    )
    unknown = [key for key in wanted if key not in groups]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}: choose of {', '.join(groups)}")
    out = arguments.out or (None if arguments.only or arguments.quick else HERE / "RESULTS.md")
    arguments.work.mkdir(parents=True, exist_ok=True)
    tables: list[Table] = []
    for key in wanted:
        tables.append(measured(key, groups[key]))
        print(tables[-1], flush=True)
        if out:
            out.write_text(render(tables))


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
    }


def measured(key: str, group: Callable[[], Table]) -> Table:
    try:
        return group()
    except NotMeasured as reason:
        return Table(f"({key})", f"Not measured: {reason}.")


def render(tables: list[Table]) -> str:
    return "\n".join([*heading(), *map(str, tables)])


def heading() -> Iterator[str]:
    yield "# Benchmark\n"
    yield (
        f"{date.today()}; {machine()}; Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        + ". `make bench` makes this file.\n"
    )
    yield (
        "A ratio is the alternative's cost over ours, so above 1 ours needs less: the **median** of the rounds, with "
        "the least and the most in brackets. Both sides run in turn on the same files. The models are synthetic, "
        "with the shapes of Qwen2 and a power-law spectrum (`scripts/make_synthetic.py`).\n"
    )


if __name__ == "__main__":
    main()
