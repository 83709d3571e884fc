"""What users give in Python for models, runs, layers and masks: taken, or told in one line what to give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import base_and_two_runs

import offprincipal
from offprincipal.adapters import IsospectralAdamW, Masks, SparseAdamW, make_masks
from offprincipal.errors import AdapterError, ArgumentError, FileError, InterventionError
from offprincipal.gates import measure_gates
from offprincipal.interventions import intervene, undo
from offprincipal.models import LanguageModel, open_language_model


@pytest.fixture
def opened(tiny_model: Path) -> LanguageModel:
    return open_language_model(tiny_model, "cpu")


def test_an_opened_language_model_is_as_good_as_its_module(opened: LanguageModel, tmp_path: Path) -> None:
    masks = make_masks(opened, "low_magnitude", 0.25, target_modules="all-linear")  # type: ignore[arg-type]
    assert masks.density == pytest.approx(0.25, abs=0.01)
    assert repr(masks) == f"Masks(low_magnitude, {len(masks)} parameters, density 0.25)"
    masks.save(tmp_path / "masks.safetensors")
    assert Masks.load(tmp_path / "masks.safetensors", opened).base == masks.base  # type: ignore[arg-type]
    assert IsospectralAdamW(opened, lr=1e-4)._matrices()
    assert offprincipal.adapt(opened, "lora", rank=2, target_modules=None).peft_config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda model: make_masks("embedded", "safe"), "the model is a str: give a torch.nn.Module"),
        (lambda model: offprincipal.adapt("embedded", "lora"), "the model is a str"),
        (lambda model: IsospectralAdamW(3), "params is a int"),
        (lambda model: SparseAdamW(model, "masks.safetensors"), r"masks are a str: make_masks makes them, Masks\.load"),
        (lambda model: make_masks(model, "from_run", run="runs/a"), r"run is 'runs/a': .*run=\(base, tuned\)"),
        (lambda model: make_masks(model, "from_run", run={"base": "a", "tuned": "b"}), r"run=\(base, tuned\)"),
        (lambda model: offprincipal.adapt(model, "lora", use_rslora=True), "use_rslora is not needed: it is alpha"),
        (lambda model: offprincipal.adapt(model, "lora", rnak=2), "rnak is no setting of it: there are rank, alpha"),
        (lambda model: offprincipal.adapt(model, target_modules="q_proj|v_proj"), "has to match the whole name"),
    ],
)
def test_what_is_no_model_mask_or_setting_is_told(opened: LanguageModel, act: Any, says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        act(opened.model)


def test_a_run_of_another_base_or_the_wrong_way_round_gives_no_mask(tiny_model: Path, tmp_path: Path) -> None:
    opened, other = (open_language_model(tiny_model, "cpu") for _ in range(2))
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(1.5)
    other.model.save_pretrained(tmp_path / "tuned")
    run = (tiny_model, tmp_path / "tuned")
    assert make_masks(opened.model, "from_run", run=run).density > 0
    for model, given in ((opened.model, run[::-1]), (other.model, run)):
        with pytest.raises(AdapterError, match=r"is not that of .*: give run=\(base, tuned\) of this base"):
            make_masks(model, "from_run", run=given)


def test_gates_take_what_compare_takes_and_a_list_of_prompts(tiny_model: Path, opened: LanguageModel) -> None:
    options: Any = {"batches": 2, "prompts_per_batch": 1, "per_layer": False, "draws": 1, "max_new_tokens": 2}
    found = measure_gates(tiny_model, [tiny_model], prompts=["3+4=", "1+1="], precision=False, **options)
    assert list(found.runs) == [tiny_model.name] and repr(found).startswith("KL divergence from the base")
    with pytest.raises(ArgumentError, match=r"model is a .*but the gates open models themselves"):
        measure_gates(tiny_model, opened.model, prompts=["3+4="], **options)


def test_layers_are_a_number_a_list_or_a_text(tiny_model: Path, tmp_path: Path) -> None:
    records = [
        intervene(tiny_model, tmp_path / str(place), rotate=layers)
        for place, layers in enumerate(("0-1", [0, 1], "all"))
    ]
    assert len({record.request for record in records}) == 1
    assert intervene(tiny_model, tmp_path / "one", permute=1).request.permute == (1,)
    with pytest.raises(InterventionError, match="give the folder that `intervene` wrote"):
        undo(records[0], tiny_model, tmp_path / "back")  # type: ignore[arg-type]


def test_a_folder_that_is_not_there_is_said_and_a_comparison_prints_its_table(tmp_path: Path) -> None:
    base, runs = base_and_two_runs(tmp_path)
    found = offprincipal.compare(base, runs, metrics="location")
    assert "unchanged, %" in str(found) and "where" in str(found) and max(map(len, str(found).splitlines())) <= 80
    with pytest.raises(FileError, match="there is no folder"):
        make_masks(torch.nn.Sequential(torch.nn.Linear(4, 4)), "random").save(tmp_path / "no" / "masks.safetensors")


def test_two_modules_are_told_apart_by_a_dict(opened: LanguageModel, tiny_model: Path) -> None:
    with pytest.raises(ArgumentError, match="in Python with a dict"):
        offprincipal.compare(tiny_model, [opened.model, opened.model])
