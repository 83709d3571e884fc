"""Comparisons by the fast solvers against those by LAPACK, and the cache of decomposed bases."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_folders import write_model
from matrices import gaussian, orthogonal
from safetensors.torch import load_file, save_file
from torch import Tensor

from offprincipal.comparison import CompareSettings, Comparison, MatrixSettings, compare
from offprincipal.comparison.cache import DEFAULT_LIMIT, BaseCache, Kept
from offprincipal.comparison.comparison import _error_bounds
from offprincipal.comparison.measure import Row
from offprincipal.files import cache_folder
from offprincipal.measures.pair import BaseMatrix
from offprincipal.measures.settings import Solver
from offprincipal.measures.spectral import BaseSpectrum

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (300, 512), "model.layers.0.mlp.down_proj.weight": (512, 300)}
K = 38  # an eighth of 300
FILES = ("matrices.parquet", "masks.parquet", "pairs.parquet", "curves.parquet", "summary.json")


def weights_of(scale: float = 1.0) -> dict[str, Tensor]:
    """bfloat16 matrices with a spectrum that falls like a power of the rank."""
    weights = {}
    for seed, (name, (n, m)) in enumerate(SHAPES.items()):
        S = scale * torch.arange(1, 301, dtype=torch.float64) ** -0.6
        weights[name] = ((orthogonal(n, seed)[:, :300] * S) @ orthogonal(m, seed + 10)[:300]).bfloat16()
    return weights


def updated(weights: dict[str, Tensor], relative: float, seed: int) -> dict[str, Tensor]:
    """bfloat16 weights after a Gaussian update of a relative norm."""
    found = {}
    for i, (name, tensor) in enumerate(weights.items()):
        noise = gaussian(*tensor.shape, seed=seed + i)
        found[name] = (tensor.double() + relative * tensor.double().norm() * noise / noise.norm()).bfloat16()
    return found


def settings_of(**chosen: object) -> CompareSettings:
    return CompareSettings(matrix=MatrixSettings(**chosen))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wide")
    weights = weights_of()
    return {
        "base": write_model(root / "base", weights),
        "near": write_model(root / "near", updated(weights, 3e-3, 100)),
        "far": write_model(root / "far", updated(weights, 3e-2, 200)),
    }


def compared(folders: dict[str, Path], **chosen: object) -> Comparison:
    return compare(folders["base"], [folders["near"], folders["far"]], settings_of(**chosen), cache=False)


@pytest.fixture(scope="module")
def by_lapack(folders: dict[str, Path]) -> Comparison:
    return compared(folders, solver="exact")


@pytest.fixture(scope="module", params=["auto", "randomized"])
def fast(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Comparison:
    return compared(folders, solver=request.param)


def pairs_of(fast: Comparison, exact: Comparison) -> list[tuple[Row, Row]]:
    """The rows of the same tensor and run."""
    by_key = {(row["run"], row["tensor"]): row for row in exact.matrices}
    return [(row, by_key[row["run"], row["tensor"]]) for row in fast.matrices]


def test_every_row_says_who_solved_it_and_how_well(fast: Comparison, by_lapack: Comparison) -> None:
    for row, exact in pairs_of(fast, by_lapack):
        assert row["solver"] in ("warm", "randomized") and exact["solver"] == "exact"
        assert 0 < row["singular_value_error_relative"] <= 1e-3
        assert row["singular_value_error"] > 0 and 0 < row["angle_error_deg"] <= 90
        assert exact["singular_value_error"] is exact["singular_value_error_relative"] is None
        assert exact["angle_error_deg"] is None
    for run in ("near", "far"):
        assert sum(fast.summary["runs"][run]["solvers"].values()) == len(SHAPES)
        (warning,) = fast.summary["runs"][run]["warnings"]
        assert warning.startswith("2 matrices were approximated: their singular values are correct to ")
        assert by_lapack.summary["runs"][run]["warnings"] == []


def test_the_shift_is_over_the_top_values_whoever_solves_it(fast: Comparison, by_lapack: Comparison) -> None:
    values = {(r["run"], r["tensor"]): r["values"] for r in by_lapack.curves if r["curve"] == "singular_values"}
    base = {r["tensor"]: r["values"] for r in by_lapack.curves if r["curve"] == "singular_values_base"}
    for row, exact in pairs_of(fast, by_lapack):
        before, after = base[row["tensor"]], values[row["run"], row["tensor"]]
        shift, full = (np.linalg.norm((after - before)[:n]) / np.linalg.norm(before[:n]) for n in (K, 300))
        error = 2 * K**0.5 * (row["singular_value_error"] or 0) / np.linalg.norm(before[:K])
        assert abs(row["spectral_shift"] - shift) <= error
        assert exact["spectral_shift"] == pytest.approx(shift, abs=1e-12)
        assert exact["spectral_shift_full"] == pytest.approx(full, abs=1e-12)
        assert row["spectral_shift_full"] is None


def test_angles_agree_within_their_error_bound(fast: Comparison, by_lapack: Comparison) -> None:
    names = [f"principal_angle_{side}_{which}_deg" for side in ("left", "right") for which in ("max", "mean", "rms")]
    told = 0
    for row, exact in pairs_of(fast, by_lapack):
        for name in names:
            told += row[name] is not None
            found = 0.0 if row[name] is None else row[name]  # within its error of nothing
            assert abs(found - exact[name]) <= 2 * row["angle_error_deg"] + 1e-6
    assert told >= len(names) or all(row["solver"] == "randomized" for row in fast.matrices)


def test_warm_starts_are_as_good_as_exact_ones_for_small_updates(
    folders: dict[str, Path], by_lapack: Comparison
) -> None:
    close = ["principal_energy", "principal_energy_left", "update_norm_2", "update_stable_rank"]
    for row, exact in pairs_of(compared(folders), by_lapack):
        for side in ("left", "right"):
            name = f"principal_angle_{side}_mean_deg"
            if row["run"] == "near" and row[name] is not None:
                assert row[name] == pytest.approx(exact[name], rel=2e-2)
                for null in ("isotropic_null", "stored_null"):  # drawn in another precision, so of other updates
                    assert row[f"{name}_{null}"] == pytest.approx(exact[f"{name}_{null}"], rel=0.25)
        for name in close:
            assert row[name] == pytest.approx(exact[name], rel=1e-3)
        assert row["update_effective_rank"] == pytest.approx(exact["update_effective_rank"], rel=1e-2)


def test_masks_agree_and_what_needs_no_decomposition_is_the_same(fast: Comparison, by_lapack: Comparison) -> None:
    for row, exact in pairs_of(fast, by_lapack):
        for name in ("principal_overlap", "safe_overlap", "principal_overlap_margin_null"):
            assert row[name] == pytest.approx(exact[name], abs=1e-3)
        for name in ("unchanged_fraction", "low_magnitude_overlap", "random_overlap", "row_dispersion", "update_norm"):
            assert row[name] == exact[name]
    assert fast.pairs == by_lapack.pairs


def test_no_bound_is_broken_beyond_the_error_bounds(fast: Comparison) -> None:
    for row in fast.matrices:
        slack = 2 * row["singular_value_error"] / row["update_norm_2"]
        for bound, least in (("weyl", slack), ("ky_fan", slack), ("mirsky", K**0.5 * slack), ("wedin", slack)):
            assert row[f"{bound}_tightness"] is None or row[f"{bound}_tightness"] <= 1 + least + 1e-6
    assert any(row["weyl_tightness"] is not None for row in fast.matrices)


def test_curves_hold_no_value_that_has_not_converged(fast: Comparison, by_lapack: Comparison) -> None:
    whole = {
        (row["run"], row["tensor"]): row["values"] for row in by_lapack.curves if row["curve"] == "singular_values"
    }
    errors = {(row["run"], row["tensor"]): row["singular_value_error"] for row in fast.matrices}
    for row in fast.curves:
        if row["curve"] == "singular_values":
            key = row["run"], row["tensor"]
            assert len(row["values"]) == K
            assert np.abs(row["values"] - whole[key][:K]).max() <= errors[key]


def test_the_tightness_of_a_run_does_not_depend_on_what_solved_it(folders: dict[str, Path]) -> None:
    """Of the same singular values, whether the run was solved from the base or missed the tolerance."""
    warm, whole = compared(folders), compared(folders, tolerance=1e-9)
    for one, other in zip(warm.matrices, whole.matrices, strict=True):
        assert (one["solver"], other["solver"]) == ("warm", "exact")
        for bound in ("weyl", "mirsky", "ky_fan"):
            assert one[f"{bound}_tightness"] == pytest.approx(other[f"{bound}_tightness"], rel=0.02)


def test_a_tolerance_of_nothing_means_lapack(folders: dict[str, Path], by_lapack: Comparison) -> None:
    strict = compared(folders, tolerance=0.0)
    assert strict.matrices == by_lapack.matrices and strict.masks == by_lapack.masks


def test_small_matrices_are_exact_whatever_the_solver(folders: dict[str, Path], by_lapack: Comparison) -> None:
    assert compared(folders, solver="randomized", exact_up_to=300).matrices == by_lapack.matrices


def test_a_tolerance_that_is_missed_ends_in_a_whole_solution_and_a_warning(folders: dict[str, Path]) -> None:
    for solver in ("auto", "randomized"):
        found = compared(folders, solver=solver, tolerance=1e-9)
        assert {row["solver"] for row in found.matrices} == {"exact"}
        assert all(row["singular_value_error_relative"] <= 1e-9 for row in found.matrices)
        (warning,) = found.summary["runs"]["near"]["warnings"]  # and none that they were approximated
        assert "2 matrices missed the tolerance" in warning


@pytest.mark.parametrize("float64_up_to", [0, 1000])
@pytest.mark.parametrize("solver", ["auto", "randomized"])
def test_an_update_too_small_for_float32_is_worked_on_in_float64(
    solver: str, float64_up_to: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = weights_of()
    name = next(iter(SHAPES))
    row, column = divmod(int(weights[name].abs().argmin()), SHAPES[name][1])
    weights[name][row, column] *= 2
    tiny = write_model(tmp_path / "tiny", weights)
    found = compare(folders["base"], [tiny], settings_of(solver=solver, float64_up_to=float64_up_to), cache=False)
    moved, same = sorted(found.matrices, key=lambda line: -line["changed_count"])
    assert moved["changed_count"] == 1 and moved["solver"] == "warm"
    assert same["changed_count"] == 0 and same["spectral_shift"] == 0 == same["principal_angle_left_max_deg"]
    exact = compare(folders["base"], [tiny], settings_of(solver="exact"), cache=False).matrices
    expected = next(line for line in exact if line["tensor"] == name)
    for figure in ("spectral_shift", "principal_angle_left_max_deg", "principal_energy"):
        assert moved[figure] == pytest.approx(expected[figure], rel=1e-4), figure
    assert moved["angle_error_deg"] < 1e-6


@pytest.mark.parametrize("solver", ["auto", "randomized"])
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_the_scale_of_the_weights_decides_nothing(
    solver: str, scale: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    here = compared(folders, solver=solver)
    both = (load_file(folders[name] / "model.safetensors") for name in ("base", "near"))
    sides = [{name: tensor * scale for name, tensor in side.items()} for side in both]
    base, near = (write_model(tmp_path / name, side) for name, side in zip(("base", "near"), sides, strict=True))
    there = compare(base, [near], settings_of(solver=solver), cache=False)
    for row, same in pairs_of(there, here):
        assert row["singular_value_error_relative"] <= 1e-3
        for name in ("unchanged_fraction", "principal_overlap", "low_magnitude_overlap"):
            assert row[name] == pytest.approx(same[name], abs=1e-4)
        assert row["solver"] == same["solver"]
        assert (row["weyl_tightness"] is None) == (same["weyl_tightness"] is None)
        for name in ("spectral_shift", "principal_energy", "update_effective_rank", "update_stable_rank"):
            assert row[name] == pytest.approx(same[name], rel=1e-2)


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def run(folders: dict[str, Path], out: Path, cache: str | Path | bool) -> dict[str, bytes]:
    """The bytes of the tables of one comparison."""
    compare(folders["base"], [folders["near"], folders["far"]], out=out, cache=cache)
    return tables(out)


def test_a_kept_base_changes_no_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "bases"
    first = run(folders, tmp_path / "first", cache)
    assert BaseCache(cache).info().matrices == len(SHAPES)
    assert run(folders, tmp_path / "second", cache) == first
    assert run(folders, tmp_path / "without", False) == first
    assert BaseCache(cache).info().matrices == len(SHAPES)


def test_twins_share_what_is_kept_and_no_byte_tells(tmp_path: Path) -> None:
    """A decomposition from a random start must not depend on a tensor's name: the cache knows its bytes alone."""
    name, weight = next(iter(weights_of().items()))
    twins = {name: weight, name.replace("q_proj", "k_proj"): weight.clone()}
    base, near = write_model(tmp_path / "base", twins), write_model(tmp_path / "near", updated(twins, 3e-3, 1))
    for out, cache in (("kept", tmp_path / "bases"), ("without", False)):
        compare(base, [near], settings_of(solver="randomized"), out=tmp_path / out, cache=cache)
    assert BaseCache(tmp_path / "bases").info().matrices == 1
    assert tables(tmp_path / "kept") == tables(tmp_path / "without")


