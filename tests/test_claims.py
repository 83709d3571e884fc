"""The rules that judge claims, on updates whose truth is known by construction."""

from pathlib import Path

import pytest
import torch
from checkpoint_folders import write_model
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian
from torch import Tensor

from offprincipal.comparison import compare
from offprincipal.errors import StudyError
from offprincipal.geometry.masks import principal_ranks
from offprincipal.geometry.spectrum import decompose, principal_rank
from offprincipal.studies.claims import CLAIMS, Evidence, decide, judge

SIGNATURES = [id for id, claim in CLAIMS.items() if not claim.needs]
VERDICTS = {"supported", "contradicted", "no effect beyond the control", "inconclusive"}


def heavy_tailed() -> dict[str, Tensor]:
    """Twelve matrices over many exponents, with a strong low-rank part, so that rounding has something to favour."""
    weights = {}
    for layer in range(4):
        for i, role in enumerate(("q_proj", "k_proj", "v_proj")):
            seed = 10 * layer + i
            low_rank = gaussian(64, 2, seed=300 + seed) @ gaussian(2, 96, seed=400 + seed)
            weight = 0.05 * gaussian(64, 96, seed=seed) + 0.05 * low_rank
            weights[f"model.layers.{layer}.self_attn.{role}.weight"] = weight.bfloat16()
    return weights


def rows_of_many_scales() -> dict[str, Tensor]:
    """Weights whose rows differ in scale by orders of magnitude, so that storing decides where a small update lands."""
    rows = torch.exp(gaussian(64, 1, seed=77))
    return {name: (rows * tensor.double()).bfloat16() for name, tensor in heavy_tailed().items()}


def principal_mask(tensor: Tensor) -> Tensor:
    svd = decompose(tensor).top(principal_rank(tensor.shape, 0.125))
    return principal_ranks(svd.U, svd.S, svd.Vh) < tensor.numel() // 2


def updated(weights: dict[str, Tensor], size: float, seed: int, on_principal: float = 1.0) -> dict[str, Tensor]:
    """bfloat16 weights after a Gaussian update, scaled by a factor on principal coordinates."""
    found = {}
    for i, (name, tensor) in enumerate(weights.items()):
        update = size * gaussian(*tensor.shape, seed=seed + i)
        if tensor.ndim == 2:
            update = torch.where(principal_mask(tensor), on_principal * update, update)
        found[name] = (tensor.double() + update).bfloat16()
    return found


def study(
    tmp_path: Path,
    on_principal: float = 1.0,
    rl_size: float = 2e-4,
    sft_size: float = 2e-4,
    weights: dict[str, Tensor] | None = None,
) -> dict[str, dict[str, str]]:
    """Claim -> verdicts, of two RLVR-like runs, a third that learned from preferences, and one SFT-like run."""
    weights = weights or heavy_tailed()
    base = write_model(tmp_path / "base", weights)
    runs = {
        "rl_a": write_model(tmp_path / "rl_a", updated(weights, rl_size, 1000, on_principal)),
        "rl_b": write_model(tmp_path / "rl_b", updated(weights, rl_size, 2000, on_principal)),
        "sft": write_model(tmp_path / "sft", updated(weights, sft_size, 3000)),
        "dpo": write_model(tmp_path / "dpo", updated(weights, rl_size, 4000, on_principal)),
    }
    compare(base, runs).write(tmp_path / "comparison")
    evidence = Evidence.read(tmp_path / "comparison", ["rl_a", "rl_b"], ["sft"], "comparison", beyond=["dpo"])
    judged = {id: judge(id, evidence) for id in SIGNATURES}
    for claim in judged.values():
        assert {claim["as_published"]["verdict"], claim["controlled"]["verdict"]} <= VERDICTS
    return {
        id: {"published": claim["as_published"]["verdict"], "controlled": claim["controlled"]["verdict"]}
        for id, claim in judged.items()
    }


