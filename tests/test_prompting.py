"""How problems are put to models of other kinds than the embedded one, and answers read from what they write."""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from offprincipal.errors import ModelError, OffPrincipalError, TaskError, TrainingError
from offprincipal.models import open_language_model
from offprincipal.reports.terminal import preview_lines
from offprincipal.studies.overrides import apply_override
from offprincipal.tasks import mixture, open_task, split_of
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.tasks.prompting import Prompting, is_character_level, prompting, read_answer
from offprincipal.training import TrainSettings, evaluate, parse_settings, train
from offprincipal.training.callbacks import NoSignal
from offprincipal.training.preview import preview
from offprincipal.training.settings_by_model import by_the_model

CHAT = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% if not enable_thinking %}<quiet>{% endif %}{% endif %}"
)
WORDS = ["Q: 12+7=\nA: 19\n\nQ: sort 312=\nA: 123\n", "The answer is <answer>7</answer>.\n", "count a b c d = ) \n"]


def tokenizer_of(chat: bool) -> Any:
    """Byte-level pairs, as real models have them, with a first token of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<eos>", "<pad>", "<bos>", "<end>", "<turn>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(20 * WORDS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.token_to_id("<bos>"))]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        additional_special_tokens=["<end>", "<turn>"],
    )
    if chat:
        found.chat_template = CHAT
    return found


def model_at(folder: Path, chat: bool, head_dim: int = 16) -> Path:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(chat)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_at(tmp_path_factory.mktemp("models") / "base", chat=False)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_at(tmp_path_factory.mktemp("models") / "chat", chat=True)


def asking(tokenizer: Any, names: tuple[str, ...] = ("add@1",), **settings: Any) -> Prompting:
    chosen = PromptSettings.model_validate(settings) if settings else None
    return prompting(chosen, tokenizer, map(open_task, names))


def test_what_is_not_said_follows_from_the_tokenizer(tiny_model: Path) -> None:
    characters = AutoTokenizer.from_pretrained(tiny_model, trust_remote_code=False)
    assert is_character_level(characters) and not is_character_level(tokenizer_of(False))
    assert asking(characters).settings.model_dump() == {"template": "plain"}
    few = asking(tokenizer_of(False)).settings
    assert few.model_dump() == {"template": "few_shot", "shots": 4, "stop": ("\n",)}
    assert asking(tokenizer_of(True)).settings.model_dump() == {"template": "chat", "answer": "tag"}
    assert asking(tokenizer_of(True), template="few_shot", shots=2).settings.shots == 2


def test_character_models_are_asked_as_ever(tiny_model: Path) -> None:
    opened = open_language_model(tiny_model)
    plain = asking(opened.tokenizer)
    for problem in mixture([open_task("add@1")], "eval", 8):
        assert plain.prompt(problem) == problem.prompt and plain.completion(problem.answer) == problem.answer
        assert plain.verify(problem, problem.answer) and not plain.verify(problem, problem.answer + "0")
    assert plain.stop_ids == () and plain.end_id == opened.tokenizer.eos_token_id


def test_shots_are_training_problems_and_never_the_one_that_is_asked() -> None:
    few = asking(tokenizer_of(False), ("add@1", "sort"), template="few_shot", shots=5)
    for problem in mixture([open_task("add@1"), open_task("sort")], "train", 200):
        *shots, asked = few.prompt(problem).split("\n\n")
        assert asked == f"Q: {problem.prompt}\nA:" and len(shots) == 5
        shown = [shot.removeprefix("Q: ").split("\nA: ")[0] for shot in shots]
        assert problem.prompt not in shown and len(set(shown)) == 5
        assert all(split_of(prompt) == "train" for prompt in shown)
        assert few.prompt(problem) == few.prompt(problem)


@given(st.text(alphabet="0123456789+=QA: \n", max_size=20))
def test_nothing_after_a_stop_is_judged(after: str) -> None:
    few = asking(tokenizer_of(False))
    (problem,) = mixture([open_task("add@1")], "eval", 1)
    assert few.verify(problem, f" {problem.answer}\n{after}")
    assert not few.verify(problem, f" {problem.answer}0\n{problem.answer}")
    assert few.cut(f"a\n{after}") == "a"


def test_every_token_that_holds_a_stop_ends_a_completion_there() -> None:
    tokenizer = tokenizer_of(False)
    few = asking(tokenizer)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    assert set(few.stop_ids) == {i for i, text in texts.items() if "\n" in text}
    assert len(few.stop_ids) > 1 and texts[few.end_id] == "\n"
    with pytest.raises(TaskError, match="no single token of the model contains the stop 'Question'"):
        asking(tokenizer, template="few_shot", stop=("Question",))


def test_answers_that_a_stop_would_cut_are_refused(tmp_path: Path) -> None:
    rows = [{"question": f"two lines of {i}", "answer": f"{i}\n{i}"} for i in range(60)]
    data = tmp_path / "lines.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=r"contain the stop '\\n', e\.g\."):
        asking(tokenizer_of(False), (f"hf:{data}",))
    assert asking(tokenizer_of(False), (f"hf:{data}",), template="few_shot", stop=()).settings.stop == ()
    spelled = f"hf:{data}?split=train"  # which the task itself leaves out of its name
    whole = asking(tokenizer_of(False), (spelled,), template="few_shot", stop=())
    (problem,) = mixture([open_task(spelled)], "eval", 1)
    assert whole.prompt(problem).endswith(f"Q: {problem.prompt}\nA:")


def test_chat_goes_through_the_tokenizers_template_with_one_first_token() -> None:
    tokenizer = tokenizer_of(True)
    (problem,) = mixture([open_task("add@1")], "eval", 1)
    chat = asking(tokenizer, template="chat", system="Be brief.", chat_options={"enable_thinking": True})
    text = chat.prompt(problem)
    assert text.startswith("<turn>system\nBe brief.<end>\n<turn>user\n" + problem.prompt)
    assert "<answer></answer>" in text and text.endswith("<turn>assistant\n")
    assert tokenizer(text).input_ids.count(tokenizer.bos_token_id) == 1
    assert asking(tokenizer).prompt(problem).endswith("<quiet>")
    assert chat.completion(problem.answer) == f"<answer>{problem.answer}</answer>"
    assert chat.verify(problem, f"I think <answer> {problem.answer} </answer>") and not chat.verify(
        problem, problem.answer
    )
    assert chat.end_id == tokenizer.convert_tokens_to_ids("<end>")
    with pytest.raises(TaskError, match="has no chat template"):
        asking(tokenizer_of(False), template="chat")


def test_answers_are_read_as_asked(tmp_path: Path) -> None:
    tokenizer, (problem,) = tokenizer_of(False), mixture([open_task("multiply@2")], "eval", 1)
    for kind, text in (
        ("exact", f" {problem.answer} "),
        ("number", f"first 3, then {problem.answer}."),
        ("boxed", rf"so \boxed{{{problem.answer}}}"),
        ("tag", f"<answer>1</answer> no, <answer>{problem.answer}</answer>"),
        ("math", rf"$\frac{{{2 * int(problem.answer)}}}{{2}}$"),
    ):
        way = asking(tokenizer, ("multiply@2",), template="plain", answer=kind)
        assert way.verify(problem, text), kind
        assert not way.verify(problem, text.replace(problem.answer, "1")) or kind == "math"
    assert read_answer("number", "no digits") == read_answer("boxed", r"\boxed{1") == read_answer("tag", "1") == ""
    assert read_answer("number", "−3 and 1,234.5") == "1234.5"
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def near(text, answer): return abs(int(text) - int(answer)) < 2\n"
        "def share(text, answer): return float('nan')\n"
        "word = 1\n"
    )
    near = asking(tokenizer, ("multiply@2",), template="plain", answer=f"{judge}:near")
    assert near.verify(problem, str(int(problem.answer) + 1)) and not near.verify(problem, "-1")
    for name, text, says in (
        ("near", "x", "failed on completion 'x': ValueError"),
        ("share", "1", "returned nan"),
        ("word", "1", "has no function 'word'"),
    ):
        with pytest.raises(TaskError, match=says):
            asking(tokenizer, ("multiply@2",), template="plain", answer=f"{judge}:{name}").verify(problem, text)
    with pytest.raises(TaskError, match="does not exist"):
        asking(tokenizer, ("multiply@2",), template="plain", answer="nowhere.py:f").verify(problem, "1")


def test_a_template_of_ones_own() -> None:
    tokenizer, (problem,) = tokenizer_of(False), mixture([open_task("add@1")], "eval", 1)
    own = asking(
        tokenizer, template="{% for s in shots %}{{ s.prompt }}{{ s.answer }};{% endfor %}{{ prompt }}", shots=2
    )
    assert own.prompt(problem).count(";") == 2 and own.prompt(problem).endswith(problem.prompt)
    for template, says in (
        ("{{ 1 }}", "does not contain the prompt"),
        ("{{ prompt", "not valid Jinja|fails"),
        ("{{ prompt.__class__.__mro__ }}", "does not contain the prompt|fails"),
    ):
        with pytest.raises(TaskError, match=says):
            asking(tokenizer, template=template).prompt(problem)


@pytest.mark.parametrize("template", ["{{ prompt }}", "{% for s in shots %}{{ s.prompt }}{% endfor %}{{ prompt }}"])
def test_a_template_is_taken_from_a_command_line_as_it_is(template: str) -> None:
    content: dict[str, Any] = {}
    apply_override(content, f"prompt.template={template}")
    assert content == {"prompt": {"template": template}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"template": "chatty"}, "no prompt template 'chatty'"),
        ({"answer": "guess"}, "no way 'guess'"),
        ({"template": "chat", "shots": 3}, "prompt.shots belongs to the template few_shot"),
        ({"template": "few_shot", "system": "x"}, "prompt.system belongs to the template chat"),
        ({"stop": [""]}, "empty text"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        parse_settings({"recipe": "grpo", "tasks": ["add"], "prompt": settings})


def run_of(model: Path, recipe: str, **more: Any) -> TrainSettings:
    small = {"steps": 2, "batch": 8, "rollouts_per_prompt": 4, "eval_prompts": 4, "eval_samples": 2, "device": "cpu"}
    return parse_settings({"recipe": recipe, "model": str(model), "tasks": ["add@1"]} | small | more)


@pytest.mark.parametrize("recipe", ["grpo", "sft_own"])
def test_a_run_asks_in_few_shots_ends_at_the_line_and_saves_a_model_as_it_was(
    recipe: str, base_model: Path, tmp_path: Path
) -> None:
    record = train(run_of(base_model, recipe), tmp_path / "run", quiet=True)
    settings = record["settings"]
    assert settings["prompt"] == {"template": "few_shot", "shots": 4, "stop": ["\n"]}
    assert (settings["max_new_tokens"], settings["eval_max_new_tokens"]) == (32, 40)
    before, after = (json.loads((at / "generation_config.json").read_text()) for at in (base_model, tmp_path / "run"))
    assert after["eos_token_id"] == before["eos_token_id"]
    assert train(run_of(base_model, recipe), tmp_path / "run", quiet=True) == record  # it is the same run
    if recipe == "grpo":  # a random model writes a line's end now and then: one token in twenty
        assert all(entry["tokens_per_completion"] < 32 for entry in record["log"])
    with pytest.raises(TrainingError, match="prompt is"):
        train(run_of(base_model, recipe, prompt={"shots": 2}), tmp_path / "run", quiet=True)


def test_what_is_learned_ends_as_the_prompt_asks(base_model: Path, chat_model: Path, monkeypatch: Any) -> None:
    import trl

    from offprincipal.training.recipes import build_trainer
    from offprincipal.training.trained import RunModels, prepare

    seen: dict[str, Any] = {}

    class Caught(Exception):
        pass

    def catch(**given: Any) -> None:
        seen.update(given)
        raise Caught

    monkeypatch.setattr(trl, "SFTTrainer", catch)
    for model, end in ((base_model, "\n"), (chat_model, "<end>")):
        run = by_the_model(run_of(model, "sft_own"))
        opened = open_language_model(model, "cpu")
        with pytest.raises(Caught):
            build_trainer(run, RunModels(opened, prepare(run, opened.model)), Path("nowhere"), [])
        row = seen["train_dataset"][0]
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert opened.tokenizer.decode(learned[-1:]) == end
        assert row["input_ids"].count(opened.tokenizer.bos_token_id) == 1
        text = opened.tokenizer.decode(learned[:-1])
        assert text.startswith(" " if end == "\n" else "<answer>")


def test_shots_that_do_not_fit_the_context_are_refused(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exceeds the model's context"):
        train(run_of(base_model, "grpo", prompt={"template": "few_shot", "shots": 90}), tmp_path / "run", quiet=True)


def test_any_option_of_trl_can_be_set_and_what_others_decide_cannot(base_model: Path, tmp_path: Path) -> None:
    record = train(run_of(base_model, "grpo", trl={"beta": 0.1}), tmp_path / "run", quiet=True)
    assert record["settings"]["trl"] == {"beta": 0.1} and all("kl_estimate" in entry for entry in record["log"])
    for options, says in (
        ({"max_steps": 3}, "trl.max_steps is not to be set, since a setting decides it: here it is steps"),
        ({"betta": 0.1}, "has no option 'betta': did you mean beta"),
        ({"loss_type": "magic"}, "TRL|magic|loss"),
    ):
        with pytest.raises((OffPrincipalError, ValueError), match=says):
            train(run_of(base_model, "grpo", trl=options), tmp_path / "other", quiet=True)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_is_asked_of_trl_by_its_own_options(
    mode: str, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL is let come as far as importing vllm; what it was told is in its own configuration."""
    from trl.trainer import grpo_trainer

    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    told: list[Any] = []
    begin, find = grpo_trainer.GRPOTrainer.__init__, importlib.util.find_spec

    def noted(self: Any, *positional: Any, **named: Any) -> None:
        told.append(named["args"])
        begin(self, *positional, **named)

    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "__init__", noted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: name == "vllm" or find(name, *of))
    asked = run_of(base_model, "grpo", vllm=mode, trl={"vllm_gpu_memory_utilization": 0.3})
    with pytest.raises(ImportError, match="vllm"):  # TRL's own attempt
        train(asked, tmp_path / "run", quiet=True)
    assert (told[0].use_vllm, told[0].vllm_mode, told[0].vllm_gpu_memory_utilization) == (True, mode, 0.3)


