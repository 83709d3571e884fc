"""Interventions: the function stays, the weights do not; and what was done can be undone after training."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import checking_script, plain_logits, rewrite, stored_weights, trained_from
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_model
from test_cli import call

from offprincipal import compare
from offprincipal.errors import InterventionError, OffPrincipalError
from offprincipal.interventions import intervene, parse_layers, read_record, undo
from offprincipal.interventions.operations import Permutation, Rotation, Scaling, Step, applied, taken_back
from offprincipal.interventions.orthogonal import haar, hadamard, random_orthogonal
from offprincipal.interventions.proof import TOLERANCE, divergence, logits, require_equal
from offprincipal.interventions.rounding import rounded_once
from offprincipal.models import identify, open_language_model
from offprincipal.training import TrainSettings, train

SCRIPT = checking_script()
PAIRS = [(name, what) for name in SCRIPT.MODELS for what in SCRIPT.INTERVENTIONS]
NORMED_BLOCKS = ("gemma2", "gemma3")
IDS = torch.randint(99, (4, 24), generator=torch.Generator().manual_seed(0))
ASKED = {"rotate": [0], "permute": [], "residual": False, "matrix": "haar", "seed": 0}
V, O = ("model.layers.{}.self_attn.v_proj.weight", "model.layers.{}.self_attn.o_proj.weight")  # noqa: E741


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random models by architecture, float32, each written once."""
    root = tmp_path_factory.mktemp("architectures")

    def model(name: str) -> Path:
        folder: Path = root / name.replace(", ", "_")
        return folder if folder.exists() else SCRIPT.write_model(folder, name)

    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 in bfloat16, its head tied to its embedding."""
    folder: Path = SCRIPT.write_model(tmp_path_factory.mktemp("base") / "base", "qwen3", torch.bfloat16)
    return folder


# Mathematics


@given(n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_a_haar_matrix_is_orthogonal(n: int, seed: int) -> None:
    Q = haar(n, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-13, rtol=0)


def test_a_haar_matrix_is_uniform_in_sign_and_size() -> None:
    """E[Q_ij] = 0 and E[Q_ij²] = 1/n for every entry; Q of a QR without the signs' correction has a biased diagonal."""
    generator, n, draws = torch.Generator().manual_seed(0), 3, 4000
    Q = torch.stack([haar(n, generator) for _ in range(draws)])
    assert (Q.mean(0).abs() < 5 / (n * draws) ** 0.5).all()
    assert ((Q**2).mean(0) - 1 / n).abs().max() < 5 * 0.3 / draws**0.5
    assert 0.4 < (torch.linalg.det(Q) > 0).double().mean() < 0.6  # both halves of the group


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 64, 96, 128, 192, 576, 896])
def test_a_hadamard_matrix_has_signs_for_entries_and_orthogonal_rows(n: int) -> None:
    H = hadamard(n)
    assert bool((H.abs() == 1).all())
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 22, 30, 92])
def test_an_order_without_a_constructed_hadamard_matrix_is_refused(n: int) -> None:
    with pytest.raises(InterventionError, match=f"order {n} .* haar"):
        random_orthogonal(n, "hadamard", torch.Generator())


