"""Progress of a run: a live bar on a terminal, otherwise a line at every tenth of the steps."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINES = 10


@dataclass(frozen=True)
class StepReport:
    """Progress of a run or of another stage of a study.

    Args:
        stage: what is being done.
        step: optimizer steps done, or entries measured.
        steps: total number of optimizer steps, or of entries.
        metric: name of the value to display: `reward`, `reward_margin` or `loss`; empty if there is none.
        value: of the last step; None before the first step.
        seconds_per_step: mean since the process started or resumed the run; None before the first step.
    """

    stage: Literal[
        "measuring the base", "sampling preferences", "training", "measuring the result", "measuring", "blind studies"
    ]
    step: int
    steps: int
    metric: str = ""
    value: float | None = None
    seconds_per_step: float | None = None


ShowProgress = Callable[[StepReport], None]


def silent(report: StepReport) -> None:
    """Show nothing."""


@contextmanager
def terminal_progress(title: str) -> Iterator[ShowProgress]:
    """A function that shows a run's progress on standard output.

    Args:
        title: shown before the progress.

    >>> with terminal_progress("run") as show:
    ...     show(StepReport("training", 5, 10, "reward", 0.25, 2.0))
    run: step 5/10, reward 0.250, 2.00 s/step, 0:10 left
    """
    if sys.stdout.isatty():
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=Console(highlight=False)) as bar:
            line = bar.add_task(title, total=None, status="")

            def draw(report: StepReport) -> None:
                bar.update(line, completed=report.step, total=report.steps, status=describe(report))

            yield draw
    else:
        yield _line_printer(title)


def _line_printer(title: str) -> ShowProgress:
    """A function that prints a line when the stage or the tenth of the steps changes."""
    last: tuple[str, int] | None = None

    def show(report: StepReport) -> None:
        nonlocal last
        mark = (report.stage, report.step * _LINES // report.steps)
        if mark != last:
            last = mark
            print(f"{title}: step {report.step}/{report.steps}, {describe(report)}", flush=True)

    return show


def describe(report: StepReport) -> str:
    """A report in a few words.

    >>> describe(StepReport("training", 4, 64, "reward", 0.25, 2.0))
    'reward 0.250, 2.00 s/step, 2:00 left'
    >>> describe(StepReport("blind studies", 4, 64))
    'blind studies, 6 %'
    """
    if not report.metric:
        return f"{report.stage}, {100 * report.step // max(report.steps, 1)} %"
    if report.stage != "training" or report.value is None or report.seconds_per_step is None:
        return report.stage
    left = round((report.steps - report.step) * report.seconds_per_step)
    return (
        f"{report.metric} {report.value:.3f}, {report.seconds_per_step:.2f} s/step, {left // 60}:{left % 60:02d} left"
    )
