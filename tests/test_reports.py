"""Reports: what the words may claim, what the page may contain, and that a browser draws it without the network."""

import base64
import gzip
import json
import re
import shutil
import subprocess
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_folders import moved, stored, write_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from offprincipal.comparison import CompareSettings, compare, read_summary
from offprincipal.errors import FileError
from offprincipal.measures.columns import METRICS
from offprincipal.reports.figures import anatomy, choose_matrices, heatmaps, spectra
from offprincipal.reports.metric_words import is_listed, title_of
from offprincipal.reports.names import common_beginning, labels
from offprincipal.reports.numbers import number
from offprincipal.reports.page import PLOTLY, asset
from offprincipal.reports.report import write_report, write_report_of
from offprincipal.reports.terminal import anatomy_rows, comparison_table, figure_rows
from offprincipal.reports.words import ASK, answers, beyond, decisions, run_paragraph, verdict_paragraph
from offprincipal.reports.words import metrics_of as ladder_of

HOSTILE_RUN = "<script>alert(1)</script>"
HOSTILE_TENSOR = '"><img src=x onerror=alert(2)>'
CHROMIUM = shutil.which("chromium")
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (24, 32),
    "model.layers.1.self_attn.q_proj.weight": (24, 32),
    "model.layers.1.mlp.experts.0.up_proj.weight": (16, 32),
    "model.layers.1.mlp.experts.1.up_proj.weight": (16, 32),
    "model.layers.1.input_layernorm.weight": (32,),
    HOSTILE_TENSOR: (20, 30),
}
Tensors = dict[str, torch.Tensor]


def base_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: (0.05 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in SHAPES.items()}


def tuned(step: float, seed: int = 1) -> Tensors:
    """The base after a Gaussian update that ignores it."""
    return stored(moved(base_tensors(), step, seed))


def compared(tmp_path: Path, runs: dict[str, Tensors], settings: CompareSettings | None = None) -> Path:
    """The folder of a comparison of these runs with `base_tensors()`."""
    base = write_model(tmp_path / "base", base_tensors())
    folders = {name: write_model(tmp_path / f"run{i}", tensors) for i, (name, tensors) in enumerate(runs.items())}
    return compare(base, folders, settings, threads=1).write(tmp_path / "comparison")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compared(tmp_path_factory.mktemp("hostile"), {HOSTILE_RUN: tuned(1e-4), "sft": tuned(1e-3, seed=9)})


def study_of(run: str) -> dict[str, Any]:
    side = {"verdict": "supported", "effect": -0.09, "low": -0.1, "high": -0.08, "measure": "<i>share</i>", "rule": "r"}
    null = {"control": "rounding null", "verdict": "no effect beyond the control", "effect": None, "low": None}
    accuracy = {"greedy_accuracy": 0.6, "sampled_accuracy": 0.5, "sampled_accuracy_se": 0.02}
    return {
        "schema": 2,
        "profile": "quick",
        "claims": [
            {
                "id": "C5",
                "contrast": None,
                "statement": "<u>avoid</u>",
                "as_published": side,
                "controlled": null | {"high": None},
            }
        ],
        "runs": [{"name": run, "recipe": "grpo", "tasks": ["<s>add</s>"], "before": accuracy, "after": accuracy}],
        "base": {"name": "<em>base</em>", "parameters": 1234},
    }


def own_part(page: str) -> str:
    """The page without the Plotly bundle that it carries."""
    bundle = asset(PLOTLY)
    assert page.count(bundle) == 1
    return page.replace(bundle, "")


