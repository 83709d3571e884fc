"""What people name: single files, odd names, shards without an index, roots of runs, and the Hub's own shards."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoint_folders import base_weights, write_model, write_shards
from safetensors.torch import save_file

from offprincipal.checkpoints import Checkpoint, open_checkpoint
from offprincipal.checkpoints.roles import place_of
from offprincipal.errors import CheckpointError

WEIGHTS = base_weights()
BRANCHES = ("main", "step_10", "step_200", "other")
ODD_SHARDS = ("model.safetensors-{:05}-of-{:05}.safetensors", "model_{:05}-of-{:05}.safetensors")


def assert_whole(checkpoint: Checkpoint) -> None:
    assert set(checkpoint.tensors) == set(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert checkpoint.read(name).tobytes() == tensor.view(torch.int16).numpy().tobytes(), name


def shards(folder: Path, form: str, index: bool = False, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(WEIGHTS)
    files = {form.format(i + 1, count): names[i::count] for i in range(count)}
    for file, own in files.items():
        save_file({name: WEIGHTS[name] for name in own}, folder / file)
    if index:
        weight_map = {name: file for file, own in files.items() for name in own}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["merged.safetensors", "consolidated.safetensors", "model.fp32.safetensors"])
def test_one_file_by_any_name_is_a_model(name: str, tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / name)
    save_file({"state": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    assert_whole(open_checkpoint(tmp_path))
    assert_whole(open_checkpoint(tmp_path / name))


@pytest.mark.parametrize("form", [*ODD_SHARDS, "consolidated-{:05}-of-{:05}.safetensors", "merged{}_of_{}.safetensors"])
def test_shards_without_an_index_are_one_model(form: str, tmp_path: Path) -> None:
    shards(tmp_path, form)
    assert_whole(open_checkpoint(tmp_path))
    assert_whole(open_checkpoint(tmp_path / form.format(2, 3)))
    (tmp_path / form.format(2, 3)).unlink()
    with pytest.raises(CheckpointError, match="has 2 of the 3 shards"):
        open_checkpoint(tmp_path)


def test_an_index_names_a_model_whatever_its_shards_are_called(tmp_path: Path) -> None:
    for i, form in enumerate(ODD_SHARDS):
        folder = shards(tmp_path / str(i), form, index=True)
        assert_whole(open_checkpoint(folder))
        assert_whole(open_checkpoint(folder / "model.safetensors.index.json"))


def test_several_files_of_weights_are_not_guessed_among(tmp_path: Path) -> None:
    for name in ("ema", "last"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"2 files of weights and no index, ema\.safetensors, last\.safetensors: give one"
    ):
        open_checkpoint(tmp_path)
    assert_whole(open_checkpoint(tmp_path / "ema.safetensors"))


def test_shards_that_hold_one_tensor_twice_are_no_model(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file(WEIGHTS, tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="not shards of one model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "last.ckpt", "consolidated.00.pth", "pytorch_model_fsdp.bin"])
def test_one_file_of_torch_is_a_model(name: str, tmp_path: Path) -> None:
    for content in (WEIGHTS, {"model": WEIGHTS, "step": 3}, {"state": {"state_dict": WEIGHTS}, "optimizer": {}}):
        torch.save(content, tmp_path / name)
        assert_whole(open_checkpoint(tmp_path / name))
    if name == "pytorch_model_fsdp.bin":
        assert_whole(open_checkpoint(tmp_path))
    else:
        with pytest.raises(CheckpointError, match=rf"files of torch.save .*{name}.*give the path of one"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("mp_rank_00", "Megatron's older format"),
        ("mp_rank_00_001", "Megatron's older format"),
        ("flax_model.msgpack", "Flax's"),
        ("flax_model-00001-of-00002.msgpack", "Flax's"),
        ("tf_model.h5", "TensorFlow's"),
        ("model.onnx", "ONNX"),
    ],
)
def test_weights_that_are_not_read_are_named(name: str, whose: str, tmp_path: Path) -> None:
    """A folder of them, and the file itself."""
    (tmp_path / name).mkdir() if name.startswith("mp_") else (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / name)[: 1 if name.startswith("mp_") else 2]:
        with pytest.raises(CheckpointError, match=f"{name} is {whose}"):
            open_checkpoint(source)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(CheckpointError, match=r"contains model-Q4\.gguf; give the path of that file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"notes\.txt is not a file of weights"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("inside", ["checkpoint-5", "global_step_10/actor/huggingface", "a/b"])
def test_the_one_model_inside_of_a_run_is_taken(inside: str, tmp_path: Path) -> None:
    write_model(tmp_path / "run" / inside, WEIGHTS)
    (tmp_path / "run" / "runs" / "logs").mkdir(parents=True)
    found = open_checkpoint(tmp_path / "run")
    assert_whole(found)
    assert found.source == str(tmp_path / "run" / inside)


def test_of_several_models_inside_the_candidates_are_listed_by_their_steps(tmp_path: Path) -> None:
    for step in (100, 20, 5):
        write_model(tmp_path / f"checkpoint-{step}", WEIGHTS)
    with pytest.raises(
        CheckpointError, match="3 models, checkpoint-5, checkpoint-20, checkpoint-100: give one of them"
    ):
        open_checkpoint(tmp_path)


def test_links_lead_nowhere_and_masters_are_no_model(tmp_path: Path) -> None:
    write_model(tmp_path / "elsewhere", WEIGHTS)
    root = tmp_path / "root"
    (root / "masters").mkdir(parents=True)
    save_file(WEIGHTS, root / "masters" / "model.safetensors")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "round").symlink_to(root)
    with pytest.raises(CheckpointError, match="root is not a model: it has neither"):
        open_checkpoint(root)


def test_a_folder_that_cannot_be_told_is_no_reason_to_refuse_its_neighbour(tmp_path: Path) -> None:
    write_model(tmp_path / "checkpoint-1", WEIGHTS)
    (tmp_path / "states").mkdir()
    for name in ("one", "two"):
        save_file({"x": torch.ones(1)}, tmp_path / "states" / f"{name}.safetensors")
    assert_whole(open_checkpoint(tmp_path))


class TestHub:
    """A server on the loopback stands for the Hub."""

    @pytest.fixture
    def hub(self, tmp_path: Path) -> Iterator[tuple[Path, list[str], dict[str, str]]]:
        """The folder of its models, what was fetched, and the environment that leads there."""
        root, asked = tmp_path / "hub", list[str]()
        root.mkdir()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def respond(self, body: bool) -> None:
                parts = self.path.split("?")[0].strip("/").split("/")
                api = parts[:2] == ["api", "models"]
                owner = int(len(parts) > 2 + 2 * api and not (root / parts[2 * api]).is_dir())
                repo = root / parts[2 * api + owner]
                rest = parts[2 * api + owner + 1 :]
                data, status, extra = b"", 404, {}
                if api and "refs" in rest:
                    named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": "a" * 40} for n in BRANCHES]
                    data, status = json.dumps({"branches": named, "tags": [], "converts": []}).encode(), 200
                    extra = {"Content-Type": "application/json"}
                elif api and repo.is_dir():
                    files = sorted(path.name for path in repo.iterdir())
                    found = {"id": repo.name, "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
                    tree = [
                        {"type": "file", "path": n, "size": (repo / n).stat().st_size, "oid": "b" * 40} for n in files
                    ]
                    data, status = json.dumps(tree if "tree" in rest else found).encode(), 200
                    extra = {"Content-Type": "application/json"}
                elif rest[:1] == ["resolve"] and (repo / rest[-1]).is_file():
                    data, status = (repo / rest[-1]).read_bytes(), 200
                    extra = {"ETag": f'"{rest[-1]}"', "X-Repo-Commit": "a" * 40}
                    asked.extend([rest[-1]] if body else [])
                else:
                    extra = {"X-Error-Code": "EntryNotFound"}
                self.send_response(status)
                for key, value in {**extra, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def do_GET(self) -> None:
                self.respond(True)

            def do_HEAD(self) -> None:
                self.respond(False)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        yield root, asked, environment
        server.shutdown()

    def test_branches_are_named_by_a_pattern(self, hub: tuple[Path, list[str], dict[str, str]]) -> None:
        root, _, environment = hub
        (root / "run").mkdir()
        program = (
            "import sys\nfrom offprincipal.trajectories.trajectory import expanded\n"
            "from offprincipal.errors import CheckpointError\n"
            "try:\n    print(expanded(sys.argv[1]))\nexcept CheckpointError as error:\n    print(error)\n"
        )

        def found(source: str, **more: str) -> str:
            command, around = [sys.executable, "-c", program, source], os.environ | environment | more
            return subprocess.run(command, env=around, capture_output=True, text=True, check=True).stdout.strip()

        assert found("org/run@step_*") == str(["org/run@step_10", "org/run@step_200"])
        assert found("org/run@main") == str(["org/run@main"])
        assert "none of the 4 revisions of org/run on the Hub matches (main, step_10" in found("org/run@epoch_*")
        assert "is not a Hub id: write org/name@PATTERN" in found("../run@step_*")
        assert "cannot download org/run@step_* from the Hub" in found("org/run@step_*", HF_HUB_OFFLINE="1")

    @staticmethod
    def opened(source: str, environment: dict[str, str]) -> str:
        """What another process finds there."""
        program = (
            "import sys\nfrom offprincipal.checkpoints import open_checkpoint\n"
            "from offprincipal.errors import CheckpointError\n"
            "try:\n    print(len(open_checkpoint(sys.argv[1]).tensors))\n"
            "except CheckpointError as error:\n    print(error)\n"
        )
        command = [sys.executable, "-c", program, source]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    @pytest.mark.parametrize("source", ["org/model", "model"])
    @pytest.mark.parametrize("form", [*ODD_SHARDS, "model-{:05}-of-{:05}.safetensors"])
    def test_what_the_index_names_is_fetched_and_nothing_else(
        self, source: str, form: str, hub: tuple[Path, list[str], dict[str, str]], tmp_path: Path
    ) -> None:
        root, asked, environment = hub
        folder = shards(root / "model", form, index=True)
        save_file(WEIGHTS, folder / "consolidated.safetensors")
        torch.save(WEIGHTS, folder / "pytorch_model.bin")
        (folder / "README.md").write_text("no")
        assert self.opened(source, environment) == str(len(WEIGHTS))
        wanted = [form.format(i, 3) for i in (1, 2, 3)]
        assert sorted(asked) == sorted([*wanted, "model.safetensors.index.json"])
        asked.clear()
        assert self.opened(source, environment | {"HF_HUB_OFFLINE": "1"}) == str(len(WEIGHTS)) and not asked

    def test_weights_by_another_name_are_fetched_where_there_are_no_others(
        self, hub: tuple[Path, list[str], dict[str, str]]
    ) -> None:
        root, asked, environment = hub
        (root / "model").mkdir()
        save_file(WEIGHTS, root / "model" / "consolidated.safetensors")
        assert self.opened("org/model", environment) == str(len(WEIGHTS))
        assert asked == ["consolidated.safetensors"]

    def test_an_index_that_leads_out_of_its_folder_fetches_nothing(
        self, hub: tuple[Path, list[str], dict[str, str]]
    ) -> None:
        root, asked, environment = hub
        folder = write_shards(root / "model", WEIGHTS)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
        assert "not a file inside its folder" in self.opened("org/model", environment)
        assert not [name for name in asked if name.endswith(".safetensors")]


def test_a_folder_with_a_model_and_an_adapter_is_both(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "both", WEIGHTS)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 24), f"{module}.lora_B.weight": torch.ones(32, 2)}
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    assert_whole(open_checkpoint(folder))  # a configuration alone is none
    save_file(factors, folder / "adapter_model.safetensors")
    found = open_checkpoint(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = WEIGHTS[name].float() + 2
    assert torch.equal(torch.from_numpy(found.read(name)).reshape(32, 24), wanted)
    assert "a model and an adapter" in found.notes[-1]


def test_a_folder_of_nanochat_is_its_model(tmp_path: Path) -> None:
    weights = {f"transformer.h.0.attn.c_{name}.weight": torch.randn(8, 8) for name in ("q", "k", "v", "proj")}
    weights |= {"transformer.h.0.mlp.c_fc.weight": torch.randn(32, 8), "transformer.wte.weight": torch.randn(16, 8)}
    for name in ("model_000650.pt", "optim_000650_rank0.pt"):
        torch.save(weights if name.startswith("model") else {"state": {}}, tmp_path / name)
    found = open_checkpoint(tmp_path)
    assert {name: place_of(name).role for name in found.tensors} == dict(
        zip(weights, ("q", "k", "v", "o", "up", "embedding"), strict=True)
    )
    torch.save(weights, tmp_path / "model_000700.pt")
    with pytest.raises(CheckpointError, match="give the path of one"):
        open_checkpoint(tmp_path)
