"""The monitor: its figures are those of a comparison, it changes nothing of the training, it costs what it may, and it
survives kills, shards and adapters."""

import copy
import itertools
import json
import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import call
from test_training import KILLED, record_of, settings
from train_monitored import BATCH, STEPS, fit, trainer_of
from transformers import (
    AttentionInterface,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import offprincipal
from offprincipal.adapters import shira
from offprincipal.errors import ArgumentError, FileError, NonFiniteTensor, TrainingError
from offprincipal.geometry import spectrum, subspace
from offprincipal.geometry.precision import hidden_fraction, unchanged_fraction
from offprincipal.models import open_language_model
from offprincipal.training import TrainSettings, train
from offprincipal.training.monitor import Monitor, read_monitor
from offprincipal.training.monitor.cadence import Cadence
from offprincipal.training.monitor.divergence import log_probabilities, mean_divergence, sequences_of
from offprincipal.training.monitor.matrices import watched_matrices
from offprincipal.training.monitor.monitored_base import MonitoredBase

TIMES = {"monitor_seconds", "monitor_share", "setup_seconds"}


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock decides."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def opened(source: Path) -> Any:
    return open_language_model(source, "cpu").model.train()


def decaying(n: int, m: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall by a tenth each."""
    generator = torch.Generator().manual_seed(seed)
    r = min(n, m)
    U, V = (torch.linalg.qr(torch.randn(s, r, generator=generator, dtype=torch.float64))[0] for s in (n, m))
    return (U * 0.9 ** torch.arange(r)) @ V.T


def divergence(p: Any, q: Any) -> float:
    """KL(p‖q) on the batch."""
    with torch.no_grad():
        a, b = (m.eval()(torch.tensor(BATCH)).logits[:, :-1].double().log_softmax(-1) for m in (p, q))
    return float((a.exp() * (a - b)).sum(-1).mean())


class TestFigures:
    def test_they_are_those_of_exact_decompositions(self) -> None:
        W = decaying(48, 80).float()
        moved = W + 1e-3 * torch.randn(48, 80, generator=torch.Generator().manual_seed(1))
        row = MonitoredBase("w", W, 0.125).figures(moved)
        k, before, after = 6, spectrum.decompose(W), spectrum.decompose(moved)
        update = moved.double() - W.double()
        angles = subspace.principal_angles(before.U[:, :k], after.U[:, :k])
        energies = subspace.principal_energies(before.U[:, :k], before.Vh[:k].T, update)
        assert energies is not None and row["k"] == k and row["solver"] == "warm"
        shift = spectrum.spectral_shift(before.S[:k], after.S[:k])
        assert shift is not None and row["spectral_shift"] == pytest.approx(shift, rel=1e-3)
        assert row["principal_angle_left_max_deg"] == pytest.approx(angles.max().item(), rel=1e-3)
        assert row["principal_energy"] == pytest.approx(energies[0], rel=1e-6)
        assert row["principal_energy_enrichment"] == pytest.approx(energies[0] * 48 * 80 / k**2, rel=1e-6)
        assert row["relative_update_norm"] == pytest.approx((update.norm() / W.double().norm()).item())
        assert row["unchanged_fraction"] == unchanged_fraction(W, moved)
        assert row["hidden_fraction"] == hidden_fraction(W, moved)

    def test_a_gaussian_update_is_what_its_nulls_say(self) -> None:
        W = decaying(96, 128).bfloat16().float()
        generator = torch.Generator().manual_seed(2)
        updates = [1e-3 * torch.randn(96, 128, generator=generator) for _ in range(16)]
        rows = [MonitoredBase(f"w{i}", W, 0.125).figures(W + update) for i, update in enumerate(updates)]
        mean = {name: sum(row[name] for row in rows) / 16 for name in rows[0] if name != "solver"}
        for name in ("spectral_shift", "principal_angle_left_mean_deg", "principal_angle_right_mean_deg"):
            assert mean[name] == pytest.approx(mean[f"{name}_isotropic_null"], rel=0.25), name
        spread = math.sqrt(0.25 / W.numel() / 16)
        assert mean["unchanged_fraction"] == pytest.approx(mean["unchanged_fraction_isotropic_null"], abs=4 * spread)
        assert mean["hidden_fraction"] == pytest.approx(mean["unchanged_fraction"], abs=1e-3)
        assert mean["principal_energy_enrichment"] == pytest.approx(1, abs=0.25)

    def test_scaling_shifts_the_spectrum_by_the_step_length_and_turns_nothing(self) -> None:
        row = MonitoredBase("w", decaying(40, 30), 0.25).figures(1.01 * decaying(40, 30))
        assert row["spectral_shift_per_norm"] == pytest.approx(1, rel=1e-6)
        assert row["principal_angle_left_max_deg"] is None  # within the error

    def test_an_unmoved_matrix_has_no_direction(self) -> None:
        W = decaying(20, 30).float()
        row = MonitoredBase("w", W, 0.2).figures(W)
        assert row["update_norm"] == row["spectral_shift"] == 0 and row["principal_angle_left_max_deg"] < 1e-9
        assert (
            row["unchanged_fraction"] == row["unchanged_fraction_isotropic_null"] == 1 and row["hidden_fraction"] == 0
        )
        assert row["spectral_shift_per_norm"] is None and row["principal_energy"] is None

    def test_bfloat16_weights_hide_nothing(self) -> None:
        W = decaying(20, 30).bfloat16()
        moved = (W.float() * (1 + 2**-7)).bfloat16()
        row = MonitoredBase("w", W, 0.2).figures(moved)
        assert row["hidden_fraction"] is None and row["unchanged_fraction"] == unchanged_fraction(W, moved)

    def test_a_matrix_that_turned_far_is_found(self) -> None:
        """A swap of the last principal direction with the next."""
        base = torch.diag(0.9 ** torch.arange(64.0, dtype=torch.float64))
        moved = base.clone()
        moved[7, 7], moved[8, 8] = base[8, 8] * 0.9, base[7, 7]
        row = MonitoredBase("w", base, 0.125).figures(moved)
        assert row["principal_angle_left_max_deg"] == pytest.approx(90, abs=1e-3)
        assert row["singular_value_error"] < 1e-3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_they_are_what_compare_says_of_the_same_matrix(self, dtype: torch.dtype, tmp_path: Path) -> None:
        name, generator = "model.layers.0.self_attn.q_proj.weight", torch.Generator().manual_seed(4)
        W = decaying(48, 80).to(dtype)
        moved = (W.double() + 1e-3 * torch.randn(48, 80, generator=generator)).to(dtype)
        row = MonitoredBase(name, W, 0.125).figures(moved)
        for side, weight in (("base", W), ("run", moved)):
            (tmp_path / side).mkdir()
            save_file({name: weight}, tmp_path / side / "model.safetensors")
        [compared] = offprincipal.compare(tmp_path / "base", {"run": tmp_path / "run"}).matrices
        assert set(row) <= set(compared) and len(row) > 30
        drawn = {name for name in row if name.endswith("isotropic_null") and "unchanged" not in name}
        own = {"hidden_fraction", "solver", "singular_value_error", "angle_error_deg"}  # compare is told of no masters
        for name in set(row) - drawn - own:
            assert row[name] == pytest.approx(compared[name], rel=1e-3), name


class TestDivergence:
    def test_it_is_that_of_the_definition(self) -> None:
        p, q = (torch.tensor(x).log() for x in ([[0.2, 0.8], [0.5, 0.5]], [[0.4, 0.6], [0.5, 0.5]]))
        assert mean_divergence(p, q) == pytest.approx((0.2 * math.log(0.5) + 0.8 * math.log(4 / 3)) / 2, rel=1e-6)
        assert mean_divergence(p, p) == 0
        assert mean_divergence(p, torch.full((2, 2), math.nan)) is None

    @given(st.integers(0, 100), st.sampled_from([1e-2, 1e-3, 1e-4]))
    def test_a_small_step_survives_float32(self, seed: int, size: float) -> None:
        """KL of 1e-9 from log-probabilities that are only known to 1e-7."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(8, 1000, generator=generator, dtype=torch.float64)
        p, q = (x.log_softmax(-1) for x in (z, z + size * torch.randn(8, 1000, generator=generator)))
        exact = (p.exp() * (p - q)).sum(-1).mean().item()
        found = mean_divergence(p.float(), q.float())
        assert found is not None and found == pytest.approx(exact, rel=0.02)

    def test_autocast_does_not_reach_it(self, tiny_model: Path) -> None:
        model, sequences = opened(tiny_model), sequences_of(BATCH)
        alone = log_probabilities(model, sequences)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(log_probabilities(model, sequences), alone)

    def test_float32_weights_are_measured_where_their_attention_takes_16_bits_alone(self, tiny_model: Path) -> None:
        """As FlashAttention does, under autocast."""

        def flash(module: Any, query: torch.Tensor, *others: Any, **options: Any) -> Any:
            assert torch.is_autocast_enabled("cpu")  # which tells it what to cast to
            return sdpa_attention_forward(module, query, *others, **options)

        AttentionInterface.register("flash_of_this_test", flash)
        model, sequences = opened(tiny_model), sequences_of(BATCH)
        alone = log_probabilities(model, sequences)
        model.config._attn_implementation = "flash_of_this_test"
        assert torch.equal(log_probabilities(model, sequences), alone)
        assert model.config._attn_implementation == "flash_of_this_test"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(input_ids=sequences.ids).logits.isfinite().all()

    def test_its_memory_is_bounded(self) -> None:
        rows = [[1] * 100] * 50
        assert sequences_of(rows).ids.shape == (16, 64)
        assert sequences_of(rows, 152_000).ids.shape == (6, 64)


class TestWhatCannotBeMeasured:
    """A monitor never ends a training: what it cannot measure it names and leaves out."""

    @pytest.mark.parametrize("kind", ["t5", "bart"])
    def test_an_encoder_and_decoder_is_watched_without_divergences(
        self, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        sizes = {"d_model": 16, "vocab_size": 64}
        if kind == "t5":
            config: Any = T5Config(**sizes, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
            model: Any = T5ForConditionalGeneration(config)
        else:
            layers = {
                f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))
            }
            heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
            model = BartForConditionalGeneration(BartConfig(**sizes, **layers, **heads, max_position_embeddings=32))
        trainer = trainer_of(model, tmp_path / "out")
        Monitor(tmp_path / "monitor", every=1).attach(trainer)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert trainer.state.global_step == STEPS
        assert "no divergences are measured" in caplog.text and "encoder and a decoder" in caplog.text
        rows = read_monitor(tmp_path / "monitor")
        assert {row["kl_step"] for row in rows} == {None}
        assert all(row["relative_update_norm"] > 0 for row in rows if row["step"] == STEPS)

    def test_a_matrix_that_cannot_be_read_is_named_and_left_out(
        self, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As PEFT's adapters of fused experts, whose change has another shape than the weight."""
        adapted = get_peft_model(opened(tiny_model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
        monkeypatch.setattr(layer, "get_delta_weight", lambda name: torch.zeros(3, 5))
        monitor = Monitor(tmp_path, every=1, matrices=["*layers.0.*q_proj.weight", "*layers.0.*v_proj.weight"])
        with caplog.at_level(logging.WARNING):
            monitor.start(adapted)
        assert "layers.0.self_attn.q_proj.weight is not watched" in caplog.text
        row = monitor.observe(1, adapted)
        assert row["update_norm"] == 0
        with pytest.raises(TrainingError, match="none of the matrices"):
            Monitor(tmp_path / "none", every=1, matrices=["*layers.0.*q_proj.weight"]).start(adapted)


class TestCadence:
    @given(
        st.lists(st.floats(0.5, 2.0), min_size=50, max_size=200),
        st.floats(0.001, 1.0),
        st.sampled_from([0.01, 0.03, 0.1]),
    )
    def test_auto_never_exceeds_its_budget(self, steps: list[float], cost: float, budget: float) -> None:
        cadence = Cadence("auto", budget)
        cadence.expect(cost)
        cadence.add_step(steps[0])
        for step, (now, following) in enumerate(itertools.pairwise(steps), 1):
            due = cadence.due(step + 1)
            cadence.add_step(following)
            if due:
                cadence.add_cost(cost, observed=True)
                assert cadence.share is not None and cadence.share <= budget * (1 + 4 / step), now

    def test_it_observes_as_often_as_the_budget_allows(self) -> None:
        cadence, observed = Cadence("auto", 0.03), []
        cadence.expect(10.0)  # an estimate that proves too high
        for step in range(1, 2001):
            cadence.add_step(1.0)
            if cadence.due(step):
                observed.append(step)
                cadence.add_cost(0.1, observed=True)
        assert all(step % 5 == 0 for step in observed) and len(observed) > 300
        assert cadence.share is not None and 0.015 < cadence.share <= 0.03


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain loop with a monitor at every second step."""
    out = tmp_path_factory.mktemp("monitored") / "plain"
    monitor, model = Monitor(out, every=2, sequences=BATCH), opened(tiny_model)
    monitor.start(model)
    fit(model, monitor)
    return out


class TestInAPlainLoop:
    def test_it_changes_nothing_of_the_training(self, tiny_model: Path, tmp_path: Path) -> None:
        """Weights, modes, gradients and the random state are what they are without it, dropout and all."""
        results = []
        for every in (None, 1):
            torch.manual_seed(3)
            model = opened(tiny_model)
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.2
            model.lm_head.eval()
            monitor = None if every is None else Monitor(tmp_path / "out", every=1, sequences=BATCH)
            if monitor is not None:
                monitor.start(model)
            fit(model, monitor)
            assert model.training and not model.lm_head.training and all(p.grad is None for p in model.parameters())
            results.append((model.state_dict(), torch.rand(3).tolist()))
        assert results[0][1] == results[1][1]
        assert all(torch.equal(results[1][0][name], value) for name, value in results[0][0].items())
        assert {row["step"] for row in read_monitor(tmp_path / "out")} == set(range(1, STEPS + 1))

    def test_rows_say_what_the_weights_and_the_policy_did(self, plain: Path, tiny_model: Path) -> None:
        base, model = opened(tiny_model), opened(tiny_model)
        states = []
        for step in range(1, STEPS + 1):
            model = opened(tiny_model)
            fit(model, None, range(1, step + 1))
            states.append(model)
        rows = [row for row in read_monitor(plain) if row["tensor"] is None]
        assert [row["step"] for row in rows] == [2, 4]

        for row in rows:
            now, before = states[row["step"] - 1], states[row["step"] - 2]
            assert row["kl_step"] == pytest.approx(divergence(now, before), rel=1e-3)
            assert row["kl_cumulative"] == pytest.approx(divergence(now, base), rel=1e-3)
            assert row["kl_tokens"] == sum(len(ids) - 1 for ids in BATCH)
        tensors = [row for row in read_monitor(plain) if row["tensor"] is not None and row["step"] == 4]
        assert {row["role"] for row in tensors} == {"q", "k", "v", "o", "gate", "up", "down"}
        now, before = states[3].state_dict(), base.state_dict()
        squares = [
            [((x[row["tensor"]] - y).double() ** 2).sum().item() for row in tensors for y in [other(row)]]
            for x, other in ((now, lambda row: before[row["tensor"]]), (before, lambda row: 0.0))
        ]
        assert rows[1]["relative_update_norm"] == pytest.approx(math.sqrt(sum(squares[0]) / sum(squares[1])), rel=1e-5)

    def test_the_table_explains_itself(self, plain: Path) -> None:
        schema = pq.read_schema(plain / "monitor.parquet")
        assert all(field.metadata[b"meaning"] for field in schema)
        assert all(field.metadata[b"unit"] for field in schema if field.type == "double")
        rows = read_monitor(plain)
        assert all(value == value for row in rows for value in row.values() if isinstance(value, float))

    def test_a_run_that_goes_on_has_every_step_once(self, plain: Path, tiny_model: Path, tmp_path: Path) -> None:
        """Stopped after step 3 of which the checkpoint holds 2; the rows beyond it come from the second sitting."""
        model = opened(tiny_model)
        first = Monitor(tmp_path, every=1, sequences=BATCH)
        first.start(model)
        fit(model, first, [1, 2])
        weights = copy.deepcopy(model.state_dict())
        fit(model, first, [3])
        model.load_state_dict(weights)
        second = Monitor(tmp_path, every=1)
        second.start(model, step=2)
        fit(model, second, [3, 4])
        rows = [row for row in read_monitor(tmp_path) if row["tensor"] is None]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(row["kl_cumulative"] > 0 and row["kl_step"] > 0 for row in rows)
        at_two = [row for row in measured(read_monitor(plain)) if row["step"] == 2]
        assert [row for row in measured(read_monitor(tmp_path)) if row["step"] == 2] == at_two


def test_two_processes_of_fsdp2_write_the_rows_of_one(plain: Path, tiny_model: Path, tmp_path: Path) -> None:
    """In a plain loop, and as accelerate shards under a Trainer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).with_name("train_monitored.py")
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(tiny_model), str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    alone = trainer_of(opened(tiny_model), tmp_path / "alone")
    Monitor(tmp_path / "alone", every=2, sequences=BATCH).attach(alone)
    alone.train()
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()[-2000:]
    assert sorted({row["step"] for row in read_monitor(tmp_path / "auto")}) == [2, 3, 4]  # no clock before a step
    pairs = ((tmp_path / "plain", plain, 1e-6), (tmp_path / "trainer", tmp_path / "alone", 1e-3))
    for sharded, whole, rel in pairs:  # halves of a batch are summed in another order
        for row, wanted in zip(measured(read_monitor(sharded)), measured(read_monitor(whole)), strict=True):
            assert row.keys() == wanted.keys()
            for name, value in wanted.items():
                exact = value is None or isinstance(value, str)
                assert row[name] == (value if exact else pytest.approx(value, rel=rel, abs=1e-9)), name


class TestConditions:
    def test_the_first_that_holds_says_which_value_of_which_matrix_at_which_step(
        self, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = opened(tiny_model)
        conditions = ["spectral_shift > 1e9", "relative_update_norm > 1e-9"]
        monitor = Monitor(tmp_path, every=2, stop_if=conditions, warn_if="pooled unchanged_fraction < 2")
        monitor.start(model)
        with caplog.at_level(logging.WARNING, "offprincipal.monitor"):
            rows = fit(model, monitor)
        assert len(rows) == 2 and monitor.stopped == rows[1]["stopped"] == read_monitor(tmp_path)[-1]["stopped"]
        tensors = {row["tensor"]: row["relative_update_norm"] for row in read_monitor(tmp_path) if row["tensor"]}
        furthest = max(tensors, key=lambda name: tensors[name])
        assert monitor.stopped == (
            f"relative_update_norm > 1e-09: {tensors[furthest]:.6g} in {furthest} and 6 more, at step 2"
        )
        assert rows[1]["warned"].startswith("unchanged_fraction < 2: pooled value ")
        assert [record.message.split(":")[0] for record in caplog.records] == ["warning", "stopping the training"]

    @pytest.mark.parametrize("metric", ["kl_step", "pooled kl_cumulative"])
    @pytest.mark.parametrize("kind", ["stop_if", "warn_if"])
    def test_one_that_no_loop_without_sequences_could_meet_is_refused(
        self, metric: str, kind: str, tiny_model: Path, tmp_path: Path
    ) -> None:
        model, condition = opened(tiny_model), f"{metric} > .1"
        with pytest.raises(ArgumentError, match=r"kl_\w+ is not measured without sequences.*sequences=\[…\]"):
            Monitor(tmp_path, every=1, **{kind: condition}).start(model)
        assert not list(tmp_path.iterdir())
        first = Monitor(tmp_path, every=1, **{kind: condition}, sequences=BATCH)
        first.start(model)
        fit(model, first, [1])
        Monitor(tmp_path, every=1, **{kind: condition}).start(model, step=1)  # which goes on with those of the folder

    def test_weights_that_are_no_numbers_end_a_run_that_may_be_ended(self, tiny_model: Path, tmp_path: Path) -> None:
        model = opened(tiny_model)
        monitor = Monitor(tmp_path, every=1, stop_if="kl_cumulative > 1e9", sequences=BATCH)
        monitor.start(model)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
        row = monitor.observe(1, model)
        assert row["stopped"] == "model.layers.1.mlp.down_proj.weight holds NaN or infinity, at step 1"
        assert row["kl_cumulative"] is None and row["spectral_shift"] is not None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"stop_if": "spectral_shift_per_norm = 5"}, "not a condition: write METRIC > NUMBER"),
            ({"warn_if": ["spectral_shift > 1", "reward > 1"]}, "no metric 'reward' is measured"),
            ({"every": 0}, "steps of at least 1, or 'auto'"),
            ({"every": "often"}, "steps of at least 1, or 'auto'"),
            ({"budget": 0}, "share of the training's time, above 0"),
            ({"budget": 2}, "at most 1"),
            ({"budget": "0.1"}, "share of the training's time, above 0"),
            ({"rank_fraction": 2.0}, "share of min"),
            ({"rank_fraction": "0.1"}, "share of min"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_at_once(
        self, arguments: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ArgumentError, match=message):
            Monitor(tmp_path, **arguments)


class TestWhatIsWatched:
    def test_an_adapter_is_watched_as_the_merged_model_would_be(self, tiny_model: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=4)
        model = get_peft_model(opened(tiny_model), config)
        patterns = ["*.q_proj.weight", "*.k_proj.weight"]
        matrices = {matrix.name: matrix for matrix in watched_matrices(model, patterns)}
        merged = {name: matrix.now() for name, matrix in matrices.items()}
        wanted = copy.deepcopy(model).merge_and_unload().state_dict()
        assert len(merged) == 4 and all(torch.allclose(merged[name], wanted[name], atol=1e-6) for name in merged)
        monitor = Monitor(tmp_path, every=1, matrices=patterns, sequences=BATCH)
        monitor.start(model)
        fit(model, monitor, [1])
        rows = {row["tensor"]: row for row in read_monitor(tmp_path)}
        assert rows["model.layers.0.self_attn.q_proj.weight"]["update_norm"] > 0
        assert rows["model.layers.0.self_attn.k_proj.weight"]["update_norm"] == 0 < rows[None]["kl_step"]

    def test_shira_is_watched_as_the_merged_model_would_be(self, tiny_model: Path, tmp_path: Path) -> None:
        model = shira(opened(tiny_model), "safe", 0.2)
        monitor = Monitor(tmp_path, every=1, sequences=BATCH)
        monitor.start(model)
        fit(model, monitor)
        base, merged = opened(tiny_model).state_dict(), copy.deepcopy(model).merge_and_unload().state_dict()
        rows = [row for row in read_monitor(tmp_path) if row["step"] == STEPS and row["tensor"]]
        assert len(rows) == 7
        for row in rows:
            update = merged[row["tensor"]].double() - base[row["tensor"]].double()
            assert row["update_norm"] == pytest.approx(update.norm().item(), rel=1e-5)
            assert row["unchanged_fraction"] > 0.5

    def test_pissa_starts_from_the_whole_not_from_its_residual(self, tiny_model: Path) -> None:
        plain = opened(tiny_model).model.layers[0].self_attn.q_proj.weight.detach().clone()
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        matrix = watched_matrices(get_peft_model(opened(tiny_model), config))[0]
        assert not torch.allclose(matrix.module.weight, plain, atol=1e-3)
        assert torch.allclose(matrix.now(), plain, atol=1e-6)

    def test_an_adapter_whose_change_is_no_sum_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        model = get_peft_model(opened(tiny_model), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        with pytest.raises(TrainingError, match=r"q_proj.*no change that is added.*DoRA"):
            Monitor(tmp_path).start(model)

    def test_weights_that_lie_flat_are_refused(self, tmp_path: Path) -> None:
        flat = torch.nn.Module()
        flat.register_parameter("_flat_param", torch.nn.Parameter(torch.zeros(10)))
        with pytest.raises(TrainingError, match=r"flattened \(FSDP1\)"):
            Monitor(tmp_path).start(flat)

    def test_fused_projections_are_watched_one_by_one(self) -> None:
        from transformers import Phi3Config, Phi3ForCausalLM

        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = Phi3ForCausalLM(Phi3Config(vocab_size=16, num_hidden_layers=1, pad_token_id=0, **sizes))
        matrices = {matrix.part.place.role: matrix for matrix in watched_matrices(model)}
        assert set(matrices) == {"q", "k", "v", "o", "gate", "up", "down"}
        fused = model.model.layers[0].self_attn.qkv_proj.weight
        assert torch.equal(matrices["k"].now(), fused[8:12]) and torch.equal(matrices["v"].now(), fused[12:16])

    def test_misuse_says_what_to_do(self, tiny_model: Path, tmp_path: Path) -> None:
        model = opened(tiny_model)
        monitor = Monitor(tmp_path, every=1)
        with pytest.raises(ArgumentError, match=r"call start\(model\)"):
            monitor.observe(1, model)
        with pytest.raises(ArgumentError, match=r"named like 'lm_head'.*names are such as 'model.layers"):
            Monitor(tmp_path, matrices="lm_head").start(model)
        with pytest.raises(ArgumentError, match="named like 'nope'"):
            Monitor(tmp_path, matrices=["*.q_proj.weight", "nope"]).start(model)
        with pytest.raises(ArgumentError, match="token 1000000 is not in the model's vocabulary of"):
            Monitor(tmp_path, sequences=[[5, 9, 1000000]]).start(model)
        with pytest.raises(FileError, match=r"cannot read .*base.*from its first step"):
            monitor.start(model, step=5)
        monitor.start(model)
        monitor.observe(1, model)
        with pytest.raises(ArgumentError, match="step 1 was passed already"):
            monitor.observe(1, model)
        with pytest.raises(FileError, match="other matrices"):
            Monitor(tmp_path, matrices="*q_proj*").start(model, step=1)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.inf
        with pytest.raises(NonFiniteTensor, match=r"q_proj\.weight: 1 of"):
            Monitor(tmp_path).start(model)


class WeightsOfSteps(TrainerCallback):
    """The weights before training and after every step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.kept.append(copy.deepcopy(model.state_dict()))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.kept.append(copy.deepcopy(model.state_dict()))


def test_divergences_are_those_of_the_float32_weights_where_training_computes_in_bfloat16(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As TRL trains unless told otherwise; rounding had been taken for the divergence of a step."""
    weights = WeightsOfSteps()
    trainer = trainer_of(opened(tiny_model), tmp_path / "trainer", 1, weights, bf16=True)
    Monitor(tmp_path / "out", every=1, sequences=BATCH).attach(trainer)
    trainer.train()
    states = [opened(tiny_model) for _ in weights.kept]
    for model, kept in zip(states, weights.kept, strict=True):
        model.load_state_dict(kept)
    rows = [row for row in read_monitor(tmp_path / "out") if row["tensor"] is None]
    for step, row in enumerate(rows, 1):
        assert row["kl_step"] == pytest.approx(divergence(states[step], states[step - 1]), rel=1e-2)
        assert row["kl_cumulative"] == pytest.approx(divergence(states[step], states[0]), rel=1e-2)
    assert len(rows) == STEPS and trainer.model.forward.__wrapped__  # accelerate's forward is as it was


def test_an_opened_language_model_is_watched_as_its_module(tiny_model: Path, tmp_path: Path) -> None:
    language_model = open_language_model(tiny_model, "cpu")
    monitor = Monitor(tmp_path, every=1, sequences=[[5, 9, 13]])
    monitor.start(language_model)
    row = monitor.observe(1, language_model)
    assert row["update_norm"] == 0 and row["kl_cumulative"] == 0


class Listener(TrainerCallback):
    """What a logger of `report_to` is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.told.append((state.global_step, dict(logs)))


def test_the_last_step_is_measured_and_judged_whatever_the_budget_and_it_is_said(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs whose steps are fast left no row and no verdict, and did not say so."""
    listener = Listener()
    trainer = trainer_of(opened(tiny_model), tmp_path / "trainer", 1, listener)
    monitor = Monitor(tmp_path / "out", budget=1e-12, stop_if=["pooled unchanged_fraction < 2"])
    monitor.attach(trainer)
    trainer.train()
    assert {row["step"] for row in read_monitor(tmp_path / "out")} == {STEPS}
    assert monitor.stopped and f"at step {STEPS}" in monitor.stopped
    assert any("offprincipal/unchanged_fraction" in logs for _, logs in listener.told)
    assert f"Only 1 of {STEPS} steps were observed" in caplog.text and "rarely checked. Set every=N" in caplog.text


def test_a_trainers_loggers_are_told_and_its_own_log_is_whole(tiny_model: Path, tmp_path: Path) -> None:
    listener = Listener()
    trainer = trainer_of(opened(tiny_model), tmp_path / "trainer", 1, listener)
    watched = {"stop_if": "principal_energy > 1", "warn_if": "monitor_share > 1e9"}
    offprincipal.Monitor(tmp_path / "out", every=2, **watched).attach(trainer)
    trainer.train()
    ours = {step: logs for step, logs in listener.told if "offprincipal/spectral_shift" in logs}
    assert list(ours) == [2, 4] and [step for step, logs in listener.told if "loss" in logs] == [1, 2, 3, 4]
    row = read_monitor(tmp_path / "out")[-1]
    assert {name for logs in ours.values() for name in logs if name.startswith("offprincipal/")} == {
        f"offprincipal/{name}"
        for name in (
            *("kl_step", "kl_cumulative", "relative_update_norm", "unchanged_fraction", "spectral_shift"),
            *("principal_energy", "monitor_share"),  # which conditions are on
        )
    }
    assert ours[4]["offprincipal/kl_cumulative"] == row["kl_cumulative"]
    assert row["kl_tokens"] == 4 * len(BATCH)  # of six tokens the labels leave four


def test_attaching_once_more_does_nothing_and_elsewhere_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """As when a notebook's cell is run again."""
    listener = Listener()
    trainer = trainer_of(opened(tiny_model), tmp_path / "trainer", 1, listener)
    monitor = Monitor(tmp_path / "out", every=1)
    trainer.add_callback(monitor.callback())
    assert monitor.attach(trainer) is monitor.attach(trainer) is monitor
    trainer.train()
    told = [step for step, logs in listener.told if "offprincipal/spectral_shift" in logs]
    assert told == sorted({row["step"] for row in read_monitor(tmp_path / "out")}) == [1, 2, 3, 4]
    assert repr(monitor) == f"Monitor('{tmp_path / 'out'}', every=1; 7 matrices at step 4)"
    with pytest.raises(ArgumentError, match="watches another trainer already: make one Monitor for each"):
        monitor.attach(trainer_of(opened(tiny_model), tmp_path / "other"))
    with pytest.raises(ArgumentError, match=r"Qwen3ForCausalLM is not a trainer.*your own loop, call start\(model\)"):
        monitor.attach(trainer.model)


def test_a_loop_too_fast_for_its_budget_is_told_early(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = opened(tiny_model)
    monitor = Monitor(tmp_path, budget=1e-9)
    monitor.start(model)
    fit(model, monitor)
    [said] = [record.message for record in caplog.records if "will be observed" in record.message]
    assert said.startswith("No step before ") and said.endswith("or pass last=True with the last step")


@pytest.fixture(scope="module", params=["grpo", "sft_own"])
def pair(
    request: pytest.FixtureRequest, taught_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run without the monitor, and the same with it."""
    folder = tmp_path_factory.mktemp("pair")
    train(settings(taught_model, request.param), folder / "alone", quiet=True)
    train(settings(taught_model, request.param, monitor=1), folder / "watched", quiet=True)
    return folder / "alone", folder / "watched"


class TestInOurRuns:
    def test_the_trained_weights_are_byte_identical_with_it(self, pair: tuple[Path, Path]) -> None:
        for name in ("model.safetensors", "masters/model.safetensors"):
            assert (pair[0] / name).read_bytes() == (pair[1] / name).read_bytes()
        logs = [[entry["loss"] for entry in record_of(run)["log"]] for run in pair]
        assert logs[0] == logs[1] and not (pair[1] / "monitor.base.safetensors").exists()

    def test_its_last_rows_are_what_compare_says_of_the_result(
        self, pair: tuple[Path, Path], taught_model: Path
    ) -> None:
        rows = [row for row in read_monitor(pair[1]) if row["step"] == 3 and row["tensor"]]
        masters, base = (load_file(path / "model.safetensors") for path in (pair[1] / "masters", taught_model))
        compared = {row["tensor"]: row for row in offprincipal.compare(taught_model, {"run": pair[1]}).matrices}
        assert len(rows) == 7
        for row in rows:
            before, after = base[row["tensor"]].float(), masters[row["tensor"]]
            assert row["update_norm"] == pytest.approx((after - before).double().norm().item(), rel=1e-6)
            for name in ("unchanged_fraction", "hidden_fraction", "unchanged_fraction_isotropic_null"):
                assert row[name] == pytest.approx(compared[row["tensor"]][name], rel=1e-6), name

    def test_divergence_is_measured_on_what_the_run_learns_from(self, pair: tuple[Path, Path]) -> None:
        rows = [row for row in read_monitor(pair[1]) if row["tensor"] is None]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert (
            rows[0]["kl_step"] == rows[0]["kl_cumulative"] > 0 and rows[2]["kl_cumulative"] > rows[0]["kl_cumulative"]
        )
        assert 16 <= rows[0]["kl_tokens"] <= 16 * 3  # completions of at most three tokens

    @pytest.mark.parametrize("pair", ["grpo"], indirect=True)
    def test_a_killed_run_has_the_rows_of_one_that_was_not(
        self, pair: tuple[Path, Path], taught_model: Path, tmp_path: Path
    ) -> None:
        run = settings(taught_model, "grpo", monitor=1)
        command = [sys.executable, "-c", KILLED, run.model_dump_json(), str(tmp_path / "run")]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        killed = subprocess.run([*command, "open", "checkpoint-2/trainer_state.json"], env=environment, check=False)
        assert killed.returncode == -9
        assert {row["step"] for row in read_monitor(tmp_path / "run")} == {1, 2}
        train(run, tmp_path / "run", quiet=True)
        assert measured(read_monitor(tmp_path / "run")) == measured(read_monitor(pair[1]))

    def test_a_run_without_a_monitor_has_the_settings_it_always_had(self) -> None:
        alone = TrainSettings(recipe="grpo", tasks=("add",))
        assert not {"monitor", "stop_if", "warn_if"} & alone.model_dump(mode="json").keys()
        watched = alone.model_copy(update={"monitor": 5})
        assert TrainSettings.model_validate_json(watched.model_dump_json()) == watched
        with pytest.raises(TrainingError, match="set monitor too"):
            TrainSettings(recipe="grpo", tasks=("add",), stop_if=("kl_step > 1",))


def test_the_command_ends_a_run_that_a_condition_ends(
    taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", "sft_own", "--task", "count@1", "--model", str(taught_model), "--out", str(out)]
    given = ["steps=5", "batch=16", "eval_prompts=0", "monitor=2", 'stop_if=["unchanged_fraction < 1"]']
    overrides = [word for text in given for word in ("--set", text)]
    assert call(monkeypatch, *words, *overrides) == 0
    record = record_of(out)
    assert len(record["log"]) == 2 and record["stopped"].startswith("unchanged_fraction < 1: 0.")
    assert read_monitor(out)[-1]["stopped"] == record["stopped"]
    assert json.loads((out / "run.json").read_text())["settings"]["stop_if"] == ["unchanged_fraction < 1"]
    assert call(monkeypatch, *words, "--set", "monitor=2", "--set", 'stop_if=["reward < 1"]') == 2
    assert "no metric 'reward' is measured" in capsys.readouterr().err


def test_what_another_runs_monitor_saw_is_put_aside_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(12, 8, bias=False)})
    for run in range(3):
        monitor = Monitor(tmp_path, every=1)
        monitor.start(model)
        with torch.no_grad():
            model["q_proj"].weight.mul_(1.01)
        monitor.observe(run + 1, model)
    tables = ("monitor-1.parquet", "monitor-2.parquet", "monitor.parquet")
    assert [pq.read_table(tmp_path / name)["step"].to_pylist() for name in tables] == [[1, 1], [2, 2], [3, 3]]
    assert "it is monitor-2.parquet now" in caplog.text
    with pytest.raises(ArgumentError, match="lists of token ids"):
        Monitor(tmp_path, sequences=["1+1="])
