"""The way that a watched run takes: sketches against whole displacements, kept over kills, and refused when damaged."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import seeds

from offprincipal.errors import FileError
from offprincipal.geometry.walks import random_walk_gram, walk_of
from offprincipal.training.monitor import Monitor, read_monitor, walk
from offprincipal.training.monitor.walk import BUCKETS, NAME, SketchedWalk, sketch_of


@settings(max_examples=25)
@given(seeds, st.floats(-1, 1))
def test_inner_products_of_sketches_are_those_of_displacements(seed: int, cosine: float) -> None:
    """Within five times the stated error, which normal deviates exceed once in two million."""
    rng = np.random.default_rng(seed)
    a, noise = rng.standard_normal((2, 60, 500)).astype(np.float32)
    b = cosine * a + math.sqrt(1 - cosine**2) * noise
    product = float(sketch_of("w", a) @ sketch_of("w", b))
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    assert abs(product - float((a * b).sum())) <= 5 * math.sqrt(2 / BUCKETS) * lengths


def test_a_sketch_is_linear_and_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 70, 90))
    np.testing.assert_allclose(sketch_of("w", a + b), sketch_of("w", a) + sketch_of("w", b), atol=1e-9)
    assert not np.allclose(sketch_of("w", a), sketch_of("v", a))
    whole = sketch_of("w", a)
    monkeypatch.setattr(walk, "_BLOCK", 1000)
    assert np.linalg.norm(sketch_of("w", a)) == pytest.approx(np.linalg.norm(whole), rel=0.1)


def watched(kind: str, folder: Path, steps: int = 12) -> tuple[list[dict[str, object]], np.ndarray]:
    """The pooled rows of a model that goes straight ahead or wanders, and its displacements."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"q_proj": (64, 96), "down_proj": (96, 64)}
    model = torch.nn.ModuleDict({name: torch.nn.Linear(m, n, bias=False) for name, (n, m) in sizes.items()})
    direction = {name: torch.randn(layer.weight.shape, generator=generator) for name, layer in model.items()}
    start = {name: layer.weight.detach().clone() for name, layer in model.items()}
    monitor = Monitor(folder, every=1)
    monitor.start(model)
    displacements = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for name, layer in model.items():
                noise = torch.randn(layer.weight.shape, generator=generator)
                layer.weight += 1e-3 * (direction[name] if kind == "line" else noise)
        monitor.observe(step, model)
        moved = [(layer.weight - start[name]).detach().double().reshape(-1) for name, layer in model.items()]
        displacements.append(torch.cat(moved).numpy())
    return [row for row in read_monitor(folder) if row["tensor"] is None], np.stack(displacements)


@pytest.mark.parametrize("kind", ["line", "walk"])
def test_a_run_shows_how_straight_it_is_while_it_goes_on(kind: str, tmp_path: Path) -> None:
    rows, D = watched(kind, tmp_path)
    assert [row["straightness"] for row in rows[:2]] == [None, None]
    for t in range(3, len(D) + 1):
        exact = walk_of(D[:t] @ D[:t].T, range(1, t + 1))
        null = walk_of(random_walk_gram(exact.increments), range(1, t + 1))
        for figure in ("straightness", "rank1_share"):
            assert rows[t - 1][figure] == pytest.approx(getattr(exact, figure), abs=0.05)
            assert rows[t - 1][f"{figure}_random_walk_null"] == pytest.approx(getattr(null, figure), abs=0.05)
    ahead = rows[-1]["straightness"] - rows[-1]["straightness_random_walk_null"]  # type: ignore[operator]
    assert ahead > 0.5 if kind == "line" else abs(ahead) < 0.05


def test_what_was_seen_is_kept_and_what_was_not_is_not_made_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sketches = rng.standard_normal((5, BUCKETS)).cumsum(axis=0)
    whole = SketchedWalk(tmp_path / "a", 0)
    (tmp_path / "a").mkdir()
    found = [whole.add(step, sketch) for step, sketch in enumerate(sketches, 1)]
    again = SketchedWalk(tmp_path / "a", 3)  # what came after the step that training goes on from is dropped
    assert [again.add(step, sketches[step - 1]) for step in (4, 5)] == found[3:]
    (tmp_path / "a" / NAME).unlink()
    lost = SketchedWalk(tmp_path / "a", 3)
    assert set(lost.add(4, sketches[3]).values()) == {None} and not (tmp_path / "a" / NAME).exists()
    (tmp_path / "a" / NAME).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(FileError, match=NAME):
        SketchedWalk(tmp_path / "a", 3)
