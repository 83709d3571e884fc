"""The gates: divergence, the Fisher form by forward mode, curvature of directions, and what the command writes."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offprincipal.checkpoints import open_checkpoint
from offprincipal.cli import main
from offprincipal.errors import ArgumentError, CheckpointError, FileError, ModelError, OffPrincipalError, TaskError
from offprincipal.gates import Batch, GateSettings, fisher_per_token, fisher_quadratic, kl_per_token, measure_gates
from offprincipal.gates.curvature import Curvature, pair_rows
from offprincipal.gates.directions import (
    RANDOM_DIRECTIONS,
    UPDATE_DIRECTIONS,
    PrincipalSpace,
    linear_matrices,
    random_direction,
    update_direction,
)
from offprincipal.gates.forward import fisher_sums, kl_sums
from offprincipal.gates.measure import open_for_derivatives
from offprincipal.gates.precision_gate import precision_gate
from offprincipal.gates.sequences import Sequences, read_sequences, sample_continuations, shuffled_batches
from offprincipal.gates.statistics import (
    interval,
    mean_with_interval,
    resampled_means,
    sign_test,
    units_wanted,
)
from offprincipal.gates.updates import Tuned, Update, moved_by
from offprincipal.models import LanguageModel, open_language_model
from offprincipal.models.fisher import counted_logits, logit_derivatives
from offprincipal.models.float64 import InFloat64

SMALL = {"batches": 4, "prompts_per_batch": 2, "max_new_tokens": 3, "draws": 2, "layer_draws": 1}
TEXTS = ["12+34=46", "sort 312=123", "count a in banana=3", "7*8=56", "99-1=98", "max 3 9 4=9"]


class Softmax(nn.Module):
    """A linear softmax model over one-hot inputs seen through a fixed embedding."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("inputs", torch.randn(vocabulary, width, generator=generator, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(vocabulary, width, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inputs[input_ids] @ self.weight.T)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> LanguageModel:
    return open_for_derivatives(tiny_model, GateSettings(device="cpu"))


