"""The command line. Arguments in, calls to the library, exit codes out; no logic of its own.

Exit codes: 0 done; 1 a defect of ours; 2 bad input or arguments; 3 a `--fail-if` condition held, or a
contract did not; 130 interrupted.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from offprincipal.assets import EMBEDDED
from offprincipal.errors import ArgumentError, OffPrincipalError
from offprincipal.recipe_names import RECIPES

if TYPE_CHECKING:
    from offprincipal.comparison import Condition

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
errors = Console(stderr=True)

Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; made if absent.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard what was trained there under other settings.")]


def main() -> None:
    """Run the command line; an `OffPrincipalError` becomes its message and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # what a console has no letter for, or is no text, is shown as ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code: Any = 0
    try:
        app()
    except SystemExit as ended:
        code = ended.code
    except (OffPrincipalError, OSError) as error:
        errors.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True, highlight=False)
        code = 2
    sys.exit(_flushed(code))


def _flushed(code: Any) -> Any:
    """The exit code, once all is printed: 2 where that cannot be and nothing else was wrong; a closed pipe is none."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the interpreter's own flush ends
        if not isinstance(error, BrokenPipeError) and not code:
            errors.print(f"[bold red]error:[/] cannot print: {_escaped(str(error))}", highlight=False)
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


@app.command()
def study(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="A shipped profile, or a YAML file.")] = "quick",
    out: Out = Path("study"),
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override the profile, as in training.steps=200."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Training runs at once; default: a core each, at most 4.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train by RLVR and SFT, measure what each did to the weights, and judge the paper's claims.

    Killed at any moment, the same command continues. Writes study.json, report.html, a folder a run, and the tables.
    """
    _require_training()
    from offprincipal.reports.fine_tuning import fine_tuning_figures
    from offprincipal.reports.terminal import claims_table, fine_tuning_tables, runs_table
    from offprincipal.studies import load_profile
    from offprincipal.studies.console import run_on_console

    console = Console()
    with _resumable():
        found = run_on_console(load_profile(profile, override or []), out, jobs, overwrite, console)
    if found:
        console.print(runs_table(found), *fine_tuning_tables(fine_tuning_figures(out, found)), claims_table(found))
    written = out / "report.html" if (out / "report.html").is_file() else out
    _say(f"{'report' if found else 'results'}: {written}")


