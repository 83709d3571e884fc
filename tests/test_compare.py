"""A comparison's tables against figures worked out by hand, and its promises: nulls, determinism, nothing undefined."""

import gc
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_folders import base_weights, moved, stored, write_model, write_shards
from matrices import gaussian

from offprincipal.checkpoints import Part, open_checkpoint
from offprincipal.checkpoints.roles import Place
from offprincipal.checkpoints.safetensors_folder import SafetensorsFolder
from offprincipal.comparison import CompareSettings, Comparison, MatrixSettings, compare, parse_condition, read_table
from offprincipal.comparison.lineage import lineage_warnings
from offprincipal.comparison.measure import Row, measure_matrix
from offprincipal.errors import ArgumentError, CheckpointError
from offprincipal.measures.columns import GROUPS, METRICS, Group
from offprincipal.measures.pair import BaseMatrix, MatrixPair
from offprincipal.measures.pooling import estimate_ratio, pool_column
from offprincipal.measures.spectral import BaseSpectrum

LINEAR = 6
ERROR_BOUNDS = ("singular_value_error", "singular_value_error_relative", "angle_error_deg")  # none for LAPACK's


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    weights = base_weights()
    near, far = moved(weights, 2e-4, 100), moved(weights, 3e-3, 200)
    return {
        "base": write_model(root / "base", weights),
        "near": write_model(root / "near", stored(near), near),
        "far": write_shards(root / "far", stored(far)),
    }


@pytest.fixture(scope="module")
def result(folders: dict[str, Path]) -> Comparison:
    return compare(folders["base"], [folders["near"], folders["far"]])


def value(result: Comparison, run: str, metric: str) -> float:
    found: float = result.summary["runs"][run]["metrics"][metric]["value"]
    return found


def _as_lists(row: Row) -> Row:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in row.items()}


def test_there_is_a_row_for_every_tensor_and_run(result: Comparison) -> None:
    assert len(result.matrices) == 2 * (LINEAR + 2)
    assert sum(row["linear"] for row in result.matrices) == 2 * LINEAR
    assert len(result.masks) == 2 * LINEAR * 4 * 5
    assert len(result.pairs) == LINEAR
    assert {row["solver"] for row in result.matrices if row["linear"]} == {"exact"}


def test_every_registered_column_is_measured(result: Comparison) -> None:
    for metric in METRICS:
        for column in metric.columns:
            values = [row[column.name] for row in result.matrices if row["run"] == "near" and row["linear"]]
            assert any(v is not None for v in values) != (column.name in ERROR_BOUNDS), column.name


def test_the_unchanged_fraction_counts_every_entry(result: Comparison, folders: dict[str, Path]) -> None:
    base, far = base_weights(), stored(moved(base_weights(), 3e-3, 200))
    same = sum(int((base[name] == far[name]).sum()) for name in base)
    assert value(result, "far", "unchanged_fraction") == pytest.approx(same / sum(t.numel() for t in base.values()))


def test_norms_pool_as_norms_and_shifts_by_parameters(result: Comparison) -> None:
    base, far = base_weights(), stored(moved(base_weights(), 3e-3, 200))
    linear = [name for name in base if "proj" in name]
    updates = {name: (far[name].double() - base[name].double()) for name in linear}
    norm = math.sqrt(sum(update.square().sum().item() for update in updates.values()))
    assert value(result, "far", "update_norm") == pytest.approx(norm)
    base_norm = math.sqrt(sum(base[name].double().square().sum().item() for name in linear))
    assert value(result, "far", "relative_update_norm") == pytest.approx(norm / base_norm)
    for column, share in (("spectral_shift", 0.125), ("spectral_shift_full", 1.0)):
        shifts = {}
        for name in linear:
            count = max(1, round(share * min(base[name].shape)))
            s0, s1 = (torch.linalg.svdvals(w[name].double())[:count] for w in (base, far))
            shifts[name] = ((s1 - s0).norm() / s0.norm()).item()
        weighted = sum(shifts[name] * base[name].numel() for name in linear)
        assert value(result, "far", column) == pytest.approx(weighted / sum(base[name].numel() for name in linear))


