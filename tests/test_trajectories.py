"""Trajectories of checkpoints on disk, against whole displacements in float64; odd sets of checkpoints; the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_folders import base_weights, stored, write_model
from safetensors.torch import load_file
from torch import Tensor

from offprincipal import make_delta, trajectory
from offprincipal.errors import ArgumentError, CheckpointError, FileError
from offprincipal.file_names import TRAJECTORY
from offprincipal.reports.trajectory import _some_of as shown_of
from offprincipal.reports.trajectory import figure_of as page_of
from offprincipal.reports.trajectory import trajectory_sentences, trajectory_table
from offprincipal.trajectories import measure, scalars
from offprincipal.trajectories.sources import expanded, label_of, steps_of
from offprincipal.trajectories.trajectory import TABLE

STEPS = (5, 10, 40, 100)
Weights = dict[str, Tensor]


def walked(count: int = len(STEPS), drift: float = 0.0, seed: int = 0) -> list[Weights]:
    """The base and checkpoints of a walk in float32, whose first tensor also goes back where it was at the end."""
    generator = torch.Generator().manual_seed(seed)
    weights = base_weights()
    direction = {name: torch.randn(t.shape, generator=generator) for name, t in weights.items()}
    found, now = [weights], {name: tensor.float() for name, tensor in weights.items()}
    for _ in range(count):
        now = {
            name: tensor + 2e-3 * (torch.randn(tensor.shape, generator=generator) + drift * direction[name])
            for name, tensor in now.items()
        }
        found.append(stored(now))
    return found


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path, list[Weights]]:
    weights = walked()
    base = write_model(tmp_path / "base", weights[0])
    for step, tensors in zip(STEPS, weights[1:], strict=True):
        write_model(tmp_path / "run" / f"checkpoint-{step}", tensors)
    return base, tmp_path / "run", weights


def displacements(weights: list[Weights], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.stack([(w[name].double() - weights[0][name].double()).numpy().reshape(-1) for w in weights[1:]])


@pytest.mark.parametrize("held", [1 << 22, 1 << 10])
def test_one_pass_in_blocks_gives_the_inner_products_of_whole_displacements(
    held: int, run: tuple[Path, Path, list[Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, root, weights = run
    monkeypatch.setattr(measure, "HELD", held)
    found = trajectory(base, root).content
    assert found["steps"] == list(map(float, STEPS))
    total = np.zeros((len(STEPS), len(STEPS)))
    for name in weights[0]:
        D = displacements(weights, name)
        total += D @ D.T
    np.testing.assert_allclose(found["pooled"]["gram"], total, rtol=1e-6)
    by_role = np.sum([figures["gram"] for figures in found["by_role"].values()], axis=0)
    np.testing.assert_allclose(by_role, total, rtol=1e-6)
    walk = found["pooled"]
    lengths = np.array(walk["increments"])
    assert walk["straightness"]["random_walk_null"] == pytest.approx(np.sqrt((lengths**2).sum()) / lengths.sum())
    assert walk["straightness"]["value"] == pytest.approx(np.sqrt(total[-1, -1]) / lengths.sum(), rel=1e-6)


def test_counts_are_of_what_bfloat16_shows(run: tuple[Path, Path, list[Weights]]) -> None:
    base, root, weights = run
    rows = trajectory(base, root).rows
    for name in weights[0]:
        codes = [w[name].bfloat16().view(torch.int16) for w in weights]
        own = [row for row in rows if row["tensor"] == name]
        ever = torch.zeros(codes[0].shape, dtype=torch.bool)
        for t, row in enumerate(own, start=1):
            differs = codes[t] != codes[0]
            assert row["unchanged_fraction"] == pytest.approx(1 - differs.float().mean().item(), abs=1e-6)
            since = (codes[t] != codes[t - 1]).float().mean().item()
            assert row["unchanged_since_last"] == pytest.approx(1 - since, abs=1e-6)
            assert row["reverted_fraction"] == pytest.approx((ever & ~differs).float().mean().item(), abs=1e-6)
            ever |= differs


def test_threads_and_order_change_nothing(run: tuple[Path, Path, list[Weights]], tmp_path: Path) -> None:
    base, root, _ = run
    sources = [root / f"checkpoint-{step}" for step in (40, 5, 100, 10)]
    one = trajectory(base, root, threads=1, out=tmp_path / "one")
    two = trajectory(base, sources, threads=3, out=tmp_path / "two")
    assert one.content == two.content and one.rows == two.rows
    assert (tmp_path / "one" / TABLE).read_bytes() == (tmp_path / "two" / TABLE).read_bytes()
    table = pq.read_table(tmp_path / "one" / TABLE).to_pylist()
    assert table == one.rows and len(table) == len(STEPS) * len({row["tensor"] for row in table})
    assert json.loads((tmp_path / "one" / TRAJECTORY).read_text()) == one.content


@pytest.mark.parametrize(("drift", "verdict"), [(0.0, "diffusive"), (0.5, "diffusive with drift"), (30.0, "ballistic")])
def test_walks_with_and_without_drift_are_told_apart(drift: float, verdict: str, tmp_path: Path) -> None:
    weights = walked(12, drift, seed=3)
    base = write_model(tmp_path / "base", weights[0])
    sources = [write_model(tmp_path / f"step_{t}", w) for t, w in enumerate(weights[1:], start=1)]
    found = trajectory(base, sources).content["pooled"]
    assert found["verdict"] == verdict, found["drift"]
    null = found["rank1_share"]["random_walk_null"]
    assert null == pytest.approx(0.81, abs=0.03)
    assert found["rank1_share"]["value"] == pytest.approx(null, abs=0.05) if drift == 0 else True
    assert found["rank1_share"]["stored_walk_null"] == pytest.approx(null, abs=0.05)


def test_deltas_are_checkpoints_of_a_trajectory_too(run: tuple[Path, Path, list[Weights]], tmp_path: Path) -> None:
    base, root, _ = run
    (tmp_path / "deltas").mkdir()
    for step in STEPS:
        make_delta(base, root / f"checkpoint-{step}", tmp_path / "deltas" / f"step_{step}.delta")
    one, two = trajectory(base, root), trajectory(base, tmp_path / "deltas")
    assert one.rows == two.rows and one.content["steps"] == two.content["steps"]


def test_a_run_of_ours_is_followed_by_its_deltas(run: tuple[Path, Path, list[Weights]]) -> None:
    base, root, _ = run
    ours = root.parent / "ours"
    (ours / "deltas" / "masters").mkdir(parents=True)
    for step in (5, 10):
        make_delta(base, root / f"checkpoint-{step}", ours / "deltas" / f"step_{step}.delta")
    assert expanded(ours) == [str(ours)]  # whatever else lies in a folder
    (ours / "run.json").write_text("{}")
    notes: list[str] = []
    assert expanded(ours, notes) == [str(ours / "deltas" / f"step_{step}.delta") for step in (5, 10)]
    assert not notes


def test_seeds_are_no_steps() -> None:
    notes: list[str] = []
    assert steps_of(["sft-s0", "sft-s1"], notes=notes) == [("sft-s0", 1.0), ("sft-s1", 2.0)]
    assert "no name has a step" in notes[0]
    assert steps_of(["run/steps_20", "run/epochs-3"]) == [("run/steps_20", 20.0), ("run/epochs-3", 3.0)]


def test_another_prediction_is_not_replaced_unasked(run: tuple[Path, Path, list[Weights]], tmp_path: Path) -> None:
    base, root, _ = run
    out = tmp_path / "out"
    trajectory(base, root, out=out, predict=200)
    before = (out / "predicted-200" / "model.safetensors").read_bytes()
    with pytest.raises(FileError, match="predicted-200 contains a model that was predicted by linear"):
        trajectory(base, root, out=out, predict=200, predict_by="rank1")
    trajectory(base, root, out=out, predict=200)
    assert (out / "predicted-200" / "model.safetensors").read_bytes() == before
    trajectory(base, root, out=out, predict=200, predict_by="rank1", overwrite=True)
    assert (out / "predicted-200" / "model.safetensors").read_bytes() != before


def test_a_folder_that_holds_one_checkpoint_and_nothing_else_is_a_runs_root(tmp_path: Path) -> None:
    """A run's first delta; a model with checkpoints inside is a model."""
    (tmp_path / "deltas" / "step_10.delta").mkdir(parents=True)
    (tmp_path / "deltas" / ".step.part").mkdir()
    assert expanded(tmp_path / "deltas") == [str(tmp_path / "deltas" / "step_10.delta")]
    (tmp_path / "deltas" / "config.json").touch()
    assert expanded(tmp_path / "deltas") == [str(tmp_path / "deltas")]