@app.command()
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
        ),
    ] = None,
    rank_fraction: Annotated[
        float, typer.Option(help="Rank of the principal subspace over min(rows, columns).")
    ] = 0.125,
    alpha: Annotated[float, typer.Option(help="Density of the masks.")] = 0.5,
    null_draws: Annotated[
        int, typer.Option(help="Gaussian updates behind each isotropic null; large matrices take fewer.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of the random mask and the Gaussian updates.")] = 0,
    include_embeddings: Annotated[
        bool, typer.Option("--include-embeddings", help="Measure embeddings and heads too.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse tensors that the base or a run alone has; else they are listed.")
    ] = False,
    solver: Annotated[
        str, typer.Option(help="auto, exact (LAPACK for every matrix) or randomized; matrices up to 256 are exact.")
    ] = "auto",
    tolerance: Annotated[
        float, typer.Option(help="On singular values, relative; a matrix that misses it is solved whole.")
    ] = 1e-3,
    device: Annotated[str, typer.Option(help="Where matrices are decomposed: cpu, cuda or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Matrices measured at once; default: all cores.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="What matrices in flight may take, such as 8GB; default: .6 of what is free."
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Measure on a Ray cluster; `local` starts one here.")
    ] = None,
    cache: Annotated[bool, typer.Option(help="Keep decomposed bases; see `offprincipal cache`.")] = True,
    masters: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="A run's float32 weights before storing, where not beside it."),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", metavar="CONDITION", help="Exit 3 if it holds: 'principal_angle_left_max_deg > 10'."),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="PATTERN: WHAT",
            help="Exit 3 unless every tensor so named is `unchanged`, `changed`, or as a METRIC > NUMBER says.",
        ),
    ] = None,
    contract: Annotated[
        Path | None, typer.Option(help="A YAML file of such expectations, `model.visual.*: unchanged` a line.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of every figure what its nulls say, as the report does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json instead of tables.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html too.")] = True,
) -> None:
    """Measure what training did to the weights, every figure beside the null that would explain it away.

    Killed at any moment, the same command continues. Writes four Parquet tables, summary.json and report.html.
    """
    from offprincipal.comparison import CompareSettings, MatrixSettings, parse_condition
    from offprincipal.comparison import compare as compare_checkpoints
    from offprincipal.comparison.contract import broken_phrases, read_contract
    from offprincipal.comparison.memory import parse_size
    from offprincipal.measures.columns import GROUPS
    from offprincipal.reports.terminal import as_shown_json, comparison_table
    from offprincipal.reports.words import contract_lines, decisions, verdict_paragraph, warnings_of

    groups: Any = GROUPS if metrics is None else tuple(part.strip() for part in metrics.split(","))
    chosen: Any = {"solver": solver, "tolerance": tolerance, "device": device}
    matrix = MatrixSettings(rank_fraction, alpha, null_draws=null_draws, seed=seed, **chosen)
    expected = [*(expect or []), *(read_contract(contract) if contract else [])]
    settings = CompareSettings(groups, matrix, include_embeddings, strict, tuple(expected))
    conditions = [parse_condition(text, settings.metrics) for text in fail_if or []]
    runs = _named_runs(tuned)
    options: Any = {"out": out, "threads": threads, "ray": ray, "cache": cache}
    options["memory"] = None if memory is None else parse_size(memory)
    options["masters"] = _named_masters(masters or [], runs)
    with _resumable(), _matrix_progress() as progress:
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
                _say(kept)
            for warning in warnings_of(found.summary):
                _say(f"note: {warning}", style="yellow")
            for sentence in (verdict_paragraph if explain else decisions)(found.summary):
                _say(sentence, soft_wrap=False)
            _say(f"tables{' and report' if report else ''}: {out}")
    finally:  # a pipeline asks for this, whatever became of the printing
        _fail_if(conditions, found.summary, broken_phrases(found.summary))


@app.command()
def preflight(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Whatever `compare` reads.")],
    learning_rate: Annotated[float, typer.Option(help="Of AdamW: the length of every weight's step.")],
    storage: Annotated[
        str, typer.Option(help="What weights are stored in: bfloat16, float16 or float32.")
    ] = "bfloat16",
    steps: Annotated[int, typer.Option(help="Of the run that is planned.")] = 100,
    out: Out = Path("preflight"),
    as_json: Annotated[bool, typer.Option("--json", help="Print preflight.json instead of a table.")] = False,
) -> None:
    """Before training: what steps of a learning rate can move of BASE once its weights are stored.

    Reads the base alone and runs nothing. Writes preflight.json and preflight.html.
    """
    from offprincipal.preflight import preflight as look
    from offprincipal.reports.preflight import preflight_sentences, preflight_table, write_figure
    from offprincipal.reports.terminal import as_shown_json

    with _resumable(), _matrix_progress() as progress:
        found = look(base, learning_rate, storage, steps, progress=progress)
    path = found.write(out)
    figure = write_figure(out / "preflight.html", found)
    if as_json:
        print(as_shown_json(found.content))
        return
    Console().print(preflight_table(found.content))
    for sentence in preflight_sentences(found.content):
        _say(sentence, soft_wrap=False)
    _say(f"figures: {path}, {figure}")


