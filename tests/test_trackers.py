"""A finished comparison goes to an experiment tracker: TensorBoard's own files, and the calls that W&B takes."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import base_and_two_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from offprincipal.cli import app
from offprincipal.comparison import compare, read_summary
from offprincipal.errors import ArgumentError
from offprincipal.reports.trackers import report_comparison, require_tracker, scalars_of

RECORDER = """
calls = []
def init(**about): calls.append(("init", about))
def log(values): calls.append(("log", values))
def finish(): calls.append(("finish",))
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, path: Path, code: str) -> Any:
    """A module in trackio's place for as long as a test runs."""
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("trackio", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of a run whose name would be a path out of the folder, and of another."""
    base, runs = base_and_two_runs(tmp_path / "models")
    out = tmp_path / "comparison"
    compare(base, {"../a": runs["a"], "b": runs["b"]}, metrics=("location",), out=out)
    return out


def test_tensorboard_reads_every_figure_of_every_run(folder: Path) -> None:
    printed = CliRunner().invoke(app, ["report", str(folder), "--report-to", "tensorboard"])
    assert printed.exit_code == 0 and "tensorboard --logdir" in printed.output
    written = sorted(path for path in (folder / "tensorboard").iterdir())
    assert [path.name for path in written] == ["___a", "b"]
    runs = read_summary(folder)["runs"]
    for path, name in zip(written, ("../a", "b"), strict=True):
        events = EventAccumulator(str(path)).Reload()
        found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
        assert found == pytest.approx(scalars_of(runs[name]), rel=1e-6, abs=1e-12)
        assert 0 < found["unchanged_fraction"] < 1


def test_what_takes_wandbs_calls_gets_a_run_each_without_paths_of_this_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = stand_in(monkeypatch, tmp_path / "trackio.py", RECORDER)
    summary = read_summary(folder)
    assert "project mine" in report_comparison(summary, "trackio", folder, "mine")
    calls: list[Any] = trackio.calls
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    assert [call[1]["name"] for call in calls[::3]] == ["../a", "b"]
    assert calls[1][1] == scalars_of(summary["runs"]["../a"])
    assert calls[0][1]["config"]["rank_fraction"] == 0.125
    assert str(tmp_path) not in str(calls)


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, runs = base_and_two_runs(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # as W&B itself leaves behind; it is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, says in (("mlflow", "choose one of tensorboard, trackio, wandb"), ("wandb", "pip install wandb")):
        with pytest.raises(ArgumentError, match=says):
            require_tracker(name)
        out = tmp_path / f"out-{name}"
        command = ["compare", str(base), str(runs["a"]), "--out", str(out), "--report-to", name]
        assert CliRunner().invoke(app, command).exit_code != 0
        assert not out.exists()


def test_what_a_tracker_refuses_is_said_and_the_comparison_is_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path / "trackio.py", "def init(**about): raise RuntimeError('no account')")
    found = CliRunner().invoke(app, ["report", str(folder), "--report-to", "trackio"])
    assert found.exit_code != 0
    assert "no account" in str(found.exception) and "Try again by" in str(found.exception)
