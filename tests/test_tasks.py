"""Tasks: splits never overlap, verifiers accept what is right and nothing else, seeds decide everything."""

import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offprincipal.errors import TaskError
from offprincipal.tasks import Task, mixture, open_task, problems, split_of, symbolic_kinds

SEEDS = st.integers(0, 2**32)
REASONING_GYM = "rg:chain_sum"
LONGEST_MEASURED_COMPLETION = 40


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local data set in the manner of GSM8K."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    sums = [{"question": f"What is {i} and {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i:,}"} for i in range(900)]
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return path


@pytest.fixture(scope="module", params=[*symbolic_kinds(), "add@3", REASONING_GYM, "hf"])
def task(request: pytest.FixtureRequest, rows: Path) -> Task:
    return open_task(f"hf:{rows}" if request.param == "hf" else request.param)


def test_training_and_evaluation_prompts_never_overlap(task: Task) -> None:
    held_out = {problem.prompt for problem in mixture([task], "eval", 60, seed=1)}
    trained = {problem.prompt for seed in (1, 2) for problem in mixture([task], "train", 300, seed)}
    assert held_out and trained and not held_out & trained


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(symbolic_kinds()), min_size=1, max_size=4), SEEDS, SEEDS)
def test_mixtures_with_any_seeds_never_overlap(kinds: list[str], train_seed: int, eval_seed: int) -> None:
    tasks = [open_task(kind) for kind in kinds]
    held_out = {problem.prompt for problem in mixture(tasks, "eval", 20, eval_seed)}
    assert not held_out & {problem.prompt for problem in mixture(tasks, "train", 60, train_seed)}


def test_answers_and_teacher_traces_verify_and_corrupted_ones_do_not(task: Task) -> None:
    for seed in range(40):
        problem = task.problem(seed)
        trace = task.teacher_trace(problem)
        assert task.verify(problem, problem.answer) and task.verify(problem, trace)
        wrong = problem.answer[:-1] + ("7" if problem.answer[-1] != "7" else "3")
        assert not task.verify(problem, wrong)
        assert not task.verify(problem, trace.replace(problem.answer, wrong))
        assert not task.verify(problem, "")


def test_a_seed_decides_the_problem_and_the_name_opens_the_task_again(task: Task) -> None:
    again = open_task(task.name)
    seeds = [*range(10), 20251111 * 1_000_003]
    assert [task.problem(seed) for seed in seeds] == [again.problem(seed) for seed in seeds]
    assert len({task.problem(seed).prompt for seed in range(50)}) > 10


def test_problem_data_is_json(task: Task) -> None:
    data = task.problem(3).data
    assert json.loads(json.dumps(dict(data))) == data


@pytest.mark.parametrize("kind", symbolic_kinds())
def test_one_prompt_has_one_answer_and_measured_completions_have_room_for_it(kind: str) -> None:
    task = open_task(kind)
    answers: dict[str, str] = {}
    for problem in map(task.problem, range(1500)):
        assert answers.setdefault(problem.prompt, problem.answer) == problem.answer
        assert len(problem.answer) <= 7 and len(task.teacher_trace(problem)) < LONGEST_MEASURED_COMPLETION


def test_about_a_tenth_is_held_out() -> None:
    held_out = sum(split_of(f"{a}+{b}=") == "eval" for a in range(100) for b in range(100))
    assert 900 < held_out < 1100


def test_a_task_with_too_few_prompts_says_so(tmp_path: Path) -> None:
    prompt = next(f"q{i}" for i in range(100) if split_of(f"q{i}") == "train")
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"question": prompt, "answer": "1"}]))
    with pytest.raises(TaskError, match="too few prompts"):
        next(problems(open_task(f"hf:{path}"), "eval"))


def test_a_mixture_needs_a_task() -> None:
    with pytest.raises(TaskError, match="at least one"):
        mixture([], "train", 4)


@pytest.mark.parametrize(
    "completion", ["1170", "1,170", "so it is $1170$.", "\\boxed{1,170}", "#### 1170", "585*2\n#### 1170.0"]
)
def test_data_set_answers_are_compared_as_mathematics(rows: Path, completion: str) -> None:
    task = open_task(f"hf:{rows}")
    problem = next(p for p in map(task.problem, range(900)) if p.answer == "1,170")
    assert task.verify(problem, completion)


