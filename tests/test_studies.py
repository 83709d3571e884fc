"""A study end to end on a tiny model: each stage once, killed and continued, refused when it cannot be meant."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offprincipal.comparison import read_table
from offprincipal.errors import OffPrincipalError, StudyError
from offprincipal.paper import load_profile
from offprincipal.paper.profile import profile_names
from offprincipal.studies import pending, run_profile
from offprincipal.studies.console import estimate_minutes
from offprincipal.studies.stages import TrainStage
from offprincipal.training import StepReport

RUNS = [f"{kind}_{i}" for kind in ("grpo", "sft_own", "sft_teacher") for i in (1, 2, 3)]
STAGES = [*RUNS, "comparison", "claims", "report"]


def overrides(model: Path, steps: int = 2) -> list[str]:
    settings = {"steps": steps, "batch": 16, "learning_rate": 1e-4, "eval_prompts": 12, "eval_samples": 2}
    settings |= {"eval_max_new_tokens": 8, "save_every": 1}
    return [
        f"base={model}",
        "stages.claims.negative_control=3",
        *(f"training.{key}={value}" for key, value in settings.items()),
    ]


def run(model: Path, out: Path, *more: str) -> dict[str, list[str]]:
    """Stage -> what was said of it."""
    said: dict[str, list[str]] = {}

    def show(stage: str, report: StepReport | str) -> None:
        if isinstance(report, str) or report.metric:  # others say how much is measured
            said.setdefault(stage, []).append(report if isinstance(report, str) else "step")

    run_profile(load_profile("quick", [*overrides(model), *more]), out, 2, show)
    return said


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    said = run(tiny_model, out)
    for stage in STAGES:
        assert said[stage][0] == "started" and said[stage][-1] == "done"
    return out


def test_a_study_leaves_models_tables_verdicts_and_a_report(finished: Path) -> None:
    study = json.loads((finished / "study.json").read_text())
    kinds = ["sft_own", "sft_teacher"]
    expected = [(id, kind) for id in ("C1", "C2", "C3", "C4", "C5", "C6") for kind in (kinds if id != "C2" else [None])]
    assert [(claim["id"], claim["contrast"]) for claim in study["claims"]] == expected
    assert [run["name"] for run in study["runs"]] == RUNS
    for entry in study["runs"]:
        assert 0 <= entry["before"]["sampled_accuracy"] <= 1
        assert entry["before"]["kl_to_base"] == 0
        if entry["recipe"] != "grpo":  # a random model earns no reward, so GRPO has nothing to learn from
            assert entry["after"]["kl_to_base"] > 0
    for claim in study["claims"]:
        for path in claim["evidence"]:
            assert (finished / path).is_file()
        assert claim["as_published"]["rule"] and claim["controlled"]["control"]
        assert claim["controlled"]["negative_control"]["draws"] == 3
    assert {row["run"] for row in read_table(finished / "comparison", "matrices")} == set(RUNS)
    assert "</html>" in (finished / "report.html").read_text()


def test_a_finished_study_does_nothing_again(finished: Path, tiny_model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert pending(load_profile("quick", overrides(tiny_model)), finished) == []
    assert run(tiny_model, finished) == {stage: ["kept"] for stage in STAGES}
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_a_later_stage_is_redone_alone_when_its_settings_change(finished: Path, tiny_model: Path) -> None:
    said = run(tiny_model, finished, "stages.comparison.density=0.3")
    assert all(said[stage] == ["kept"] for stage in STAGES[:4])
    assert said["comparison"] == ["started", "done"]
    assert run(tiny_model, finished)["comparison"] == ["started", "done"]


def test_a_damaged_table_is_made_again(finished: Path, tiny_model: Path) -> None:
    (finished / "comparison" / "pairs.parquet").write_bytes(b"")
    said = run(tiny_model, finished)
    assert said["grpo_1"] == ["kept"] and said["comparison"] == ["started", "done"]


def test_another_profile_in_the_same_folder_keeps_what_the_first_one_found(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    said = run(tiny_model, out, "name=other", "stages.claims.claims=[C1]")
    assert said["comparison"] == ["kept"] and said["claims"] == ["started", "done"]
    assert (out / "study-quick.json").read_bytes() == (finished / "study.json").read_bytes()
    pages = {name: (out / name).read_text("utf-8") for name in ("report.html", "report-quick.html")}
    linked = {name: re.findall(r'href="(report[^"]*)"', page) for name, page in pages.items()}
    assert linked == {"report.html": ["report-quick.html"], "report-quick.html": ["report.html"]}
    links = re.compile("<!--profiles-->.*?<!--/profiles-->", re.DOTALL)
    assert links.sub("", pages["report-quick.html"]) == links.sub("", (finished / "report.html").read_text("utf-8"))
    assert {claim["id"] for claim in json.loads((out / "study.json").read_text())["claims"]} == {"C1"}


def test_training_of_other_settings_is_not_overwritten(finished: Path, tiny_model: Path) -> None:
    weights = (finished / "sft_own_1" / "model.safetensors").read_bytes()
    with pytest.raises(OffPrincipalError, match="learning_rate"):
        run(tiny_model, finished, "stages.sft_own_1.learning_rate=0.5")
    assert (finished / "sft_own_1" / "model.safetensors").read_bytes() == weights


def test_a_killed_study_continues_and_ends_the_same(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    sets = [word for override in overrides(tiny_model) for word in ("--set", override)]
    command = [sys.executable, "-m", "offprincipal", "study", "quick", "--out", str(out), "--jobs", "1", *sets]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / ".stages" / "grpo_1.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the study ended by itself"
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = run(tiny_model, out)
    assert said["grpo_1"] == ["kept"]
    for name in STAGES[:4]:
        ours, theirs = (folder / name / "model.safetensors" for folder in (out, finished))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_killed_training_process_is_named_and_the_study_goes_on_after_it(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def kill(stage: str, report: StepReport | str) -> None:
        if isinstance(report, StepReport):
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGKILL)

    profile = load_profile("quick", overrides(tiny_model))
    with pytest.raises(OffPrincipalError, match=r"trained grpo_1 was killed, .* with --set training.micro_batch"):
        run_profile(profile, tmp_path, 1, kill)
    assert run(tiny_model, tmp_path)["grpo_1"][-1] == "done"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.stepz=3", "stage 'grpo_1': training settings are not usable: stepz: "),
        ("training.steps=0", "steps: it must be greater than or equal to 1, not 0"),
        ("steps=3", "steps: there is no such setting: did you mean training.steps"),
        ("max_steps=3", "here it is training.steps"),
        ("output_dir=x", "here it is --out"),
        ("foo=1", "foo: there is no such setting: a profile has name, title, base, training, stages; "),
        ("titel=1", "did you mean title"),
        (
            "stages.report={kind: report, comparison: comparison}",
            "stages.report.claims: it is missing: give it a value",
        ),
        ("stages.grpo_1.kind=trian", "stages.grpo_1: there is no kind 'trian': did you mean train"),
        ("stages.x={}", "stages.x: its kind is missing"),
        ("stages.x=3", "stages.x: it takes settings under it, as stages.x.KEY=VALUE"),
        (
            "stages.comparison.densty=.3",
            "stages.comparison.densty: a stage of kind compare has no such setting: did you",
        ),
        ("stages.comparison.density=abc", "stages.comparison.density: it must be a number, not 'abc'"),
        ("stages.claims.rl=[]", "stages.claims.rl: it must have at least 1 item"),
        ("stages.comparison.runs=[grpo_9]", "which is not a stage of profile 'quick': did you mean grpo_"),
        ("stages.grpo_1.tasks=[algebra]", "algebra"),
        ("stages.comparison.runs=[nobody]", "nobody"),
        ("stages.claims.claims=[C99]", "C99"),
        ("stages.comparison.runs=[report]", "cycle"),
        ("stages.grpo_1.kind=dance", "dance"),
        ("nonsense", "KEY=VALUE"),
        ("name.of.what=1", "a part of it is a value"),
        ("stages={'../x': {kind: train, recipe: grpo, tasks: [add]}}", "../x"),
        ("colour=blue", "colour"),
    ],
)
def test_a_profile_that_cannot_run_is_refused_before_anything_runs(override: str, says: str) -> None:
    with pytest.raises(OffPrincipalError, match=re.escape(says)):
        load_profile("quick", [override])


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_matches_its_runs_but_for_the_recipe(name: str) -> None:
    """Runs of RLVR and SFT that are held against each other share tasks, seed, steps, batch and learning rate."""
    profile = load_profile(name)
    trained = {
        stage: kind.train_settings(profile.base, profile.training)
        for stage, kind in profile.stages.items()
        if isinstance(kind, TrainStage)
    }
    numbered = [stage for stage in trained if re.fullmatch(r"grpo_\d", stage)]
    for stage in numbered:
        for recipe in ("sft_own", "sft_teacher"):
            other = trained.get(stage.replace("grpo", recipe))
            assert other is None or other.model_copy(update={"recipe": "grpo"}) == trained[stage]
    assert profile.order()


def test_an_unknown_profile_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="quick"):
        load_profile("slow")
    with pytest.raises(StudyError, match=r"no profile 'quik': did you mean quick\?$"):
        load_profile("quik")
    with pytest.raises(StudyError, match=r"profile 'quik.yaml' does not exist: give a YAML file, or one of beyond"):
        load_profile("quik.yaml")
    bad = tmp_path / "bad.yaml"
    for text in ("{", "- a list", ""):
        bad.write_text(text)
        with pytest.raises(StudyError, match=r"bad\.yaml"):
            load_profile(str(bad))


def test_the_forecast_shrinks_with_what_is_done() -> None:
    profile = load_profile("quick")
    whole = estimate_minutes(profile, profile.order(), 2)
    rest = estimate_minutes(profile, ["comparison", "claims", "report"], 2)
    assert whole is not None and rest is not None and 0 < rest < whole
    assert estimate_minutes(load_profile("quick", ["base=some/model"]), profile.order(), 2) is None


SMALL = """
name: small
title: One run, compared
stages:
  own: {kind: train, recipe: sft_own, tasks: [count@1], steps: 2, batch: 8, eval_prompts: 0, device: cpu}
  comparison: {kind: compare, runs: [own], metrics: [location]}
