"""SparseAdamW is AdamW on the masked entries, bit for bit, and touches no other."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from offprincipal.adapters import SparseAdamW, make_masks
from offprincipal.adapters.sparse_index import STRETCH, entries_of, index_of
from offprincipal.errors import AdapterError
from offprincipal.models import open_language_model

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


def layer_of(W: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    layer.weight.data.copy_(W)
    return layer


def random_mask(shape: torch.Size, density: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) < density


class MaskedAdamW:
    """torch's AdamW on a masked gradient, with the entries outside the mask put back after the decay."""

    def __init__(self, layer: torch.nn.Linear, mask: torch.Tensor, **settings: Any) -> None:
        self.weight, self.mask, self.base = layer.weight, mask, layer.weight.detach().clone()
        self.optimizer = torch.optim.AdamW([layer.weight], **settings)

    def step(self, grad: torch.Tensor) -> None:
        self.weight.grad = grad * self.mask
        self.optimizer.step()
        self.weight.data[~self.mask] = self.base[~self.mask]


@given(
    st.sampled_from([0.01, 0.03, 0.05, 0.25, 0.74, 1.0]),
    st.sampled_from([(64, 48), (16, 1), (80, 130), (256, 300)]),
    st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.5), (0.7, 0.2)]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**31),
)
def test_every_bit_is_that_of_masked_dense_adamw(
    density: float, shape: tuple[int, int], betas: tuple[float, float], decay: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=draw)
    mask = random_mask(W.shape, density, draw)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": betas, "weight_decay": decay}
    ours, dense = layer_of(W), layer_of(W)
    sparse = SparseAdamW(ours.named_parameters(), {"weight": mask}, **settings)
    reference = MaskedAdamW(dense, mask, foreach=False, **settings)
    for _ in range(5):
        grad = torch.randn(shape, generator=draw) * 10.0 ** torch.randint(-6, 3, shape, generator=draw)
        ours.weight.grad = grad
        sparse.step()
        reference.step(grad)
    assert torch.equal(ours.weight, dense.weight)
    state, theirs = sparse.state[ours.weight], reference.optimizer.state[dense.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], theirs[key][mask])


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_a_parameter_of_several_blocks_moves_as_a_dense_one(density: float) -> None:
    draw = torch.Generator().manual_seed(2)
    W = torch.randn(2, 20 * STRETCH + 3, generator=draw)
    mask = random_mask(W.shape, density, draw)
    ours, dense = layer_of(W), layer_of(W)
    sparse = SparseAdamW(ours.named_parameters(), {"weight": mask}, **SETTINGS)
    reference = MaskedAdamW(dense, mask, foreach=False, **SETTINGS)
    for _ in range(2):
        ours.weight.grad = torch.randn(W.shape, generator=draw)
        sparse.step()
        reference.step(ours.weight.grad)
    assert torch.equal(ours.weight, dense.weight)


