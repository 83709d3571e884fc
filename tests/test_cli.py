"""The command line as a user meets it: what it prints, its exit codes, and no traceback for bad input."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from checkpoint_folders import base_weights, moved, stored, tables_in, write_model

from offprincipal.cli import app, main
from offprincipal.training.settings import setting_fields


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("cli")
    weights = base_weights()
    base = write_model(root / "base", weights)
    return str(base), str(write_model(root / "tuned", stored(moved(weights, 1e-3, 5))))


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line; its exit code."""
    monkeypatch.setattr("sys.argv", ["offprincipal", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "command", [[], ["study"], ["compare"], ["train"], ["settings"], ["tasks"], ["report"], ["intervene"]]
)
def test_every_command_explains_itself(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *command, "--help") == 0
    said = capsys.readouterr().out
    assert "Usage" in said
    assert call(monkeypatch, *command, "-h") == 0 and capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("what", "holds"),
    [
        ("recipes", ["grpo", "sft_own"]),
        ("adapters", ["off_principal", "isospectral_muon"]),
        ("settings", ["adapter.rank"]),
        ("tasks", ["from_base"]),
    ],
)
def test_what_train_can_be_told_is_listed(
    what: str, holds: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "--list", what) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in holds)
    if what in ("settings", "tasks"):  # the nouns that these lists once were
        assert call(monkeypatch, what) == 0 and capsys.readouterr().out == said
    assert call(monkeypatch, "train", "--list", "nouns") == 2
    assert "choose one of recipes, adapters, settings, tasks" in capsys.readouterr().err


def test_tasks_are_named_at_once_or_one_by_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["--set", "eval_prompts=0", "--steps", "1", "--batch", "2", "--model", str(tiny_model)]
    ways = {"a": ["--task", "count@1,reverse@1"], "b": ["--task", "count@1", "--task", "reverse@1"]}
    for name, way in ways.items():
        assert call(monkeypatch, "train", "sft_own", *way, *sets, "--out", str(tmp_path / name)) == 0
        assert json.loads((tmp_path / name / "run.json").read_text())["settings"]["tasks"] == ["count@1", "reverse@1"]


def test_compare_prints_figures_with_nulls_and_writes_its_files(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "compare", pair[0], f"mine={pair[1]}", "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "mine" in printed and "null in brackets" in printed
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        *("matrices.parquet", "masks.parquet", "pairs.parquet", "curves.parquet", "summary.json", "report.html"),
        "measured.json",
    }


def test_a_long_comparison_prints_a_line_now_and_then_off_a_terminal(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("compare", *pair, "--no-report", "--json", "--out")
    assert call(monkeypatch, *words, str(tmp_path / "a")) == 0
    quick = capsys.readouterr()
    monkeypatch.setattr("offprincipal.cli.common.PATIENCE", 0.0)
    assert call(monkeypatch, *words, str(tmp_path / "b")) == 0
    slow = capsys.readouterr()
    assert quick.err == "" and json.loads(slow.out) == json.loads(quick.out)
    assert re.search(r"^100% of [\d,]+ parameters after 0:\d\d, 0:00 left; ", slow.err, re.MULTILINE)


def test_a_comparison_that_would_be_lost_is_not_replaced_unasked(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair

    def said(*words: str, code: int = 0) -> str:
        assert call(monkeypatch, "compare", *words, "--no-report", "--out", str(tmp_path)) == code
        return " ".join(capsys.readouterr().err.split())

    said(base, tuned, "--metrics", "location")
    before = tables_in(tmp_path)
    for words, what in (
        ((tuned, base, "--metrics", "location"), f"a comparison with {base}"),
        ((base, base, "--metrics", "location"), f"a comparison of {tuned}, which is not among these runs"),
        ((base, tuned, "--metrics", "changes"), "a comparison that also measured location"),
    ):
        assert f"contains {what}: choose another --out, or replace it with --overwrite" in said(*words, code=2)
        assert tables_in(tmp_path) == before
    said(os.path.relpath(base), os.path.relpath(tuned), f"again={tuned}", "--metrics", "location")
    said(base, f"again={tuned}", "--metrics", "changes", "--overwrite")
    assert len(json.loads((tmp_path / "summary.json").read_text())["runs"]) == 1
    (tmp_path / "summary.json").write_text('{"mine": 1}')
    assert "a summary.json that is not from a comparison: choose another --out" in said(base, tuned, code=2)
    assert (tmp_path / "summary.json").read_text() == '{"mine": 1}'


def test_figures_of_other_checkpoints_are_not_replaced_unasked(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair
    out = ("--out", str(tmp_path))
    assert call(monkeypatch, "trajectory", base, tuned, "--steps", "5", "--no-report", *out) == 0
    assert call(monkeypatch, "trajectory", base, base, "--steps", "5", *out) == 2
    assert f"has figures of {tuned}: choose another --out" in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, "trajectory", base, tuned, base, "--steps", "5,7", "--no-report", *out) == 0
    assert call(monkeypatch, "preflight", base, "--learning-rate", "1e-5", *out) == 0
    assert call(monkeypatch, "preflight", tuned, "--learning-rate", "1e-5", *out) == 2
    assert call(monkeypatch, "preflight", tuned, "--learning-rate", "1e-5", "--overwrite", *out) == 0


def test_json_is_the_summary_and_nothing_else(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "compare", *pair, "--out", str(tmp_path), "--json", "--no-report") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "summary.json").read_text())
    assert not (tmp_path / "report.html").exists()