@pytest.fixture
def in_float64(tiny_model: Path) -> Iterator[LanguageModel]:
    with InFloat64():
        yield open_for_derivatives(tiny_model, GateSettings(device="cpu", dtype="float64"))


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model a step further, in float32."""
    folder = copy_of(tiny_model, tmp_path_factory.mktemp("tuned") / "run")
    generator = torch.Generator().manual_seed(1)
    weights = {n: w.float() for n, w in load_file(tiny_model / "model.safetensors").items()}
    moved = {
        n: w + 0.02 * w.std() * torch.randn(w.shape, generator=generator) for n, w in weights.items() if w.dim() > 1
    }
    save_file({**weights, **moved}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def given_sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ground") / "sequences.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def random_batch(language_model: LanguageModel, rows: int = 3, length: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 90, (rows, length), generator=generator).tolist()
    return Batch.of([row[: length - i] for i, row in enumerate(ids)], first=[1] * rows)


def unit_direction(language_model: LanguageModel, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    like = {name: p.detach() for name, p in language_model.model.named_parameters()}
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in like.items()}
    norm = sum(float(x.square().sum()) for x in drawn.values()) ** 0.5
    return {name: (x / norm).to(like[name].dtype) for name, x in drawn.items()}


def stacked(*directions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in directions]) for name in directions[0]}


# --- divergence ---


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=6), st.floats(-5, 5))
def test_kl_is_that_of_the_definition_and_ignores_a_shift_of_the_logits(logits: list[float], shift: float) -> None:
    new = torch.tensor([logits], dtype=torch.float64)
    old = new.flip(1)
    p, q = new.softmax(-1), old.softmax(-1)
    kl = kl_per_token(new, old).item()
    assert kl == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)
    assert kl >= 0
    assert kl_per_token(new + shift, old).item() == pytest.approx(kl, abs=1e-12)


def test_kl_is_finite_where_the_new_policy_excludes_a_token_and_infinite_where_the_old_one_does() -> None:
    one, both = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    assert kl_per_token(one, both).item() == pytest.approx(math.log(2))
    assert kl_per_token(both, one).item() == math.inf
    assert math.isnan(kl_per_token(both, torch.tensor([[0.0, math.nan]])).item())
    assert math.isnan(kl_per_token(torch.tensor([[-math.inf, -math.inf]]), both).item())


def test_kl_is_right_where_the_new_policy_all_but_excludes_a_token() -> None:
    """Odds of e^720 overflow, and their share of the sum is one."""
    new, old = torch.tensor([[-720.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, -3.0]], dtype=torch.float64)
    assert kl_per_token(new, old).item() == pytest.approx(3 + math.log1p(math.exp(-3)))


@given(st.integers(0, 50), st.sampled_from([torch.float32, torch.float64]))
def test_an_update_without_a_principal_part_has_none(seed: int, dtype: torch.dtype) -> None:
    """What a projection leaves of it is rounding, whose curvature would be a figure of nothing."""
    generator = torch.Generator().manual_seed(seed)
    W, D = (torch.randn(48, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    U, V = U[:, :4], Vh[:4].T
    outside = (D - U @ (U.T @ D @ V) @ V.T).to(dtype)
    space = PrincipalSpace(U.to(dtype), V.to(dtype), torch.ones(48, 32, dtype=torch.bool))
    assert not space.part(outside, "update_principal").any()
    assert torch.allclose(space.part(outside, "update_complement"), outside, atol=1e-5)
    assert space.part(D.to(dtype), "update_principal").any()
    assert not space.part((U @ V.T).to(dtype), "update_complement").any()


# --- the Fisher form ---


def test_fisher_form_of_a_linear_softmax_model_is_the_closed_form() -> None:
    model, batch = Softmax(5, 3), Batch.of([[0, 3, 1], [4, 2]], first=[0, 1])
    D = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = model.inputs[torch.tensor([0, 3, 1, 2])]  # the counted tokens
    p = (x @ model.weight.detach().T).softmax(-1)
    information = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("tij,ta,tb->iajb", information, x, x) / len(x)
    expected = torch.einsum("ia,iajb,jb->", D, fisher, D)
    assert fisher_quadratic(model, {"weight": D[None]}, batch).item() == pytest.approx(expected.item(), rel=1e-12)


def test_fisher_form_is_the_expected_square_of_the_score_taken_by_reverse_mode() -> None:
    model, batch = Softmax(4, 2), Batch.of([[2]], first=[0])
    D = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.0, 2.0], [0.3, 0.1]], dtype=torch.float64)
    log_p = model(batch.ids, False).logits[0, 0].log_softmax(-1)
    scores = [torch.autograd.grad(each, model.weight, retain_graph=True)[0] for each in log_p]
    expected = sum(p.exp() * (score * D).sum() ** 2 for p, score in zip(log_p, scores, strict=True))
    assert fisher_quadratic(model, {"weight": D[None]}, batch).item() == pytest.approx(expected.item(), rel=1e-12)


def test_logit_derivatives_are_those_of_finite_differences_in_float64(in_float64: LanguageModel) -> None:
    batch, D = random_batch(in_float64), unit_direction(in_float64)
    _, derivatives = logit_derivatives(in_float64.model, stacked(D), batch)
    ends = []
    for step in (1e-4, -1e-4):
        with moved_by(in_float64.model, D, step):
            ends.append(counted_logits(in_float64.model, batch))
    expected = (ends[0] - ends[1]) / 2e-4
    assert derivatives.dtype == torch.float64
    assert (derivatives[0] - expected).abs().max() < 1e-6 * expected.abs().max()


def test_float32_agrees_with_float64(base: LanguageModel, tiny_model: Path) -> None:
    batch, directions = random_batch(base), [unit_direction(base, seed) for seed in range(2)]
    found = fisher_quadratic(base.model, stacked(*directions), batch)
    with InFloat64():
        wide = open_for_derivatives(tiny_model, GateSettings(device="cpu", dtype="float64"))
        expected = fisher_quadratic(wide.model, {n: x.double() for n, x in stacked(*directions).items()}, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_directions_measured_together_are_those_measured_alone(base: LanguageModel) -> None:
    batch, directions = random_batch(base), [unit_direction(base, seed) for seed in range(3)]
    together = fisher_per_token(base.model, stacked(*directions), batch)
    alone = torch.cat([fisher_per_token(base.model, stacked(each), batch) for each in directions])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)


@given(st.floats(-3, 3).filter(lambda scale: abs(scale) > 0.1))
def test_fisher_form_is_quadratic_in_the_direction(scale: float) -> None:
    model, batch = Softmax(4, 2), Batch.of([[2, 1]], first=[0])
    D = torch.arange(8.0, dtype=torch.float64).reshape(1, 4, 2).sin()
    one, other = (fisher_quadratic(model, {"weight": each}, batch).item() for each in (D, scale * D))
    assert other == pytest.approx(scale**2 * one)


def test_divergence_is_half_the_fisher_form_to_second_order(in_float64: LanguageModel) -> None:
    sequences = Sequences([[5, 9, 30, 12], [7, 8, 44]], [0, 1], "given")
    D = unit_direction(in_float64)
    (quadratic,), _ = fisher_sums(in_float64, [lambda: D], sequences)
    steps = [0.02, 0.01, 0.005]
    kl = kl_sums(in_float64, D, steps, sequences).sum(-1)
    off = [abs(k / (s**2 * quadratic.sum() / 2) - 1) for k, s in zip(kl, steps, strict=True)]
    assert off[2] < 0.02
    assert off[1] < 0.75 * off[0]  # the rest is of third order: it halves with the step
    assert off[2] < 0.75 * off[1]


def test_sums_over_sequences_do_not_depend_on_how_they_are_batched(base: LanguageModel) -> None:
    ids = [[5, 9, 30, 12], [7, 8], [40, 41, 42, 43, 44, 45]]
    D = unit_direction(base)
    (together,), _ = fisher_sums(base, [lambda: D], Sequences(ids, [0, 0, 2], "given"))
    alone = [
        fisher_sums(base, [lambda: D], Sequences([row], [first], "given"))[0].item()
        for row, first in zip(ids, [0, 0, 2], strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_a_tied_parameter_is_named_once(base: LanguageModel) -> None:
    with pytest.raises(ArgumentError, match=r"lm_head\.weight is not a parameter"):
        fisher_quadratic(base.model, {"lm_head.weight": torch.zeros(1, 1)}, random_batch(base))


def test_attention_without_forward_derivative_is_refused_with_a_way_out(tiny_model: Path) -> None:
    model = open_language_model(tiny_model, "cpu").model  # transformers chooses sdpa
    assert model.config._attn_implementation == "sdpa"
    D = {"model.layers.0.self_attn.q_proj.weight": torch.ones(1, 32, 32)}
    with pytest.raises(ModelError, match=r"attn_implementation='sdpa'.*choose attn_implementation='eager'"):
        fisher_quadratic(model, D, Batch.of([[5, 6, 7]], first=[0]))


def test_moving_a_model_is_undone_bit_for_bit_even_after_an_error(base: LanguageModel) -> None:
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    with pytest.raises(ZeroDivisionError), moved_by(base.model, unit_direction(base), 3.0):
        assert not torch.equal(base.model.model.norm.weight, before["model.norm.weight"])
        _ = 1 / 0
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())


# --- directions ---


def space_of(W: Tensor, rank_fraction: float = 0.25, alpha: float = 0.3) -> PrincipalSpace:
    found = PrincipalSpace.of(W, rank_fraction, alpha)
    assert found is not None
    return found


def test_the_two_parts_of_an_update_are_orthogonal_and_add_up_to_it() -> None:
    W, D = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space = space_of(W)
    principal, complement = (space.part(D, each) for each in UPDATE_DIRECTIONS)
    torch.testing.assert_close(principal + complement, D)
    assert abs((principal * complement).sum()) < 1e-12
    U, _, Vh = torch.linalg.svd(W)
    k = 2
    torch.testing.assert_close(principal, U[:, :k] @ (U[:, :k].T @ D @ Vh[:k].T) @ Vh[:k])


def test_random_directions_stay_on_their_support_with_unit_norm() -> None:
    space = space_of(torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    drawn = {each: space.random(each, torch.Generator().manual_seed(1)) for each in RANDOM_DIRECTIONS}
    for D in drawn.values():
        assert torch.linalg.vector_norm(D).item() == pytest.approx(1)
    torch.testing.assert_close(space.principal(drawn["random_principal"]), drawn["random_principal"])
    assert space.principal(drawn["random_complement"]).abs().max() < 1e-12
    assert not drawn["random_on_mask"][~space.mask].any()
    assert not drawn["random_off_mask"][space.mask].any()
    assert int(space.mask.sum()) == round(0.3 * 96)


def test_random_directions_have_the_norm_of_the_update_in_every_matrix(base: LanguageModel, tiny_model: Path) -> None:
    matrices, _ = linear_matrices(base.model, open_checkpoint(tiny_model), 0.125, 0.5, seed=0)
    assert len(matrices) == 14
    update = {
        matrix.parameter: torch.full((1, 1), 0.01 * i) * torch.ones(matrix.part.matrix_shape)
        for i, matrix in enumerate(matrices[:5], 1)
    }
    found = random_direction(matrices, "random_on_mask", 0, update)
    assert found.keys() == update.keys()
    for name, D in found.items():
        torch.testing.assert_close(torch.linalg.vector_norm(D), torch.linalg.vector_norm(update[name]))
    again, other = (random_direction(matrices, "random_on_mask", draw, update) for draw in (0, 1))
    assert all(torch.equal(found[name], again[name]) and not torch.equal(found[name], other[name]) for name in found)


@pytest.mark.parametrize("family", ["Phi3", "GPT2"])
def test_fused_and_transposed_projections_go_back_to_where_they_lie(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
    if family == "GPT2":
        size |= {"n_embd": 32, "n_layer": 1, "n_head": 2}
    else:
        size |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        size |= {"intermediate_size": 48, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**size)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    matrices, left_out = linear_matrices(model, open_checkpoint(tmp_path), 0.125, 0.5, seed=0)
    assert left_out == []
    assert {matrix.part.place.role for matrix in matrices} >= {"q", "k", "v", "o", "up", "down"}
    update = {m.parameter: torch.randn_like(dict(model.named_parameters())[m.parameter]) for m in matrices}
    parts = [update_direction(matrices, update, each) for each in UPDATE_DIRECTIONS]
    for name, D in update.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], D)


def test_experts_that_transformers_holds_otherwise_are_left_out_and_said(tiny_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 99}
    torch.manual_seed(0)
    folders = []
    for name in ("base", "tuned"):
        folders.append(copy_of(tiny_model, tmp_path / name))
        config = transformers.Qwen3MoeConfig(**sizes, **experts, head_dim=16, eos_token_id=1, pad_token_id=0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[-1])
    base = open_for_derivatives(folders[0], GateSettings(device="cpu"))
    matrices, left_out = linear_matrices(base.model, open_checkpoint(folders[0]), 0.125, 0.5, seed=0)
    assert [matrix.part.place.role for matrix in matrices] == ["k", "o", "q", "v"]
    assert len(left_out) == 12 and ".experts." in left_out[0]
    assert fisher_quadratic(base.model, stacked(unit_direction(base)), random_batch(base)).item() > 0
    with pytest.raises(ModelError, match=r"experts\S* of .* is not a parameter of Qwen3MoeForCausalLM"):
        Tuned(base, open_checkpoint(folders[0]), folders[1], "auto").update()


# --- statistics ---


@given(st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=10))
def test_sign_test_counts_the_sign_patterns_at_least_as_uneven(signs: list[float]) -> None:
    uneven = abs(sum(signs))
    patterns = [abs(2 * bin(code).count("1") - len(signs)) for code in range(1 << len(signs))]
    assert sign_test(signs) == pytest.approx(sum(each >= uneven for each in patterns) / len(patterns))


def test_so_many_batches_give_the_stated_power() -> None:
    rng = np.random.default_rng(0)
    sample = np.array([0.0, 1.0, 2.0, 3.0])  # mean 1.5, standard deviation 1.29
    wanted = units_wanted(sample)
    assert wanted is not None

    def t_of(mean: float) -> np.ndarray[Any, Any]:
        drawn = rng.normal(mean, sample.std(ddof=1), size=(40_000, wanted))
        return np.asarray(np.abs(drawn.mean(1)) / drawn.std(1, ddof=1) * wanted**0.5)

    power = float((t_of(sample.mean()) > np.quantile(t_of(0.0), 0.95)).mean())
    assert 0.78 < power < 0.92  # rounded up to a whole batch
    assert units_wanted([1.0, -1.0]) is None


def test_bootstrap_intervals_cover_at_about_their_level() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        low, high = interval(resampled_means(rng.normal(1, 1, size=32), np.ones(32)), 32)
        held += low is not None and high is not None and low <= 1 <= high
    assert 0.88 < held / 300 < 0.98


def drawn(direction: str, rng: np.random.Generator, draws: int = 8, batches: int = 16) -> Curvature:
    """A population of random directions: draws differ, and batches agree on each far better than draws do."""
    values = np.exp(0.5 * rng.standard_normal((draws, 1)) + 0.05 * rng.standard_normal((draws, batches)))
    return Curvature.of((direction, None, None), values, np.ones(draws), np.ones(batches), np.arange(batches))


def test_two_directions_of_one_population_differ_in_one_case_of_twenty() -> None:
    """With batches for units, the sign test had p < .05 in most cases: they say of two draws what they say of none."""
    rng, low, decided, by_batches = np.random.default_rng(0), 0, 0, 0
    for _ in range(400):
        found = [drawn(direction, rng) for direction in ("random_on_mask", "random_off_mask")]
        (row,) = pair_rows(found)
        low += row["sign_test_p"] < 0.05
        decided += not row["low"] <= 0 <= row["high"]
        by_batches += (sign_test(found[0].of_batches - found[1].of_batches) or 1) < 0.05
        assert row["batches_wanted"] is None and row["draws"] == 8
    assert low / 400 <= 0.08 and 0.02 <= decided / 400 <= 0.08
    assert by_batches / 400 > 0.5


def test_fewer_than_eight_draws_are_shown_and_not_tested() -> None:
    rng = np.random.default_rng(0)
    found = [drawn(direction, rng, draws=7) for direction in ("random_principal", "random_complement")]
    (row,) = pair_rows(found)
    assert row["difference"] == found[0].value - found[1].value and row["ratio"] is not None
    for name in ("low", "high", "ratio_low", "ratio_high", "standard_errors", "sign_test_p", "draws_wanted"):
        assert row[name] is None, name
    assert found[0].interval() == (None, None)


def test_one_unit_has_no_interval() -> None:
    assert mean_with_interval([2.0], [4]) == {"value": 0.5, "low": None, "high": None, "tokens": 4}


def test_an_unmoved_part_has_no_curvature_and_no_pair() -> None:
    ground = np.ones(4), np.arange(4)
    zero = Curvature.of(("update_principal", None, None), np.zeros((1, 4)), np.zeros(1), *ground)
    rest = Curvature.of(("update_complement", None, None), np.ones((1, 4)), np.ones(1), *ground)
    assert zero.value is None and rest.value == 1
    assert pair_rows([zero, rest]) == []


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_sequences_are_dealt_into_equal_batches(count: int, batches: int, seed: int) -> None:
    sizes = np.bincount(shuffled_batches(count, batches, seed), minlength=batches)
    assert sizes.sum() == count and sizes.max() - sizes.min() <= 1


# --- sequences ---


def test_given_sequences_count_every_position_after_the_first(base: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "sequences.jsonl"
    path.write_text('{"input_ids": [5, 6, 7, 8]}\n\n{"text": "1+1=2"}\n')
    found = read_sequences(path, base)
    assert found.tokens == [3, 4]
    assert found.ids[0] == [5, 6, 7]


def test_sampled_continuations_count_what_was_sampled(base: LanguageModel) -> None:
    prompts = [[5, 6, 7], [9]]
    found = sample_continuations(base, prompts, 4, seed=0, samples="base")
    for prompt, ids, first, tokens in zip(prompts, found.ids, found.first, found.tokens, strict=True):
        assert ids[: len(prompt)] == prompt and first == len(prompt) - 1
        assert 1 <= tokens <= 4
        assert tokens == 4 or len(ids) - len(prompt) == tokens - 1  # one that ended counts its ending token


# --- the whole ---


def test_divergences_are_those_of_the_two_models_run_by_themselves(
    tiny_model: Path, tuned: Path, given_sequences: Path
) -> None:
    found = measure_gates(tiny_model, {"run": tuned}, sequences=given_sequences, per_layer=False, draws=1, device="cpu")
    entry = found.runs["run"]
    old, new = (open_language_model(source, "cpu") for source in (tiny_model, tuned))
    divergences = []
    for text in TEXTS:
        ids = torch.tensor([old.tokenizer(text).input_ids])
        with torch.no_grad():
            log_q, log_p = (each.model(ids).logits[0, :-1].double().log_softmax(-1) for each in (old, new))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    expected = torch.cat(divergences)
    assert entry["kl_cumulative"]["tokens"] == len(expected)
    assert entry["kl_cumulative"]["value"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert entry["curve"][-1]["kl"] == entry["kl_cumulative"]["value"]
    assert entry["weights"] == "stored"


def test_curvature_is_that_of_explicit_directions(tiny_model: Path, tuned: Path, given_sequences: Path) -> None:
    options = {"sequences": given_sequences, "draws": 2, "layer_draws": 1, "batches": 3, "device": "cpu"}
    entry = measure_gates(tiny_model, {"run": tuned}, **options).runs["run"]
    base = open_for_derivatives(tiny_model, GateSettings(device="cpu"))
    checkpoint = open_checkpoint(tiny_model)
    update = Tuned(base, checkpoint, tuned, "auto").update().tensors
    matrices, _ = linear_matrices(base.model, checkpoint, 0.125, 0.5, seed=0)
    batch = Batch.of([base.tokenizer(text).input_ids[:-1] for text in TEXTS], first=[0] * len(TEXTS))

    def curvature(D: dict[str, Tensor]) -> float:
        square = sum(float(x.double().square().sum()) for x in D.values())
        return fisher_quadratic(base.model, {n: x[None] for n, x in D.items()}, batch).item() / square

    value = {(r["direction"], r["layer"], r["role"]): r["value"] for r in entry["curvature"]}
    assert len(value) == 6 * 15
    for direction in UPDATE_DIRECTIONS:
        assert value[direction, None, None] == pytest.approx(
            curvature(update_direction(matrices, update, direction)), rel=1e-4
        )
        own = [m for m in matrices if m.part.place.layer == 1 and m.part.place.role == "v"]
        assert value[direction, 1, "v"] == pytest.approx(curvature(update_direction(own, update, direction)), rel=1e-4)
    drawn = [curvature(random_direction(matrices, "random_off_mask", draw, update)) for draw in range(2)]
    assert value["random_off_mask", None, None] == pytest.approx(sum(drawn) / 2, rel=1e-4)


def test_the_norm_bound_is_the_root_of_the_two_ends_of_the_curve(
    tiny_model: Path, tuned: Path, given_sequences: Path
) -> None:
    found = measure_gates(tiny_model, {"run": tuned}, sequences=given_sequences, per_layer=False, draws=1, device="cpu")
    bound, end = found.runs["run"]["norm_bound"], found.runs["run"]["curve"][-1]
    assert bound["K"] == end["kl"]
    assert bound["bound"] == pytest.approx((2 * end["kl"]) ** 0.5)
    assert bound["fisher_norm"] == pytest.approx((2 * end["half_quadratic"]) ** 0.5)
    assert bound["tightness"] == pytest.approx((end["half_quadratic"] / end["kl"]) ** 0.5)
    assert bound["tightness_low"] <= bound["tightness"] <= bound["tightness_high"]


def kl_of(base: LanguageModel, update: Update) -> float:
    """The mean divergence over the given sequences."""
    sequences = Sequences([base.tokenizer(text).input_ids[:-1] for text in TEXTS], [0] * len(TEXTS), "given")
    return float(kl_sums(base, update.tensors, [1.0], sequences).sum() / sum(sequences.tokens))


def test_the_update_is_that_of_the_masters_and_the_divergence_that_of_the_stored_policy(
    tiny_model: Path, tuned: Path, given_sequences: Path, tmp_path: Path
) -> None:
    run = copy_of(tuned, tmp_path / "run")
    masters = load_file(tuned / "model.safetensors")
    save_file({n: w.bfloat16() for n, w in masters.items()}, run / "model.safetensors", metadata={"format": "pt"})
    (run / "masters").mkdir()
    save_file(masters, run / "masters" / "model.safetensors")
    base, checkpoint = open_for_derivatives(tiny_model, GateSettings(device="cpu")), open_checkpoint(tiny_model)
    by = {weights: Tuned(base, checkpoint, run, weights).update() for weights in ("auto", "masters", "stored")}
    assert {name: update.weights for name, update in by.items()} == {
        "auto": "masters",
        "masters": "masters",
        "stored": "stored",
    }
    name = "model.layers.0.mlp.up_proj.weight"
    before = dict(base.model.named_parameters())[name]
    torch.testing.assert_close(by["auto"].tensors[name], masters[name] - before)
    torch.testing.assert_close(by["stored"].tensors[name], masters[name].bfloat16().float() - before)
    with pytest.raises(CheckpointError, match="has no float32 masters"):
        Tuned(base, checkpoint, tuned, "masters")
    of_masters, of_stored = (kl_of(base, update) for update in (by["masters"], by["stored"]))
    found = measure_gates(tiny_model, {"run": run}, sequences=given_sequences, per_layer=False, draws=1, device="cpu")
    entry = found.runs["run"]
    assert entry["weights"] == "masters"
    assert entry["kl_cumulative"]["value"] == pytest.approx(of_stored, rel=1e-5)  # the policy that was stored
    assert entry["curve"][-1]["kl"] == pytest.approx(of_masters, rel=1e-5)
    assert of_masters != pytest.approx(of_stored, rel=1e-5)
    save_file({n: 2 * w for n, w in masters.items()}, run / "masters" / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not round to its stored weights"):
        Tuned(base, checkpoint, run, "auto").update()


def test_an_adapter_is_measured_as_the_model_that_it_makes(
    tiny_model: Path, given_sequences: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = open_language_model(tiny_model, "cpu").model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    runs = {name: tmp_path / name for name in ("adapter", "merged")}
    options = {"sequences": given_sequences, "per_layer": False, "draws": 1, "device": "cpu"}
    found = measure_gates(tiny_model, runs, **options).runs
    adapter, whole = (found[name]["kl_cumulative"]["value"] for name in runs)
    assert adapter == pytest.approx(whole, rel=1e-4) and adapter > 0


def test_the_command_writes_what_the_contract_says(
    tiny_model: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[..., int]
) -> None:
    out = tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert command("gates", tiny_model, f"step={tuned}", "--task=count@1", "--out", out, "--device=cpu", *options) == 0
    printed = capsys.readouterr().out
    assert "principal part of update" in printed and "step" in printed
    tables = printed[: printed.index("figures: ")].splitlines()
    assert not any(re.search(r"Gate |_|step length|\S…", line) for line in tables), "words of the field, none cut"
    assert max(map(len, tables)) <= 80
    head = {word for line in tables for word in line.split()}
    assert {"Fisher", "KL", "curvature", "needed", "unchanged,", "low-magnitude"} <= head
    content = json.loads((out / "gates.json").read_text())
    assert [path.name for path in out.iterdir()] == ["gates.json"]
    assert content["schema"] == 1 and content["base"] == str(tiny_model)
    entry = content["runs"]["step"]
    assert entry["kl_cumulative"].keys() == {"value", "low", "high", "tokens"}
    assert entry["kl_by_samples"]["tuned"] == entry["kl_cumulative"]
    assert [point["fraction"] for point in entry["curve"]] == [i / 8 for i in range(1, 9)]
    assert all(point.keys() == {"fraction", "kl", "half_quadratic"} for point in entry["curve"])
    keys = {"direction", "layer", "role", "value", "low", "high", "batches", "draws", "sign_test_p"}
    assert all(row.keys() == keys and row["batches"] == 4 for row in entry["curvature"])
    pooled = [row["direction"] for row in entry["curvature"] if row["layer"] is None and row["role"] is None]
    assert pooled == [*UPDATE_DIRECTIONS, *RANDOM_DIRECTIONS]
    assert {(row["layer"], row["role"]) for row in entry["curvature"]} >= {(0, "q"), (1, "down")}
    for row in entry["curvature"]:
        told = not row["direction"].startswith("random_") or row["draws"] >= 8
        assert (row["low"] is not None) == told
        assert not told or row["low"] <= row["value"] <= row["high"]
    assert "only 4 batches;" in entry["warnings"][0]
    assert (
        command(
            "gates", tiny_model, f"step={tuned}", "--task=count@1", "--out", out, "--device=cpu", *options, "--json"
        )
        == 0
    )
    again = json.loads(capsys.readouterr().out)
    gate = json.loads(json.dumps(precision_gate(tiny_model, tuned)))
    assert {name: entry[name] for name in gate} == gate
    assert (gate["hidden_fraction"] is not None) == ("what storing in bfloat16 hides" in printed)
    assert again["runs"] == content["runs"]  # the same seed, the same figures


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give one of prompts, task and sequences"),
        (["--task=add", "--prompts=nowhere"], "give one of prompts, task and sequences"),
        (["--prompts=nowhere"], "cannot read nowhere: No such file"),
        (["--task=nope"], "no task 'nope'"),
        (["--task=add", "--batches=0"], "batches is 0: give a whole number, at least 1"),
        (["--task=add", "--dtype=bf16"], "cannot compute in dtype 'bf16': choose float32 or float64"),
        (["--task=add", "--weights=all"], "no weights 'all': choose one of auto, masters, stored"),
        (["--task=add", "--device=tpu"], "there is no device 'tpu': choose 'auto', 'cpu' or 'cuda'"),
        (["--task=add", "--seed=-1"], "seed -1 is not a whole number from 0"),
        (["--task=add", "--density=2"], "density is 2.0: it lies between 0 and 1"),
        (["--task=add", "--batch_size=2"], "--batch_size: it is a setting of `offprincipal train`"),
    ],
)
def test_wrong_arguments_are_told_with_what_to_do(
    words: list[str],
    says: str,
    tiny_model: Path,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: Callable[..., int],
) -> None:
    assert command("gates", tiny_model, tuned, "--out", tmp_path / "out", *words) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["offprincipal", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("", ".txt", "has no prompts"),
        ("\n  \n", ".txt", "has no prompts"),
        ("", ".jsonl", "has no prompts"),
        ('{"question": "2+2"}', ".jsonl", "line 1 of .* has no text under 'prompt'"),
        ("1+1=\n" + "9" * 400 + "=", ".txt", "exceeds the model's context"),
    ],
)
def test_bad_prompts_are_refused(
    text: str, suffix: str, message: str, tiny_model: Path, tuned: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_text(text)
    with pytest.raises(OffPrincipalError, match=message):
        measure_gates(tiny_model, {"run": tuned}, prompts=path, device="cpu")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1 of .* is not valid JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"input_ids": [1, "a"]}', "not a list of integers"),
        ('{"input_ids": [1]}', "has 1 tokens"),
        ('{"input_ids": [1, 99999]}', "has token 99999"),
        (json.dumps({"input_ids": [5] * 3000}), "context has"),
        ('{"prompt": "x"}', "no text under 'text'"),
        ("", "has no sequences"),
    ],
)
def test_bad_sequences_are_refused(line: str, message: str, base: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "sequences.jsonl"
    path.write_text(line)
    with pytest.raises((FileError, ModelError), match=message):
        read_sequences(path, base)


def test_another_tokenizer_is_refused(tiny_model: Path, tuned: Path, given_sequences: Path, tmp_path: Path) -> None:
    run = copy_of(tuned, tmp_path / "run")
    content = json.loads((run / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (run / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="another tokenizer"):
        measure_gates(tiny_model, {"run": run}, sequences=given_sequences, device="cpu")


def test_another_vocabulary_is_refused_by_the_command_and_leaves_nothing(
    tiny_model: Path,
    tuned: Path,
    given_sequences: Path,
    tmp_path: Path,
    command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = copy_of(tuned, tmp_path / "run")
    weights = load_file(run / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, table[:4]])
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    for file in run.glob("tokenizer*"):
        file.unlink()
    out = tmp_path / "out"
    assert command("gates", tiny_model, run, "--sequences", given_sequences, "--out", out) == 2
    assert "the vocabularies differ" in capfd.readouterr().err
    assert list(out.iterdir()) == []


def test_what_to_measure_on_is_said_once(tiny_model: Path, tuned: Path, given_sequences: Path) -> None:
    for ground in ({}, {"task": "add", "sequences": given_sequences}):
        with pytest.raises(ArgumentError, match="one of prompts, task and sequences"):
            measure_gates(tiny_model, {"run": tuned}, **ground)
    for odd, match in (
        ({"batches": 0}, "batches is 0"),
        ({"batches": "2"}, "batches is '2': give a whole number"),
        ({"density": "0.5"}, "density is '0.5'"),
        ({"draw": 1}, "there is no option 'draw': did you mean draws"),
    ):
        with pytest.raises(ArgumentError, match=match):
            measure_gates(tiny_model, {"run": tuned}, task="add", **odd)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="no task 'nope'"):
        measure_gates(tiny_model, {"run": tuned}, task="add,nope@2", device="cpu")
    with pytest.raises(ModelError, match="attn_implementation='nonesuch'"):
        measure_gates(tiny_model, {"run": tuned}, task="add", attention="nonesuch", device="cpu")
    with pytest.raises(ModelError, match="choose attn_implementation='eager'"):
        measure_gates(tiny_model, {"run": tuned}, sequences=given_sequences, attention="sdpa", device="cpu")


def test_token_ids_need_no_tokenizer(
    tiny_model: Path, tuned: Path, given_sequences: Path, tmp_path: Path, base: LanguageModel
) -> None:
    """Neither beside the base nor beside the run; text does."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, bare)
    texts = [json.loads(line) for line in given_sequences.read_text().splitlines()]
    ids = [one.get("input_ids") or base.tokenizer(one["text"]).input_ids for one in texts]
    listed, text = tmp_path / "ids.jsonl", tmp_path / "text.jsonl"
    listed.write_text("".join(json.dumps({"input_ids": each}) + "\n" for each in ids))
    text.write_text('{"text": "2+2"}\n')
    options: dict[str, Any] = {"per_layer": False, "draws": 1, "device": "cpu"}
    with_one = measure_gates(tiny_model, {"run": tuned}, sequences=listed, **options).runs["run"]
    without = measure_gates(bare, {"run": tuned}, sequences=listed, **options).runs["run"]
    assert with_one["kl_cumulative"] == without["kl_cumulative"] and with_one["curvature"] == without["curvature"]
    with pytest.raises(ModelError, match=r"line 1 of .* is text, and the model has no usable tokenizer"):
        measure_gates(bare, {"run": tuned}, sequences=text, **options)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        measure_gates(bare, {"run": tuned}, task="add", **options)
