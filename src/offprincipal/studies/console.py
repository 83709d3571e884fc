"""Run a study on a terminal: its stages and estimated time, one line of progress per stage, and the result."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from offprincipal.assets import EMBEDDED
from offprincipal.file_names import STUDY
from offprincipal.files import read_json
from offprincipal.recipes import RECIPES
from offprincipal.studies.experiments import GatesStage, PrecisionStage
from offprincipal.studies.graph import StageGraph
from offprincipal.studies.running import ShowStage, pending, run_profile
from offprincipal.studies.stages import StageKind, TrainStage
from offprincipal.training import StepReport
from offprincipal.training.progress import describe

_MOST_JOBS = 4
_PRINT_EVERY = 30.0  # seconds between lines if there is no terminal


def run_on_console(
    profile: StageGraph, out: Path, jobs: int | None, overwrite: bool, console: Console
) -> dict[str, Any]:
    """Run the remaining stages of a study and return `study.json`, or an empty dict if no stage writes it.

    Raises:
        OffPrincipalError: the profile cannot run, or a stage failed.
    """
    jobs = jobs or default_jobs()
    left = pending(profile, out)
    console.print(f"study '{profile.name}': {profile.title}; base {profile.base}", highlight=False, markup=False)
    console.print(_forecast(profile, left, jobs), highlight=False, soft_wrap=True)
    with stage_progress(profile, console) as show:
        space = run_profile(profile, out, jobs, show, overwrite)
    left_behind = {path for name, stage in profile.stages.items() for path in stage.files(name, space)}
    return read_json(out / STUDY) if out / STUDY in left_behind else {}


def default_jobs() -> int:
    """Number of training runs at once: one per core, at most four; one if there is a GPU."""
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, _MOST_JOBS)


def _forecast(profile: StageGraph, left: list[str], jobs: int) -> str:
    if not left:
        return "everything is done already; nothing will run again"
    training = [name for name in left if isinstance(profile.stages[name], TrainStage)]
    text = f"{len(left)} of {len(profile.stages)} stages to do, {len(training)} of them training runs, {jobs} at a time"
    minutes = estimate_minutes(profile, left, jobs)
    return (
        f"{text}; about {minutes:.0f} min on this machine"
        if minutes
        else f"{text}; how long is not known for this base"
    )


def estimate_minutes(profile: StageGraph, left: list[str], jobs: int) -> float | None:
    """Estimated time of the stages, from reference timings and this machine's speed.

    Returns:
        Minutes; None unless the base is the embedded one, for which timings exist.
    """
    stages = [profile.stages[name] for name in left]
    if profile.base != EMBEDDED or torch.cuda.is_available():
        return None
    slowness = _seconds_of_work() / _REFERENCE_WORK
    training = [s.train_settings(profile.base, profile.training) for s in stages if isinstance(s, TrainStage)]
    seconds = [_FIXED_TRAIN + s.steps * s.batch / 256 * RECIPES[s.recipe].seconds for s in training]
    at_once = min(jobs, os.cpu_count() or 1)
    makespan = max(sum(seconds) / at_once, max(seconds, default=0.0))
    return slowness * (makespan + sum(map(_seconds_besides_training, stages))) / 60


def _seconds_besides_training(stage: StageKind) -> float:
    if isinstance(stage, TrainStage):
        return 0.0
    return _OTHER + (_PER_RUN[stage.kind] * len(stage.runs) if isinstance(stage, PrecisionStage | GatesStage) else 0.0)


# Seconds on one core of the reference machine, as timed for the embedded base.
_FIXED_TRAIN = 10.0
_OTHER = 5.0
_PER_RUN = {"precision": 8.0, "gates": 25.0}
_REFERENCE_WORK = 0.25


def _seconds_of_work() -> float:
    """A second or less of the kind of work that training is, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, w = torch.randn(4096, 192), torch.randn(192, 512)
        began = time.perf_counter()
        for _ in range(20):
            torch.nn.functional.silu(x @ w) @ w.T
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


@contextmanager
def stage_progress(profile: StageGraph, console: Console) -> Iterator[ShowStage]:
    """What shows where the stages of a study are: live rows on a terminal, lines elsewhere."""
    if console.is_terminal:
        with _bars(profile, console) as show:
            yield show
    else:
        yield _lines(console)


@contextmanager
def _bars(profile: StageGraph, console: Console) -> Iterator[ShowStage]:
    """One row per stage; if the screen has too few lines, one row for all and one for each that is running."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    order = profile.order()
    fits = len(order) < console.height
    with Progress(*columns, console=console) as bars:
        overall = bars.add_task(_done_of(0, order), total=len(order), status="", visible=not fits)
        rows = {name: bars.add_task(name, total=1, start=False, status="waiting", visible=fits) for name in order}
        ended: set[str] = set()

        def show(stage: str, report: StepReport | str) -> None:
            row = rows[stage]
            if isinstance(report, StepReport):
                bars.update(row, total=report.steps, completed=report.step, status=describe(report))
                return
            if report == "started":
                bars.start_task(row)
            else:
                ended.add(stage)
            total = bars.tasks[row].total
            runs = report == "started"
            bars.update(row, status=report, completed=0 if runs else total, visible=fits or runs)
            bars.update(overall, description=_done_of(len(ended), order), completed=len(ended))
            if not runs:
                bars.stop_task(row)

        yield show


def _done_of(ended: int, order: list[str]) -> str:
    return f"stages {ended}/{len(order)}"


def _lines(console: Console) -> ShowStage:
    last: dict[str, float] = {}

    def show(stage: str, report: StepReport | str) -> None:
        now = time.monotonic()
        if isinstance(report, str):
            console.print(f"{stage}: {report}", highlight=False, markup=False)
        elif now - last.get(stage, -_PRINT_EVERY) >= _PRINT_EVERY:
            last[stage] = now
            step = f"step {report.step}/{report.steps}, " if report.metric else ""
            console.print(f"{stage}: {step}{describe(report)}", highlight=False, markup=False)

    return show