"""
LIMITED = (
    "import resource, sys; most = int(sys.argv.pop()); resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)); "
    "from offprincipal.cli import main; main()"
)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a file's size is Linux's")
@pytest.mark.parametrize("share", [0.001, 0.5, 1.2, 2.5, "of the tables"])
def test_a_full_disk_ends_a_study_in_words_and_it_goes_on_once_there_is_room(
    tiny_model: Path, tmp_path: Path, share: float | str
) -> None:
    """Where the record, the model, its masters, the optimizer's state do not fit; and where the comparison does not."""
    (tmp_path / "small.yaml").write_text(SMALL)
    profile, out = load_profile(str(tmp_path / "small.yaml"), [f"base={tiny_model}"]), tmp_path / "out"
    limit = 4096
    if isinstance(share, float):
        limit = int(share * (tiny_model / "model.safetensors").stat().st_size)
    else:  # trained, and not yet compared
        run_profile(profile, out, 1, lambda *_: None)
        shutil.rmtree(out / "comparison")
    command = [sys.executable, "-c", LIMITED, "study", str(tmp_path / "small.yaml"), "--set", f"base={tiny_model}"]
    done = subprocess.run([*command, "--out", str(out), str(limit)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot write" in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    run_profile(profile, out, 1, lambda *_: None)
    assert not pending(profile, out)
