"""The recipes beyond GRPO and SFT: what they learn from, what their losses are at the base, and that they learn."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_cli import call
from test_training import KILLED, TAUGHT_TASK, held_out_accuracy, record_of, settings

from offprincipal.errors import OffPrincipalError
from offprincipal.models import LanguageModel, open_language_model
from offprincipal.models.decoding import complete
from offprincipal.models.quiet import quiet_libraries
from offprincipal.recipes import RECIPES, Recipe
from offprincipal.studies.stages import TrainStage, Workspace
from offprincipal.tasks import mixture, open_task, split_of
from offprincipal.tasks.prompting import prompting
from offprincipal.training import StepReport, TrainSettings, evaluate, train
from offprincipal.training.monitor import read_monitor
from offprincipal.training.progress import silent
from offprincipal.training.recipes import builder_of
from offprincipal.training.recipes.judged import KEPT, sampled_examples, sampled_pairs
from offprincipal.training.recipes.preference import kto
from offprincipal.training.recipes.run import RecipeRun, shared_arguments

NEW = ("rloo", "dr_grpo", "dpo", "kto", "distill")
LOSS_AT_THE_BASE = {"dpo": math.log(2), "kto": 0.5, "rloo": 0.0, "dr_grpo": 0.0}  # closed forms: the ratio is one


@pytest.fixture(scope="module")
def teacher(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The taught model after more of the same lesson."""
    out = tmp_path_factory.mktemp("teacher") / "model"
    train(settings(taught_model, "sft_own", steps=10, batch=64, learning_rate=3e-3, save_every=10), out, quiet=True)
    return out


