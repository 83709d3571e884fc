"""The command line itself, and what its commands share: options, error output, progress and interruption."""

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from offprincipal.cli.unknown_options import Commands
from offprincipal.errors import ArgumentError, OffPrincipalError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
errors = Console(stderr=True, highlight=False)  # numbers in sentences have no colours of their own

MEASURING, TRAINING, VIEWING = "Measure", "Train and intervene", "Look, keep and share"  # panels of the help
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; created if it does not exist.")]
ReportTo = Annotated[
    str | None,
    typer.Option(
        metavar="TRACKER", help="Log the pooled figures to tensorboard, trackio or wandb, as one tracker run per run."
    ),
]


def main() -> None:
    """Run the command line; an `OffPrincipalError` becomes its message and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # characters that the console cannot encode are shown as ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code: Any = 0
    try:
        app()
    except SystemExit as ended:
        code = ended.code
    except (OffPrincipalError, OSError) as error:
        errors.print(f"[bold red]error:[/] {escaped(str(error))}", soft_wrap=True)
        code = 2
    sys.exit(_flushed(code))


def _flushed(code: Any) -> Any:
    """The exit code after flushing stdout: 2 if that fails and nothing else did; a closed pipe is not a failure."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # so that the interpreter's own flush does not fail
        if not isinstance(error, BrokenPipeError) and not code:
            errors.print(f"[bold red]error:[/] cannot print: {escaped(str(error))}")
            return 2
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        from offprincipal import __version__

        print(f"offprincipal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What did post-training do to the weights: geometry, precision, or step length?"""


def require_training(command: str) -> None:
    from offprincipal.models import require_training_extra

    require_training_extra(f"`offprincipal {command}`")


def named_runs(tuned: list[str]) -> Any:
    """Run name -> path; names that differ only in a final number are sorted by it."""
    from offprincipal.checkpoints.naming import name_runs

    runs: dict[str, str] = {}
    for text in tuned:
        name, equals, source = text.partition("=")
        named = equals and name and not _is_path(name) and not _exists(text)
        given = {name: source} if named else name_runs([text])
        for run, path in given.items():
            if run in runs:
                raise ArgumentError(f"two runs are named '{run}': distinguish them with NAME=PATH")
            runs[run] = path
    steps = {run: found for run in runs if (found := re.fullmatch(r"(.*?)([0-9]{1,12})", run))}
    if len(steps) == len(runs) and len({found[1] for found in steps.values()}) == 1:
        return {run: runs[run] for run in sorted(runs, key=lambda run: int(steps[run][2]))}
    return runs


def named_masters(masters: list[str], runs: dict[str, str]) -> dict[str, str]:
    """Run -> path of its masters; a path without a name belongs to the only run."""
    found: dict[str, str] = {}
    for text in masters:
        name, equals, source = text.partition("=")
        if not equals or name not in runs:
            if len(runs) != 1 and not equals:
                raise ArgumentError(
                    f"whose masters are {text}? Several runs are given: write --masters NAME={text}, with NAME one of "
                    f"{', '.join(runs)}"
                )
            name, source = (next(iter(runs)), text) if not equals or _exists(text) else (name, source)
        if name in found:
            raise ArgumentError(f"masters of '{name}' are given twice: give --masters once per run")
        found[name] = source
    return found


@contextmanager
def resumable() -> Iterator[None]:
    """On Ctrl-C, say that nothing is lost, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        errors.print("\ninterrupted: the same command continues where it stopped")
        raise typer.Exit(130) from error


def _is_path(name: str) -> bool:
    """Whether the text before a `=` is part of a path rather than a run's name."""
    return any(separator in name for separator in ("/", os.sep, os.altsep) if separator)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long to be a path
        return False


_WIDTH = 100  # columns of a list that goes to a file or a pipe
_UNBROKEN = 1000  # columns, more than any name takes
PATIENCE = 60.0  # seconds between progress lines if there is no terminal, as in a batch job's log


def _lines(what: str) -> Callable[[int, int, str], None]:
    """Shows progress as log lines, at most one per minute."""
    began = last = time.monotonic()

    def show(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PATIENCE or not done:
            return
        last = now
        left = (now - began) / done * (total - done)
        shares = f"{done / total:.0%} of {total:,} {what}" if total else f"{done:,} {what}"
        errors.print(
            f"{shares} after {_clock(now - began)}, {_clock(left)} left; {escaped(name)}",
            soft_wrap=True,
        )

    return show


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(59.4), _clock(3661)
    ('0:59', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


@contextmanager
def matrix_progress() -> Iterator[Any]:
    """A progress bar of parameters, with rate and time left, on a terminal; otherwise occasional log lines."""
    if not errors.is_terminal:
        yield _lines("parameters")
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn("comparing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=errors, transient=True, expand=True) as bar:
        line = bar.add_task("comparing", total=None, rate="", tensor="")

        def show(done: int, total: int, tensor: str) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed / 1e6:.1f} M parameters/s" if speed else ""
            bar.update(line, completed=done, total=total, rate=rate, tensor=escaped(tensor))

        yield show


@contextmanager
def direction_progress() -> Iterator[Any]:
    """A progress bar of directions, with the time left, on a terminal; otherwise occasional log lines."""
    if not errors.is_terminal:
        yield _lines("directions")
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("measuring directions"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[run]}"),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        line = bar.add_task("", total=None, run="")

        def show(done: int, total: int, run: str) -> None:
            bar.update(line, completed=done, total=total, run=escaped(run))

        yield show


def print_list(listed: Table, *notes: str) -> None:
    """A list of names and what is said of them, and notes on it.

    No name is broken, so that it can be searched for; off a terminal lines are as wide as COLUMNS says, and padded with
    nothing.
    """
    console = Console(width=None if "COLUMNS" in os.environ or sys.stdout.isatty() else _WIDTH, highlight=False)
    unbroken = console.measure(listed, options=console.options.update(max_width=_UNBROKEN)).minimum
    console.width = max(console.width, unbroken)
    with console.capture() as drawn:
        console.print(listed, *notes)
    lines = drawn.get().splitlines()
    print("\n".join(line if console.is_terminal else line.rstrip() for line in lines))


def print_tables(*tables: RenderableType) -> None:
    """Tables and what stands between them; numbers in sentences have no colours of their own."""
    Console(highlight=False).print(*tables)


def say(text: str, style: str | None = None, soft_wrap: bool = True) -> None:
    """Print one line, with markup and control characters in names neutralised."""
    from offprincipal.plain_text import plain

    Console(highlight=False).print(plain(text), style=style, soft_wrap=soft_wrap, markup=False)


def escaped(text: str) -> str:
    """Text made safe to embed in rich markup."""
    from offprincipal.reports.words import shown

    return shown(text)
