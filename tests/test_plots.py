"""Figures for papers: they show the numbers of the tables, come out the same twice, and take names as text."""

import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from checkpoint_folders import base_weights, moved, stored, write_model
from matplotlib.text import Text

from offprincipal.comparison import Comparison, compare
from offprincipal.errors import ArgumentError, FileError
from offprincipal.reports import figures
from offprincipal.reports.plots import PLOTS, Plots, write_plots
from offprincipal.reports.plots_drawing import NothingToDraw, file_of
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


def below(figure: Any) -> str:
    """What is written below all panels, in one line."""
    return str(figure.get_supxlabel()).replace("\n", " ")


def test_what_was_not_measured_is_left_out_or_refused_by_name(folder: Path, tmp_path: Path) -> None:
    root, weights = tmp_path, base_weights()
    base, run = write_model(root / "base", weights), write_model(root / "run", stored(moved(weights, 1e-3, 1)))
    located = compare(base, {"run": run}, metrics=("location",))
    written = write_plots(located.write(tmp_path / "c"), ("svg",))
    assert {path.stem for path in written} == {"anatomy", "overlaps", "sweep", "layers", "stripes"}
    assert (tmp_path / "c" / "figures" / "anatomy.svg").is_file()
    with pytest.raises(NothingToDraw, match="no figure 'spectral_shift'"):
        located.plot.against_null()
    with pytest.raises(NothingToDraw, match=r"no figure 'nonsense' was measured of these runs: .*compare --list"):
        located.plot.layers("nonsense")
    with pytest.raises(NothingToDraw, match=r"of these runs: did you mean .*unchanged_fraction"):
        located.plot.layers("unchanged_fractoin")
    with pytest.raises(NothingToDraw, match="of two runs or more"):
        located.plot.agreement()
    with pytest.raises(NothingToDraw, match="has not measured singular values or angles"):
        located.plot.spectra()
    with pytest.raises(NothingToDraw, match="has not measured location"):
        compare(base, {"run": run}, metrics=("changes",)).plot.sweep()
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


def of_runs(names: Sequence[str], result: Comparison, folder: Path) -> Plots:
    """Figures of as many runs as names: the first is ours by its name, the others are all `sft`."""
    (first, second), (pair,) = result.summary["runs"].values(), result.summary["pairs"]
    pairs = [pair | {"run_a": a, "run_b": b, "jaccard_z": 0.0} for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs[-1] |= {"jaccard": 0.999, "jaccard_margin_null": 0.1, "jaccard_z": 90.0}
    summary = result.summary | {"runs": dict.fromkeys(names, second) | {names[0]: first}, "pairs": pairs}

    def read(name: str) -> pa.Table:
        table = read_columns(folder, name)
        own, place = table.filter(pc.field("run") == "sft"), table.schema.get_field_index("run")
        field = table.schema.field("run")
        repeated = [own.set_column(place, field, pa.array([name] * len(own), pa.string())) for name in names]
        return pa.concat_tables([*repeated, table.filter(pc.is_null(table["run"]))])

    return Plots(summary, read)


def test_figures_of_many_runs_fit_a_page_and_say_what_they_leave_out(result: Comparison, folder: Path) -> None:
    names = [f"run_{i}" for i in range(13)]
    plots = of_runs(names, result, folder)
    drawn: dict[str, Any] = {name: getattr(plots, name)() for name in PLOTS}
    (agreement,) = drawn["agreement"].axes
    assert "of 78 pairs: those furthest from the nulls" in below(drawn["agreement"])
    assert agreement.get_yticklabels()[-1].get_text() == "run_11 · run_12" and agreement.get_xlim()[1] > 1
    assert "10 of 13 runs: those furthest from rounding alone" in below(drawn["sweep"])
    assert "6 of 13 runs: those furthest from the base" in below(drawn["spectra"])
    assert [axis.get_title(loc="left") for axis in drawn["against_null"].axes] == names  # a panel each
    hundred = of_runs([f"run_{i}" for i in range(100)], result, folder)
    for name in ("anatomy", "overlaps", "layers", "against_null"):
        assert " of 100 runs: " in below(getattr(hundred, name)())
        assert "of 100 runs" not in below(getattr(hundred.among("run_70", "run_90"), name)())


LONG = [
    [NAME, "sft"],
    [f"llama-3-8b-grpo-step-{step}" for step in range(100, 120)],
    ["Qwen2.5-Math-7B-grpo-clip-higher-seed0-final", NAME, "Qwen2.5-Math-7B-grpo-clip-lower-seed0-final"],
    [f"{i}-of-the-runs-with-{i}-many-words-$x$-in-its-name" for i in range(20)],
]


@pytest.mark.parametrize("names", LONG, ids=["two", "alike", "long", "twenty"])
def test_every_figure_can_be_read(names: list[str], result: Comparison, folder: Path) -> None:
    plots = of_runs(names, result, folder)
    for name in PLOTS:
        figure = getattr(plots, name)()
        figure.savefig(BytesIO(), format="png", dpi=100)  # which lays it out
        width, height = figure.get_size_inches()
        assert width in (3.35, 6.9) and height <= 9.0, name
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        assert {text.get_fontsize() for text in texts} <= {7, 8}, name
        beside = [*figure.legends, *(label for label in (figure._supxlabel, figure._supylabel) if label)]
        for box in [part.get_tightbbox() for part in figure.axes] + [part.get_window_extent() for part in beside]:
            assert box.x0 >= -1 and box.y0 >= -1, (name, box)
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, (name, box)
        titles = [
            title.get_window_extent()
            for axis in figure.axes
            for title in (axis.title, axis._left_title)
            if title.get_text()
        ]
        assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[i + 1 :]), name
        for legend in figure.legends:
            lowest = legend.get_window_extent().y0
            assert all(box.y1 <= lowest + 1 for box in titles), name
            assert all(axis.get_window_extent().y1 <= lowest for axis in figure.axes), name