def test_rounding_and_step_length_alone_make_the_published_picture_and_no_control_lets_it_pass(tmp_path: Path) -> None:
    """Every update here ignores the weights, and the SFT-like one is ten times as long."""
    verdicts = study(tmp_path, sft_size=2e-3)
    for id in ("C1", "C2", "C3", "C4", "C5", "C6", "C13"):
        assert verdicts[id]["published"] == "supported", id
        allowed = {"no effect beyond the control"}
        if id in ("C3", "C4"):  # ratios of noisy shifts and angles: twelve matrices may leave the interval wide
            allowed.add("inconclusive")
        assert verdicts[id]["controlled"] in allowed, id


@pytest.mark.parametrize("rl_size", [1e-5, 1e-4])
def test_what_storing_does_to_a_small_update_is_not_taken_for_geometry(tmp_path: Path, rl_size: float) -> None:
    verdicts = study(tmp_path, rl_size=rl_size, sft_size=2e-3, weights=rows_of_many_scales())
    for id in ("C1", "C3", "C4", "C5", "C6"):
        assert verdicts[id]["controlled"] in {"no effect beyond the control", "inconclusive"}, id


def test_an_update_that_avoids_principal_weights_passes_the_control(tmp_path: Path) -> None:
    verdicts = study(tmp_path, on_principal=0.3)
    assert verdicts["C5"] == {"published": "supported", "controlled": "supported"}
    assert verdicts["C2"]["controlled"] == "supported"
    assert verdicts["C13"]["controlled"] != "supported"  # it avoids them, but is no sparser than SFT for its length


def test_an_update_that_seeks_principal_weights_contradicts_under_the_control(tmp_path: Path) -> None:
    assert study(tmp_path, on_principal=3.0)["C5"]["controlled"] == "contradicted"


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    verdicts = study(tmp_path)
    for id in ("C1", "C3", "C4"):
        assert set(verdicts[id].values()) == {"no effect beyond the control"}


def test_runs_that_changed_nothing_are_inconclusive_not_an_error(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", heavy_tailed())
    compare(base, {"rl": base, "sft": base}).write(tmp_path / "comparison")
    evidence = Evidence.read(tmp_path / "comparison", ["rl"], ["sft"], "comparison")
    for id in ("C2", "C3", "C4", "C5", "C6", "C13"):
        found = judge(id, evidence)
        assert found["as_published"]["verdict"] == found["controlled"]["verdict"] == "inconclusive"
        assert found["as_published"]["effect"] is None


def test_a_handful_of_matrices_decides_nothing(tmp_path: Path) -> None:
    few = dict(list(heavy_tailed().items())[:3])
    verdicts = study(tmp_path, sft_size=2e-3, weights=few)
    assert {verdict for both in verdicts.values() for verdict in both.values()} == {"inconclusive"}


def test_a_run_that_was_not_compared_is_named(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", heavy_tailed())
    compare(base, {"rl": base}).write(tmp_path / "comparison")
    with pytest.raises(StudyError, match="no run 'sft'"):
        Evidence.read(tmp_path / "comparison", ["rl"], ["sft"], "comparison")


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_opposite_claim_gets_the_opposite_verdict(value: float, below: float, above: float) -> None:
    claimed = decide(value, value - below, value + above, 0.0, -0.02, 0.02, 1)
    opposite = decide(value, value - below, value + above, 0.0, -0.02, 0.02, -1)
    swapped = {"supported": "contradicted", "contradicted": "supported"}
    assert opposite == swapped.get(claimed, claimed)


@given(st.floats(-1, 1), st.floats(0.001, 0.5))
def test_an_interval_about_zero_supports_nothing(value: float, room: float) -> None:
    low, high = min(value, 0) - room, max(value, 0) + room
    assert decide(value, low, high, 0.0, -0.02, 0.02, 1) in {"no effect beyond the control", "inconclusive"}
