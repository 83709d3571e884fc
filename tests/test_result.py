"""A comparison as a program or a notebook reads it."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from checkpoint_folders import base_weights, moved, stored, write_model

import offprincipal
from offprincipal.comparison import CompareSettings, Comparison, MatrixSettings, compare, read_comparison, read_table
from offprincipal.errors import ArgumentError, FileError
from offprincipal.tabular import Tabular

HOSTILE = "<img src=x>\x1b[31m"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    root = tmp_path_factory.mktemp("result")
    weights = base_weights()
    base = write_model(root / "base", weights)
    runs = {name: write_model(root / str(i), stored(moved(weights, 1e-3, i))) for i, name in enumerate(("rl", HOSTILE))}
    return compare(base, runs, cache=False)


def test_a_figure_comes_with_its_interval_and_each_of_its_nulls(result: Comparison) -> None:
    metrics = result.summary["runs"]["rl"]["metrics"]
    found = result.runs["rl"].principal_overlap
    assert (found.value, found.low, found.high) == tuple(
        metrics["principal_overlap"][k] for k in ("value", "low", "high")
    )
    assert found.nulls["margin"] == metrics["principal_overlap_margin_null"]["value"]
    assert found.nulls["random"] == metrics["principal_overlap_random"]["value"]
    assert result.runs["rl"].spectral_shift.nulls.keys().isdisjoint({"per_norm_isotropic", "per_norm_stored"})


def test_every_null_is_of_one_figure(result: Comparison) -> None:
    run = result.runs["rl"]
    metrics = run.content["metrics"]
    of = [f"{name}_{null}" for name in metrics for null in getattr(run, name).nulls]
    assert len(of) == len(set(of))
    of_linear = {"unchanged_fraction_rounding", "unchanged_fraction_scaled"}  # and the figure itself of every tensor
    assert {re.sub("_null$", "", name) for name in metrics if name.endswith("_null")} - set(of) == of_linear
    assert set(run.principal_energy.nulls) == {"isotropic", "stored"}


def test_what_was_not_measured_is_named_beside_what_is_near(result: Comparison) -> None:
    with pytest.raises(AttributeError, match=r"did you mean.*principal_overlap"):
        _ = result.runs["rl"].principal_overlaps
    assert "principal_overlap" in dir(result.runs["rl"])


def test_tables_are_those_that_are_written(result: Comparison, tmp_path: Path) -> None:
    result.write(tmp_path)
    for name in ("matrices", "masks", "pairs", "curves"):
        assert result.to_arrow(name).to_pylist() == read_table(tmp_path, name)
    frame = result.to_pandas("pairs")
    assert list(frame["jaccard"]) == [row["jaccard"] for row in result.pairs]
    for name in ("matrices", "masks", "pairs", "curves"):
        assert result.to_polars(name).to_dicts() == result.to_arrow(name).to_pylist()
    with pytest.raises(ArgumentError, match="no table 'matrix': choose one of matrices"):
        result.to_arrow("matrix")


def test_a_finished_comparison_is_read_back(result: Comparison, tmp_path: Path) -> None:
    result.write(tmp_path)
    found = read_comparison(tmp_path)
    assert found.summary == result.summary and found.matrices == result.to_arrow("matrices").to_pylist()
    assert found.runs["rl"].unchanged_fraction == result.runs["rl"].unchanged_fraction
    with pytest.raises(FileError, match="Give a folder that offprincipal wrote"):
        read_comparison(tmp_path / "nowhere")


def test_a_run_that_is_not_there_is_told_by_those_that_are(result: Comparison) -> None:
    with pytest.raises(ArgumentError, match="no run 'grpo' was compared: there are rl"):
        result.runs["grpo"]
    assert "grpo" not in result.runs and dict(result.runs).keys() == result.summary["runs"].keys()


def test_groups_may_be_a_text_and_a_mistyped_one_is_told(result: Comparison) -> None:
    assert CompareSettings(metrics="location,update").metrics == ("changes", "location", "update")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no metric group 'changed': did you mean changes"):
        CompareSettings(metrics="changed")  # type: ignore[arg-type]


def test_the_package_shows_its_verbs() -> None:
    assert {"compare", "train", "read_comparison", "Monitor"} <= set(dir(offprincipal))
    assert "import_module" not in dir(offprincipal)


def test_without_polars_it_says_what_else_there_is(result: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)  # which is how Python marks what cannot be imported
    with pytest.raises(ArgumentError, match=r"pip install polars, or use to_arrow\(\)"):
        result.to_polars()


def test_a_notebook_shows_a_page_and_no_name_in_it_is_markup(result: Comparison) -> None:
    shown = result._repr_html_()
    assert shown.count("<table>") == 2
    assert '<th scope="col">rl</th>' in shown and "<td>principal</td>" in shown
    assert "<img" not in shown and "&lt;img" in shown and "\x1b" not in shown
    assert len(shown) < 10_000 and len(repr(result)) < 4000 and "\x1b" not in repr(result)


def test_settings_may_be_given_by_name(result: Comparison, tmp_path: Path) -> None:
    base = result.summary["base"]
    named = compare(base, {"same": base}, metrics=("location",), density=0.3, cache=False)
    whole = compare(base, {"same": base}, CompareSettings(("location",), MatrixSettings(density=0.3)), cache=False)
    assert named.matrices == whole.matrices and named.summary == whole.summary
    for options, says in (
        ({"densty": 0.3}, "a comparison has no setting 'densty': did you mean density"),
        ({"density": 0.3, "settings": CompareSettings()}, "both settings and density"),
        ({"alpha": 0.3}, "no setting 'alpha': it is called density"),
        ({"density": 3}, "density is 3"),
    ):
        with pytest.raises(ArgumentError, match=says):
            compare(base, {"same": base}, **options)


def test_a_run_that_was_not_compared_is_an_error_and_get_gives_the_default(result: Comparison) -> None:
    with pytest.raises(ArgumentError, match="no run 'x' was compared: there are "):
        result.runs["x"]
    assert result.runs.get("x") is None


def test_a_comparison_of_other_runs_is_replaced_only_if_asked(tmp_path: Path) -> None:
    base, (one, two) = (
        write_model(tmp_path / "base", base_weights()),
        (write_model(tmp_path / name, moved(base_weights(), 1e-2, seed)) for seed, name in enumerate(("one", "two"))),
    )
    options: dict[str, Any] = {"metrics": "changes", "out": tmp_path / "out"}
    compare(base, {"one": one}, **options)
    page = (tmp_path / "out" / "report.html").read_bytes()
    with pytest.raises(FileError, match="not among these runs"):
        compare(base, {"two": two}, **options)
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    assert list(read_comparison(tmp_path / "out").runs) == ["one"]
    compare(base, {"one": one, "two": two}, **options)  # adds one
    compare(base, {"two": two}, **options, overwrite=True)
    assert list(read_comparison(tmp_path / "out").runs) == ["two"]
    assert (tmp_path / "out" / "report.html").read_bytes() != page
    compare(base, {"two": two}, metrics="changes", out=tmp_path / "bare", report=False)
    assert not (tmp_path / "bare" / "report.html").exists()


def test_a_run_shows_its_figures_and_says_where_those_of_matrices_are(result: Comparison) -> None:
    text = repr(result.runs["rl"])
    assert "\n  unchanged_fraction: 0." in text and ", isotropic " in text and "isotropic_null" not in text
    with pytest.raises(AttributeError, match=r"to_pandas\('matrices'\)"):
        _ = result.runs["rl"].changed_count


class Wide(Tabular):
    def to_arrow(self, table: str = "") -> pa.Table:
        rows = [{"name": "a\x1b[31m", **{f"column{i}": i / 3 for i in range(30)}, "no": None} for _ in range(40)]
        return pa.Table.from_pylist(rows)


def test_any_table_is_text_of_a_screen_and_counts_what_it_leaves_out() -> None:
    lines = repr(Wide()).splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1].strip() == "40 rows, 32 columns: to_pandas() has all"
    assert "\x1b" not in repr(Wide()) and "&lt;" not in Wide()._repr_html_()
    assert Wide().to_polars().shape == (40, 32)


def test_no_result_of_another_base_is_replaced_unasked(tmp_path: Path) -> None:
    bases = [write_model(tmp_path / name, moved(base_weights(), 1e-2, seed)) for seed, name in enumerate("ab")]
    calls: dict[str, Callable[..., Any]] = {
        "preflight.json": lambda base, **options: offprincipal.preflight(base, 1e-3, **options),
        "trajectory.json": lambda base, **options: offprincipal.trajectory(base, [base], steps=[1], **options),
    }
    for name, call in calls.items():
        call(bases[0], out=tmp_path / "out")
        held = (tmp_path / "out" / name).read_bytes()
        with pytest.raises(FileError, match="has figures of"):
            call(bases[1], out=tmp_path / "out")
        assert (tmp_path / "out" / name).read_bytes() == held
        call(bases[1], out=tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / name).read_bytes() != held


def test_in_a_notebook_the_text_is_returned_and_nothing_is_displayed(
    result: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = repr(result)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert repr(result) == plain and plain.startswith("what training did to the weights")