@app.command()
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
) -> None:
    """How weights moved over many checkpoints of one run, beside the random walk that would explain it.

    Reads every tensor of every checkpoint once. Writes trajectory.json, trajectory.parquet and trajectory.html.
    """
    from offprincipal.reports.terminal import as_shown_json
    from offprincipal.reports.trajectory import trajectory_sentences, trajectory_table, write_figure
    from offprincipal.trajectories import trajectory as follow
    from offprincipal.trajectories.trajectory import PAGE

    at = None if steps is None else _numbers(steps)
    options: Any = {"steps": at, "out": out, "threads": threads, "ray": ray, "skip_broken": skip_broken}
    options |= {"subspace_rank": subspace_rank, "device": device, "masters": masters}
    options |= {"predict": predict, "predict_by": predict_by}
    with _resumable(), _matrix_progress() as progress:
        found = follow(base, checkpoints, **options, progress=progress)
    if report:
        write_figure(out / PAGE, found.content)
    if as_json:
        print(as_shown_json(found.content))
        return
    Console().print(trajectory_table(found.content))
    for warning in found.content["warnings"]:
        _say(f"note: {warning}", style="yellow")
    for sentence in trajectory_sentences(found.content):
        _say(sentence, soft_wrap=False)
    if prediction := found.content["prediction"]:
        _say(f"the model at step {prediction['step']:g}: {out / prediction['model']}")
    _say(f"tables{' and figures' if report else ''}: {out}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"'{text}' is no list of steps: write them as 10,20,30") from None


@app.command()
def delta(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Whatever `compare` reads.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="What was trained from it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: NAME.delta.")],
    format: Annotated[
        str, typer.Option(help="delta, or sparse-safetensors: places and values as TRL exchanges them with vLLM.")
    ] = "delta",
) -> None:
    """Write what changed from BASE to TUNED into one small file, without loss.

    It is safetensors inside, guarded by hashes of both sides, and itself a checkpoint wherever one is taken after BASE.
    """
    from offprincipal.deltas import make_delta
    from offprincipal.reports.terminal import delta_lines

    with _matrix_progress() as progress:
        made = make_delta(base, tuned, out, format, progress=progress)
    for line in delta_lines(made):
        _say(line)


