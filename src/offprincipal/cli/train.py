"""Commands that train or change weights: study, train, intervene, undo; and tasks, which lists training tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offprincipal.adapter_methods import ADAPTER_METHODS, LOW_RANK
from offprincipal.assets import EMBEDDED
from offprincipal.cli.common import TRAINING, Out, app, print_list, print_tables, require_training, resumable, say
from offprincipal.defaults import BATCH, DENSITY, LEARNING_RATE, RANK, SEED, STEPS
from offprincipal.errors import ArgumentError
from offprincipal.file_names import REPORT
from offprincipal.recipes import RECIPES

Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an intervention in the folder.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Discard an existing run in the folder that used other settings.")
]


def _print_profiles(wanted: bool) -> None:
    if wanted:
        from offprincipal.paper import load_profile, profile_names
        from offprincipal.reports.terminal import profiles_table

        profiles = map(load_profile, profile_names())
        print_list(profiles_table((p.name, p.title, p.base, len(p.training_stages())) for p in profiles))
        raise typer.Exit


def _list_of(what: str) -> Table:
    from offprincipal.reports import terminal

    if what == "recipes":
        return terminal.choices_table(("recipe", "what it is"), [(n, recipe.what) for n, recipe in RECIPES.items()])
    if what == "adapters":
        titles = ("--adapter", "what is trained", "settings, each as --set adapter.KEY=VALUE")
        rows = [(name, method.what, ", ".join(method.settings)) for name, method in ADAPTER_METHODS.items()]
        return terminal.choices_table(titles, rows)
    if what == "settings":
        from offprincipal.training.settings import setting_fields

        return terminal.settings_table(setting_fields())
    if what == "tasks":
        from offprincipal.tasks import open_task, symbolic_kinds

        return terminal.tasks_table([open_task(kind) for kind in symbolic_kinds()])
    raise ArgumentError(f"there is no list of '{what}': choose one of recipes, adapters, settings, tasks")


def _print_list(what: str | None) -> None:
    if what is not None:
        print_list(_list_of(what))
        raise typer.Exit


@app.command(rich_help_panel=TRAINING)
def study(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="Name of a shipped profile (see --list), or a YAML file.")
    ] = "quick",
    out: Out = Path("study"),
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the profile, e.g. training.steps=200."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of training runs at once. Default: one per core, at most 4; one on a GPU."),
    ] = None,
    overwrite: Overwrite = False,
    listed: Annotated[
        bool,
        typer.Option("--list", callback=_print_profiles, is_eager=True, help="List the shipped profiles, and exit."),
    ] = False,
) -> None:
    """Train by RLVR and SFT, measure what each did to the weights, and judge the paper's claims.

    If interrupted, rerun the same command to continue. Writes study.json, report.html, one folder per run, and tables.
    """
    require_training("study")
    from offprincipal.paper import load_profile
    from offprincipal.reports.fine_tuning import fine_tuning_figures
    from offprincipal.reports.terminal import claims_table, fine_tuning_tables, runs_table
    from offprincipal.studies.console import run_on_console

    console = Console(highlight=False)
    with resumable():
        found = run_on_console(load_profile(profile, override or []), out, jobs, overwrite, console)
    if found:
        console.print(runs_table(found), *fine_tuning_tables(fine_tuning_figures(out, found)), claims_table(found))
        say(f"what was found of each claim: offprincipal show --explain {out}")
    written = out / REPORT if (out / REPORT).is_file() else out
    say(f"{'report' if found else 'results'}: {written}")


@app.command(rich_help_panel=TRAINING)
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"Training recipe: {', '.join(RECIPES)}.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run; if interrupted, the same command continues it.")
    ],
    task: Annotated[
        list[str],
        typer.Option(
            "--task", help="Tasks: add, sort@2, rg:NAME or hf:DATASET?prompt=…&answer=…; a,b or repeat the option."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The model to train: a folder, a Hugging Face id, or `embedded`.")
    ] = "embedded",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; `train --list settings` lists them."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help=f"Number of optimizer steps. Default: {STEPS}.")] = None,
    batch: Annotated[int | None, typer.Option(help=f"Number of sequences per step. Default: {BATCH}.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help=f"AdamW learning rate, constant after the warm-up, if any. Default: {LEARNING_RATE}.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help=f"Random seed for training prompts and sampling. Default: {SEED}.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help=f"Train an adapter instead of all weights: {', '.join(LOW_RANK)} (low-rank; they need larger learning "
            f"rates, e.g. 1e-3), or {', '.join(name for name in ADAPTER_METHODS if name not in LOW_RANK)}. "
            "`--list adapters` describes each.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help=f"Rank of the low-rank methods. Default: {RANK}.")] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            help="Mask of sparse or shira: safe, principal, off_principal, low_magnitude, random or from_run. "
            "Default: safe."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help=f"Fraction of entries in the mask. Default: {DENSITY}; for safe and from_run all that is theirs."
        ),
    ] = None,
    overwrite: Overwrite = False,
    listed: Annotated[
        str | None,
        typer.Option(
            "--list",
            metavar="WHAT",
            callback=_print_list,
            is_eager=True,
            help="List recipes, adapters, settings or tasks, and exit.",
        ),
    ] = None,
) -> None:
    """Train a model on verifiable tasks, and measure it on held-out prompts before and after.

    An adapter is merged into the model in --out, and also saved on its own in OUT/adapter.
    """
    require_training("train")
    from offprincipal.reports.terminal import runs_table
    from offprincipal.studies.overrides import apply_override
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
    with resumable():
        record = run(parse_settings(values), out, overwrite=overwrite)
    if not is_main():
        return
    run_entry = {"name": out.name, "seconds": record["seconds"], **record["settings"], **record["accuracy"]}
    print_tables(runs_table({"runs": [run_entry]}))
    say(f"model: {out}")


@app.command(rich_help_panel=TRAINING)
def intervene(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hugging Face id, or `embedded`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder; on failure nothing is written.")],
    rotate: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", help="Rotate the values of each key-value head in these layers: 3; 0,2; 4-7; or all."
        ),
    ] = None,
    permute: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Reorder attention heads and MLP neurons of these layers.")
    ] = None,
    rotate_residual: Annotated[
        bool,
        typer.Option(
            "--residual",
            help="Rotate the whole residual stream; norm gains are folded into the matrices that read them.",
        ),
    ] = False,
    matrix: Annotated[
        str, typer.Option(help="Random orthogonal matrix: haar (uniform) or hadamard (random signs).")
    ] = "haar",
    seed: Annotated[int, typer.Option(help="Random seed; each layer uses its own stream.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16. Default: as MODEL is stored.")
    ] = None,
    overwrite: Replace = False,
    undone: Annotated[str | None, typer.Option("--undo", hidden=True)] = None,
) -> None:
    """Change a model's weights but not its function, and prove it.

    Writes an ordinary Hugging Face folder with intervention.json, which `offprincipal undo` reads after training.
    """
    require_training("intervene")
    from offprincipal import interventions
    from offprincipal.reports.terminal import proof_lines

    if undone is not None:
        raise ArgumentError(f"--undo is a command of its own: offprincipal undo {undone} {model} --out {out}")
    layers: Any = {
        "rotate": interventions.parse_layers(rotate) if rotate is not None else (),
        "permute": interventions.parse_layers(permute) if permute is not None else (),
    }
    options: Any = {"residual": rotate_residual, "matrix": matrix, "seed": seed, "dtype": dtype}
    done = interventions.intervene(model, out, **layers, **options, overwrite=overwrite)
    for line in (*proof_lines(done.proof, done.dtype, undone=False), f"model: {out}"):
        say(line)


@app.command(rich_help_panel=TRAINING)
def undo(
    record: Annotated[
        Path,
        typer.Argument(
            metavar="RECORD", help="The file intervention.json that `offprincipal intervene` wrote, or its folder."
        ),
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model trained from the intervened model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder; on failure nothing is written.")],
    base: Annotated[str | None, typer.Option(help="The base of the intervention. Default: the path in RECORD.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Store as float32, bfloat16 or float16. Default: as MODEL is stored, but float32 if the intervention "
            "rounded any tensor and MODEL has no float32 masters."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Map the weights back instead of the update; the intervention's rounding then counts as change.",
        ),
    ] = False,
    overwrite: Replace = False,
) -> None:
    """Map a model that was trained after an intervention back into the base's coordinates, and prove it."""
    require_training("undo")
    from offprincipal import interventions
    from offprincipal.reports.terminal import proof_lines

    undone = interventions.undo(record, model, out, base=base, dtype=dtype, exact=exact, overwrite=overwrite)
    for line in (*proof_lines(undone["proof"], undone["dtype"], undone=True), f"model: {out}"):
        say(line)


@app.command(hidden=True)
def settings() -> None:
    """List every training setting with its default: `train --list settings`."""
    print_list(_list_of("settings"))


@app.command(rich_help_panel=TRAINING)
def tasks(
    preview: Annotated[
        bool, typer.Option("--preview", help="Ask --model some held-out problems, and print its completions.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="Model of the preview: a folder, a Hugging Face id, or `embedded`.")
    ] = EMBEDDED,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Tasks of the preview, written as for `train`: a,b or repeat the option."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Settings, as for `train`: e.g. prompt.shots=8, max_new_tokens=64."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of problems in the preview; tasks alternate.")] = 3,
) -> None:
    """List the symbolic tasks, each with a prompt, its answer and a teacher's trace; or preview a model on some.

    The preview prompts as `train` does: with the tokenizer's chat template, or else with a few solved problems first.
    """
    from offprincipal.reports.terminal import preview_lines

    if not preview:
        print_list(_list_of("tasks"))
        return
    require_training("tasks --preview")
    from offprincipal.studies.overrides import apply_override
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
        say(line, soft_wrap=False)