def test_steps_are_told_from_names() -> None:
    def told(sources: list[str], steps: list[float] | None = None) -> list[float]:
        return [step for _, step in steps_of(sources, steps)]

    assert told(["run/global_step_20/actor", "run/global_step_5/actor/"]) == [20.0, 5.0]
    assert told(["org/name@step_100", "org/name@step_200"]) == [100.0, 200.0]
    assert told(["iter_0000100", "run/epoch-2"]) == [100.0, 2.0]
    notes: list[str] = []
    assert steps_of(["first", "second"], notes=notes) == [("first", 1.0), ("second", 2.0)]
    assert "no name has a step" in notes[0]
    assert steps_of(["run/checkpoint-0", "run/checkpoint-9"], notes=notes) == [("run/checkpoint-9", 9.0)]
    assert "run/checkpoint-0 is step 0, the model that the run started from" in notes[1]
    assert [label_of(step) for step in (5.0, 1e6, 0.5, 123456.5)] == ["5", "1000000", "0.5", "123456.5"]
    assert told(["Qwen2.5-7B", "Llama-3"], [3, 4]) == [3.0, 4.0]
    for names, steps, says in (
        (["checkpoint-5", "other/checkpoint-5"], None, "are both at step 5"),
        (["a", "b"], [1], "1 steps are given for 2"),
        (["checkpoint-7", "final"], None, "cannot infer a step from 'final', though 'checkpoint-7' has one"),
        (["checkpoint-0"], None, "there is no checkpoint other than step 0"),
        (["a"], [0], "is not above 0"),
        (["a"], [float("nan")], "is not above 0"),
    ):
        with pytest.raises(ArgumentError, match=says):
            steps_of(names, steps)