def test_overlaps_pool_by_their_counts(result: Comparison) -> None:
    rows = [row for row in result.matrices if row["run"] == "near" and row["linear"]]
    inside = sum(row["principal_overlap"] * row["changed_count"] for row in rows)
    assert value(result, "near", "principal_overlap") == pytest.approx(inside / sum(r["changed_count"] for r in rows))
    information = [row["principal_log_odds_se"] ** -2 for row in rows]
    score = sum(row["principal_log_odds"] * weight for row, weight in zip(rows, information, strict=True))
    assert value(result, "near", "principal_z") == pytest.approx(score / math.sqrt(sum(information)))
    assert value(result, "near", "principal_log_odds") == pytest.approx(score / sum(information))
    rungs = result.summary["runs"]["near"]["anatomy"]["principal"]
    assert rungs["measured"] == pytest.approx(value(result, "near", "principal_overlap"))
    assert rungs["margins"] == pytest.approx(value(result, "near", "principal_overlap_margin_null"))


def test_a_weight_blind_update_shows_nothing_beyond_its_nulls(result: Comparison) -> None:
    for run in ("near", "far"):
        for mask in ("principal", "low_magnitude", "safe", "random"):
            z = value(result, run, f"{mask}_z")
            assert (z is None and run == "far") or abs(z) < 5  # where nearly all changed, nothing may be left to chance
        null = value(result, run, "unchanged_fraction_isotropic_null")
        assert value(result, run, "unchanged_fraction") == pytest.approx(null, abs=0.02)
        null = value(result, run, "principal_angle_left_mean_deg_isotropic_null")
        assert value(result, run, "principal_angle_left_mean_deg") == pytest.approx(null, rel=0.25)
    assert abs(result.summary["pairs"][0]["jaccard_z"]) < 5


def test_the_default_mask_columns_are_those_of_the_sweep(result: Comparison) -> None:
    rows = {(row["run"], row["tensor"]): row for row in result.matrices}
    at_default = [row for row in result.masks if row["alpha"] == 0.5]
    assert at_default
    for row in at_default:
        matrix = rows[row["run"], row["tensor"]]
        for suffix in ("", "_random", "_rounding_null", "_rounding_judged", "_spacing_null", "_margin_null"):
            assert row[f"overlap{suffix}"] == matrix[f"{row['mask']}_overlap{suffix}"]
        for name in ("log_odds", "log_odds_se", "z"):
            assert row[name] == matrix[f"{row['mask']}_{name}"]


def test_masks_hold_what_their_definitions_say_and_the_random_one_scatters_about_it(result: Comparison) -> None:
    for row in result.masks:
        wanted, numel = round(row["alpha"] * row["numel"]), row["numel"]
        size = row["density"] * numel
        if row["mask"] == "random":
            assert abs(size - wanted) < 5 * (numel * row["alpha"] * (1 - row["alpha"])) ** 0.5 + 1
        elif row["mask"] == "safe":
            assert size >= max(wanted, numel - wanted) - 1e-6
        else:
            assert size == pytest.approx(wanted, rel=1e-12)
        assert row["overlap_random"] == row["density"]


def test_masters_show_what_storage_hides(result: Comparison) -> None:
    near = value(result, "near", "hidden_fraction")
    assert near == pytest.approx(value(result, "near", "unchanged_fraction"), abs=1e-3)
    assert result.summary["runs"]["far"]["metrics"]["hidden_fraction"]["value"] is None


def test_threads_and_file_layout_do_not_change_a_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    for threads in (1, 3):
        compare(folders["base"], [folders["near"], folders["far"]], threads=threads).write(tmp_path / str(threads))
    for file in sorted((tmp_path / "1").iterdir()):
        assert file.read_bytes() == (tmp_path / "3" / file.name).read_bytes(), file.name


