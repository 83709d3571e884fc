"""Gate III over checkpoints on disk."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import write_model
from matrices import gaussian

from offprincipal.errors import ArgumentError, CheckpointError
from offprincipal.gates.precision_gate import PrecisionSettings, precision_gate

NAMES = [f"model.layers.{i}.self_attn.{role}_proj.weight" for i in range(5) for role in ("q", "v")]


def base_weights() -> dict[str, torch.Tensor]:
    weights = {name: (gaussian(48, 64, seed=i) / 20).bfloat16() for i, name in enumerate(NAMES)}
    return weights | {"model.embed_tokens.weight": gaussian(9, 64, seed=99).bfloat16()}


def write_tuned(folder: Path, size: float, masters: bool = True) -> Path:
    whole = {
        n: (w.double() + size * gaussian(*w.shape, seed=7 + i)).float()
        for i, (n, w) in enumerate(base_weights().items())
    }
    write_model(folder, {name: w.bfloat16() for name, w in whole.items()})
    if masters:
        write_model(folder / "masters", whole)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("gate")
    base = write_model(folder / "base", base_weights())
    return json.loads(json.dumps(precision_gate(base, write_tuned(folder / "tuned", 1e-4)), allow_nan=False))


def test_a_weight_blind_update_is_explained_by_each_formats_null(found: dict) -> None:
    for row in found["precision_sweep"]:
        for mask in ("principal", "low_magnitude"):
            beyond = row[f"{mask}_bias_beyond_precision"]
            assert abs(beyond["value"]) < 0.05 and beyond["low"] <= 0.01 and beyond["high"] >= -0.01
            assert row[f"{mask}_z"] is None or abs(row[f"{mask}_z"]) < 4.5
    at = {(row["format"], row["step_length"]): row for row in found["precision_sweep"]}
    assert at["bf16", 1.0]["low_magnitude_bias"]["value"] > 0.1
    assert at["fp32", 1.0]["low_magnitude_bias"]["value"] == pytest.approx(0, abs=0.001)


def test_a_longer_step_leaves_less_unchanged(found: dict) -> None:
    for name in ("bf16", "fp16", "fp8"):
        shares = [row["unchanged_fraction"]["value"] for row in found["precision_sweep"] if row["format"] == name]
        assert len(shares) == 7 and shares == sorted(shares, reverse=True)


def test_what_is_hidden_is_what_a_gaussian_of_that_size_hides(found: dict) -> None:
    hidden = found["hidden_fraction"]
    assert hidden["low"] <= hidden["gaussian_null"] <= hidden["high"]
    assert hidden["value"] == pytest.approx(hidden["permuted_null"], abs=0.02)
    assert sum(row["hidden"] for row in found["ulp_histogram"]) == pytest.approx(hidden["value"] * 48 * 64 * len(NAMES))
    assert sum(row["entries"] for row in found["ulp_histogram"]) == 48 * 64 * len(NAMES)  # the embedding is none of it


def test_without_masters_nothing_is_said(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", base_weights())
    found = precision_gate(base, write_tuned(tmp_path / "tuned", 1e-4, masters=False))
    assert set(found.values()) == {None}


def test_another_architecture_and_unusable_settings_are_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", base_weights())
    other = write_model(tmp_path / "other", {NAMES[0]: torch.zeros(3, 4)})
    with pytest.raises(CheckpointError):
        precision_gate(base, other)
    for wrong in ({"formats": ("fp4",)}, {"step_lengths": (0.0,)}, {"density": 0.0}, {"formats": ()}):
        with pytest.raises(ArgumentError):
            PrecisionSettings(**wrong)
