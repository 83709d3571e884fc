"""LoRA methods: the update starts at zero, off_principal never enters the principal subspaces, and what is saved is
plain LoRA for the original base."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

import offprincipal
from offprincipal.adapter_methods import ADAPTER_METHODS, LOW_RANK
from offprincipal.adapters import adapt, initialisations
from offprincipal.adapters.initialisations import Start, StartSettings
from offprincipal.adapters.off_principal import ProjectedFactor, principal_subspaces
from offprincipal.adapters.record import RECORD, WEIGHTS
from offprincipal.errors import AdapterError
from offprincipal.geometry import principal
from offprincipal.geometry.principal import principal_rank
from offprincipal.geometry.spectrum import decompose
from offprincipal.geometry.subspace import principal_energies
from offprincipal.models import open_language_model
from offprincipal.models.opening import hash_of

RANK = 4
TOKENS = torch.randint(3, 20, (6, 9), generator=torch.Generator().manual_seed(1))
LOAD_WITH_PEFT_ALONE = """
import sys
sys.modules["offprincipal"] = None
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, out, *folders = sys.argv[1:]
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder)
    tokens = torch.load(out + ".tokens", weights_only=True)
    found[folder] = model(input_ids=tokens).logits.detach()
    found[folder + ".merged"] = model.merge_and_unload()(input_ids=tokens).logits.detach()
save_file(found, out)
"""


def opened(source: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits.detach()
    return found


def fit(model: Any, steps: int, optimizer: Callable[..., Any] = torch.optim.AdamW, lr: float = 1e-2) -> None:
    steps_of = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        steps_of.step()
        steps_of.zero_grad()


def pairs(adapted: Any, base: Any) -> list[tuple[Tensor, Tensor]]:
    """The base and the update of every adapted matrix, float64."""
    layers = {name: module for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return [
        (base.get_submodule(name).weight.detach().double(), layer.get_delta_weight("default").detach().double())
        for name, layer in layers.items()
    ]


def energies(W: Tensor, update: Tensor) -> tuple[float, float]:
    """One-sided shares of an update in the principal subspaces, left and right."""
    svd, k = decompose(W), principal_rank(W.shape, 0.125)
    found = principal_energies(svd.U[:, :k], svd.Vh[:k].T, update)
    assert found is not None
    return found[1], found[2]


def matrix(n: int, m: int, seed: int = 0) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Every method after a few steps: where its adapter was saved, and the logits it had."""
    found = {}
    for method in LOW_RANK:
        adapted = adapt(opened(tiny_model), method, rank=RANK, alpha=8)
        fit(adapted, 5)
        folder = tmp_path_factory.mktemp(method)
        adapted.save_pretrained(folder)
        found[method] = folder, logits(adapted)
    return found


class TestTheStart:
    @pytest.mark.parametrize("method", LOW_RANK)
    def test_the_update_is_zero_and_the_base_is_as_it_was(self, method: str, tiny_model: Path) -> None:
        base = opened(tiny_model)
        before = hash_of(base.state_dict())
        expected = logits(base)
        adapted = adapt(base, method, rank=RANK)
        torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=2e-6)
        fit(adapted, 3)
        assert (logits(adapted) - expected).abs().max() > 1e-3
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), expected)
        assert hash_of(adapted.unload().state_dict()) == before

    @pytest.mark.parametrize("method", ["pissa", "olora", "mica"])
    def test_the_training_is_that_of_peft(self, method: str, tiny_model: Path) -> None:
        theirs = get_peft_model(
            opened(tiny_model),
            LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=method),
        )
        ours = adapt(opened(tiny_model), method, rank=RANK, alpha=8, target_modules=["q_proj", "down_proj"])
        for model in (theirs, ours):
            fit(model, 4, torch.optim.SGD, 0.05)
        moved = (logits(theirs) - logits(opened(tiny_model))).abs().max()
        assert moved > 1e-4
        assert (logits(ours) - logits(theirs)).abs().max() < 1e-2 * moved

    @pytest.mark.parametrize("method", LOW_RANK)
    def test_as_many_weights_are_trained_as_by_lora_or_a_alone(self, method: str) -> None:
        layers = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 24))
        adapted = adapt(layers, method, rank=2)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trained == 2 * (32 + 16) + (0 if method == "mica" else 2 * (16 + 24))

    def test_the_seed_decides_and_the_callers_generator_does_not_move(self) -> None:
        layers = nn.Sequential(nn.Linear(16, 16))
        state = torch.get_rng_state()
        starts = [adapt(copy.deepcopy(layers), "lora", rank=2, seed=seed).state_dict() for seed in (0, 0, 1)]
        assert torch.equal(torch.get_rng_state(), state)
        name = "base_model.model.0.lora_A.default.weight"
        assert torch.equal(starts[0][name], starts[1][name])
        assert not torch.equal(starts[0][name], starts[2][name])