def test_what_labels_leave_out_is_said(result: Comparison, folder: Path) -> None:
    alike, long = (of_runs(names, result, folder) for names in LONG[1:3])
    figure: Any = alike.overlaps()
    assert "… stands for llama-3-8b-grpo-step-" in below(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"…{step}" for step in range(100, 120)]
    figure = long.overlaps()
    assert "long names are cut in the middle" in below(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == 3 and all("…" in label for label in labels[::2]) and "…" not in labels[1]


def test_runs_and_parts_differ_in_more_than_colour(result: Comparison, folder: Path) -> None:
    plots = of_runs([f"run_{i}" for i in range(20)], result, folder)
    for figure in (plots.sweep(), plots.spectra(), plots.among(*(f"run_{i}" for i in range(5, 11))).against_null()):
        marks = [handle.get_marker() for handle in figure.legends[0].legend_handles if handle.get_linestyle() == "None"]
        runs = [mark for mark in marks if mark not in ("None", "")]
        assert len(runs) == len(set(runs)) >= 6
    anatomy: Any = result.plot.anatomy()
    hatches = [part.get_hatch() for part in anatomy.legends[0].get_patches()]
    assert len(hatches) == len(set(hatches)) >= 4


def lines_of(axis: Any) -> list[tuple[list[float], list[float]]]:
    """What is drawn as lines in a panel: places and values."""
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axis.lines]


def test_a_sweep_is_that_of_the_page(result: Comparison) -> None:
    figure: Any = result.plot.sweep()
    masks = figures.sweep(result.to_arrow("masks"), list(result.runs))
    above, beyond = figure.axes[: len(masks)], figure.axes[len(masks) :]
    for axis, lower, mask in zip(above, beyond, masks, strict=True):
        assert axis.get_title() == mask["title"]
        for run in mask["runs"]:
            for curve in ("overlap", "overlap_random", "overlap_rounding_null"):
                assert (run["alpha"], run[curve]) in lines_of(axis)
            points = [100 * (a - b) for a, b in zip(run["overlap"], run["overlap_rounding_null"], strict=True)]
            assert (run["alpha"], pytest.approx(points)) in lines_of(lower)


