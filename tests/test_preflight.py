"""What steps can move of stored weights: against rounding itself, a simulation, and real AdamW runs."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from offprincipal.assets import embedded_base
from offprincipal.errors import ArgumentError, CheckpointError
from offprincipal.forecast import preflight
from offprincipal.geometry.bits import Array
from offprincipal.geometry.steps import STORAGES, Spacings

LEARNING_RATE = 3e-6  # no power of two is near, where AdamW's own rounding would decide


def write_model(folder: Path, weights: dict[str, Array], **config: object) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored(values: Array, storage: str) -> Array:
    return np.asarray(values).astype(STORAGES[storage].dtype)


def moved(weights: Array, step: float, storage: str) -> float:
    """The share that moves, in either direction, by rounding itself."""
    shares = [np.mean(stored(weights.astype(np.float64) + sign * step, storage) != weights) for sign in (-1, 1)]
    return float(np.mean(shares))


def some_weights(storage: str, seed: int) -> Array:
    """Of many sizes, with zeros of both signs, powers of two and the smallest numbers among them."""
    rng = np.random.default_rng(seed)
    least = {"bfloat16": -133, "float16": -24, "float32": -149}[storage]
    powers = 2.0 ** rng.integers(-14, 4, 20) * rng.choice([-1, 1], 20)
    least_ones = np.arange(6) * 2.0**least
    return stored(
        np.concatenate([rng.standard_normal(80) * 2.0 ** rng.integers(-12, 3, 80), powers, least_ones, [0.0, -0.0]]),
        storage,
    )


@given(st.sampled_from(list(STORAGES)), st.integers(0, 10**6), st.integers(-26, 2), st.integers(1, 31))
def test_a_step_moves_what_rounding_moves(storage: str, seed: int, exponent: int, odd: int) -> None:
    """Steps of few bits hit the middle between two numbers, where the even one is taken."""
    weights, step = some_weights(storage, seed), odd * 2.0**exponent
    assert Spacings.of(weights, storage).share_moved(step) == pytest.approx(moved(weights, step, storage), abs=1e-12)


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_stochastic_rounding_and_walks_move_what_simulations_do(storage: str) -> None:
    rng = np.random.default_rng(0)
    weights = stored(0.03 * rng.standard_normal(60_000), storage)
    spacings, step, steps = Spacings.of(weights, storage), 1e-6 if storage == "bfloat16" else 1e-7, 40
    W, signs = weights.astype(np.float64), rng.choice([-1.0, 1.0], len(weights))
    neighbour = np.nextafter(weights, np.where(signs > 0, np.inf, -np.inf).astype(weights.dtype)).astype(np.float64)
    away = np.ones(len(W))
    for _ in range(steps):  # one that has not moved is where it was
        away *= 1 - np.minimum(step / np.abs(neighbour - W), 1)
    assert spacings.share_moved_at_random(step, steps) == pytest.approx(np.mean(1 - away), abs=0.003)
    walked = stored(W + step * rng.choice([-1.0, 1.0], (steps, len(W))).sum(axis=0), storage)
    assert spacings.share_moved_walking(step, steps) == pytest.approx(np.mean(walked != weights), abs=0.01)


@given(st.sampled_from(list(STORAGES)), st.integers(0, 10**6), st.sampled_from([1e-2, 1e-4, 3e-7]))
def test_half_has_moved_after_so_many_steps_and_no_fewer(storage: str, seed: int, step: float) -> None:
    spacings = Spacings.of(some_weights(storage, seed), storage)
    for share, steps in (
        (lambda n: spacings.share_moved(step * n), spacings.steps_to_half(step)),
        (lambda n: spacings.share_moved_at_random(step, n), spacings.steps_to_half_at_random(step)),
    ):
        assert steps is not None and share(steps) >= 0.5 and (steps == 1 or share(steps - 1) < 0.5)
    assert spacings.share_moved(2 * spacings.quantile(0.5)) >= 0.5 > spacings.share_moved(spacings.quantile(0.5) / 2.01)


def gradients_of_the_embedded_base() -> torch.nn.Module:
    """The base in bfloat16 with the gradients of a batch of random tokens."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_base(), dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    return model.bfloat16()