@app.command()
def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the delta was made from.")],
    file: Annotated[Path, typer.Argument(metavar="DELTA", help="A .delta file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model, made whole or not at all.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """Write the model that a delta leads to from BASE, bit for bit, as a Hugging Face folder."""
    from offprincipal.deltas import apply_delta

    with _matrix_progress() as progress:
        apply_delta(base, file, out, overwrite=overwrite, progress=progress)
    _say(f"model: {out}")


@app.command()
def gates(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder, Hugging Face id, or `embedded`.")],
    tuned: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]TUNED...", help="What was trained from it: whatever `compare` reads."),
    ],
    out: Out = Path("gates"),
    prompts: Annotated[
        Path | None, typer.Option(help='Prompts, one a line, or JSON lines {"prompt": …} in a .jsonl file.')
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Take held-out prompts of a task; repeat for more.")
    ] = None,
    sequences: Annotated[
        Path | None,
        typer.Option(help='Measure on given JSON lines, {"text": …} or {"input_ids": […]}; nothing is sampled.'),
    ] = None,
    batches: Annotated[int, typer.Option(help="Into which the sequences are dealt: the unit of the intervals.")] = 16,
    prompts_per_batch: Annotated[int, typer.Option(help="Of each batch, where prompts come from tasks.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="The longest sampled continuation.")] = 40,
    draws: Annotated[int, typer.Option(help="Random directions of each kind over all matrices.")] = 8,
    layer_draws: Annotated[int, typer.Option(help="Random directions of each kind in each matrix.")] = 2,
    per_layer: Annotated[
        bool, typer.Option("--per-layer/--pooled-only", help="Curvature by layer and role too, or pooled alone.")
    ] = True,
    rank_fraction: Annotated[
        float, typer.Option(help="Rank of the principal subspace over min(rows, columns).")
    ] = 0.125,
    alpha: Annotated[float, typer.Option(help="Density of the principal weights.")] = 0.5,
    precision: Annotated[
        bool, typer.Option(help="Gate III too, where float32 masters were kept: what storing hides of the update.")
    ] = True,
    weights: Annotated[str, typer.Option(help="auto (float32 masters where kept), masters or stored.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    attention: Annotated[str, typer.Option(help="attn_implementation; it needs a forward-mode derivative.")] = "eager",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of prompts, continuations, batches and random directions.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Execute Python that comes with BASE, where it asks for that.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print gates.json instead of tables.")] = False,
) -> None:
    r"""Measure the gates: divergence against the Fisher form, the curvature of directions, what storing hides.

    Writes gates.json. Needs the models to run: pip install 'offprincipal\[train]'.
    """
    _require_training()
    from offprincipal.files import require_folder
    from offprincipal.gates import measure_gates
    from offprincipal.reports.gates import gates_tables
    from offprincipal.reports.terminal import as_shown_json

    ground: Any = {"prompts": prompts, "task": task, "sequences": sequences}
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
    runs = _named_runs(tuned)
    require_folder(out)
    with _direction_progress() as progress:
        found = measure_gates(base, runs, **ground, **options, seed=seed, progress=progress)
    path = found.write(out)
    if as_json:
        print(as_shown_json(found.content))
    else:
        Console().print(gates_tables(found.content))
        _say(f"figures: {path}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"{', '.join(RECIPES)}.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run; the same command continues a killed one.")
    ],
    task: Annotated[
        list[str], typer.Option("--task", help="add, sort@2, rg:NAME, hf:DATASET?prompt=…&answer=…; repeat for more.")
    ],
    model: Annotated[str, typer.Option(help="Folder, Hugging Face id, or `embedded`.")] = "embedded",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; `offprincipal settings` lists them."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Of AdamW, constant.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides prompts and samples.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Train not all weights: lora, pissa, milora, mica, olora, rlpo, rlmo, geora or off_principal, which "
            "take larger learning rates, 1e-3 say; sparse or shira, under a mask; isospectral, isospectral_muon.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of a LoRA; default 8.")] = None,
    mask: Annotated[
        str | None,
        typer.Option(help="safe, principal, off_principal, low_magnitude, random or from_run, of sparse and shira."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that the mask holds.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model on verifiable tasks, and measure it on held-out prompts before and after.

    What an adapter or a mask trained is merged into the model in --out; the adapter itself is in OUT/adapter.
    """
    _require_training()
    from offprincipal.reports.terminal import runs_table
    from offprincipal.studies.profile import apply_override
    from offprincipal.training import parse_settings
    from offprincipal.training import train as run
    from offprincipal.training.processes import is_main

    named = {"steps": steps, "batch": batch, "learning_rate": learning_rate, "seed": seed}
    values: dict[str, Any] = {"recipe": recipe, "model": model, "tasks": task}
    values |= {key: value for key, value in named.items() if value is not None}
    of_adapter = {"method": adapter, "rank": rank, "mask": mask, "density": density}
    if given := {key: value for key, value in of_adapter.items() if value is not None}:
        values["adapter"] = given
    for text in override or []:
        apply_override(values, text)
    with _resumable():
        record = run(parse_settings(values), out, overwrite=overwrite)
    if not is_main():
        return
    run_entry = {"name": out.name, "seconds": record["seconds"], **record["settings"], **record["accuracy"]}
    Console().print(runs_table({"runs": [run_entry]}))
    _say(f"model: {out}")


@app.command()
def intervene(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder, Hugging Face id or `embedded`; with --undo, what was trained."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result, made whole or not at all.")],
    rotate: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="Rotate the values of each key-value head: 3, or 0,2 or 4-7, or all."),
    ] = None,
    permute: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Reorder attention heads and MLP neurons of these layers.")
    ] = None,
    rotate_residual: Annotated[
        bool, typer.Option("--rotate-residual", help="Rotate the whole residual stream; norms' gains are folded.")
    ] = False,
    matrix: Annotated[str, typer.Option(help="haar (uniform) or hadamard (random signs).")] = "haar",
    seed: Annotated[int, typer.Option(help="Of the draws; every layer has its own.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16; default: as MODEL, undone as float32.")
    ] = None,
    undo: Annotated[
        Path | None,
        typer.Option(metavar="RECORD", help="Bring MODEL, trained after this intervention, back to its base's axes."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="With --undo: the base, if not where the record says.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --undo: bring back the weights, not the update; keeps the rounding.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an intervention that is in the folder.")
    ] = False,
) -> None:
    """Change a model's weights and not its function, prove it, and undo it after training.

    Writes an ordinary Hugging Face folder with intervention.json, a record of what was done; --undo takes that record.
    """
    _require_training()
    from offprincipal import interventions
    from offprincipal.reports.terminal import proof_lines

    if undo is None:
        if base is not None or exact:
            raise ArgumentError("--base and --exact belong to --undo RECORD: give it, or leave them out")
        layers: Any = {
            "rotate": interventions.parse_layers(rotate) if rotate is not None else (),
            "permute": interventions.parse_layers(permute) if permute is not None else (),
        }
        options: Any = {"residual": rotate_residual, "matrix": matrix, "seed": seed, "dtype": dtype}
        done = interventions.intervene(model, out, **layers, **options, overwrite=overwrite)
        lines = proof_lines(done.proof, done.dtype, undone=False)
    else:
        if rotate is not None or permute is not None or rotate_residual:
            raise ArgumentError(
                "--undo takes from RECORD what was done: leave out --rotate, --permute, --rotate-residual"
            )
        undone = interventions.undo(undo, model, out, base=base, dtype=dtype, exact=exact, overwrite=overwrite)
        lines = proof_lines(undone["proof"], undone["dtype"], undone=True)
    for line in (*lines, f"model: {out}"):
        _say(line)


