"""On a CUDA GPU every figure is what it is on a CPU, to rounding; `scripts/check_gpu.py` runs this, others skip it."""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrices import gaussian
from safetensors.torch import load_file
from test_compare_solvers import settings_of, updated
from test_gates import unit_direction
from test_isospectral import build, forward, small_model
from test_lora_adapters import TOKENS
from torch import Tensor
from transformers import AutoModelForCausalLM

from offprincipal.adapter_methods import LOW_RANK
from offprincipal.adapters import SparseAdamW, adapt
from offprincipal.comparison import compare
from offprincipal.gates import GateSettings
from offprincipal.gates.forward import fisher_sums, kl_sums
from offprincipal.gates.measure import open_for_derivatives
from offprincipal.gates.sequences import Sequences
from offprincipal.models import open_language_model
from offprincipal.training import parse_settings, train
from offprincipal.training.monitor import Monitor
from offprincipal.training.monitor.monitored_base import MonitoredBase
from offprincipal.trajectories import trajectory

# Set to `cpu`, the same code runs where there is no GPU, which checks this file and nothing else.
DEVICE: Any = os.environ.get("OFFPRINCIPAL_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA GPU"),
]


# --- compare ---

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (300, 512), "model.layers.0.mlp.down_proj.weight": (1100, 1152)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of which one matrix is solved whole on a GPU, and one is iterated."""
    from checkpoint_folders import write_model

    root = tmp_path_factory.mktemp("pair")
    weights = {}
    for seed, (name, (n, m)) in enumerate(SHAPES.items()):
        U, _, Vh = torch.linalg.svd(gaussian(n, m, seed=seed), full_matrices=False)
        weights[name] = ((U * torch.arange(1, n + 1) ** -0.6) @ Vh).bfloat16()
    return write_model(root / "base", weights), write_model(root / "tuned", updated(weights, 3e-3, 100))


def tolerance(column: str) -> float:
    """Drawn nulls are drawn along singular vectors, which are another solver's where values are close: other draws."""
    if "_null" in column and ("angle" in column or "shift" in column):
        return 1.0 if column.endswith("_sd") else 0.1
    return 0.02 if "angle" in column else 5e-3


def slack(column: str) -> float:
    """Of figures about zero, in their own units: entries at a mask's edge fall to either side, solver by solver."""
    return 0.05 if column == "z" or column.endswith("_z") else 1e-3 if "log_odds" in column else 1e-9


def require_same_rows(ours: Any, theirs: Any) -> None:
    """Counts alike to the last one; figures to what either solver may be off."""
    for table in ("matrices", "masks"):
        for row, other in zip(getattr(ours, table), getattr(theirs, table), strict=True):
            for column, value in row.items():
                where = f"{row['tensor']}: {table}.{column}"
                if column in ("solver", "singular_value_error", "singular_value_error_relative", "angle_error_deg"):
                    continue
                if isinstance(value, float) and isinstance(other[column], float):
                    assert value == pytest.approx(other[column], rel=tolerance(column), abs=slack(column)), where
                else:
                    assert value == other[column], where


