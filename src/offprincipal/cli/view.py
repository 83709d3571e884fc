"""Commands for existing results and checkpoints: show, report, card, delta, apply and cache."""

from pathlib import Path
from typing import Annotated

import typer

from offprincipal.cli.common import VIEWING, ReportTo, app, matrix_progress, print_tables, say


@app.command(rich_help_panel=VIEWING)
def show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that an offprincipal command wrote.")],
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Compare every figure with its nulls in sentences, and explain every claim."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the folder's JSON files, keyed by name, instead of tables.")
    ] = False,
) -> None:
    """Print a folder's results: a comparison, run, monitor, trajectory, study, gates, preflight or intervention."""
    from offprincipal.reports import show as showing
    from offprincipal.reports.terminal import as_shown_json

    if as_json:
        print(as_shown_json(showing.as_json(folder)))
        return
    for part in showing.parts_of(folder, explain):
        if isinstance(part, str):
            say(part, soft_wrap=False)
        else:
            print_tables(part)


@app.command(rich_help_panel=VIEWING)
def card(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that `compare` or `study` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for README.md, its figure and its data; an existing README is kept. Default: FOLDER/card.",
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Open a pull request with it for this model on the Hub.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME", help="Hub id to call the base by. Default: its folder or id in the comparison."
        ),
    ] = None,
) -> None:
    """Write a model card section about what training did to the weights: table, anatomy, figure, and JSON data."""
    from offprincipal.reports.card import push_card, write_card
    from offprincipal.reports.report import comparison_in
    from offprincipal.tables import read_summary

    summary, out = read_summary(comparison_in(folder)), out or folder / "card"
    if push is None:
        say(f"section: {write_card(summary, out, base_model)}")
    else:
        say(f"pull request: {push_card(summary, push, out, base_model)}")


@app.command(rich_help_panel=VIEWING)
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that `compare` or `study` wrote.")],
    figures: Annotated[
        str | None,
        typer.Option(metavar="FORMATS", help="Write figures for a paper to FOLDER/figures instead: pdf, svg, png."),
    ] = None,
    report_to: ReportTo = None,
) -> None:
    """Rebuild report.html from the tables in a folder, write figures for a paper, or log the figures to a tracker."""
    if report_to is not None:
        from offprincipal.reports.report import comparison_in
        from offprincipal.reports.trackers import report_comparison
        from offprincipal.tables import read_summary

        summary = read_summary(comparison_in(folder))
        say(f"reported to: {report_comparison(summary, report_to, folder)}")
        return
    if figures is not None:
        from offprincipal.reports.plots import write_plots

        for path in write_plots(folder, [name.strip() for name in figures.split(",")]):
            say(str(path))
        return
    from offprincipal.reports.report import write_report_of

    say(str(write_report_of(folder)))


@app.command(rich_help_panel=VIEWING)
def delta(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Any checkpoint that `compare` reads.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Model trained from it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: NAME.delta.")],
    format: Annotated[
        str,
        typer.Option(help="Format: delta, or sparse-safetensors (indices and values as TRL exchanges them with vLLM)."),
    ] = "delta",
) -> None:
    """Write the changes from BASE to TUNED into one small file, losslessly.

    The file is safetensors inside and checked by hashes of both sides. Commands that take BASE and TUNED take it too.
    """
    from offprincipal.deltas import make_delta
    from offprincipal.reports.terminal import delta_lines

    with matrix_progress() as progress:
        made = make_delta(base, tuned, out, format, progress=progress)
    for line in delta_lines(made):
        say(line)


@app.command(rich_help_panel=VIEWING)
def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint that the delta was made from.")],
    file: Annotated[Path, typer.Argument(metavar="DELTA", help="A .delta file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder; on failure nothing is written.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the contents of the folder.")] = False,
) -> None:
    """Restore the tuned model from BASE and a delta, bit for bit, as a Hugging Face folder."""
    from offprincipal.deltas import apply_delta

    with matrix_progress() as progress:
        apply_delta(base, file, out, overwrite=overwrite, progress=progress)
    say(f"model: {out}")


cache_app = typer.Typer(no_args_is_help=True, help="Base decompositions that `compare` caches.")
app.add_typer(cache_app, name="cache", rich_help_panel=VIEWING)


@cache_app.command("info")
def cache_info() -> None:
    """Show where base decompositions are cached, and how much space they take."""
    from offprincipal.comparison.cache import BaseCache
    from offprincipal.files import cache_folder

    say(str(BaseCache(cache_folder()).info()))


@cache_app.command("clear")
def cache_clear() -> None:
    """Remove all cached base decompositions."""
    from offprincipal.comparison.cache import BaseCache
    from offprincipal.files import cache_folder

    say(f"removed: {BaseCache(cache_folder()).clear()}")