def visible_text(page: str) -> str:
    """What a reader sees: no scripts, no styles, no tags."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", own_part(page), flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", page)


def metrics_of(**values: float | None) -> dict[str, dict[str, float | None]]:
    return {name: {"value": value, "low": value, "high": value} for name, value in values.items()}


def overlap_metrics(observed: float, null: float, z: float | None) -> dict[str, dict[str, float | None]]:
    return metrics_of(
        unchanged_fraction=0.9,
        principal_overlap=observed,
        principal_overlap_random=0.5,
        principal_overlap_rounding_null=null,
        principal_overlap_margin_null=null,
        principal_z=z,
    )


def test_a_significant_but_tiny_effect_is_called_tiny_and_comes_with_its_size() -> None:
    said = run_paragraph("grpo", overlap_metrics(0.391, 0.389, 12.0))
    assert "more than that, but tiny (+0.20 percentage points, z = +12.0)" in said


def test_a_large_difference_that_is_not_significant_is_not_beyond_rounding() -> None:
    assert "nothing beyond that (−4.00 percentage points, z = −2.9)" in run_paragraph(
        "grpo", overlap_metrics(0.40, 0.44, -2.9)
    )


def test_a_significant_effect_is_named_by_its_size() -> None:
    assert "a small effect beyond that (−3.00" in run_paragraph("grpo", overlap_metrics(0.40, 0.43, -9.0))
    assert "a large effect beyond that (+10.00" in run_paragraph("grpo", overlap_metrics(0.53, 0.43, 40.0))


def rungs_of(rungs: tuple[float, ...], z: float | None, **more: float) -> dict[str, Any]:
    """A principal mask whose share of the changed entries each rung of the ladder moves."""
    names = ("_random", "_rounding_null", "_spacing_null", "_margin_null", "")
    shares = {f"principal_overlap{name}": share for name, share in zip(names, rungs, strict=True)}
    return metrics_of(unchanged_fraction=0.6, relative_update_norm=0.002, principal_z=z, **shares, **more)


@pytest.mark.parametrize(
    ("rungs", "z", "said"),
    [
        ((0.5, 0.5, 0.5, 0.5, 0.501), 0.2, "where chance alone would put them"),
        ((0.5, 0.4, 0.4, 0.4, 0.4), 0.2, "where precision alone would put them"),
        ((0.5, 0.4, 0.4, 0.43, 0.433), 9.0, "where precision and neurons would put them (a tiny rest beyond that)"),
        (
            (0.5, 0.4, 0.42, 0.45, 0.51),
            9.0,
            "6.00 percentage points more on principal weights than precision, magnitude and neurons would put there",
        ),
        ((0.5, 0.4, 0.4, 0.4, 0.4), None, "where precision would put them."),
    ],
)
def test_one_sentence_a_run_names_what_explains_it(rungs: tuple[float, ...], z: float | None, said: str) -> None:
    (sentence,) = decisions({"runs": {"run": {"metrics": rungs_of(rungs, z)}}, "pairs": []})
    assert sentence.startswith("run: 40.0") and said in sentence


@pytest.mark.parametrize(
    ("shift", "angle", "said"),
    [
        (1.1, 0.9, "are about those of a random update of equal norm (1.10 and 0.90 times)"),
        (0.5, 0.6, "are smaller than those of"),
        (2.0, 3.0, "are larger than those of"),
        (
            0.5,
            2.0,
            "and spectral shift and principal angle are 0.50 and 2.00 times those of a random update of equal norm",
        ),
    ],
)
def test_it_says_whether_the_norm_of_the_update_explains_how_far(shift: float, angle: float, said: str) -> None:
    lengths = {"spectral_shift": shift, "spectral_shift_stored_null": 1.0}
    lengths |= {"principal_angle_left_max_deg": angle, "principal_angle_left_max_deg_stored_null": 1.0}
    metrics = rungs_of((0.5, 0.4, 0.4, 0.4, 0.4), 0.0, **lengths)
    (sentence,) = decisions({"runs": {"run": {"metrics": metrics}}, "pairs": []})
    assert said in sentence


def test_the_sentence_has_the_energy_and_the_unchanged_weights_beside_their_nulls() -> None:
    lengths = {"spectral_shift": 1.0, "spectral_shift_stored_null": 1.0}
    energy = {"principal_energy": 0.99, "principal_energy_stored_null": 0.01}
    metrics = rungs_of((0.5, 0.5, 0.5, 0.5, 0.5), 0.0, unchanged_fraction_isotropic_null=0.05, **lengths, **energy)
    (sentence,) = decisions({"runs": {"run": {"metrics": metrics}}, "pairs": []})
    assert "40.0\xa0% of the weights changed (a random update of equal norm: 95.0\xa0%)" in sentence
    assert "spectral shift and principal energy are 1.00 and 99.0 times those of such an update" in sentence
    explained = run_paragraph("run", metrics)
    assert "would leave 5.0\xa0%: a large difference (+55.00 percentage points)" in explained
    assert "hold 99.0\xa0% of the update's energy, 99.0 times" in explained
    said = answers({"runs": {"run": {"metrics": metrics}}})["Length"]
    assert "the share of unchanged weights differs by 55.00 percentage points (60.0\xa0%, not 5.0\xa0%)" in said


def test_a_zero_has_no_sign() -> None:
    assert "nothing beyond that (0.00 percentage points, z = 0.0)" in run_paragraph(
        "run", overlap_metrics(0.4, 0.4 + 1e-9, -0.01)
    )


@pytest.fixture(scope="module")
def off_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs from a base in float32, whose weights lie between bfloat16 numbers."""
    root = tmp_path_factory.mktemp("off_grid")
    weights = {name: weight.float() * (1 + 1e-3) for name, weight in base_tensors().items()}
    runs = {f"run{seed}": write_model(root / str(seed), moved(weights, 1e-4, seed)) for seed in (1, 2)}
    return compare(write_model(root / "base", weights), runs, threads=1).write(root / "comparison")


def test_off_the_grid_precision_is_said_not_to_be_told_apart(off_grid: Path) -> None:
    summary = read_summary(off_grid)
    run, _, pair = decisions(summary)
    assert "where precision, magnitude or neurons alone would put them (precision cannot be told apart here)" in run
    why = "undefined here, since the base's weights are not bfloat16 numbers, so that precision cannot be told apart"
    assert f"rounding, spacing and margins are {why}" in pair and "nothing to chance" not in pair and "–" not in pair
    assert all(f"rounding and spacing alone are {why}" in paragraph for paragraph in verdict_paragraph(summary)[:-1])
    said = answers(summary)["Precision"]
    assert said.endswith("; precision cannot be told apart, since rounding alone is undefined.") and "–" not in said
    for mask in anatomy(summary):
        for row in mask["runs"]:
            precision, magnitude, neurons, beyond_all, untold = row["parts"]
            assert [precision, magnitude, neurons] == [None] * 3  # in the colour of what is not told apart
            assert untold + beyond_all == pytest.approx(row["measured"], abs=0.02)


def test_where_every_null_is_undefined_what_lies_off_chance_is_said_and_not_explained() -> None:
    metrics = metrics_of(principal_overlap=0.4, principal_overlap_random=0.5, principal_overlap_rounding_null=None)
    summary: dict[str, Any] = {"runs": {"run": {"metrics": metrics}}, "pairs": []}
    assert decisions(summary) == [
        "run: 10.00 percentage points fewer on principal weights than chance would put there "
        "(precision cannot be told apart here)."
    ]
    ((row,),) = (mask["runs"] for mask in anatomy(summary))
    assert row["parts"] == [None] * 4 + [-10.0]