def test_vllm_where_there_is_none_is_refused_with_a_sentence(base_model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    with pytest.raises(TrainingError, match="vllm is not installed"):
        train(run_of(base_model, "grpo", vllm="colocate"), tmp_path / "run", quiet=True)
    with pytest.raises(TrainingError, match="vllm is a setting of grpo, dr_grpo and rloo, not of "):
        run_of(base_model, "sft_own", vllm="server")


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_is_computed_in_where_it_can_be_and_else_it_is_said(
    there: bool, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights stay float32 either way; where the processor cannot, the run is that in float32."""
    from offprincipal.training.recipes import run as recipe

    monkeypatch.setattr(recipe, "bfloat16_on_cpu", lambda: there)
    options: dict[str, Any] = {"eval_prompts": 0, "learning_rate": 1e-3}
    for compute in ("float32", "bfloat16"):
        train(run_of(base_model, "sft_own", compute=compute, **options), tmp_path / compute, quiet=True)
    weights = [load_file(tmp_path / compute / "masters" / "model.safetensors") for compute in ("float32", "bfloat16")]
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert same is not there and ("is computed in float32" in caplog.text) is not there
    assert all(tensor.dtype == torch.float32 for tensor in weights[1].values())


def test_trls_names_are_taken_too() -> None:
    values = {"max_steps": 7, "num_generations": 4, "max_completion_length": 9, "save_steps": 3, "batch": 8}
    found = parse_settings({"recipe": "grpo", "tasks": ["add"]} | values)
    assert (found.steps, found.rollouts_per_prompt, found.max_new_tokens, found.save_every) == (7, 4, 9, 3)
    with pytest.raises(TrainingError, match="max_steps is TRL's name for steps"):
        parse_settings({"recipe": "grpo", "tasks": ["add"], "steps": 7, "max_steps": 7})


def test_a_preview_shows_prompts_completions_and_verdicts(base_model: Path) -> None:
    found = preview(base_model, ["add@1", "sort@1"], count=3, max_new_tokens=6)
    assert found.settings.template == "few_shot" and [one.task for one in found.shown] == ["add@1", "sort@1", "add@1"]
    assert all(one.prompt.endswith("A:") and "\n" not in one.greedy for one in found.shown)
    lines = preview_lines(found)
    assert "shots 4" in lines[0] and any(line.startswith("Q: ") for line in lines)
    assert sum(line.startswith("→ greedy") for line in lines) == 3
    assert any(line.endswith("of 6 completions are right") for line in lines)
    command = [sys.executable, "-m", "offprincipal", "tasks", "--preview", "--model", str(base_model)]
    wrong = subprocess.run([*command, "--set", "prompt.template=chat"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "has no chat template" in wrong.stderr


def test_evaluation_asks_as_it_is_told(base_model: Path) -> None:
    options: dict[str, Any] = {"prompts": 6, "samples": 2, "max_new_tokens": 8, "device": "cpu"}
    told = PromptSettings.model_validate({"template": "few_shot", "shots": 4, "stop": ("\n",)})
    assert evaluate(base_model, ["add@1"], **options) == evaluate(base_model, ["add@1"], **options, prompt=told)
    opened = open_language_model(base_model, "cpu")
    itself, another = (evaluate(opened, ["add@1"], **options, reference=of) for of in (opened, base_model))
    assert itself == another and itself["kl_to_base"] == 0.0  # where it is the same, it is not even asked twice
    assert evaluate(base_model, "add@1, sort@1", **options) == evaluate(base_model, ["add@1", "sort@1"], **options)
    for model, tasks, more in ((opened.model, "add", {}), (base_model, 3, {}), (base_model, "add", {"prompts": "4"})):
        with pytest.raises(OffPrincipalError, match=r"save an open one first|tasks are 3|prompts is '4'"):
            evaluate(model, tasks, **options | more)
    plain = PromptSettings.model_validate({"template": "plain"})
    assert evaluate(base_model, ["add@1"], **options, prompt=plain) != evaluate(base_model, ["add@1"], **options)


class _State:
    def __init__(self) -> None:
        self.log_history: list[dict[str, float]] = []


@pytest.mark.parametrize(
    ("reward", "cut", "says"),
    [
        (-1.0, 0.5, "none was verified; 50% did not end"),
        (1.0, 0.0, "all were verified"),
        (0.0, 0.0, "alike in each prompt"),
    ],
)
def test_a_run_without_signal_says_so_once_and_why(
    reward: float, cut: float, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback, state = NoSignal(), _State()
    with caplog.at_level(logging.WARNING, logger="offprincipal"):
        for _ in range(9):
            state.log_history.append({"frac_reward_zero_std": 1.0, "reward": reward, "completions/clipped_ratio": cut})
            callback.on_log(None, state, None)
    (said,) = caplog.messages
    assert says in said and "tasks --preview" in said
    caplog.clear()
    callback, state = NoSignal(), _State()
    for alike in (1.0, 1.0, 0.9, *[1.0] * 9):  # one step that tells something is enough
        state.log_history.append({"frac_reward_zero_std": alike, "reward": -1.0})
        callback.on_log(None, state, None)
    assert not caplog.messages
