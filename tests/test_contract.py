"""Contracts: what a run may have done to which tensors, and what is said where it did something else."""

import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import base_weights, write_model
from test_cli import call

from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import ArgumentError, FileError
from offprincipal.measures.contract import broken_phrases, parse_expectations, read_contract

LAYER = "model.layers.0"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A run whose first layer moved; beside it packed weights, a head for prediction ahead, and a value head."""
    base = base_weights() | {
        "visual.packed": torch.arange(8, dtype=torch.uint8),
        "visual.other": torch.arange(8, dtype=torch.uint8),
        "mtp.weight": torch.ones(2, 2).bfloat16(),
    }
    run = base | {name: tensor + 0.5 for name, tensor in base.items() if name.startswith(LAYER)}
    run |= {"visual.other": torch.arange(8, dtype=torch.uint8) + 1, "v_head.weight": torch.ones(1, 24).bfloat16()}
    del run["mtp.weight"]
    return {"base": write_model(tmp_path / "base", base), "run": write_model(tmp_path / "run", run)}


def held(folders: dict[str, Path], *expect: str) -> list[dict[str, Any]]:
    settings = CompareSettings(metrics=("location",), expect=expect)
    summary = compare(folders["base"], [folders["run"]], settings, cache=False).summary
    found: list[dict[str, Any]] = summary["runs"]["run"]["contract"]
    return found


def test_each_expectation_says_what_it_named_and_what_broke_it(folders: dict[str, Path]) -> None:
    found = held(
        folders,
        "model.layers.1.*: unchanged",
        f"{LAYER}.*: changed",
        "model.layers.*: unchanged",
        "model.layers.*: changed",
        "model.norm: unchanged",
        f"{LAYER}.*: unchanged_fraction < .5",
        "model.*: unchanged_fraction >= 1",
    )
    assert [(each["held"], each["tensors"], len(each["broken"])) for each in found] == [
        (True, 3, 0), (True, 3, 0), (False, 6, 3), (False, 6, 3), (True, 1, 0), (True, 3, 0), (False, 8, 3)
    ]  # fmt: skip
    assert {one["tensor"] for one in found[2]["broken"]} == {name for name in base_weights() if name.startswith(LAYER)}
    assert all(one["found"].endswith("% changed") for one in found[2]["broken"])
    assert {one["found"] for one in found[3]["broken"]} == {"unchanged"}
    assert found[6]["broken"][0]["found"].startswith("unchanged_fraction is 0")


def test_what_was_not_compared_keeps_no_promise(folders: dict[str, Path]) -> None:
    found = held(folders, "mtp: unchanged", "v_head: changed", "visual.*: unchanged", "visual.packed: unchanged")
    assert [each["held"] for each in found] == [False, False, False, True]
    assert found[0]["broken"] == [{"tensor": "mtp.weight", "found": "in the base alone"}]
    assert found[1]["broken"] == [{"tensor": "v_head.weight", "found": "in the run alone"}]
    assert found[2]["broken"] == [{"tensor": "visual.other", "found": "changed; integers, compared bit for bit"}]
    numeric = held(folders, "visual.*: relative_update_norm < .1")[0]
    assert [one["tensor"] for one in numeric["broken"]] == ["visual.other"]  # the packed tensor is the base's


def test_a_change_below_bfloat16_is_a_change(tmp_path: Path) -> None:
    """Frozen means frozen: of weights stored in float32 every bit counts."""
    weights = {name: tensor.float() for name, tensor in base_weights().items()}
    base = write_model(tmp_path / "base", weights)
    run = write_model(tmp_path / "run", {name: tensor * (1 + 1e-6) for name, tensor in weights.items()})
    settings = CompareSettings(metrics=("location",), expect=("model.layers.*: unchanged",))
    (found,) = compare(base, [run], settings, cache=False).summary["runs"]["run"]["contract"]
    assert not found["held"] and found["tensors"] == 6


def test_a_module_stands_for_its_parts_and_experts(folders: dict[str, Path]) -> None:
    (expectation,) = parse_expectations(["mlp.experts.gate_up_proj: changed"], ("location",))
    for name in ("mlp.experts.gate_up_proj[3]:gate", "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj.weight"):
        assert expectation.matches(name), name
    assert not expectation.matches("mlp.experts.gate_up_project")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unchanged", "is not a valid expectation. Write PATTERN: unchanged"),
        ("a: ", "is not a valid expectation"),
        ("a: untouched", "is not a condition"),
        ("a: reward > 1", "no metric 'reward' is measured"),
        ("model.vision.*: unchanged", r"'model\.vision\.\*' does not match any tensor: names are such as "),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match=message):
        held(folders, text)
    if "does not match" not in message:
        with pytest.raises(ArgumentError, match=message):  # before anything is read
            CompareSettings(expect=(text,))


def test_a_contract_can_be_held_whatever_is_measured(folders: dict[str, Path]) -> None:
    expect = ("model.layers.*: changed", "model.embed_tokens.weight: update_norm < 1")
    summary = compare(
        folders["base"], {"run": folders["run"]}, CompareSettings(metrics=("changes",), expect=expect)
    ).summary
    assert [each["pattern"] for each in summary["runs"]["run"]["contract"]] == [text.split(":")[0] for text in expect]


def test_files_hold_a_mapping_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text("model.visual.*: unchanged\n'*.mlp.*': changed\nlm_head: unchanged_fraction > .9\n")
    wanted = ["model.visual.*: unchanged", "*.mlp.*: changed", "lm_head: unchanged_fraction > .9"]
    assert read_contract(path) == wanted
    path.write_text(json.dumps(wanted))
    assert read_contract(path) == wanted
    for content in ("", "unchanged", "- 1", "a: [", "!!python/object/apply:os.system ['true']"):
        path.write_text(content)
        with pytest.raises(FileError, match="contract"):
            read_contract(path)
    with pytest.raises(FileError, match="cannot read the contract"):
        read_contract(tmp_path / "none.yaml")


def test_the_command_fails_by_name(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(folders["base"]), str(folders["run"]), "--out", str(out), "--metrics", "location"]
    assert call(monkeypatch, *command, "--expect", "model.layers.1.*: unchanged") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "kept by run: model.layers.1.*: unchanged (0 of 3 tensors break it)" in shown
    (tmp_path / "contract.yaml").write_text("model.layers.*: unchanged\n")
    assert call(monkeypatch, *command, "--contract", str(tmp_path / "contract.yaml")) == 3
    told = capsys.readouterr()
    assert "BROKEN by run: model.layers.*" in told.out and f"{LAYER}.mlp" in told.err
    assert "'model.layers.*' is not unchanged in 3 of 6 tensors" in " ".join(told.err.split())
    summary = json.loads((out / "summary.json").read_text())
    assert broken_phrases(summary) and "Contract, held against" in (out / "report.html").read_text()
    assert call(monkeypatch, *command, "--expect", "nothing.*: changed") == 2
    assert "does not match any tensor" in capsys.readouterr().err


def test_the_report_says_what_makes_it_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--metrics", "location,spectrum", "--density", "0.3", "--include-embeddings", "--seed", "7"]
    asked += ["--expect", "model.norm: unchanged", "--expect", "model.layers.1.*: unchanged_fraction > 0.9"]
    out = tmp_path / "first"
    assert call(monkeypatch, "compare", str(folders["base"]), str(folders["run"]), "--out", str(out), *asked) == 0
    page = html.unescape((out / "report.html").read_text())
    (line,) = re.findall(r"<pre><code>(offprincipal compare .*)</code></pre>", page)
    monkeypatch.chdir(folders["base"].parent)  # where both lie: a page names no path of the machine
    assert str(folders["base"].parent) not in page
    assert call(monkeypatch, *shlex.split(line)[1:], "--out", str(tmp_path / "again")) == 0
    texts = ((tmp_path / name / "summary.json").read_text() for name in ("first", "again"))
    first, again = (json.loads(text.replace(f"{folders['base'].parent}/", "")) for text in texts)
    assert first["arguments"] == again["arguments"] and first["runs"] == again["runs"]