def test_the_report_can_be_drawn_again(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "compare", *pair, "--out", str(tmp_path), "--no-report") == 0
    assert call(monkeypatch, "report", str(tmp_path)) == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("condition", "code"), [("relative_update_norm > 10", 0), ("relative_update_norm < 10", 3)])
def test_a_pipeline_can_fail_on_a_condition(
    condition: str, code: int, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "compare", *pair, "--out", str(tmp_path), "--no-report", "--fail-if", condition) == code
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "{base}", "{base}/nowhere"], "does not exist"),
        (["compare", "{base}", "{tuned}", "--metrics", "magic"], "no metric group"),
        (["compare", "{base}", "{tuned}", "--density", "2"], "density"),
        (["compare", "{base}", "{tuned}", "--fail-if", "nonsense > 1"], "no metric 'nonsense'"),
        (["compare", "{base}", "{tuned}", "{tuned}"], "two runs"),
        (["compare", "{base}", "{tuned}", "--out", "{base}/config.json"], "output folder"),
        (["compare", "{base}"], "Missing argument"),
        (["study", "no_such_profile"], "no profile"),
        (["study", "--set", "training.steps=-1"], "steps"),
        (["train", "grpo", "--task", "algebra", "--out", "{base}/../run"], "algebra"),
        (["train", "ppo", "--task", "add", "--out", "{base}/../run"], "recipe"),
        (["train", "grpo", "--task", "add", "--model", "{base}/../nowhere", "--out", "{base}/../run"], "nowhere"),
        (["report", "{base}"], "summary.json"),
    ],
)
def test_bad_input_is_told_in_a_line_with_exit_code_2(
    words: list[str],
    says: str,
    pair: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [word.format(base=pair[0], tuned=pair[1]) for word in words]
    before = sorted(path for path in Path(pair[0]).parent.rglob("*") if path.is_file())
    assert call(monkeypatch, *filled) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err
    assert before == sorted(path for path in Path(pair[0]).parent.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "train grpo --task add --output_dir y --num-train-epochs 3 --beta=.1 --seed 1 -r 8 --foo --keep_deltas 4",
            {
                "--output_dir": "here it is --out",
                "--num-train-epochs": "here it is --steps, as a run is counted in steps",
                "--beta": "here it is --set beta=VALUE for dpo and kto, and --set trl.beta=VALUE for others",
                "-r": "here it is --rank",
                "--foo": "did you mean --out?",
                "--keep_deltas": "here it is --set keep_deltas=VALUE",
            },
        ),
        ("train grpo --per_device_train_batch_size 8 --set a=--bogus", {"--per_device_train_batch_size": "--batch, "}),
        ("train grpo --use_peft --logging_steps 1", {"--use_peft": "--adapter lora", "--logging_steps": "every step"}),
        ("study --max_steps 3 --out x", {"--max_steps": "here it is --set training.steps=VALUE"}),
        ("compare --base_model x", {"--base_model": "as an argument: offprincipal compare BASE [NAME=]TUNED..."}),
        ("compare a b --lora_r 3", {"--lora_r": "a setting of `offprincipal train`"}),
        ("compare a b --null_draws 3", {"--null_draws": "did you mean --null-draws?"}),
        ("intervene --model_name x", {"--model_name": "here it is the argument MODEL"}),
        ("cache info --foo", {"--foo": "`offprincipal cache info --help` has all"}),
    ],
)
def test_options_that_are_called_otherwise_here_are_all_named(
    words: str, says: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words.split()) == 2
    said = capsys.readouterr().err.replace("No such option ", "No such options:\n")
    lines = [line.strip("│ ") for line in said.partition("No such options:")[2].splitlines() if ": " in line]
    assert [line.partition(": ")[0] for line in lines] == list(says)
    assert all(hint in line for line, hint in zip(lines, says.values(), strict=True)), lines


