"""Figures for papers: they show the numbers of the tables, come out the same twice, and take names as text."""

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from checkpoint_folders import base_weights, moved, stored, write_model

from offprincipal.comparison import Comparison, compare
from offprincipal.errors import ArgumentError, FileError
from offprincipal.reports.plots import PLOTS, NothingToDraw, Plots, write_plots
from offprincipal.reports.report import read_columns
from offprincipal.tables import read_summary

NAME = "<b>$rl_1$</b>"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    root, weights = tmp_path_factory.mktemp("plots"), base_weights()
    runs = {
        name: write_model(root / str(seed), stored(moved(weights, size, seed)))
        for seed, (name, size) in enumerate({NAME: 1e-3, "sft": 3e-3}.items())
    }
    found = compare(write_model(root / "base", weights), runs)
    found.write(root / "comparison")
    return found


@pytest.fixture(scope="module")
def folder(result: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.write(tmp_path_factory.mktemp("written"))


def test_the_parts_of_an_anatomy_add_up_to_what_was_measured(result: Comparison) -> None:
    figure: Any = result.plot.anatomy()
    for axis, mask in zip(figure.axes, ("principal", "low_magnitude"), strict=True):
        for row, run in enumerate(result.runs.values()):
            bars = [bar for bar in axis.patches if round(bar.get_y() + bar.get_height() / 2) == row]
            rungs = run.content["anatomy"][mask]
            beyond = 100 * (rungs["measured"] - rungs["random"])
            assert sum(bar.get_width() for bar in bars) == pytest.approx(beyond, abs=0.01)


def test_points_are_the_figures_of_the_tables(result: Comparison) -> None:
    figure: Any = result.plot.against_null()
    for null in ("rounding", "rounding_null", "random"):
        assert result.plot.against_null("principal_overlap", null)
    with pytest.raises(NothingToDraw, match=r"principal_overlap has no null 'odd': it has .*rounding"):
        result.plot.against_null("principal_overlap", "odd")
    drawn = sorted(tuple(point) for points in figure.axes[0].collections for point in points.get_offsets().tolist())
    names = ("spectral_shift_stored_null", "spectral_shift")
    assert drawn == sorted(tuple(row[name] for name in names) for row in result.matrices if row["spectral_shift"])
    agreement: Any = result.plot.agreement()
    places = [float(line.get_xdata()[0]) for line in agreement.axes[0].lines]
    pair = result.summary["pairs"][0]
    assert {pair["jaccard"], pair["jaccard_random"], pair["jaccard_margin_null"]} <= set(places)
    layers: Any = result.plot.layers("update_stable_rank")
    grid = layers.axes[0].images[0].get_array()
    q = [row for row in result.matrices if row["run"] == NAME and row["role"] == "q"]
    assert float(grid[0, 0]) == pytest.approx(q[0]["update_stable_rank"], rel=1e-3)


def test_files_are_whole_alike_twice_and_hold_names_as_text(folder: Path, tmp_path: Path) -> None:
    first, second = (write_plots(folder, ("pdf", "svg", "png"), tmp_path / name) for name in "ab")
    assert {path.stem for path in first} == set(PLOTS)
    for ours, theirs in zip(first, second, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    begins = {".pdf": b"%PDF", ".svg": b"<?xml", ".png": b"\x89PNG"}
    assert all(path.read_bytes().startswith(begins[path.suffix]) for path in first)
    drawn = (tmp_path / "a" / "anatomy.svg").read_text()
    assert "&lt;b&gt;$rl_1$&lt;/b&gt;" in drawn and "<b>" not in drawn


def test_what_was_not_measured_is_left_out_or_refused_by_name(folder: Path, tmp_path: Path) -> None:
    root, weights = tmp_path, base_weights()
    base, run = write_model(root / "base", weights), write_model(root / "run", stored(moved(weights, 1e-3, 1)))
    located = compare(base, {"run": run}, metrics=("location",))
    written = write_plots(located.write(tmp_path / "c"), ("svg",))
    assert {path.stem for path in written} == {"anatomy", "overlaps", "layers"}
    assert (tmp_path / "c" / "figures" / "anatomy.svg").is_file()
    with pytest.raises(NothingToDraw, match="no figure 'spectral_shift'"):
        located.plot.against_null()
    with pytest.raises(NothingToDraw, match="no figure 'nonsense' was measured of these runs: choose one of unchanged"):
        located.plot.layers("nonsense")
    with pytest.raises(NothingToDraw, match="of two runs or more"):
        located.plot.agreement()
    with pytest.raises(ArgumentError, match="no format 'gif': choose one of pdf, svg, png"):
        write_plots(folder, ("gif",))
    with pytest.raises(FileError, match=r"summary\.json"):
        write_plots(tmp_path, ("pdf",))
    assert set(read_summary(folder)["runs"]) == {NAME, "sft"}


def test_without_matplotlib_it_is_said_what_to_install(result: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"figures need matplotlib: pip install .*\[figures\]'"):
        result.plot.anatomy()


def test_a_notebook_shows_them_whatever_its_backend(result: Comparison) -> None:
    figure: Any = result.plot.overlaps()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_figures_of_many_runs_fit_a_page_and_say_what_they_leave_out(result: Comparison, folder: Path) -> None:
    names = [f"run_{i}" for i in range(13)]
    (first, second), (pair,) = result.summary["runs"].values(), result.summary["pairs"]
    pairs = [pair | {"run_a": a, "run_b": b, "jaccard_z": 0.0} for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs[-1] |= {"jaccard": 0.999, "jaccard_margin_null": 0.1, "jaccard_z": 90.0}
    summary = result.summary | {"runs": dict.fromkeys(names, second) | {"run_0": first}, "pairs": pairs}
    table = read_columns(folder, "matrices")
    own = table.filter(pc.field("run") == "sft")
    place = own.schema.get_field_index("run")
    tables = [
        own.set_column(place, own.schema.field("run"), pa.array([name] * len(own), pa.string())) for name in names
    ]
    plots = Plots(summary, lambda: pa.concat_tables(tables))
    figures: dict[str, Any] = {name: getattr(plots, name)() for name in PLOTS}
    assert max(figure.get_size_inches()[1] for figure in figures.values()) <= 9.1
    (agreement,) = figures["agreement"].axes
    assert "of 78 pairs: those furthest from the nulls" in agreement.get_xlabel()
    assert agreement.get_yticklabels()[-1].get_text() == "run_11 · run_12" and agreement.get_xlim()[1] > 1
    against = figures["against_null"]
    drawn = {
        (tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes())
        for points in against.axes[0].collections
    }
    assert len(drawn) == 13  # colours repeat, markers tell them apart
    for figure in (against, figures["agreement"]):
        figure.savefig(BytesIO(), format="png")
        label = figure.axes[0].xaxis.label.get_window_extent()
        assert label.x0 >= 0 and label.y0 >= 0 and label.x1 <= figure.bbox.x1, label
