"""The rules of C7–C10, on tables whose truth is known by construction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_folders import write_model
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian

from offprincipal.checkpoints import open_checkpoint
from offprincipal.comparison import compare
from offprincipal.files import write_json
from offprincipal.gates.precision_gate import PrecisionSettings, measure_precision
from offprincipal.paper.claims import Evidence, judge
from offprincipal.paper.claims.rules import (
    ClaimPart,
    Judgement,
    controlled_with,
    judge_at_most,
    judge_positive,
    published_with,
)
from offprincipal.paper.claims.units import OverUnits
from offprincipal.studies.experiments import agreement_rows, gaussian_like

Row = dict[str, Any]
NONE = "no effect beyond the control"
LAYERS = 4
UNITS = range(3)
RL, SFT = (tuple(f"{kind}_{i}" for i in UNITS) for kind in ("rl", "sft"))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Twelve matrices whose rows differ in scale, so that rounding favours some."""
    found = {}
    for i in range(3 * LAYERS):
        name = f"model.layers.{i // 3}.self_attn.{'qvo'[i % 3]}_proj.weight"
        rows = torch.exp(gaussian(64, 1, seed=900 + seed + i))
        found[name] = (rows * gaussian(64, 64, seed=seed + i) / 20).bfloat16()
    return found


def save(folder: Path, masters: Mapping[str, torch.Tensor]) -> Path:
    write_model(folder, {name: tensor.bfloat16() for name, tensor in masters.items()})
    write_model(folder / "masters", {name: tensor.float() for name, tensor in masters.items()})
    return folder


def evidence(sources: Mapping[str, list[Path]], gaussian: Mapping[str, str] | None = None) -> Evidence:
    return Evidence({}, [], RL, {"sft": SFT}, "comparison", sources=sources, gaussian=gaussian or {})


def verdicts(id: str, found: Evidence) -> tuple[str, str]:
    (entry,) = judge(id, found)
    return entry["as_published"]["verdict"], entry["controlled"]["verdict"]