def test_an_old_report_survives_a_comparison_that_fails(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "compare", *pair, "--out", str(tmp_path), "--no-report") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert call(monkeypatch, "compare", pair[0], str(tmp_path), "--out", str(tmp_path)) == 2
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("study", ["quick", "pretrained", "RLVR against SFT, matched"]),
        ("compare", ["spectral_shift", "changes"]),
    ],
)
def test_what_there_is_to_choose_is_listed(
    command: str, names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--list") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)


LISTS = (["compare"], ["study"], *(["train", what] for what in ("settings", "adapters", "tasks", "recipes")))


@pytest.mark.parametrize("words", LISTS)
@pytest.mark.parametrize(("columns", "widest"), [("80", 80), (None, 100), ("30", 80)])
def test_lists_are_as_wide_as_asked_off_a_terminal_and_break_no_name(
    words: list[str],
    columns: str | None,
    widest: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["offprincipal", words[0], "--list", *words[1:]])
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert max(map(len, lines)) <= widest
    assert not any(line.endswith(" ") for line in lines)
    if words == ["compare"]:
        names = {line.split()[0] for line in lines if line.strip()}
        assert {"principal_angle_left_mean_deg", "low_magnitude_overlap_rounding_judged"} <= names
        assert not any(name.endswith(("_null", "_sd")) for name in names)
        assert "; nulls: isotropic, stored, shuffled" in re.sub(r"\s+", " ", said)


def test_every_column_of_a_comparison_is_data_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "principal_angle_left_mean_deg_isotropic_null"
    for words in (("--list", "--json"), ("--json", "--list")):
        assert call(monkeypatch, "compare", *words) == 0
        listed = json.loads(capsys.readouterr().out)
        assert listed[name]["unit"] == "degrees" and listed[name]["group"] == "subspace"


def test_no_help_loses_what_stands_in_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich takes a word in brackets for markup."""
    assert call(monkeypatch, "gates", "--help") == 0
    assert "[NAME=]TUNED" in capsys.readouterr().out


COMPARE = [sys.executable, "-m", "offprincipal", "compare", "--metrics", "changes"]
MARKED = "run[_red]\x1b[31m\x9b1m"


def test_names_with_markup_and_escapes_are_shown_as_they_are_and_end_no_run(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    """Folders, runs and --out, on the terminal and in JSON; a condition is checked all the same."""
    base, tuned = pair
    out, run = tmp_path / "o[red]x\x1b[2J", tmp_path / MARKED
    shutil.copytree(tuned, run)
    command = [
        sys.executable,
        "-m",
        "offprincipal",
        "compare",
        str(base),
        str(run),
        "--out",
        str(out),
        "--metrics",
        "changes",
    ]
    for more in ([], ["--json"]):
        done = subprocess.run([*command, *more, "--fail-if", "update_norm > 0"], capture_output=True, check=False)
        assert done.returncode == 3, done.stderr
        assert b"\x1b[31m" not in done.stdout and b"\x1b[2J" not in done.stdout and "\x9b".encode() not in done.stdout
        assert b"Traceback" not in done.stderr and b"\x1b[31m" not in done.stderr
        if not more:
            assert b"o[red]x" in done.stdout
    assert json.loads(done.stdout)["runs"].keys() == {MARKED}


def test_folders_whose_names_are_no_text_are_compared(pair: tuple[str, str], tmp_path: Path) -> None:
    base, tuned = pair
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(os.fsencode(tuned), odd)
    command = [sys.executable, "-m", "offprincipal", "compare", str(base), odd, "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--metrics", "changes"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]) == ["caf?"]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(("condition", "code", "says"), [(">", 3, b"failed: "), ("<", 2, b"No space left")])
@pytest.mark.parametrize("buffered", ["1", ""])
def test_a_condition_is_checked_though_nothing_can_be_printed(
    pair: tuple[str, str], tmp_path: Path, condition: str, code: int, says: bytes, buffered: str
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMPARE, *pair, "--out", str(tmp_path / "out"), "--fail-if", f"update_norm {condition} 0"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": buffered},
            check=False,
        )
    assert done.returncode == code and says in done.stderr and b"Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "summary.json").exists()


def test_a_pipe_that_is_closed_is_no_fault(pair: tuple[str, str], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMPARE, *pair, "--out", str(tmp_path)], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_checkpoints_of_one_run_stand_in_the_order_of_their_steps() -> None:
    from offprincipal.cli.common import named_runs

    shell = [f"runs/grpo/checkpoint-{step}" for step in (10, 100, 2, 20)]
    assert list(named_runs(shell)) == [f"checkpoint-{step}" for step in (2, 10, 20, 100)]
    assert list(named_runs(["b2", "a1", "x=b2"])) == ["b2", "a1", "x"]


@pytest.mark.parametrize(
    "words",
    [
        ("gates", "embedded", "run", "--task", "add"),
        ("intervene", "embedded", "--rotate", "0", "--out", "turned"),
        ("train", "grpo", "--task", "add", "--out", "run"),
        ("study", "quick"),
    ],
)
def test_a_command_whose_packages_are_not_installed_says_that_it_needs_them(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("offprincipal.models.opening._EXTRA", ("nobody_has_this",))
    assert call(monkeypatch, *words) == 2
    assert f"`offprincipal {words[0]}` needs nobody_has_this: pip install" in capsys.readouterr().err


COMMANDS = {command.name or command.callback.__name__: command.callback.__doc__ for command in app.registered_commands}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_no_sentence_and_swallows_no_word(command: str) -> None:
    """Line breaks of a docstring are those of the help, and what stands in brackets would be markup."""
    text = inspect.cleandoc(COMMANDS[command] or "")
    assert text and "[" not in text
    assert all(line.endswith((".", ":")) for line in text.splitlines() if line)


# what is done only where it is asked for, and so has no default
ON_REQUEST = {
    *("adapter", "as_json", "contract", "expect", "fail_if", "figures", "listed", "override", "overrides", "permute"),
    *("predict", "prompts", "push", "report_to", "rotate", "sequences", "subspace_rank", "task"),
}


def _options(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _options(command, f"{path}{name} ")
        else:
            yield from ((f"{path}{name} {option.name}", option) for option in command.params)


def test_every_option_has_a_sentence_and_its_default() -> None:
    options = dict(_options(typer.main.get_command(app)))
    assert len(options) > 90
    for name, option in options.items():
        if getattr(option, "hidden", False):
            continue
        assert re.match(r"[A-Z]", option.help), name
        assert option.help.endswith("."), name
        if option.param_type_name == "option" and not option.required and option.default is None:
            assert option.name in ON_REQUEST or "Default: " in option.help, name


def test_defaults_of_training_are_those_that_are_shown() -> None:
    fields = setting_fields()
    options = dict(_options(typer.main.get_command(app)))
    for name in ("steps", "batch", "learning_rate", "seed"):
        assert f"Default: {fields[name].default}." in options[f"train {name}"].help


def test_what_replaces_files_stands_beside_where_they_go() -> None:
    options = dict(_options(typer.main.get_command(app)))
    for command in ("compare", "gates", "preflight", "trajectory"):
        assert options[f"{command} overwrite"].rich_help_panel is options[f"{command} out"].rich_help_panel is None


def test_numbers_in_sentences_have_no_colours_of_their_own(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich's highlighter paints whatever number it meets."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = str(tmp_path / "out")
    for words in (
        ("compare", *pair, "--out", out, "--explain", "--metrics", "changes,location"),
        ("show", out, "--explain"),
        ("preflight", pair[0], "--learning-rate", "1e-5", "--out", out),
        ("compare", "--list"),
        ("train", "--list", "settings"),
    ):
        assert call(monkeypatch, *words) == 0
        said = capsys.readouterr().out
        assert "\x1b[1m" in said, "it is drawn as on a terminal"
        assert "36m" not in said, words