def test_threads_do_not_change_a_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    W, grad = torch.randn(512, 700, generator=draw), torch.randn(512, 700, generator=draw)
    found = []
    for density in (0.01, 0.5):
        mask = random_mask(W.shape, density, draw)
        for threads in (1, 3):
            layer = layer_of(W)
            optimizer = SparseAdamW(layer.named_parameters(), {"weight": mask}, **SETTINGS)
            layer.weight.grad = grad
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                optimizer.step()
            finally:
                torch.set_num_threads(before)
            found.append(layer.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], W)


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_half_precision_weights_are_their_rounded_masters(density: float) -> None:
    draw = torch.Generator().manual_seed(1)
    W = torch.randn(64, 48, generator=draw).to(torch.bfloat16)
    mask = random_mask(W.shape, density, draw)
    ours, dense = layer_of(W), layer_of(W.float())
    sparse = SparseAdamW(ours.named_parameters(), {"weight": mask}, lr=1e-4, weight_decay=0.1)
    reference = MaskedAdamW(dense, mask, lr=1e-4, weight_decay=0.1, foreach=False)
    for _ in range(10):
        grad = torch.randn(64, 48, generator=draw).to(torch.bfloat16)
        ours.weight.grad = grad
        sparse.step()
        reference.step(grad.float())
    assert torch.equal(sparse.state[ours.weight]["master"], dense.weight.detach()[mask])
    assert torch.equal(ours.weight.detach(), dense.weight.detach().to(torch.bfloat16))
    moved = dense.weight.detach() != W.float()
    assert int((moved & (ours.weight == W)).sum()) > 0  # masters move where the stored weight cannot


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_other_types_take_torchs_operations(kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    W = torch.randn(8, 8, generator=draw).to(kind)
    mask = random_mask(W.shape, 0.5, draw)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    ours, dense = layer_of(W), layer_of(W.to(wide))
    sparse = SparseAdamW(ours.named_parameters(), {"weight": mask}, **SETTINGS)
    reference = MaskedAdamW(dense, mask, foreach=False, **SETTINGS)
    for _ in range(3):
        ours.weight.grad = torch.randn(8, 8, generator=draw).to(kind)
        sparse.step()
        reference.step(ours.weight.grad.to(wide))
    assert torch.equal(ours.weight.detach(), dense.weight.detach().to(kind))


@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 2**31))
def test_an_index_holds_the_active_entries(numel: int, density: float, seed: int) -> None:
    mask = random_mask(torch.Size([numel]), density, torch.Generator().manual_seed(seed))
    index = index_of(mask)
    assert torch.equal(entries_of(index, numel), torch.nonzero(mask).view(-1))
    assert index.nbytes <= 8 + min(4 * int(mask.sum()), numel / 8 + 8) or index.dtype == torch.int64


@pytest.mark.parametrize("density", [0.01, 0.05, 0.25, 0.74])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_memory_is_the_density_of_dense_and_the_index(density: float, kind: torch.dtype) -> None:
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(kind)
    mask = random_mask(W.shape, density, torch.Generator().manual_seed(0))
    layer = layer_of(W)
    optimizer = SparseAdamW(layer.named_parameters(), {"weight": mask})
    layer.weight.grad = torch.ones_like(W)
    optimizer.step()
    state = optimizer.state[layer.weight]
    dense = (8 if kind == torch.float32 else 12) * W.numel()
    held = {key: tensor.nbytes for key, tensor in state.items()}
    assert sum(held.values()) - held["index"] - held["step"] == round(dense * mask.float().mean().item())
    assert held["index"] <= min(W.numel() / 8, 4 * mask.sum().item())