def test_what_is_kept_is_what_is_used(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(folders, tmp_path / "first", tmp_path / "bases")
    monkeypatch.setattr(BaseSpectrum, "_decompose", lambda self: pytest.fail("decomposed again"))
    assert run(folders, tmp_path / "second", tmp_path / "bases") == before


FORGERIES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "values halved": lambda t: t | {"S": t["S"] / 2},
    "directions turned": lambda t: t | {"Vh": t["Vh"].roll(1, 1)},
    "two directions exchanged": lambda t: t | {"U": t["U"][:, [1, 0, *range(2, t["U"].shape[1])]]},
    "a direction stretched": lambda t: t | {"Vh": t["Vh"] * 1.01},
    "the basis turned": lambda t: t | {"basis": t["basis"].roll(1, 1)},
    "no number": lambda t: t | {"U": t["U"] * float("nan")},
    "fewer": lambda t: t | {"U": t["U"][:, :3].contiguous()},
    "masks of another": lambda t: t | {"masks": t["masks"][:, 1:].contiguous()},
    "no masks": lambda t: {name: tensor for name, tensor in t.items() if name != "masks"},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_entry_with_a_valid_checksum_is_not_believed(
    forgery: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "bases"
    before = run(folders, tmp_path / "first", cache)
    about = {"solver": "exact", "residual": "0.0", "singular_value_error": "1e-9", "next_value_error": "0.0"}
    for path in list(cache.iterdir()):
        tensors = load_file(path)
        path.unlink()
        forged = FORGERIES[forgery](tensors), about
        BaseCache(cache).get(path.stem, lambda: None, lambda _, kept=forged: kept, lambda _: None)
        assert path.exists()
    assert run(folders, tmp_path / "second", cache) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("how", ["another user's", "a link"])
def test_an_entry_of_another_owner_is_not_used(how: str, folders: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "bases"
    before = run(folders, tmp_path / "first", cache)
    for path in list(cache.iterdir()):
        if how == "a link":
            path.replace(tmp_path / path.name)
            path.symlink_to(tmp_path / path.name)
        else:
            os.chown(path, 65534, 65534)
        assert (
            BaseCache(cache).get(path.stem, lambda: "anew", lambda _: ({"a": torch.zeros(1)}, {}), lambda _: "kept")
            == "anew"
        )
    assert run(folders, tmp_path / "second", cache) == before


@pytest.mark.parametrize("damage", ["empty", "noise", "cut", "a flipped bit", "other tensors", "a folder"])
def test_a_damaged_cache_is_computed_anew(damage: str, folders: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "bases"
    before = run(folders, tmp_path / "first", cache)
    for path in list(cache.iterdir()):
        content = path.read_bytes()
        path.unlink()
        if damage == "other tensors":
            save_file({"U": torch.zeros(3)}, path)
        elif damage == "a folder":
            path.mkdir()
        else:
            flipped = content[:-1] + bytes([content[-1] ^ 1])
            cut = content[: len(content) // 2]
            path.write_bytes({"empty": b"", "noise": b"\xff" * 1000, "cut": cut, "a flipped bit": flipped}[damage])
    assert run(folders, tmp_path / "second", cache) == before
    if damage != "a folder":
        assert all(load_file(path)["S"].shape == (300,) for path in cache.iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert run(folders, tmp_path / "out", tmp_path / "file") == run(folders, tmp_path / "without", False)
    assert (tmp_path / "file").read_text() == "no folder"


def test_two_processes_share_a_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    program = "import sys; from offprincipal.comparison import compare; compare(*sys.argv[1:3], out=sys.argv[3])"
    environment = {**os.environ, "OFFPRINCIPAL_CACHE": str(tmp_path / "bases")}
    outs = [tmp_path / "one", tmp_path / "two"]
    started = [
        subprocess.Popen([sys.executable, "-c", program, folders["base"], folders["near"], out], env=environment)
        for out in outs
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert tables(outs[0]) == tables(outs[1])
    assert len(list((tmp_path / "bases").iterdir())) == BaseCache(tmp_path / "bases").info().matrices == len(SHAPES)


def test_the_folder_is_what_the_environment_says(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path / "bases"))
    run(folders, tmp_path / "out", True)
    assert BaseCache(tmp_path / "bases").info().matrices == len(SHAPES)
    run(folders, tmp_path / "without", False)
    run(folders, tmp_path / "another", tmp_path / "elsewhere")
    assert BaseCache(tmp_path / "elsewhere").info().matrices == len(SHAPES)
    monkeypatch.delenv("OFFPRINCIPAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "offprincipal" / "bases"


@pytest.mark.parametrize(("text", "limit"), [("0.5", 1 << 29), ("much", DEFAULT_LIMIT), ("inf", DEFAULT_LIMIT)])
def test_its_limit_is_what_the_environment_says(
    text: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFPRINCIPAL_CACHE_LIMIT_GB", text)
    assert BaseCache(tmp_path).limit == limit


APPROXIMATE = MatrixSettings(exact_up_to=8)


def keep(number: int) -> Kept:
    return {"number": torch.full((1000,), float(number))}, {}


def restore(kept: Kept) -> int:
    return int(kept[0]["number"][0])


def never() -> int:
    raise AssertionError("what is kept was computed")


def test_a_full_cache_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    roomy = BaseCache(tmp_path)
    for age, name in enumerate("ab"):
        assert roomy.get(name, lambda age=age: age, keep, restore) == age
        os.utime(tmp_path / f"{name}.safetensors", (1 + age, 1 + age))
    size = (tmp_path / "a.safetensors").stat().st_size
    assert roomy.get("a", never, keep, restore) == 0
    BaseCache(tmp_path, limit=int(2.5 * size)).get("c", lambda: 2, keep, restore)
    assert not (tmp_path / "b.safetensors").exists()
    assert (roomy.get("a", never, keep, restore), roomy.get("c", never, keep, restore)) == (0, 2)
    BaseCache(tmp_path, limit=0).get("b", lambda: 1, keep, restore)
    assert roomy.info().matrices == 1
    assert roomy.get("b", never, keep, restore) == 1
    (tmp_path / ".b.safetensors.left").write_bytes(b"by a killed process")
    assert roomy.clear().matrices == 1
    assert list(tmp_path.iterdir()) == []


def base_in(folder: Path, seed: int, settings: MatrixSettings = APPROXIMATE, name: str = "W") -> BaseMatrix:
    weight = gaussian(40, 60, seed=seed).float().numpy()
    return BaseMatrix(name, weight, settings, cache=BaseCache(folder))


def test_a_base_is_known_by_its_bytes_and_by_what_decides_its_decomposition(tmp_path: Path) -> None:
    bases = [
        base_in(tmp_path, 0),
        base_in(tmp_path, 1),
        BaseMatrix(
            "W", gaussian(40, 60, seed=0).float().numpy().reshape(60, 40), APPROXIMATE, cache=BaseCache(tmp_path)
        ),
        *(
            base_in(tmp_path, 0, replace(APPROXIMATE, **change))
            for change in (
                {"rank_fraction": 0.2},
                {"density": 0.4},
                {"tolerance": 1e-4},
                {"solver": "randomized"},
                {"solver": "exact"},
            )
        ),
    ]
    for count, base in enumerate(bases, start=1):
        base.spectral.decomposition  # noqa: B018
        assert BaseCache(tmp_path).info().matrices == count
    for settings in (replace(APPROXIMATE, null_draws=9), replace(APPROXIMATE, seed=7)):
        base_in(tmp_path, 0, settings, "another name").spectral.decomposition  # noqa: B018
    assert BaseCache(tmp_path).info().matrices == len(bases)


@pytest.mark.parametrize("solver", ["auto", "exact"])
def test_what_comes_back_from_the_cache_is_what_went_in(solver: Solver, tmp_path: Path) -> None:
    put, got = (base_in(tmp_path, 3, replace(APPROXIMATE, solver=solver)).spectral.decomposition for _ in range(2))
    assert put is not got
    for name in ("U", "S", "Vh"):
        assert torch.equal(getattr(put.svd, name), getattr(got.svd, name))
    assert (put.svd.basis is None) == (got.svd.basis is None) == (solver == "exact")
    for name in ("solver", "singular_value_error", "residual"):
        assert getattr(put.svd, name) == getattr(got.svd, name)
    assert put.masks is not None and got.masks is not None
    np.testing.assert_array_equal(put.masks, got.masks)


def test_shifts_within_their_error_bound_are_counted_in_the_note() -> None:
    def row(shift: float | None) -> Row:
        return {
            "solver": "warm",
            "singular_value_error_relative": 1e-3,
            "spectral_shift": shift,
            "angle_error_deg": 0.5,
        }

    said = "their singular values are correct to 1.0e-03, their principal angles to 0.5°"
    assert _error_bounds([row(1e-2), row(2e-2)]) == [f"2 matrices were approximated: {said}"]
    (note,) = _error_bounds([row(1e-4), row(1e-2), row(None), row(9e-4)])
    assert note == f"4 matrices were approximated: {said}; of 2 of them the spectral shift is within its error bound"
