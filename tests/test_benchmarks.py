"""The benchmark runs, and what it measures with is right."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from offprincipal.checkpoints import open_checkpoint

REPOSITORY = Path(__file__).parents[1]
BENCHMARK = REPOSITORY / "benchmarks" / "compare.py"
LAUNCHER = REPOSITORY / "benchmarks" / "measure_child.py"
ALTERNATIVES = REPOSITORY / "benchmarks" / "alternatives.py"
MAKER = REPOSITORY / "scripts" / "make_synthetic.py"
SHAPE = "tiny:64,160,2,4,2,512"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("pair"))


def make_synthetic(out: Path, *options: str) -> Path:
    subprocess.run([sys.executable, MAKER, "--shape", SHAPE, "--out", out, *options], check=True, capture_output=True)
    return out


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_group_of_the_quick_benchmark_has_its_table(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    command = [sys.executable, BENCHMARK, "--quick", "--out", results, "--work", tmp_path / "work"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    assert [line[4] for line in text.splitlines() if line.startswith("## (")] == list("abcefhijkn")
    assert "Not measured" not in text


def test_groups_are_replaced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    compare = module_at(BENCHMARK)
    sections = {"a": "## (a) One\n\n| 1 |\n\n*then*\n", "j": "## (j) Ten\n\n(see (a))\n\n*then*\n"}
    written = compare.render(sections)
    assert compare.sections_of(written) == sections
    again = compare.render(compare.sections_of(written) | {"g": "## (g)\n\nNot measured.\n\n*now*\n"})
    assert list(compare.sections_of(again)) == list("agj")
    assert {key: compare.sections_of(again)[key] for key in sections} == sections


@pytest.mark.parametrize("count", ["relative", "by-tensor", "gathered"])
def test_the_alternatives_count_what_changed(count: str) -> None:
    before = {"a": torch.tensor([1.0, -2.0, 0.0]), "b": torch.tensor([[3.0, 4.0]])}
    after = {"a": torch.tensor([1.0, -2.1, 0.0]), "b": torch.tensor([[3.0, 4.1]])}
    counts = module_at(ALTERNATIVES).COUNTS
    assert counts[count]((before[name], after[name]) for name in before) == (2, 5)


def test_the_peak_of_a_process_is_its_own_and_counts_mapped_pages(tmp_path: Path) -> None:
    size = 200_000_000
    held = b"x" * size  # ours, which the child must not be charged with
    file = tmp_path / "mapped"
    file.write_bytes(held)
    code = "import mmap, sys; f = open(sys.argv[1]); mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[::4096]"
    assert peak("-c", "pass") < size / 4
    assert peak("-c", code, str(file)) > size


def peak(*arguments: str) -> int:
    command = [sys.executable, "-S", LAUNCHER, sys.executable, *arguments]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["status"] == 0
    return int(found["peak_bytes"])


@pytest.mark.parametrize("rows, columns", [(48, 80), (80, 48), (35, 35)])
def test_a_synthetic_matrix_has_the_singular_values_that_it_was_given(rows: int, columns: int) -> None:
    script = module_at(MAKER)
    drawn, again = (script.generator("a matrix", torch.device("cpu")) for _ in range(2))
    alpha = script.uniform(script.POWER_LAW, again)
    found = torch.linalg.svdvals(script.power_law_matrix(rows, columns, drawn).double())
    expected = script.spectrum(rows, columns, alpha).double()
    assert torch.allclose(found, expected, rtol=1e-5)
    assert (expected.diff() < 0).all()


def test_the_update_of_a_synthetic_pair_is_small_and_leaves_entries_as_they_were(pair: Path) -> None:
    base, tuned = (load_file(pair / side / "model.safetensors") for side in ("base", "tuned"))
    for name in [name for name in base if name.endswith("_proj.weight")]:
        before, after = base[name].double(), tuned[name].double()
        assert before.std() == pytest.approx(0.02, rel=0.02)
        assert 1e-3 < (after - before).norm() / before.norm() < 6e-3
        assert 0.3 < (after == before).double().mean() < 0.8


def test_a_synthetic_pair_does_not_depend_on_its_depth(pair: Path, tmp_path: Path) -> None:
    shallow = load_file(make_synthetic(tmp_path, "--layers", "1") / "tuned" / "model.safetensors")
    deep = load_file(pair / "tuned" / "model.safetensors")
    assert shallow.keys() < deep.keys()
    assert all(torch.equal(tensor, deep[name]) for name, tensor in shallow.items())


def test_a_synthetic_pair_is_a_checkpoint_that_transformers_loads_whole(pair: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(pair / "base", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert len(open_checkpoint(pair / "base").tensors) == len(list(model.parameters()))