def test_the_tables_on_disk_are_the_rows_and_say_what_they_mean(result: Comparison, tmp_path: Path) -> None:
    out = result.write(tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        *("curves.parquet", "masks.parquet", "matrices.parquet", "pairs.parquet", "summary.json")
    ]
    for name in ("matrices", "masks", "pairs", "curves"):
        assert read_table(out, name) == [_as_lists(row) for row in getattr(result, name)]
    field = pq.read_schema(out / "matrices.parquet").field("spectral_shift")
    assert b"NSS" in field.metadata[b"source"]
    assert json.loads((out / "summary.json").read_text()) == result.summary


def test_columns_too_long_for_one_chunk_are_written_in_several(
    result: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offprincipal.tables._MOST_OFFSET", 200)
    out = result.write(tmp_path / "out")
    for name in ("matrices", "curves"):
        assert read_table(out, name) == [_as_lists(row) for row in getattr(result, name)]


def test_identical_checkpoints_give_nulls_not_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    result = compare(folders["base"], {"same": folders["base"], "again": folders["base"]})
    result.write(tmp_path)
    assert "no weight changed" in result.summary["runs"]["same"]["warnings"][0]
    metrics = result.summary["runs"]["same"]["metrics"]
    assert metrics["unchanged_fraction"]["value"] == 1.0
    assert metrics["spectral_shift"]["value"] == 0.0
    assert metrics["principal_angle_left_max_deg"]["value"] == 0.0
    undefined = ("principal_overlap", "principal_z", "spectral_shift_per_norm", "principal_energy", "row_gini")
    undefined += ("row_dispersion", "weyl_tightness", "wedin_tightness", "update_stable_rank")
    for name in undefined:
        assert metrics[name]["value"] is None, name
    assert result.summary["pairs"][0]["jaccard"] is None
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_zero_constant_and_one_row_matrices_are_measured(tmp_path: Path) -> None:
    weights = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 5),
        "model.layers.0.self_attn.k_proj.weight": torch.ones(4, 5),
        "model.layers.0.self_attn.v_proj.weight": torch.randn(1, 7, generator=torch.Generator().manual_seed(0)),
        "model.layers.0.self_attn.o_proj.weight": torch.eye(6),
    }
    base = write_model(tmp_path / "base", stored(weights))
    tuned = write_model(tmp_path / "tuned", stored(moved(weights, 0.01, 0)))
    result = compare(base, [tuned])
    result.write(tmp_path / "out")
    rows = {row["role"]: row for row in result.matrices}
    assert rows["q"]["spectral_shift"] is None and rows["q"]["relative_update_norm"] is None
    assert rows["q"]["unchanged_fraction"] == 0.0
    assert rows["v"]["k"] == 1 and rows["v"]["principal_angle_left_max_deg"] == 0.0
    assert rows["q"]["principal_energy"] is None and rows["o"]["principal_angle_left_max_deg"] is None
    for row in result.matrices:
        for name, number in row.items():
            assert not isinstance(number, float) or math.isfinite(number), (row["role"], name)


UPDATE = CompareSettings(metrics=("update",))


