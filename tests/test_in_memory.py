"""A model that is open in torch is compared as it would be from its folder."""

from pathlib import Path

import pytest
import torch
from checkpoint_folders import base_weights, moved, stored, write_model
from torch import Tensor, nn

from offprincipal.adapters import adapt
from offprincipal.checkpoints import open_checkpoint
from offprincipal.comparison import compare
from offprincipal.errors import ArgumentError, CheckpointError
from offprincipal.models import open_language_model


class Holder(nn.Module):
    """Tensors under the names of a checkpoint."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:  # type: ignore[override]
        return self.tensors


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_those_of_its_folder(kind: torch.dtype, tmp_path: Path) -> None:
    weights = {name: x.to(kind) for name, x in base_weights().items()}
    tuned = {name: x.to(kind) for name, x in moved(weights, 1e-3, 5).items()}
    folders = [write_model(tmp_path / name, tensors) for name, tensors in (("base", weights), ("run", tuned))]
    found = compare(Holder(weights), {"run": Holder(tuned)}, cache=False)
    assert found.matrices == compare(folders[0], {"run": folders[1]}, cache=False).matrices
    assert found.summary["runs"]["run"]["source"] == "Holder in memory"


def test_a_language_model_is_named_and_laid_out_as_its_folder_is(tiny_model: Path) -> None:
    model = open_language_model(tiny_model, "cpu").model
    found = compare(tiny_model, model)
    assert list(found.runs) == ["model"] and found.runs["model"].unchanged_fraction.value == 1
    layers = nn.Sequential(nn.Linear(4, 4))  # which can be iterated over, and is one model
    assert list(compare(layers, layers).runs) == ["model"]
    assert list(compare(tiny_model, iter([tiny_model])).runs) == [tiny_model.name]  # type: ignore[arg-type]
    opened, folder = open_checkpoint(model), open_checkpoint(tiny_model)
    assert opened.tensors.keys() == folder.tensors.keys()  # a tied head once


def test_a_comparison_that_is_written_is_never_taken_for_another(tmp_path: Path) -> None:
    weights = base_weights()
    for seed in (1, 2):
        tuned = stored(moved(weights, 1e-3, seed))
        found = compare(Holder(weights), {"run": Holder(tuned)}, out=tmp_path / "out")
        assert found.matrices == compare(Holder(weights), {"run": Holder(tuned)}).matrices
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"summary.json", "matrices.parquet"}


def test_what_is_not_whole_here_is_refused(tiny_model: Path) -> None:
    base = open_language_model(tiny_model, "cpu").model
    with pytest.raises(CheckpointError, match="is not loaded: save the model"):
        open_checkpoint(nn.Linear(2, 2, device="meta"))
    with pytest.raises(CheckpointError, match="weight of Holder in memory is of complex64"):
        open_checkpoint(Holder({"weight": torch.ones(2, dtype=torch.complex64)}))
    with pytest.raises(CheckpointError, match="is not a model: give a folder"):
        compare(tiny_model, {"run": base.state_dict()})  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match="Ray workers cannot see"):
        compare(tiny_model, base, ray="local")
    with pytest.raises(CheckpointError, match=r"has an adapter: give model\.merge_and_unload"):
        compare(tiny_model, adapt(base, "lora", rank=1))
