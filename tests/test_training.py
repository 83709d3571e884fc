"""Training: recipes end to end, resuming after a kill, what is written, and what is measured."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from offprincipal import apply_delta, trajectory
from offprincipal.errors import ArgumentError, FileError, ModelError, OffPrincipalError, TaskError, TrainingError
from offprincipal.models import open_language_model
from offprincipal.tasks import mixture, open_task, split_of
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.training import (
    StepReport,
    TrainSettings,
    evaluate,
    parse_settings,
    terminal_progress,
    train,
)
from offprincipal.training.adapter_settings import AdapterSettings
from offprincipal.training.callbacks import SaveSlowSteps
from offprincipal.training.evaluation import standard_error

TAUGHT_TASK = "count@1"  # what `taught_model` was taught
RECIPES = ("grpo", "sft_teacher", "sft_own")


def settings(base: Path, recipe: str = "sft_own", **changes: Any) -> TrainSettings:
    values = {
        "recipe": recipe,
        "model": str(base),
        "tasks": (TAUGHT_TASK,),
        "steps": 3,
        "batch": 32,
        "rollouts_per_prompt": 8,
        "max_new_tokens": 3,
        "learning_rate": 1e-4,
        "eval_prompts": 0,
        "save_every": 1,
        "device": "cpu",
    }
    return parse_settings(values | changes)


@pytest.fixture(scope="module", params=RECIPES)
def finished(request: pytest.FixtureRequest, taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of each recipe."""
    out = tmp_path_factory.mktemp("runs") / request.param
    train(settings(taught_model, request.param, eval_prompts=16, eval_samples=2), out, quiet=True)
    return out


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    return record


def test_a_run_leaves_a_model_its_masters_and_a_record(finished: Path, taught_model: Path) -> None:
    base, stored = load_file(taught_model / "model.safetensors"), load_file(finished / "model.safetensors")
    masters = load_file(finished / "masters" / "model.safetensors")
    assert base.keys() == stored.keys() == masters.keys() and "lm_head.weight" not in stored
    assert all(stored[name].dtype == torch.bfloat16 and masters[name].dtype == torch.float32 for name in base)
    assert all(torch.equal(masters[name].to(torch.bfloat16), stored[name]) for name in base)
    assert any(not torch.equal(masters[name], base[name].float()) for name in base)
    assert not (finished / "checkpoints").exists() and not list(finished.rglob("*.part"))
    assert open_language_model(finished).tokenizer.eos_token == "<eos>"


def test_a_record_tells_settings_accuracy_and_every_step(finished: Path, taught_model: Path) -> None:
    record = record_of(finished)
    assert record["schema"] == 1 and record["settings"]["recipe"] == finished.name
    assert [entry["step"] for entry in record["log"]] == [1, 2, 3]
    assert all(entry["seconds"] > 0 and ("reward" in entry) == (finished.name == "grpo") for entry in record["log"])
    assert record["seconds"] == pytest.approx(sum(entry["seconds"] for entry in record["log"]), abs=1e-3)
    assert record["accuracy"]["before"]["kl_to_base"] == 0 < record["accuracy"]["after"]["kl_to_base"]
    assert record["base"]["source"] == str(taught_model) and set(record["versions"]) >= {"torch", "trl"}


def test_a_complete_run_is_not_run_again_and_other_settings_are_refused(finished: Path, taught_model: Path) -> None:
    same = settings(taught_model, finished.name, eval_prompts=16, eval_samples=2)
    reports: list[StepReport] = []
    (finished / "checkpoints").mkdir()  # what a kill after the record leaves
    assert train(same, finished, progress=reports.append) == record_of(finished) and not reports
    assert not (finished / "checkpoints").exists()
    other = same.model_copy(update={"learning_rate": 2e-4})
    with pytest.raises(TrainingError, match=r"learning_rate is 0\.0001 there and 0\.0002 here; .*--overwrite"):
        train(other, finished, quiet=True)