def test_a_broken_or_foreign_checkpoint_is_named_and_may_be_left_out(
    run: tuple[Path, Path, list[Weights]], tmp_path: Path
) -> None:
    base, root, _ = run
    broken = root / "checkpoint-40" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="checkpoint-40"):
        trajectory(base, root)
    found = trajectory(base, root, skip_broken=True).content
    assert found["steps"] == [5.0, 10.0, 100.0]
    assert any("step 40 is left out" in warning for warning in found["warnings"])
    other = write_model(tmp_path / "other", {"decoder.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match=r"other.* do not match|not match.*other"):
        trajectory(base, [root / "checkpoint-5", other])
    with pytest.raises(ArgumentError, match="no checkpoint is left"):
        trajectory(base, [root / "checkpoint-40"], skip_broken=True)
    with pytest.raises(ArgumentError, match="no checkpoint is given"):
        trajectory(base, [])


def test_no_change_and_one_checkpoint(run: tuple[Path, Path, list[Weights]]) -> None:
    base, root, _ = run
    one = trajectory(base, [root / "checkpoint-5"]).content["pooled"]
    assert (one["straightness"]["value"], one["rank1_share"]["value"], one["verdict"]) == (1.0, 1.0, "cannot tell")
    (line,) = trajectory_sentences(trajectory(base, [root / "checkpoint-5"]).content)  # which no table follows
    assert line.startswith("One checkpoint, ") and "no way to follow" in line and "100" not in line
    assert not trajectory_table(trajectory(base, [root / "checkpoint-5"]).content).renderables
    still = trajectory(base, [base, base], steps=[1, 2]).content["pooled"]
    assert still["path_length"] == 0 and still["straightness"]["value"] is None
    assert still["unchanged_fraction"] == [1.0, 1.0]
    twice = trajectory(base, [root / "checkpoint-5", root / "checkpoint-5"], steps=[1, 2]).content["pooled"]
    assert twice["increments"][1] == 0 and twice["increment_cosine"][1] == [None, None]


def test_the_command(run: tuple[Path, Path, list[Weights]], tmp_path: Path) -> None:
    base, root, _ = run

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "offprincipal", "trajectory", *map(str, arguments)]
        return subprocess.run(program, capture_output=True, text=True, check=False)

    done = command(base, root, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for words in ("random walk", "rank-1 share", "cannot tell", "gone back", "tables and figures"):
        assert words in done.stdout, words
    page = (tmp_path / "out" / "trajectory.html").read_text()
    assert "plotly" in page and "straight line, stored" in page and "cannot tell a walk from a line" in page
    as_json = command(base, root, "--out", tmp_path / "out", "--json", "--no-report")
    assert json.loads(as_json.stdout) == json.loads((tmp_path / "out" / TRAJECTORY).read_text())
    for arguments, says in (
        ((base, root, "--steps", "1,b"), "not a list of steps"),
        ((base, root, "--steps", "1,2"), "2 steps are given for 4"),
        ((base, tmp_path / "nowhere"), "does not exist"),
    ):
        refused = command(*arguments, "--out", tmp_path / "new")
        assert refused.returncode == 2 and says in refused.stderr, refused.stderr
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("by", ["linear", "rank1"])
def test_a_predicted_model_is_the_run_drawn_on(by: str, tmp_path: Path) -> None:
    """A run along a line is where its line says, in the stored type, with what lies beside the base's weights."""
    weights = base_weights()
    generator = torch.Generator().manual_seed(3)
    direction = {name: 1e-2 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    base = write_model(tmp_path / "base", weights)
    (base / "tokenizer_config.json").write_text("{}")

    def at(step: float) -> Weights:
        return stored({name: tensor.float() + step * direction[name] for name, tensor in weights.items()})

    for step in (1, 2, 3, 4):
        write_model(tmp_path / "run" / f"step_{step}", at(step))
    found = trajectory(base, tmp_path / "run", predict=6, predict_by=by, out=tmp_path / "out")  # type: ignore[arg-type]
    assert found.content["prediction"] == {"step": 6, "by": by, "model": "predicted-6"}
    made = tmp_path / "out" / "predicted-6"
    assert (made / "tokenizer_config.json").read_text() == "{}"
    predicted, true = load_file(made / "model.safetensors"), at(6)
    last = at(4)
    for name, tensor in true.items():
        assert predicted[name].dtype == tensor.dtype and predicted[name].shape == tensor.shape
        missed = (predicted[name].double() - tensor.double()).norm()
        assert missed < 0.25 * (last[name].double() - tensor.double()).norm(), name
    (held,) = found.content["held_out"]
    assert held["step"] == 4 and held[by]["value"] < 0.25 * held["last"]["value"]
    trajectory(base, [made], steps=[6])  # and it is a checkpoint like any other


def test_a_killed_trajectory_goes_on_where_it_was(
    run: tuple[Path, Path, list[Weights]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, root, _ = run
    whole = trajectory(base, root, out=tmp_path / "whole")
    done: list[str] = []

    def killed(at: int, of: int, name: str) -> None:
        done.append(name)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trajectory(base, root, out=tmp_path / "out", threads=1, progress=killed)
    assert not (tmp_path / "out" / TRAJECTORY).exists()
    again: list[str] = []
    trajectory(base, root, out=tmp_path / "out", progress=lambda at, of, name: again.append(name))
    assert not set(done) & set(again) and len(again) + 5 == len(whole.content["by_tensor"])
    for name in (TRAJECTORY, TABLE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")) == [
        TRAJECTORY,
        TABLE,
    ]


def test_what_cannot_be_predicted_is_refused_before_anything_is_written(
    run: tuple[Path, Path, list[Weights]], tmp_path: Path
) -> None:
    base, root, _ = run
    out = tmp_path / "out"
    for wrong, said in (
        ({"predict": -1.0}, "is not a step"),
        ({"predict": float("nan")}, "is not a step"),
        ({"predict": 200.0, "predict_by": "magic"}, "no prediction by"),
        ({"predict": 200.0, "out": None}, "give one"),
    ):
        with pytest.raises(ArgumentError, match=said):
            trajectory(base, root, **({"out": out} | wrong))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="two checkpoints"):
        trajectory(base, [root / "checkpoint-5"], predict=7, out=out)
    assert not out.exists()
    (out / "predicted-200").mkdir(parents=True)
    (out / "predicted-200" / "precious.txt").write_text("mine")
    with pytest.raises(FileError, match="predicted-200"):
        trajectory(base, root, predict=200, out=out)
    assert not (out / TRAJECTORY).exists()
    with pytest.raises(FileError, match="predicted-200"):
        trajectory(base, root, predict=200, out=out, overwrite=True)
    assert (out / "predicted-200" / "precious.txt").read_text() == "mine"
    assert json.loads((out / TRAJECTORY).read_text())["prediction"] is None  # what was measured is not lost


def test_the_page_shows_the_whole_model_and_in_its_place_a_role_or_a_layer(
    run: tuple[Path, Path, list[Weights]],
) -> None:
    content = trajectory(*run[:2]).content
    figure = page_of(content)
    (menu,) = figure.layout.updatemenus
    labels = [button.label for button in menu.buttons]
    assert labels == ["the whole model", *content["by_role"], *(f"layer {layer}" for layer in content["by_layer"])]
    shown = [trace.visible is not False for trace in figure.data]
    assert list(menu.buttons[0].args[1]) == shown
    roles = list(content["by_role"])
    for button in menu.buttons[1 : 1 + len(roles)]:
        traces = [trace for trace, seen in zip(figure.data, button.args[1], strict=True) if seen]
        assert len(traces) == sum(shown)
        (way,) = (trace for trace in traces if trace.name == "run")
        np.testing.assert_allclose(way.y, content["by_role"][button.label]["norms"])


def test_overlaps_of_leading_subspaces_are_pooled_over_linear_matrices(run: tuple[Path, Path, list[Weights]]) -> None:
    """Against LAPACK on whole displacements, weighted by entries."""
    base, root, weights = run
    found = trajectory(base, root, subspace_rank=2)
    overlap = found.content["pooled"]["subspace_overlap"]
    sums, entries = np.zeros((2, len(STEPS))), 0
    for row in (row for row in found.rows if row["step"] == STEPS[0] and row["subspace_overlap_left"] is not None):
        first = weights[0][row["tensor"]].double()
        svds = [torch.linalg.svd(w[row["tensor"]].double() - first, full_matrices=False) for w in weights[1:]]
        last = svds[-1]
        sums[0] += [first.numel() * float((svd.U[:, :2].T @ last.U[:, :2]).square().sum()) / 2 for svd in svds]
        sums[1] += [first.numel() * float((svd.Vh[:2] @ last.Vh[:2].T).square().sum()) / 2 for svd in svds]
        entries += first.numel()
    assert entries > 0
    np.testing.assert_allclose([overlap["left"]["value"], overlap["right"]["value"]], sums / entries, atol=1e-5)
    assert overlap["rank"] == 2 and overlap["left"]["own_cosines_null"][-1] == pytest.approx(1)
    embedded = [row for row in found.rows if row["role"] in ("embedding", "norm")]
    assert embedded and all(row["subspace_overlap_left"] is None for row in embedded)
    with pytest.raises(ArgumentError, match="subspace_rank is 0"):
        trajectory(base, root, subspace_rank=0)


def test_workers_of_ray_find_the_same(run: tuple[Path, Path, list[Weights]], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    base, root, _ = run
    one = trajectory(base, root, subspace_rank=2, threads=2)
    two = trajectory(base, root, subspace_rank=2, ray="local", out=tmp_path / "out")
    assert one.content == two.content and one.rows == two.rows


def test_of_very_many_checkpoints_only_the_whole_model_keeps_its_matrices(
    run: tuple[Path, Path, list[Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, root, _ = run
    few = trajectory(base, root).content
    monkeypatch.setattr(scalars, "_MATRICES_UP_TO", len(STEPS) - 1)
    many = trajectory(base, root).content
    assert many["pooled"] == few["pooled"]
    for group in ("by_role", "by_layer"):
        for name, found in many[group].items():
            assert found == few[group][name] | {"gram": None, "increment_cosine": None}
    (cosines,) = (trace for trace in page_of(many).data if trace.type == "heatmap")
    expected = np.array(few["pooled"]["increment_cosine"], float)
    np.fill_diagonal(expected, np.nan)  # a step's cosine with itself says nothing
    np.testing.assert_array_equal(np.array(cosines.z, float), expected)


def test_a_table_of_a_thousand_checkpoints_fits_a_screen() -> None:
    steps = [float(step) for step in range(1, 1001)]
    some = shown_of(steps)
    assert len(some) == 24 and some[0] == (0, 1.0) and some[-1] == (999, 1000.0)
    assert all(steps[place] == step for place, step in some)
    assert [step for _, step in shown_of(steps[:20])] == steps[:20]


def test_a_notebook_shows_the_figures_of_the_page(run: tuple[Path, Path, list[Weights]]) -> None:
    found = trajectory(*run[:2], subspace_rank=1)
    figure = found.plot()
    assert figure == page_of(found.content)
    shared = {trace.name: trace for trace in figure.data if trace.visible and trace.name == "left: run"}
    np.testing.assert_allclose(
        np.array(shared["left: run"].y, float), found.content["pooled"]["subspace_overlap"]["left"]["value"]
    )


def test_torch_is_not_even_imported_where_nothing_is_predicted(run: tuple[Path, Path, list[Weights]]) -> None:
    follow = f"offprincipal.trajectory({str(run[0])!r}, {str(run[1])!r})"
    code = f"import sys, offprincipal; {follow}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("dtype", "verdict"), [(torch.float32, "ballistic"), (torch.bfloat16, "cannot tell")])
def test_a_straight_run_is_seen_in_float32_checkpoints_and_may_not_be_in_bfloat16(
    dtype: torch.dtype, verdict: str, tmp_path: Path
) -> None:
    """The base is in bfloat16 either way: what counts is what the checkpoints are stored in."""
    weights = base_weights()
    base = write_model(tmp_path / "base", weights)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    for t in range(1, 13):
        moved = {name: (w.float() + 5e-6 * t * direction[name]).to(dtype) for name, w in weights.items()}
        write_model(tmp_path / "run" / f"step_{t}", moved)
    found = trajectory(base, tmp_path / "run").content["pooled"]
    assert found["verdict"] == verdict, found["drift"]
    assert found["drift"]["stored_line_null"] == pytest.approx(found["drift"]["value"], abs=0.05)


def test_masters_beside_the_checkpoints_show_the_way_that_storing_hides(tmp_path: Path) -> None:
    weights = base_weights()
    base = write_model(tmp_path / "base", weights)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    for t in range(1, 13):
        moved = {name: w.float() + 5e-6 * t * direction[name] for name, w in weights.items()}
        folder = write_model(tmp_path / "run" / f"step_{t}", stored(moved))
        write_model(folder / "masters", moved)
    seen = {masters: trajectory(base, tmp_path / "run", masters=masters).content["pooled"] for masters in (False, True)}
    assert seen[False]["verdict"] == "cannot tell" and seen[True]["verdict"] == "ballistic"
    assert seen[True]["straightness"]["value"] > 0.99 > 0.6 > seen[False]["straightness"]["value"]
    (tmp_path / "run" / "step_7" / "masters" / "model.safetensors").unlink()
    (tmp_path / "run" / "step_7" / "masters" / "config.json").unlink(missing_ok=True)
    (tmp_path / "run" / "step_7" / "masters").rmdir()
    with pytest.raises(CheckpointError, match="step_7 has no float32 masters"):
        trajectory(base, tmp_path / "run", masters=True)