def test_a_figure_that_is_not_of_every_matrix_is_marked(hostile: Path) -> None:
    summary = read_summary(hostile)
    metrics = summary["runs"]["sft"]["metrics"]
    whole = metrics["relative_update_norm"]["matrices"]
    for name in ("principal_angle_left_max_deg", "principal_angle_left_max_deg_stored_null"):
        metrics[name] = metrics[name] | {"matrices": whole - 2}
    console = Console(width=200, file=StringIO(), force_terminal=False)
    console.print(comparison_table(summary))
    printed = console.file.getvalue()
    said = " ".join(printed.split())
    (row,) = [line for line in printed.splitlines() if line.strip().startswith("angle left")]
    assert row.count("†") == 1 and f"† not of every matrix: angle left of {whole - 2} of {whole}," in said
    located = metrics["principal_overlap_rounding_null"]["matrices"]  # of the others too few entries changed
    (ladder, *_) = [line for line in anatomy_rows(summary) if line[0] == "sft"]
    assert located < whole and ladder[-2].endswith("†") and f"principal of {located} of {whole}" in said


def test_digits_are_kept_though_they_are_zeros() -> None:
    summary = {"runs": {"run": {"metrics": metrics_of(relative_update_norm=0.0082, principal_angle_left_max_deg=90.0)}}}
    cells = {row[0]: row[1] for row in figure_rows(summary)}
    assert cells == {"relative update norm": "0.00820", "angle left, °": "90.0 (–)"}


def test_of_many_pairs_the_few_that_agree_beyond_the_ladder_are_told_of() -> None:
    def pair(b: str, found: float, z: float) -> dict[str, Any]:
        nulls = {"jaccard_random": 0.2, "jaccard_rounding_null": 0.3, "jaccard_margin_null": 0.3}
        return {"run_a": "a", "run_b": b, "jaccard": found, "jaccard_z": z} | nulls

    pairs = [pair(f"b{i}", 0.31, 1.0) for i in range(5)] + [pair("close", 0.9, 80.0), pair("near", 0.5, 20.0)]
    said = decisions({"runs": {}, "pairs": pairs}, ASK)
    assert said[0].startswith("a and close") and said[1].startswith("a and near") and len(said) == 3
    rest = "The other 5 pairs of runs changed the same entries about as often as the nulls explain"
    assert said[2] == f"{rest} (--explain has each)."


def test_where_rounding_decides_everything_nothing_is_claimed_beyond_it() -> None:
    assert "these leave nothing to chance here" in run_paragraph("grpo", overlap_metrics(1.0, 1.0, None))


def test_the_answer_names_the_largest_difference_that_rounding_leaves() -> None:
    runs = {"a": overlap_metrics(0.391, 0.389, 12.0), "b": overlap_metrics(0.45, 0.44, 1.0)}
    said = answers({"runs": {name: {"metrics": metrics} for name, metrics in runs.items()}})
    assert list(said) == ["Precision"]
    assert "+0.20 percentage points, which is tiny" in said["Precision"]


def test_undefined_metrics_are_left_out_of_the_words() -> None:
    said = run_paragraph("run", metrics_of(unchanged_fraction=0.5, relative_update_norm=None, principal_overlap=None))
    assert said == "run: 50.0\xa0% of the weights changed; 50.0\xa0% are bit-identical in bfloat16."


def test_control_characters_in_names_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in run_paragraph("a\x1b[2J", overlap_metrics(0.4, 0.4, 0.0))


def test_words_of_a_real_comparison_name_every_run_and_pair_and_no_missing_value(hostile: Path) -> None:
    for sentences in (verdict_paragraph, decisions):
        _require_words(sentences(read_summary(hostile)))


def _require_words(paragraphs: list[str]) -> None:
    assert [text.split(":")[0] for text in paragraphs[:2]] == [HOSTILE_RUN, "sft"]
    assert len(paragraphs) == 3 and "Jaccard" in paragraphs[2]
    assert not re.search(r"\b(None|nan|NaN|inf)\b", " ".join(paragraphs))


def test_names_are_escaped_everywhere(hostile: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", hostile, study_of(HOSTILE_RUN)).read_text(encoding="utf-8")
    own = own_part(page)
    for raw in (HOSTILE_RUN, "<img", "<i>share", "<u>avoid", "<s>add", "<em>base"):
        assert raw not in own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in own
    data = data_in(tmp_path / "report.html")
    assert data["runs"] == [HOSTILE_RUN, "sft"]
    assert HOSTILE_TENSOR in [matrix["tensor"] for matrix in data["spectra"]["matrices"]]


def test_the_page_refers_to_nothing_outside_itself(hostile: Path, tmp_path: Path) -> None:
    own = own_part(write_report(tmp_path / "report.html", hostile, study_of("sft")).read_text(encoding="utf-8"))
    assert "default-src 'none'" in own
    assert not re.search(r"https?://|url\(|@import|<link|<iframe|<[^>]*\ssrc=", own)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', own))


def test_many_runs_of_which_the_same_is_to_be_said_share_a_sentence() -> None:
    def run(unchanged: float) -> dict[str, Any]:
        return {"metrics": {"unchanged_fraction": {"value": unchanged}, "relative_update_norm": {"value": 1e-3}}}

    runs = {"a_1": run(0.9), "still_1": run(1.0), "still_2": run(1.0), "a_2": run(0.95)}
    said = decisions({"runs": runs, "pairs": []})
    assert [re.split("[: ]", text)[0] for text in said] == ["a_1", "a_2", "still_1", "still_2"]
    many = runs | {"a_3": run(0.8), "a_4": run(0.7)}
    shared = decisions({"runs": many, "pairs": []})
    assert shared[:2] == [
        "a_1, a_2: 5.0 to 10.0\xa0% of the weights changed.",
        "a_3, a_4: 20.0 to 30.0\xa0% of the weights changed.",  # twice and more as many is another thing
    ]
    assert [text.split()[0] for text in shared[2:]] == ["still_1", "still_2"]


@pytest.mark.parametrize("begin", ["", "sft_traces_", "llama-3-8b-instruct-grpo-on-mathematics/step-"])
@pytest.mark.parametrize("count", [1, 3, 4, 20])
def test_a_table_of_many_runs_fits_80_columns_and_cuts_nothing(hostile: Path, begin: str, count: int) -> None:
    summary = json.loads((hostile / "summary.json").read_text())
    run = summary["runs"]["sft"]
    names = [f"{begin}{100 + i}" for i in range(count)]
    console = Console(width=80, file=StringIO(), force_terminal=False)
    console.print(comparison_table(summary | {"runs": dict.fromkeys(names, run)}))
    printed = console.file.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines())
    shift = run["metrics"]["spectral_shift"]["value"]
    assert printed.count(f"{number(shift)} (") == count
    told_apart = [name if count == 1 or len(begin) < 12 else f"…{name.removeprefix(begin)}" for name in names]
    assert count == 1 or all(name in printed for name in told_apart)
    assert "…" not in re.sub(r"…\d", "", printed)