def test_teacher_lessons_move_the_model_to_the_teachers_format(taught_model: Path, tmp_path: Path) -> None:
    """Only completions are learned: the held-out traces, `working#answer` and the end, become far likelier."""
    lesson = settings(taught_model, "sft_teacher", steps=40, learning_rate=1e-2, save_every=40)
    record = train(lesson, tmp_path / "run", quiet=True)
    assert record["log"][-1]["loss"] < 0.5 * record["log"][0]["loss"]
    before, after = (nats_of_teacher_traces(source) for source in (taught_model, tmp_path / "run"))
    assert after < 0.5 * before


def nats_of_teacher_traces(source: Path) -> float:
    """Of a held-out trace and its end, given the prompt, in the mean."""
    opened, task, total = open_language_model(source, "cpu"), open_task(TAUGHT_TASK), 0.0
    problems = mixture([task], "eval", 16)
    for problem in problems:
        prompt = opened.tokenizer(problem.prompt).input_ids
        trace = [*opened.tokenizer(task.teacher_trace(problem)).input_ids, opened.tokenizer.eos_token_id]
        ids = torch.tensor([prompt + trace])
        with torch.no_grad():
            log_p = opened.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(log_p.gather(1, ids[0, len(prompt) :, None]).sum())
    return total / len(problems)


def test_reward_moves_the_model_to_right_answers(taught_model: Path, tmp_path: Path) -> None:
    """On one set of held-out prompts with one noise; over seeds and instruction sets it rose by .05 to .06."""
    run = settings(taught_model, "grpo", steps=30, batch=128, learning_rate=3e-3, save_every=30)
    train(run, tmp_path / "run", quiet=True)
    assert held_out_accuracy(tmp_path / "run") > held_out_accuracy(taught_model) + 0.02


def held_out_accuracy(source: Path) -> float:
    found = evaluate(source, [TAUGHT_TASK], prompts=64, samples=8, max_new_tokens=3, device="cpu")["sampled_accuracy"]
    return float(found)


def test_micro_batches_change_memory_not_the_update(taught_model: Path, tmp_path: Path) -> None:
    for name, micro_batch in (("whole", None), ("parts", 8)):
        train(settings(taught_model, steps=1, micro_batch=micro_batch), tmp_path / name, quiet=True)
    whole, parts = (load_file(tmp_path / name / "masters" / "model.safetensors") for name in ("whole", "parts"))
    base = load_file(taught_model / "model.safetensors")
    update = torch.cat([(whole[name] - base[name].float()).flatten() for name in base])
    same = torch.cat([(parts[name] - base[name].float()).flatten() for name in base])
    assert torch.nn.functional.cosine_similarity(update, same, dim=0) > 0.99


KILLED = """
import os, signal, sys
from pathlib import Path
from offprincipal.training import TrainSettings, train

event, ending = sys.argv[3:5]

def kill(name, arguments):
    if name == event and any(str(argument).endswith(ending) for argument in arguments[:2]):
        os.kill(os.getpid(), signal.SIGKILL)

settings = TrainSettings.model_validate_json(sys.argv[1])
sys.addaudithook(kill)
train(settings, sys.argv[2], quiet=True)
"""


