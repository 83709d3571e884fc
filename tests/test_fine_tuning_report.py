"""Figures of fine-tuning methods: closed values from hand-made rows, the page, the console, and a browser."""

import json
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from outcome_rows import BASE, Row, curve_rows, masked, matched_row, outcome_row, sweep, write_outcomes
from rich.console import Console
from test_reports import CHROMIUM, compared, dom_of, own_part, study_of, tuned, visible_text

from offprincipal.errors import FileError
from offprincipal.reports.fine_tuning import fine_tuning_figures, masks, sweeps
from offprincipal.reports.report import write_report
from offprincipal.reports.terminal import fine_tuning_tables

HOSTILE = "<img src=x onerror=alert(3)>"
SOURCES = {"outcomes": ["outcomes"], "kl_curves": ["outcomes"]}


def rows_of_masks() -> tuple[list[Row], list[Row]]:
    kinds = [("safe", None), ("full", None), ("principal", 0.5)]
    outcomes = [masked(mask, density, seed, 0.5 + 0.1 * seed) for mask, density in kinds for seed in (2, 1)]
    curves = [
        *curve_rows("full_None_s1", [1.0, 2.0, 3.0]),
        *curve_rows("full_None_s2", [2.0, 4.0]),
        *curve_rows("safe_None_s1", [1.0, 1.0, 1.0]),
        *curve_rows("safe_None_s2", [2.0, 4.0]),
    ]
    return outcomes, curves


def rows_of_sweeps() -> list[Row]:
    lora = sweep("lora", 4, 1, {1e-3: 0.6, 3e-3: 0.7, 1e-2: 0.1})
    pissa = sweep("pissa", 4, 1, {1e-3: 0.65, 3e-3: 0.2})
    other = sweep("off_principal", 16, 2, {1e-2: 0.55})
    return [*lora, *pissa, *other, matched_row("update_norm", lora[1], 0.66, 1.1)]


def folder_of(tmp_path: Path, outcomes: Sequence[Row], curves: Sequence[Row]) -> Path:
    return write_outcomes(tmp_path / "outcomes", outcomes, curves).parent


def test_curves_areas_and_accuracies_are_by_seed_and_the_full_run_comes_first() -> None:
    found = masks(*rows_of_masks())
    assert [(of["mask"], of["density"]) for of in found["masks"]] == [
        ("full", None),
        ("safe", None),
        ("principal", 0.5),
    ]
    full, safe, principal = found["masks"]
    assert [run["seed"] for run in full["runs"]] == [1, 2]
    assert full["runs"][0] == {"seed": 1, "step": [1, 2, 3], "kl": [1.0, 2.0, 3.0], "area": None, "accuracy": 0.6}
    assert full["mean"] == {"step": [1, 2], "kl": [1.5, 3.0]}  # where every seed has a point
    assert [run["area"] for run in safe["runs"]] == [0.5, 0.0]  # (0 + 1 + 2) / (1 + 2 + 3)
    assert [run["area"] for run in principal["runs"]] == [None, None]  # not watched
    assert principal["mean"] == {"step": [], "kl": []}
    assert found["other_seeds"] == [0.5]  # (1 + 2) / (2 + 4)
    assert (full["trained"], safe["trained"], found["base"]) == (1.0, 0.75, BASE)


def test_without_a_full_run_or_a_mask_there_is_no_figure_of_masks() -> None:
    outcomes, curves = rows_of_masks()
    assert masks([row for row in outcomes if row["method"] != "full"], curves) == {}
    assert masks([row for row in outcomes if row["method"] == "full"], curves) == {}


def test_sweeps_are_by_method_and_rank_and_show_where_they_collapse() -> None:
    found = sweeps(rows_of_sweeps())
    lora, pissa, other = found["groups"]
    assert [(group["method"], group["rank"]) for group in found["groups"]] == [
        ("LoRA", 4),
        ("PiSSA", 4),
        ("off-principal LoRA", 16),
    ]
    runs = lora["sweeps"][0]["runs"]
    assert [run["collapsed"] for run in runs] == [False, False, True]
    assert [run["highest"] for run in runs] == [False, True, False]
    assert runs[1]["length"] == 3e-3 and runs[1]["kl"] == 0.3
    assert [group["sweeps"][0]["open"] for group in (lora, pissa, other)] == [None, None, "above"]
    assert (lora["sweeps"][0]["stable"], lora["sweeps"][0]["best"]) == (3e-3, 0.7)
    assert (lora["sweeps"][0]["shift"], lora["sweeps"][0]["shift_null"]) == (1e-3, 5e-4)
    assert (found["base"], found["least"]) == (BASE, 0.48)


def test_a_sweep_that_collapsed_at_once_has_no_shift_and_its_lowest_rate_as_a_bound() -> None:
    collapsed = sweeps(sweep("pissa", 4, 1, {1e-3: 0.1, 3e-3: 0.0}))["groups"][0]["sweeps"][0]
    assert (collapsed["stable"], collapsed["open"], collapsed["shift"]) == (1e-3, "below", None)


def test_a_matched_run_stands_beside_what_it_matches_and_its_method_at_that_rate() -> None:
    (run,) = sweeps(rows_of_sweeps())["matched"]
    assert (run["accuracy"], run["like"]["accuracy"], run["at_equal_rate"]) == (0.66, 0.7, 0.2)
    assert (run["ratio"], run["equal"], run["like"]["rate"]) == (1.1, True, 3e-3)
    rows = rows_of_sweeps()
    alone = [row for row in rows if row["method"] != "pissa" or row["matched_by"]]
    assert sweeps(alone)["matched"][0]["at_equal_rate"] is None
    gone = [row for row in rows if row["run"] != rows[-1]["matched_to"]]
    assert sweeps(gone)["matched"] == []