def test_no_path_of_this_machine_is_on_a_page(hostile: Path, tmp_path: Path) -> None:
    summary = json.loads((hostile / "summary.json").read_text())
    places = [summary["base"], *(run["source"] for run in summary["runs"].values())]
    assert all(Path(place).is_absolute() for place in places)
    for study in (None, study_of("grpo") | {"base": {"name": summary["base"], "parameters": 7}}):
        page = write_report(tmp_path / "report.html", hostile, study).read_text(encoding="utf-8")
        assert "offprincipal compare" in page
        assert not any(str(Path(place).parent) in page for place in places)


def test_a_page_of_checkpoints_that_lie_apart_names_their_folders_alone(hostile: Path, tmp_path: Path) -> None:
    shutil.copytree(hostile, tmp_path / "apart")
    summary = json.loads((hostile / "summary.json").read_text())
    summary["base"] = "/home/me/models/base-7b"
    for name, run in summary["runs"].items():
        run["source"] = f"/scratch/me/{len(name)}/tuned-7b"
    (tmp_path / "apart" / "summary.json").write_text(json.dumps(summary))
    page = write_report(tmp_path / "report.html", tmp_path / "apart").read_text(encoding="utf-8")
    assert "tuned-7b" in page and "base-7b" in page and "/me/" not in page


def test_undefined_values_are_dashes(tmp_path: Path) -> None:
    """Of one run; what is undefined of all has no column."""
    comparison = compared(tmp_path, {"same": base_tensors(), "moved": tuned(1e-3)})
    page = write_report(tmp_path / "report.html", comparison).read_text(encoding="utf-8")
    text = visible_text(page)
    assert text.count("–") > 5
    assert not re.search(r"\b(None|nan|NaN|undefined°)\b", text.replace("None of the", ""))


def test_a_checkpoint_equal_to_its_base_is_said_to_be(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"same": base_tensors(), "moved": tuned(1e-3)})
    same, _, pair = verdict_paragraph(read_summary(comparison))
    assert same.startswith("same is identical to the base")
    assert "share no changed entry" in pair
    write_report(tmp_path / "report.html", comparison)


@pytest.mark.parametrize("group", ["location", "spectrum", "subspace", "bounds"])
def test_one_group_of_metrics_suffices(tmp_path: Path, group: Any) -> None:
    comparison = compared(tmp_path, {"run": tuned(1e-3)}, CompareSettings(metrics=(group,)))
    text = visible_text(write_report(tmp_path / "report.html", comparison).read_text(encoding="utf-8"))
    assert "Agreement needs two runs" in text
    assert ("Spectra were not measured" in text) == (group in ("location", "bounds"))


def test_experts_share_a_cell_of_the_heatmap(hostile: Path) -> None:
    table = pq.read_table(hostile / "matrices.parquet")
    found = heatmaps(table, [HOSTILE_RUN, "sft"])
    row, column = found["roles"].index("up"), found["layers"].index("1")
    metric = [about["name"] for about in found["metrics"]].index("row_gini")
    ginis = [
        line["row_gini"]
        for line in table.to_pylist()
        if line["run"] == "sft" and line["role"] == "up" and line["layer"] == 1
    ]
    assert len(ginis) == found["counts"][row][column] == 2
    assert found["values"][metric][1][row][column] == pytest.approx(sum(ginis) / 2, rel=1e-3)


def test_only_the_most_dispersed_matrices_are_kept_in_the_order_of_the_table(hostile: Path) -> None:
    table = pq.read_table(hostile / "matrices.parquet")
    chosen = choose_matrices(table, ["row_dispersion", "no_such_metric"], 2)
    largest: dict[str, float] = {}
    for line in table.to_pylist():
        if line["row_dispersion"] is not None:
            largest[line["tensor"]] = max(largest.get(line["tensor"], 0), line["row_dispersion"])
    assert set(chosen.tensors) == set(sorted(largest, key=lambda name: -largest[name])[:2])
    assert chosen.available == len(largest) == 5


def test_the_same_comparison_gives_the_same_bytes(hostile: Path, tmp_path: Path) -> None:
    first, second = (write_report(tmp_path / name, hostile).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_report_is_drawn_anew_from_the_folder_of_a_comparison_or_of_a_study(hostile: Path, tmp_path: Path) -> None:
    shutil.copytree(hostile, tmp_path / "comparison")
    alone = write_report_of(tmp_path / "comparison")
    assert alone == tmp_path / "comparison" / "report.html" and "As published" not in alone.read_text("utf-8")
    (tmp_path / "study.json").write_text(json.dumps(study_of("sft") | {"comparison": "comparison"}))
    assert "As published" in write_report_of(tmp_path).read_text("utf-8")


def test_a_folder_without_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=re.escape(str(tmp_path))):
        write_report(tmp_path / "report.html", tmp_path)


shares = st.none() | st.floats(0, 1)