class WrittenThroughData(torch.optim.SGD):
    """A step that torch's version counters do not see, as of optimizers that keep their weights elsewhere."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(group["lr"] * parameter.grad)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "data": lambda p: WrittenThroughData(p, lr=1e-2),
}


class TestReading:
    """A monitor, an evaluation or a rollout reads an adapted model between any two things that a trainer does."""

    def train(
        self, source: Path, method: str, optimizer: str, checkpointing: bool, read: bool
    ) -> tuple[Any, list[Any]]:
        adapted = adapt(opened(source).train(), method, rank=RANK)
        if checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        steps = OPTIMIZERS[optimizer]([p for p in adapted.parameters() if p.requires_grad])
        seen = []
        for _ in range(3):
            adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
            for move in (steps.step, steps.zero_grad):
                if read:
                    with torch.no_grad():
                        seen.append((logits(adapted), logits(copy.deepcopy(adapted))))
                move()
        if read:
            with torch.no_grad():
                seen.append((logits(adapted), logits(copy.deepcopy(adapted))))
        return adapted, seen

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("method", LOW_RANK)
    def test_it_sees_the_present_and_changes_nothing(
        self, method: str, optimizer: str, checkpointing: bool, tiny_model: Path
    ) -> None:
        watched, seen = self.train(tiny_model, method, optimizer, checkpointing, True)
        alone, _ = self.train(tiny_model, method, optimizer, checkpointing, False)
        assert hash_of(watched.state_dict()) == hash_of(alone.state_dict())
        assert all(torch.equal(*both) for both in seen)
        moved = [(a[0] - b[0]).abs().max() > 0 for a, b in zip(seen[1::2], seen[::2], strict=False)]
        assert all(moved)


class TestInitialisations:
    SETTINGS = StartSettings(rank=3, scale=2.0, rank_fraction=0.25, density=0.5)

    def start(self, method: str, W: Tensor) -> Start:
        start: Start = ADAPTER_METHODS[method].code()(W, self.SETTINGS)
        return start

    @pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
    def test_pissa_starts_at_the_best_approximation_and_milora_at_the_least_part(self, shape: tuple[int, int]) -> None:
        W = matrix(*shape)
        svd = decompose(W)
        pissa, milora = self.start("pissa", W), self.start("milora", W)
        best = (svd.U[:, :3] * svd.S[:3]) @ svd.Vh[:3]
        least = (svd.U[:, -3:] * svd.S[-3:]) @ svd.Vh[-3:]
        torch.testing.assert_close(2.0 * (pissa.B @ pissa.A).double(), best, rtol=0, atol=1e-5)
        torch.testing.assert_close(2.0 * (milora.B @ milora.A), least)
        torch.testing.assert_close(milora.B.T @ milora.B, milora.A @ milora.A.T)  # √Σ in either

    @pytest.mark.parametrize(("method", "which"), [("rlpo", slice(0, 3)), ("rlmo", slice(-3, None))])
    @pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
    def test_rlpo_and_rlmo_start_at_orthonormal_right_singular_vectors(
        self, method: str, which: slice, shape: tuple[int, int]
    ) -> None:
        W = matrix(*shape)
        start = self.start(method, W)
        assert not start.B.any() and not ADAPTER_METHODS[method].from_the_base
        torch.testing.assert_close(start.A @ start.A.T, torch.eye(3).double())
        torch.testing.assert_close(torch.linalg.vector_norm(W @ start.A.T, dim=0), decompose(W).S[which])

    def test_mica_trains_a_over_the_least_left_singular_vectors(self) -> None:
        W = matrix(12, 20)
        start = self.start("mica", W)
        assert start.train_a_only and not start.A.any()
        outside = start.B.double() - decompose(W).U[:, -3:] @ (decompose(W).U[:, -3:].T @ start.B.double())
        assert outside.abs().max() < 1e-5

    def test_geora_starts_at_the_best_approximation_of_the_safe_part(self) -> None:
        W = matrix(16, 24)
        svd = decompose(W)
        score = ((svd.U[:, :4] * svd.S[:4]) @ svd.Vh[:4]).abs()
        half = W.numel() // 2
        principal, low = torch.zeros(W.numel(), dtype=torch.bool), torch.zeros(W.numel(), dtype=torch.bool)
        principal[score.flatten().topk(half).indices] = True
        low[W.abs().flatten().topk(half, largest=False).indices] = True
        safe = decompose(W * (low | ~principal).view_as(W))
        start = self.start("geora", W)
        torch.testing.assert_close(2.0 * (start.B @ start.A), (safe.U[:, :3] * safe.S[:3]) @ safe.Vh[:3])

    @pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
    def test_large_matrices_are_decomposed_alike(self, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
        W = matrix(*shape)
        exact = initialisations.top_triplets(W, 5), initialisations.bottom_triplets(W, 5), principal_subspaces(W, 5)
        monkeypatch.setattr(principal, "EXACT_UP_TO", 8)
        large = initialisations.top_triplets(W, 5), initialisations.bottom_triplets(W, 5), principal_subspaces(W, 5)
        for i in (0, 1):
            torch.testing.assert_close(large[i].S, exact[i].S)
            torch.testing.assert_close((large[i].U * large[i].S) @ large[i].Vh, (exact[i].U * exact[i].S) @ exact[i].Vh)
        for ours, lapack in zip(large[2], exact[2], strict=True):
            torch.testing.assert_close(ours @ ours.T, lapack @ lapack.T)


class TestOffPrincipal:
    @pytest.mark.parametrize(
        ("optimizer", "lr"), [(torch.optim.AdamW, 1e-2), (torch.optim.SGD, 0.5)], ids=["adamw", "sgd"]
    )
    @pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-25), (torch.float32, 1e-11)])
    def test_no_optimizer_moves_the_update_into_the_principal_subspaces(
        self, optimizer: Any, lr: float, dtype: torch.dtype, most: float, tiny_model: Path, tmp_path: Path
    ) -> None:
        adapted = adapt(opened(tiny_model, dtype), "off_principal", rank=RANK)
        fit(adapted, 20, optimizer, lr)
        base = opened(tiny_model, dtype)
        assert max(max(energies(W, update)) for W, update in pairs(adapted, base)) < most
        assert min(update.norm() / W.norm() for W, update in pairs(adapted, base)) > 1e-5
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(opened(tiny_model, torch.float64), tmp_path)
        assert max(max(energies(W, update)) for W, update in pairs(loaded, base)) < min(most, 1e-12)

    def test_the_update_of_lora_does_enter_them(self, tiny_model: Path) -> None:
        adapted = adapt(opened(tiny_model), "lora", rank=RANK)
        fit(adapted, 20)
        assert min(min(energies(W, update)) for W, update in pairs(adapted, opened(tiny_model))) > 1e-3

    @given(n=st.integers(2, 12), m=st.integers(2, 12), r=st.integers(1, 4), seed=st.integers(0, 99))
    def test_a_projected_factor_is_orthogonal_and_so_are_its_gradients(self, n: int, m: int, r: int, seed: int) -> None:
        k = 1
        U, V = principal_subspaces(matrix(n, m, seed), k)
        A, B = ProjectedFactor(matrix(r, m, seed), V, "right"), ProjectedFactor(matrix(n, r, seed), U, "left")
        assert (A.weight @ V).abs().max() < 1e-12 and (U.T @ B.weight).abs().max() < 1e-12
        (B.weight @ A.weight).square().sum().backward()
        assert (A.trained.grad @ V).abs().max() < 1e-9 and (U.T @ B.trained.grad).abs().max() < 1e-9
        again = ProjectedFactor(A.trained_of(A.state_dict()["weight"]), V, "right")
        torch.testing.assert_close(again.weight, A.weight)

    @pytest.mark.parametrize("method", ["off_principal", "pissa"])
    def test_a_rollout_sees_every_step_of_the_optimizer(self, method: str, tiny_model: Path) -> None:
        adapted = adapt(opened(tiny_model), method, rank=RANK)
        seen = []
        for _ in range(3):
            with torch.no_grad():
                rollout = logits(adapted), logits(adapted)
            assert torch.equal(*rollout)
            assert torch.equal(rollout[0], logits(adapted))
            seen.append(rollout[0])
            fit(adapted, 1)
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])

    def test_a_forward_pass_projects_each_factor_once_and_sees_every_move(
        self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapted = adapt(opened(tiny_model), "off_principal", rank=RANK)
        factors = [module for module in adapted.modules() if isinstance(module, ProjectedFactor)]
        projected, project = [], ProjectedFactor.effective

        def counted(factor: ProjectedFactor, trained: Tensor) -> Tensor:
            projected.append(factor)
            return project(factor, trained)

        monkeypatch.setattr(ProjectedFactor, "effective", counted)
        seen = []
        for _ in range(3):
            projected.clear()
            seen.append(logits(adapted))
            assert sorted(map(id, projected)) == sorted(map(id, factors))
            for factor in factors:
                factor.trained.data.add_(torch.ones_like(factor.trained).tril())  # which no version counts
        assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])

    def test_forward_mode_derivatives_pass_through_the_projection(self) -> None:
        V = principal_subspaces(matrix(12, 20), 3)[1]
        factor = ProjectedFactor(matrix(2, 20), V, "right")
        x, along = matrix(5, 20, 1), matrix(2, 20, 2)
        with torch.no_grad():
            factor(x)
            _, derivative = torch.func.jvp(
                lambda weight: torch.func.functional_call(factor, {"trained": weight}, x),
                (factor.trained.data,),
                (along,),
            )
        torch.testing.assert_close(derivative, x @ (along - along @ V @ V.T).T)

    def test_low_precision_training_projects_in_float32(self) -> None:
        W = matrix(48, 64)
        V = principal_subspaces(W, 6)[1]
        factor = ProjectedFactor(matrix(4, 64).float(), V, "right").bfloat16().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            leak = (factor.weight.double() @ V).norm() / factor.weight.norm()
        assert leak < 1e-6
        assert factor.basis.dtype == torch.float32

    def test_without_a_gap_there_is_no_principal_subspace(self) -> None:
        with pytest.raises(AdapterError, match="0: singular values 1 and 2 are equal"):
            adapt(nn.Sequential(nn.Linear(8, 8), nn.Identity()).apply(identity), rank=2)

    def test_compare_finds_no_principal_energy_in_the_saved_adapter(
        self, saved: dict[str, tuple[Path, Tensor]], tiny_model: Path, tmp_path: Path
    ) -> None:
        tuned = [saved[method][0] for method in ("off_principal", "lora")]
        found = offprincipal.compare(tiny_model, tuned, out=tmp_path / "out")
        rows = found.matrices
        names = ("principal_energy_left", "principal_energy_right")
        ours, plain = (
            [row[name] for row in rows if row["run"] == folder.name and row["update_norm"] for name in names]
            for folder in tuned
        )
        assert max(ours) <= 1e-10
        assert min(plain) > 1e-3


def identity(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.eye_(module.weight)


class TestWhatIsSaved:
    def test_peft_alone_loads_and_merges_it(
        self, saved: dict[str, tuple[Path, Tensor]], tiny_model: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "logits.safetensors"
        torch.save(TOKENS, f"{out}.tokens")
        folders = [str(folder) for folder, _ in saved.values()]
        command = [sys.executable, "-c", LOAD_WITH_PEFT_ALONE, str(tiny_model), str(out), *folders]
        subprocess.run(command, check=True, capture_output=True)
        found = load_file(out)
        for method, (folder, expected) in saved.items():
            for name in (str(folder), f"{folder}.merged"):
                assert (found[name] - expected).abs().max() < 1e-5, method

    @pytest.mark.parametrize("method", LOW_RANK)
    def test_its_settings_and_tensors_are_those_of_lora(
        self, method: str, saved: dict[str, tuple[Path, Tensor]]
    ) -> None:
        folder, _ = saved[method]
        config = json.loads((folder / "adapter_config.json").read_text())
        plain = LoraConfig(r=1).to_dict()
        assert config.keys() == plain.keys()
        wider = 2 if ADAPTER_METHODS[method].from_the_base else 1
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (wider * RANK, wider * 8, True)
        tensors = load_file(folder / WEIGHTS)
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in tensors)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert all(wider * RANK in tensor.shape for tensor in tensors.values())

    @pytest.mark.parametrize("method", LOW_RANK)
    def test_it_is_resumed_as_it_was(
        self, method: str, saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
    ) -> None:
        folder, expected = saved[method]
        resumed = adapt(opened(tiny_model), method, rank=RANK, alpha=8, resume=folder)
        torch.testing.assert_close(logits(resumed), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("method", ["off_principal", "pissa", "mica"])
    def test_training_goes_on_as_if_it_had_not_stopped(self, method: str, tiny_model: Path, tmp_path: Path) -> None:
        whole, half = (adapt(opened(tiny_model, torch.float64), method, rank=RANK) for _ in range(2))
        fit(whole, 6, torch.optim.SGD, 0.1)
        fit(half, 3, torch.optim.SGD, 0.1)
        half.save_pretrained(tmp_path)
        resumed = adapt(opened(tiny_model, torch.float64), method, rank=RANK, resume=tmp_path)
        fit(resumed, 3, torch.optim.SGD, 0.1)
        torch.testing.assert_close(logits(resumed), logits(whole), rtol=0, atol=1e-9)

    def test_a_merged_model_is_a_plain_model(self, tiny_model: Path, tmp_path: Path) -> None:
        adapted = adapt(opened(tiny_model), "off_principal", rank=RANK)
        fit(adapted, 3)
        expected = logits(adapted)
        merged = adapted.merge_and_unload()
        assert not any("lora" in name for name in merged.state_dict())
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(opened(tmp_path)), expected, rtol=0, atol=1e-5)
        adapt(merged, "pissa", rank=RANK)


class TestRefused:
    def test_a_name_alone_is_an_ending_as_in_a_list(self, tiny_model: Path) -> None:
        def adapted(asked: str | list[str]) -> list[str]:
            model = adapt(opened(tiny_model), target_modules=asked)
            return sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A"))

        modules = [adapted(asked) for asked in ("q_proj", ["q_proj"], r".*\.q_proj")]
        assert modules[0] and modules[0] == modules[1] == modules[2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "dora"}, "no method 'dora': did you mean lora"),
            ({"rank": 0}, "rank is 0"),
            ({"method": "pissa", "rank": 17}, r"rank 17 is above min\(n, m\) = 16 of model.layers.0.self_attn.k_proj"),
            ({"rank": 15}, "above the 14 dimensions of model.layers.0.self_attn.k_proj"),
            ({"alpha": -1.0}, "alpha is -1.0"),
            ({"dropout": 1.0}, "dropout is 1.0"),
            ({"rank_fraction": 1.0}, "rank_fraction is 1.0"),
            ({"method": "geora", "density": 0.0}, "density is 0.0"),
            ({"target_modules": ["q_proj", "w_proj"]}, "no module is named 'w_proj'; linear layers are such as"),
            ({"target_modules": "w_proj"}, "no module is named 'w_proj'"),
            ({"target_modules": "*.q_proj"}, "for every name that ends so give 'q_proj'"),
            ({"target_modules": 3}, "target_modules is 3"),
            ({"method": "pissa", "density": 0.2}, "pissa has no setting density: it has rank, alpha, dropout"),
            ({"method": "lora", "rank_fraction": 0.3}, "lora has no setting rank_fraction"),
            ({"method": ["lora"]}, "no method"),
            ({"alpha": "16"}, "alpha is '16': give a number"),
            ({"dropout": None}, "dropout is None: give a number"),
            ({"seed": "a"}, "seed is 'a': give a whole number"),
            ({"r": 4}, "r is called rank here"),
            ({"ranks": 4}, "ranks is no setting"),
            ({"target_modules": "("}, "not a regular expression"),
            ({"target_modules": []}, r"target_modules is \[\]"),
            ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is Embedding; off_principal covers nn.Linear"),
            ({"target_modules": ["norm"], "method": "lora"}, "model.norm is Qwen3RMSNorm; lora covers nn.Linear"),
        ],
    )
    def test_settings_that_cannot_be(self, arguments: dict[str, Any], message: str, tiny_model: Path) -> None:
        model = opened(tiny_model)
        before = hash_of(model.state_dict())
        with pytest.raises(AdapterError, match=message):
            adapt(model, **arguments)
        assert hash_of(model.state_dict()) == before

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.ones(8, 8, dtype=torch.int8), "0 .Linear. is quantised, its weights are torch.int8"),
            (torch.ones(8, 8).to(torch.float8_e4m3fn), "is quantised, its weights are torch.float8_e4m3fn"),
            (torch.full((8, 8), torch.nan), "the weights of 0 hold NaN"),
            (torch.ones(8, 8, device="meta"), "the weights of 0 are not loaded"),
        ],
    )
    def test_weights_that_cannot_be_decomposed(self, weight: Tensor, message: str) -> None:
        layers = nn.Sequential(nn.Linear(8, 8))
        layers[0].weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(AdapterError, match=message):
            adapt(layers, "pissa", rank=2)
        assert type(layers[0]) is nn.Linear

    def test_transposed_layers_but_by_lora(self, tmp_path: Path) -> None:
        def gpt2() -> Any:
            torch.manual_seed(0)
            return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()

        with pytest.raises(AdapterError, match=r"transformer.h.0.attn.c_attn is Conv1D; milora covers nn.Linear"):
            adapt(gpt2(), "milora", rank=2)
        targets = ["c_attn", "wte"]
        adapted = adapt(gpt2(), "lora", rank=2, target_modules=targets)
        fit(adapted, 2)
        adapted.save_pretrained(tmp_path)
        resumed = adapt(gpt2(), "lora", rank=2, target_modules=targets, resume=tmp_path)
        assert torch.equal(logits(resumed), logits(adapted))

    def test_an_embedding_but_by_lora(self, tiny_model: Path, tmp_path: Path) -> None:
        targets = ["embed_tokens", "q_proj"]
        adapted = adapt(opened(tiny_model), "lora", rank=2, target_modules=targets)
        fit(adapted, 2)
        adapted.save_pretrained(tmp_path)  # PEFT puts the embedding itself beside it
        resumed = adapt(opened(tiny_model), "lora", rank=2, target_modules=targets, resume=tmp_path)
        assert torch.equal(logits(resumed), logits(adapted))

    @pytest.mark.parametrize("method", ["pissa", "milora", "geora"])
    def test_a_part_of_the_base_that_is_zero(self, method: str) -> None:
        layers = nn.Sequential(nn.Linear(8, 8))
        nn.init.zeros_(layers[0].weight)
        with pytest.raises(AdapterError, match="both factors of 0 at zero, so that neither would ever get a gradient"):
            adapt(layers, method, rank=2)

    def test_a_model_that_is_compiled_or_wrapped(self) -> None:
        layers = nn.Sequential(nn.Linear(8, 8))
        for wrapped in (torch.compile(layers), nn.DataParallel(layers)):
            with pytest.raises(AdapterError, match="adapt the one inside, then compile or wrap"):
                adapt(wrapped, "lora", rank=2)

    def test_a_layer_alone(self) -> None:
        with pytest.raises(AdapterError, match="holds no linear layer inside"):
            adapt(nn.Linear(32, 32))

    def test_a_projection_that_is_never_called(self, caplog: pytest.LogCaptureFixture) -> None:
        block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        with pytest.raises(AdapterError, match=r"self_attn\.out_proj belongs to nn.MultiheadAttention"):
            adapt(block, "lora", rank=2, target_modules=["self_attn.out_proj"])
        adapted = adapt(block, "lora", rank=2)
        assert {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")} == {
            "linear1",
            "linear2",
        }
        assert "2 parameters with 1024 entries are not covered, the first self_attn.in_proj_weight" in caplog.text

    def test_a_model_that_has_an_adapter(self) -> None:
        adapted = adapt(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2)
        with pytest.raises(AdapterError, match="has an adapter already"):
            adapt(adapted, "lora", rank=2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 3}, "was made with rank 4, not 3"),
            ({"alpha": 9}, "was made with alpha 8.0, not 9.0"),
            ({"method": "lora"}, "was made with method off_principal, not lora"),
            ({"rank_fraction": 0.25}, "was made with rank_fraction 0.125, not 0.25"),
            ({"target_modules": ["q_proj"]}, "is on other modules"),
        ],
    )
    def test_an_adapter_of_other_settings(
        self, arguments: dict[str, Any], message: str, saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
    ) -> None:
        model = opened(tiny_model)
        before = hash_of(model.state_dict())
        asked = {"method": "off_principal", "rank": RANK, "alpha": 8, **arguments}
        with pytest.raises(AdapterError, match=message):
            adapt(model, resume=saved["off_principal"][0], **asked)
        assert hash_of(model.state_dict()) == before

    def test_an_adapter_of_another_base_or_a_damaged_one(
        self, saved: dict[str, tuple[Path, Tensor]], tiny_model: Path, tmp_path: Path
    ) -> None:
        folder, _ = saved["pissa"]
        other = opened(tiny_model)
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        with pytest.raises(AdapterError, match="was made for another base"):
            adapt(other, "pissa", rank=RANK, alpha=8, resume=folder)

        def resume() -> None:
            adapt(opened(tiny_model), "pissa", rank=RANK, alpha=8, resume=tmp_path)

        with pytest.raises(AdapterError, match=RECORD):
            resume()
        (tmp_path / RECORD).write_text((folder / RECORD).read_text())
        (tmp_path / WEIGHTS).write_bytes(b"not safetensors")
        with pytest.raises(AdapterError, match="cannot be read"):
            resume()
        tensors = load_file(folder / WEIGHTS)
        first, *rest = sorted(tensors)
        save_file({name: tensors[name] for name in rest}, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match=f"{first} in {WEIGHTS} is absent"):
            resume()
        save_file(tensors | {first: tensors[first] + 1}, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match="started from other values"):
            resume()


def test_a_classification_head_is_left_as_the_output_head_is() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    adapted = adapt(LlamaForSequenceClassification(config), "off_principal", rank=2)
    covered = {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(covered) == 7 and "score" not in covered


def test_stacked_experts_are_said_not_to_be_covered(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Module()
    model.q_proj = nn.Linear(16, 16)
    model.experts = nn.ParameterDict({"gate_up_proj": torch.ones(3, 8, 6), "down_proj": torch.ones(3, 6, 4)})
    adapt(model, "lora", rank=2)
    assert "2 parameters with 216 entries are not covered, the first experts." in caplog.text


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_further_adapter_starts_at_zero_and_is_of_the_same_kind(method: str, tiny_model: Path) -> None:
    adapted = adapt(opened(tiny_model), method, rank=RANK)
    fit(adapted, 3)
    adapted.add_adapter("fresh", adapted.peft_config["default"])
    adapted.set_adapter("fresh")
    torch.testing.assert_close(logits(adapted), logits(opened(tiny_model)), rtol=0, atol=2e-6)
    fit(adapted, 3)
    assert (logits(adapted) - logits(opened(tiny_model))).abs().max() > 1e-3
    for layer in (module for module in adapted.modules() if hasattr(module, "lora_A")):
        for factors in (layer.lora_A, layer.lora_B):
            assert type(factors["fresh"]) is type(factors["default"])
        if method == "off_principal":
            update = layer.get_delta_weight("fresh").detach().double()
            assert max(energies(layer.base_layer.weight.detach().double(), update)) <= 1e-10
    if method != "lora":
        wider = copy.deepcopy(adapted.peft_config["default"])
        wider.r += 1
        with pytest.raises(AdapterError, match="has the rank of the first"):
            adapted.add_adapter("wider", wider)


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_peft_weighs_adapters_as_it_weighs_its_own(method: str, kind: str, tiny_model: Path) -> None:
    adapted = adapt(opened(tiny_model), method, rank=RANK)
    fit(adapted, 3)
    adapted.add_weighted_adapter(["default"], [0.5], "mixed", combination_type=kind)
    for layer in (module for module in adapted.modules() if hasattr(module, "lora_A")):
        whole, half = (layer.get_delta_weight(name).detach() for name in ("default", "mixed"))
        assert whole.norm() > 0
        torch.testing.assert_close(half, whole / 2, rtol=0, atol=1e-5)


def test_the_benchmark_times_a_step_and_a_rollout(tiny_model: Path) -> None:
    benchmark = Path(__file__).parents[1] / "benchmarks" / "adapters.py"
    sizes = ["--rounds", "1", "--batch", "2", "--length", "4", "--rank", "2", "--methods", "off_principal"]
    command = [sys.executable, str(benchmark), "--model", str(tiny_model), *sizes]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = printed.strip().splitlines()[-1]
    assert row.startswith("| 2 × 4 | off_principal | ") and row.count("**") == 4


def trainer(model: Any, out: Path, steps: int = 4) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("method", ["off_principal", "geora"])
def test_a_trainer_trains_saves_and_resumes_it(method: str, tiny_model: Path, tmp_path: Path) -> None:
    whole = adapt(opened(tiny_model), method, rank=RANK)
    trainer(whole, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / RECORD).exists() and (checkpoint / "adapter_config.json").exists()
    resumed = adapt(opened(tiny_model), method, rank=RANK)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(logits(resumed), logits(whole), rtol=0, atol=1e-4)
    loaded = PeftModel.from_pretrained(opened(tiny_model), tmp_path / "whole" / "checkpoint-4")
    torch.testing.assert_close(logits(loaded), logits(whole), rtol=0, atol=1e-5)
    if method == "off_principal":
        assert max(max(energies(W, update)) for W, update in pairs(loaded, opened(tiny_model))) <= 1e-10


@pytest.mark.parametrize("method", ["off_principal", "pissa", "mica", "rlmo"])
def test_trl_trains_it_against_its_own_start(method: str, tiny_model: Path, tmp_path: Path) -> None:
    base = open_language_model(tiny_model, "cpu")
    adapted = adapt(base.model, method, rank=RANK)
    trainer = GRPOTrainer(
        model=adapted,
        reward_funcs=lambda completions, **_: [float(len(completion) % 3) for completion in completions],
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(4)]),
        processing_class=base.tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=6,
            learning_rate=1e-1,
            beta=0.1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    divergences = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert abs(divergences[0]) < 1e-6 < divergences[1]
    adapted.eval().set_adapter("ref")
    torch.testing.assert_close(logits(adapted), logits(opened(tiny_model)), rtol=0, atol=2e-6)
    adapted.set_adapter("default")
    adapted.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(opened(tiny_model), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=0, atol=1e-5)