@app.command()
def settings() -> None:
    """List every training setting with its default."""
    from offprincipal.reports.terminal import settings_table
    from offprincipal.training.settings import setting_fields

    Console().print(settings_table(setting_fields()))


@app.command()
def tasks(
    preview: Annotated[
        bool, typer.Option("--preview", help="Put some held-out problems to --model, and print what it makes of them.")
    ] = False,
    model: Annotated[str, typer.Option(help="Of the preview: a folder, a Hugging Face id, or `embedded`.")] = EMBEDDED,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Of the preview, as train takes it; repeat for more.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As train takes them: prompt.shots=8, max_new_tokens=64."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Problems of the preview, the tasks in turn.")] = 3,
) -> None:
    """List the symbolic tasks, each with a prompt, its answer and a teacher's trace; or put some to a model.

    The preview asks as `train` would: with the tokenizer's chat template, else with a few solved problems before each.
    """
    from offprincipal.reports.terminal import preview_lines, tasks_table
    from offprincipal.tasks import open_task, symbolic_kinds

    if not preview:
        Console().print(tasks_table([open_task(kind) for kind in symbolic_kinds()]))
        return
    _require_training()
    from offprincipal.studies.profile import apply_override
    from offprincipal.training.preview import preview as ask
    from offprincipal.training.settings import parse_settings

    given: dict[str, Any] = {"recipe": "grpo", "tasks": task or ["add"], "model": model}
    for override in overrides or []:
        apply_override(given, override)
    chosen = parse_settings(given)
    length = chosen.max_new_tokens if "max_new_tokens" in given else None
    options: Any = {"device": chosen.device, "trust_remote_code": chosen.trust_remote_code}
    found = ask(chosen.model, chosen.tasks, chosen.prompt, count, length, chosen.seed, **options)
    for line in preview_lines(found):
        _say(line, soft_wrap=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that `compare` or `study` wrote.")],
) -> None:
    """Draw report.html anew from the tables in a folder."""
    from offprincipal.reports.report import write_report_of

    _say(str(write_report_of(folder)))


cache_app = typer.Typer(no_args_is_help=True, help="The decomposed bases that `compare` keeps.")
app.add_typer(cache_app, name="cache")


