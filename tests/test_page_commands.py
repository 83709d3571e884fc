"""Every command of the README and of docs runs as it stands there, on tiny models under the names that the pages use.

`test_recipe_pages.py` has those of docs/recipes, `test_pages.py` those of the tour. What is not run stands in
`NOT_RUN`, each with its reason, and is parsed: an option or a setting that there is not fails either way.
"""

import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import typer
import typer.main
from documented import blocks, command_lines, commands, joined_by_and, made_small
from safetensors.torch import load_file, save_file
from test_cli import call
from test_prompting import model_at

from offprincipal.cli import app
from offprincipal.errors import OffPrincipalError
from offprincipal.paper import load_profile

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # of whichever click typer brings
ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ALL_PAGES = [*PAGES, *sorted((ROOT / "docs" / "recipes").glob("*.md"))]
SHOWN = [page for page in PAGES if blocks(page, "sh") and page.stem != "tour"]

NOT_RUN = {  # the beginning of a command, or an option of it: why it is parsed and not run
    "study": "trains for minutes to hours; tests/test_studies.py runs one",
    "--ray": "starts Ray; tests/test_reuse.py and test_trajectories.py use it",
    "--device cuda": "needs a GPU",
    "--push": "writes to the Hub",
    "org/base": "reads the Hub",
}
PLACEHOLDERS = {"embedded": "BASE", "gemma-3-270m-q4_k_m.gguf": "BASE", "Qwen/Qwen3-0.6B": "BASE"}
TASKS = {"add": "count@1", "add,sort@2": "count@1", "sort@2": "count@1"}  # what the tiny model is sometimes right at
FEWER = ["--no-per-layer", "--batches", "4", "--max-new-tokens", "4"]  # gates: a quarter of the batches, short ones
LAYERS = {"2,3": "0,1"}  # it has two layers


@pytest.fixture(scope="session")
def workshop(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds whatever the pages name, made once; each page works in a copy of it."""
    folder = tmp_path_factory.mktemp("workshop")
    base = shutil.copytree(taught_model, folder / "BASE", ignore=shutil.ignore_patterns("masters", "run.json"))
    names = ["TUNED", "RL_CHECKPOINT", "SFT_CHECKPOINT", "step_10", "step_20", "step_40"]
    names += [f"runs/grpo/checkpoint-{step}" for step in (100, 200, 300)] + [
        f"runs/trl/checkpoint-{step}" for step in (2, 4)
    ]
    names += [f"demo/{run}" for run in ("grpo_1", "grpo_2", "sft_own_1", "sft_teacher_1")]
    for seed, name in enumerate(names):
        walked(base, folder / name, seed)
    adapter_of(base, folder / "my-adapter")
    sharded(base, folder / "fsdp" / "step-100")
    (folder / "prompts.txt").write_text("count ab\n" * 32)
    (folder / "given.jsonl").write_text("\n".join(json.dumps({"text": f"{i}+1={i + 1}"}) for i in range(32)))
    model_at(folder / "MODEL", chat=True)
    rows = [{"question": f"{i}+1=", "answer": f"{i}+1\n#### {i + 1}"} for i in range(60)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def walked(base: Path, folder: Path, seed: int) -> None:
    """A copy of the base whose weights went a small Gaussian step."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: (weight + 1e-3 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        for name, weight in load_file(base / "model.safetensors").items()
    }
    save_file(moved, folder / "model.safetensors", {"format": "pt"})


def adapter_of(base: Path, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(folder)


def sharded(base: Path, folder: Path) -> None:
    weights = {name: weight.float() * 1.001 for name, weight in load_file(base / "model.safetensors").items()}
    dcp.save(dict(weights), checkpoint_id=folder, no_dist=True)
    shutil.copy(base / "config.json", folder)


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_their_order(
    page: Path, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workshop, tmp_path / "here"))
    for written in outputs(page):  # are not there yet
        shutil.rmtree(written, ignore_errors=True)
    for line in command_lines(page):
        if line[0] == "offprincipal":
            run_or_parse(line[1:], monkeypatch)
        elif line[:2] == ["python", "scripts/compare_curvature_noise.py"]:
            fewer = ["--batches", "4", "--prompts-per-batch", "4", "--max-new-tokens", "4", "--cells", "1"]
            monkeypatch.setattr("sys.argv", [line[1], *made_small(line[2:], PLACEHOLDERS), *fewer])
            runpy.run_path(str(ROOT / line[1]), run_name="__main__")
        else:
            check_other(line)


