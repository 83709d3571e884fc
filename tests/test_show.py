"""`show` prints any folder of ours, and says what it expected of another."""

import json
from io import StringIO
from pathlib import Path

import pytest
from checkpoint_folders import base_weights, moved, stored, write_model
from rich.console import Console

from offprincipal import Monitor, intervene, preflight, trajectory
from offprincipal.cli import main
from offprincipal.comparison import compare
from offprincipal.errors import FileError
from offprincipal.gates import measure_gates
from offprincipal.reports.show import as_json, parts_of
from offprincipal.reports.words import warnings_of
from offprincipal.training import TrainSettings, train


def printed(folder: Path, explain: bool = False) -> str:
    console = Console(width=100, file=StringIO())
    with console.capture() as said:
        for part in parts_of(folder, explain):
            console.print(part, highlight=False, markup=not isinstance(part, str))
    return said.get()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root, weights = tmp_path_factory.mktemp("pair"), base_weights()
    return write_model(root / "base", weights), write_model(root / "tuned", stored(moved(weights, 1e-3, 5)))


def test_a_comparison_is_shown_as_it_was_printed(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["offprincipal", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    out = str(tmp_path / "out")
    first = call("compare", str(pair[0]), f"rl={pair[1]}", "--out", out, "--no-report")
    again = call("show", out)
    assert "null in brackets" in again and first.startswith(again)  # but for where the tables are
    assert set(json.loads(call("show", out, "--json"))) == {"summary.json"}


def test_a_run_is_shown_with_what_its_monitor_saw(tiny_model: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        **{"recipe": "sft_own", "model": str(tiny_model), "tasks": ("count@1",), "steps": 3, "batch": 8},
        **{"eval_prompts": 0, "monitor": 1, "device": "cpu"},
    )
    train(settings, tmp_path / "run", quiet=True)
    said = printed(tmp_path / "run")
    assert "sft_own on count@1: 3 steps, 8 sequences each" in said and "KL of the step" in said
    assert set(as_json(tmp_path / "run")) == {"run.json"}


def test_the_other_kinds(tiny_model: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    trajectory(pair[0], [pair[1], pair[0]], steps=[2, 1], out=tmp_path / "trajectory")
    assert "straightness" in printed(tmp_path / "trajectory")
    preflight(pair[0], 1e-6).write(tmp_path / "preflight")
    assert "1e-06" in printed(tmp_path / "preflight")
    intervene(tiny_model, tmp_path / "turned", rotate=(0,))
    assert "float64 logits differ by" in printed(tmp_path / "turned")
    options = {"batches": 2, "prompts_per_batch": 1, "per_layer": False, "draws": 1, "max_new_tokens": 2}
    measure_gates(tiny_model, {"same": tiny_model}, task="add@1", **options).write(tmp_path / "gates")
    assert "same" in printed(tmp_path / "gates")


def test_claims_are_a_row_each_and_explained_when_asked(tmp_path: Path) -> None:
    def side(verdict: str, effect: float | None, **more: object) -> dict[str, object]:
        ends = {"low": None, "high": None} if effect is None else {"low": effect - 0.001, "high": effect + 0.001}
        return {"verdict": verdict, "effect": effect, **ends, "measure": "share", "sentence": "Found.", **more}

    blind = {"draws": 20, "supported": 1, "contradicted": 2}
    controlled = side("no effect beyond the control", -0.000705, control="rounding", negative_control=blind)
    claim = {"id": "C5", "title": "off-principal", "of": None, "contrast": "sft_own", "statement": "It avoids them"}
    claims = [claim | {"as_published": side("contradicted", -0.106), "controlled": controlled}]
    claim |= {"contrast": "sft [own]"}  # no markup, in tables or sentences
    claims += [claim | {"as_published": side("supported", 0.1), "controlled": side("inconclusive", None, control="x")}]
    study = {"profile": "quick", "base": {"name": "embedded"}, "runs": [], "claims": claims}
    (tmp_path / "study.json").write_text(json.dumps(study))
    said = printed(tmp_path)
    rows = [line.split("  ") for line in said.splitlines() if "C5" in line]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["C5 off-principal: sft_own", "contradicted -0.106", "–", "no effect -0.000705", "3/20"],
        ["C5 off-principal: sft [own]", "supported 0.1", "–", "inconclusive", "–"],
    ]
    explained = " ".join(printed(tmp_path, explain=True).split())
    assert "C5 off-principal: sft_own. It avoids them. Control: rounding." in explained
    assert "as published: contradicted -0.106 [-0.107, -0.105], share. Found." in explained
    assert "with the control: inconclusive. Found." in explained and "C5 off-principal: sft [own]. It" in explained


def test_notes_that_differ_in_numbers_alone_are_one() -> None:
    def summary(*warnings: str) -> dict[str, object]:
        return {"runs": {f"run_{i}": {"warnings": [text]} for i, text in enumerate(warnings)}}

    bounds = [f"{count} matrices, right to {error}" for count, error in ((90, "1.2e-5"), (120, "3e-6"), (90, "0.5"))]
    merged = "90 to 120 matrices, right to 3e-6 to 1.2e-5"
    assert warnings_of(summary(*bounds[:2])) == [merged]
    apart = [f"run_0, run_1: {merged}", f"run_2: {bounds[2]}", "run_3: else"]  # an error of .5 is another thing
    assert warnings_of(summary(*bounds, "else")) == apart
    tensors = [f"one of them is model.layers.{i}.q_proj" for i in (3, 12)]
    assert warnings_of(summary(*tensors)) == [f"run_{i}: {text}" for i, text in enumerate(tensors)]


def test_a_folder_that_is_not_ours_or_damaged_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for act in (printed, as_json):
        with pytest.raises(FileError, match=r"holds none of study.json, run.json"):
            act(pair[0])
    (tmp_path / "summary.json").write_text('{"runs": 3}')
    with pytest.raises(FileError, match="damaged"):
        printed(tmp_path)


@pytest.mark.parametrize(
    ("journal", "what"), [("journal.jsonl", "comparison"), ("trajectory.journal.jsonl", "trajectory")]
)
def test_what_was_killed_is_said_to_be_unfinished(journal: str, what: str, tmp_path: Path) -> None:
    (tmp_path / journal).touch()
    with pytest.raises(FileError, match=f"holds an unfinished {what}: the same command continues with it"):
        printed(tmp_path)


def test_a_monitor_alone_is_shown_with_its_last_step(tiny_model: Path, tmp_path: Path) -> None:
    from offprincipal.models import open_language_model

    model = open_language_model(str(tiny_model), "cpu").model
    monitor = Monitor(tmp_path / "watched", every=1)
    monitor.start(model)
    for step in range(1, 31):
        monitor.observe(step, model)
    rows = [line.split()[0] for line in printed(tmp_path / "watched").splitlines() if line.strip()[:1].isdigit()]
    assert rows[-1] == "30" and len(rows) <= 12


def test_a_monitor_that_stopped_or_saw_nothing_says_so(tiny_model: Path, tmp_path: Path) -> None:
    from offprincipal.models import open_language_model

    model = open_language_model(str(tiny_model), "cpu").model
    conditions = {"warn_if": "unchanged_fraction > .25", "stop_if": "pooled unchanged_fraction > .5"}
    monitor = Monitor(tmp_path / "watched", every=2, **conditions)
    monitor.start(model)
    monitor.observe(1, model)
    with pytest.raises(FileError, match=r"a monitor that has observed no step: .* set every=N or a larger budget"):
        printed(tmp_path / "watched")
    monitor.observe(2, model)
    said = " ".join(printed(tmp_path / "watched").split())
    assert "stopped early: unchanged_fraction > 0.5: pooled value 1, at step 2" in said
    assert "warned at 1 of 1 observed steps, at first: unchanged_fraction > 0.25: " in said


def test_folders_of_comparisons_come_out_of_the_library_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    compare(pair[0], {"rl": pair[1]}, metrics=("changes",)).write(tmp_path / "c")
    assert "rl" in printed(tmp_path / "c")
