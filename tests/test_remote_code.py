"""A checkpoint's own Python is never executed: whoever answers yes on the terminal, and wherever it is asked for."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offprincipal.errors import ModelError
from offprincipal.models import open_language_model

ROOT = Path(__file__).parents[1]
OPENERS = {"from_pretrained", "from_config"}
CANARY = "from pathlib import Path\nPath({canary!r}).write_text('it ran')\nclass Own:\n    pass\n"


@pytest.mark.parametrize(
    "file", [p for d in ("src", "scripts", "benchmarks") for p in sorted((ROOT / d).rglob("*.py"))]
)
def test_whatever_is_opened_says_that_no_code_is_trusted(file: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    opening = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in OPENERS]
    silent = [call.lineno for call in opening if "trust_remote_code" not in {word.arg for word in call.keywords}]
    assert not silent, f"{file}: lines {silent} leave it to transformers to ask"


def hostile(model: Path, where: str, place: Path) -> tuple[Path, Path]:
    """A checkpoint that asks somewhere for Python of its own, and the file that this would make."""
    folder, canary = place / "hostile", place / "canary"
    shutil.copytree(model, folder)
    (folder / "own.py").write_text(CANARY.format(canary=str(canary)))
    config = json.loads((folder / "config.json").read_text())
    if where == "model":
        config |= {"auto_map": {"AutoModelForCausalLM": "own.Own"}}
    elif where == "config":
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    elif where == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    else:
        (folder / "custom_generate").mkdir()
        shutil.copy(folder / "own.py", folder / "custom_generate" / "generate.py")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, canary


@pytest.mark.parametrize("where", ["model", "tokenizer", "custom_generate"])
def test_transformers_own_classes_stand_in_for_a_checkpoints(where: str, tiny_model: Path, tmp_path: Path) -> None:
    folder, canary = hostile(tiny_model, where, tmp_path)
    assert open_language_model(folder, "cpu").model.config.model_type == "qwen3"
    assert not canary.exists()


def test_an_architecture_of_its_own_runs_only_where_it_is_trusted(tiny_model: Path, tmp_path: Path) -> None:
    folder, canary = hostile(tiny_model, "config", tmp_path)
    with pytest.raises(ModelError, match=r"is not executed: read that code.*trust_remote_code"):
        open_language_model(folder, "cpu")
    assert not canary.exists()
    with pytest.raises(ModelError, match="as a causal language model"):  # imported, as was asked, and found to be none
        open_language_model(folder, "cpu", trust_remote_code=True)
    assert canary.exists()


def test_a_yes_on_the_terminal_runs_nothing(tiny_model: Path, tmp_path: Path) -> None:
    folder, canary = hostile(tiny_model, "config", tmp_path)
    (tmp_path / "prompts.txt").write_text("1+1=\n")
    gates = ["gates", folder, tiny_model, "--prompts", tmp_path / "prompts.txt", "--batches", "1"]
    train = ["train", "grpo", "--model", folder, "--task", "add"]
    for command in (gates, train, ["intervene", folder, "--permute", "0"]):
        out = tmp_path / str(command[0])
        line = [sys.executable, "-m", "offprincipal", *map(str, command), "--out", str(out)]
        done = subprocess.run(line, input="y\n" * 200, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "[y/N]" not in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert not canary.exists() and not list(out.rglob("*.safetensors")) and not list(out.rglob("*.json"))