def outputs(page: Path) -> list[str]:
    return [after for words in commands(page) for word, after in pairwise(words) if word == "--out"]


def run_or_parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if any(beginning in shlex.join(arguments) for beginning in NOT_RUN):
        parse(arguments)
    else:
        given = on_the_tiny_model(arguments)
        assert call(monkeypatch, *given) == 0, shlex.join(given)


def on_the_tiny_model(arguments: list[str]) -> list[str]:
    given = made_small(arguments, PLACEHOLDERS)
    given = [LAYERS.get(word, word.replace("hf:openai/gsm8k?config=main", "hf:data.jsonl")) for word in given]
    if given[0] == "gates":
        return [*given, *FEWER]
    if "--preview" in given:
        return [*given, "--set", "max_new_tokens=8"]
    if given[0] != "train" or "--list" in given:
        return given
    given = [TASKS.get(word, word) if before == "--task" else word for before, word in pairwise(["", *given])]
    text = shlex.join(given)
    more = {"--steps": "2", "--model": "BASE"}
    given += [word for option, value in more.items() if option not in text for word in (option, value)]
    settings = {"batch": "8", "eval_prompts": "2", "micro_batch": "8"}
    return given + [
        word for key, value in settings.items() if f"{key}=" not in text for word in ("--set", f"{key}={value}")
    ]


def parse(arguments: Iterable[str]) -> None:
    """What the command line makes of the words before it runs anything; a profile is read with its settings."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    given = command.make_context("offprincipal", words).params
    if "profile" in given and given["profile"] != "my_profile.yaml":
        load_profile(given["profile"], given["override"] or [])


def check_other(line: list[str]) -> None:
    """`make` names a target of the Makefile, `pip` extras of the package, `python` a script with these options."""
    program, *words = line
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(words) <= targets, line
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in words for name in re.findall(r"[\w-]+", word.partition("[")[2])]
        assert set(named) <= set(extras), line
    elif program == "python":
        source = (ROOT / words[0]).read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], line
    else:
        assert program == "pytest" and (ROOT / words[0]).is_file(), line


def mentioned(page: Path) -> list[list[str]]:
    """Commands in the running text, `such as this`; those that leave something out are mentions of a name."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:offprincipal|make|python|pip|pytest) [^`]+)`", text)
    return [words for span in spans if "…" not in span for words in joined_by_and(shlex.split(span))]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_are_commands(page: Path) -> None:
    for words in mentioned(page):
        if words[:2] == ["python", "-m"]:
            continue  # another project's
        if words[0] != "offprincipal":
            check_other(words)
            continue
        try:
            parse(words[1:])
        except USAGE_ERROR as error:
            assert type(error).__name__ == "MissingParameter", words  # the command's name alone


def test_reasons_are_of_commands_that_are_there() -> None:
    shown = [shlex.join(words) for page in PAGES for words in commands(page)]
    assert [beginning for beginning in NOT_RUN if not any(beginning in line for line in shown)] == []


@pytest.mark.parametrize(
    "words", [["compare", "A", "B", "--metrix", "all"], ["study", "quick", "--set", "trainig.steps=2"]]
)
def test_a_misspelt_option_or_setting_fails_where_commands_are_parsed_alone(words: list[str]) -> None:
    with pytest.raises((USAGE_ERROR, OffPrincipalError)):
        parse(words)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_what_a_block_is_is_said_and_other_programs_are_there(page: Path) -> None:
    """Shell blocks are `sh`, which the tests run; a block that only shows something is `text`."""
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"sh", "python", "yaml", "bibtex", "text"} and set(fences[1::2]) <= {""}
    for words in command_lines(page):
        if "offprincipal" not in words:
            check_other(words)
