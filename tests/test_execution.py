"""However a comparison is run, its tables are the same to the byte; and a disk that is full loses nothing."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import COMPARISON_FILES, base_and_two_runs, base_weights, tables_in, write_model
from threadpoolctl import threadpool_info

from offprincipal.checkpoints import Part
from offprincipal.comparison import CompareSettings, MatrixSettings, compare
from offprincipal.comparison.execution import run_in_threads
from offprincipal.comparison.measure import TensorRows
from offprincipal.comparison.work import Work
from offprincipal.errors import ArgumentError, CheckpointError

APPROXIMATE = CompareSettings(matrix=MatrixSettings(exact_up_to=4))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base and two runs."""
    return base_and_two_runs(tmp_path_factory.mktemp("execution"))


def test_one_thread_two_threads_and_ray_write_the_same_bytes(
    sources: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    ways = {"one": {"threads": 1}, "two": {"threads": 2}, "ray": {"ray": "local"}}
    written = []
    for name, way in ways.items():
        compare(*sources, APPROXIMATE, out=tmp_path / name, cache=tmp_path / f"{name}-cache", **way)
        written.append(tables_in(tmp_path / name))
    assert written[0] == written[1] == written[2]
    matrices = compare(*sources, APPROXIMATE).matrices
    assert {row["solver"] for row in matrices if row["linear"]} == {"warm"}


class Looking(Work):
    """Work that notes how many threads numpy's BLAS may take while a tensor is measured."""

    def measure(self, part: Part, known: Any = ()) -> TensorRows:
        vars(self)["seen"].append([pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"])
        return super().measure(part, known)


def test_every_worker_has_one_core_of_numpys_too(sources: tuple[Path, dict[str, Path]]) -> None:
    base, runs = sources
    before = threadpool_info()
    for metrics in (("location",), ("spectrum",)):
        work = Looking(str(base), {"a": str(runs["a"])}, CompareSettings(metrics=metrics))  # type: ignore[arg-type]
        vars(work)["seen"] = []
        list(run_in_threads(work, Looking.measure, work.parts, 2, 1 << 40))
        seen = vars(work)["seen"]
        assert len(seen) == len(work.parts) and all(seen) and all(set(counts) == {1} for counts in seen)
    assert threadpool_info() == before


def test_an_error_in_a_ray_worker_is_the_users_error(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    base, _ = sources
    broken = base_weights()
    broken["model.norm.weight"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of broken \(.*broken\): 1 of 24 entries are NaN"):
        compare(base, write_model(tmp_path / "broken", broken), ray="local")


def test_a_cluster_that_is_not_there_is_an_argument_error(sources: tuple[Path, dict[str, Path]]) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ArgumentError, match="'not-an-address' is not a valid Ray address"):
        compare(*sources, ray="not-an-address")


def test_an_address_where_nobody_listens_is_said_at_once(sources: tuple[Path, dict[str, Path]]) -> None:
    """Ray itself tries for minutes."""
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", f"ray://127.0.0.1:{taken.getsockname()[1]}"):
            with pytest.raises(ArgumentError, match=r"no Ray cluster at .*refused"):
                compare(*sources, ray=address)


def test_local_is_local_whatever_the_environment_names(
    sources: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # an address that is nobody's: Ray would wait for it
    assert compare(*sources, metrics="changes", ray="local").matrices == compare(*sources, metrics="changes").matrices


def test_a_full_disk_is_said_and_loses_nothing(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, runs = sources
    command = [sys.executable, "-m", "offprincipal", "compare", str(base), str(runs["a"]), "--no-report"]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # the journal needs more

    full = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, preexec_fn=small_files, check=False
    )
    assert full.returncode == 2, full.stderr
    assert "cannot write" in full.stderr
    assert "Free some space" in full.stderr
    assert not any((tmp_path / "out" / table).exists() for table in COMPARISON_FILES)
    again = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    compare(base, {"a": runs["a"]}, out=tmp_path / "whole")
    assert tables_in(tmp_path / "out") == tables_in(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, runs = sources
    tmp_path.chmod(0o500)
    done = subprocess.run(
        [sys.executable, "-m", "offprincipal", "compare", str(base), str(runs["a"]), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot make the output folder" in done.stderr


def test_without_a_gpu_cuda_is_an_argument_error(sources: tuple[Path, dict[str, Path]]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ArgumentError, match="there is no CUDA device"):
        compare(*sources, CompareSettings(matrix=MatrixSettings(device="cuda")))
    on_cpu = compare(*sources, CompareSettings(matrix=MatrixSettings(device="auto"))).matrices
    assert on_cpu == compare(*sources).matrices