def test_location_alone_decomposes_nothing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a matrix was decomposed")

    for name in ("svd", "svdvals", "eigh", "eigvalsh", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    result = compare(folders["base"], [folders["near"]], CompareSettings(metrics=("location",)))
    row = next(row for row in result.matrices if row["linear"])
    assert row["low_magnitude_overlap"] is not None and row["solver"] is None
    assert "principal_overlap" not in row and "spectral_shift" not in row


@pytest.mark.parametrize("group", ["changes", "location"])
def test_what_decomposes_nothing_does_not_even_import_torch(folders: dict[str, Path], group: str) -> None:
    program = (
        "import sys; from offprincipal.comparison import CompareSettings, compare; "
        f"compare(sys.argv[1], sys.argv[2:], CompareSettings(metrics=('{group}',))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, *map(str, (folders["base"], folders["near"]))], check=True)


def numbers(row: Row, names: Iterable[str] | None = None) -> list[float]:
    """The values of a row in a fixed order, NaN for what is undefined."""
    return [math.nan if row[name] is None else row[name] for name in sorted(row if names is None else names)]


@pytest.mark.parametrize("groups", [("changes",), ("location",), ("update",), ("changes", "update"), ("bounds",)])
def test_a_group_measures_what_all_groups_together_do(folders: dict[str, Path], groups: tuple[Group, ...]) -> None:
    """The columns of a group, and those of `changes`, whatever else is measured, pooled and by row."""
    runs = [folders["near"], folders["far"]]
    whole, found = (compare(folders["base"], runs, CompareSettings(metrics=g), cache=False) for g in (GROUPS, groups))
    names = {c.name for m in METRICS if m.group in ("changes", *groups) and not m.decomposes for c in m.columns}
    assert {"unchanged_fraction", "update_norm", "hidden_fraction"} <= names <= found.matrices[0].keys()
    assert ("update_norm_2" in found.matrices[0]) == ("update" in groups)
    assert ("singular_value_error" in found.matrices[0]) is False
    for row, known in zip(found.matrices, whole.matrices, strict=True):
        assert (row["tensor"], row["linear"]) == (known["tensor"], known["linear"])
        assert numbers(row, names) == pytest.approx(
            numbers(known, names), abs=0.02, nan_ok=True
        )  # score tests converge together
    for run, entry in found.summary["runs"].items():
        pooled = whole.summary["runs"][run]["metrics"]
        assert entry["metrics"].keys() >= names - {"changed_count"}
        for name in names - {"changed_count"}:
            assert numbers(entry["metrics"][name]) == pytest.approx(
                numbers(pooled[name]), abs=0.02, nan_ok=True
            )  # score tests converge together


def test_the_update_alone_leaves_the_base_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the base was decomposed")

    monkeypatch.setattr(BaseSpectrum, "_decompose", refuse)
    row = next(r for r in compare(folders["base"], [folders["near"]], UPDATE, cache=False).matrices if r["linear"])
    assert row["update_norm_2"] <= row["update_norm"] and row["update_stable_rank"] >= 1 and row["k"] is None


def test_what_is_rounding_of_the_decomposition_is_not_measured(tmp_path: Path) -> None:
    """One weight of 1e-17 doubles: bounds and shifts would compare LAPACK's rounding with it."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = gaussian(64, 48, seed=0).bfloat16()
    weight[0, 0] = 1e-17
    tuned = weight.clone()
    tuned[0, 0] = 2e-17
    base = write_model(tmp_path / "base", {name: weight})
    row = compare(base, [write_model(tmp_path / "tuned", {name: tuned})]).matrices[0]
    assert row["changed_count"] == 1
    for column in ("weyl_tightness", "mirsky_tightness", "wedin_tightness", "spectral_shift_per_norm"):
        assert row[column] is None, column


def test_where_the_base_has_no_principal_subspace_nothing_is_said_of_it(tmp_path: Path) -> None:
    weights = {
        "model.layers.0.self_attn.q_proj.weight": torch.eye(16),
        "model.layers.0.self_attn.k_proj.weight": torch.outer(torch.arange(1, 17), torch.ones(16)),
        "model.layers.0.self_attn.v_proj.weight": gaussian(16, 16, seed=0),
    }
    base = write_model(tmp_path / "base", stored(weights))
    rows = compare(base, [write_model(tmp_path / "tuned", stored(moved(weights, 0.01, 0)))]).matrices
    for row in rows:
        for column in ("principal_overlap", "safe_overlap", "principal_angle_left_max_deg", "principal_energy"):
            assert (row[column] is None) == (row["role"] != "v"), (row["role"], column)
        assert row["spectral_shift"] is not None and row["low_magnitude_overlap"] is not None


def test_two_runs_from_a_base_off_the_grid_have_no_null_beyond_chance(tmp_path: Path) -> None:
    """They share where in its rounding cell each weight lies, which the exponent does not tell."""
    weights = {
        name: 0.02 * gaussian(*tensor.shape, seed=i).float() for i, (name, tensor) in enumerate(base_weights().items())
    }
    base = write_model(tmp_path / "base", weights)
    runs = [write_model(tmp_path / name, moved(weights, 1e-5, seed)) for name, seed in (("a", 1), ("b", 2))]
    result = compare(base, runs)
    assert result.summary["pairs"][0]["jaccard"] is not None
    assert result.summary["pairs"][0]["jaccard_spacing_null"] is None
    assert result.summary["pairs"][0]["jaccard_z"] is None
    metrics = result.summary["runs"]["a"]["metrics"]
    null = metrics["unchanged_fraction_isotropic_null"]["value"]
    assert metrics["unchanged_fraction"]["value"] == pytest.approx(null, abs=0.02)


def test_a_base_in_another_type_than_its_run_is_warned_of(tmp_path: Path) -> None:
    weights = {
        name: 0.02 * gaussian(*tensor.shape, seed=i).float() for i, (name, tensor) in enumerate(base_weights().items())
    }
    result = compare(write_model(tmp_path / "base", weights), [write_model(tmp_path / "cast", stored(weights))])
    assert "part of the update is rounding" in " ".join(result.summary["runs"]["cast"]["warnings"])


def test_masters_of_another_checkpoint_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tuned = moved(base_weights(), 3e-3, 1)
    run = write_model(tmp_path / "run", stored(tuned), moved(base_weights(), 3e-3, 2))
    with pytest.raises(CheckpointError, match="masters of 'run' do not round"):
        compare(folders["base"], [run])


def test_numbers_at_the_edge_of_float64_are_decomposed_or_named(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = gaussian(8, 8, seed=0)
    for scale in (1e-200, 1e150):
        base = write_model(tmp_path / f"base {scale}", {name: weight * scale})
        tuned = write_model(tmp_path / f"tuned {scale}", {name: 1.5 * weight * scale})
        if scale > 1:
            with pytest.raises(CheckpointError, match=r"q_proj.weight of the base .*beyond bfloat16"):
                compare(base, [tuned])
        else:
            row = compare(base, [tuned], CompareSettings(metrics=("subspace",))).matrices[0]
            assert row["principal_angle_left_max_deg"] == pytest.approx(0, abs=1e-6)


def test_embeddings_are_pooled_only_when_asked_for(folders: dict[str, Path]) -> None:
    settings = CompareSettings(include_embeddings=True)
    result = compare(folders["base"], [folders["near"]], settings)
    assert result.summary["runs"]["near"]["metrics"]["spectral_shift"]["matrices"] == LINEAR + 1


def test_float32_checkpoints_are_compared_in_their_own_precision_too(tmp_path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in base_weights().items()}
    base = write_model(tmp_path / "base", weights)
    result = compare(base, [write_model(tmp_path / "tuned", moved(weights, 1e-6, 0))])
    metrics = result.summary["runs"]["tuned"]["metrics"]
    assert metrics["unchanged_fraction"]["value"] > 0.9 > 0.6 > metrics["unchanged_fraction_stored"]["value"]
    assert "float32" in result.summary["runs"]["tuned"]["warnings"][-1]


def test_two_runs_of_one_name_and_bad_settings_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match="two runs are named 'near'"):
        compare(folders["base"], [folders["near"], folders["near"]])
    with pytest.raises(ArgumentError, match="density is 0"):
        CompareSettings(matrix=MatrixSettings(density=0))
    with pytest.raises(ArgumentError, match="no metric group"):
        CompareSettings(metrics=("geometry",))  # type: ignore[arg-type]


def test_a_bad_tensor_leaves_no_output(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = base_weights()
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="down_proj"):
        compare(folders["base"], [write_model(tmp_path / "bad", weights)])


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        sample = torch.randn(40, generator=generator).tolist()
        pooled = estimate_ratio([(x, 1.0) for x in sample]).pooled()
        assert pooled.low is not None and pooled.high is not None
        hits += pooled.low <= 0 <= pooled.high
    assert 175 <= hits <= 199


@pytest.mark.parametrize("text", ["", "spectral_shift", "spectral_shift > x", "spectral_shift == 1", "k > 1"])
def test_a_condition_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse_condition(text)


def test_conditions_hold_for_the_runs_they_hold_for(result: Comparison) -> None:
    found = parse_condition("relative_update_norm > 0.02").held_by(result.summary)
    assert [phrase.split(":")[0] for phrase in found] == ["far"]
    assert parse_condition("unchanged_fraction >= 2").held_by(result.summary) == []


def test_a_condition_on_what_is_not_measured_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no metric 'principal_angle_left_max_deg' is measured"):
        parse_condition("principal_angle_left_max_deg > 10", ("location",))


def test_an_interval_needs_more_than_one_matrix_and_ignores_tensors_that_do_not_count() -> None:
    assert estimate_ratio([(1.0, 2.0)]).pooled().low is None
    rows = [{"linear": True, "update_norm": 1.0, "numel": 4} for _ in range(20)]
    rows += [{"linear": False, "update_norm": 9.0, "numel": 4} for _ in range(20)]
    pooled = pool_column("update_norm", rows).pooled()
    assert pooled.value == pooled.low == pooled.high == pytest.approx(20**0.5)
    assert pooled.matrices == 20


def test_a_null_is_pooled_over_the_matrices_of_its_figure() -> None:
    angle, null = "principal_angle_left_max_deg", "principal_angle_left_max_deg_stored_null"
    rows = [{"linear": True, "numel": 4, angle: 3.0, null: 2.0}, {"linear": True, "numel": 4, angle: None, null: 0.1}]
    assert [pool_column(name, rows).value for name in (angle, null)] == [3.0, 2.0]
    nulls = [column for metric in METRICS for column in metric.columns if column.name.endswith("_null")]
    pooled = {column.name for metric in METRICS for column in metric.columns if column.pool != "none"}
    assert {column.beside for column in nulls} <= pooled | {None}
    of_linear = {"unchanged_fraction_rounding_null", "unchanged_fraction_scaled_null"}  # and the figure of every tensor
    assert {column.name for column in nulls if column.beside is None} == of_linear


def test_a_base_that_the_run_was_not_trained_from_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    def notes(base: Path, run: Path) -> str:
        return " ".join(compare(base, {"run": run}, metrics=("changes",)).summary["runs"]["run"]["warnings"])

    base, tuned, other = (shutil.copytree(folders[name], tmp_path / name) for name in ("base", "near", "far"))
    assert not re.search("trained from|swapped|away", notes(base, tuned))
    (tuned / "run.json").write_text(json.dumps({"base": {"source": str(base)}}))
    assert not re.search("trained from|swapped|away", notes(base, tuned))
    assert "are the two swapped?" in notes(tuned, base)
    assert "according to its run.json it was trained from 'base', not from this base" in notes(other, tuned)
    for record in ("[]", '{"base": 3}', '{"base": {"source": "\\u0000"}}', '{"base": {"source": "gone"}}', "{" * 9999):
        (tuned / "run.json").write_text(record)
        assert not re.search("trained from|swapped", notes(base, tuned))
    unrelated = write_model(tmp_path / "unrelated", {name: x.flip(0) for name, x in base_weights().items()})
    assert "Was it really trained from this base?" in notes(base, unrelated)


def test_records_tell_a_base_that_is_a_run_and_a_run_of_another_base(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two, base = (shutil.copytree(folders[name], Path(name)) for name in ("near", "far", "base"))
    swapped, siblings = "are the two swapped?", "the difference between two runs"

    def trained(run: Path, source: str, weights: str | None = None) -> None:
        record = {"source": source} | ({} if weights is None else {"weights_blake2b": weights})
        (run / "run.json").write_text(json.dumps({"base": record}))

    def notes(of_base: Path | str, of_run: Path | str) -> str:
        """What is noted of two checkpoints; `name=folder` stands for what the Hub has under that name."""
        opened = []
        for given in (of_base, of_run):
            name, hub, folder = str(given).partition("=")
            opened.append(SafetensorsFolder(Path(folder), name) if hub else open_checkpoint(given))
        return " ".join(lineage_warnings(opened[0], opened[1], ()))

    for source, as_base in (("embedded", "embedded"), ("org/m", "org/m=base"), ("org/m@main", "org/m=base")):
        trained(one, source, "ab12")
        trained(two, source)
        assert swapped in notes(one, as_base)
        assert notes(as_base, one) == "" == notes(one, one), source
        assert siblings in notes(one, two), source
        assert f"both it and the base are runs that were trained from '{source.removesuffix('@main')}'" in notes(
            one, two
        )
        assert f"it was trained from '{source.removesuffix('@main')}', not" in notes("org/other=base", one), source
    trained(two, "base", "ab12")  # a copy of what the Hub has
    assert siblings in notes(one, two)
    trained(two, "base", "cd34")
    assert siblings not in notes(one, two)
    assert "it was trained from 'base', not from this base" in notes(one, two)
    assert notes(base, two) == "" == notes("base", two)
    trained(two, "near")  # a run of a run
    assert notes(one, two) == ""
    trained(two, "org/m@step_1")
    assert notes("org/m=base", two) == "", "the commit may be that of the branch"
    assert notes(base, two) == "", "the folder may be a copy of it"
    assert "it was trained from 'org/m@step_1'" in notes("org/m@step_2=base", two)


def test_masters_have_the_record_of_their_run(folders: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(folders["near"], tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"base": {"source": str(folders["base"])}}))
    base, of_masters = open_checkpoint(folders["base"]), open_checkpoint(run / "masters")
    assert "are the two swapped?" in lineage_warnings(of_masters, base, ())[0]
    assert lineage_warnings(base, of_masters, ()) == []


def test_a_measured_matrix_is_let_go_at_once(folders: dict[str, Path]) -> None:
    gc.collect()
    gc.disable()
    try:
        found = compare(folders["base"], [folders["near"], folders["far"]], threads=1)
        alive = [type(kept).__name__ for kept in gc.get_objects() if type(kept) in (BaseMatrix, MatrixPair)]
    finally:
        gc.enable()
    assert alive == []
    assert all(row["values"].flags.owndata for row in found.curves)  # a view would pin all that it was cut from


def test_what_is_left_out_to_save_time_changes_nothing_else() -> None:
    rng = np.random.default_rng(5)
    W = rng.standard_normal((40, 64)) * 0.02
    base, tuned = (x.astype(ml_dtypes.bfloat16) for x in (W, W + 1e-4 * rng.standard_normal(W.shape)))
    part = Part("q", "q", Place("q", 0), 0, W.shape)
    rows = [
        measure_matrix(part, base, {"r": tuned}, {}, GROUPS, settings).matrices[0]
        for settings in (MatrixSettings(), MatrixSettings(mask_tests=False, stored_null=False))
    ]
    differing = {name for name, value in rows[0].items() if value != rows[1][name]}
    tested = {f"{mask}_{what}" for mask in ("principal", "low_magnitude", "safe") for what in ("z", "log_odds")}
    assert tested < differing and {rows[1][name] for name in differing} == {None}
    assert all("_stored_null" in name or re.search("_z$|_log_odds|_margin_null", name) for name in differing)


def test_what_moved_off_a_zero_matrix_counts_in_the_pooled_norm(tmp_path: Path) -> None:
    """Its own ratio is undefined; the root of sums of squares is not."""
    weights = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(4, 4).bfloat16() for i in range(2)}
    still = weights | {"model.layers.1.self_attn.q_proj.weight": torch.full((4, 4), 3.0).bfloat16()}
    run = still | {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4).bfloat16()}
    folders = write_model(tmp_path / "base", still), write_model(tmp_path / "run", run)
    result = compare(folders[0], {"run": folders[1]}, CompareSettings(metrics=("changes",)))
    assert [row["relative_update_norm"] for row in result.matrices] == [None, 0.0]
    assert value(result, "run", "relative_update_norm") == pytest.approx(1 / 3)


def test_masters_that_are_elsewhere_are_given(folders: dict[str, Path], tmp_path: Path) -> None:
    """As if they were beside the weights: the same tables, and nothing else of that place."""
    elsewhere, bare = tmp_path / "optimizer" / "float32", tmp_path / "near"
    elsewhere.mkdir(parents=True)
    bare.mkdir()
    shutil.copy(folders["near"] / "masters" / "model.safetensors", elsewhere)
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folders["near"] / name).read_bytes())
    beside = compare(folders["base"], {"near": folders["near"]}, CompareSettings(metrics=("location",)))
    given = compare(
        folders["base"], {"near": bare}, CompareSettings(metrics=("location",)), masters={"near": elsewhere}
    )
    assert given.matrices == beside.matrices and given.matrices[0]["hidden_fraction"] is not None
    assert given.summary["runs"]["near"]["masters"] == str(elsewhere)
    with pytest.raises(ArgumentError, match="masters are given for 'far', which is not a run"):
        compare(folders["base"], {"near": bare}, masters={"far": elsewhere})
    with pytest.raises(CheckpointError, match=r"is given as masters, but stores .* in bfloat16"):
        compare(folders["base"], {"near": bare}, masters={"near": bare})
    with pytest.raises(CheckpointError, match="do not round to its stored weights"):
        compare(folders["base"], {"far": folders["far"]}, masters={"far": elsewhere})


def test_masters_are_named_on_the_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    masters = folders["near"] / "masters"
    command = [sys.executable, "-m", "offprincipal", "compare", str(folders["base"]), "--metrics", "changes"]
    for runs, named, code in (
        ([f"near={folders['near']}"], f"near={masters}", 0),
        ([f"near={folders['near']}"], str(masters), 0),
        ([f"near={folders['near']}", f"far={folders['far']}"], str(masters), 2),
        ([f"near={folders['near']}", f"far={folders['far']}"], f"near={masters}", 0),
    ):
        options = ["--masters", named, "--out", str(tmp_path / "out")]
        done = subprocess.run([*command, *runs, *options], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        if code == 0:
            page = (tmp_path / "out" / "report.html").read_text()
            assert f"--masters near={masters.relative_to(folders['base'].parent)}" in page


@pytest.mark.parametrize("kept", [False, True])
def test_what_the_ruler_may_miss_is_said_where_it_is_used(tmp_path: Path, kept: bool) -> None:
    """Steps of one size, at which the rounding null without masters is furthest off."""
    weights = {"model.layers.0.mlp.up_proj.weight": (0.02 * gaussian(256, 384, seed=0)).bfloat16()}
    sign = gaussian(256, 384, seed=1).sign()
    masters = {name: (tensor.double() + 6.3e-5 * sign).float() for name, tensor in weights.items()}
    run = write_model(tmp_path / "run", stored(masters), masters if kept else None)
    found = compare(write_model(tmp_path / "base", weights), {"run": run}, metrics="location")  # type: ignore[arg-type]
    said = [text for text in found.summary["runs"]["run"]["warnings"] if "estimated from small weights" in text]
    rungs = found.summary["runs"]["run"]["anatomy"]["low_magnitude"]
    assert (
        abs(rungs["spacing"] - rungs["rounding"]) < 0.002 if kept else abs(rungs["spacing"] - rungs["rounding"]) > 0.02
    )
    assert bool(said) is not kept


def test_a_run_is_told_what_another_run_leaves_out_of_its_figures(tmp_path: Path) -> None:
    weights = base_weights()
    base = write_model(tmp_path / "base", weights)
    whole = write_model(tmp_path / "whole", stored(moved(weights, 1e-3, 1)))
    lost = "model.layers.1.mlp.down_proj.weight"
    less = {name: tensor for name, tensor in stored(moved(weights, 1e-3, 2)).items() if name != lost}
    found = compare(base, {"whole": whole, "less": write_model(tmp_path / "less", less)}, metrics=("changes",)).summary
    (warning,) = [w for w in found["runs"]["whole"]["warnings"] if "left out" in w]
    assert warning.startswith(f"1 tensors that it shares with the base, such as {lost}, are left out")
    assert not any("shares with the base" in w for w in found["runs"]["less"]["warnings"])
