"""A budget of memory decides how many matrices are in flight, and nothing else."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import base_and_two_runs, tables_in
from hypothesis import given
from hypothesis import strategies as st

from offprincipal import memory
from offprincipal.comparison import CompareSettings, MatrixSettings, compare
from offprincipal.comparison.execution import run_in_threads
from offprincipal.comparison.work import Work
from offprincipal.errors import ArgumentError
from offprincipal.geometry import nulls, principal, scan, spectrum
from offprincipal.memory import free_memory, parse_size

APPROXIMATE = CompareSettings(matrix=MatrixSettings(exact_up_to=4))
UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20, "Gi": 1 << 30, "t": 1 << 40}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base and two runs."""
    return base_and_two_runs(tmp_path_factory.mktemp("memory"))


@given(st.integers(1, 10**9), st.sampled_from(list(UNITS)), st.sampled_from(["", "b", "B"]), st.sampled_from(["", " "]))
def test_sizes_are_read_as_people_write_them(number: int, unit: str, byte: str, between: str) -> None:
    size, text = number * UNITS[unit], f"{number}{between}{unit}{byte}"
    if size >= 1 << 20:
        assert parse_size(text) == size
    else:  # nothing can be measured in it: a unit was forgotten
        with pytest.raises(ArgumentError, match="not a usable amount of memory"):
            parse_size(text)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8", "1e9", "8 XB", "inf", "1.GB", "٣GB", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="is not a usable amount of memory"):
        parse_size(text)


def test_the_tables_do_not_depend_on_it(sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    written = []
    for name, budget in (("little", 1), ("some", 1 << 20), ("all", 1 << 40)):
        compare(*sources, APPROXIMATE, out=tmp_path / name, threads=3, memory=budget, cache=False)
        written.append(tables_in(tmp_path / name))
    assert written[0] == written[1] == written[2]


def test_a_matrix_that_would_end_the_process_is_refused_before_anything_is_measured(
    sources: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offprincipal.comparison.comparison.free_memory", lambda: 1 << 12)
    with pytest.raises(ArgumentError, match=r"needs about .* GB are free. Use --metrics changes"):
        compare(*sources, APPROXIMATE, out=tmp_path / "out", cache=False)
    assert not (tmp_path / "out" / "matrices.parquet").exists()
    compare(*sources, APPROXIMATE, out=tmp_path / "out", cache=False, memory=1 << 30)  # who knows better may say so


def test_a_budget_below_one_matrix_is_said(
    sources: tuple[Path, dict[str, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "offprincipal"):
        compare(*sources, CompareSettings(metrics=("location",)), memory=1000, cache=False)
    assert "measured one at a time, and may exceed the budget" in caplog.text
    with pytest.raises(ArgumentError, match="memory is 0 bytes"):
        compare(*sources, memory=0)


class Counted(Work):
    """Work that knows how many matrices, and how many bytes by estimate, are in flight."""

    def measure(self, part: Any, known: Any = ()) -> Any:
        own = vars(self)
        with own["lock"]:
            own["now"].append(part)
            own["most"].append((len(own["now"]), sum(self.bytes_needed(other) for other in own["now"])))
        try:
            return super().measure(part, known)
        finally:
            with own["lock"]:
                own["now"].remove(part)


@pytest.mark.parametrize("matrices", [1, 2, 3])
def test_no_more_are_in_flight_than_fit_and_the_largest_come_first(
    matrices: int, sources: tuple[Path, dict[str, Path]]
) -> None:
    base, runs = sources
    work = Counted(str(base), {name: str(path) for name, path in runs.items()}, APPROXIMATE)
    vars(work).update(lock=threading.Lock(), now=[], most=[])
    largest = max(map(work.bytes_needed, work.parts))
    found = list(run_in_threads(work, Counted.measure, work.parts, 8, matrices * largest))
    assert {part.name for part, _ in found} == {part.name for part in work.parts}
    assert max(need for _, need in vars(work)["most"]) <= matrices * largest
    assert max(count for count, _ in vars(work)["most"]) >= matrices
    assert vars(work)["most"][0][1] == largest


HELD_UP = [
    (spectrum, "decompose_warm"),
    (principal, "decompose_by_gram"),
    (spectrum, "update_spectrum"),
    (nulls, "fit_margins"),
    (nulls, "score_tests"),
    (scan, "scan"),
]


@pytest.mark.parametrize(("module", "name"), HELD_UP, ids=[name for _, name in HELD_UP])
def test_two_matrices_are_measured_at_once(
    module: Any, name: str, sources: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one thread computes, another is in the midst of the same: no lock is held meanwhile."""
    meeting, original, came = threading.Barrier(2), getattr(module, name), threading.local()
    met: list[int] = []

    def after_meeting(*arguments: Any, **named: Any) -> Any:
        if not hasattr(came, "once"):
            came.once = True
            met.append(meeting.wait(timeout=60))
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, after_meeting)
    compare(*sources, APPROXIMATE, threads=2, cache=False)
    assert sorted(met) == [0, 1]


def write_group(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return folder


def test_a_cgroup_of_two_gigabytes_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 1 << 30
    limited = {
        "memory.max": str(2 * gigabyte),
        "memory.current": str(gigabyte),
        "memory.stat": f"anon {gigabyte // 2}\ninactive_file {gigabyte // 4}",
    }
    two = write_group(tmp_path / "two", limited)
    assert memory._left_in(two) == gigabyte + gigabyte // 4
    first = {
        "memory.limit_in_bytes": str(2 * gigabyte),
        "memory.usage_in_bytes": str(gigabyte),
        "memory.stat": f"total_inactive_file {gigabyte // 2}",
    }
    assert memory._left_in(write_group(tmp_path / "one", first)) == gigabyte + gigabyte // 2
    assert memory._left_in(write_group(tmp_path / "free", limited | {"memory.max": "max"})) > 1 << 50
    assert memory._left_in(tmp_path / "none") > 1 << 50
    monkeypatch.setattr(memory, "_cgroups", lambda: [two])
    assert free_memory() == gigabyte + gigabyte // 4
