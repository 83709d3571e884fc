"""PEFT's SHiRA with our masks: trained on masked entries only, saved and loaded by PEFT itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offprincipal.adapters import make_masks
from offprincipal.adapters.shira_model import shira, shira_rank
from offprincipal.errors import AdapterError
from offprincipal.models import open_language_model

peft = pytest.importorskip("peft")
IDS = [[5, 9, 13, 7, 21, 30], [8, 11, 40, 6, 17, 2]]
ALONE = """
import sys, torch, transformers, peft
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, sys.argv[2])
assert not any(name.startswith("offprincipal") for name in sys.modules)
with torch.no_grad():
    adapted = model(torch.tensor(eval(sys.argv[3]))).logits
    merged = model.merge_and_unload()(torch.tensor(eval(sys.argv[3]))).logits
torch.save([adapted, merged], sys.argv[4])
"""


@pytest.mark.parametrize("kind", ["safe", "principal", "random"])
def test_an_adapter_moves_masked_entries_and_peft_alone_gives_its_logits(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    base = open_language_model(tiny_model, "cpu").model
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = shira(base, kind, 0.2)  # type: ignore[arg-type]
    ids = torch.tensor(IDS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-c", ALONE, str(tiny_model), str(tmp_path / "adapter"), repr(IDS)]
    subprocess.run([*command, str(tmp_path / "logits.pt")], check=True, timeout=120)
    adapted, merged = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(adapted, trained)
    assert torch.allclose(merged, trained, atol=1e-5)

    original = open_language_model(tiny_model, "cpu").model
    weights = dict(model.merge_and_unload().named_parameters())
    for name, parameter in original.named_parameters():
        changed = weights[name] != before[name]
        if not name.endswith("proj.weight"):
            assert not changed.any()
            continue
        share = changed.float().mean().item()
        n, m = parameter.shape
        entries = shira_rank(0.2, [tuple(p.shape) for q, p in before.items() if q.endswith("proj.weight")]) * (n + m)
        mask = make_masks(original, kind, entries / (n * m), target_modules=[name.removesuffix(".weight")])  # type: ignore[arg-type]
        assert 0.8 * entries / (n * m) < share <= entries / (n * m)
        assert not (changed & ~mask[name]).any()


def test_the_rank_is_the_nearest_to_the_density() -> None:
    shapes = [(64, 64), (64, 128)]
    r = shira_rank(0.25, shapes)
    asked, held = 0.25 * (64 * 64 + 64 * 128), [(r + step) * (128 + 192) for step in (-1, 0, 1)]
    assert min(held, key=lambda count: abs(count - asked)) == held[1]


@pytest.mark.parametrize("density", [1e-4, 0.95])
def test_a_density_that_no_rank_comes_near_is_refused(density: float) -> None:
    with pytest.raises(AdapterError, match="no whole r comes near"):
        shira_rank(density, [(64, 64), (64, 256), (8, 8)])


def test_a_density_outside_its_range_is_refused(tiny_model: Path) -> None:
    with pytest.raises(AdapterError, match=r"outside \(0, 1\]"):
        shira(open_language_model(tiny_model, "cpu").model, "safe", 0.0)


def test_the_density_that_is_trained_is_said_where_it_is_another(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_language_model(tiny_model, "cpu")
    model = shira(opened, "safe", 0.2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for name, p in model.named_parameters() if "proj.base_layer" in name)
    assert abs(share - 0.2) > 0.002 and f"density {share:.4g}, not 0.2" in caplog.text
    with pytest.raises(AdapterError, match="has an adapter already"):
        shira(model, "safe", 0.2)
    with pytest.raises(AdapterError, match="density is None"):
        shira(open_language_model(tiny_model, "cpu"), "safe", None)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="no linear matrix named nope"):
        shira(open_language_model(tiny_model, "cpu").model, "safe", 0.2, target_modules=["q_proj", "nope"])
