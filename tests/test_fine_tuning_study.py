"""The stages of fine-tuning methods end to end on a tiny model: runs, matched rates, outcomes, claims, report."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_reports import own_part

from offprincipal.comparison import read_table
from offprincipal.errors import StudyError
from offprincipal.files import read_json
from offprincipal.paper import load_profile
from offprincipal.reports.report import write_report_of
from offprincipal.studies import pending, run_profile
from offprincipal.studies.fine_tuning import MATCHED, OutcomesStage
from offprincipal.studies.running import workspace
from offprincipal.training import StepReport

WATCHED = {"kind": "train", "monitor": 1}
SEEDS = {"seed": [1, 2]}
ALL = ["full_*", "safe_*", "principal_*", "lora_*", "pissa_*"]
STAGES: dict[str, Any] = {
    "full_s{seed}": WATCHED | {"each": SEEDS},
    "safe_s{seed}": WATCHED | {"adapter": {"method": "sparse", "mask": "safe"}, "each": SEEDS},
    "principal_s{seed}": WATCHED
    | {"adapter": {"method": "sparse", "mask": "principal", "density": 0.5}, "each": SEEDS},
    "lora_lr{learning_rate}_s{seed}": {
        "kind": "train",
        "adapter": {"method": "lora", "rank": 2},
        "each": SEEDS | {"learning_rate": [1e-3, 1e-2]},
    },
    "pissa_lr{learning_rate}_s{seed}": {
        "kind": "train",
        "adapter": {"method": "pissa", "rank": 2},
        "each": SEEDS | {"learning_rate": [1e-3, 4e-3]},
    },
    "pissa_at_equal_{by}_s{seed}": {
        "kind": "matched",
        "adapter": {"method": "pissa", "rank": 2},
        "like": ["lora_lr*_s{seed}"],
        "sweep": ["pissa_lr*_s{seed}"],
        "each": {"by": ["update_norm", "kl_to_base"]} | SEEDS,
    },
    "weights": {"kind": "compare", "runs": ALL, "metrics": ["spectrum"], "null_draws": 1},
    "outcomes": {"kind": "outcomes", "runs": ALL, "comparison": "weights"},
    "claims": {
        "kind": "claims",
        "comparison": "weights",
        "rl": ["full_s1"],
        "claims": ["C11", "C12"],
        "sources": {"outcomes": ["outcomes"], "kl_curves": ["outcomes"]},
    },
    "report": {"kind": "report", "comparison": "weights", "claims": "claims"},
}


@pytest.fixture(scope="module")
def profile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"recipe": "sft_own", "tasks": ["count@1"], "steps": 3, "batch": 8, "learning_rate": 1e-3}
    training |= {"eval_prompts": 8, "eval_samples": 1, "eval_max_new_tokens": 2, "save_every": 3}
    path = tmp_path_factory.mktemp("profile") / "small.yaml"
    content = {"name": "small", "title": "small", "base": str(tiny_model), "training": training, "stages": STAGES}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(profile: Path, out: Path) -> dict[str, list[str]]:
    """Stage -> what was said of it."""
    said: dict[str, list[str]] = {}

    def show(stage: str, report: StepReport | str) -> None:
        if isinstance(report, str):
            said.setdefault(stage, []).append(report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offprincipal.studies.running._RUNS_A_PROCESS", 100)  # starting one takes longer than such a run
        run_profile(load_profile(str(profile)), out, 2, show)
    return said


@pytest.fixture(scope="module")
def finished(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fine_tuning") / "out"
    said = run(profile, out)
    assert len(said) == 3 * 2 + 2 * 4 + 4 + 4
    assert all(of_stage == ["started", "done"] for of_stage in said.values())
    return out


def test_both_claims_are_judged_and_two_seeds_decide_nothing(finished: Path) -> None:
    study = read_json(finished / "study.json")
    assert [claim["id"] for claim in study["claims"]] == ["C11", "C12"]
    for claim in study["claims"]:
        for side in ("as_published", "controlled"):
            assert claim[side]["rule"] and claim[side]["verdict"] in ("inconclusive", "contradicted")
        assert claim["controlled"]["verdict"] == "inconclusive"
        assert claim["evidence"] and all((finished / path).is_file() for path in claim["evidence"])


def test_every_run_has_a_row_of_outcomes_and_every_watched_one_its_curve(finished: Path) -> None:
    rows = {row["run"]: row for row in read_table(finished / "outcomes", "outcomes")}
    assert len(rows) == 18
    full, safe, principal = (rows[f"{kind}_s1"] for kind in ("full", "safe", "principal"))
    assert full["trained_share"] == 1 and full["method"] == "full" and full["matched_by"] is None
    assert principal["density"] == 0.5 and safe["density"] is None
    assert 0 < rows["lora_lr0_001_s1"]["trained_share"] < principal["trained_share"] < 1
    for row in rows.values():
        assert row["update_norm"] > 0 and row["kl_to_base"] > 0 and row["spectral_shift_isotropic_null"] > 0
    curves = read_table(finished / "outcomes", "kl_curves")
    assert {row["run"] for row in curves} == {f"{kind}_s{s}" for kind in ("full", "safe", "principal") for s in (1, 2)}
    assert [row["step"] for row in curves if row["run"] == "full_s1"] == [1, 2, 3]


def test_matched_runs_reach_the_size_of_the_longest_stable_run_of_their_own_seed(finished: Path) -> None:
    rows = {row["run"]: row for row in read_table(finished / "outcomes", "outcomes")}
    matched = [row for row in rows.values() if row["matched_by"]]
    assert len(matched) == 4
    for row in matched:
        like = rows[row["matched_to"]]
        assert like["method"] == "lora" and like["seed"] == row["seed"]
        assert row["learning_rate"] == read_json(finished / row["run"] / MATCHED)["learning_rate"]
        if row["matched_by"] == "update_norm":  # which rises with the rate almost as a power of it
            assert row["update_norm"] == pytest.approx(like["update_norm"], rel=0.2)
            assert row["matched_ratio"] == pytest.approx(row["update_norm"] / like["update_norm"], rel=0.05)
        else:
            assert row["matched_ratio"] == pytest.approx(row["kl_to_base"] / like["kl_to_base"])


def test_the_report_shows_both_claims_and_is_redrawn_from_the_folder(finished: Path) -> None:
    drawn = (finished / "report.html").read_text(encoding="utf-8")
    own = own_part(drawn)
    for figure in ("masks", "mask-seeds", "rates", "lengths", "control"):
        assert f'id="figure-{figure}"' in own
    assert "18 runs, 18 of them compared in every metric" in own
    assert write_report_of(finished).read_text(encoding="utf-8") == drawn


def test_a_finished_study_trains_nothing_again(finished: Path, profile: Path) -> None:
    assert pending(load_profile(str(profile)), finished) == []
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert set(map(tuple, run(profile, finished).values())) == {("kept",)}
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_a_lost_table_of_outcomes_is_made_again_without_training(finished: Path, profile: Path) -> None:
    table = finished / "outcomes" / "outcomes.parquet"
    content = table.read_bytes()
    table.unlink()
    said = run(profile, finished)
    assert said.pop("outcomes") == ["started", "done"]
    assert table.read_bytes() == content
    assert set(map(tuple, said.values())) == {("kept",)}


def test_outcomes_need_a_comparison_of_their_runs(finished: Path, profile: Path) -> None:
    space = workspace(load_profile(str(profile)), finished)
    stage = OutcomesStage(kind="outcomes", runs=("full_s1", "nobody"), comparison="weights")
    with pytest.raises(StudyError, match="stage 'outcomes': 'weights' has no update_norm of 'nobody'"):
        stage.make("outcomes", space)


@pytest.mark.parametrize(
    ("setting", "says"),
    [("start", "starts from the study's base, not from 'full_s1'"), ("learning_rate", "computes its own learning")],
)
def test_a_matched_stage_is_not_told_where_to_start_or_how_fast(profile: Path, setting: str, says: str) -> None:
    content = yaml.safe_load(profile.read_text())
    content["stages"]["pissa_at_equal_{by}_s{seed}"][setting] = "full_s1" if setting == "start" else 1e-3
    told = profile.with_name(f"{setting}.yaml")
    told.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(StudyError, match=says):
        load_profile(str(told))
