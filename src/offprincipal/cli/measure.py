"""Commands that measure checkpoints: compare, preflight, trajectory, gates."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

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
    require_training,
    resumable,
    say,
    task_names,
)
from offprincipal.defaults import DENSITY, NULL_DRAWS, RANK_FRACTION, TOLERANCE
from offprincipal.errors import ArgumentError

WHAT, HOW, CONDITIONS, SHOWN = "What is measured", "How, and where", "Conditions: exit code 3", "What is printed"
ON, EXPERT = "What it is measured on", "Expert"

if TYPE_CHECKING:
    from offprincipal.comparison import Condition


def _print_metrics(wanted: bool) -> None:
    if wanted:
        from offprincipal.measures.columns import METRICS
        from offprincipal.reports.terminal import metrics_table

        Console().print(metrics_table(METRICS))
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
            help="What was trained from it: folders or ids of models, adapters, or distributed checkpoints.",
        ),
    ],
    out: Out = Path("comparison"),
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Groups of changes (always counted, as fast as memory), location, update, spectrum, subspace, bounds; "
            "the last three decompose the base. Default: all.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    listed: Annotated[
        bool,
        typer.Option(
            "--list",
            callback=_print_metrics,
            is_eager=True,
            help="List every figure with its group, and exit.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    rank_fraction: Annotated[
        float,
        typer.Option(
            help="The principal subspace has this share of min(rows, columns) directions.", rich_help_panel=WHAT
        ),
    ] = RANK_FRACTION,
    alpha: Annotated[
        float, typer.Option(help="Each mask holds this share of a matrix.", rich_help_panel=WHAT)
    ] = DENSITY,
    null_draws: Annotated[
        int,
        typer.Option(
            help="Each isotropic null is the mean of so many Gaussian updates; large matrices take fewer.",
            rich_help_panel=WHAT,
        ),
    ] = NULL_DRAWS,
    seed: Annotated[
        int,
        typer.Option(help="The random mask and the Gaussian updates are drawn from this seed.", rich_help_panel=WHAT),
    ] = 0,
    include_embeddings: Annotated[
        bool, typer.Option("--include-embeddings", help="Measure embeddings and heads too.", rich_help_panel=WHAT)
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse tensors that the base or a run alone has; else they are listed.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    solver: Annotated[
        str,
        typer.Option(
            help="auto, exact (LAPACK for every matrix) or randomized; matrices up to 256 are exact.",
            rich_help_panel=HOW,
        ),
    ] = "auto",
    tolerance: Annotated[
        float,
        typer.Option(
            help="Singular values may be off by this share; a matrix that misses it is solved whole.",
            rich_help_panel=HOW,
        ),
    ] = TOLERANCE,
    device: Annotated[
        str, typer.Option(help="Where matrices are decomposed: cpu, cuda or auto.", rich_help_panel=HOW)
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="So many matrices are measured at once; default: all cores.", rich_help_panel=HOW),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Matrices in flight may take so much, such as 8GB; default: .6 of what is free.",
            rich_help_panel=HOW,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Measure on a Ray cluster; `local` starts one here.", rich_help_panel=HOW),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            help="Keep decomposed bases (see `offprincipal cache`), and take runs that --out holds as measured.",
            rich_help_panel=HOW,
        ),
    ] = True,
    masters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="A run's float32 weights before storing, where not beside it.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="CONDITION",
            help="Exit 3 if it holds: 'principal_angle_left_max_deg > 10'.",
            rich_help_panel=CONDITIONS,
        ),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="PATTERN: WHAT",
            help="Exit 3 unless every tensor so named is `unchanged`, `changed`, or as a METRIC > NUMBER says.",
            rich_help_panel=CONDITIONS,
        ),
    ] = None,
    contract: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of such expectations, `model.visual.*: unchanged` a line.", rich_help_panel=CONDITIONS
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Say of every figure what its nulls say, as the report does.", rich_help_panel=SHOWN
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print summary.json instead of tables.", rich_help_panel=SHOWN)
    ] = False,
    report: Annotated[bool, typer.Option(help="Write report.html too.", rich_help_panel=SHOWN)] = True,
    report_to: ReportTo = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a comparison of other runs that is in the folder.")
    ] = False,
) -> None:
    """Measure what training did to the weights, every figure beside the null that would explain it away.

    Killed at any moment, the same command continues; with one more run it measures that one. Writes four Parquet
    tables, summary.json and report.html.
    """
    from offprincipal.checkpoints.hub import is_id
    from offprincipal.comparison import CompareSettings, MatrixSettings, parse_condition
    from offprincipal.comparison import compare as compare_checkpoints
    from offprincipal.comparison.contract import broken_phrases, read_contract
    from offprincipal.comparison.tables import require_nothing_lost
    from offprincipal.measures.columns import GROUPS
    from offprincipal.memory import parse_size
    from offprincipal.reports.terminal import as_shown_json, comparison_table
    from offprincipal.reports.trackers import report_comparison, require_tracker
    from offprincipal.reports.words import ASK, contract_lines, decisions, verdict_paragraph, warnings_of

    groups: Any = GROUPS if metrics is None else metrics
    chosen: Any = {"solver": solver, "tolerance": tolerance, "device": device}
    matrix = MatrixSettings(rank_fraction, alpha, null_draws=null_draws, seed=seed, **chosen)
    expected = [*(expect or []), *(read_contract(contract) if contract else [])]
    settings = CompareSettings(groups, matrix, include_embeddings, strict, tuple(expected))
    conditions = [parse_condition(text, settings.metrics) for text in fail_if or []]
    if report_to:
        require_tracker(report_to)  # before hours of measuring, not after
    runs = named_runs(tuned)
    options: Any = {"out": out, "threads": threads, "ray": ray, "cache": cache}
    options["memory"] = None if memory is None else parse_size(memory)
    options["masters"] = named_masters(masters or [], runs)
    if not overwrite and all(Path(source).exists() or is_id(source) for source in (base, *runs.values())):
        require_nothing_lost(out, base, runs, settings.metrics)
    with resumable(), matrix_progress() as progress:
        found = compare_checkpoints(base, runs, settings, **options, progress=progress)
    try:
        if report:
            from offprincipal.reports.report import write_report

            write_report(out / "report.html", out)
        if as_json:
            print(as_shown_json(found.summary))
        else:
            Console().print(comparison_table(found.summary))
            for kept in contract_lines(found.summary):
                say(kept)
            for warning in warnings_of(found.summary):
                say(f"note: {warning}", style="yellow", soft_wrap=False)
            if found.measured_before:
                say(f"measured before, not again: {', '.join(found.measured_before)} (--no-cache measures all)")
            for sentence in verdict_paragraph(found.summary) if explain else decisions(found.summary, ASK):
                say(sentence, soft_wrap=False)
            say(f"tables{' and report' if report else ''}: {out}")
        if report_to:
            told = report_comparison(found.summary, report_to, out)
            if not as_json:
                say(f"reported to: {told}")
    finally:  # a pipeline asks for this, whatever became of the printing
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
    base: Annotated[str, typer.Argument(metavar="BASE", help="Whatever `compare` reads.")],
    learning_rate: Annotated[
        float, typer.Option(help="The learning rate of AdamW, which is the length of every weight's step.")
    ],
    storage: Annotated[
        str, typer.Option(help="What weights are stored in: bfloat16, float16 or float32.")
    ] = "bfloat16",
    steps: Annotated[int, typer.Option(help="The planned run has so many steps.")] = 100,
    out: Out = Path("preflight"),
    as_json: Annotated[bool, typer.Option("--json", help="Print preflight.json instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the figures of another base.")] = False,
) -> None:
    """Before training: what steps of a learning rate can move of BASE once its weights are stored.

    Reads the base alone and runs nothing. Writes preflight.json and preflight.html.
    """
    from offprincipal.comparison.tables import require_none_replaced
    from offprincipal.forecast import preflight as look
    from offprincipal.reports.preflight import preflight_sentences, preflight_table, write_figure
    from offprincipal.reports.terminal import as_shown_json

    if not overwrite:
        require_none_replaced(out / "preflight.json", base, (), lambda content: ())
    with resumable(), matrix_progress() as progress:
        found = look(base, learning_rate, storage, steps, progress=progress)
    path = found.write(out)
    figure = write_figure(out / "preflight.html", found)
    if as_json:
        print(as_shown_json(found.content))
        return
    Console().print(preflight_table(found.content))
    for sentence in preflight_sentences(found.content):
        say(sentence, soft_wrap=False)
    say(f"figures: {path}, {figure}")


@app.command(rich_help_panel=MEASURING)
def trajectory(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the run started from: whatever `compare` reads.")],
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", help="Checkpoints of one run, in any order; or the run's folder."),
    ],
    out: Out = Path("trajectory"),
    steps: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Of the checkpoints, in their order; default: from their names."),
    ] = None,
    subspace_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Measure what the leading K singular directions have in common with the last checkpoint's; slower.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors measured at once; default: all cores.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Measure on a Ray cluster; `local` starts one here.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where products are summed and those directions found: cpu, cuda or auto.")
    ] = "cpu",
    masters: Annotated[
        bool, typer.Option("--masters", help="Follow the float32 weights that trainers keep beside the checkpoints.")
    ] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Go on without checkpoints that cannot be opened, and say which.")
    ] = False,
    predict: Annotated[
        float | None,
        typer.Option(metavar="STEP", help="Write the model as it would be at a step, to predicted-STEP in --out."),
    ] = None,
    predict_by: Annotated[
        str, typer.Option(help="linear: each weight along its own line; rank1: all of them along one direction.")
    ] = "linear",
    as_json: Annotated[bool, typer.Option("--json", help="Print trajectory.json instead of tables.")] = False,
    report: Annotated[bool, typer.Option(help="Write trajectory.html too.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another trajectory, or another prediction, in the folder.")
    ] = False,
) -> None:
    """How weights moved over many checkpoints of one run, beside the random walk that would explain it.

    Reads every tensor of every checkpoint once. Writes trajectory.json, trajectory.parquet and trajectory.html.
    """
    from offprincipal.comparison.tables import require_none_replaced
    from offprincipal.reports.terminal import as_shown_json
    from offprincipal.reports.trajectory import trajectory_sentences, trajectory_table, write_figure
    from offprincipal.trajectories import trajectory as follow
    from offprincipal.trajectories.sources import expanded
    from offprincipal.trajectories.trajectory import JSON, PAGE

    at = None if steps is None else _numbers(steps)
    options: Any = {"steps": at, "out": out, "threads": threads, "ray": ray, "skip_broken": skip_broken}
    options |= {"subspace_rank": subspace_rank, "device": device, "masters": masters}
    options |= {"predict": predict, "predict_by": predict_by, "overwrite": overwrite}
    if not overwrite:
        require_none_replaced(out / JSON, base, expanded(checkpoints), lambda content: content["checkpoints"])
    with resumable(), matrix_progress() as progress:
        found = follow(base, checkpoints, **options, progress=progress)
    if report:
        write_figure(out / PAGE, found.content)
    if as_json:
        print(as_shown_json(found.content))
        return
    Console().print(trajectory_table(found.content))
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
        raise ArgumentError(f"'{text}' is no list of steps: write them as 10,20,30") from None


@app.command(rich_help_panel=MEASURING)
def gates(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder, Hugging Face id, or `embedded`.")],
    tuned: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]TUNED...", help="What was trained from it: whatever `compare` reads."),
    ],
    out: Out = Path("gates"),
    prompts: Annotated[
        Path | None,
        typer.Option(help='Prompts, one a line, or JSON lines {"prompt": …} in a .jsonl file.', rich_help_panel=ON),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Take held-out prompts of tasks: a,b or repeated.", rich_help_panel=ON),
    ] = None,
    sequences: Annotated[
        Path | None,
        typer.Option(
            help='Measure on given JSON lines, {"text": …} or {"input_ids": […]}; nothing is sampled.',
            rich_help_panel=ON,
        ),
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            help="The sequences are dealt into so many batches, the unit of the intervals.", rich_help_panel=ON
        ),
    ] = 16,
    prompts_per_batch: Annotated[
        int, typer.Option(help="Each batch has so many prompts, where they come from tasks.", rich_help_panel=ON)
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option(help="A sampled continuation has at most so many tokens.", rich_help_panel=ON)
    ] = 40,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer/--pooled-only", help="Curvature by layer and role too, or pooled alone.", rich_help_panel=WHAT
        ),
    ] = True,
    precision: Annotated[
        bool,
        typer.Option(
            help="Gate III too, where float32 masters were kept: what storing hides of the update.",
            rich_help_panel=WHAT,
        ),
    ] = True,
    weights: Annotated[
        str, typer.Option(help="auto (float32 masters where kept), masters or stored.", rich_help_panel=WHAT)
    ] = "auto",
    draws: Annotated[
        int,
        typer.Option(
            help="So many random directions of each kind are drawn over all matrices.", rich_help_panel=EXPERT
        ),
    ] = 8,
    layer_draws: Annotated[
        int,
        typer.Option(help="So many random directions of each kind are drawn in each matrix.", rich_help_panel=EXPERT),
    ] = 2,
    rank_fraction: Annotated[
        float,
        typer.Option(
            help="The principal subspace has this share of min(rows, columns) directions.", rich_help_panel=EXPERT
        ),
    ] = RANK_FRACTION,
    alpha: Annotated[
        float, typer.Option(help="Principal weights are this share of a matrix.", rich_help_panel=EXPERT)
    ] = DENSITY,
    dtype: Annotated[
        str, typer.Option(help="Everything is computed in float32 or float64.", rich_help_panel=EXPERT)
    ] = "float32",
    attention: Annotated[
        str, typer.Option(help="attn_implementation; it needs a forward-mode derivative.", rich_help_panel=EXPERT)
    ] = "eager",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=EXPERT)] = "auto",
    seed: Annotated[
        int,
        typer.Option(
            help="Prompts, continuations, batches and directions are drawn from this seed.", rich_help_panel=EXPERT
        ),
    ] = 0,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Execute Python that comes with BASE, where it asks for that.",
            rich_help_panel=EXPERT,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print gates.json instead of tables.", rich_help_panel=SHOWN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the figures of other runs.", rich_help_panel=SHOWN)
    ] = False,
) -> None:
    r"""Measure KL from the base against the Fisher form, the curvature of directions, and what precision hides.

    Writes gates.json. Needs the models to run, as training does.
    """
    require_training()
    from offprincipal.comparison.tables import require_none_replaced
    from offprincipal.files import require_folder
    from offprincipal.gates import measure_gates
    from offprincipal.reports.gates import gates_tables
    from offprincipal.reports.terminal import as_shown_json

    ground: Any = {"prompts": prompts, "task": task and task_names(task), "sequences": sequences}
    options: Any = {"batches": batches, "prompts_per_batch": prompts_per_batch, "max_new_tokens": max_new_tokens}
    options |= {"draws": draws, "layer_draws": layer_draws, "per_layer": per_layer, "rank_fraction": rank_fraction}
    options |= {
        "alpha": alpha,
        "precision": precision,
        "weights": weights,
        "dtype": dtype,
        "attention": attention,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    runs = named_runs(tuned)
    if not overwrite:
        require_none_replaced(out / "gates.json", base, list(runs.values()), _sources_of)
    require_folder(out)
    with direction_progress() as progress:
        found = measure_gates(base, runs, **ground, **options, seed=seed, progress=progress)
    path = found.write(out)
    if as_json:
        print(as_shown_json(found.content))
    else:
        Console().print(gates_tables(found.content))
        say(f"figures: {path}")


def _sources_of(content: dict[str, Any]) -> list[str]:
    return [run["source"] for run in content["runs"].values()]