def write_table(folder: Path, name: str, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


# C7: a fixed direction of the update in each matrix is an agreement beyond rounding; shuffled rows take it away.


def updated(base: Mapping[str, torch.Tensor], seed: int, sought: Mapping[str, torch.Tensor], pull: float) -> dict:
    return {
        name: W.double() + 2e-4 * gaussian(64, 64, seed=seed + i) * (1 + pull * sought[name])
        for i, (name, W) in enumerate(base.items())
    }


def agreement(tmp_path: Path, pull: float, permuted_too: bool) -> Evidence:
    """Three interventions, each with runs of its own that seek the same places; half of a layer set is reordered."""
    base, rows = weights(), []
    for unit in UNITS:
        sought = {name: (gaussian(64, 64, seed=70 + i + 100 * unit) > 0).double() for i, name in enumerate(base)}
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1 + unit))
        touched = [name for name in base if int(name.split(".")[2]) < LAYERS // 2]

        def reordered(
            tensors: Mapping[str, torch.Tensor], order: torch.Tensor = order, touched: list[str] = touched
        ) -> dict[str, torch.Tensor]:
            return {name: tensor[order] if name in touched else tensor for name, tensor in tensors.items()}

        other = reordered(base)
        wanted = reordered(sought) if permuted_too else sought
        run_a, run_b = updated(base, 1000 + unit, sought, pull), updated(other, 2000 + unit, wanted, pull)
        inverse = torch.argsort(order)
        back = {name: tensor[inverse] if name in touched else tensor for name, tensor in run_b.items()}
        found = {"base": base, "a": run_a, "other": other, "b": run_b, "back": back}
        opened = {name: open_checkpoint(save(tmp_path / f"{name}_{unit}", masters)) for name, masters in found.items()}
        trained = [opened[name] for name in ("base", "a", "other", "b")]
        undone = [opened[name] for name in ("base", "a", "base", "back")]
        rows += [{"intervention": f"x{unit}"} | row for row in agreement_rows(trained, undone)]
    return evidence({"agreement": [write_table(tmp_path / "t", "agreement", rows)]})


def test_rounding_alone_falls_as_published_and_not_beyond_the_control(tmp_path: Path) -> None:
    published, controlled = verdicts("C7", agreement(tmp_path, pull=0.0, permuted_too=True))
    assert published == "supported"
    assert controlled == NONE


def test_a_preference_that_moves_with_the_coordinates_passes_the_control(tmp_path: Path) -> None:
    assert verdicts("C7", agreement(tmp_path, pull=5.0, permuted_too=True)) == ("supported", "supported")


def test_a_preference_for_places_survives_the_intervention_and_contradicts(tmp_path: Path) -> None:
    found = agreement(tmp_path, pull=5.0, permuted_too=False)
    published, controlled = verdicts("C7", found)
    assert controlled in (NONE, "inconclusive", "contradicted")
    assert published != "supported"


def test_what_is_brought_back_agrees_as_the_untouched_do(tmp_path: Path) -> None:
    rows = agreement(tmp_path, pull=5.0, permuted_too=True).rows("agreement")
    touched = [row for row in rows if row["touched"]]
    shares = {view: [r["jaccard"] for r in touched if r["view"] == view] for view in ("as trained", "undone")}
    untouched = [row["jaccard"] for row in rows if not row["touched"] and row["view"] == "as trained"]
    assert max(shares["as trained"]) < min(shares["undone"])
    assert sum(shares["undone"]) / 18 == pytest.approx(sum(untouched) / 18, abs=0.02)
    assert {row["tensor"] for row in touched} == {r["tensor"] for r in rows if r["layer"] < LAYERS // 2}


# C8


def precision(tmp_path: Path, size: float, pull: float) -> Evidence:
    """Three runs whose update is `pull` times as large off principal weights as on them."""
    from offprincipal.geometry.principal import principal_ranks
    from offprincipal.geometry.spectrum import decompose

    base, rows, off = open_checkpoint(write_model(tmp_path / "base", weights())), [], {}
    for name, W in weights().items():
        top = decompose(W.double()).top(8)
        off[name] = torch.where(principal_ranks(top.U, top.S, top.Vh) < W.numel() // 2, 1.0, pull)
    for unit, run in enumerate(RL):
        masters = {
            name: W.double() + size * gaussian(64, 64, seed=5000 + i + 100 * unit) * off[name]
            for i, (name, W) in enumerate(weights().items())
        }
        tuned = open_checkpoint(save(tmp_path / run, masters) / "masters")
        rows += [{"run": run} | row for row in measure_precision(base, tuned, PrecisionSettings()).sweep]
    return evidence({"precision": [write_table(tmp_path / "p", "precision", rows)]})


def test_a_weight_blind_update_shows_no_bias_beyond_any_formats_rounding(tmp_path: Path) -> None:
    found = precision(tmp_path, 5e-4, pull=1.0)
    assert verdicts("C8", found) == ("contradicted", NONE)  # the bias goes with the sparsity
    sentence = judge("C8", found)[0]["as_published"]["sentence"]
    assert "in float32 0.0 %" in sentence


def test_an_update_that_avoids_principal_weights_keeps_its_bias_in_every_format(tmp_path: Path) -> None:
    found = precision(tmp_path, 2e-5, pull=20.0)
    assert verdicts("C8", found) == ("supported", "supported")


# C9


def watched(folder: Path, kind: str, kl: float, stiffness: float = 1.0, steps: int = 40) -> list[Path]:
    """Three policies that move by about `kl` nats a step, whose weights move as a random walk."""
    folders = []
    for unit in UNITS:
        rows = [
            {
                "step": step,
                "tensor": None,
                "kl_step": kl * (1 + 0.02 * unit) * (1 + 0.1 * (-1) ** step) if step else None,
                "kl_cumulative": kl * (1 + 0.02 * unit) * stiffness * step,
                "update_norm": (0.01 * step) ** 0.5,
            }
            for step in range(1, steps + 1)
        ]
        folders.append(write_table(folder / f"{kind}_{unit}", "monitor", rows))
    return folders


def kl_runs(
    tmp_path: Path, kl: float, sft_kl: float, tightness: float = 0.9, sft_on_base: float = 0.1, steps: int = 40
) -> Evidence:
    """`sft_on_base`: KL of SFT's update on the base's own continuations, where RL's is 0.01."""
    entries = {
        run: {"norm_bound": {"tightness": tightness, "update_norm": 0.5}, "curve": [{"fraction": 1.0, "kl": of_run}]}
        for runs, of_run in ((RL, 0.01), (SFT, sft_on_base))
        for run in runs
    }
    write_json(tmp_path / "gates.json", {"runs": entries})
    rl, sft = (watched(tmp_path, kind, of_kind, steps=steps) for kind, of_kind in (("rl", kl), ("sft", sft_kl)))
    return evidence({"watched_rl": rl, "watched_sft": sft, "gates": [tmp_path]})


def test_a_small_steady_kl_is_a_bound_and_equal_sft_shows_that_it_is_not_rls_own(tmp_path: Path) -> None:
    assert verdicts("C9", kl_runs(tmp_path, 1e-3, 1e-3)) == ("supported", NONE)
    assert verdicts("C9", kl_runs(tmp_path, 1e-3, 1e-2)) == ("supported", "supported")
    assert verdicts("C9", kl_runs(tmp_path, 1e-3, 1e-4))[1] == "contradicted"


def test_a_bound_that_only_the_choice_of_tokens_shows_is_none(tmp_path: Path) -> None:
    assert verdicts("C9", kl_runs(tmp_path, 1e-3, 1e-2, sft_on_base=0.01))[1] == NONE
    assert verdicts("C9", kl_runs(tmp_path, 1e-3, 1e-2, sft_on_base=0.001))[1] == "contradicted"


def test_large_steps_no_steps_and_a_broken_bound_are_no_bound(tmp_path: Path) -> None:
    for name, kl, tightness in (("large", 0.5, 0.9), ("none", 0.0, 0.9), ("loose", 1e-3, 2.0)):
        assert verdicts("C9", kl_runs(tmp_path, kl, 1e-3, tightness))[0] in ("contradicted", "inconclusive"), name


def test_too_few_steps_decide_nothing(tmp_path: Path) -> None:
    assert verdicts("C9", kl_runs(tmp_path, 1e-3, 1e-3, steps=3)) == ("inconclusive", "inconclusive")


# C10


def test_bounds_hold_and_gaussian_runs_use_as_much_of_them_as_their_nulls(tmp_path: Path) -> None:
    opened = open_checkpoint(write_model(tmp_path / "base", weights()))
    runs: dict[str, Path] = {}
    for unit in UNITS:
        drawn, turned = {}, {}
        for i, (name, W) in enumerate(weights().items()):
            noise = gaussian(64, 64, seed=5000 + i + 100 * unit)
            drawn[name] = W.double() + 1e-3 * noise
            turned[name] = torch.matrix_exp(2e-3 * (noise - noise.T)) @ W.double()  # keeps every singular value
        for name, masters in ((f"rl_{unit}", drawn), (f"turned_{unit}", turned)):
            runs[name] = save(tmp_path / name, masters)
            null = gaussian_like(opened, open_checkpoint(runs[name] / "masters"), seed=unit)
            runs[f"null_{name}"] = save(tmp_path / f"null_{name}", null)
    compare(tmp_path / "base", runs).write(tmp_path / "c")
    table = {"bounds": [tmp_path / "c"]}
    (entry,) = judge("C10", evidence(table, {run: f"null_{run}" for run in RL}))
    assert entry["as_published"]["verdict"] == "supported"
    assert entry["controlled"]["verdict"] in (NONE, "inconclusive")
    names = tuple(f"turned_{unit}" for unit in UNITS)
    rotations = Evidence({}, [], names, {}, "c", sources=table, gaussian={run: f"null_{run}" for run in names})
    assert verdicts("C10", rotations)[1] == "supported"
    assert verdicts("C10", evidence(table))[1] == "inconclusive"
    assert verdicts("C10", evidence(table, {"rl_0": "null_rl_0"}))[1] == "inconclusive"  # one run: shown, not judged


def test_the_gaussian_update_has_the_runs_length_tensor_by_tensor(tmp_path: Path) -> None:
    base = open_checkpoint(write_model(tmp_path / "base", weights()))
    run = {
        n: W.double() + (i + 1) * 1e-3 * gaussian(64, 64, seed=5000 + i) for i, (n, W) in enumerate(weights().items())
    }
    found = gaussian_like(base, open_checkpoint(save(tmp_path / "run", run) / "masters"), seed=0)
    for name, W in weights().items():
        length, expected = ((x[name].double() - W.double()).norm().item() for x in (found, run))
        assert length == pytest.approx(expected, rel=1e-3)


# The rules themselves


def judged(verdict: str) -> Judgement:
    return Judgement(verdict, 1.0, 0.5, 1.5, "m", "r", "s")  # type: ignore[arg-type]


VERDICTS = st.sampled_from(["supported", "contradicted", NONE, "inconclusive"])


@given(VERDICTS, st.lists(VERDICTS, max_size=3))
def test_a_claim_of_several_parts_is_as_good_as_its_worst(headline: str, others: list[str]) -> None:
    conditions = [ClaimPart("c", judged(verdict)) for verdict in others]
    found = published_with(judged(headline), conditions).verdict
    whole = {headline, *others}
    if whole & {"contradicted", NONE}:
        assert found == "contradicted"
    else:
        assert found == ("inconclusive" if "inconclusive" in whole else "supported")
    controlled = controlled_with(judged(headline), conditions).verdict
    if headline != "supported" or not others:
        assert controlled == headline
    else:
        order = ["supported", "inconclusive", NONE, "contradicted"]
        assert controlled == max(others, key=order.index)


def test_a_condition_that_wants_no_effect_is_missed_by_one() -> None:
    for verdict, expected in (("supported", "contradicted"), (NONE, "supported"), ("inconclusive", "inconclusive")):
        conditions = [ClaimPart("none is left", judged(verdict), wanted=(NONE,))]
        assert controlled_with(judged("supported"), conditions).verdict == expected


def test_rules_without_an_interval_and_at_nothing() -> None:
    assert judge_at_most(None, 1.0, measure="m").verdict == "inconclusive"
    assert judge_at_most(1.1, 1.0, measure="m").verdict == "contradicted"
    for value, verdict in ((0.0, NONE), (1.0, "supported")):
        assert judge_positive(OverUnits(dict.fromkeys("abc", value)), measure="m").verdict == verdict
    for few in ({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 4.0, "c": 0.2}):  # or too far apart: not known is not nothing
        assert judge_positive(OverUnits(few), measure="m").verdict == "inconclusive"
