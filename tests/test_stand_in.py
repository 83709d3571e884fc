"""The paths of a GPU, run where there is none, on a device that stands in for one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_gpu
import torch
from checkpoint_folders import base_and_two_runs
from stand_in import GPU, Elsewhere, stand_in

from offprincipal.comparison import CompareSettings, MatrixSettings, compare
from offprincipal.geometry import overlaps, spectrum
from offprincipal.trajectories import trajectory


def test_it_computes_as_the_cpu_does_and_refuses_to_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with stand_in(monkeypatch):
        there = x.to(GPU)
        assert isinstance(there, Elsewhere) and there.device == GPU
        product = there.T @ there
        assert isinstance(product, Elsewhere)
        assert torch.equal(product.cpu(), x.T @ x)
        assert torch.zeros(2, device=GPU).device == GPU
        assert torch.linalg.svdvals(there).cpu().tolist() == torch.linalg.svdvals(x).tolist()
        there[0] = 0.0
        assert float(there[0].abs().sum()) == 0
        for mix in (lambda: there + x, lambda: there @ x.T, lambda: x.add_(there), lambda: torch.cat([there, x])):
            with pytest.raises(RuntimeError, match="the cpu meet"):
                mix()
        with pytest.raises(Exception, match=r"meta|numpy|storage"):
            there.numpy()
        assert float((there * 2.0).sum()) == float((there.cpu() * 2.0).sum())


SOLVERS = {
    "warm": MatrixSettings(exact_up_to=4, float64_up_to=0),
    "randomized": MatrixSettings(exact_up_to=4, float64_up_to=0, solver="randomized"),
    "float64": MatrixSettings(exact_up_to=4),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_comparison_there_is_the_cpus(solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, runs = base_and_two_runs(tmp_path)
    settings = SOLVERS[solver]
    here = compare(base, runs, CompareSettings(matrix=settings), threads=2, cache=False)
    seen: list[str] = []
    solve = spectrum._ritz
    monkeypatch.setattr(
        spectrum, "_ritz", lambda A, *rest, **how: (seen.append(A.device.type), solve(A, *rest, **how))[1]
    )
    elsewhere = MatrixSettings(**{**vars(settings), "device": "cuda"})
    with stand_in(monkeypatch):
        there = compare(base, runs, CompareSettings(matrix=elsewhere), threads=2, cache=tmp_path / "bases")
        again = compare(base, runs, CompareSettings(matrix=elsewhere), threads=2, cache=tmp_path / "bases")
    assert set(seen) == {GPU.type}
    for found in (there, again):
        for one, two in zip(here.matrices, found.matrices, strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                if isinstance(value, float):
                    assert two[name] == pytest.approx(value, rel=1e-5, abs=1e-9), (one["tensor"], name)
                else:
                    assert two[name] == value, (one["tensor"], name)
        for one, two in zip(here.curves, found.curves, strict=True):
            np.testing.assert_allclose(two["values"], one["values"], rtol=1e-5, atol=1e-9)


def test_where_its_memory_runs_out_a_matrix_is_measured_on_the_cpu_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, runs = base_and_two_runs(tmp_path)
    settings = SOLVERS["warm"]
    here = compare(base, runs, CompareSettings(matrix=settings), cache=False)
    solve, full = spectrum._ritz, iter([False, False, True, False, True])

    def short_of_memory(A: torch.Tensor, V: torch.Tensor, refined: bool = True) -> object:
        if A.device == GPU and next(full, False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return solve(A, V, refined)

    monkeypatch.setattr(spectrum, "_ritz", short_of_memory)
    elsewhere = MatrixSettings(**{**vars(settings), "device": "cuda"})
    with stand_in(monkeypatch):
        there = compare(base, runs, CompareSettings(matrix=elsewhere), threads=1, cache=False)
    for name in ("spectral_shift", "principal_angle_left_max_deg", "changed_count"):
        wanted = [row[name] for row in here.matrices]
        assert [row[name] for row in there.matrices] == [v if v is None else pytest.approx(v, rel=1e-5) for v in wanted]
    said = [
        warning for run in there.summary["runs"].values() for warning in run["warnings"] if "did not fit" in warning
    ]
    assert len(said) == len(runs) and all(warning.startswith("2 matrices") for warning in said)


def test_a_trajectory_there_is_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, runs = base_and_two_runs(tmp_path)
    checkpoints = [*runs.values(), base]
    here = trajectory(base, checkpoints, steps=[1, 2, 3], subspace_rank=2)
    seen: list[str] = []
    solve = overlaps._leading
    monkeypatch.setattr(overlaps, "_leading", lambda D, k: (seen.append(D.device.type), solve(D, k))[1])
    with stand_in(monkeypatch):
        there = trajectory(base, checkpoints, steps=[1, 2, 3], subspace_rank=2, device="cuda", threads=2)
    assert set(seen) == {GPU.type}
    np.testing.assert_allclose(there.content["pooled"]["gram"], here.content["pooled"]["gram"], rtol=1e-12)
    for one, two in zip(here.rows, there.rows, strict=True):
        assert two == {k: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) else v for k, v in one.items()}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `test_gpu.py` runs on a GPU is run on the stand-in.

    Not gates, whose forward-mode derivatives do not go through wrapped tensors, nor adapters, to which the device that
    the stand-in names means weights that are not loaded.
    """
    monkeypatch.setattr(test_gpu, "DEVICE", GPU.type)
    with stand_in(monkeypatch):
        yield


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_sparse_steps_there(density: float) -> None:
    test_gpu.test_sparse_steps_are_those_of_a_masked_adamw_bit_for_bit(density)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("kind", ["svd", "newton-schulz", "muon"])
def test_isospectral_steps_there(kind: str) -> None:
    test_gpu.test_isospectral_steps_are_those_of_the_cpu(kind)


@pytest.mark.usefixtures("elsewhere")
def test_the_monitor_there(tiny_model: Path, tmp_path: Path) -> None:
    test_gpu.test_the_monitor_measures_what_it_measures_on_the_cpu()
    test_gpu.test_a_watched_loop_trains_as_one_that_is_not(tiny_model, tmp_path)
