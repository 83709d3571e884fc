"""The theory's stages end to end on a tiny model: intervene, train on, undo, measure, judge, draw."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from test_reports import CHROMIUM, dom_of

from offprincipal.comparison import read_table
from offprincipal.errors import StudyError
from offprincipal.paper import load_profile
from offprincipal.paper.claims import CLAIMS
from offprincipal.reports.report import write_report_of
from offprincipal.studies import pending, run_profile
from offprincipal.training import StepReport
from offprincipal.training.progress import describe

TRAIN = {
    "kind": "train",
    "recipe": "sft_own",
    "tasks": ["count@1"],
}  # a random model earns no reward to learn from by RL
STAGES = {
    "run_a": TRAIN | {"seed": 1, "monitor": 1},
    "moved": {"kind": "intervene", "rotate": [0], "permute": [1]},
    "run_b": TRAIN | {"seed": 2, "start": "moved"},
    "other": TRAIN | {"seed": 3, "learning_rate": 3e-3, "monitor": 1},
    "comparison": {"kind": "compare", "runs": ["run_a", "other"]},
    "agreement": {"kind": "agreement", "run": "run_a", "intervened": "run_b", "intervention": "moved"},
    "precision": {"kind": "precision", "runs": ["run_a", "other"]},
    "gates": {
        "kind": "gates",
        "runs": ["run_a", "other"],
        "tasks": ["count@1"],
        "options": {"batches": 2, "prompts_per_batch": 2, "per_layer": False, "draws": 1, "max_new_tokens": 4},
    },
    "gaussian": {"kind": "gaussian", "like": "run_a"},
    "bounds": {"kind": "compare", "runs": ["run_a", "gaussian"], "metrics": ["spectrum", "subspace", "bounds"]},
    "claims": {
        "kind": "claims",
        "comparison": "comparison",
        "rl": ["run_a"],
        "sft": ["other"],
        "claims": ["C7", "C8", "C9", "C10"],
        "sources": {
            "agreement": ["agreement"],
            "precision": ["precision"],
            "watched_rl": ["run_a"],
            "watched_sft": ["other"],
            "gates": ["gates"],
            "bounds": ["bounds"],
        },
        "gaussian": {"run_a": "gaussian"},
    },
    "report": {"kind": "report", "comparison": "comparison", "claims": "claims"},
}


@pytest.fixture(scope="module")
def profile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"steps": 8, "batch": 16, "learning_rate": 1e-3, "eval_prompts": 0, "save_every": 8}
    path = tmp_path_factory.mktemp("profile") / "small.yaml"
    content = {"name": "small", "title": "small", "base": str(tiny_model), "training": training, "stages": STAGES}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def shown() -> list[tuple[str, object]]:
    """What the run of `finished` showed of its stages, in order."""
    return []


@pytest.fixture(scope="module")
def finished(profile: Path, shown: list[tuple[str, object]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theory") / "out"
    run_profile(load_profile(str(profile)), out, 2, lambda stage, report: shown.append((stage, report)))
    return out


def test_what_takes_all_cores_waits_until_nothing_trains(finished: Path, shown: list[tuple[str, object]]) -> None:
    trained = [stage for stage, about in STAGES.items() if about["kind"] == "train"]
    others = [stage for stage in STAGES if stage not in (*trained, "moved")]  # run_b is trained from what is moved
    first = min(shown.index((stage, "started")) for stage in others)
    assert all(shown.index((stage, "done")) < first for stage in ("moved", *trained))
    measured = [report for stage, report in shown if stage == "comparison" and isinstance(report, StepReport)]
    assert [report.step for report in measured] == sorted(report.step for report in measured)
    assert describe(measured[-1]) == "measuring, 100 %"


def test_each_claim_has_two_verdicts_with_rule_and_evidence(finished: Path) -> None:
    study = json.loads((finished / "study.json").read_text())
    assert [claim["id"] for claim in study["claims"]] == ["C7", "C8", "C9", "C10"]
    for claim in study["claims"]:
        for side in ("as_published", "controlled"):
            assert claim[side]["effect"] is not None and claim[side]["rule"] and claim[side]["sentence"]
        assert claim["evidence"] and all((finished / path).is_file() for path in claim["evidence"])
    bounds = next(claim for claim in study["claims"] if claim["id"] == "C10")
    assert bounds["as_published"]["verdict"] == "supported"  # a theorem


def test_only_what_was_intervened_on_counts_as_touched_and_undoing_brings_it_back(finished: Path) -> None:
    rows = read_table(finished / "agreement", "agreement")
    touched = {(row["layer"], row["role"]) for row in rows if row["touched"]}
    rotated, neurons = {(0, "v"), (0, "o")}, {(1, "gate"), (1, "up"), (1, "down")}
    assert rotated | neurons <= touched  # two heads may keep their order
    assert touched - rotated <= {(1, role) for role in ("q", "k", "v", "o", "gate", "up", "down")}
    by_view = {view: {r["tensor"]: r for r in rows if r["view"] == view} for view in ("as trained", "undone")}
    for tensor, row in by_view["undone"].items():
        if not row["touched"]:
            assert row | {"view": ""} == by_view["as trained"][tensor] | {"view": ""}


def test_precision_is_measured_in_each_format_and_the_gaussian_run_is_as_long(finished: Path) -> None:
    rows = read_table(finished / "precision", "precision")
    assert {row["format"] for row in rows} == {"fp32", "bf16", "fp16", "fp8"}
    pooled = json.loads((finished / "precision" / "precision.json").read_text())["runs"]
    assert pooled["run_a"]["hidden_fraction"]["value"] > 0
    matrices = {
        (row["run"], row["tensor"]): row for row in read_table(finished / "bounds", "matrices") if row["linear"]
    }
    assert {run for run, _ in matrices} == {"run_a", "gaussian"}


@pytest.mark.parametrize("left_out", ["agreement", "precision", "watched_rl", "bounds"])
def test_a_study_of_some_of_the_theorys_claims_has_a_page_too(left_out: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors"))
    study = json.loads((finished / "study.json").read_text())
    del study["sources"][left_out]
    study["sources"].pop("watched_sft" if left_out == "watched_rl" else "", None)
    study["claims"] = [claim for claim in study["claims"] if left_out not in CLAIMS[claim["id"]].needs]
    (tmp_path / "out" / "study.json").write_text(json.dumps(study))
    drawn = write_report_of(tmp_path / "out").read_text()
    figures = {"agreement": "agreement", "precision": "precision", "watched_rl": "kl", "bounds": "bounds"}
    assert [f'id="figure-{name}"' in drawn for name in figures.values()] == [name != left_out for name in figures]


def test_a_finished_study_does_nothing_again_and_is_redrawn_from_its_folder(finished: Path, profile: Path) -> None:
    assert pending(load_profile(str(profile)), finished) == []
    drawn = (finished / "report.html").read_bytes()
    assert write_report_of(finished).read_bytes() == drawn
    for figure in ("agreement", "precision", "steps", "kl", "bounds"):
        assert f'id="figure-{figure}"'.encode() in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_a_browser_draws_the_theory_side_by_side_or_below_each_other(finished: Path, tmp_path: Path) -> None:
    page = Path(shutil.copy(finished / "report.html", tmp_path))
    heights = []
    for width in (1280, 500):
        dom = dom_of(page, "", f"--window-size={width},900")
        failure = re.search(r'<p id="failure"[^>]*>', dom)
        assert failure and "hidden" in failure[0]
        heights.append(
            {name: float(high) for name, high in re.findall(r'id="figure-(\w+)"[^>]*height: ([\d.]+)px', dom)}
        )
    for name in ("precision", "kl", "bounds"):
        assert heights[1][name] > 1.9 * heights[0][name] > 0


def test_the_theory_shares_its_first_runs_with_quick() -> None:
    theory, quick = load_profile("theory"), load_profile("quick")
    assert theory.training == quick.training
    for name in (*(f"{kind}_{i}" for kind in ("grpo", "sft_own", "sft_teacher") for i in (1, 2, 3)), "comparison"):
        assert theory.stages[name] == quick.stages[name]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.claims.sources={}", "C7 needs the source 'agreement'"),
        ("stages.claims.sources.dance=[gates]", "dance"),
        ("stages.rotated.rotate=[]", "does nothing"),
        ("stages.grpo_rotated.start=nobody", "nobody"),
        ("stages.agreement_rotated.intervened=nobody", "nobody"),
        ("stages.rotated.matrix=fourier", "haar"),
    ],
)
def test_a_profile_that_cannot_run_is_refused_before_anything_runs(override: str, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        load_profile("theory", [override])