@pytest.mark.parametrize("recipe", RECIPES[:2])
@pytest.mark.parametrize(
    ("event", "ending"),
    [
        ("open", "checkpoint-2/trainer_state.json"),  # amid the second checkpoint
        ("os.rename", "result/model.safetensors"),  # amid writing the result
        ("os.rename", "run/run.json"),  # before the record
    ],
)
def test_a_killed_run_continues_to_the_same_bytes(
    recipe: str, event: str, ending: str, taught_model: Path, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    """Data order, sampling and the optimizer's state all survive, so that reinforcement learning is bitwise too."""
    run = settings(taught_model, recipe)
    out = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, run.model_dump_json(), str(out), event, ending]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    assert (out / "checkpoints").is_dir() and not (out / "run.json").exists()

    steps: list[int] = []
    record = train(run, out, progress=lambda report: steps.append(report.step) if report.stage == "training" else None)
    assert steps == ([2, 3] if event == "open" else [])
    whole = uninterrupted[recipe]
    for name in ("model.safetensors", "masters/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [entry["loss"] for entry in record["log"]] == [entry["loss"] for entry in record_of(whole)["log"]]


def test_slow_steps_are_saved_by_the_clock(
    taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, Path]
) -> None:
    monkeypatch.setattr(SaveSlowSteps, "MOST_LOST", 0.0)
    run = settings(taught_model, "grpo", save_every=100)
    steps: list[int] = []

    def interrupted(report: StepReport) -> None:
        steps.append(report.step)
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", progress=interrupted)
    steps.clear()
    train(run, tmp_path / "run", progress=lambda report: steps.append(report.step))
    assert steps[0] == 2
    weights = [folder / "model.safetensors" for folder in (tmp_path / "run", uninterrupted["grpo"])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    for recipe in RECIPES[:2]:
        train(settings(taught_model, recipe), folder / recipe, quiet=True)
    return {recipe: folder / recipe for recipe in RECIPES[:2]}


def test_a_base_that_a_sibling_measured_is_not_measured_again(taught_model: Path, tmp_path: Path) -> None:
    def stages(out: str, siblings: list[Path], **changes: Any) -> tuple[set[str], Any]:
        seen: set[str] = set()
        run = settings(taught_model, **{"steps": 1, "eval_prompts": 16, "eval_samples": 2, **changes})
        record = train(run, tmp_path / out, progress=lambda report: seen.add(report.stage), siblings=siblings)
        return seen, record["accuracy"]["before"]

    first, before = stages("first", [])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    folders = [tmp_path / "damaged", tmp_path / "nowhere", tmp_path / "first"]
    second, taken = stages("second", folders, seed=1)
    other, measured = stages("other", folders, eval_prompts=8)
    assert "measuring the base" in first and "measuring the base" in other
    assert "measuring the base" not in second and taken == before != measured


def test_overwrite_discards_a_run_and_nothing_else(taught_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(taught_model, steps=1), out, quiet=True)
    (out / "notes.txt").write_text("mine")
    record = train(settings(taught_model, steps=1, seed=1), out, overwrite=True, quiet=True)
    assert record["settings"]["seed"] == 1 and (out / "notes.txt").read_text() == "mine"


def test_a_changed_base_is_not_continued(taught_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = {"source": str(taught_model), "weights_blake2b": "0"}
    started = {"schema": 1, "settings": settings(taught_model).model_dump(mode="json"), "base": base, "before": None}
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "started.json").write_text(json.dumps(started))
    with pytest.raises(TrainingError, match="other weights"):
        train(settings(taught_model), out, quiet=True)


def test_a_fault_found_late_can_be_mended_in_the_same_folder(taught_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exceeds the model's context"):
        train(settings(taught_model, "grpo", max_new_tokens=250), tmp_path / "run", quiet=True)
    assert train(settings(taught_model, "grpo", steps=1), tmp_path / "run", quiet=True)["log"]


def test_divergence_is_an_error_not_a_result(taught_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"diverged.*lower learning_rate"):
        train(settings(taught_model, learning_rate=1e38), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "run.json").exists()


def test_greedy_accuracy_is_that_of_the_models_own_generation(taught_model: Path) -> None:
    """Against `generate`, prompt by prompt, without padding."""
    opened = open_language_model(taught_model)
    task = open_task("count")
    right = 0
    for problem in mixture([task], "eval", 40, seed=5):
        ids = torch.tensor([opened.tokenizer(problem.prompt).input_ids])
        completion = opened.model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        right += task.verify(problem, opened.tokenizer.decode(completion, skip_special_tokens=True))
    result = evaluate(opened, ["count"], prompts=40, samples=1, seed=5)
    assert 0 < right < 40 and result["greedy_accuracy"] == right / 40


def test_entropy_and_divergence_are_those_of_single_sequences(taught_model: Path, tiny_model: Path) -> None:
    """With one new token a prompt, both follow from one forward pass over each prompt."""
    policy, base = open_language_model(taught_model), open_language_model(tiny_model)
    entropy, divergence = [], []
    for problem in mixture([open_task("add")], "eval", 20):
        ids = torch.tensor([policy.tokenizer(problem.prompt).input_ids])
        with torch.no_grad():
            p, q = (m.model(ids).logits[0, -1].double().log_softmax(-1) for m in (policy, base))
        entropy.append(float(-(p.exp() * p).sum()))
        divergence.append(float((p.exp() * (p - q)).sum()))
    result = evaluate(policy, ["add"], prompts=20, samples=2, reference=base, max_new_tokens=1)
    assert result["token_entropy"] == pytest.approx(sum(entropy) / 20, rel=1e-5)
    assert result["kl_to_base"] == pytest.approx(sum(divergence) / 20, rel=1e-5)


def test_prompts_that_are_asked_again_count_once() -> None:
    """A task may hold out fewer prompts than are asked; the standard error is that of means over fresh prompts."""
    random = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        right = random.random(10)  # of ten prompts, each asked five or six times
        clusters = [i % 10 for i in range(56)]
        values = [float(random.random() < right[i]) for i in clusters]
        means.append(np.mean(values))
        errors.append(standard_error(values, clusters))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.08)
    alone = random.random(40).tolist()
    assert standard_error(alone, range(40)) == pytest.approx(np.std(alone, ddof=1) / 40**0.5)
    assert standard_error([0.5, 1.0], "aa") is None


def test_a_small_task_says_on_how_few_prompts_it_was_measured(taught_model: Path) -> None:
    found = evaluate(taught_model, ["add@1"], prompts=30, samples=2, max_new_tokens=2)
    held_out = {p for p in (f"{a}+{b}=" for a in range(10) for b in range(10)) if split_of(p) == "eval"}
    assert found["prompts"] == 30 and found["distinct_prompts"] == len(held_out) == 10


def test_only_the_next_token_of_a_prompt_is_scored(taught_model: Path) -> None:
    """Of a large vocabulary the scores of whole prompts would take gigabytes."""
    opened = open_language_model(taught_model)
    scored: list[int] = []
    with opened.model.lm_head.register_forward_pre_hook(lambda _, inputs: scored.append(inputs[0].shape[1])):
        evaluate(opened, ["add"], prompts=4, samples=2, max_new_tokens=3)
    assert set(scored) == {1}


def test_sampling_follows_the_models_distribution(taught_model: Path) -> None:
    """The share of samples that say what greedy decoding says is the probability that the model gives it."""
    opened = open_language_model(taught_model)
    problem = mixture([open_task(TAUGHT_TASK)], "eval", 1)[0]
    with torch.no_grad():
        logits = opened.model(torch.tensor([opened.tokenizer(problem.prompt).input_ids])).logits[0, -1]
    right = float(logits.softmax(-1)[opened.tokenizer(problem.answer).input_ids[0]])
    result = evaluate(opened, [TAUGHT_TASK], prompts=1, samples=4000, max_new_tokens=1)
    assert result["sampled_accuracy"] == pytest.approx(right, abs=4 * (right * (1 - right) / 4000) ** 0.5)


def test_a_model_is_at_no_distance_from_itself_and_is_measured_alike_twice(taught_model: Path) -> None:
    first = evaluate(taught_model, ["count", "add"], prompts=20, samples=4, reference=taught_model)
    assert first["kl_to_base"] == 0
    assert first == evaluate(taught_model, ["count", "add"], prompts=20, samples=4, reference=taught_model)
    assert first["sampled_accuracy"] <= first["pass_at_k"]
    assert first["greedy_accuracy"] == sum(first["tasks"][name]["greedy_accuracy"] for name in ("count", "add")) / 2


def test_progress_is_a_line_a_tenth_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress("run") as show:
        for step in range(1, 101):
            show(StepReport("training", step, 100, "reward", 0.5, 2.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[-2] == "run: step 90/100, reward 0.500, 2.00 s/step, 0:20 left"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "/nowhere/at/all"}, ModelError, "does not exist"),
        ({"tasks": ("adds",)}, TaskError, "no task 'adds': did you mean add"),
        ({"recipe": "sft"}, TrainingError, "no recipe 'sft': did you mean sft_own or sft_teacher"),
        ({"recipe": "grop"}, TrainingError, "did you mean grpo"),
        ({"per_device_train_batch_size": 4}, TrainingError, "here it is batch, .* and micro_batch"),
        ({"adapter": {"rank": 4}}, TrainingError, "are of an adapter: name it, as in --adapter lora"),
        ({"trl": {"bogus": 1}, "model": "/nowhere/at/all"}, TrainingError, "of TRL has no option 'bogus'"),
        ({"report_to": "nobody", "model": "/nowhere/at/all"}, TrainingError, "report_to 'nobody' is not installed"),
        ({"batch": 12, "recipe": "grpo"}, TrainingError, "not divisible by rollouts_per_prompt"),
        ({"max_new_tokens": 250, "recipe": "grpo"}, ModelError, "exceeds the model's context of 256"),
        ({"steps": 0}, TrainingError, "steps: .*greater than or equal to 1"),
        ({"report_to": ("nobody",)}, TrainingError, "report_to 'nobody' is not installed"),
        ({"stepz": 1}, TrainingError, "stepz: there is no such setting: did you mean steps"),
        ({"max_step": 1}, TrainingError, "did you mean max_steps"),
        ({"adapter": {"method": "lora", "rnak": 2}}, TrainingError, "adapter.rnak: .* did you mean adapter.rank"),
        ({"adapter": {"method": "lora", "lora_alpha": 2}}, TrainingError, "here it is adapter.alpha"),
        ({"r": 4}, TrainingError, "r: there is no such setting: here it is adapter.rank$"),
        ({"lora-dropout": 0.1}, TrainingError, "here it is adapter.dropout$"),
        ({"epsilon": 0.1}, TrainingError, "here it is trl.epsilon$"),
        ({"report": "x", "output_dir": "y"}, TrainingError, "report: .*report_to.*; output_dir: .* here it is --out$"),
        ({"beta": 0.1, "recipe": "grpo"}, TrainingError, "leave it out or set trl.beta"),
        ({"device": "gpu"}, TrainingError, "device: there is no 'gpu': did you mean cpu?"),
        (
            {"monitor": "atuo"},
            TrainingError,
            "monitor: there is no 'atuo': did you mean auto.; or it must be an integer",
        ),
        ({"steps": "many"}, TrainingError, "steps: it must be an integer, not 'many'$"),
        ({"adapter": "lora"}, TrainingError, "adapter: it takes settings under it, as adapter.KEY=VALUE$"),
        ({"qqqq": 1}, TrainingError, "no such setting: `train --list settings` has all"),
        ({"tasks": ("rg:graph_color",)}, OffPrincipalError, "no reference answers|context"),
    ],
)
def test_unusable_settings_say_what_to_change(
    changes: dict[str, Any], kind: type[Exception], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        train(settings(tiny_model, **changes), tmp_path / "run", quiet=True)


def test_settings_are_refused_alike_however_they_are_given(tiny_model: Path, tmp_path: Path) -> None:
    """A class of pydantic's own error, with its address, was what Python callers saw."""
    given: dict[str, Any] = {"recipe": "sft_own", "tasks": "add,sort@2", "stepz": 1}
    for act in (
        lambda: TrainSettings(**given),
        lambda: TrainSettings.model_validate_json(json.dumps(given)),
        lambda: train(given, tmp_path / "run"),
        lambda: train(out=tmp_path / "run", **given),
    ):
        with pytest.raises(TrainingError, match=r"not usable: stepz: there is no such setting: did you mean steps\?$"):
            act()
    with pytest.raises(ArgumentError, match=r"'grpo' is not TrainSettings, nor a dictionary.*train\(recipe='grpo'"):
        train("grpo", tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="both settings and steps are given"):
        train(settings(tiny_model), tmp_path / "run", steps=3)
    with pytest.raises(ArgumentError, match="needs a folder: name one, as out="):
        train(settings(tiny_model))


def test_settings_of_adapters_and_prompts_are_refused_so_too() -> None:
    with pytest.raises(TrainingError, match=r"adapter.rnak: there is no such setting: did you mean adapter.rank"):
        AdapterSettings(method="lora", rnak=2)  # type: ignore[call-arg]
    with pytest.raises(TrainingError, match=r"adapter\.rank: it must be greater than or equal to 1, not 0$"):
        AdapterSettings(method="lora", rank=0)
    with pytest.raises(TaskError, match=r"prompt.shot: there is no such setting: did you mean prompt.shots"):
        PromptSettings(shot=2)  # type: ignore[call-arg]
    with pytest.raises(TaskError, match=r"prompt\.shots: it must be greater"):
        TrainSettings(recipe="grpo", tasks=("add",), prompt={"shots": 0})  # type: ignore[arg-type]


def test_data_with_too_few_prompts_are_refused_before_the_base_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    kept = {split: next(f"{i}+1=" for i in range(99) if split_of(f"{i}+1=") == split) for split in ("train", "eval")}
    for split, lacking in (("train", "held out to measure on"), ("eval", "left to learn from")):
        rows = [{"question": kept[split], "answer": "1"}] * 2
        (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = settings(tiny_model, tasks=f"hf:{tmp_path / 'few.jsonl'}", eval_prompts=4)
        with pytest.raises(TaskError, match=rf"too few prompts \(1\): none is {lacking}.*at least 50, or"):
            train(run, tmp_path / "run", progress=reports.append)
        assert not reports and not (tmp_path / "run").exists()


def test_a_run_is_given_by_keywords_or_a_dictionary_too(tiny_model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"recipe": "sft_own", "model": str(tiny_model), "tasks": "count@1,add@1", "max_steps": 1}
    given |= {"batch": 4, "eval_prompts": 0, "device": "cpu"}
    record = train(**given, out=tmp_path / "run", quiet=True)
    assert record["settings"]["tasks"] == ["count@1", "add@1"] and len(record["log"]) == 1
    assert train(given, tmp_path / "run", quiet=True) == record


def test_evaluating_takes_tasks_as_one_text_and_names_what_is_not_a_model(tiny_model: Path) -> None:
    opened = open_language_model(tiny_model, "cpu")
    assert list(evaluate(opened, "count, add@1", prompts=4, samples=1, max_new_tokens=2)["tasks"]) == ["count", "add@1"]
    with pytest.raises(ModelError, match=r"the model is a Qwen3ForCausalLM: .*open_language_model opens"):
        evaluate(opened.model, ["add"])


def test_a_teachers_traces_that_are_the_answers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """They would make sft_teacher the same run as sft_own, to the byte, under another name."""
    rows = [{"question": f"{a}+1=", "answer": str(a + 1)} for a in range(8)] * 20
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"hf:{tmp_path / 'sums.jsonl'}"
    with pytest.raises(TaskError, match="has no traces, only answers"):
        train(settings(tiny_model, recipe="sft_teacher", tasks=task, eval_prompts=0), tmp_path / "run", quiet=True)
    traced = [row | {"answer": f"{row['question']}{row['answer']} #### {row['answer']}"} for row in rows]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in traced))
    assert train(settings(tiny_model, recipe="sft_teacher", tasks=task, eval_prompts=0), tmp_path / "run", quiet=True)