@given(rungs=st.lists(shares, min_size=3, max_size=3), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_parts_of_an_anatomy_add_up_to_what_was_measured(
    rungs: list[float | None], ends: tuple[float, float]
) -> None:
    names = ("_random", "_rounding_null", "_spacing_null", "_margin_null", "")
    values = dict(zip((f"principal_overlap{name}" for name in names), (ends[0], *rungs, ends[1]), strict=True))
    (found,) = anatomy({"runs": {"rl": {"metrics": metrics_of(**values)}}})
    (run,) = found["runs"]
    assert sum(part or 0 for part in run["parts"]) == pytest.approx(run["measured"], abs=0.03)  # four digits are drawn
    known = [rung is not None for rung in (ends[0], *rungs, ends[1])]
    assert [part is not None for part in run["parts"][:-1]] == [below and above for below, above in pairwise(known)]
    assert (run["parts"][-1] is None) == all(known)  # what spans an undefined rung is of none of them alone


def test_without_a_mask_there_is_no_anatomy() -> None:
    assert anatomy({"runs": {"rl": {"metrics": metrics_of(unchanged_fraction=0.5)}}}) == []


def test_shifts_are_drawn_of_matrices_whose_spectra_are_known_in_part(tmp_path: Path) -> None:
    """Beyond min(rows, columns) = 256 the curves of base and run end where each is resolved no more."""
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: (0.05 * torch.randn(320, 400, generator=torch.Generator().manual_seed(0))).bfloat16()}
    base_folder = write_model(tmp_path / "base", base)
    run_folder = write_model(tmp_path / "run", stored(moved(base, 1e-3, 1)))
    folder = compare(base_folder, {"rl": run_folder}, threads=1).write(tmp_path / "comparison")
    (matrix,) = spectra(pq.read_table(folder / "matrices.parquet"), folder / "curves.parquet", ["rl"])["matrices"]
    shift, values = matrix["runs"][0]["shift"], matrix["base"]
    assert (matrix["role"], matrix["layer"]) == ("up", "0")
    assert len(shift["x"]) == 40 and max(map(abs, shift["y"])) < 0.05 * max(values["y"])
    if CHROMIUM:  # the axis of the shifts ends with them, that of the values with all values
        dom = dom_of(write_report(tmp_path / "report.html", folder))
        figure = dom[dom.rindex("<body") :].split('id="figure-spectra"')[1]
        ends = [max(map(int, re.findall(rf'class="{axis}tick"><text[^>]*>(\d+)<', figure))) for axis in ("x", "x3")]
        assert ends[0] > 250 and ends[1] <= 40


