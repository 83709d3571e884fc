"""Polar factors are what Fan and Hoffman say, and isospectral training moves the frames and no singular value."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, orthogonal, seeds
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from offprincipal.adapters import Isospectral, IsospectralAdamW, IsospectralMuon
from offprincipal.errors import AdapterError
from offprincipal.geometry.polar import newton_schulz, orthogonality_error, polar_factor, tangent
from offprincipal.geometry.spectrum import spectral_shift
from offprincipal.models import open_language_model

RETRACTIONS = ("svd", "newton-schulz")
tall = st.tuples(st.integers(2, 12), st.integers(1, 6)).map(lambda s: (max(s), min(s)))


# --- the polar factor ---


@given(tall, seeds)
def test_a_polar_factor_is_orthonormal_and_leaves_a_symmetric_positive_rest(shape: tuple[int, int], seed: int) -> None:
    X = gaussian(*shape, seed=seed)
    Q = polar_factor(X)
    rest = Q.T @ X
    assert orthogonality_error(Q) < 1e-12
    assert torch.allclose(rest, rest.T, atol=1e-10) and torch.linalg.eigvalsh(rest).min() > -1e-10


@given(tall, seeds)
def test_a_polar_factor_turns_with_the_matrix(shape: tuple[int, int], seed: int) -> None:
    n, r = shape
    X = orthogonal(n, seed)[:, :r] + 0.1 * gaussian(n, r, seed=seed + 1)  # of full rank, so that the factor is unique
    left, right = orthogonal(n, seed + 2), orthogonal(r, seed + 3)
    assert torch.allclose(polar_factor(left @ X @ right), left @ polar_factor(X) @ right, atol=1e-9)


@given(tall, seeds, st.floats(1e-8, 0.05))
def test_newton_schulz_finds_the_polar_factor_near_orthonormal_matrices(
    shape: tuple[int, int], seed: int, size: float
) -> None:
    n, r = shape
    X = orthogonal(n, seed)[:, :r] + size * gaussian(n, r, seed=seed + 1)
    assert torch.allclose(newton_schulz(X), polar_factor(X), atol=1e-12)
    single = newton_schulz(X.float())
    assert single.dtype == torch.float32 and orthogonality_error(single.double()) < 1e-6


def test_far_from_orthonormal_newton_schulz_leaves_it_to_lapack() -> None:
    X = 50 * gaussian(9, 4, seed=0)
    assert torch.equal(newton_schulz(X), polar_factor(X))


@given(tall, seeds)
def test_a_tangent_stretches_no_column(shape: tuple[int, int], seed: int) -> None:
    n, r = shape
    X, G = orthogonal(n, seed)[:, :r], gaussian(n, r, seed=seed + 1)
    along = X.T @ tangent(X, G)
    assert torch.allclose(along, -along.T, atol=1e-12)
    assert torch.allclose(tangent(X, tangent(X, G)), tangent(X, G), atol=1e-12)


# --- training ---


def build(kind: str, params: Any, lr: float = 1e-2) -> Isospectral:
    if kind == "muon":
        return IsospectralMuon(params, lr=lr)
    return IsospectralAdamW(params, lr=lr, retraction=kind)  # type: ignore[arg-type]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"q_proj": nn.Linear(24, 16), "up_proj": nn.Linear(16, 40), "lm_head": nn.Linear(40, 5)})


def forward(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model["lm_head"](torch.tanh(model["up_proj"](torch.tanh(model["q_proj"](x)))))
    return found


def train(model: nn.Module, optimizer: Isospectral, steps: range) -> list[float]:
    """Steps on a fixed target; the loss before each."""
    losses = []
    for step in steps:
        x = gaussian(32, 24, seed=step % 4).float()
        loss = (forward(model, x) - x[:, :5].cumsum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", [*RETRACTIONS, "muon"])
def test_training_moves_the_frames_and_no_singular_value(kind: str) -> None:
    model: Any = small_model()
    before = {name: model[name].weight.detach().clone() for name in model}
    losses = train(model, build(kind, model), range(120))
    assert losses[-1] < 0.5 * losses[0]
    for name in ("q_proj", "up_proj"):
        W0, W1 = before[name].double(), model[name].weight.detach().double()
        shift = spectral_shift(torch.linalg.svdvals(W0), torch.linalg.svdvals(W1))
        assert shift is not None and shift <= 1e-6
        assert (W1 - W0).norm() > 0.05 * W0.norm()
    free = model["lm_head"].weight.detach()
    assert spectral_shift(torch.linalg.svdvals(before["lm_head"]), torch.linalg.svdvals(free)) > 1e-3  # type: ignore[operator]


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_it_finds_a_matrix_of_the_same_spectrum(retraction: str) -> None:
    W = nn.Parameter(gaussian(20, 12, seed=0).float())
    angle = 0.1 * (gaussian(12, 12, seed=1) - gaussian(12, 12, seed=1).T)
    target = W.detach() @ torch.matrix_exp(angle).float()
    optimizer = build(retraction, [W], lr=0.1)
    annealed = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    distances = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = (W - target).square().sum()
        loss.backward()
        optimizer.step()
        annealed.step()
        distances.append(loss.item())
    assert distances[-1] < 1e-3 * distances[0]


def test_everything_else_is_trained_as_adamw_trains_it() -> None:
    model: Any = small_model()
    others = [p for name, p in model.named_parameters() if name.endswith("bias")]
    twins = [nn.Parameter(p.detach().clone()) for p in others]
    ours = IsospectralAdamW(model, lr=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        train(model, ours, range(step, step + 1))
        for p, twin in zip(others, twins, strict=True):
            twin.grad = None if p.grad is None else p.grad.clone()
        plain.step()
    for p, twin in zip(others, twins, strict=True):
        assert torch.equal(p, twin)


def test_a_model_its_named_parameters_and_the_chosen_weights_are_trained_alike() -> None:
    def trained(given: Callable[[Any], Any]) -> list[torch.Tensor]:
        model: Any = small_model()
        optimizer = IsospectralAdamW(given(model), lr=1e-2)
        train(model, optimizer, range(3))
        return [p.detach() for p in model.parameters()]

    def chosen(model: Any) -> list[dict[str, Any]]:
        kept = [model["q_proj"].weight, model["up_proj"].weight]
        rest = [p for p in model.parameters() if not any(p is weight for weight in kept)]
        return [{"params": kept}, {"params": rest, "isospectral": False}]

    first, *others = [trained(given) for given in (lambda m: m, lambda m: m.named_parameters(), chosen)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_schedule_reaches_the_frames() -> None:
    model: Any = small_model()
    optimizer = IsospectralAdamW(model, lr=1e-2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(3))
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", [*RETRACTIONS, "muon"])
def test_a_run_that_goes_on_from_its_state_is_the_run_that_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    whole: Any = small_model()
    optimizer = build(kind, whole)
    train(whole, optimizer, range(7))
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(whole, optimizer, range(7, 12))

    again: Any = small_model(seed=1)
    resumed = build(kind, again)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(kept["model"])
    resumed.load_state_dict(kept["optimizer"])
    train(again, resumed, range(7, 12))
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_matrix_without_a_gradient_stays_as_it_is() -> None:
    moved, still = nn.Parameter(gaussian(6, 4, seed=0).float()), nn.Parameter(gaussian(6, 4, seed=1).float())
    kept = still.detach().clone()
    optimizer = IsospectralAdamW([moved, still], lr=1e-2)
    moved.square().mul(gaussian(6, 4, seed=2).float()).sum().backward()
    optimizer.step()
    assert torch.equal(still, kept) and optimizer.orthogonality_error < 1e-5


@pytest.mark.parametrize("W", [torch.zeros(5, 3), torch.ones(5, 3), torch.eye(4), torch.randn(1, 7)])
def test_zero_repeated_and_single_singular_values_stay(W: Tensor) -> None:
    parameter = nn.Parameter(W.clone())
    optimizer = IsospectralAdamW([parameter], lr=1e-2)
    for step in range(4):
        parameter.grad = gaussian(*W.shape, seed=step).float()
        optimizer.step()
    assert torch.allclose(torch.linalg.svdvals(parameter.detach()), torch.linalg.svdvals(W), atol=1e-6)


def test_a_trl_run_takes_it_unchanged(tiny_model: Path, tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    from datasets import Dataset

    opened = open_language_model(tiny_model, "cpu")
    before = {name: p.detach().clone() for name, p in opened.model.named_parameters()}
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        learning_rate=1e-2,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )

    def early_letters(completions: list[str], **_: Any) -> list[float]:
        return [sum(letter < "m" for letter in completion) + 0.01 * len(completion) for completion in completions]

    trainer = trl.GRPOTrainer(
        model=opened.model,
        processing_class=opened.tokenizer,
        reward_funcs=early_letters,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["3+4=", "12-5=", "7*2=", "9+9="] * 4}),
        optimizers=(IsospectralAdamW(opened.model, lr=1e-2), None),
    )
    trainer.train()
    moved = dict(opened.model.named_parameters())
    linear = [name for name in moved if name.endswith("_proj.weight")]
    assert linear and any(not torch.equal(moved[name], before[name]) for name in linear)
    for name in linear:
        S0, S1 = (torch.linalg.svdvals(x.detach().double()) for x in (before[name], moved[name]))
        assert (S1 - S0).norm() <= 1e-6 * S0.norm(), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IsospectralAdamW([nn.Parameter(torch.ones(4, 4).bfloat16())]), "stored as torch.bfloat16"),
        (lambda: IsospectralAdamW([nn.Parameter(torch.ones(4))]), "no matrix to keep"),
        (lambda: IsospectralAdamW(nn.Linear(4, 4)), "no matrix to keep"),
        (lambda: IsospectralAdamW(small_model().parameters()), "no names to tell projections from embeddings"),
        (
            lambda: IsospectralAdamW([nn.Parameter(torch.ones(4, 4))], retraction="qr"),
            "choose one of svd, newton-schulz",
        ),  # type: ignore[arg-type]
        (lambda: IsospectralAdamW([nn.Parameter(torch.ones(4, 4))], lr=-1.0), "lr is -1.0"),
        (lambda: IsospectralAdamW([nn.Parameter(torch.ones(4, 4))], lr="1e-3"), "give a number"),  # type: ignore[arg-type]
        (lambda: IsospectralAdamW(small_model().to("meta")), "are not loaded"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make()


def test_states_of_others_are_refused() -> None:
    W = nn.Parameter(torch.ones(4, 3))
    optimizer = IsospectralAdamW([W])
    with pytest.raises(AdapterError, match="of another optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW([W]).state_dict())
    other = nn.Parameter(torch.ones(5, 3))
    theirs = IsospectralAdamW([other])
    other.grad = torch.ones(5, 3)
    theirs.step()
    with pytest.raises(AdapterError, match="of other matrices"):
        optimizer.load_state_dict(theirs.state_dict())
    muon = IsospectralMuon([W])
    W.grad = torch.ones(4, 3)
    muon.step()
    with pytest.raises(AdapterError, match="trained frames by Muon and not by AdamW"):
        optimizer.load_state_dict(muon.state_dict())


def steps_of(optimizer: Any, model: Any, count: int = 2) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()


def small() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6), "norm": torch.nn.LayerNorm(4)})


def test_each_group_has_its_own_settings_as_under_torchs_adamw() -> None:
    ours, theirs = small(), small()
    own = {"weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.01}
    groups = [
        {"params": [ours["q_proj"].weight]},
        {"params": [*ours["norm"].parameters()], "isospectral": False, **own},
    ]
    steps_of(IsospectralAdamW(groups, lr=0.1), ours)
    steps_of(torch.optim.AdamW([{"params": [*theirs["norm"].parameters()], **own}]), theirs)
    assert torch.equal(ours["norm"].weight, theirs["norm"].weight)
    with pytest.raises(AdapterError, match=r"betas are \(2"):
        IsospectralAdamW(small(), betas=(2.0, 2.0))


def test_a_schedule_of_momenta_reaches_the_optimizers_inside() -> None:
    model = small()
    optimizer = IsospectralAdamW(model, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5)
    steps_of(optimizer, model)
    schedule.step()
    steps_of(optimizer, model, 1)
    inside = [(group["lr"], group["betas"]) for inner in optimizer._inner for group in inner.param_groups]
    assert set(inside) == {(group["lr"], group["betas"]) for group in optimizer.param_groups} and len(inside) == 4
    assert all(group["weight_decay"] == 0 for group in optimizer._inner[0].param_groups)


def test_names_tell_in_groups_too_and_a_bare_list_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(9, 8), "q_proj": torch.nn.Linear(8, 6)})
    named = IsospectralAdamW([{"params": list(model.named_parameters()), "lr": 0.5}])
    assert [tuple(W.shape) for W in named._matrices()] == [(6, 8)]
    assert {group["lr"] for group in named.param_groups} == {0.5}
    assert "embeddings and heads too" not in caplog.text
    bare = IsospectralAdamW([p for p in model.parameters() if p.requires_grad])
    assert len(bare._matrices()) == 2 and "embeddings and heads too" in caplog.text


def test_weights_that_something_else_wrote_are_not_overwritten() -> None:
    model = small()
    optimizer = IsospectralAdamW(model, lr=1e-3)
    steps_of(optimizer, model)
    kept = optimizer.state_dict()
    with torch.no_grad():
        model["q_proj"].weight.mul_(2)
    changed = model["q_proj"].weight.clone()
    with pytest.raises(AdapterError, match="is not the one that this optimizer left"):
        steps_of(optimizer, model, 1)
    assert torch.equal(model["q_proj"].weight, changed)
    other = small()
    resumed = IsospectralAdamW(other, lr=1e-3)
    resumed.load_state_dict(kept)  # without the weights that it left
    with pytest.raises(AdapterError, match="load the model's weights together"):
        steps_of(resumed, other, 1)
    with pytest.raises(AdapterError, match="groups cannot be added"):
        optimizer.add_param_group({"params": [torch.zeros(2, 2)]})


@pytest.mark.parametrize("write", [lambda W, old: W.copy_(old), lambda W, old: W.data.copy_(old)])
def test_a_write_however_small_is_noticed(write: Callable[[Tensor, Tensor], Any]) -> None:
    model = small()
    optimizer = IsospectralAdamW(model, lr=1e-6)
    steps_of(optimizer, model)
    before = model["q_proj"].weight.detach().clone()
    steps_of(optimizer, model, 1)
    with torch.no_grad():
        write(model["q_proj"].weight, before)  # a step taken back
    with pytest.raises(AdapterError, match="is not the one that this optimizer left"):
        steps_of(optimizer, model, 1)
    assert torch.equal(model["q_proj"].weight, before)


@pytest.mark.parametrize("kind", [IsospectralAdamW, IsospectralMuon])
def test_torchs_checkpoints_hold_the_frames_and_asking_for_them_moves_nothing(kind: Any) -> None:
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = kind(model, lr=1e-2)
    get_optimizer_state_dict(model, optimizer)  # takes a step at a learning rate of 0 where there is no state
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    steps_of(optimizer, model)
    weights, state = copy.deepcopy([model.state_dict(), get_optimizer_state_dict(model, optimizer)])
    steps_of(optimizer, model)
    other = small()
    resumed = kind(other, lr=1.0)
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, resumed, state)
    steps_of(resumed, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_before_the_first_step_makes_it_forget() -> None:
    model = small()
    optimizer = IsospectralAdamW(model, lr=1e-2)
    start = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    steps_of(optimizer, model)
    trained = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(start[0])
    optimizer.load_state_dict(start[1])
    assert not optimizer.state
    steps_of(optimizer, model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trained, strict=True))


def test_a_loaded_state_shares_no_memory_with_the_one_it_came_from() -> None:
    one, two = small(), small()
    first, second = IsospectralAdamW(one, lr=1e-2), IsospectralAdamW(two, lr=1e-2)
    steps_of(first, one)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    kept = copy.deepcopy(first.state_dict()["state"])
    steps_of(second, two)
    ours = first.state_dict()["state"]
    assert all(torch.equal(ours[i][key], kept[i][key]) for i in kept for key in kept[i])


@pytest.mark.parametrize("name", ["q_proj.weight", "norm.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(name: str, value: float) -> None:
    model, twin = small(), small()
    optimizer, plain = IsospectralAdamW(model, lr=1e-2), IsospectralAdamW(twin, lr=1e-2)
    for each, of in ((model, optimizer), (twin, plain)):
        steps_of(of, each)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    model.get_parameter(name).grad.view(-1)[0] = value  # type: ignore[union-attr]
    with pytest.raises(AdapterError, match="holds NaN or infinity: nothing was moved"):
        optimizer.step()
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    for each, of in ((model, optimizer), (twin, plain)):
        steps_of(of, each)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = small()
    optimizer = IsospectralAdamW(model)
    with torch.no_grad():
        model["q_proj"].weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        steps_of(optimizer, model, 1)


def test_stacked_experts_are_said_to_be_left_to_adamw(caplog: pytest.LogCaptureFixture) -> None:
    experts = nn.ParameterDict({"gate_up_proj": torch.ones(3, 8, 6), "down_proj": torch.ones(3, 6, 4)})
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 6), "experts": experts, "conv": nn.Conv1d(2, 2, 2)})
    IsospectralAdamW(model)
    assert "2 parameters are stacks of expert matrices, the first experts." in caplog.text


def test_loading_the_weights_that_are_there_changes_nothing() -> None:
    trained = []
    for load in (True, False):
        model = small()
        optimizer = IsospectralAdamW(model, lr=1e-3)
        steps_of(optimizer, model)
        if load:
            model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
        steps_of(optimizer, model, 1)
        trained.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("kind", [IsospectralAdamW, IsospectralMuon])
def test_a_copy_and_a_pickle_go_on_as_it_does(kind: Any, again: Callable[[Any], Any]) -> None:
    model = small()
    optimizer = kind(model, lr=1e-2, retraction="newton-schulz")
    steps_of(optimizer, model)
    other, theirs = again((model, optimizer))
    steps_of(optimizer, model)
    steps_of(theirs, other)
    assert theirs.retraction == "newton-schulz" and theirs.orthogonality_error == optimizer.orthogonality_error
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
