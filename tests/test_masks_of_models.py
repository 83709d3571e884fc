"""Masks of a model's matrices: which entries each kind holds, what a density means, and what the file is tied to."""

import copy
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from offprincipal.adapters import KINDS, Masks, make_masks
from offprincipal.adapters.choosing import first_of_either
from offprincipal.errors import AdapterError, CheckpointError, FileError, NonFiniteTensor
from offprincipal.geometry.masks import entry_ranks, low_magnitude_ranks, mask_size, masks_at
from offprincipal.geometry.principal import principal_rank
from offprincipal.geometry.spectrum import decompose
from offprincipal.models import open_language_model

BY_WEIGHTS = [kind for kind in KINDS if kind != "from_run"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    opened: torch.nn.Module = open_language_model(tiny_model, "cpu").model
    return opened


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the first 100 entries of its value projections moved, the later ones further."""
    folder = tmp_path_factory.mktemp("tuned")
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "v_proj" in name:
            weight.view(-1)[:100] += torch.linspace(1, 2, 100)
    save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def masks_by_definition(W: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    svd = decompose(W).top(principal_rank(W.shape, 0.125))
    principal = entry_ranks(((svd.U * svd.S) @ svd.Vh).abs().float())
    return masks_at(alpha, {"principal": principal, "low_magnitude": low_magnitude_ranks(W)})


@pytest.mark.parametrize("kind", ["principal", "low_magnitude"])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_masks_of_a_model_are_those_of_the_definition(model: torch.nn.Module, kind: Any, density: float) -> None:
    masks = make_masks(model, kind, density)
    parameters = dict(model.named_parameters())
    assert len(masks) == 14
    for name in masks:
        assert torch.equal(masks[name], masks_by_definition(parameters[name].detach(), density)[kind])


def test_safe_without_a_density_is_the_union_of_the_definition(model: torch.nn.Module) -> None:
    masks = make_masks(model, "safe")
    for name, parameter in model.named_parameters():
        if name in masks:
            assert torch.equal(masks[name], masks_by_definition(parameter.detach(), 0.5)["safe"])
    assert 0.5 < masks.density < 1


def test_safe_at_the_density_of_the_definition_is_the_definition(model: torch.nn.Module) -> None:
    published = make_masks(model, "safe")
    for name in published:
        module = name.removesuffix(".weight")
        again = make_masks(model, "safe", published.densities[name], target_modules=[module])
        assert torch.equal(again[name], published[name])


def test_off_principal_is_the_complement_of_principal(model: torch.nn.Module) -> None:
    off, principal = make_masks(model, "off_principal", 0.75), make_masks(model, "principal", 0.25)
    sizes = [(off.active(name) + principal.active(name), off[name].numel()) for name in off]
    assert all(held == numel for held, numel in sizes)
    scores = {name: masks_by_definition(dict(model.named_parameters())[name].detach(), 0.25) for name in off}
    assert all(int((off[name] & scores[name]["principal"]).sum()) == 0 for name in off)


@pytest.mark.parametrize("kind", BY_WEIGHTS)
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_a_mask_has_the_density_that_was_asked_for(model: torch.nn.Module, kind: Any, scope: Any) -> None:
    masks = make_masks(model, kind, 0.3, scope=scope)
    numel = sum(masks[name].numel() for name in masks)
    if scope == "global":
        assert sum(map(masks.active, masks)) == mask_size(numel, 0.3)
    else:
        assert all(masks.active(name) == mask_size(masks[name].numel(), 0.3) for name in masks)


def test_a_global_mask_has_one_threshold_for_all_matrices(model: torch.nn.Module) -> None:
    masks = make_masks(model, "low_magnitude", 0.2, scope="global")
    parameters = {name: parameter.detach().abs() for name, parameter in model.named_parameters() if name in masks}
    largest_in = max(parameters[name][masks[name]].max() for name in masks)
    smallest_out = min(parameters[name][~masks[name]].min() for name in masks)
    assert largest_in <= smallest_out


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 5))
def test_the_union_grows_entry_by_entry_and_holds_what_either_order_puts_first(
    seed: int, size: int, levels: int
) -> None:
    draw = np.random.default_rng(seed)
    one, two = draw.integers(0, 3**levels, (2, 60)).astype(np.float32)
    chosen = first_of_either(one, two, size)
    assert chosen.sum() == size
    places = [np.argsort(np.argsort(-x, kind="stable"), kind="stable") for x in (one, two)]
    entry = np.minimum(*places)  # when an entry enters the union
    assert entry[chosen].max() <= entry[~chosen].min(initial=60)


def test_random_masks_follow_the_seed_and_differ_between_matrices(model: torch.nn.Module) -> None:
    first, again, other = (make_masks(model, "random", 0.5, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    q = [name for name in first if "q_proj" in name]
    assert not torch.equal(first[q[0]], first[q[1]])


def test_the_mask_of_a_run_is_what_it_changed(model: torch.nn.Module, tiny_model: Path, tuned: Path) -> None:
    masks = make_masks(model, "from_run", run=(tiny_model, tuned))
    assert list(masks) == [name for name, _ in model.named_parameters() if "v_proj" in name]
    assert all(masks[name].view(-1)[:100].all() and masks.active(name) == 100 for name in masks)


def test_a_smaller_mask_of_a_run_is_what_it_moved_furthest(
    model: torch.nn.Module, tiny_model: Path, tuned: Path
) -> None:
    masks = make_masks(model, "from_run", 10 / 512, run=(tiny_model, tuned), target_modules=["v_proj"])
    base, moved = load_file(tiny_model / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name in masks:
        step = (moved[name].float() - base[name].float()).abs()
        assert masks.active(name) == 10
        assert step[masks[name]].min() >= step[~masks[name]].max()


def test_a_run_cannot_give_more_than_it_changed(model: torch.nn.Module, tiny_model: Path, tuned: Path) -> None:
    with pytest.raises(AdapterError, match=r"changed 0\.00% .* choose a smaller density"):
        make_masks(model, "from_run", 0.1, run=(tiny_model, tuned))


def test_stacked_experts_are_masked_matrix_by_matrix() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.Module()
            self.experts.down_proj = torch.nn.Parameter(
                torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
            )

        class config:  # noqa: N801
            @staticmethod
            def to_dict() -> dict[str, Any]:
                return {"model_type": "qwen3_moe"}

    masks = make_masks(Experts(), "low_magnitude", 0.25)
    assert [int(mask.sum()) for mask in masks["experts.down_proj"]] == [32, 32, 32]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_a_density_outside_its_range_is_refused(model: torch.nn.Module, density: float) -> None:
    with pytest.raises(AdapterError, match=r"outside \(0, 1\]"):
        make_masks(model, "random", density)


def test_modules_are_named_by_endings_or_by_a_regular_expression(model: torch.nn.Module) -> None:
    by_ending = make_masks(model, "random", 0.5, target_modules=["q_proj", "v_proj"])
    assert set(by_ending) == {name for name, _ in model.named_parameters() if re.search("[qv]_proj.weight$", name)}
    assert set(make_masks(model, "random", 0.5, target_modules=r".*\.[qv]_proj")) == set(by_ending)
    assert set(make_masks(model, "random", 0.5, target_modules="q_proj")) < set(by_ending)
    with pytest.raises(AdapterError, match="is not a regular expression"):
        make_masks(model, "random", 0.5, target_modules="(")


@pytest.mark.parametrize("chosen", [["q_proj", "w_pack"], ["w_pack"], "w_pack", []])
def test_every_name_has_to_match(model: torch.nn.Module, chosen: Any) -> None:
    with pytest.raises(AdapterError, match="no linear matrix named w_pack" if chosen else r"target_modules is \[\]"):
        make_masks(model, "low_magnitude", target_modules=chosen)


def test_an_expression_of_the_shell_is_told_from_a_regular_one(model: torch.nn.Module) -> None:
    with pytest.raises(AdapterError, match="for every name that ends so give 'q_proj'"):
        make_masks(model, "low_magnitude", target_modules="*.q_proj")


def test_a_model_without_its_weights_is_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    make_masks(model, "low_magnitude", 0.5).save(tmp_path / "masks.safetensors")
    empty = copy.deepcopy(model).to("meta")
    for attempt in (lambda: make_masks(empty, "safe"), lambda: Masks.load(tmp_path / "masks.safetensors", empty)):
        with pytest.raises(AdapterError, match="are not loaded"):
            attempt()


@pytest.mark.parametrize("settings", [{"density": "0.2"}, {"rank_fraction": None}])
def test_settings_that_are_not_numbers_are_refused(model: torch.nn.Module, settings: Any) -> None:
    with pytest.raises(AdapterError, match="give a number"):
        make_masks(model, "safe", **settings)


def test_a_mask_that_would_name_no_matrix_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(AdapterError, match="no linear matrix named w_pack"):
        make_masks(model, "random", 0.5, target_modules=["w_pack"])
    with pytest.raises(AdapterError, match="leaves no entry"):
        make_masks(model, "random", 1e-9)


def test_quantised_weights_are_refused(tiny_model: Path) -> None:
    model = open_language_model(tiny_model, "cpu").model
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"q_proj\.weight is quantised \(uint8\)"):
        make_masks(model, "low_magnitude", 0.5)


def test_weights_that_are_not_finite_are_refused(tiny_model: Path) -> None:
    model = open_language_model(tiny_model, "cpu").model
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteTensor, match=r"q_proj\.weight"):
        make_masks(model, "low_magnitude", 0.5)


def test_a_run_of_another_architecture_is_refused(model: torch.nn.Module, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"other.weight": np.ones((2, 2), ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, AdapterError)):
        make_masks(model, "from_run", run=(tmp_path, tmp_path))


def test_a_mask_file_gives_the_masks_back(model: torch.nn.Module, tmp_path: Path) -> None:
    masks = make_masks(model, "safe", 0.3)
    masks.save(tmp_path / "safe.safetensors")
    loaded = Masks.load(tmp_path / "safe.safetensors", model)
    assert list(loaded) == list(masks) and loaded.about == masks.about and loaded.density == masks.density
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)


def test_a_mask_file_is_an_eighth_of_a_byte_an_entry(model: torch.nn.Module, tmp_path: Path) -> None:
    masks = make_masks(model, "random", 0.5)
    masks.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < sum(masks[name].numel() for name in masks) / 8 + 4096


def test_a_mask_file_from_another_base_is_refused(model: torch.nn.Module, tiny_model: Path, tmp_path: Path) -> None:
    make_masks(model, "low_magnitude", 0.3).save(tmp_path / "m.safetensors")
    other = open_language_model(tiny_model, "cpu").model
    other.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    with pytest.raises(AdapterError, match="made from another base"):
        Masks.load(tmp_path / "m.safetensors", other)


def test_the_type_in_which_the_base_is_opened_does_not_matter(
    model: torch.nn.Module, tiny_model: Path, tmp_path: Path
) -> None:
    make_masks(model, "low_magnitude", 0.3).save(tmp_path / "m.safetensors")
    other = open_language_model(tiny_model, "cpu").model.to(torch.bfloat16)
    assert Masks.load(tmp_path / "m.safetensors", other).density > 0


@pytest.mark.parametrize("damage", ["absent", "truncated", "no masks", "other shapes", "bits beyond"])
def test_a_file_that_holds_no_masks_is_refused(model: torch.nn.Module, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.safetensors"
    make_masks(model, "random", 0.3).save(path)
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "no masks":
        save_file({"w": np.ones(3, np.float32)}, path)
    else:
        shape = "[4, 4]" if damage == "bits beyond" else "[9, 99]"
        content = f'{{"format": 1, "base": "", "about": {{}}, "shapes": {{"w": {shape}}}}}'
        metadata = {"offprincipal_masks": content}
        save_file({"w": np.array([2**60], np.uint64)}, path, metadata)
    with pytest.raises(FileError, match=r"m\.safetensors"):
        Masks.load(path, model)
