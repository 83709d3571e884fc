"""What a study shows while it runs: a row a stage where they fit on the screen, else those that run, and a sum."""

from collections.abc import Sequence
from io import StringIO

from rich.console import Console
from rich.text import Text

from offprincipal.paper.profile import Profile
from offprincipal.studies.console import stage_progress
from offprincipal.training import StepReport

HEIGHT = 12
CLEARED = "\x1b[2K"  # the terminal's order to clear a line
Said = Sequence[tuple[str, StepReport | str]]
STEP = StepReport("training", 3, 8, "reward", 0.25, 2.0)


def profile_of(stages: int) -> Profile:
    training = {"kind": "train", "recipe": "grpo", "tasks": ["add"]}
    return Profile(name="p", title="p", stages={f"run_{i}": training for i in range(stages)})


def screen(stages: int, said: Said) -> list[list[str]]:
    """The words of each row that a screen of twelve lines shows at last."""
    console = Console(file=StringIO(), force_terminal=True, width=100, height=HEIGHT)
    with stage_progress(profile_of(stages), console) as show:
        for stage, report in said:
            show(stage, report)
    last = console.file.getvalue().rpartition(CLEARED)[2]  # pictures follow each other, each after clearing the last
    rows = [[word for word in line.split() if "━" not in word] for line in Text.from_ansi(last).plain.splitlines()]
    return [row for row in rows if row]


def test_a_few_stages_have_a_row_each_from_the_start() -> None:
    rows = screen(3, [("run_0", "started"), ("run_0", "done"), ("run_1", "started"), ("run_1", STEP)])
    assert [row[0] for row in rows] == ["run_0", "run_1", "run_2"]
    assert rows[0][-1] == "done" and rows[2][-1] == "waiting"
    assert "reward 0.250" in " ".join(rows[1])


def test_of_many_stages_only_those_that_run_now_are_shown_below_how_many_ended() -> None:
    said: list[tuple[str, StepReport | str]] = [(f"run_{i}", "kept") for i in range(10)]
    said += [(f"run_{i}", "started") for i in (10, 11, 12)]
    said += [("run_11", "done"), ("run_12", STEP)]
    rows = screen(40, said)
    assert rows[0][:2] == ["stages", "11/40"]
    assert [row[0] for row in rows[1:]] == ["run_10", "run_12"]
    assert "reward 0.250" in " ".join(rows[2])


def test_when_all_ended_one_row_is_left() -> None:
    said = [(f"run_{i}", word) for i in range(40) for word in ("started", "done")]
    assert [row[:2] for row in screen(40, said)] == [["stages", "40/40"]]


def test_the_rows_are_as_many_as_the_screen_has_lines_but_one() -> None:
    assert len(screen(HEIGHT - 1, [])) == HEIGHT - 1
    assert [row[:2] for row in screen(HEIGHT, [])] == [["stages", "0/12"]]


def test_elsewhere_a_line_tells_what_happened() -> None:
    console = Console(file=StringIO(), width=100)
    with stage_progress(profile_of(40), console) as show:
        for report in ("started", STEP, STEP, "done"):
            show("run_7", report)
    lines = console.file.getvalue().splitlines()
    assert lines == ["run_7: started", "run_7: step 3/8, reward 0.250, 2.00 s/step, 0:10 left", "run_7: done"]
