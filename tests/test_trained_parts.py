"""Recipes that train not all weights: adapters, masked entries, singular frames; what is written, kept and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from offprincipal.adapters import Masks
from offprincipal.errors import AdapterError, OffPrincipalError
from offprincipal.training import StepReport, TrainSettings, parse_settings, train

PEFT_METHODS = ("lora", "pissa", "milora", "mica", "olora", "rlpo", "rlmo", "geora", "off_principal", "shira")
OPTIMIZERS = ("sparse", "isospectral", "isospectral_muon")


def settings(base: Path, adapter: dict[str, Any] | None, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "recipe": "grpo",
        "model": str(base),
        "tasks": ("count@1",),
        "steps": 3,
        "batch": 32,
        "max_new_tokens": 3,
        "learning_rate": 1e-2,
        "eval_prompts": 0,
        "save_every": 1,
        "device": "cpu",
        "adapter": adapter,
    }
    return parse_settings(values | changes)


def of(method: str) -> dict[str, Any]:
    ranked = {"rank": 2} if method not in (*OPTIMIZERS, "shira") else {}
    return {"method": method, **ranked}


def masters(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "masters" / "model.safetensors")


def stored(base: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}


@pytest.fixture(scope="module")
def trained(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every method."""
    folder = tmp_path_factory.mktemp("trained")
    for method in (*PEFT_METHODS, *OPTIMIZERS):
        train(settings(taught_model, of(method)), folder / method, quiet=True)
    return {method: folder / method for method in (*PEFT_METHODS, *OPTIMIZERS)}


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_an_adapter_is_loaded_by_peft_alone_and_answers_as_the_merged_model(
    method: str, trained: dict[str, Path], taught_model: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(taught_model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(trained[method] / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(trained[method] / "masters", dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        ours, theirs = merged(input_ids=ids).logits, loaded(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(taught_model, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - plain).abs().max() > 1e-3


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_an_adapter_leaves_what_it_does_not_cover(method: str, trained: dict[str, Path], taught_model: Path) -> None:
    base, found = stored(taught_model), masters(trained[method])
    assert any(not torch.equal(base[name], found[name]) for name in base if "_proj" in name)
    assert all(torch.equal(base[name], found[name]) for name in base if "_proj" not in name)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        *((recipe, "off_principal") for recipe in ("sft_own", "rloo", "dr_grpo", "dpo", "kto", "distill")),
        ("sft_own", "sparse"),
        ("dpo", "sparse"),
        ("distill", "isospectral"),
    ],
)
def test_every_recipe_takes_methods_that_train_not_all_weights(
    recipe: str, method: str, trained: dict[str, Path], taught_model: Path, tmp_path: Path
) -> None:
    teacher = {"teacher": str(trained["lora"])} if recipe == "distill" else {}
    run = settings(taught_model, of(method), recipe=recipe, steps=1, batch=16, rollouts_per_prompt=4, **teacher)
    record = train(run, tmp_path / "run", quiet=True)
    before, after = stored(taught_model), masters(tmp_path / "run")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("_proj" in name for name in moved)
    assert method == "isospectral" or all("_proj" in name for name in moved)
    assert 0 < record["trained_parameters"] <= record["parameters"]


def test_a_sparse_run_changes_the_entries_of_its_masks_alone(trained: dict[str, Path], taught_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(taught_model, dtype=torch.float32)
    masks = Masks.load(trained["sparse"] / "masks.safetensors", base)
    before, after = stored(taught_model), masters(trained["sparse"])
    for name, weight in before.items():
        moved = weight != after[name]
        assert moved.any() == (name in masks)
        assert name not in masks or not (moved & ~masks[name]).any()


@pytest.mark.parametrize("method", ["isospectral", "isospectral_muon"])
def test_an_isospectral_run_keeps_singular_values(method: str, trained: dict[str, Path], taught_model: Path) -> None:
    before, after = stored(taught_model), masters(trained[method])
    projections = [name for name in before if "_proj" in name]
    for name in projections:
        one, two = (torch.linalg.svdvals(side[name].double()) for side in (before, after))
        assert torch.linalg.vector_norm(one - two) <= 1e-6 * torch.linalg.vector_norm(one)
        assert not torch.equal(before[name], after[name])
    log = json.loads((trained[method] / "run.json").read_text())["log"]
    assert len(log) == 3 and all(0 < entry["orthogonality_error"] < 1e-5 for entry in log)


@pytest.mark.parametrize("method", ["lora", "pissa", "off_principal", "shira", "sparse", "isospectral"])
def test_a_run_that_was_interrupted_continues_to_the_same_bytes(
    method: str, trained: dict[str, Path], taught_model: Path, tmp_path: Path
) -> None:
    def interrupt(report: StepReport) -> None:
        if report.stage == "training" and report.step == 2:
            raise KeyboardInterrupt

    run = settings(taught_model, of(method))
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", progress=interrupt)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1").is_dir()
    steps: list[int] = []
    train(run, tmp_path / "run", progress=lambda r: steps.append(r.step) if r.stage == "training" else None)
    assert steps == [2, 3]
    for name in ("model.safetensors", "masters/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (trained[method] / name).read_bytes()


def test_the_base_is_measured_as_it_is_under_any_method(taught_model: Path, tmp_path: Path) -> None:
    records = [
        train(
            settings(taught_model, adapter, steps=1, eval_prompts=16, eval_samples=2),
            tmp_path / str(place),
            quiet=True,
        )
        for place, adapter in enumerate((None, of("pissa"), of("isospectral")))
    ]
    assert records[0]["base"] == records[1]["base"] == records[2]["base"]
    before = [record["accuracy"]["before"] for record in records]
    for found in before[1:]:  # torch may multiply by a frozen matrix in another order
        rounded = {name: pytest.approx(value, rel=1e-6) for name, value in before[0].items() if name != "tasks"}
        assert found == rounded | {"tasks": before[0]["tasks"]}


def test_masks_come_from_a_file_or_from_an_earlier_run(
    trained: dict[str, Path], taught_model: Path, tmp_path: Path
) -> None:
    file = str(trained["sparse"] / "masks.safetensors")
    train(settings(taught_model, {"method": "sparse", "mask_file": file}), tmp_path / "file", quiet=True)
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "file" / name).read_bytes() == (trained["sparse"] / name).read_bytes()
    earlier = {"method": "sparse", "mask": "from_run", "mask_run": str(trained["lora"])}
    train(settings(taught_model, earlier), tmp_path / "earlier", quiet=True)
    base, changed = load_file(taught_model / "model.safetensors"), load_file(trained["lora"] / "model.safetensors")
    after = masters(tmp_path / "earlier")
    for name in base:
        assert not ((after[name] != base[name].float()) & (base[name] == changed[name])).any()


def test_an_adapter_names_its_base_as_it_was_given_and_no_folder_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught_model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(taught_model)
    train(settings(Path("base"), of("lora"), recipe="sft_own", steps=1), tmp_path / "run", quiet=True)
    written = [path for path in (tmp_path / "run").rglob("*") if path.suffix in {".json", ".md"}]
    assert (
        json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "base"
    )
    assert not [path for path in written if str(tmp_path) in path.read_text() or str(taught_model) in path.read_text()]


def test_overwriting_by_a_run_without_an_adapter_removes_the_adapter(taught_model: Path, tmp_path: Path) -> None:
    for method in ("lora", "sparse"):
        train(settings(taught_model, of(method), steps=1), tmp_path / "run", quiet=True, overwrite=True)
    assert (tmp_path / "run" / "masks.safetensors").is_file() and not (tmp_path / "run" / "adapter").exists()
    train(settings(taught_model, None, steps=1), tmp_path / "run", quiet=True, overwrite=True)
    assert not (tmp_path / "run" / "masks.safetensors").exists()


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"method": "dora"}, "no adapter 'dora'"),
        ({"method": "lora", "density": 0.5}, "has no setting 'density'"),
        ({"method": "isospectral", "rank": 4}, "has no setting 'rank'"),
        ({"method": "sparse", "density": 1.5}, r"adapter\.density"),
        ({"method": "sparse", "mask_file": "m", "mask": "safe"}, "leave out mask"),
        ({"method": "sparse", "mask": "from_run"}, "from_run belong together"),
        ({"method": "sparse", "mask": "loud"}, r"adapter\.mask"),
        ({"method": "lora", "rank": 33}, r"rank 33 is above min\(n, m\)"),
        ({"method": "off_principal", "rank": 16}, "dimensions of .* that are not among"),
        ({"method": "pissa", "target_modules": ["embed_tokens"]}, "pissa covers nn.Linear"),
        ({"method": "lora", "target_modules": ["nowhere"]}, "no module is named 'nowhere'"),
    ],
)
def test_unusable_adapters_are_refused_before_anything_is_trained(
    adapter: dict[str, Any], words: str, taught_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(OffPrincipalError, match=words):
        train(settings(taught_model, adapter), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_masks_of_another_base_are_refused(trained: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    adapter = {"method": "sparse", "mask_file": str(trained["sparse"] / "masks.safetensors")}
    with pytest.raises(AdapterError, match="made from another base"):
        train(settings(tiny_model, adapter), tmp_path / "run", quiet=True)


def test_a_run_is_not_continued_with_another_adapter(trained: dict[str, Path], taught_model: Path) -> None:
    with pytest.raises(OffPrincipalError, match="other settings: adapter"):
        train(settings(taught_model, of("pissa")), trained["lora"], quiet=True)


def test_settings_without_an_adapter_are_recorded_as_before_there_were_any(taught_model: Path) -> None:
    assert "adapter" not in settings(taught_model, None).model_dump()
