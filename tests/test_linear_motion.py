"""C14: its rule on planted walks, what it decides of those that know nothing, and the stage that it rests on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

from offprincipal.comparison import read_table
from offprincipal.errors import StudyError
from offprincipal.geometry import walks
from offprincipal.paper import load_profile
from offprincipal.paper.claims import Evidence, judge
from offprincipal.paper.negative import walk_controls
from offprincipal.studies import pending, run_profile
from offprincipal.trajectories import trajectory
from offprincipal.trajectories.scalars import SCALARS, scalars_of

STEPS = [float(step) for step in range(1, 21)]
RL = ("rl_1", "rl_2", "rl_3")
UNDECIDED = ("no effect beyond the control", "inconclusive")


def gram_of(kind: str, seed: int) -> NDArray[np.float64]:
    """Inner products of 20 checkpoints in 2,000 dimensions."""
    rng = np.random.default_rng(seed)
    noise, direction = rng.standard_normal((20, 2000)), rng.standard_normal(2000)
    if kind == "walk with inertia":  # as of an optimizer with momentum
        for t in range(1, 20):
            noise[t] += 0.6 * noise[t - 1]
    drift = {"drift": 0.6, "line": 20.0}.get(kind, 0.0)
    moved = np.cumsum(noise + drift * direction, axis=0)
    return moved @ moved.T


def row_of(run: str, weights: str, G: NDArray[np.float64], draw: int | None = None) -> dict[str, Any]:
    walk = walks.random_walk_gram(walks.walk_of(G, STEPS).increments)
    nulls = {f"{name}_random_walk_null": getattr(walks.walk_of(walk, STEPS), name) for name in SCALARS}
    return {"run": run, "weights": weights, "draw": draw, **scalars_of(G, STEPS, 1.0), **nulls}


def evidence(folder: Path, rows: list[dict[str, Any]]) -> Evidence:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "trajectories.parquet")
    return Evidence({}, [], RL, {}, "comparison", sources={"trajectories": [folder]})


def verdicts(folder: Path, stored: str, float32: str, seed: int = 0) -> tuple[str, str]:
    rows = [
        row_of(run, weights, gram_of(kind, 10 * seed + i))
        for i, run in enumerate(RL)
        for weights, kind in (("stored", stored), ("float32", float32))
    ]
    (entry,) = judge("C14", evidence(folder, rows))
    return entry["as_published"]["verdict"], entry["controlled"]["verdict"]


@pytest.mark.parametrize(
    ("stored", "float32", "wanted"),
    [
        ("walk", "walk", UNDECIDED),
        ("walk", "walk with inertia", UNDECIDED),
        ("walk", "line", ("supported",)),
        ("drift", "drift", ("supported",)),
    ],
)
def test_a_walk_looks_linear_and_only_what_goes_one_way_is_called_so(
    stored: str, float32: str, wanted: tuple[str, ...], tmp_path: Path
) -> None:
    """As it is published, any walk moves along one direction; with the control, what drifts."""
    published, controlled = verdicts(tmp_path, stored, float32)
    assert published == "supported" and controlled in wanted


def test_of_walks_that_know_nothing_hardly_one_study_in_twenty_is_decided(tmp_path: Path) -> None:
    decided = [verdicts(tmp_path, "walk", "walk with inertia", seed)[1] for seed in range(1, 101)]
    assert sum(verdict not in UNDECIDED for verdict in decided) <= 5


def test_blind_walks_stand_in_the_runs_places_one_draw_after_the_other(tmp_path: Path) -> None:
    rows = []
    for i, run in enumerate(RL):
        for weights in ("stored", "float32"):
            rows.append(row_of(run, weights, gram_of("line", i)))
            rows += [row_of(run, weights, gram_of("walk", 100 * draw + i), draw) for draw in range(4)]
    found = evidence(tmp_path, rows)
    ((key, sides),) = walk_controls(found, ["C14", "C9"]).items()
    assert key == ("C14", "", "")
    assert sides["as_published"] == {"draws": 4, "supported": 4, "contradicted": 0}
    assert sides["controlled"] == {"draws": 4, "supported": 0, "contradicted": 0}
    assert judge("C14", found)[0]["controlled"]["verdict"] == "supported"


def test_what_is_undefined_is_not_judged(tmp_path: Path) -> None:
    rows = [row_of(run, weights, np.zeros((20, 20))) for run in RL for weights in ("stored", "float32")]
    (entry,) = judge("C14", evidence(tmp_path, rows))
    assert entry["as_published"]["verdict"] == entry["controlled"]["verdict"] == "inconclusive"


TRAIN = {"kind": "train", "recipe": "sft_own", "tasks": ["count@1"], "keep_deltas": 2, "keep_masters": True}


@pytest.fixture(scope="module")
def profile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stages: dict[str, Any] = {
        "run_a": TRAIN | {"seed": 1},
        "run_b": TRAIN | {"seed": 2},
        "trajectories": {
            "kind": "trajectory",
            "runs": ["run_*"],
            "subspace_rank": 2,
            "negative_control": 3,
        },
        "comparison": {"kind": "compare", "runs": ["run_*"], "metrics": ["changes"]},
        "claims": {
            "kind": "claims",
            "comparison": "comparison",
            "rl": ["run_*"],
            "claims": ["C14"],
            "sources": {"trajectories": ["trajectories"]},
        },
        "report": {"kind": "report", "comparison": "comparison", "claims": "claims"},
    }
    training = {"steps": 12, "batch": 16, "learning_rate": 1e-3, "eval_prompts": 0, "save_every": 12}
    path = tmp_path_factory.mktemp("profile") / "small.yaml"
    content = {"name": "small", "title": "small", "base": str(tiny_model), "training": training, "stages": stages}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_the_stage_follows_runs_as_stored_and_in_float32_with_blind_walks_beside(
    profile: Path, tiny_model: Path, tmp_path: Path
) -> None:
    loaded, out = load_profile(str(profile)), tmp_path / "out"
    run_profile(loaded, out, 2, lambda stage, report: None)
    assert pending(loaded, out) == []
    rows = read_table(out / "trajectories", "trajectories")
    assert len(rows) == 2 * 2 * (1 + 3)
    for row in (row for row in rows if row["draw"] is None):
        assert row["checkpoints"] == 6
        kept = out / row["run"] / "deltas"
        masters, again = row["weights"] == "float32", tmp_path / f"{row['run']}_{row['weights']}"
        found = trajectory(tiny_model, kept, masters=masters, out=again).content["pooled"]
        trajectory(tiny_model, kept, masters=masters, out=again)  # of the same checkpoints, whatever is read of them
        assert row["straightness"] == found["straightness"]["value"] and row["verdict"] == found["verdict"]
        assert row["drift_stored_line_null"] == found["drift"]["stored_line_null"]
        assert 0 < row["subspace_overlap_left_value"] <= 1
        page = out / "trajectories" / f"{row['run']}_{row['weights']}" / "trajectory.html"
        assert "plotly" in page.read_text()
    blind = [row for row in rows if row["draw"] is not None and row["weights"] == "float32"]
    assert len({row["rank1_share"] for row in blind}) == len(blind)
    for row in blind:  # a walk is what its closed form says
        assert row["rank1_share"] == pytest.approx(row["rank1_share_random_walk_null"], abs=0.03)
        assert abs(row["drift"]) < 0.05
    (claim,) = json.loads((out / "study.json").read_text())["claims"]
    assert claim["id"] == "C14" and claim["controlled"]["negative_control"]["draws"] == 3
    assert "linear motion" in (out / "report.html").read_text()
    without = load_profile(str(profile), ["stages.trajectories.negative_control=0"])
    run_profile(without, out, 2, lambda stage, report: None)
    assert [row for row in read_table(out / "trajectories", "trajectories") if row["draw"] is not None] == []
    assert "negative_control" not in json.loads((out / "study.json").read_text())["claims"][0]["controlled"]


def test_a_stage_without_checkpoints_of_the_way_says_what_to_set(profile: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(profile.read_text())
    for name in ("run_a", "run_b"):
        del content["stages"][name]["keep_masters"]
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(StudyError, match="set keep_deltas and keep_masters"):
        run_profile(load_profile(str(bare), ["training.steps=2"]), tmp_path / "out", 1, lambda stage, report: None)