@given(seed=st.integers(0, 2**32 - 1), axis=st.integers(0, 1))
def test_steps_are_taken_back_in_reverse(seed: int, axis: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    turn = Rotation(torch.stack([haar(4, generator) for _ in range(3)]))
    mix = Permutation(torch.randperm(12, generator=generator))
    stretch = Scaling(torch.rand(12, generator=generator, dtype=torch.float64) + 0.5)
    steps = [Step(axis, stretch), Step(axis, turn), Step(1 - axis, mix), Step(axis, mix)]
    torch.testing.assert_close(taken_back(steps, applied(steps, x)), x, atol=1e-12, rtol=0)
    rigid = applied(steps[1:], x)
    torch.testing.assert_close(torch.linalg.svdvals(rigid), torch.linalg.svdvals(x), atol=1e-12, rtol=0)


def test_a_rotation_is_a_matrix_product_along_its_axis() -> None:
    blocks = torch.stack([haar(3, torch.Generator().manual_seed(i)) for i in range(2)])
    x = torch.randn(6, 6, dtype=torch.float64)
    whole = torch.block_diag(*blocks)
    torch.testing.assert_close(Rotation(blocks).along(x, 0), whole @ x)
    torch.testing.assert_close(Rotation(blocks).along(x, 1), x @ whole.T)
    torch.testing.assert_close(Rotation(blocks).along(x[0], 0), whole @ x[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_stored_is_the_nearest_number_of_its_type(dtype: torch.dtype, seed: int) -> None:
    """Between neighbours of the type, by any tiny distance on either side of their middle."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(64, generator=generator, dtype=torch.float64).to(dtype)
    above = grid.nextafter(torch.full_like(grid, float("inf")))
    low, high = grid.double(), above.double()
    tiny = 2.0 ** -torch.randint(1, 40, (64,), generator=generator).double()
    for side, nearest in ((tiny, above), (-tiny, grid)):
        assert torch.equal(rounded_once((low + high) / 2 + side * (high - low) / 2, dtype), nearest)


def test_divergence_is_that_of_its_closed_form() -> None:
    p, q = torch.tensor([0.25, 0.75]).double(), torch.tensor([0.5, 0.5]).double()
    assert divergence(p.log() + 3, q.log()) == pytest.approx(float((p * (p / q).log()).sum()))


# The function stays


@pytest.mark.parametrize(("name", "what"), PAIRS)
def test_the_function_stays_and_the_weights_do_not(
    name: str, what: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    asked: Mapping[str, Any] = SCRIPT.INTERVENTIONS[what]
    if name in NORMED_BLOCKS and asked.get("residual"):
        with pytest.raises(InterventionError, match=r"residual stream of gemma.* gain"):
            intervene(models(name), tmp_path / "out", **asked)
        assert not list(tmp_path.iterdir())
        return
    record = intervene(models(name), tmp_path / "out", **asked)
    assert record.proof["logits_relative_difference"] <= TOLERANCE
    before, after = plain_logits(models(name), IDS), plain_logits(tmp_path / "out", IDS)
    torch.testing.assert_close(after, before, atol=2e-5 * float(before.abs().max()), rtol=0)
    assert record.proof["kl_stored"] < 1e-9
    ours, theirs = stored_weights(tmp_path / "out"), stored_weights(models(name))
    for layer in range(2):
        moved = {name for name in ours if f"layers.{layer}." in name and not torch.equal(ours[name], theirs[name])}
        assert O.format(layer) in moved


def test_two_models_that_differ_are_not_proved_equal(base: Path) -> None:
    model = open_language_model(base, "cpu").model
    weights = dict(model.state_dict())
    said = logits(model, weights, IDS)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] * (1 + 1e-6)
    with pytest.raises(InterventionError, match="changes the model's function"):
        require_equal(logits(model, weights, IDS), said, "this")
    with pytest.raises(InterventionError):
        require_equal(said * float("nan"), said, "this")


def test_float64_logits_are_those_of_transformers_but_for_its_float32_norms(base: Path) -> None:
    model = open_language_model(base, "cpu").model
    weights = dict(model.state_dict())
    torch.testing.assert_close(logits(model, weights, IDS), plain_logits(base, IDS), atol=1e-5, rtol=1e-5)
    tiny = {name: x.double() * (1 + 1e-12) for name, x in weights.items()}
    change = logits(model, tiny, IDS) - logits(model, weights, IDS)
    assert 0 < float(change.abs().max()) < 1e-9  # float32 anywhere on the way would show as 1e-7 or as nothing


# The weights, as they were changed


def test_a_rotation_keeps_the_spectra_of_what_it_turns(base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "out", rotate=[1], dtype="float32")
    ours, theirs = stored_weights(tmp_path / "out"), stored_weights(base)
    for name in (V.format(1), O.format(1)):
        spectra = [torch.linalg.svdvals(weights[name].double()) for weights in (ours, theirs)]
        torch.testing.assert_close(*spectra, atol=1e-6, rtol=0)


def test_only_the_layers_that_are_named_change(base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "out", rotate=[1], permute=[0])
    ours, theirs = stored_weights(tmp_path / "out"), stored_weights(base)
    changed = {name for name, x in ours.items() if not torch.equal(x, theirs[name])}
    permuted = {f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkvo"}
    permuted |= {f"model.layers.0.mlp.{role}_proj.weight" for role in ("gate", "up", "down")}
    assert changed == permuted | {V.format(1), O.format(1)}
    assert all(ours[name].dtype == torch.bfloat16 for name in ours)


def test_a_permutation_moves_entries_and_changes_none(base: Path, tmp_path: Path) -> None:
    record = intervene(base, tmp_path / "out", permute="all")
    ours, theirs = stored_weights(tmp_path / "out"), stored_weights(base)
    for name, x in ours.items():
        assert torch.equal(x.flatten().sort().values, theirs[name].flatten().sort().values)
    assert record.proof["kl_stored"] < 1e-15


def test_every_layer_draws_from_a_seed_of_its_own(base: Path, tmp_path: Path) -> None:
    for name, layers, seed in (("one", [1], 3), ("two", [0, 1], 3), ("other", [1], 4)):
        intervene(base, tmp_path / name, rotate=layers, permute=layers, seed=seed)
    one, two, other = (stored_weights(tmp_path / name) for name in ("one", "two", "other"))
    for name in one:
        if ".layers.1." in name:
            assert torch.equal(one[name], two[name])
    assert not torch.equal(one[V.format(1)], other[V.format(1)])


def test_the_same_request_writes_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for name in "ab":
        intervene(base, tmp_path / name, rotate="all", residual=True)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_tied_head_is_untied_only_where_it_must(base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "values", rotate="all")
    intervene(base, tmp_path / "stream", residual=True)
    for name, tied in (("values", True), ("stream", False)):
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in stored_weights(tmp_path / name)) is not tied


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_result_is_stored_as_asked_and_rounding_shows_in_the_divergence(
    dtype: str, base: Path, tmp_path: Path
) -> None:
    own = intervene(base, tmp_path / "own", residual=True)
    asked = intervene(base, tmp_path / "asked", residual=True, dtype=dtype)
    assert (own.dtype, asked.dtype) == ("bfloat16", dtype)
    assert asked.proof["kl_stored"] < own.proof["kl_stored"] / 10
    assert all(x.dtype == getattr(torch, dtype) for x in stored_weights(tmp_path / "asked").values())


# Undoing


@pytest.mark.parametrize("what", SCRIPT.INTERVENTIONS)
def test_undoing_at_once_gives_back_the_base(what: str, base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "out", **SCRIPT.INTERVENTIONS[what])
    undo(tmp_path / "out" / "intervention.json", tmp_path / "out", tmp_path / "back")
    ours, theirs = stored_weights(tmp_path / "back"), stored_weights(base)
    theirs |= {name: theirs["model.embed_tokens.weight"] for name in ours if name == "lm_head.weight"}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x.float(), theirs[name].float()) for name, x in ours.items())


def test_the_weights_themselves_come_back_with_the_rounding_of_the_intervention(base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "out", rotate="all")
    for name, exact in (("update", False), ("weights", True)):
        undo(tmp_path / "out", tmp_path / "out", tmp_path / name, exact=exact)
    found = compare(base, {name: tmp_path / name for name in ("update", "weights")}, cache=False)
    runs = found.summary["runs"]
    unchanged = {name: run["metrics"]["unchanged_fraction"]["value"] for name, run in runs.items()}
    assert unchanged["update"] == 1.0 and unchanged["weights"] < 0.95


def test_an_update_comes_back_with_its_length(base: Path, tmp_path: Path) -> None:
    """Rotation and reordering are rigid, so that the update's norm is the same in either coordinates."""
    intervene(base, tmp_path / "out", rotate=[0], permute=[0, 1])
    trained = trained_from(tmp_path / "out", tmp_path / "trained")
    undo(tmp_path / "out", trained, tmp_path / "back")
    start, end = stored_weights(tmp_path / "out"), stored_weights(trained)
    original, back = stored_weights(base), stored_weights(tmp_path / "back")
    for name in original:
        there, here = end[name].double() - start[name].double(), back[name].double() - original[name].double()
        torch.testing.assert_close(here.norm(), there.norm(), rtol=1e-4, atol=0)
    assert back[V.format(0)].dtype == torch.float32


def test_masters_come_back_too(base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "out", rotate=[0], permute=[1])
    trained = trained_from(tmp_path / "out", tmp_path / "trained", scale=1e-4, masters=True)
    undo(tmp_path / "out", trained, tmp_path / "back")
    masters = stored_weights(tmp_path / "back" / "masters")
    assert all(torch.equal(masters[name].bfloat16(), x) for name, x in stored_weights(tmp_path / "back").items())
    start = stored_weights(tmp_path / "out")
    moved = stored_weights(trained / "masters")
    for name, x in stored_weights(base).items():
        there = (moved[name].double() - start[name].double()).norm()
        torch.testing.assert_close((masters[name].double() - x.double()).norm(), there, rtol=1e-2, atol=0)
    found = compare(base, {"back": tmp_path / "back"}, cache=False)
    assert found.summary["runs"]["back"]["metrics"]["hidden_fraction"]["value"] > 0


def test_what_was_only_reordered_comes_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "out", permute="all")
    trained = trained_from(tmp_path / "out", tmp_path / "trained")
    content = undo(tmp_path / "out", trained, tmp_path / "back")
    assert content["dtype"] == "bfloat16" and content["proof"]["kl_stored"] < 1e-15
    intervene(tmp_path / "back", tmp_path / "again", permute="all")
    ours, theirs = stored_weights(tmp_path / "again"), stored_weights(trained)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("name", ["llama, all biases", "qwen3", "gemma"])
def test_the_trained_function_comes_back_trained_gains_included(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    intervene(models(name), tmp_path / "out", rotate="all", permute="all", residual=True)
    trained = trained_from(tmp_path / "out", tmp_path / "trained", scale=5e-2)
    content = undo(tmp_path / "out", trained, tmp_path / "back")
    assert content["proof"]["logits_relative_difference"] <= TOLERANCE
    was, before, after = (plain_logits(folder, IDS) for folder in (models(name), trained, tmp_path / "back"))
    assert float((before - was).abs().max()) > 0.1  # training did something
    torch.testing.assert_close(after, before, atol=1e-4 * float(before.abs().max()), rtol=0)


def test_a_stored_intervention_stands_in_where_it_cannot_be_made_again(base: Path, tmp_path: Path) -> None:
    """Another machine may round an entry the other way; then the model beside the record is what counts."""
    intervene(base, tmp_path / "out", rotate=[0])
    weights = stored_weights(tmp_path / "out")
    weights[V.format(0)][0, 0] *= 1 + 2**-7
    rewrite(tmp_path / "out", tmp_path / "elsewhere", weights)
    record = json.loads((tmp_path / "out" / "intervention.json").read_text())
    for hashed, says in (("0", "other weights than it records"), (weights_hash(tmp_path / "elsewhere"), None)):
        noted = json.dumps(record | {"result": {"weights_blake2b": hashed}})
        (tmp_path / "elsewhere" / "intervention.json").write_text(noted)
        act = partial(undo, tmp_path / "elsewhere", tmp_path / "elsewhere", tmp_path / "back")
        if says is None:
            act()
        else:
            refused(says, tmp_path / "back", act)
    back = stored_weights(tmp_path / "back")
    assert all(torch.equal(x.float(), back[name]) for name, x in stored_weights(base).items())


# Bad input


def weights_hash(folder: Path) -> str:
    return identify("", open_language_model(folder, "cpu").model)["weights_blake2b"]


def refused(says: str, out: Path, act: Callable[[], object]) -> None:
    """It is refused with a message, and nothing is there that was not before."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    with pytest.raises(OffPrincipalError, match=says):
        act()
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }
    assert set(out.parent.rglob("*")) == set(before)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"rotate": [2]}, r"rotate layer 2: the model has layers 0 to 1"),
        ({"permute": [-1]}, r"permute layer -1"),
        ({"rotate": [0.5]}, "whole numbers"),
        ({"rotate": "1-0"}, "does not name layers"),
        ({}, "nothing to do"),
        ({"rotate": [0], "matrix": "fourier"}, "haar or hadamard"),
        ({"rotate": [0], "seed": -1}, "seed -1"),
        ({"rotate": [0], "dtype": "int8"}, "int8"),
        ({"rotate": [0], "dtype": "float64"}, "float64"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: Mapping[str, Any], says: str, base: Path, tmp_path: Path) -> None:
    refused(says, tmp_path / "out", lambda: intervene(base, tmp_path / "out", **asked))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=99)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    refused("architecture 'gpt2'", tmp_path / "out", lambda: intervene(tmp_path / "gpt2", tmp_path / "out", rotate=[0]))


def test_a_model_that_shares_weights_across_layers_is_refused(base: Path, tmp_path: Path) -> None:
    shared = open_language_model(base, "cpu").model
    shared.model.layers[1].self_attn = shared.model.layers[0].self_attn
    folder = rewrite(base, tmp_path / "shared", stored_weights(base))
    save_model(shared, str(folder / "model.safetensors"))  # stores what is shared once, as safetensors does
    refused("shares weights across layers", tmp_path / "o", lambda: intervene(folder, tmp_path / "o", rotate=[0]))

    weights = stored_weights(base)
    weights[V.format(1)] = weights[V.format(0)].clone()
    copied = rewrite(base, tmp_path / "copied", weights)
    refused("shares weights across layers", tmp_path / "o", lambda: intervene(copied, tmp_path / "o", rotate=[1]))


def test_an_adapter_is_to_be_merged_first(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "base_model_name_or_path": "{base}"}}')
    refused("merge it into its base first", tmp_path / "out", lambda: intervene(adapter, tmp_path / "out", rotate=[0]))


def test_a_damaged_model_is_refused(base: Path, tmp_path: Path) -> None:
    weights = stored_weights(base)
    weights[V.format(1)][0, 0] = float("nan")
    broken = rewrite(base, tmp_path / "broken", weights)
    refused("v_proj.*NaN", tmp_path / "out", lambda: intervene(broken, tmp_path / "out", rotate=[0]))
    foreign = rewrite(base, tmp_path / "foreign", stored_weights(base) | {"model.layers.0.adapter": torch.ones(2)})
    refused("layers.0.adapter", tmp_path / "out", lambda: intervene(foreign, tmp_path / "out", rotate=[0]))


def test_a_head_that_is_not_stored_is_not_made_up(models: Callable[[str], Path], tmp_path: Path) -> None:
    weights = stored_weights(models("llama"))
    del weights["lm_head.weight"]
    headless = rewrite(models("llama"), tmp_path / "headless", weights)
    refused(
        "does not store lm_head.weight", tmp_path / "out", lambda: intervene(headless, tmp_path / "out", rotate=[0])
    )


def test_generation_settings_are_copied_as_they_are(base: Path, tmp_path: Path) -> None:
    """Published models hold some that transformers calls invalid and does not save."""
    model = rewrite(base, tmp_path / "model", stored_weights(base))
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    intervene(model, tmp_path / "out", rotate=[0])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_values_that_a_type_cannot_hold_are_refused(base: Path, tmp_path: Path) -> None:
    weights = stored_weights(base)
    weights["model.layers.0.input_layernorm.weight"] *= 1e6
    large = rewrite(base, tmp_path / "large", weights)
    act = lambda: intervene(large, tmp_path / "out", residual=True, dtype="float16")  # noqa: E731
    refused("too large for float16", tmp_path / "out", act)


def test_a_hadamard_matrix_must_exist(tmp_path: Path) -> None:
    model = SCRIPT.write_model(tmp_path / "model", "llama", head_dim=6, hidden_size=36)
    act = lambda: intervene(model, tmp_path / "out", rotate=[0], matrix="hadamard")  # noqa: E731
    refused("order 6", tmp_path / "out", act)


def test_a_folder_in_use_is_not_written_over(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        refused("other files than an intervention", out, lambda: intervene(base, out, rotate=[0], overwrite=overwrite))  # noqa: B023
    (out / "thesis.tex").unlink()
    intervene(base, out, rotate=[0])
    refused(r"--overwrite \(overwrite=True\)", out, lambda: intervene(base, out, rotate=[1]))
    refused("contains a model that is being read", out, lambda: intervene(out, out, rotate=[1], overwrite=True))
    (tmp_path / ".out.part").mkdir()  # of a process that was killed
    intervene(base, out, rotate=[1], overwrite=True)
    assert read_record(out).request.rotate == (1,)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    (tmp_path / "file").write_text("")
    refused("is a file", tmp_path / "file", lambda: intervene(base, tmp_path / "file", rotate=[0]))


def test_a_record_of_another_model_is_refused(base: Path, models: Callable[[str], Path], tmp_path: Path) -> None:
    one, two, back = tmp_path / "one", tmp_path / "two", tmp_path / "back"
    intervene(base, one, rotate=[0])
    intervene(base, two, rotate=[0], seed=1)
    intervene(base, tmp_path / "stream", residual=True)
    refused("correlation", back, lambda: undo(one, two, back))
    refused("correlation", back, lambda: undo(one, base, back))
    refused("lm_head.weight is in only one", back, lambda: undo(one, tmp_path / "stream", back))
    refused("architecture gemma", back, lambda: undo(one, models("gemma"), back))
    refused("other weights than", back, lambda: undo(one, one, back, base=two))
    refused("no record", back, lambda: undo(base, one, back))
    refused("no record", back, lambda: undo(tmp_path / "absent", one, back))


def test_a_base_that_was_moved_can_be_named(base: Path, tmp_path: Path) -> None:
    here, moved, one = tmp_path / "base", tmp_path / "moved", tmp_path / "one"
    shutil.copytree(base, here)
    intervene(here, one, permute=[0])
    here.rename(moved)
    refused("If it was moved, name it with --base", tmp_path / "back", lambda: undo(one, one, tmp_path / "back"))
    undo(one, one, tmp_path / "back", base=moved)


def test_an_open_model_is_told_from_a_folder(base: Path, tmp_path: Path) -> None:
    opened = open_language_model(base, "cpu")
    for model in (opened, opened.model):
        refused("save an open one first", tmp_path / "out", partial(intervene, model, tmp_path / "out", permute=[0]))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"schema": 2}, "schema 1"),
        ({"request": {}}, "rotate is None"),
        ({"request": ASKED | {"rotate": ["0"]}}, "rotate layer '0'"),
        ({"request": ASKED | {"rotate": [9]}}, "rotate layer 9"),
        ({"request": ASKED | {"seed": 5}}, "edited"),
        ({"request": ASKED | {"residual": 1}}, "residual is 1"),
        ({"dtype": "complex64"}, "dtype"),
        ({"proof": {"kl_stored": float("nan")}}, "kl_stored is nan"),
        ({"base": {"source": "embedded"}}, "weights_blake2b"),
        ({"base": {"source": "/nowhere/at/all", "weights_blake2b": ""}}, "/nowhere/at/all"),
    ],
)
def test_an_edited_record_is_refused(edit: Mapping[str, Any], says: str, base: Path, tmp_path: Path) -> None:
    intervene(base, tmp_path / "out", rotate=[0])
    path = tmp_path / "out" / "intervention.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(edit)))
    refused(says, tmp_path / "back", lambda: undo(path, tmp_path / "out", tmp_path / "back"))


def test_gains_of_zero_cannot_be_brought_back(base: Path, tmp_path: Path) -> None:
    weights = stored_weights(base)
    weights["model.norm.weight"][3] = 0
    blind = rewrite(base, tmp_path / "blind", weights)
    intervene(blind, tmp_path / "out", residual=True)
    act = lambda: undo(tmp_path / "out", tmp_path / "out", tmp_path / "back")  # noqa: E731
    refused("gains of model.norm.weight are zero", tmp_path / "back", act)


@pytest.mark.parametrize("text", ["", "x", "3-1", "1,,2", "-1", "1-2-3", "٣", "0-999999999"])
def test_layers_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InterventionError, match="does not name layers"):
        parse_layers(text)


@given(layers=st.sets(st.integers(0, 99), min_size=1))
def test_layers_are_read_as_they_are_written(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == tuple(sorted(layers))
    assert parse_layers(f"{min(layers)}-{max(layers)}") == tuple(range(min(layers), max(layers) + 1))
    assert parse_layers("all") == "all"


# The command


def test_the_command_intervenes_and_undoes_after_training(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turned, run, back = (str(tmp_path / name) for name in ("turned", "run", "back"))
    assert call(monkeypatch, "intervene", str(tiny_model), "--rotate", "0", "--permute", "all", "--out", turned) == 0
    printed = capsys.readouterr().out
    assert "float64 logits differ by" in printed and "stored in bfloat16, the KL to the base" in printed
    lesson = TrainSettings(recipe="sft_own", model=turned, tasks=("count@1",), steps=2, batch=8, eval_prompts=0)
    record = train(lesson, run, quiet=True)
    assert record["base"]["weights_blake2b"] == read_record(turned).result["weights_blake2b"]
    assert call(monkeypatch, "undo", f"{turned}/intervention.json", run, "--out", back) == 0
    assert "the KL to the trained model" in capsys.readouterr().out
    assert (tmp_path / "back" / "masters" / "model.safetensors").is_file()
    start, end = stored_weights(tmp_path / "turned"), stored_weights(tmp_path / "run" / "masters")
    original, returned = stored_weights(tiny_model), stored_weights(tmp_path / "back" / "masters")
    for name, x in original.items():
        there, here = (end[name].double() - start[name].double()).norm(), (returned[name].double() - x.double()).norm()
        torch.testing.assert_close(here, there, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["intervene", "{base}", "--rotate", "7", "--out", "{out}"], "layers 0 to 1"),
        (["intervene", "{base}", "--rotate", "two", "--out", "{out}"], "does not name layers"),
        (["intervene", "{base}", "--out", "{out}"], "(--rotate 0-3, --permute all), or --residual"),
        (
            ["undo", "{base}/model.safetensors", "{base}", "--out", "{out}"],
            "is not a record of an intervention, nor any",
        ),
        (["intervene", "{base}", "--undo", "{base}", "--out", "{out}"], "a command of its own"),
        (["undo", "{base}", "{base}", "--out", "{out}"], "no record"),
        (["intervene", "{base}/nowhere", "--rotate", "0", "--out", "{out}"], "nowhere"),
    ],
)
def test_bad_input_ends_with_exit_code_2(
    words: list[str],
    says: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [word.format(base=base, out=tmp_path / "out") for word in words]
    assert call(monkeypatch, *filled) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_no_tokenizer_is_needed(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, bare)
    for source, out in ((base, "with"), (bare, "without")):
        intervene(source, tmp_path / out, rotate=[0])
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("with", "without")]
    assert weights[0] == weights[1] and not list((tmp_path / "without").glob("tokenizer*"))
    undo(tmp_path / "without", tmp_path / "without", tmp_path / "back")