def test_unusable_folders_say_what_to_change(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "model").mkdir()
    for out, message in ((tmp_path / "file", "is a file"), (tmp_path, "no run: choose another")):
        with pytest.raises(TrainingError, match=message):
            train(settings(tiny_model), out, quiet=True)
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_language_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ModelError, match="as a causal language model"):
        open_language_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="no usable tokenizer"):
        open_language_model(tmp_path / "model")


def test_what_is_said_of_an_absent_tokenizer_is_a_whole_sentence(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no usable tokenizer .*[^:]\): copy its tokenizer files there"):
        open_language_model(tmp_path, "cpu")


def test_a_tokenizer_may_know_more_tokens_than_the_embedding_has_rows(tiny_model: Path, tmp_path: Path) -> None:
    """As after adding a chat token without resizing, or a padding token: it matters only where such a token is used."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    opened = open_language_model(tiny_model, "cpu")
    rows = opened.model.get_input_embeddings().weight.shape[0]
    opened.tokenizer.add_tokens([f"<new{i}>" for i in range(rows - len(opened.tokenizer) + 1)], special_tokens=True)
    opened.tokenizer.add_special_tokens({"pad_token": "<padding>"})
    opened.tokenizer.save_pretrained(folder)
    longer = open_language_model(folder, "cpu")
    assert len(longer.tokenizer) > rows > longer.tokenizer.pad_token_id
    assert longer.prompt_ids("1+1=", 3) == open_language_model(tiny_model, "cpu").prompt_ids("1+1=", 3)
    last = longer.tokenizer.convert_ids_to_tokens(rows)
    with pytest.raises(ModelError, match=rf"token {rows} \({last!r}\) has no row in the embedding of {rows}"):
        longer.prompt_ids(f"1+1={last}", 3)
    assert evaluate(longer, [TAUGHT_TASK], prompts=4, samples=1, max_new_tokens=2)["prompts"] == 4


HOLDING = """
import sys, time
from pathlib import Path
from offprincipal.files import exclusively
with exclusively(Path(sys.argv[1]), beside=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_that_another_process_trains_in_is_refused_and_free_once_that_is_killed(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = settings(tiny_model, "sft_own", steps=1)
    other = subprocess.Popen([sys.executable, "-c", HOLDING, str(out)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    try:
        with pytest.raises(FileError, match="another process is writing"):
            train(run, out, quiet=True)
    finally:
        other.kill()
        other.wait()
    assert train(run, out, quiet=True)["schema"] == 1


SENDING = """
import sys
from pathlib import Path
import huggingface_hub.utils
from trl.trainer import base_trainer
sent = []
base_trainer.send_telemetry = lambda *args, **kwargs: sent.append(
    not __import__("huggingface_hub").constants.HF_HUB_DISABLE_TELEMETRY
)
from test_training import settings
from offprincipal.training import train
train(settings(Path(sys.argv[1]), "sft_own", steps=1), Path(sys.argv[2]), quiet=True)
assert sent, "TRL asked for nothing: look at how it sends now"
print(any(sent))
"""


@pytest.mark.parametrize(("asked", "sends"), [(None, "False"), ("0", "True"), ("1", "False")])
def test_nothing_is_sent_of_what_is_trained_unless_asked_for(
    tiny_model: Path, tmp_path: Path, asked: str | None, sends: str
) -> None:
    # TRL asks for nothing where CI is set
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name and name != "CI"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)} | ({"HF_HUB_DISABLE_TELEMETRY": asked} if asked else {})
    command = [sys.executable, "-c", SENDING, str(tiny_model), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == sends


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_run_follows_the_umask(tiny_model: Path, tmp_path: Path, umask: int) -> None:
    program = (
        "import os, sys; from pathlib import Path; os.umask(int(sys.argv[3])); from test_training import settings;"
    )
    program += "from offprincipal.training import train; from offprincipal import compare, make_delta, apply_delta;"
    program += (
        "out = Path(sys.argv[2]); train(settings(Path(sys.argv[1]), 'sft_own', steps=1), out / 'run', quiet=True);"
    )
    program += "compare(sys.argv[1], {'run': out / 'run'}, out=out / 'tables');"
    program += "make_delta(sys.argv[1], out / 'run', out / 'run.delta');"
    program += "apply_delta(sys.argv[1], out / 'run.delta', out / 'again')"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", program, str(tiny_model), str(tmp_path), str(umask)]
    subprocess.run(command, env=environment, check=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert len(files) > 12
    modes = {path.relative_to(tmp_path): oct(path.stat().st_mode & 0o777) for path in files}
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


LIMITED = """
import resource, sys
from pathlib import Path
from test_training import settings
from offprincipal.errors import FileError
from offprincipal.training import train
run = settings(Path(sys.argv[1]), "sft_own", steps=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    train(run, Path(sys.argv[2]), quiet=True)
except FileError as error:
    print(error)
else:
    print("whole")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a file's size is Linux's")
@pytest.mark.parametrize("share", [0.001, 0.5, 1.2, 2.5])
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(
    tiny_model: Path, tmp_path: Path, share: float
) -> None:
    """Shares of the model's own size: the record, the stored model, its masters, the optimizer's state do not fit."""
    limit = str(int(share * (tiny_model / "model.safetensors").stat().st_size))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LIMITED, str(tiny_model), str(tmp_path / "run"), limit]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cannot write" in done.stdout and "Free some space" in done.stdout
    again, whole = tmp_path / "run", tmp_path / "whole"
    for folder in (again, whole):
        train(settings(tiny_model, "sft_own", steps=2), folder, quiet=True)
    for name in ("model.safetensors", "masters/model.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_weights_along_the_way_are_kept_as_deltas_and_make_a_trajectory(tiny_model: Path, tmp_path: Path) -> None:
    run = settings(tiny_model, "sft_own", steps=4, learning_rate=1e-3, keep_deltas=2, keep_masters=True)
    train(run, tmp_path / "run", quiet=True)
    train(settings(tiny_model, "sft_own", steps=4, learning_rate=1e-3), tmp_path / "without", quiet=True)
    stored = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert stored == (tmp_path / "without" / "model.safetensors").read_bytes()
    deltas = tmp_path / "run" / "deltas"
    assert {path.name for path in deltas.iterdir()} == {"step_2.delta", "step_4.delta", "masters"}
    assert {path.name for path in (deltas / "masters").iterdir()} == {"step_2.safetensors", "step_4.safetensors"}
    apply_delta(tiny_model, deltas / "step_4.delta", tmp_path / "last")
    last, result = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "run"))
    assert last.keys() == result.keys() and all(torch.equal(last[name], result[name]) for name in result)
    found = trajectory(tiny_model, deltas).content
    assert found["steps"] == [2.0, 4.0] and found["pooled"]["path_length"] > 0
    kept = load_file(tmp_path / "run" / "masters" / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    moved = sum(float((kept[name].double() - base[name].double()).square().sum()) for name in kept)
    in_float32 = trajectory(tiny_model, deltas, masters=True).content["pooled"]
    assert in_float32["norms"][-1] == pytest.approx(moved**0.5, rel=1e-6)
    with pytest.raises(TrainingError, match="keep_masters keeps the float32 weights of the steps"):
        settings(tiny_model, "sft_own", steps=4, keep_masters=True)
    with pytest.raises(TrainingError, match="keep_deltas is not supported with an adapter"):
        settings(tiny_model, "sft_own", steps=4, keep_deltas=2, adapter={"method": "lora"})