@pytest.fixture(scope="module", params=NEW)
def finished(
    request: pytest.FixtureRequest, taught_model: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run of each recipe, watched by the monitor."""
    out = tmp_path_factory.mktemp("runs") / request.param
    train(of(request.param, taught_model, teacher, eval_prompts=16, eval_samples=2, monitor=1), out, quiet=True)
    return out


def of(recipe: str, base: Path, teacher: Path, **changes: Any) -> TrainSettings:
    return settings(base, recipe, **({"teacher": str(teacher)} if recipe == "distill" else {}), **changes)


def test_a_run_moves_weights_and_tells_what_it_did(finished: Path, taught_model: Path) -> None:
    base, masters = (load_file(path / "model.safetensors") for path in (taught_model, finished / "masters"))
    assert all(not torch.equal(masters[name], base[name].float()) for name in base if "layers" in name)
    record = record_of(finished)
    assert [entry["step"] for entry in record["log"]] == [1, 2, 3]
    assert record["accuracy"]["before"]["kl_to_base"] == 0 < record["accuracy"]["after"]["kl_to_base"]
    told = {"rloo": "reward", "dr_grpo": "reward", "dpo": "reward_margin", "kto": "reward_margin", "distill": "loss"}
    assert all(told[finished.name] in entry and entry["seconds"] > 0 for entry in record["log"])
    assert ("teacher" in record) == (finished.name == "distill")
    assert not (finished / "checkpoints").exists() and not list(finished.rglob(KEPT))


def test_the_first_loss_is_that_of_a_policy_which_is_still_the_base(finished: Path) -> None:
    first = record_of(finished)["log"][0]
    if finished.name in LOSS_AT_THE_BASE:
        assert first["loss"] == pytest.approx(LOSS_AT_THE_BASE[finished.name], abs=1e-6)
    if "reward_margin" in first:
        assert first["reward_margin"] == pytest.approx(0, abs=1e-6)


def test_the_monitor_sees_the_policy_move_on_what_the_run_learns_from(finished: Path) -> None:
    rows = [row for row in read_monitor(finished) if row["tensor"] is None]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["kl_step"] > 0 for row in rows)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("recipe", ["rloo", "dpo", "kto", "distill"])
def test_an_interrupted_run_continues_to_the_same_bytes(
    recipe: str, taught_model: Path, teacher: Path, tmp_path: Path
) -> None:
    """And on the same preferences, without sampling them again."""
    run = of(recipe, taught_model, teacher)
    train(run, tmp_path / "whole", quiet=True)

    def interrupt(report: StepReport) -> None:
        if report.stage == "training" and report.step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", progress=interrupt)
    assert (tmp_path / "run" / "checkpoints" / KEPT).exists() == (recipe in ("dpo", "kto"))
    reports: list[StepReport] = []
    record = train(run, tmp_path / "run", progress=reports.append)
    assert [report.step for report in reports if report.stage == "training"] == [2, 3]
    assert not any(report.stage == "sampling preferences" for report in reports)
    for name in ("model.safetensors", "masters/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole = record_of(tmp_path / "whole")["log"]
    assert [entry["loss"] for entry in record["log"]] == [entry["loss"] for entry in whole]


def test_a_run_killed_once_its_preferences_are_kept_starts_on_them(taught_model: Path, tmp_path: Path) -> None:
    """And another run, in the same place, does not."""
    run = settings(taught_model, "dpo")
    out = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, run.model_dump_json(), str(out), "os.rename", "started.json"]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    assert {path.name for path in (out / "checkpoints").iterdir() if path.suffix} >= {KEPT}
    shutil.copytree(out, tmp_path / "other")
    stages: dict[str, list[str]] = {"run": [], "other": []}
    train(run, out, progress=lambda report: stages["run"].append(report.stage))
    other = settings(taught_model, "dpo", seed=1)
    train(other, tmp_path / "other", progress=lambda report: stages["other"].append(report.stage))
    assert "sampling preferences" in stages["other"] and "sampling preferences" not in stages["run"]
    train(other, tmp_path / "fresh", quiet=True)
    masters = [(tmp_path / name / "masters" / "model.safetensors").read_bytes() for name in ("run", "other", "fresh")]
    assert masters[0] != masters[1] == masters[2]


def test_dpo_widens_the_margin_of_its_pairs(taught_model: Path, tmp_path: Path) -> None:
    """And the margin is β times the change in the pairs' log-likelihood ratio, here from the models' own logits."""
    shorter, longer = (
        settings(taught_model, "dpo", steps=steps, learning_rate=3e-3, beta=0.5, save_every=8) for steps in (7, 8)
    )
    train(shorter, tmp_path / "run", quiet=True)
    margins = [entry["reward_margin"] for entry in train(longer, tmp_path / "longer", quiet=True)["log"]]
    assert margins[0] == pytest.approx(0, abs=1e-6) and sum(margins[4:]) > sum(margins[:4])

    base, tuned = open_language_model(taught_model), open_language_model(taught_model)
    tuned.model.load_state_dict(load_file(tmp_path / "run" / "masters" / "model.safetensors"), strict=False)
    pairs = sampled_pairs(run_of(longer, base), base)
    of_the_last_step = list(zip(*pairs.values(), strict=True))[7 * 32 :]
    before, after = (
        sum(
            log_likelihood(policy, p, chosen) - log_likelihood(policy, p, failed)
            for p, chosen, failed in of_the_last_step
        )
        for policy in (base, tuned)
    )
    assert margins[7] == pytest.approx(0.5 * (after - before) / 32, rel=1e-4)


def test_kto_parts_verified_from_failed_completions(taught_model: Path, tmp_path: Path) -> None:
    """Batches differ in what they ask, so that margins are compared a third of the run apart."""
    run = settings(taught_model, "kto", steps=12, learning_rate=1e-3, save_every=12)
    log = train(run, tmp_path / "run", quiet=True)["log"]
    margins, losses = ([entry[name] for entry in log] for name in ("reward_margin", "loss"))
    assert margins[0] == pytest.approx(0, abs=1e-6) and sum(margins[-4:]) > sum(margins[:4])
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("recipe", ["rloo", "dr_grpo"])
def test_reward_rises(recipe: str, taught_model: Path, tmp_path: Path) -> None:
    """On held-out prompts; over seeds and instruction sets by .04 to .07, where the mean reward of a batch may fall."""
    train(settings(taught_model, recipe, steps=30, batch=128, save_every=30, learning_rate=1e-3), tmp_path, quiet=True)
    assert held_out_accuracy(tmp_path) > held_out_accuracy(taught_model) + 0.02


def test_distillation_brings_the_student_to_its_teacher(taught_model: Path, teacher: Path, tmp_path: Path) -> None:
    """By its own loss, and by our measure of KL(student‖teacher) on held-out prompts."""
    run = of("distill", taught_model, teacher, steps=12, learning_rate=2e-3, save_every=12)
    record = train(run, tmp_path / "run", quiet=True)
    losses = [entry["loss"] for entry in record["log"]]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    before, after = (
        evaluate(student, [TAUGHT_TASK], prompts=32, samples=4, reference=teacher, max_new_tokens=3)["kl_to_base"]
        for student in (taught_model, tmp_path / "run")
    )
    assert after < 0.5 * before
    assert losses[0] == pytest.approx(before, rel=0.25)  # other prompts, the same quantity


def test_a_student_that_is_its_teacher_does_not_move(taught_model: Path, tmp_path: Path) -> None:
    record = train(of("distill", taught_model, taught_model, steps=1), tmp_path / "run", quiet=True)
    assert record["log"][0]["loss"] == pytest.approx(0, abs=1e-7) and record["log"][0]["gradient_norm"] < 1e-4


def run_of(run: TrainSettings, base: LanguageModel, checkpoints: Path = Path("nowhere")) -> RecipeRun:
    tasks = {name: open_task(name) for name in run.tasks}
    arguments = shared_arguments(run, base, checkpoints)
    trainer = {"model": base.model, "processing_class": base.tokenizer}
    asking = prompting(run.prompt, base.tokenizer, tasks.values())
    return RecipeRun(run, base, None, asking, checkpoints, silent, arguments, trainer)


def log_likelihood(policy: LanguageModel, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        log_p = policy.model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(log_p[torch.arange(len(log_p)), ids[0, 1:]][len(prompt) - 1 :].sum())


@pytest.mark.parametrize("recipe", NEW)
def test_an_adapter_is_trained_alone_beside_no_second_one(
    recipe: str, taught_model: Path, teacher: Path, tmp_path: Path
) -> None:
    """As PEFT wraps the model; the first losses are those of the base, which the adapter leaves as it is."""
    base = open_language_model(taught_model)
    wrapped = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    run = replace(
        run_of(of(recipe, taught_model, teacher), base, tmp_path),
        trainer={"model": wrapped, "processing_class": base.tokenizer},
        teacher=open_language_model(teacher),
    )
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    with quiet_libraries():
        trainer = builder_of(run.settings.recipe)(run)
        trainer.train()
    assert list(wrapped.peft_config) == ["default"]
    moved = {name for name, tensor in wrapped.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("lora_B" in name for name in moved) and all("lora_" in name for name in moved)
    first = trainer.state.log_history[0]["loss"]
    assert first == pytest.approx(LOSS_AT_THE_BASE.get(recipe, first), abs=1e-6)


class TestJudgedCompletions:
    def test_the_chosen_are_verified_the_rejected_are_not_and_none_is_held_out(self, taught_model: Path) -> None:
        base, task = open_language_model(taught_model), open_task(TAUGHT_TASK)
        pairs = sampled_pairs(run_of(settings(taught_model, "dpo"), base), base)
        texts = {name: base.tokenizer.batch_decode(ids, skip_special_tokens=True) for name, ids in pairs.items()}
        asked = {problem.prompt: problem for problem in mixture([task], "train", 20_000)}
        assert {split_of(prompt) for prompt in texts["prompt_ids"]} == {"train"}
        for name, right in (("chosen_ids", True), ("rejected_ids", False)):
            verdicts = [task.verify(asked[p], text) for p, text in zip(texts["prompt_ids"], texts[name], strict=True)]
            assert verdicts == [right] * 96

    def test_completions_end_where_the_base_ended_them(self, taught_model: Path) -> None:
        base = open_language_model(taught_model)
        examples = sampled_examples(run_of(settings(taught_model, "kto", max_new_tokens=2, temperature=3), base), base)
        ends = base.tokenizer.eos_token_id
        for ids in examples["completion_ids"]:
            assert 1 <= len(ids) <= 2 and ends not in ids[:-1]
            assert len(ids) == 2 or ids[-1] == ends
        assert any(ids[-1] != ends for ids in examples["completion_ids"])  # cut off: no end is put there

    def test_they_are_decided_by_the_seed(self, taught_model: Path) -> None:
        base = open_language_model(taught_model)
        runs = [run_of(settings(taught_model, "kto", seed=seed), base) for seed in (3, 3, 4)]
        first, again, other = (sampled_examples(run, base) for run in runs)
        assert first == again != other

    def test_their_share_of_right_answers_is_the_bases_own(self, taught_model: Path) -> None:
        base = open_language_model(taught_model)
        labels = sampled_examples(run_of(settings(taught_model, "kto", batch=256, steps=8), base), base)["label"]
        own = evaluate(base, [TAUGHT_TASK], prompts=256, samples=8, max_new_tokens=3)["sampled_accuracy"]
        assert sum(labels) / len(labels) == pytest.approx(own, abs=0.06)

    def test_ktos_reference_point_takes_the_completion_before_within_a_micro_batch(
        self, taught_model: Path, tmp_path: Path
    ) -> None:
        base = open_language_model(taught_model)
        trainer = kto(run_of(settings(taught_model, "kto", micro_batch=8), base, tmp_path))
        rows = trainer.train_dataset.to_dict()
        for start in range(0, 96, 8):
            part = rows["completion_ids"][start : start + 8]
            assert rows["KL_completion_ids"][start : start + 8] == [part[-1], *part[:-1]]
        sampled = sampled_examples(run_of(settings(taught_model, "kto", micro_batch=8), base), base)
        for start in range(0, 96, 32):  # a step keeps its examples
            step = [sorted(zip(*(c[n][start : start + 32] for n in sampled), strict=True)) for c in (rows, sampled)]
            assert step[0] == step[1]


def test_a_temperature_sharpens_the_distribution_that_is_sampled_from(taught_model: Path) -> None:
    """A token of probability p is drawn with p^(1/T)/Σp^(1/T)."""
    opened = open_language_model(taught_model)
    ids = opened.tokenizer(mixture([open_task(TAUGHT_TASK)], "eval", 1)[0].prompt).input_ids
    with torch.no_grad():
        sharpened = (opened.model(torch.tensor([ids])).logits[0, -1].double() / 0.5).softmax(-1)
    found = complete(opened, [ids], 4000, 1, torch.Generator().manual_seed(0), temperature=0.5).ids[1:]
    likeliest = int(sharpened.argmax())
    p = float(sharpened[likeliest])
    drawn = sum(row == [likeliest] for row in found) / 4000
    assert drawn == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)


@pytest.fixture(scope="module")
def foreign(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The taught model with two tokens' numbers exchanged."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    opened = open_language_model(taught_model)
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("distill", {}, "set teacher to"),
        ("grpo", {"teacher": "embedded"}, "teacher is a setting of distill, not of grpo: leave it out$"),
        ("rloo", {"beta": 0.1}, "beta is a setting of dpo and kto, not of rloo: leave it out or set trl.beta$"),
        ("distill", {"teacher": "embedded", "beta": 0.1}, "beta is a setting of dpo and kto"),
        ("dpo", {"beta": 0}, "beta: .*greater than 0"),
        ("kto", {"micro_batch": 1}, "micro_batch that allows 2"),
        ("rloo", {"batch": 12}, "not divisible by rollouts_per_prompt"),
        ("distill", {"teacher": "/nowhere/at/all"}, "does not exist"),
        ("distill", {"teacher": "embedded", "max_new_tokens": 250}, "exceeds the model's context"),
        ("dpo", {"max_new_tokens": 250}, "exceeds the model's context"),
    ],
)
def test_settings_of_another_recipe_are_refused(
    recipe: str, changes: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(OffPrincipalError, match=message):
        train(settings(tiny_model, recipe, **changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("dpo", r"of 512 training prompts got both .*too few pairs"), ("kto", "all 8 completions .* are failed")],
)
def test_a_base_that_is_never_right_gives_no_preferences(
    recipe: str, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    run = settings(tiny_model, recipe, tasks=("multiply@3",), steps=1, batch=8)
    with pytest.raises(OffPrincipalError, match=message):
        train(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(taught_model: Path, foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(OffPrincipalError, match=r"teacher '.*' has another vocabulary than the model"):
        train(of("distill", taught_model, foreign), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_changed_teacher_is_not_continued(taught_model: Path, teacher: Path, tmp_path: Path) -> None:
    run, out = of("distill", taught_model, teacher), tmp_path / "run"

    def interrupt(report: StepReport) -> None:
        if report.stage == "training":
            raise Interrupted

    with pytest.raises(Interrupted):
        train(run, out, progress=interrupt)
    path = out / "checkpoints" / "started.json"
    started = json.loads(path.read_text())
    started["teacher"]["weights_blake2b"] = "0"
    path.write_text(json.dumps(started))
    with pytest.raises(OffPrincipalError, match="other weights of its teacher"):
        train(run, out, quiet=True)


def test_runs_without_the_later_settings_have_the_key_they_always_had() -> None:
    dumped = TrainSettings(recipe="grpo", tasks=("add",)).model_dump(mode="json")
    assert not {"teacher", "beta"} & dumped.keys()
    assert TrainSettings(recipe="dpo", tasks=("add",), beta=0.2).model_dump(mode="json")["beta"] == 0.2


def test_a_stage_is_keyed_by_its_teachers_content(taught_model: Path, teacher: Path, tmp_path: Path) -> None:
    stage = TrainStage(kind="train", recipe="distill", tasks=[TAUGHT_TASK], teacher=str(tmp_path / "teacher"))
    space = Workspace(tmp_path / "study", str(taught_model), {}, "profile", "title")
    keys = []
    for source in (teacher, taught_model, teacher):
        shutil.copytree(source, tmp_path / "teacher", dirs_exist_ok=True)
        keys.append(stage.settings(space))
    assert keys[0] == keys[2] != keys[1]


def test_the_command_trains_each_recipe_that_its_help_names(
    taught_model: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert set(RECIPES) == set(get_args(Recipe))
    assert call(monkeypatch, "train", "--help") == 0
    assert ", ".join(RECIPES) in " ".join(capsys.readouterr().out.replace("│", " ").split())
    words = ["train", "distill", "--task", TAUGHT_TASK, "--model", str(taught_model), "--out", str(tmp_path / "run")]
    given = ["steps=1", "batch=8", "eval_prompts=0", "max_new_tokens=3"]
    words += [word for text in given for word in ("--set", text)]
    assert call(monkeypatch, *words) == 2
    assert "set teacher to" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert call(monkeypatch, *words, "--set", f"teacher={teacher}") == 0
    assert record_of(tmp_path / "run")["settings"]["teacher"] == str(teacher)
