"""What every row of the benchmark shares: two sides timed in turn, processes with their memory, tables.

Both sides of a row run on the same files in one run, in turn, and which goes first alternates. A result is the median
of the ratios of the rounds, with the least and the most. Knows nothing of what is measured.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

LAUNCHER = Path(__file__).with_name("measure_child.py")
CACHE_VARIABLE = "OFFPRINCIPAL_CACHE"


class NotMeasured(Exception):
    """Why a row has no figure on this machine."""


@dataclass(frozen=True)
class Cost:
    """What one run of one side took; in-process runs know no memory."""

    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, the least and the most."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"**{number(self.median)}** ({number(self.low)}–{number(self.high)})"


@dataclass(frozen=True)
class SideBySide:
    """How many times ours goes into the alternative, in time and in peak memory, and the medians behind it."""

    time: Spread
    memory: Spread | None
    ours: Cost
    other: Cost

    def cells(self) -> tuple[str, str, str]:
        """The ratio in time, the ratio in memory, and the absolute figures as context."""
        memory = "" if self.memory is None else str(self.memory)
        return str(self.time), memory, f"{describe(self.ours)} against {describe(self.other)}"


@dataclass(frozen=True)
class Table:
    """One group of rows as it is printed; without rows the note says why."""

    title: str
    note: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        lines = [f"## {self.title}", "", self.note, ""]
        if self.rows:
            lines += [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
            lines += [*(f"| {' | '.join(row)} |" for row in self.rows), ""]
        return "\n".join(lines)


SIDE_BY_SIDE = ("ours", "alternative", "times as fast", "times less memory", "ours against the alternative, here")


def in_turn(
    ours: Callable[[], Cost], other: Callable[[], Cost], rounds: int, warm_up: Sequence[Callable[[], Cost]] = ()
) -> SideBySide:
    """Both sides `rounds` times; `warm_up` runs before that and is not counted."""
    for run in warm_up:
        run()
    pairs = []
    for turn in range(rounds):
        first, second = (ours, other) if turn % 2 == 0 else (other, ours)
        costs = first(), second()
        pairs.append(costs if turn % 2 == 0 else costs[::-1])
    memory = [other.peak_bytes / ours.peak_bytes for ours, other in pairs if ours.peak_bytes and other.peak_bytes]
    return SideBySide(
        spread([other.seconds / ours.seconds for ours, other in pairs]),
        spread(memory) if memory else None,
        middle([cost for cost, _ in pairs]),
        middle([cost for _, cost in pairs]),
    )


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], other: Sequence[float]) -> Spread:
    """Of what two sides took in the same rounds."""
    return spread([one / two for one, two in zip(ours, other, strict=True)])


def in_rounds(steps: Sequence[Callable[[], object]], rounds: int, warm_up: int = 1) -> list[list[float]]:
    """CPU seconds of each step in each round, which runs all of them, forwards and backwards in turn.

    The process's own CPU time is what other processes on the machine disturb least. The first rounds are not counted.
    """
    found: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + warm_up):
        for place in list(range(len(steps)))[:: 1 if turn % 2 == 0 else -1]:
            began = time.process_time()
            steps[place]()
            found[place].append(time.process_time() - began)
    return [seconds[warm_up:] for seconds in found]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes on so many threads inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def middle(costs: Sequence[Cost]) -> Cost:
    """Medians of time and memory."""
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    seconds = statistics.median(cost.seconds for cost in costs)
    return Cost(seconds, int(statistics.median(peaks)) if peaks else None)


def timed(run: Callable[[], object]) -> Cost:
    """A call in this process."""
    began = time.perf_counter()
    run()
    return Cost(time.perf_counter() - began)


def process(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Cost:
    """A whole process, from fork to exit, and its peak resident memory.

    Raises:
        NotMeasured: it failed; the message ends with the last line that it printed.
    """
    launched = subprocess.run(
        [sys.executable, "-S", str(LAUNCHER), *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | dict(environment or {}),
        check=True,
    )
    found = json.loads(launched.stdout)
    if found["status"] != 0:
        said = launched.stderr.strip().splitlines() or ["nothing"]
        name = " ".join(Path(str(part)).name for part in command[:3])
        raise NotMeasured(f"`{name} …` ended with status {found['status']} and said: {said[-1]}")
    return Cost(found["seconds"], found["peak_bytes"])


def offprincipal(*arguments: str | Path, cache: Path | None = None) -> Cost:
    """Our command in a process of its own; without `cache` it finds an empty one."""
    with tempfile.TemporaryDirectory() as empty:
        program = Path(sys.executable).with_name("offprincipal")
        return process([program, *arguments], {CACHE_VARIABLE: str(cache or empty)})


def compare_command(base: Path, tuned: Path, *options: str, cache: Path | None = None) -> Cost:
    """`offprincipal compare`, with its tables written and no report."""
    with tempfile.TemporaryDirectory() as out:
        return offprincipal("compare", base, tuned, "--no-report", "--out", out, *options, cache=cache)


@contextmanager
def cache_folder(folder: Path | None = None) -> Iterator[Path]:
    """Comparisons in this process use that cache, or an empty one that goes away."""
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as empty:
        os.environ[CACHE_VARIABLE] = str(folder or empty)
        try:
            yield Path(os.environ[CACHE_VARIABLE])
        finally:
            del os.environ[CACHE_VARIABLE]
            if before is not None:
                os.environ[CACHE_VARIABLE] = before


def python_with(environment: Path, packages: Sequence[str]) -> Path:
    """The interpreter of an environment with packages and our version of torch; made if the first is not there.

    Raises:
        NotMeasured: they cannot be installed.
    """
    python = environment / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", f"import {packages[0]}"], capture_output=True).returncode == 0:
        return python
    release = version("torch").partition("+")[0]
    steps: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", "--clear", environment],
        [python, "-m", "pip", "install", "--quiet", f"torch=={release}"],  # first, or another one is taken
        [python, "-m", "pip", "install", "--quiet", *packages],
    ]
    for step in steps:
        done = subprocess.run(
            step, capture_output=True, text=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise NotMeasured(f"{packages[0]} could not be installed: {said[-1]}")
    return python


def describe(cost: Cost) -> str:
    memory = "" if cost.peak_bytes is None else f", {cost.peak_bytes / 1e9:.2f} GB"
    return f"{number(cost.seconds)} s{memory}"


def number(value: float) -> str:
    """Three significant digits or so, without an exponent.

    >>> [number(value) for value in (0.0123, 1.234, 12.34, 1234.5)]
    ['0.012', '1.23', '12.3', '1234']
    """
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.{1 if value < 100 else 0}f}"


def machine() -> str:
    """Processor, cores and memory, as far as the system tells."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{model}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB of memory, {platform.system()}"
