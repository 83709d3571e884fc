"""Stages that stand for several: names, settings, patterns, and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offprincipal.errors import StudyError
from offprincipal.paper import load_profile
from offprincipal.studies.expansion import expand

TRAIN = {"kind": "train"}


@given(st.lists(st.integers(0, 9), min_size=1, unique=True), st.lists(st.integers(1, 64), min_size=1, unique=True))
def test_there_is_a_stage_for_each_combination_with_its_settings(seeds: list[int], ranks: list[int]) -> None:
    each = {"adapter.rank": ranks, "seed": seeds}
    found = expand({"run_r{rank}_s{seed}": TRAIN | {"adapter": {"method": "lora"}, "each": each}})
    assert found == {
        f"run_r{rank}_s{seed}": TRAIN | {"adapter": {"method": "lora", "rank": rank}, "seed": seed}
        for rank in ranks
        for seed in seeds
    }


def test_numbers_become_parts_of_names() -> None:
    found = expand({"lr{learning_rate}_{mask}": {"each": {"learning_rate": [1.0e-3, 1e-5], "adapter.mask": ["safe"]}}})
    assert list(found) == ["lr0_001_safe", "lr1e_05_safe"]
    assert all(name.isidentifier() for name in found)


def test_a_stage_names_the_runs_of_its_own_combination() -> None:
    runs = {"a_s{seed}_{lr}": {"each": {"seed": [1, 2], "lr": [3, 4]}}}
    found = expand(runs | {"like_s{seed}": {"like": ["a_s{seed}_*"], "each": {"seed": [1, 2]}}})
    assert found["like_s2"]["like"] == ["a_s2_3", "a_s2_4"]


def test_patterns_name_each_stage_once_also_in_sources() -> None:
    stages: dict[str, Any] = {"a_1": {}, "a_2": {}, "b": {}}
    found = expand(stages | {"all": {"runs": ["a_2", "a_*", "b"], "sources": {"outcomes": ["a*"]}}})
    assert found["all"] == {"runs": ["a_2", "a_1", "b"], "sources": {"outcomes": ["a_1", "a_2"]}}


def test_expansion_leaves_what_it_read_alone_and_copies_do_not_share_settings() -> None:
    adapter = {"method": "lora"}
    stages = {"r{rank}": {"adapter": adapter, "each": {"adapter.rank": [1, 2]}}}
    found = expand(stages)
    assert adapter == {"method": "lora"} and "each" in stages["r{rank}"]
    assert [stage["adapter"]["rank"] for stage in found.values()] == [1, 2]


def test_names_in_mappings_to_lists_are_patterns_too() -> None:
    stages = {
        "a_1": {},
        "a_2": {},
        "b": {"sft": {"own": ["a_*"]}, "sources": {"gates": ["a_1"]}, "note": {"x": ["a_*"]}},
    }
    assert expand(stages)["b"] == {
        "sft": {"own": ["a_1", "a_2"]},
        "sources": {"gates": ["a_1"]},
        "note": {"x": ["a_*"]},
    }


def test_stages_without_each_pass_untouched() -> None:
    stages = {"a": {"kind": "train", "runs": ["b"], "note": "{seed} *"}, "b": "no mapping"}
    assert expand(stages) == stages


@pytest.mark.parametrize("each", [{}, [], "seed", {"seed": 1}, {"seed": []}, {"seed": [1], "rank": None}, {1: [2]}])
def test_each_that_is_no_mapping_to_lists_is_refused(each: Any) -> None:
    with pytest.raises(StudyError, match="stage 'a_': 'each' must map settings to lists"):
        expand({"a_": {"each": each}})


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(StudyError, match="two stages expand to the name 'run_s1': use every key"):
        expand({"run_s{seed}": {"each": {"seed": [1], "rank": [4, 16]}}})
    with pytest.raises(StudyError, match="two stages expand to the name 'run_s1'"):
        expand({"run_s1": {}, "run_s{seed}": {"each": {"seed": [1]}}})


def test_a_pattern_that_names_no_stage_is_refused() -> None:
    with pytest.raises(StudyError, match=r"no stage matches 'lora_\*': stages are a"):
        expand({"a": {}, "b": {"runs": ["lora_*"]}})


def test_a_setting_inside_a_value_cannot_be_set_for_each() -> None:
    with pytest.raises(StudyError, match=r"'each' cannot set adapter\.rank, since adapter is a value"):
        expand({"r{rank}": {"adapter": "lora", "each": {"adapter.rank": [4]}}})


def test_what_is_no_list_of_names_is_left_for_the_profile_to_refuse() -> None:
    odd = {"runs": [{"a": 1}], "like": [3], "sources": {"outcomes": [["a"]]}}
    assert expand({"a": odd})["a"] == odd


def test_the_shipped_profile_pairs_every_control_with_sweeps_of_its_own_rank_and_seed() -> None:
    profile = load_profile("peft")
    controls = {name: stage for name, stage in profile.stages.items() if stage.kind == "matched"}
    assert len(controls) == 2 * 2 * 2 * 3  # either method, either size, two ranks, three seeds
    for name, stage in controls.items():
        place = name.partition("_r")[2]
        rank, seed = place.split("_s")
        assert len(stage.like) >= 4 and len(stage.sweep) >= 4
        for run in (*stage.like, *stage.sweep):
            assert f"_r{rank}_" in run and run.endswith(f"_s{seed}")
        method = name.partition("_")[0]
        assert {run.split("_")[0] for run in stage.sweep} == {method}
        assert {run.split("_")[0] for run in stage.like} == {"lora", "pissa"} - {method}
    trained = {name for name, stage in profile.stages.items() if stage.kind in ("train", "matched")}
    assert set(profile.stages["outcomes"].runs) == set(profile.stages["weights"].runs) == trained