def test_figures_that_are_no_numbers_are_left_out() -> None:
    row = outcome_row("a", method="lora", rank=4, kl_to_base=float("nan"), relative_update_norm=float("inf"))
    run = sweeps([row])["groups"][0]["sweeps"][0]["runs"][0]
    assert run["kl"] is None and run["length"] is None
    json.dumps(run, allow_nan=False)


def test_only_a_study_of_outcomes_has_these_figures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *rows_of_masks())
    assert fine_tuning_figures(folder, None) == {}
    assert fine_tuning_figures(folder, {"sources": {"agreement": ["agreement"]}}) == {}
    assert set(fine_tuning_figures(folder, {"sources": SOURCES})) == {"masks", "runs"}
    with pytest.raises(FileError, match="nowhere"):
        fine_tuning_figures(folder, {"sources": {"outcomes": ["nowhere"]}})


def test_the_console_names_masks_rates_and_what_was_reached(tmp_path: Path) -> None:
    outcomes, curves = rows_of_masks()
    folder = folder_of(tmp_path, outcomes + rows_of_sweeps(), curves)
    console = Console(width=100, file=StringIO())
    console.print(*fine_tuning_tables(fine_tuning_figures(folder, {"sources": SOURCES})))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    for line in (
        "full 2 100 0.500 (other seeds) 60.0 to 70.0",
        "safe (its own density) 2 75.0 0 to 0.500 60.0 to 70.0",
        "principal at 0.5 2 50.0 – 60.0 to 70.0",
        "LoRA 4 1 0.003 70.0",
        "off-principal LoRA 16 1 ≥ 0.01 55.0",
        "PiSSA at update norm of LoRA 4 1 1.10 66.0 70.0",
    ):
        assert line in lines, "\n".join(lines)
    assert fine_tuning_tables({}) == []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study whose methods and masks have hostile names."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    comparison = compared(folder, {"full_s1": tuned(1e-3), "lora": tuned(1e-4)})
    outcomes, curves = rows_of_masks()
    odd = masked(HOSTILE, 0.5, 1) | {"run": HOSTILE}
    rows = [*outcomes, odd, *rows_of_sweeps(), *sweep(HOSTILE, 4, 1, {1e-3: 0.6})]
    like = rows_of_sweeps()[1]
    rows.append(matched_row("kl_to_base", like, 0.6, 2.0, method=HOSTILE))
    write_outcomes(folder / "outcomes", rows, [*curves, *curve_rows(HOSTILE, [1.0])])
    return write_report(folder / "report.html", comparison, study_of("full_s1") | {"sources": SOURCES})


def test_the_page_has_a_figure_of_each_and_no_name_in_it_is_markup(page: Path) -> None:
    own = own_part(page.read_text(encoding="utf-8"))
    for figure in ("masks", "mask-seeds", "rates", "lengths", "control"):
        assert f'id="figure-{figure}"' in own
    assert "<img" not in own and "&lt;img" in own
    assert not re.search(r"https?://|url\(|@import|<link", own)
    text = " ".join(visible_text(page.read_text(encoding="utf-8")).split())
    assert "off-principal LoRA 16 2 ≥ 0.01 55.0" in text
    assert "Student's t over runs or matched pairs of runs" in text
    assert not re.search(r"\b(None|nan|NaN|undefined°)\b", text.replace("None of the", ""))


@pytest.mark.parametrize("drawn", ["masks", "rates"])
def test_a_study_of_masks_or_of_sweeps_alone_has_a_page_too(drawn: str, tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"full_s1": tuned(1e-3)})
    outcomes, curves = rows_of_masks() if drawn == "masks" else (rows_of_sweeps(), [])
    write_outcomes(tmp_path / "outcomes", outcomes, curves)
    page = write_report(tmp_path / "report.html", comparison, study_of("full_s1") | {"sources": SOURCES})
    own = own_part(page.read_text(encoding="utf-8"))
    assert [f'id="figure-{name}"' in own for name in ("masks", "rates")] == [drawn == "masks", drawn == "rates"]


def test_a_study_without_such_runs_has_no_such_section(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"sft": tuned(1e-3)})
    drawn = own_part(write_report(tmp_path / "report.html", comparison, study_of("sft")).read_text(encoding="utf-8"))
    assert 'id="fine-tuning"' not in drawn and 'href="#fine-tuning"' not in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_a_browser_draws_the_figures_and_names_as_text(page: Path) -> None:
    dom = dom_of(page)
    body = dom[dom.rindex("<body") :]
    sections: dict[str, Any] = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', body, re.DOTALL))
    assert sections["masks"].count('class="main-svg"') >= 2
    assert sections["sweeps"].count('class="main-svg"') >= 3
    failure = re.search(r'<p id="failure"[^>]*>', body)
    assert failure and "hidden" in failure[0]
    for name in ("masks", "sweeps"):
        assert "&lt;img src=x" in sections[name] and "<img" not in sections[name]
    for legend in ("masks-legend", "sweeps-legend", "lengths-legend", "control-legend"):
        assert re.search(rf'id="{legend}"><span>', body)