def test_a_real_step_of_adamw_in_bfloat16_moves_what_was_foretold() -> None:
    model = gradients_of_the_embedded_base()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE).step()
    for name, weight in model.named_parameters():
        open_ = weight.grad.abs() > 1e-5  # others move by less, since ε counts
        if open_.sum() < 1000:
            continue
        values = before[name][open_].view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        share = (weight.detach() != before[name])[open_].double().mean().item()
        assert Spacings.of(values, "bfloat16").share_moved(LEARNING_RATE) == pytest.approx(share, abs=0.01), name


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_masters_of_a_real_adamw_move_what_was_foretold(steps: int) -> None:
    """The same gradient at every step, so that all steps are of one sign; weights decay by next to nothing."""
    weight = torch.randn(40_000, generator=torch.Generator().manual_seed(1)).mul(0.05).bfloat16()
    master = torch.nn.Parameter(weight.float())
    master.grad = torch.randn(40_000, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([master], lr=LEARNING_RATE)
    for _ in range(steps):
        optimizer.step()
    share = (master.detach().bfloat16() != weight).double().mean().item()
    foretold = Spacings.of(weight.view(torch.int16).numpy().view(ml_dtypes.bfloat16), "bfloat16")
    assert foretold.share_moved(LEARNING_RATE * steps) == pytest.approx(share, abs=0.005)


def test_roles_add_up_and_experts_count_as_the_matrices_that_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "model.layers.0.mlp.experts.gate_up_proj": rng.standard_normal((3, 16, 8)).astype(np.float32),
        "model.layers.0.self_attn.q_proj.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "model.norm.weight": np.ones(8, np.float32),
        "model.empty": np.zeros((0, 4), np.float32),
    }
    base = write_model(tmp_path / "base", weights, model_type="qwen3_moe", hidden_size=8)
    found = preflight(base, 0.003, steps=3)
    rows = {row["role"]: row for row in found.rows}
    assert {role: row["parameters"] for role, row in rows.items()} == {
        "gate": 192, "up": 192, "q": 64, "norm": 8, "other": 0, "all": 456,
    }  # fmt: skip
    whole = np.concatenate([values.reshape(-1) for values in weights.values()])
    assert rows["all"]["moved_by_one_step"] == Spacings.of(whole, "bfloat16").share_moved(0.003)
    assert rows["norm"]["moved_by_one_step"] == 0.5  # below 1 alone
    assert rows["other"]["moved_by_one_step"] is rows["other"]["steps_to_half_masters"] is None
    path = found.write(tmp_path / "out")
    assert json.loads(path.read_text())["roles"] == found.rows


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"a": np.array([1.0, 7e4, np.inf], np.float32)})
    for arguments, says in (
        ((0.0,), "learning rate is 0"),
        ((1e-6, "int8"), "no storage type 'int8'"),
        ((1e-6, "bfloat16", 0), "steps is 0"),
    ):
        with pytest.raises(ArgumentError, match=says):
            preflight(base, *arguments)
    with pytest.raises(CheckpointError, match=r"a of .*base: it holds NaN, infinity"):
        preflight(base, 1e-6)


def test_the_command_says_what_the_library_does(tmp_path: Path) -> None:
    base = write_model(tmp_path / "<b>base", {"model.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32)})
    command = [sys.executable, "-m", "offprincipal", "preflight", str(base), "--out", str(tmp_path / "out")]
    asked = subprocess.run([*command, "--learning-rate", "3e-3", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout)["roles"] == preflight(base, 3e-3).rows
    page = (tmp_path / "out" / "preflight.html").read_text()
    assert "<b>base" not in page and "&lt;b&gt;base" in page
    shown = subprocess.run([*command, "--learning-rate", "3e-9"], capture_output=True, text=True, check=True)
    assert "move 0\xa0% of the weights" in " ".join(shown.stdout.split("\n")) and "<b>base" not in shown.stderr
    refused = subprocess.run([*command, "--learning-rate", "-1"], capture_output=True, text=True)
    assert refused.returncode == 2 and "give a number between 0 and 1" in refused.stderr