def train(layer: torch.nn.Linear, optimizer: Any, steps: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        layer.weight.grad = torch.randn(layer.weight.shape, generator=draw).to(layer.weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize("stepped", [False, True])
def test_training_continues_from_a_state_dict_in_a_fresh_optimizer(
    kind: torch.dtype, density: float, stepped: bool, tmp_path: Path
) -> None:
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(kind)
    masks = {"weight": random_mask(W.shape, density, torch.Generator().manual_seed(0))}
    layer = layer_of(W)
    optimizer = SparseAdamW(layer.named_parameters(), masks, **SETTINGS)
    train(layer, optimizer, 3, seed=1)
    torch.save([layer.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    train(layer, optimizer, 3, seed=2)

    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = layer_of(W)
    again = SparseAdamW(fresh.named_parameters(), masks, lr=5.0)
    if stepped:
        train(fresh, again, 1, seed=9)
    fresh.load_state_dict(weights)
    again.load_state_dict(state)
    train(fresh, again, 3, seed=2)
    assert torch.equal(fresh.weight, layer.weight)
    for key, tensor in optimizer.state[layer.weight].items():
        assert torch.equal(again.state[fresh.weight][key], tensor)
        assert again.state[fresh.weight][key].dtype == tensor.dtype


def test_a_loaded_state_shares_no_memory_with_the_one_it_came_from() -> None:
    W = torch.randn(8, 8)
    masks = {"weight": torch.ones(8, 8, dtype=torch.bool)}
    one, two = layer_of(W), layer_of(W)
    first, second = (SparseAdamW(layer.named_parameters(), masks) for layer in (one, two))
    train(one, first, 1, seed=0)
    second.load_state_dict(first.state_dict())
    kept = copy.deepcopy(first.state[one.weight])
    train(two, second, 2, seed=1)
    assert all(torch.equal(first.state[one.weight][key], kept[key]) for key in kept)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_weights_that_are_loaded_are_what_is_trained_on(steps: int, kind: torch.dtype, density: float) -> None:
    draw = torch.Generator().manual_seed(0)
    W, loaded = (torch.randn(64, 48, generator=draw).to(kind) for _ in range(2))
    masks = {"weight": random_mask(W.shape, density, draw)}
    layer = layer_of(W)
    optimizer = SparseAdamW(layer.named_parameters(), masks, lr=1e-2)
    train(layer, optimizer, steps, seed=1)
    optimizer.state_dict()  # as accelerate's prepare asks for: masters exist from here on
    kept = optimizer.state[layer.weight]["master"].clone()
    same = torch.arange(64)[:, None] % 2 == torch.zeros(48)  # every other row is loaded as it is
    layer.load_state_dict({"weight": torch.where(same, layer.weight.detach(), loaded)})
    before = layer.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    train(layer, optimizer, 1, seed=2)
    assert torch.equal(layer.weight, before)
    masters, active = optimizer.state[layer.weight]["master"], masks["weight"]
    assert torch.equal(masters[same[active]], kept[same[active]])  # with the digits that the weight does not show
    assert torch.equal(masters[~same[active]].to(kind), loaded[~same & active])


def test_a_copied_optimizer_trains_on_by_itself() -> None:
    layer = layer_of(torch.randn(8, 8))
    optimizer = SparseAdamW(layer.named_parameters(), {"weight": torch.eye(8) > 0})
    twin, twins_layer = copy.deepcopy([optimizer, layer])
    train(layer, optimizer, 2, seed=0)
    assert not torch.equal(twins_layer.weight, layer.weight)
    train(twins_layer, twin, 2, seed=0)
    assert torch.equal(twins_layer.weight, layer.weight)


def test_a_state_of_other_masks_is_refused() -> None:
    W = torch.randn(8, 8)
    masks = [{"weight": torch.arange(64).view(8, 8) % 2 == rest} for rest in (0, 1)]
    one, two = (SparseAdamW(layer_of(W).named_parameters(), mask) for mask in masks)
    with pytest.raises(AdapterError, match="other entries of weight"):
        two.load_state_dict(one.state_dict())
    bare = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(AdapterError, match="trained 2 parameters, this one 1"):
        two.load_state_dict(bare.state_dict())
    layer = layer_of(W)
    dense = torch.optim.AdamW(layer.parameters())
    train(layer, dense, 1, seed=0)
    with pytest.raises(AdapterError, match="of weight is of another optimizer"):
        two.load_state_dict(dense.state_dict())
    for stored, opened in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        theirs = SparseAdamW(layer_of(W.to(stored)).named_parameters(), masks[0])
        ours = SparseAdamW(layer_of(W.to(opened)).named_parameters(), masks[0])
        with pytest.raises(AdapterError, match=f"of another type than {opened}"):
            ours.load_state_dict(theirs.state_dict())


def test_groups_keep_their_own_settings_and_parameters_without_masks_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    masks = {f"{i}.weight": torch.ones(4, 4, dtype=torch.bool) for i in (0, 1)}
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 0.25}, {"params": named[2:], "lr": 0.0}]
    optimizer = SparseAdamW(groups, masks, weight_decay=0.0)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["0.weight"]


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"other.weight": torch.ones(2, 2, dtype=torch.bool)}, "1 masks name no parameter, the first other.weight"),
        ({}, "there is no mask"),
        ({"weight": torch.ones(3, 2, dtype=torch.bool)}, "give a bool tensor of that shape"),
        ({"weight": torch.ones(2, 2)}, "give a bool tensor of that shape"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        SparseAdamW(layer_of(torch.ones(2, 2)).named_parameters(), masks)


def test_other_bad_arguments_are_refused() -> None:
    layer, masks = layer_of(torch.ones(2, 2)), {"weight": torch.ones(2, 2, dtype=torch.bool)}
    with pytest.raises(AdapterError, match=r"give the model or its named_parameters\(\)"):
        SparseAdamW(layer.parameters(), masks)  # type: ignore[arg-type]
    odd: list[dict[str, Any]] = [{"lr": -1.0}, {"eps": float("nan")}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}]
    odd += [{"lr": "1e-3"}, {"weight_decay": None}, {"betas": 0.9}, {"betas": (0.9,)}]
    for settings in odd:
        with pytest.raises(AdapterError, match=next(iter(settings))):
            SparseAdamW(layer.named_parameters(), masks, **settings)
    with pytest.raises(AdapterError, match="the model is a int"):
        SparseAdamW(3, masks)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="1 parameters that have a mask are in no group, the first weight"):
        SparseAdamW([{"params": [("bias", torch.zeros(2))]}], masks)
    quantised = [("weight", torch.ones(2, 2, dtype=torch.int8))]
    with pytest.raises(AdapterError, match="weight is quantised"):
        SparseAdamW(quantised, masks)