def test_curves_of_a_matrix_are_those_of_the_page_beside_their_nulls(result: Comparison, folder: Path) -> None:
    matrices, names = result.to_arrow(), list(result.runs)
    page = figures.spectra(matrices, folder / "curves.parquet", names)["matrices"]
    for figure, matrix in ((result.plot.spectra(), page[0]), (result.plot.spectra(page[2]["tensor"]), page[2])):
        assert figure.legends[0].get_title().get_text() == matrix["tensor"]
        values, left, shift, right = figure.axes
        assert (matrix["base"]["x"], matrix["base"]["y"]) in lines_of(values)
        for run in matrix["runs"]:
            kinds = (("tuned", values), ("shift", shift), ("left", left), ("right", right))
            assert all((run[kind]["x"], run[kind]["y"]) in lines_of(axis) for kind, axis in kinds)
            for null, axis in zip(run["nulls"], (left, right), strict=True):
                assert [null, null] in [y for _, y in lines_of(axis)]
    stripes = figures.stripes(matrices, folder / "curves.parquet", names)["matrices"][0]
    drawn: Any = result.plot.stripes()
    for axis, side in zip(drawn.axes, ("row", "column"), strict=True):
        for kind in ("rates", "nulls"):
            mean = [sum(values) / 2 for values in zip(*(curve["y"] for curve in stripes[side][kind]), strict=True)]
            assert pytest.approx(mean) in [y for _, y in lines_of(axis)]
    alone: Any = result.plot.among("sft").stripes(stripes["tensor"])
    assert stripes["row"]["rates"][1]["y"] in [y for _, y in lines_of(alone.axes[0])]
    assert "dispersion" in below(drawn) and below(alone).count("sft") == 1


def test_a_folder_and_its_comparison_give_the_same_figures(result: Comparison, folder: Path, tmp_path: Path) -> None:
    for path in write_plots(folder, ("svg",), tmp_path):
        assert path.read_bytes() == file_of(getattr(result.plot, path.stem)(), "svg")


def test_an_unknown_matrix_is_told_those_that_are_like_it(result: Comparison) -> None:
    for draw in (result.plot.spectra, result.plot.stripes):
        with pytest.raises(ArgumentError, match=r"no tensor '.*' was compared: did you mean .*0.self_attn.q_proj"):
            draw("model.layers.0.self_attn.q_porj.weight")
        with pytest.raises(ArgumentError, match=r"did you mean model.layers.1.mlp.down_proj.weight\?"):
            draw("layers.1 down")
        with pytest.raises(ArgumentError, match=r"of 'model.norm.weight' no .* were measured: 6 have them, such as"):
            draw("model.norm.weight")
        with pytest.raises(ArgumentError, match=r"no tensor 'xyz' was compared: 6 have them, such as model.layers.0"):
            draw("xyz")


def test_axes_have_words_and_no_names_of_fields(result: Comparison) -> None:
    against: Any = result.plot.against_null("principal_angle_left_max_deg")
    assert against.axes[0].get_ylabel().replace("\n", " ") == "largest left principal angle, degrees"
    stored = "largest left principal angle after a Gaussian update of equal norm, stored alike, degrees"
    assert below(against) == stored
    overlap: Any = result.plot.against_null("principal_overlap", "rounding")
    mask = "share of the changed entries in the principal mask"
    assert below(overlap) == f"{mask} if rounding alone placed them"
    assert overlap.axes[0].get_ylabel().replace("\n", " ") == mask
    layers: Any = result.plot.layers()
    bar = layers.axes[-1].get_ylabel().replace("\n", " ")
    assert bar == "share of the entries whose bfloat16 value did not change"
    assert below(layers).startswith("layer null: rounding alone")
    words = {
        "principal_z": "principal z: its score test against the margin null, in standard deviations",
        "principal_energy_isotropic": "share of the update's energy in both principal subspaces for an isotropic",
    }
    for metric, said in words.items():
        layers = result.plot.layers(metric)
        assert layers.axes[-1].get_ylabel().replace("\n", " ").startswith(said)


def test_figures_are_listed_and_a_wrong_name_is_told_the_right_one(result: Comparison) -> None:
    assert set(PLOTS) <= set(dir(result.plot))
    assert all(f"{name}()" in repr(result.plot) for name in PLOTS) and "2 runs" in repr(result.plot)
    with pytest.raises(AttributeError, match=r"no figure 'anatomi': did you mean anatomy.* The figures are anatomy, "):
        result.plot.anatomi()
    with pytest.raises(AttributeError, match=r"no figure 'foo': .* The figures are anatomy, "):
        result.plot.foo()
    with pytest.raises(ArgumentError, match="no run 'stf' was compared: did you mean sft"):
        result.plot.among("stf")
    with pytest.raises(ArgumentError, match="no run is given"):
        result.plot.among()