@pytest.mark.parametrize("solver", ["auto", "randomized"])
def test_rows_are_those_of_the_cpu(solver: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    there = compare(*folders, settings_of(solver=solver, device=DEVICE), cache=tmp_path)
    again = compare(*folders, settings_of(solver=solver, device=DEVICE), cache=tmp_path)
    require_same_rows(there, compare(*folders, settings_of(solver=solver), cache=False))
    require_same_rows(again, there)
    assert not any("did not fit" in warning for warning in there.summary["runs"]["tuned"]["warnings"])


@pytest.mark.skipif(DEVICE != "cuda", reason="takes a GPU's memory away")
def test_a_gpu_that_runs_out_of_memory_leaves_it_to_the_cpu(folders: tuple[Path, Path]) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        there = compare(*folders, settings_of(device=DEVICE), cache=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    require_same_rows(there, compare(*folders, settings_of(), cache=False))
    assert any("did not fit" in warning for warning in there.summary["runs"]["tuned"]["warnings"])


def test_a_trajectory_is_that_of_the_cpu(folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    there, here = (
        trajectory(base, [tuned, base], steps=[1, 2], subspace_rank=2, device=device) for device in (DEVICE, "cpu")
    )
    np.testing.assert_allclose(there.content["pooled"]["gram"], here.content["pooled"]["gram"], rtol=1e-9)
    for ours, theirs in zip(there.rows, here.rows, strict=True):
        assert ours == {
            k: pytest.approx(v, rel=0.1, abs=1e-6) if isinstance(v, float) else v for k, v in theirs.items()
        }


# --- models, gates, monitor ---


def ids_on(device: str) -> Tensor:
    return TOKENS.to(device)


def opened(source: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)


def test_gates_measure_what_they_measure_on_the_cpu(tiny_model: Path) -> None:
    sequences = Sequences([[5, 9, 30, 12], [7, 8, 44]], [0, 1], "given")
    found = {}
    for device in ("cpu", DEVICE):
        base = open_for_derivatives(tiny_model, GateSettings(device=device))
        on_cpu = unit_direction(open_for_derivatives(tiny_model, GateSettings(device="cpu")))
        D = {name: tensor.to(base.device) for name, tensor in on_cpu.items()}
        found[device] = (fisher_sums(base, [lambda D=D: D], sequences)[0], kl_sums(base, D, [0.05], sequences))
    for ours, theirs in zip(found[DEVICE], found["cpu"], strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=1e-9)


def test_the_monitor_measures_what_it_measures_on_the_cpu() -> None:
    W = gaussian(300, 200, seed=0).float()
    moved = W + 1e-3 * gaussian(300, 200, seed=1).float()
    there = MonitoredBase("w", W.to(DEVICE), 0.125).figures(moved.to(DEVICE))
    here = MonitoredBase("w", W, 0.125).figures(moved)
    assert there.keys() == here.keys()
    for name, value in here.items():
        approximate = isinstance(value, float) and "error" not in name
        assert there[name] == (pytest.approx(value, rel=5e-3, abs=1e-9) if approximate else there[name]), name


def test_a_watched_loop_trains_as_one_that_is_not(tiny_model: Path, tmp_path: Path) -> None:
    ends, rows = [], []
    for watched in (False, True):
        model = opened(tiny_model, DEVICE)
        monitor = Monitor(tmp_path / "monitor", every=1, sequences=TOKENS.tolist()) if watched else None
        if monitor:
            monitor.start(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(1, 4):
            model(input_ids=ids_on(DEVICE), labels=ids_on(DEVICE)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor:
                rows.append(monitor.observe(step, model))
        ends.append({name: weight.detach().cpu() for name, weight in model.named_parameters()})
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert all(row["kl_cumulative"] > 0 and row["relative_update_norm"] > 0 for row in rows)


# --- training ---


@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_sparse_steps_are_those_of_a_masked_adamw_bit_for_bit(density: float) -> None:
    W = gaussian(80, 130, seed=0).float()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < density
    ours, dense = (torch.nn.Linear(130, 80, bias=False, device=DEVICE) for _ in range(2))
    for layer in (ours, dense):
        layer.weight.data.copy_(W)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    sparse = SparseAdamW(ours.named_parameters(), {"weight": mask}, **settings)
    reference = torch.optim.AdamW([dense.weight], foreach=False, **settings)
    active = mask.to(DEVICE)
    for step in range(5):
        gradient = gaussian(80, 130, seed=10 + step).float().to(DEVICE)
        ours.weight.grad, dense.weight.grad = gradient, gradient * active
        sparse.step()
        reference.step()
        dense.weight.data[~active] = W.to(DEVICE)[~active]
    assert torch.equal(ours.weight, dense.weight)
    state, theirs = sparse.state[ours.weight], reference.state[dense.weight]
    assert all(torch.equal(state[key], theirs[key][active]) for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("kind", ["svd", "newton-schulz", "muon"])
def test_isospectral_steps_are_those_of_the_cpu(kind: str) -> None:
    ends = {}
    for device in ("cpu", DEVICE):
        model: Any = small_model().to(device)
        optimizer = build(kind, model, 1e-3)
        for step in range(5):
            x = gaussian(32, 24, seed=step).float().to(device)
            optimizer.zero_grad()
            (forward(model, x) - x[:, :5].cumsum(1)).square().mean().backward()
            optimizer.step()
        ends[device] = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    for name, weight in ends["cpu"].items():
        torch.testing.assert_close(ends[DEVICE][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", LOW_RANK)
def test_adapters_train_and_are_saved_as_on_the_cpu(method: str, tiny_model: Path, tmp_path: Path) -> None:
    moved = {}
    for device in ("cpu", DEVICE):
        before = opened(tiny_model, device)(input_ids=ids_on(device)).logits.detach()
        adapted = adapt(opened(tiny_model, device), method, rank=4, alpha=8)
        torch.testing.assert_close(adapted(input_ids=ids_on(device)).logits.detach(), before, rtol=0, atol=1e-4)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            adapted(input_ids=ids_on(device), labels=ids_on(device)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(tmp_path / device)
        after = adapted(input_ids=ids_on(device)).logits.detach()
        moved[device] = (after - before).cpu()
    assert moved["cpu"].abs().max() > 1e-4
    saved = [load_file(tmp_path / device / "adapter_model.safetensors") for device in ("cpu", DEVICE)]
    assert saved[0].keys() == saved[1].keys()
    assert (moved[DEVICE] - moved["cpu"]).abs().max() < 0.05 * moved["cpu"].abs().max()


@pytest.mark.parametrize("method", LOW_RANK)
def test_fused_steps_move_what_an_adapted_model_computes(method: str, tiny_model: Path) -> None:
    """A fused step leaves no trace in a tensor's version."""
    adapted = adapt(opened(tiny_model, DEVICE), method, rank=4)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for _ in range(2):
        adapted(input_ids=ids_on(DEVICE), labels=ids_on(DEVICE)).loss.backward()
        with torch.no_grad():
            adapted(input_ids=ids_on(DEVICE))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = adapted(input_ids=ids_on(DEVICE)).logits
        torch.testing.assert_close(after, adapted(input_ids=ids_on(DEVICE)).logits.detach())


@pytest.mark.parametrize("recipe", ["grpo", "sft_teacher"])
@pytest.mark.parametrize("adapter", [None, {"method": "off_principal", "rank": 2}, {"method": "sparse"}])
def test_a_run_ends_with_a_model_its_masters_and_a_record(
    recipe: str, adapter: dict[str, Any] | None, taught_model: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "recipe": recipe,
        "model": str(taught_model),
        "tasks": ("count@1",),
        "steps": 2,
        "batch": 32,
        "max_new_tokens": 3,
        "learning_rate": 1e-2,
        "eval_prompts": 16,
        "eval_samples": 2,
        "save_every": 1,
        "device": DEVICE,
        "adapter": adapter,
        "monitor": 1,
    }
    out = tmp_path / "run"
    train(parse_settings(values), out, quiet=True)
    masters = load_file(out / "masters" / "model.safetensors")
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(masters[name].to(torch.bfloat16), stored[name]) for name in stored)
    base = load_file(taught_model / "model.safetensors")
    assert any(not torch.equal(masters[name], weight.float()) for name, weight in base.items())
    assert open_language_model(out, DEVICE).device.type == DEVICE