def test_a_trainer_leaves_every_entry_outside_the_mask_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    model = open_language_model(tiny_model, "cpu").model
    masks = make_masks(model, "safe", 0.3)
    masks.freeze_others(model)
    before = copy.deepcopy(model.state_dict())
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    data = [{"input_ids": ids, "labels": ids} for ids in [[5, 9, 13, 7, 21, 30], [8, 11, 40, 6, 17, 2]] * 4]
    optimizer = SparseAdamW(model.named_parameters(), masks, lr=1e-2)
    Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None)).train()
    for name, tensor in model.state_dict().items():
        if name in masks:
            assert torch.equal(tensor[~masks[name]], before[name][~masks[name]])
            assert (tensor[masks[name]] != before[name][masks[name]]).float().mean() > 0.9
        else:
            assert torch.equal(tensor, before[name])
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    SparseAdamW(model.named_parameters(), masks).load_state_dict(saved)


@pytest.mark.parametrize("wrapped", [torch.compile, torch.nn.DataParallel])
def test_masks_of_a_model_hold_for_it_compiled_or_wrapped(wrapped: Any, tiny_model: Path) -> None:
    opened = open_language_model(tiny_model, "cpu")
    masks = make_masks(opened.model, "safe", 0.3)
    inside = wrapped(opened.model)
    again = make_masks(inside, "safe", 0.3)
    assert all(torch.equal(masks[name], again[name]) for name in masks) and again.base == masks.base
    opened.model.model.layers[0] = (
        wrapped(opened.model.model.layers[0]) if wrapped is torch.compile else (opened.model.model.layers[0])
    )
    masks.require_base(inside)
    trained = [
        {id(p) for group in SparseAdamW(given, masks).param_groups for p in group["params"]}
        for given in (opened, opened.model, inside, inside.named_parameters())
    ]
    assert all(ids == trained[0] for ids in trained) and len(trained[0]) == len(masks)
    masks.freeze_others(inside)
    assert {id(p) for p in opened.model.parameters() if p.requires_grad} == trained[0]


def test_two_processes_of_fsdp2_train_as_one(tmp_path: Path) -> None:
    program = Path(__file__).with_name("train_sparse.py")
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run(
            [*command, str(program), str(tmp_path / str(processes))],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=120,
        )
    alone, together = (torch.load(tmp_path / str(n) / "weights.pt", weights_only=True) for n in (1, 2))
    for name, tensor in alone["weights"].items():
        assert torch.equal(tensor, together["weights"][name])
        assert not torch.equal(tensor, alone["base"][name])
        outside = ~alone["masks"][name]
        assert torch.equal(tensor[outside], alone["base"][name][outside])


def test_groups_are_added_by_name_and_what_has_no_mask_is_left_out() -> None:
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    masks = {"one.weight": mask}
    optimizer = SparseAdamW([{"params": [("one.weight", one.weight)]}], masks)
    masks["two.weight"] = mask
    optimizer.add_param_group({"params": [(f"two.{n}", p) for n, p in two.named_parameters()], "lr": 0.5})
    before = two.weight.detach().clone()
    (one(torch.ones(3)).sum() + two(torch.ones(3)).sum()).backward()
    optimizer.step()
    assert torch.equal((two.weight != before), mask) and optimizer.param_groups[1]["lr"] == 0.5
    with pytest.raises(AdapterError, match="no parameter of the group has a mask"):
        optimizer.add_param_group({"params": [("two.bias", two.bias)]})
    with pytest.raises(AdapterError, match="finds masks by name"):
        optimizer.add_param_group({"params": [two.bias]})