def dom_of(page: Path, state: str = "", *more: str) -> str:
    """The page's elements after a headless browser ran its scripts.

    Args:
        state: what stands behind # in the address.
        more: options of the browser.
    """
    assert CHROMIUM
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
    ]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    address = page.as_uri() + (f"#{state}" if state else "")
    command = [CHROMIUM, *flags, *more, profile, "--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=180).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_a_browser_draws_every_figure_without_an_error(hostile: Path, tmp_path: Path) -> None:
    dom = dom_of(write_report(tmp_path / "report.html", hostile, study_of("sft")))
    body = dom[dom.rindex("<body") :]
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', body, re.DOTALL))
    for name in ("training", "location", "pairs", "layers", "spectra", "stripes"):
        assert 'class="main-svg"' in sections[name], name
    failure = re.search(r'<p id="failure"[^>]*>', body)
    assert failure and "hidden" in failure[0]
    assert "alert(1)&lt;/script&gt;" in sections["location"]  # the hostile name is a label, as text
    assert "<img src" not in body.split('<script type="application/gzip"')[0]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_the_address_holds_which_runs_are_shown_and_what_was_chosen_and_opens_a_claim(
    hostile: Path, tmp_path: Path
) -> None:
    page = write_report(tmp_path / "report.html", hostile, study_of("sft"))
    dom = dom_of(page, "claim-1&off=0&heat-metric=1", "--blink-settings=preferredColorScheme=0")
    body = dom[dom.rindex("<body") :].split('<script type="application/gzip"')[0]
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', body, re.DOTALL))
    assert re.search(r'<details class="card" id="claim-1" open', sections["claims"])
    assert 'data-theme="dark"' in dom and "rgb(20, 26, 34)" in sections["location"]
    chips = body.split('id="shown-runs"')[1].split("</div>")[0]
    assert re.findall(r'aria-pressed="(\w+)"', chips) == ["false", "true"]
    assert re.search(r'id="theme" aria-pressed="true"', body)  # of a dark page
    figure = sections["location"].split('id="figure-overlaps"')[1].split('class="legend"')[0]
    assert "sft" in figure and "alert(1)" not in figure
    assert 'aria-label="Figure: Which weights changed' in sections["location"]


def data_in(page: Path) -> dict[str, Any]:
    """What a page draws."""
    packed = page.read_text(encoding="utf-8").split('id="data">')[1].split("<")[0]
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return found


def test_the_tables_of_a_page_are_data_numbers_in_full_under_one_row_of_titles(hostile: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", hostile, study_of("sft"))
    summary, tables = read_summary(hostile), data_in(page)["tables"]
    of_page = set(re.findall(r'data-table="([^"]+)"', page.read_text(encoding="utf-8")))
    assert of_page == {"runs", "location", "training", "claims"} and of_page | {"pairs"} == set(tables)
    assert all(len(row) == len(table[0]) for table in tables.values() for row in table)
    rows = {name: [dict(zip(table[0], row, strict=True)) for row in table[1:]] for name, table in tables.items()}
    for row in rows["runs"]:
        metrics = summary["runs"][row["run"]]["metrics"]
        assert row["spectral_shift"] == metrics["spectral_shift"]["value"]
        assert row["spectral_shift_low"] == metrics["spectral_shift"]["low"]
        assert row["spectral_shift_stored_null"] == metrics["spectral_shift_stored_null"]["value"]
    assert rows["pairs"] == summary["pairs"]
    located = {(row["run"], row["mask"]): row for row in rows["location"]}["sft", "principal"]
    assert located["margins"] == ladder_of(summary["runs"]["sft"])["principal_overlap_margin_null"]["value"]
    assert rows["claims"][0]["as_published_effect"] == -0.09
    assert rows["training"][0]["after_sampled_accuracy_se"] == 0.02


def test_runs_beyond_the_number_of_colours_are_told_apart_by_a_mark(hostile: Path, tmp_path: Path) -> None:
    folder, names = Path(shutil.copytree(hostile, tmp_path / "many")), [f"run {i}" for i in range(23)]
    summary = read_summary(hostile)
    runs = dict.fromkeys(names, summary["runs"]["sft"])
    (folder / "summary.json").write_text(json.dumps(summary | {"runs": runs, "pairs": []}))
    table = pq.read_table(hostile / "matrices.parquet")
    of_sft = [row for row in table.to_pylist() if row["run"] == "sft"]
    pq.write_table(
        pa.Table.from_pylist([row | {"run": name} for name in names for row in of_sft], table.schema),
        folder / "matrices.parquet",
    )
    page = write_report(tmp_path / "report.html", folder)
    data, text = data_in(page), page.read_text("utf-8")
    assert len({*zip(data["colours"], data["symbols"], strict=True)}) == 23
    swatches = re.findall(r'<li data-runs="\d+"><span class="(swatch mark-[^"]+)" style="([^"]+)"', text)
    assert len(set(swatches)) == 23


@given(st.lists(st.text("ab-_1", max_size=40), unique=True), st.integers(12, 26))
def test_labels_tell_names_apart_and_keep_to_their_room_where_a_cut_does(names: list[str], limit: int) -> None:
    found = labels(names, limit)
    assert len(set(found)) == len(names)
    assert all(len(label) <= limit for label in found) or any(label in names for label in found)


LONG = "experiment-2026-gsm8k-"


def as_many(hostile: Path, folder: Path, names: list[str], pairs: list[dict[str, Any]]) -> Path:
    """The comparison of one run, as though it were of several that differ in their names alone."""
    shutil.copytree(hostile, folder)
    summary = read_summary(hostile)
    runs = dict.fromkeys(names, summary["runs"]["sft"])
    (folder / "summary.json").write_text(json.dumps(summary | {"runs": runs, "pairs": pairs}))
    for table in ("matrices", "masks"):
        found = pq.read_table(hostile / f"{table}.parquet")
        rows = [row | {"run": name} for name in names for row in found.to_pylist() if row["run"] == "sft"]
        pq.write_table(pa.Table.from_pylist(rows, found.schema), folder / f"{table}.parquet")
    return folder


def pair_of(a: str, b: str, found: float) -> dict[str, Any]:
    nulls = {"jaccard_random": 0.2, "jaccard_rounding_null": 0.3, "jaccard_spacing_null": 0.3}
    about = {"jaccard_margin_null": 0.3, "jaccard_z": 1.0, "update_cosine": 0.1, "low": found, "high": found}
    return {"run_a": a, "run_b": b, "jaccard": found} | nulls | about


@pytest.fixture(scope="module")
def of_twenty(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of twenty runs whose names begin alike; the last pairs agree most."""
    names = [f"{LONG}run{i:02d}" for i in range(20)]
    every = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs = [pair_of(a, b, 0.3 + 1e-3 * place) for place, (a, b) in enumerate(every)]
    root = tmp_path_factory.mktemp("twenty")
    return write_report(root / "report.html", as_many(hostile, root / "comparison", names, pairs))


def test_names_that_begin_alike_are_told_apart_and_their_beginning_stands_once(of_twenty: Path) -> None:
    text, data = of_twenty.read_text("utf-8"), data_in(of_twenty)
    assert f"<b>{LONG}</b>" in text and common_beginning(data["runs"]) == LONG
    for table in ("runs", "location"):
        rows = text.split(f'data-table="{table}"')[1].split("</table>")[0]
        named = re.findall(r'<td class="name"><div>.*?<span title="([^"]+)">([^<]+)</span></div>', rows)
        assert named == [(f"{LONG}run{i:02d}", f"…run{i:02d}") for i in range(20)]
        assert data["tables"][table][1][0] == f"{LONG}run00"  # whole in what is saved
    legend = text.split('id="figure-overlaps"')[0].rsplit('<div class="legend">', 1)[1]
    assert f'<span title="{LONG}run07"' in legend and "…run07</span>" in legend
    assert [wide for _, wide, _ in data["labels"]] == [f"…run{i:02d}" for i in range(20)]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_of_many_pairs_the_furthest_from_the_margin_null_are_drawn_and_all_on_request(of_twenty: Path) -> None:
    def drawn(state: str) -> tuple[list[str], str]:
        dom = dom_of(of_twenty, state)
        section = dom[dom.rindex("<body") :].split('<section id="pairs">')[1].split("</section>")[0]
        ticks = re.findall(r'class="ytick"><text[^>]*>([^<]+)<', section)
        return ticks, re.findall(r'id="pairs-caption">([^<]*)<', section)[0]

    few, caption = drawn("")
    assert len(few) == 30 and few[0] == "…run18 · …run19" and "Of 190 pairs of runs, the 30" in caption
    every, caption = drawn("pairs&pairs-shown=all")
    assert len(every) == 190 and caption == ""


def test_metrics_are_listed_in_words_each_its_own_and_no_null_or_standard_deviation(hostile: Path) -> None:
    columns = [column for metric in METRICS for column in metric.columns]
    listed = {column.name: title_of(column.name, column.meaning) for column in columns if is_listed(column.name)}
    assert len(set(listed.values())) == len(listed) < len(columns) / 2
    assert not any("_" in title or title.startswith(("the same", "its ")) for title in listed.values())
    drawn = heatmaps(pq.read_table(hostile / "matrices.parquet"), ["sft"])["metrics"]
    reached = {drawn[place]["name"] for metric in drawn for place, _ in metric["nulls"]}
    assert {metric["name"] for metric in drawn if not metric["listed"]} == reached
    assert not any(metric["name"].endswith(("_sd", "_se")) for metric in drawn)
    assert {"base_norm", "changed_count"} <= set(listed)


def test_terms_are_linked_to_definitions_and_principal_weights_are_defined_where_they_are_first_named(
    hostile: Path, tmp_path: Path
) -> None:
    page = own_part(write_report(tmp_path / "report.html", hostile, study_of("sft")).read_text("utf-8"))
    linked = set(re.findall(r'href="#(term-[^"]+)"', page))
    assert {"term-principal-weights", "term-relative-update-norm", "term-z"} <= linked
    assert linked <= set(re.findall(r'id="(term-[^"]+)"', page))
    text = re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", "", page, flags=re.DOTALL)
    said = " ".join(text.split())
    first = said.index("principal weights")
    assert said[first:].startswith("principal weights (of each matrix the 50.0 % of the entries that are largest")
    assert not re.search(r"\b(ladder|rungs?)\b", said)


def test_the_board_of_claims_comes_first_on_the_page_of_a_study(hostile: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", hostile, study_of("sft")).read_text("utf-8")
    assert re.findall(r'<section id="(\w+)">', page)[:3] == ["claims", "training", "runs"]


def test_the_pages_of_a_folder_s_profiles_lead_to_each_other(hostile: Path, tmp_path: Path) -> None:
    def links(page: str) -> list[str]:
        text = (tmp_path / page).read_text("utf-8")
        return re.findall(r'href="([^#"]*)"', text.split("<!--profiles-->")[1].split("<!--/profiles-->")[0])

    page, study = tmp_path / "report.html", study_of("sft")
    for former, profile in pairwise(("", "quick", "full", "other")):
        if former:
            page.rename(tmp_path / f"report-{former}.html")  # as a study sets it aside
        write_report(page, hostile, study | {"profile": profile})
    assert links("report.html") == ["report-full.html", "report-quick.html"]
    assert links("report-full.html") == ["report.html", "report-quick.html"]
    assert links("report-quick.html") == ["report.html", "report-full.html"]
    (tmp_path / "report-a&<b>.html").write_text("of nobody")
    (tmp_path / "report-older.html").write_text("without marks")
    write_report(page, hostile, study | {"profile": "other"})
    assert links("report.html") == ["report-full.html", "report-older.html", "report-quick.html"]
    assert (tmp_path / "report-older.html").read_text() == "without marks"
    assert write_report(tmp_path / "alone.html", hostile).read_text("utf-8").count("report-full") == 0


def test_runs_that_were_not_evaluated_are_said_to_be_and_figures_of_none_have_no_column(
    hostile: Path, tmp_path: Path
) -> None:
    study = study_of("sft")
    study["runs"].append({"name": "quiet", "recipe": "sft", "before": None, "after": None})
    page = write_report(tmp_path / "report.html", hostile, study).read_text("utf-8")
    table = page.split('data-table="training"')[1].split("</table>")[0]
    assert "– → –" not in page and "token entropy" not in table and "pass@k" not in table
    assert table.count("not evaluated") == 1 and "60.0\xa0% → 60.0\xa0%" in table
    nothing = study | {"runs": study["runs"][1:]}
    page = write_report(tmp_path / "report.html", hostile, nothing).read_text("utf-8")
    assert "No run was evaluated." in page and 'id="figure-training"' not in page


def test_what_makes_a_page_again_names_the_options_that_differ_from_their_defaults_alone(tmp_path: Path) -> None:
    folder = compared(tmp_path, {"run": tuned(1e-3)}, CompareSettings.of(metrics=("location",), density=0.4))
    page = visible_text(write_report(tmp_path / "report.html", folder).read_text("utf-8"))
    said = page.split("How to reproduce this")[1]
    assert "--metrics changes,location --density 0.4" in said
    assert not re.search(r"\b(False|expect|null_draws|alphas?|rank_fraction)\b", said)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_where_rounding_is_undefined_no_empty_panel_stands_for_it(off_grid: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", off_grid)
    dom = dom_of(page)
    section = dom[dom.rindex("<body") :].split('<section id="location">')[1].split("</section>")[0]
    assert "density of the mask" in section and "α" not in section
    for empty in ("beyond rounding", "rounding alone</span>", "Below:"):
        assert empty not in section


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_a_figure_says_what_is_drawn_and_folded_tables_offer_nothing_to_press(hostile: Path, tmp_path: Path) -> None:
    study = study_of("sft")
    shares = dict.fromkeys(("random", "rounding", "spacing", "margins", "measured"), 0.5)
    (claim,) = study["claims"]
    claim |= {"anatomy": {"sft": shares}}
    claim["as_published"] = claim["as_published"] | {"sentence": "sft-1 is -0.149 [-0.2, 1e-5]"}
    dom = dom_of(write_report(tmp_path / "report.html", hostile, study))
    body = dom[dom.rindex("<body") :].split('<script type="application/gzip"')[0]
    said = dict(re.findall(r'<div id="figure-(\w+)"[^>]*aria-label="Figure: [^".?]+[.?] ([^"]+)"', body))
    assert set(said) == set(re.findall(r'id="figure-(\w+)"', body))
    assert all(re.search(r"\d", text) and "undefined (" not in text for text in said.values())
    assert said["training"] == "Sampled accuracy before and after training: sft 50 % to 50 %."
    assert re.search(r"sft [\d.]+ % \(rounding alone [\d.]+ %\)", said["overlaps"])
    folded = re.search(r'<details class="anatomy">.*?</details>', body, re.DOTALL)
    assert folded and "<table" in folded[0] and "<button" not in folded[0]
    assert body.index('class="skip"') < body.index('id="shown-runs"') < body.index('id="first-section"')
    assert "sft-1 is −0.149 [−0.2, 1e-5]" in body


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_the_last_layers_and_the_tensors_of_none_are_named_apart(hostile: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", hostile)
    data, text = data_in(page), page.read_text("utf-8")
    heat = data["heat"]
    heat["layers"] = [*map(str, range(200)), "none"]
    heat["values"] = [[[row[:1] * 201 for row in run] for run in metric] for metric in heat["values"]]
    heat["counts"] = [row[:1] * 201 for row in heat["counts"]]
    packed = base64.b64encode(gzip.compress(json.dumps(data).encode())).decode()
    page.write_text(text.replace(text.split('id="data">')[1].split("<")[0], packed), "utf-8")
    dom = dom_of(page, "layers&heat-metric=1")
    figure = dom[dom.rindex("<body") :].split('id="figure-heat"')[1].split("</section>")[0]
    ticks = re.findall(r'class="xtick"><text[^>]*>([^<]+)<', figure)
    assert ticks[-1] == "none" and ticks[0] == "0" and 200 - int(ticks[-2]) >= int(ticks[1])
    caption = re.sub("<[^>]+>", "", dom[dom.rindex("<body") :].split('<p class="caption"><span id="heat-caption">')[1])
    assert "unit:" not in caption and "1 cells" not in caption


def test_each_null_of_a_figure_is_named(hostile: Path, tmp_path: Path) -> None:
    """The unchanged weights have two: that of length in the table, that of rounding by layer."""
    page = write_report(tmp_path / "report.html", hostile)
    head = page.read_text("utf-8").split('data-table="runs"')[1].split("</thead>")[0]
    assert re.findall(r'title="([^"]+)">(isotropic|stored)<', head) == [
        ("a Gaussian update of equal norm", "isotropic"),
        *[("a Gaussian update of equal norm, stored alike", "stored")] * 3,
    ]
    about = {metric["name"]: metric for metric in data_in(page)["heat"]["metrics"]}
    assert about["unchanged_fraction"]["nulls"][0][1] == "rounding alone"
    assert about["spectral_shift"]["nulls"][0][1] == "a Gaussian update of equal norm, stored alike"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_runs_that_are_switched_off_are_gone_from_words_tables_legends_and_means(tmp_path: Path) -> None:
    """Of one run every weight changed; without it the mean of the others is what the axis of the stripes ends at."""
    runs = {"all": tuned(1e-1), "few": tuned(2e-5, seed=2), "some": tuned(2e-5, seed=3)}
    page = write_report(tmp_path / "report.html", compared(tmp_path, runs))

    def shown(state: str) -> tuple[list[str], float]:
        dom = dom_of(page, state)
        body = dom[dom.rindex("<body") :].split('<script type="application/gzip"')[0]
        hidden = re.findall(r'<(\w+)[^>]* data-runs="0[^"]*"[^>]* hidden=""', body)
        stripes = body.split('id="figure-stripes"')[1].split("</section>")[0]
        ticks = [float(tick) for tick in re.findall(r'class="ytick"><text[^>]*>([\d.]+)%', stripes)]
        return hidden, max(ticks)

    everything, reach = shown("")
    assert everything == [] and reach > 30
    without, reach = shown("stripes&off=0")
    assert without.count("tr") == 2 and without.count("span") == 3 and without.count("li") == 3
    assert reach < 30  # the measured mean with its null, neither with the run that is off


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_panels_stand_below_each_other_on_a_narrow_screen(hostile: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", hostile)

    def height(width: int) -> float:
        dom = dom_of(page, "", f"--window-size={width},900")
        return float(re.findall(r'id="figure-overlaps"[^>]*height: ([\d.]+)px', dom)[-1])

    assert height(500) > 3 * height(1280)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to draw the page")
def test_a_browser_shows_when_a_figure_fails(hostile: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", hostile)
    text = page.read_text(encoding="utf-8")
    packed = text.split('id="data">')[1].split("<")[0]
    data = data_in(page)
    data["pairs"].insert(0, None)
    damaged = base64.b64encode(gzip.compress(json.dumps(data).encode())).decode()
    page.write_text(text.replace(packed, damaged), "utf-8")
    dom = dom_of(page)
    assert ">A figure could not be drawn" in dom
    assert 'class="main-svg"' in dom[dom.index('id="figure-stripes"') :]  # and the rest of the page is there


def test_table_figure_and_sentence_take_the_ladder_of_the_same_matrices(tmp_path: Path) -> None:
    """Pooled shares are over every matrix, their nulls over those on the bfloat16 grid: no difference of the two."""
    weights = {n: w.float() * (1 + 1e-3) if "layers.0" in n else w for n, w in base_tensors().items()}
    base = write_model(tmp_path / "base", weights)
    run = write_model(tmp_path / "run", stored(moved(weights, 1e-3, 1)))
    summary = compare(base, {"run": run}, metrics=("location",)).summary
    entry = summary["runs"]["run"]
    rungs, pooled = entry["anatomy"]["low_magnitude"], entry["metrics"]["low_magnitude_overlap"]["value"]
    assert abs(rungs["measured"] - pooled) > 1e-6  # else there is nothing to tell apart
    figure = anatomy(summary)[0]["runs"][0]
    assert figure["measured"] == pytest.approx(100 * (rungs["measured"] - rungs["random"]), rel=1e-3)
    assert sum(part or 0 for part in figure["parts"]) == pytest.approx(figure["measured"], abs=0.01)
    assert beyond(entry, "low_magnitude") == pytest.approx(rungs["measured"] - rungs["margins"])
    figures = ladder_of(entry)
    assert "low" not in figures["low_magnitude_overlap"]  # the pooled figure's interval is not that of these matrices
    assert figures["unchanged_fraction"] == entry["metrics"]["unchanged_fraction"]
