"""The rules that judge claims, on updates whose truth is known by construction."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_folders import stored, write_model
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian
from torch import Tensor

from offprincipal.comparison import compare
from offprincipal.errors import StudyError
from offprincipal.geometry.principal import principal_rank, principal_ranks
from offprincipal.geometry.spectrum import decompose
from offprincipal.geometry.synthetic import BLIND
from offprincipal.paper import negative
from offprincipal.paper.claims import CLAIMS, Evidence, decide, judge
from offprincipal.paper.claims.rules import ClaimPart, Judgement, controlled_with, judge_difference, published_with
from offprincipal.paper.claims.units import Effect, OverUnits, TwoSamples, over_runs_of_pairs
from offprincipal.paper.negative import blind_evidence, negative_controls

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
    """float32 weights after a Gaussian update, scaled by a factor on principal coordinates."""
    found = {}
    for i, (name, tensor) in enumerate(weights.items()):
        update = size * gaussian(*tensor.shape, seed=seed + i)
        if tensor.ndim == 2:
            update = torch.where(principal_mask(tensor), on_principal * update, update)
        found[name] = (tensor.double() + update).float()
    return found


def write_run(folder: Path, masters: dict[str, Tensor], keep_masters: bool = True) -> Path:
    """Weights stored in bfloat16, with their masters beside them."""
    return write_model(folder, stored(masters), masters if keep_masters else None)


RUNS = {"rl": 3, "sft": 3, "dpo": 3}


def evidence_of(folder: Path, beyond: bool = True) -> Evidence:
    names = {kind: [f"{kind}_{i}" for i in range(count)] for kind, count in RUNS.items()}
    matches = {"sft": dict(zip(names["rl"], names["sft"], strict=True))}
    more = {"beyond": {"dpo": tuple(names["dpo"])}} if beyond else {}
    return Evidence.read(folder, names["rl"], {"sft": names["sft"]}, "comparison", matches=matches, **more)


def study(
    tmp_path: Path,
    on_principal: float = 1.0,
    rl_size: float = 2e-4,
    sft_size: float = 2e-4,
    weights: dict[str, Tensor] | None = None,
    keep_masters: bool = True,
    still: int = 0,
) -> dict[str, dict[str, str]]:
    """Claim -> verdicts, of three RLVR-like runs, three that learned from preferences, and three SFT-like ones.

    Args:
        still: RLVR-like runs that change nothing.
    """
    weights = weights or heavy_tailed()
    base, runs = write_model(tmp_path / "base", weights), {}
    sizes = {"rl": (rl_size, on_principal), "sft": (sft_size, 1.0), "dpo": (rl_size, on_principal)}
    for seed, (kind, i) in enumerate((kind, i) for kind, count in RUNS.items() for i in range(count)):
        size, preference = sizes[kind]
        moved = 0.0 if kind == "rl" and i < still else size
        tuned = updated(weights, moved, 1000 * (seed + 1), preference)
        runs[f"{kind}_{i}"] = write_run(tmp_path / f"{kind}_{i}", tuned, keep_masters)
    compare(base, runs).write(tmp_path / "comparison")
    evidence = evidence_of(tmp_path / "comparison")
    judged = {id: judge(id, evidence)[0] for id in SIGNATURES}
    for claim in judged.values():
        assert {claim["as_published"]["verdict"], claim["controlled"]["verdict"]} <= VERDICTS
    return {
        id: {"published": claim["as_published"]["verdict"], "controlled": claim["controlled"]["verdict"]}
        for id, claim in judged.items()
    }


NOT_DECIDED = {"no effect beyond the control", "inconclusive"}


def test_rounding_and_length_alone_make_the_published_picture_and_no_control_lets_it_pass(tmp_path: Path) -> None:
    """Every update here ignores the weights, and the SFT-like ones are ten times as long."""
    verdicts = study(tmp_path, sft_size=2e-3)
    for id in ("C1", "C2", "C3", "C4", "C5", "C6", "C13"):
        assert verdicts[id]["published"] == "supported", id
        assert verdicts[id]["controlled"] in NOT_DECIDED, id


@pytest.mark.parametrize("still", [2, 3])
def test_runs_that_changed_nothing_decide_nothing(tmp_path: Path, still: int) -> None:
    """As runs whose reward never told completions apart; of two such runs no overlap is defined."""
    verdicts = study(tmp_path, still=still)
    assert verdicts["C2"] == {"published": "inconclusive", "controlled": "inconclusive"}
    assert all(verdicts[id]["controlled"] in NOT_DECIDED for id in ("C3", "C4", "C5", "C6"))


@pytest.mark.parametrize("rl_size", [1e-5, 1e-4])
def test_what_storing_does_to_a_small_update_is_not_taken_for_geometry(tmp_path: Path, rl_size: float) -> None:
    verdicts = study(tmp_path, rl_size=rl_size, sft_size=2e-3, weights=rows_of_many_scales())
    for id in ("C1", "C3", "C4", "C5", "C6"):
        assert verdicts[id]["controlled"] in NOT_DECIDED, id


def test_updates_that_avoid_principal_weights_pass_the_control(tmp_path: Path) -> None:
    verdicts = study(tmp_path, on_principal=0.3)
    assert verdicts["C5"] == {"published": "supported", "controlled": "supported"}
    assert verdicts["C2"]["controlled"] == "supported"
    assert verdicts["C13"]["controlled"] != "supported"  # it avoids them, but is no sparser than SFT for its length


def test_without_masters_what_rows_and_columns_explain_is_unknown(tmp_path: Path) -> None:
    verdicts = study(tmp_path, on_principal=0.3, keep_masters=False)
    assert verdicts["C5"] == {"published": "supported", "controlled": "inconclusive"}


def test_updates_that_seek_principal_weights_contradict_under_the_control(tmp_path: Path) -> None:
    assert study(tmp_path, on_principal=3.0)["C5"]["controlled"] == "contradicted"


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    verdicts = study(tmp_path)
    for id in ("C1", "C3", "C4"):
        assert set(verdicts[id].values()) <= NOT_DECIDED
    assert set(verdicts["C1"].values()) == {"no effect beyond the control"}


def test_runs_that_changed_nothing_are_inconclusive_not_an_error(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", heavy_tailed())
    compare(base, {"rl": base, "sft": base}).write(tmp_path / "comparison")
    evidence = Evidence.read(tmp_path / "comparison", ["rl"], {"sft": ["sft"]}, "comparison")
    for id in ("C2", "C3", "C4", "C5", "C6"):
        (found,) = judge(id, evidence)
        assert found["as_published"]["verdict"] == found["controlled"]["verdict"] == "inconclusive"
        assert found["as_published"]["effect"] is None


def test_two_runs_of_a_kind_are_shown_and_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in RUNS:
        monkeypatch.setitem(RUNS, kind, 2)
    verdicts = study(tmp_path, sft_size=2e-3)
    assert {verdict for both in verdicts.values() for verdict in both.values()} == {"inconclusive"}


def test_each_kind_of_sft_is_a_contrast_of_its_own(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", heavy_tailed())
    runs = {name: write_run(tmp_path / name, updated(heavy_tailed(), 2e-4, i)) for i, name in enumerate("abcd")}
    compare(base, runs).write(tmp_path / "comparison")
    evidence = Evidence.read(tmp_path / "comparison", ["a", "b"], {"own": ["c"], "teacher": ["d"]}, "comparison")
    assert [entry["contrast"] for entry in judge("C1", evidence)] == ["own", "teacher"]
    assert [entry["contrast"] for entry in judge("C2", evidence)] == [None]
    (_, teacher) = judge("C5", evidence)
    assert set(teacher["anatomy"]) == {"a", "b", "d"}
    rungs = teacher["anatomy"]["a"]
    assert rungs["random"] == pytest.approx(0.5) and 0 < rungs["measured"] < rungs["random"]


def test_each_kind_beyond_rlvr_is_judged_by_itself_against_each_kind_of_sft(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", heavy_tailed())
    runs = {name: write_run(tmp_path / name, updated(heavy_tailed(), 2e-4, i)) for i, name in enumerate("rabcde")}
    compare(base, runs).write(tmp_path / "comparison")
    matches = {"own": {"a": "d"}, "teacher": {"b": "e"}}
    kinds = {"dpo": ("a",), "kto": ("b", "c")}
    evidence = Evidence.read(
        tmp_path / "comparison", ["r"], {"own": ["d"], "teacher": ["e"]}, "comparison", matches=matches, beyond=kinds
    )
    entries = judge("C13", evidence)
    named = [(entry["of"], entry["contrast"]) for entry in entries]
    assert named == [("dpo", "own"), ("dpo", "teacher"), ("kto", "own"), ("kto", "teacher")]
    assert "Of b, c: " in entries[2]["controlled"]["sentence"] and set(entries[2]["anatomy"]) == {"b", "c", "d"}
    of_dpo, *_ = evidence.contrasts(beyond=True)
    matched = of_dpo.contrasted({"a": 0.5, "d": 0.2})
    assert isinstance(matched, OverUnits) and matched.by_unit == {"a and d": pytest.approx(0.3)}
    assert judge("C1", evidence)[0]["of"] is None


# What is decided about nothing: runs that differ from each other, but not by kind.


def test_the_spread_between_runs_decides_nothing() -> None:
    """Kinds without a difference, run-to-run standard deviation .05: decided in at most one study in twenty."""
    rng = np.random.default_rng(0)
    decided = {"two kinds": 0, "matched": 0, "pairs of runs": 0}
    for _ in range(400):
        runs = rng.normal(0.6, 0.05, (2, 3))
        effects: dict[str, Effect] = {
            "two kinds": TwoSamples(list(runs[0]), list(runs[1])),
            "matched": OverUnits({str(i): float(runs[0, i] - runs[1, i]) for i in range(3)}),
            "pairs of runs": over_runs_of_pairs(
                {(str(i), str(j)): float(runs[0, i] + runs[0, j] - 1.2) for i, j in ((0, 1), (0, 2), (1, 2))}
            ),
        }
        for name, effect in effects.items():
            decided[name] += judge_difference(effect, measure="m").verdict in ("supported", "contradicted")
    assert max(decided.values()) <= 0.08 * 400  # 5 %, and what 400 studies may scatter


def test_a_share_is_judged_by_its_ratio_too_where_it_is_small() -> None:
    """A Jaccard of .024 against .006 is an effect, though its difference is below two points."""
    differences = OverUnits({"a": 0.012, "b": 0.013, "c": 0.014})
    ratios = OverUnits({"a": 3.9, "b": 4.0, "c": 4.1}, geometric=True)
    assert judge_difference(differences, measure="m").verdict == "no effect beyond the control"
    assert judge_difference(differences, measure="m", relative=ratios).verdict == "supported"
    alike = OverUnits({"a": 1.01, "b": 1.02, "c": 1.0}, geometric=True)
    near = OverUnits({"a": 0.001, "b": 0.002, "c": 0.0})
    assert judge_difference(near, measure="m", relative=alike).verdict == "no effect beyond the control"


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=6))
def test_the_jackknife_over_runs_has_the_mean_of_the_pairs(effects: list[float]) -> None:
    names = [str(i) for i in range(len(effects))]
    pairs = {(a, b): effects[i] + effects[j] for i, a in enumerate(names) for j, b in enumerate(names) if i < j}
    found = over_runs_of_pairs(pairs)
    assert found.interval().value == pytest.approx(np.mean(list(pairs.values())), abs=1e-9)
    for i, name in enumerate(names):  # additive effects of runs come back, each twice
        expected = 2 * effects[i] + (sum(pairs.values()) / len(pairs) - 2 * float(np.mean(effects)))
        assert found.by_unit[name] == pytest.approx(expected, abs=1e-9)
    del pairs["0", "1"]
    rest = over_runs_of_pairs(pairs).interval()
    assert rest.low is None and rest.value == pytest.approx(np.mean(list(pairs.values())), abs=1e-9)


def test_blind_updates_of_every_run_are_measured_like_the_runs_and_decide_nothing(tmp_path: Path) -> None:
    study(tmp_path, on_principal=0.3, sft_size=2e-3)
    evidence = evidence_of(tmp_path / "comparison", beyond=False)
    runs = {run: str(tmp_path / run) for run in evidence.matrices}
    (blind, *_) = blind_evidence(evidence, str(tmp_path / "base"), runs, 3, 0.5, 2)
    for run, rows in blind.matrices.items():
        for row, real in zip(rows, evidence.matrices[run], strict=True):
            assert row["tensor"] == real["tensor"]
            assert row["spectral_shift_stored_null"] == real["spectral_shift_stored_null"]
            assert row["principal_overlap"] != real["principal_overlap"]
    seen: list[tuple[int, int]] = []
    base = str(tmp_path / "base")
    drawn = blind_evidence(evidence, base, runs, 6, 0.5, 2, lambda *counted: seen.append(counted))
    counts = negative_controls(drawn, list(CLAIMS))
    assert len(seen) == len(evidence.matrices["rl_0"]) and seen[-1][0] == seen[-1][1]
    assert {id for id, _, _ in counts} == {"C1", "C2", "C3", "C4", "C5", "C6"}
    for (id, _, _), sides in counts.items():
        found = sides["controlled"]
        assert found["draws"] == 6
        assert found["supported"] + found["contradicted"] <= 2, id
    assert counts["C5", "", "sft"]["as_published"]["supported"] >= 4  # rounding makes the published picture of anything
    assert judge("C5", evidence)[0]["controlled"]["verdict"] == "supported"


@pytest.mark.parametrize("moved", [400, 40])
def test_some_rows_of_a_large_embedding_tell_what_blind_updates_change(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, linear = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
    weights = {embedding: 0.05 * gaussian(400, 32, seed=1), linear: 0.05 * gaussian(64, 32, seed=2)}
    base = write_model(tmp_path / "base", {name: tensor.bfloat16() for name, tensor in weights.items()})
    runs = {}
    for run in ("rl_0", "rl_1"):
        update = 4e-4 * gaussian(400, 32, seed=len(runs) + 3)
        update[moved:] = 0
        tuned = {name: tensor.bfloat16().double() for name, tensor in weights.items()}
        tuned[embedding] += update
        tuned[linear] += 4e-4 * gaussian(64, 32, seed=len(runs) + 5)
        runs[run] = write_model(tmp_path / run, {name: tensor.bfloat16() for name, tensor in tuned.items()})
    compare(base, runs).write(tmp_path / "comparison")
    evidence = Evidence.read(tmp_path / "comparison", list(runs), {}, "comparison")

    def shares() -> list[float]:
        blind = blind_evidence(evidence, str(base), {run: str(path) for run, path in runs.items()}, 6, 0.5, 2)
        rows = [row for one in blind for rows in one.matrices.values() for row in rows if row["tensor"] == embedding]
        for row in rows:
            assert row["changed_count"] == pytest.approx((1 - row["unchanged_fraction"]) * 400 * 32, abs=1)
        return [row["unchanged_fraction"] for row in rows]

    whole = shares()
    monkeypatch.setattr(negative, "_SAMPLED", 100 * 32)
    some = shares()
    assert some != whole
    for kind in range(len(BLIND)):
        of_kind = [i for i in range(len(whole)) if i // len(runs) % len(BLIND) == kind]
        assert np.mean([some[i] for i in of_kind]) == pytest.approx(np.mean([whole[i] for i in of_kind]), abs=0.04)


def test_the_figure_that_decided_a_claim_of_several_parts_is_the_one_that_is_shown() -> None:
    headline = Judgement("supported", 9.7, 8.0, 11.1, "growth", "rule", "Found.", 3)
    none = Judgement("no effect beyond the control", 1.01, 0.9, 1.1, "ratio", "rule", "", 4)
    unsure = Judgement("inconclusive", 2.0, None, None, "share", "rule", "")
    both = controlled_with(headline, [ClaimPart("on the same tokens", none)])
    assert (both.verdict, both.effect, both.low, both.high, both.units) == (none.verdict, 1.01, 0.9, 1.1, 4)
    assert both.measure == "on the same tokens, which decided: ratio"
    assert both.sentence == "Found. growth: 9.7 [8, 11.1]."
    assert published_with(headline, [ClaimPart("it is small", none, wanted=(none.verdict,))]).effect == 9.7
    assert published_with(headline, [ClaimPart("it is small", unsure), ClaimPart("it holds", none)]).effect == 1.01
    left = published_with(headline, [ClaimPart("it is small", unsure)])
    assert (left.verdict, left.effect, left.low) == ("inconclusive", 2.0, None)
    own = published_with(none, [ClaimPart("it is small", headline)])
    assert (own.verdict, own.effect, own.measure) == ("contradicted", 1.01, "ratio")
    assert "has no effect, contradicts the claim" in own.rule and "leave none" in both.rule


def test_a_run_that_was_not_compared_is_named(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", heavy_tailed())
    compare(base, {"rl": base}).write(tmp_path / "comparison")
    with pytest.raises(StudyError, match="no run 'sft'"):
        Evidence.read(tmp_path / "comparison", ["rl"], {"sft": ["sft"]}, "comparison")


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
