"""Commands that measure checkpoints: compare, preflight, trajectory, gates."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offprincipal.cli.common import (
    MEASURING,
    Out,
    ReportTo,
    app,
    direction_progress,
    errors,
    escaped,
    matrix_progress,
    named_masters,
    named_runs,
    print_list,
    print_tables,
    require_training,
    resumable,
    say,
)
from offprincipal.defaults import (
    BATCHES,
    DENSITY,
    DRAWS,
    LAYER_DRAWS,
    MAX_NEW_TOKENS,
    NULL_DRAWS,
    PROMPTS_PER_BATCH,
    RANK_FRACTION,
    TOLERANCE,
)
from offprincipal.errors import ArgumentError
from offprincipal.file_names import GATES, PREFLIGHT, PREFLIGHT_PAGE, TRAJECTORY_PAGE

WHAT, HOW, CONDITIONS, SHOWN = "What is measured", "How, and where", "Conditions: exit code 3", "What is printed"
ON, EXPERT = "What it is measured on", "Expert"

if TYPE_CHECKING:
    from offprincipal.comparison import Condition


def _print_metrics(wanted: bool) -> None:
    if wanted:
        from offprincipal.measures.columns import METRICS
        from offprincipal.reports.terminal import as_shown_json, metrics_json, metrics_table

        if "--json" in sys.argv:  # an eager option sees no other that stands behind it
            print(as_shown_json(metrics_json(METRICS)))
        else:
            print_list(
                metrics_table(METRICS),
                "the column of a null is FIGURE_NULL or FIGURE_NULL_null: --list --json has each",
            )
        raise typer.Exit


@app.command(rich_help_panel=MEASURING)
def compare(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="The base model: a folder, a Hub id such as org/name@revision, or `embedded`."
        ),
    ],
    tuned: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]TUNED...",
            help="Models trained from it: folders or Hub ids of models, adapters, or distributed checkpoints.",
        ),
    ],
    out: Out = Path("comparison"),
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metric groups to measure, comma-separated: changes (always included), location, update, spectrum, "
            "subspace, bounds; the last three decompose the base. Default: all.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    listed: Annotated[
        bool,
        typer.Option(
            "--list",
            callback=_print_metrics,
            is_eager=True,
            help="List every metric with its group and nulls, and exit; with --json, every column as JSON.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    rank_fraction: Annotated[
        float,
        typer.Option(help="Rank of the principal subspace, as a fraction of min(rows, columns).", rich_help_panel=WHAT),
    ] = RANK_FRACTION,
    density: Annotated[
        float, typer.Option(help="Fraction of each matrix's entries in a mask.", rich_help_panel=WHAT)
    ] = DENSITY,
    null_draws: Annotated[
        int,
        typer.Option(
            help="Number of Gaussian updates averaged for each isotropic null (fewer for large matrices).",
            rich_help_panel=WHAT,
        ),
    ] = NULL_DRAWS,
    seed: Annotated[
        int,
        typer.Option(help="Random seed of the random mask and the Gaussian updates.", rich_help_panel=WHAT),
    ] = 0,
    include_embeddings: Annotated[
        bool, typer.Option("--include-embeddings", help="Measure embeddings and heads too.", rich_help_panel=WHAT)
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Fail if a tensor exists on only one side; by default such tensors are listed.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    solver: Annotated[
        str,
        typer.Option(
            help="How matrices are decomposed: auto, exact (LAPACK for every matrix) or randomized. If min(rows, "
            "columns) is at most 256, the decomposition is always exact.",
            rich_help_panel=HOW,
        ),
    ] = "auto",
    tolerance: Annotated[
        float,
        typer.Option(
            help="Allowed relative error of singular values; a matrix that exceeds it is solved exactly.",
            rich_help_panel=HOW,
        ),
    ] = TOLERANCE,
    device: Annotated[
        str, typer.Option(help="Device that decomposes matrices: cpu, cuda or auto.", rich_help_panel=HOW)
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Number of matrices measured in parallel. Default: all cores.", rich_help_panel=HOW),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory budget for matrices being measured, e.g. 8GB. Default: 60 % of free memory.",
            rich_help_panel=HOW,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Measure on the Ray cluster at this address; `local` starts one here. Default: without Ray.",
            rich_help_panel=HOW,
        ),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            help="Reuse cached base decompositions (see `offprincipal cache`) and runs already measured in --out.",
            rich_help_panel=HOW,
        ),
    ] = True,
    masters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Where a run's float32 master weights are. Default: its folder's own, if any.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="CONDITION",
            help="Exit with code 3 if the condition is true, e.g. 'principal_angle_left_max_deg > 10'.",
            rich_help_panel=CONDITIONS,
        ),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="PATTERN: WHAT",
            help="Exit with code 3 unless every matching tensor is `unchanged`, `changed`, or satisfies "
            "METRIC > NUMBER.",
            rich_help_panel=CONDITIONS,
        ),
    ] = None,
    contract: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of such expectations, one per line, e.g. `model.visual.*: unchanged`.",
            rich_help_panel=CONDITIONS,
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Compare every figure with its nulls in sentences, as in the report.",
            rich_help_panel=SHOWN,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print summary.json instead of tables.", rich_help_panel=SHOWN)
    ] = False,
    report: Annotated[bool, typer.Option(help="Write report.html too.")] = True,
    report_to: ReportTo = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a comparison of other runs in the folder.")
    ] = False,
) -> None:
    """Measure what training did to the weights, and compare every figure with its null.

    If interrupted, rerun the same command to continue; added runs are measured without repeating the others.
    Writes four Parquet tables, summary.json and report.html.
    """
    from offprincipal.comparison import CompareSettings, MatrixSettings, parse_condition
    from offprincipal.comparison import compare as compare_checkpoints
    from offprincipal.measures.columns import GROUPS
    from offprincipal.measures.contract import broken_phrases, read_contract
    from offprincipal.memory import parse_size
    from offprincipal.reports.names import run_labels
    from offprincipal.reports.terminal import as_shown_json, comparison_table, ladder_tables
    from offprincipal.reports.trackers import report_comparison, require_tracker
    from offprincipal.reports.words import ASK, contract_lines, decisions, verdict_paragraph, warnings_of

    groups: Any = GROUPS if metrics is None else metrics
    chosen: Any = {"solver": solver, "tolerance": tolerance, "device": device}
    matrix = MatrixSettings(rank_fraction, density, null_draws=null_draws, seed=seed, **chosen)
    expected = [*(expect or []), *(read_contract(contract) if contract else [])]
    settings = CompareSettings(groups, matrix, include_embeddings, strict, tuple(expected))
    conditions = [parse_condition(text, settings.metrics) for text in fail_if or []]
    if report_to:
        require_tracker(report_to)  # before hours of measuring, not after
    runs = named_runs(tuned)
    options: Any = {"out": out, "threads": threads, "ray": ray, "cache": cache}
    options["memory"] = None if memory is None else parse_size(memory)
    options["masters"] = named_masters(masters or [], runs)
    options |= {"report": report, "overwrite": overwrite}
    with resumable(), matrix_progress() as progress:
        found = compare_checkpoints(base, runs, settings, **options, progress=progress)
    try:
        if as_json:
            print(as_shown_json(found.summary))
        else:
            print_tables(comparison_table(found.summary))
            for kept in contract_lines(found.summary):
                say(kept)
            for warning in warnings_of(found.summary):
                say(f"note: {warning}", style="yellow", soft_wrap=False)
            if found.measured_before:
                say(f"measured before, not again: {', '.join(found.measured_before)} (--no-cache measures all)")
            if explain:
                print_tables(*ladder_tables(found.summary))
            labels = run_labels(found.summary["runs"])
            for sentence in verdict_paragraph(found.summary) if explain else decisions(found.summary, ASK, labels):
                say(sentence, soft_wrap=False)
            say(f"tables{' and report' if report else ''}: {out}")
        if report_to:
            told = report_comparison(found.summary, report_to, out)
            if not as_json:
                say(f"reported to: {told}")
    finally:  # a pipeline depends on the exit code even if printing failed
        _fail_if(conditions, found.summary, broken_phrases(found.summary))


def _fail_if(conditions: "list[Condition]", summary: dict[str, Any], broken: list[str]) -> None:
    held = broken + [phrase for condition in conditions for phrase in condition.held_by(summary)]
    for condition in conditions:
        for run in condition.undefined_in(summary):
            errors.print(f"not checked: {condition.metric} of {escaped(run)} is undefined", highlight=False)
    for phrase in held:
        errors.print(f"[bold yellow]failed:[/] {escaped(phrase)}", soft_wrap=True, highlight=False)
    if held:
        raise typer.Exit(3)


@app.command(rich_help_panel=MEASURING)
def preflight(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Any checkpoint that `compare` reads.")],
    learning_rate: Annotated[
        float, typer.Option(help="AdamW learning rate, taken as the size of every weight's step.")
    ],
    storage: Annotated[
        str, typer.Option(help="Format in which weights are stored: bfloat16, float16 or float32.")
    ] = "bfloat16",
    steps: Annotated[int, typer.Option(help="Number of optimizer steps planned.")] = 100,
    out: Out = Path("preflight"),
    as_json: Annotated[bool, typer.Option("--json", help="Print preflight.json instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the figures of another base.")] = False,
) -> None:
    """Before training: forecast which stored weights of BASE can change at a learning rate.

    Reads only the base and runs no model. Writes preflight.json and preflight.html.
    """
    from offprincipal.forecast import preflight as look
    from offprincipal.reports.preflight import preflight_sentences, preflight_table, write_figure
    from offprincipal.reports.terminal import as_shown_json

    with resumable(), matrix_progress() as progress:
        found = look(base, learning_rate, storage, steps, out=out, overwrite=overwrite, progress=progress)
    path = out / PREFLIGHT
    figure = write_figure(out / PREFLIGHT_PAGE, found)
    if as_json:
        print(as_shown_json(found.content))
        return
    print_tables(preflight_table(found.content))
    for sentence in preflight_sentences(found.content):
        say(sentence, soft_wrap=False)
    say(f"figures: {path}, {figure}")


@app.command(rich_help_panel=MEASURING)
def trajectory(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="Model that the run started from: any checkpoint that `compare` reads."),
    ],
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", help="Checkpoints of one run, in any order; or the run's folder."),
    ],
    out: Out = Path("trajectory"),
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Training steps of the checkpoints, in the order given. Default: parsed from their names.",
        ),
    ] = None,
    subspace_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Also measure how much the leading K singular directions overlap with the last checkpoint's (slower).",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of tensors measured in parallel. Default: all cores.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Measure on the Ray cluster at this address; `local` starts one here. Default: without Ray.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device that computes inner products and singular directions: cpu, cuda or auto.")
    ] = "cpu",
    masters: Annotated[
        bool, typer.Option("--masters", help="Follow the float32 master weights that trainers keep with checkpoints.")
    ] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Skip checkpoints that cannot be opened, and list them.")
    ] = False,
    predict: Annotated[
        float | None,
        typer.Option(metavar="STEP", help="Write the model extrapolated to this step, as predicted-STEP in --out."),
    ] = None,
    predict_by: Annotated[
        str,
        typer.Option(
            help="How to extrapolate: linear (each weight separately) or rank1 (all weights along one direction)."
        ),
    ] = "linear",
    as_json: Annotated[bool, typer.Option("--json", help="Print trajectory.json instead of tables.")] = False,
    report: Annotated[bool, typer.Option(help="Write trajectory.html too.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another trajectory, or another prediction, in the folder.")
    ] = False,
) -> None:
    """Measure how weights moved over many checkpoints of one run, compared with a random walk.

    Reads every tensor of every checkpoint once. Writes trajectory.json, trajectory.parquet and trajectory.html.
    """
    from offprincipal.reports.terminal import as_shown_json
    from offprincipal.reports.trajectory import trajectory_sentences, trajectory_table, write_figure
    from offprincipal.trajectories import trajectory as follow

    at = None if steps is None else _numbers(steps)
    options: Any = {"steps": at, "out": out, "threads": threads, "ray": ray, "skip_broken": skip_broken}
    options |= {"subspace_rank": subspace_rank, "device": device, "masters": masters}
    options |= {"predict": predict, "predict_by": predict_by, "overwrite": overwrite}
    with resumable(), matrix_progress() as progress:
        found = follow(base, checkpoints, **options, progress=progress)
    if report:
        write_figure(out / TRAJECTORY_PAGE, found.content)
    if as_json:
        print(as_shown_json(found.content))
        return
    print_tables(trajectory_table(found.content))
    for warning in found.content["warnings"]:
        say(f"note: {warning}", style="yellow")
    for sentence in trajectory_sentences(found.content):
        say(sentence, soft_wrap=False)
    if prediction := found.content["prediction"]:
        say(f"the model at step {prediction['step']:g}: {out / prediction['model']}")
    say(f"tables{' and figures' if report else ''}: {out}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"'{text}' is not a list of steps: write them as 10,20,30") from None


@app.command(rich_help_panel=MEASURING)
def gates(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder, Hugging Face id, or `embedded`.")],
    tuned: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]TUNED...", help="Models trained from it: any checkpoints that `compare` reads."),
    ],
    out: Out = Path("gates"),
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File of prompts, one per line, or JSON lines {"prompt": …} in a .jsonl file.', rich_help_panel=ON
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="Use held-out prompts of these tasks: a,b or repeat the option.", rich_help_panel=ON
        ),
    ] = None,
    sequences: Annotated[
        Path | None,
        typer.Option(
            help='File of JSON lines to measure on, {"text": …} or {"input_ids": […]}; nothing is sampled.',
            rich_help_panel=ON,
        ),
    ] = None,
    batches: Annotated[
        int,
        typer.Option(help="Number of batches; the batch is the unit for confidence intervals.", rich_help_panel=ON),
    ] = BATCHES,
    prompts_per_batch: Annotated[
        int, typer.Option(help="Number of prompts per batch, if they come from --task.", rich_help_panel=ON)
    ] = PROMPTS_PER_BATCH,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens in a sampled continuation.", rich_help_panel=ON)
    ] = MAX_NEW_TOKENS,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer/--no-per-layer",
            help="Also report curvature per layer and role, not pooled only.",
            rich_help_panel=WHAT,
        ),
    ] = True,
    precision: Annotated[
        bool,
        typer.Option(
            help="Also measure precision: the part of the update that storing hides, if float32 masters were kept.",
            rich_help_panel=WHAT,
        ),
    ] = True,
    weights: Annotated[
        str,
        typer.Option(
            help="Weights to read: masters (float32), stored, or auto: masters if they were kept.", rich_help_panel=WHAT
        ),
    ] = "auto",
    draws: Annotated[
        int,
        typer.Option(help="Number of random directions of each kind over all matrices.", rich_help_panel=EXPERT),
    ] = DRAWS,
    layer_draws: Annotated[
        int,
        typer.Option(help="Number of random directions of each kind in each layer and role.", rich_help_panel=EXPERT),
    ] = LAYER_DRAWS,
    rank_fraction: Annotated[
        float,
        typer.Option(
            help="Rank of the principal subspace, as a fraction of min(rows, columns).", rich_help_panel=EXPERT
        ),
    ] = RANK_FRACTION,
    density: Annotated[
        float, typer.Option(help="Fraction of each matrix's entries that count as principal.", rich_help_panel=EXPERT)
    ] = DENSITY,
    dtype: Annotated[
        str, typer.Option(help="Type of all computations: float32 or float64.", rich_help_panel=EXPERT)
    ] = "float32",
    attention: Annotated[
        str,
        typer.Option(
            help="Value of transformers' attn_implementation; it must support forward-mode derivatives.",
            rich_help_panel=EXPERT,
        ),
    ] = "eager",
    device: Annotated[
        str, typer.Option(help="Device that runs the models: auto, cpu or cuda.", rich_help_panel=EXPERT)
    ] = "auto",
    seed: Annotated[
        int,
        typer.Option(help="Random seed of prompts, continuations, batches and directions.", rich_help_panel=EXPERT),
    ] = 0,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Execute Python code that comes with BASE, if BASE requires it.",
            rich_help_panel=EXPERT,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print gates.json instead of tables.", rich_help_panel=SHOWN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the figures of other runs in the folder.")
    ] = False,
) -> None:
    """Measure KL from the base against the Fisher form, the curvature of directions, and what precision hides.

    Runs the models, so it needs the packages that training needs. Writes gates.json.
    """
    require_training("gates")
    from offprincipal.gates import measure_gates
    from offprincipal.reports.gates import gates_tables
    from offprincipal.reports.terminal import as_shown_json

    ground: Any = {"prompts": prompts, "task": task, "sequences": sequences}
    options: Any = {"batches": batches, "prompts_per_batch": prompts_per_batch, "max_new_tokens": max_new_tokens}
    options |= {"draws": draws, "layer_draws": layer_draws, "per_layer": per_layer, "rank_fraction": rank_fraction}
    options |= {
        "density": density,
        "precision": precision,
        "weights": weights,
        "dtype": dtype,
        "attention": attention,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    runs = named_runs(tuned)
    options |= {"out": out, "overwrite": overwrite}
    with direction_progress() as progress:
        found = measure_gates(base, runs, **ground, **options, seed=seed, progress=progress)
    path = out / GATES
    if as_json:
        print(as_shown_json(found.content))
    else:
        print_tables(gates_tables(found.content))
        say(f"figures: {path}")