def test_data_set_answers_that_are_no_mathematics_are_compared_as_text(tmp_path: Path) -> None:
    path = tmp_path / "capitals.csv"
    path.write_text("country,capital\nFrance,Paris\n")
    task = open_task(f"hf:{path}?prompt=country&answer=capital")
    problem = task.problem(0)
    assert task.verify(problem, "paris ") and not task.verify(problem, "Pairs") and not task.verify(problem, "42")


def test_a_row_is_read_once_however_often_it_is_asked_for(rows: Path) -> None:
    """A small data set holds out few prompts, and is gone through thousands of times for more."""
    task = open_task(f"hf:{rows}")
    data, read = task._rows, []  # type: ignore[attr-defined]

    class Counted:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return data[index]

    vars(task)["_rows"] = Counted()
    mixture([task], "eval", 200)
    assert len(read) == len(set(read)) <= len(data)


def test_a_folder_of_data_files_is_a_data_set(rows: Path) -> None:
    assert open_task(f"hf:{rows.parent}").problem(5).prompt == open_task(f"hf:{rows}").problem(5).prompt


def test_reasoning_gym_answers_may_be_bare_or_tagged() -> None:
    task = open_task(REASONING_GYM)
    problem = task.problem(7)
    assert task.verify(problem, f" {problem.answer}\n")
    assert task.verify(problem, f"<answer>0</answer> no, <answer> {problem.answer} </answer>")
    assert not task.verify(problem, f"{problem.answer} <answer>0</answer>")


def test_a_scorer_without_reference_answers_can_judge_but_not_teach() -> None:
    task = open_task("rg:graph_color")
    problem = task.problem(0)
    assert not task.verify(problem, "red")
    with pytest.raises(TaskError, match="no reference answers"):
        task.teacher_trace(problem)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adds", "no task 'adds': did you mean add"),
        ("openai/gsm8k", "rg:NAME of reasoning-gym; or hf:DATASET"),
        ("add@9", "add@1, add@2 or add@3"),
        ("rg:chain_sums", "did you mean chain_sum"),
        ("rg:composite", "with its defaults"),
        ("hf:?prompt=a", "is invalid"),
        ("hf:some/data?colour=red", "no option 'colour'"),
        ("hf:/nowhere/at/all.json", "is not there"),
    ],
)
def test_names_that_open_no_task_say_what_would(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        open_task(name)


def test_data_sets_without_the_column_or_rows_or_values_say_so(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(TaskError, match="no column 'solution': it has question, answer"):
        open_task(f"hf:{rows}?answer=solution")
    empty = tmp_path / "empty.csv"
    empty.write_text("question,answer\n")
    with pytest.raises(TaskError, match=r"no rows|cannot be read"):
        open_task(f"hf:{empty}")
    hole = tmp_path / "hole.json"
    hole.write_text(json.dumps([{"question": "1+1?", "answer": None}]))
    with pytest.raises(TaskError, match="row 0: column 'answer' is empty"):
        open_task(f"hf:{hole}").problem(0)
    other = tmp_path / "rows.txt"
    other.write_text("1+1 2")
    with pytest.raises(TaskError, match=r"must end in \.json"):
        open_task(f"hf:{other}")


def test_a_reader_of_the_library_is_no_data_set_and_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset("pandas")` takes the pickles of the working directory, and version 4.0.0 runs them."""
    packaged: Any = importlib.import_module("datasets.packaged_modules")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(tmp_path))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("a pickle was read"))
    for name in sorted({"pandas", "csv", *packaged._PACKAGED_DATASETS_MODULES}):
        with pytest.raises(TaskError, match=f"'{name}' is a loader of the datasets library, not a data set"):
            open_task(f"hf:{name}?prompt=a&answer=b").problem(0)


def test_a_folder_that_is_no_data_set_is_not_walked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offprincipal.tasks.hub_datasets._MOST_FILES", 20)
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    for i in range(30):
        (deep / f"{i}.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    with pytest.raises(TaskError, match="more than 20 files"):
        open_task(f"hf:{tmp_path}")
    for i in range(15):
        (deep / f"{i}.jsonl").unlink()
    assert open_task(f"hf:{deep}").problem(0).answer == "2"
