"""A run that was compared in a folder is not measured again when another joins it; the tables are the same bytes."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from checkpoint_folders import base_weights, moved, stored, tables_in, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from offprincipal.cli import app
from offprincipal.comparison import compare
from offprincipal.comparison.reuse import NAME
from offprincipal.comparison.work import Work
from offprincipal.errors import CheckpointError
from offprincipal.trajectories import trajectory

Sources = tuple[Path, dict[str, Path]]


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A base and three runs; `a` keeps its float32 masters."""
    weights = base_weights()
    tuned = {name: moved(weights, 1e-3, seed) for name, seed in (("a", 5), ("b", 6), ("c", 7))}
    masters = {"a": tuned["a"]}
    runs = {name: write_model(tmp_path / name, stored(run), masters.get(name)) for name, run in tuned.items()}
    return write_model(tmp_path / "base", weights), runs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The runs whose own rows were known, at every tensor that is measured."""
    found: list[tuple[str, ...]] = []
    measure = Work.measure

    def noted(self: Work, part: Any, known: tuple[str, ...] = ()) -> Any:
        found.append(tuple(known))
        return measure(self, part, known)

    monkeypatch.setattr(Work, "measure", noted)
    return found


def of(runs: dict[str, Path], names: str) -> dict[str, Path]:
    return {name: runs[name] for name in names}


@pytest.mark.parametrize(
    ("then", "now", "known"),
    [
        ("ab", "abc", "ab"),  # one more
        ("ac", "abc", "ac"),  # between
        ("bc", "abc", "bc"),  # before
        ("abc", "ac", "ac"),  # one less
        ("ab", "bc", "b"),  # one for another
        ("ab", "ba", ""),  # pairs are named the other way
    ],
)
def test_only_what_is_new_is_measured_and_the_tables_are_those_of_all_together(
    sources: Sources, asked: list[tuple[str, ...]], tmp_path: Path, then: str, now: str, known: str
) -> None:
    base, runs = sources
    whole = compare(base, of(runs, now), out=tmp_path / "whole")
    out = tmp_path / "out"
    compare(base, of(runs, then), out=out)
    asked.clear()
    found = compare(base, of(runs, now), out=out, overwrite=True)
    assert found.measured_before == tuple(known)
    assert set(asked) == {tuple(known)}
    assert tables_in(out) == tables_in(tmp_path / "whole")
    assert found.summary == whole.summary


def test_the_same_comparison_measures_nothing(sources: Sources, asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    compare(*sources, out=tmp_path / "out")
    before = tables_in(tmp_path / "out")
    asked.clear()
    assert compare(*sources, out=tmp_path / "out").measured_before == ("a", "b", "c")
    assert not asked
    assert tables_in(tmp_path / "out") == before
    compare(*sources, out=tmp_path / "out", cache=False)
    assert set(asked) == {()}


def test_other_settings_weights_or_masters_are_measured_anew(
    sources: Sources, asked: list[tuple[str, ...]], tmp_path: Path
) -> None:
    base, runs = sources
    out = tmp_path / "out"
    compare(base, runs, out=out)
    about = (runs["b"] / "model.safetensors").stat()
    os.utime(runs["b"] / "model.safetensors", ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert compare(base, runs, out=out).measured_before == ("a", "c")
    compare(base, runs, out=tmp_path / "whole")
    assert tables_in(out) == tables_in(tmp_path / "whole")
    (runs["a"] / "masters" / "model.safetensors").unlink()
    (runs["a"] / "masters").rmdir()
    assert compare(base, runs, out=out).measured_before == ("b", "c")
    assert compare(base, runs, out=out, density=0.4).measured_before == ()
    assert compare(base, runs, out=out, density=0.4, expect=("*: changed",)).measured_before == ("a", "b", "c")
    (base / "config.json").write_text('{"model_type": "qwen3", "tie_word_embeddings": true, "hidden_size": 24}')
    assert compare(base, runs, out=out, density=0.4).measured_before == ()


def test_a_tensor_that_the_new_run_has_not_is_left_out_and_one_that_comes_back_is_measured(
    sources: Sources, tmp_path: Path
) -> None:
    base, runs = sources
    fewer = stored(moved(base_weights(), 1e-3, 8))
    del fewer["model.layers.0.mlp.down_proj.weight"]
    less = {"a": runs["a"], "less": write_model(tmp_path / "less", fewer)}
    out = tmp_path / "out"
    compare(base, of(runs, "ab"), out=out)
    assert compare(base, less, out=out, overwrite=True).measured_before == ("a",)
    compare(base, less, out=tmp_path / "whole")
    assert tables_in(out) == tables_in(tmp_path / "whole")
    assert compare(base, of(runs, "ab"), out=out, overwrite=True).measured_before == ()


def with_nan(folder: Path, name: str) -> Path:
    weights = stored(moved(base_weights(), 1e-3, 9))
    weights[name][3, 5] = float("nan")
    return write_model(folder, weights)


@pytest.mark.parametrize("left", ["ab", "ac", "c"])
def test_a_run_that_cannot_be_measured_is_named_and_leaving_it_out_costs_no_other(
    left: str, sources: Sources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, runs = sources
    last = "model.layers.1.mlp.down_proj.weight"
    broken = runs | {"bad": with_nan(tmp_path / "bad", last)}
    out, seen, again = tmp_path / "out", list[str](), list[str]()
    with pytest.raises(CheckpointError, match=rf"{last} of bad \(.*\): 1 of .* the first at \[3, 5\].* or omit bad"):
        compare(base, broken, out=out, threads=1, progress=lambda done, total, tensor: seen.append(tensor))
    assert seen
    compare(base, of(runs, left), out=out, threads=1, progress=lambda done, total, tensor: again.append(tensor))
    compare(base, of(runs, left), out=tmp_path / "whole", cache=False)
    assert not set(seen) & set(again)
    assert tables_in(out) == tables_in(tmp_path / "whole")
    assert any("continuing with the measurements made together with" in message for message in caplog.messages)


def test_tensors_of_more_rows_are_measured_again_without_the_run_that_had_fewer(
    sources: Sources, tmp_path: Path
) -> None:
    """What all runs have is compared: a smaller vocabulary cuts every run's embedding."""
    base, runs = sources
    smaller = stored(moved(base_weights(), 1e-3, 9))
    smaller["model.embed_tokens.weight"] = smaller["model.embed_tokens.weight"][:30].clone()
    smaller["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    bad = write_model(tmp_path / "bad", smaller)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError):
        compare(base, runs | {"bad": bad}, out=out, threads=1)
    compare(base, runs, out=out)
    compare(base, runs, out=tmp_path / "whole", cache=False)
    assert tables_in(out) == tables_in(tmp_path / "whole")


def test_the_place_of_a_bad_entry_is_told_in_the_tensors_own_shape(sources: Sources, tmp_path: Path) -> None:
    base, runs = sources
    bad = with_nan(tmp_path / "bad", "model.embed_tokens.weight")
    for metrics in (("changes",), ("location",)):
        with pytest.raises(CheckpointError, match=r"embed_tokens.weight of bad .*first at \[3, 5\]"):
            compare(base, runs | {"bad": bad}, metrics=metrics)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight of step 20 .*first at \[3, 5\]"):
        trajectory(base, [runs["a"], bad], steps=[10, 20])


def test_killed_on_the_way_it_goes_on_with_what_was_known(sources: Sources, tmp_path: Path) -> None:
    base, runs = sources
    compare(base, runs, out=tmp_path / "whole")
    out = tmp_path / "out"
    compare(base, of(runs, "ab"), out=out)
    seen: list[str] = []

    def stop_third(done: int, total: int, tensor: str) -> None:
        seen.append(tensor)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(base, runs, out=out, threads=1, progress=stop_third)
    again: list[str] = []
    found = compare(base, runs, out=out, threads=1, progress=lambda done, total, tensor: again.append(tensor))
    assert found.measured_before == ("a", "b")
    assert sorted(seen + again) == sorted({row["tensor"] for row in found.matrices})
    assert tables_in(out) == tables_in(tmp_path / "whole")


def test_damaged_tables_and_records_are_not_believed(
    sources: Sources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, runs = sources
    out = tmp_path / "out"
    compare(base, of(runs, "ab"), out=out)
    kept, right = (out / NAME).read_bytes(), tables_in(out)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        name = data.draw(
            st.sampled_from([NAME, "matrices.parquet", "masks.parquet", "pairs.parquet", "curves.parquet"])
        )
        bits = bytearray((out / name).read_bytes())
        place = data.draw(st.integers(0, len(bits) - 1))
        bits[place] ^= data.draw(st.integers(1, 255))
        (out / name).write_bytes(bits)
        compare(base, of(runs, "ab"), out=out)
        assert tables_in(out) == right
        assert json.loads((out / NAME).read_text()) == json.loads(kept)

    damaged()
    for odd in ("[]", "{}", '{"runs": 3}', '{"runs": {"a": "x"}, "tables": null}', "\x00"):
        (out / NAME).write_text(odd)
        caplog.clear()
        compare(base, of(runs, "ab"), out=out)
        assert "damaged" in caplog.text or odd.startswith('{"runs": {')
        assert tables_in(out) == right


def test_the_terminal_says_what_was_not_measured_again(sources: Sources, tmp_path: Path) -> None:
    base, runs = sources
    command = ["compare", str(base), str(runs["a"]), "--out", str(tmp_path / "out"), "--no-report"]
    assert "measured before" not in CliRunner().invoke(app, command).output
    added = CliRunner().invoke(app, [*command[:3], str(runs["b"]), *command[3:]]).output
    assert "measured before, not again: a" in added
    assert pq.read_table(tmp_path / "out" / "pairs.parquet").num_rows > 0