@cache_app.command("info")
def cache_info() -> None:
    """Say where decomposed bases are kept, and how much they take."""
    from offprincipal.comparison.cache import BaseCache, cache_folder
    from offprincipal.reports.terminal import cache_line

    _say(cache_line(BaseCache(cache_folder()).info()))


@cache_app.command("clear")
def cache_clear() -> None:
    """Remove all decomposed bases."""
    from offprincipal.comparison.cache import BaseCache, cache_folder
    from offprincipal.reports.terminal import cache_line

    _say(f"removed: {cache_line(BaseCache(cache_folder()).clear())}")


def _require_training() -> None:
    from offprincipal.models import require_training_extra

    require_training_extra()


def _named_runs(tuned: list[str]) -> Any:
    """Folders, or NAME=PATH, as a mapping where any is named."""
    from offprincipal.comparison import name_runs

    runs: dict[str, str] = {}
    for text in tuned:
        name, equals, source = text.partition("=")
        named = equals and name and not _is_path(name) and not _exists(text)
        given = {name: source} if named else name_runs([text])
        for run, path in given.items():
            if run in runs:
                raise ArgumentError(f"two runs are named '{run}': tell them apart with NAME=PATH")
            runs[run] = path
    return runs


def _named_masters(masters: list[str], runs: dict[str, str]) -> dict[str, str]:
    """Run -> where its masters are; without a name they are those of the only run."""
    found: dict[str, str] = {}
    for text in masters:
        name, equals, source = text.partition("=")
        if not equals or name not in runs:
            if len(runs) != 1 and not equals:
                raise ArgumentError(f"whose masters are {text}? Write --masters NAME={text}, NAME of {', '.join(runs)}")
            name, source = (next(iter(runs)), text) if not equals or _exists(text) else (name, source)
        if name in found:
            raise ArgumentError(f"masters of '{name}' are given twice")
        found[name] = source
    return found


@contextmanager
def _resumable() -> Iterator[None]:
    """Say, when interrupted, that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt as error:
        errors.print("\ninterrupted: the same command continues where it stopped", highlight=False)
        raise typer.Exit(130) from error


def _is_path(name: str) -> bool:
    """Whether what stands before a `=` is the beginning of a path that holds one, and no name."""
    return any(separator in name for separator in ("/", os.sep, os.altsep) if separator)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long to be a path
        return False


def _fail_if(conditions: "list[Condition]", summary: dict[str, Any], broken: list[str]) -> None:
    held = broken + [phrase for condition in conditions for phrase in condition.held_by(summary)]
    for condition in conditions:
        for run in condition.undefined_in(summary):
            errors.print(f"not checked: {condition.metric} of {_escaped(run)} is undefined", highlight=False)
    for phrase in held:
        errors.print(f"[bold yellow]failed:[/] {_escaped(phrase)}", soft_wrap=True, highlight=False)
    if held:
        raise typer.Exit(3)


@contextmanager
def _matrix_progress() -> Iterator[Any]:
    """A bar in parameters, with rate and time left, on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("comparing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}"),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        line = bar.add_task("comparing", total=None, rate="", tensor="")

        def show(done: int, total: int, tensor: str) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed / 1e6:.1f} M parameters/s" if speed else ""
            bar.update(line, completed=done, total=total, rate=rate, tensor=_escaped(tensor))

        yield show


@contextmanager
def _direction_progress() -> Iterator[Any]:
    """A bar in directions, with the time left, on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("measuring directions"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[run]}"),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        line = bar.add_task("", total=None, run="")

        def show(done: int, total: int, run: str) -> None:
            bar.update(line, completed=done, total=total, run=_escaped(run))

        yield show


def _say(text: str, style: str | None = None, soft_wrap: bool = True) -> None:
    """One line on the terminal, whatever names are in it: no markup, no control characters."""
    from offprincipal.reports.words import plain

    Console().print(plain(text), style=style, soft_wrap=soft_wrap, highlight=False, markup=False)


def _escaped(text: str) -> str:
    """The same for text that markup goes around."""
    from offprincipal.reports.words import shown

    return shown(text)
