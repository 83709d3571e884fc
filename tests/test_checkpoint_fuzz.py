"""Thousands of damaged and hostile checkpoints: each is read or refused by name, at once and in little memory.

`OFFPRINCIPAL_TIMES=10 pytest tests/test_checkpoint_fuzz.py` tries ten times as many, from another seed.
"""

import io
import json
import os
import random
import resource
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from faults import TIMES, outcome, times
from megatron_ranks import megatrons, usual, write_megatron
from ranks import write_ranks
from safetensors.torch import save_file
from torch.distributed.tensor import Shard
from zero_ranks import write_zero

from offprincipal import make_delta
from offprincipal.checkpoints import Checkpoint, open_checkpoint, pair_tensors, parts_of
from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS
from offprincipal.errors import CheckpointError

CASES = times(6000)
SEED = TIMES - 1
WORK = 5.0  # seconds of this process's own time
MEMORY = 1 << 29
QKV, DOWN = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.experts.down_proj"
WEIGHTS = {
    "model.embed_tokens.weight": torch.arange(24.0).reshape(6, 4).bfloat16(),
    QKV: torch.ones(8, 4),
    DOWN: torch.ones(2, 4, 6).half(),
    "model.norm.weight": torch.ones(4).bfloat16(),
    "model.counts": torch.ones(2, dtype=torch.int64),
}
CONFIG = {
    "model_type": "phi3",
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "text_config": {"model_type": "mixtral", "hidden_size": 4},
    "quantization_config": {"weight_block_size": [4, 2]},
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["qkv_proj"],
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
DEEP, LONG = "@deep@", "@long@"
RAW = {f'"{DEEP}"': "[" * 50_000 + "]" * 50_000, f'"{LONG}"': "9" * 5000}
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**15, 10**40, -(10**15), 0.5, 1e308, float("nan"),
    float("inf"), DEEP, LONG, "", "x" * 5000, "../../etc/passwd", "/etc/passwd", "C:\\windows", "..\\up", "a\0b",
    "\ud800", "\x1b[2J", "phi3", "pissa", "LORA", "F64", "F32", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "U8", "C64",
    [], {}, [[]], [0], [0, 0], [10**15], [2**40, 2**40], [0, 10**15], [-1, 8], [8, 0], [1] * 40, [1] * 5000, [None],
    ["a"], [0.5, 1], {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]},
    {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, {"a": {"b": DEEP}},
]  # fmt: skip


def write_plain(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(WEIGHTS, folder / "model.safetensors", metadata={"format": "pt"})


def write_shards(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for i, names in enumerate((list(WEIGHTS)[::2], list(WEIGHTS)[1::2])):
        save_file({name: WEIGHTS[name] for name in names}, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(names, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_float8(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    quantised = {QKV: WEIGHTS[QKV].to(torch.float8_e4m3fn), f"{QKV}_scale_inv": torch.ones(2, 2)}
    save_file(WEIGHTS | quantised, folder / "model.safetensors")


def write_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    module = f"base_model.model.{QKV.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(8, 2)}
    save_file(factors, folder / "adapter_model.safetensors")


def write_ranked(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    spread = {name: [Shard(0)] if tensor.dim() > 1 else None for name, tensor in WEIGHTS.items()}
    write_ranks(folder, WEIGHTS, (2,), spread)


def write_pickled(folder: Path) -> None:
    torch.save(WEIGHTS, folder / "pytorch_model.bin")


def write_distributed(folder: Path) -> None:
    dcp.save(WEIGHTS, checkpoint_id=folder, no_dist=True)


def write_megatrons(folder: Path) -> None:
    write_megatron(folder, {name: tensor.bfloat16() for name, tensor in megatrons(usual(0)).items()})


def write_deepspeed(folder: Path) -> None:
    floats = {name: tensor.float() for name, tensor in WEIGHTS.items() if tensor.is_floating_point()}
    write_zero(folder, [floats], 2, 2)


def write_packed(folder: Path) -> None:
    at = "model.layers.0.self_attn.o_proj"
    words = {"qweight": torch.ones(1, 8), "qzeros": torch.ones(1, 1), "g_idx": torch.zeros(8)}
    packed = {f"{at}.{name}": tensor.int() for name, tensor in words.items()}
    packed[f"{at}.scales"] = torch.ones(1, 8).half()
    config = CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(WEIGHTS | packed, folder / "model.safetensors")


def write_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    for name, rows in (("token_embd", 6), ("blk.0.attn_q", 32), ("blk.0.ffn_down", 32)):
        writer.add_tensor(f"{name}.weight", np.ones((rows, 32), np.float32 if rows == 6 else np.float16))
    packed = gguf.quants.quantize(np.ones((32, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_delta(folder: Path) -> None:
    (folder / "tuned").mkdir()
    write_plain(folder / "tuned")
    moved = {name: tensor + 1 if tensor.dim() > 1 else tensor for name, tensor in WEIGHTS.items()}
    save_file(moved, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    make_delta(folder.parent / "base", folder / "tuned", folder / "run.delta")


def opened_at(folder: Path) -> Path:
    """The folder; the file inside of it where a kind is one file."""
    return next((folder / name for name in ("run.delta", "model.gguf") if os.path.lexists(folder / name)), folder)


KINDS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "plain": (write_plain, ("model.safetensors", "model.safetensors", "config.json")),
    "shards": (write_shards, ("model.safetensors.index.json", "model-0.safetensors", "config.json")),
    "float8": (write_float8, ("model.safetensors", "config.json")),
    "adapter": (write_adapter, ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors")),
    "ranks": (write_ranked, tuple(f"model_world_size_2_rank_{rank}.pt" for rank in (0, 0, 1))),
    "pickled": (write_pickled, ("pytorch_model.bin",)),
    "distributed": (write_distributed, (".metadata", ".metadata", "__0_0.distcp")),
    "megatron": (write_megatrons, (".metadata", "__0_0.distcp", "common.pt")),
    "deepspeed": (
        write_deepspeed,
        (
            "global_step3/mp_rank_00_model_states.pt",
            "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "latest",
        ),
    ),
    "packed": (write_packed, ("model.safetensors", "model.safetensors", "config.json")),
    "gguf": (write_gguf, ("model.gguf",)),
    "delta": (write_delta, ("run.delta",)),
}


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def damaged(content: bytes, end: int, chance: random.Random) -> bytes:
    """Bits flipped, bytes cut out, doubled, put in or cut off, before `end`."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(max(min(end, len(found)), 1))
        length = chance.choice((1, 2, 8, 40))
        match chance.randrange(6):
            case 0 | 1 if found:
                found[min(at, len(found) - 1)] ^= 1 << chance.randrange(8)
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                found[at:at] = chance.choice((b"\0", b"}", b"{", b"9", b'"', b",", b"-", b"\xff\xfe", b"[[[["))
            case _:
                del found[chance.randrange(len(found) + 1) :]
    return bytes(found)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


def twisted(tree: Any, chance: random.Random) -> str:
    """The JSON of a tree in which one or two nodes are replaced, removed, renamed, exchanged, doubled or added."""
    tree = json.loads(json.dumps(tree))
    doubled = ""
    for _ in range(chance.choice((1, 1, 1, 2))):
        found = list(places(tree))
        if not found:
            return json.dumps(chance.choice(HOSTILE))
        (container, key), (other, at) = chance.choice(found), chance.choice(found)
        hostile = deepcopy(chance.choice(HOSTILE))
        match chance.randrange(9):
            case 0 if isinstance(container, dict):
                container[chance.choice([h for h in HOSTILE if isinstance(h, str)])] = container.pop(key)
            case 1:
                del container[key]
            case 2 if isinstance(container, dict):
                container[chance.choice(("__metadata__", "weight_map", "lm_head.weight", "x"))] = hostile
            case 3:
                container[key] = json.loads(json.dumps(other[at]))
            case 4 if isinstance(tree, dict):
                name = chance.choice(list(tree))
                doubled = f"{json.dumps(name)}: {json.dumps(chance.choice((tree[name], hostile)))}, "
            case 5 if type(container[key]) is int:
                container[key] += chance.choice((-8, -1, 1, 8, 2**32, -(2**63)))
            case _:
                container[key] = hostile
    text = json.dumps(tree)
    text = "{" + doubled + text[1:] if doubled and len(text) > 2 else text
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    return text


def mutated(path: Path, chance: random.Random) -> bytes:
    content = path.read_bytes()
    if path.suffix not in (".pt", ".bin", ".json", ".safetensors", ".delta"):
        return damaged(content, 600 if path.suffix == ".gguf" else len(content), chance)
    if path.suffix in (".pt", ".bin"):
        return damaged(content, len(content), chance) if chance.random() < 0.3 else with_another_pickle(content, chance)
    if path.suffix == ".json":
        return (
            damaged(content, len(content), chance)
            if chance.random() < 0.3
            else twisted(json.loads(content), chance).encode("utf-8", "surrogatepass")
        )
    end = header_end(content)
    if chance.random() < 0.4:
        return damaged(content, end, chance)
    header = twisted(json.loads(content[8:end]), chance).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    length = len(header) if chance.random() < 0.9 else chance.choice((0, 2**40, 2**63, len(header) + 8, len(content)))
    return length.to_bytes(8, "little") + header + content[end:]


def with_another_pickle(content: bytes, chance: random.Random) -> bytes:
    """A file of torch.save whose archive is sound and whose pickle is not."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(changed, "w") as rewritten:
        for name in archive.namelist():
            data = archive.read(name)
            rewritten.writestr(name, damaged(data, len(data), chance) if name.endswith("data.pkl") else data)
    return changed.getvalue()


@contextmanager
def limits() -> Iterator[None]:
    """At most `MEMORY` more memory of its own than now, so that an absurd allocation fails rather than goes unseen."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def use(folder: Path, base: Checkpoint) -> None:
    """Open a checkpoint and read all of it."""
    checkpoint = open_checkpoint(opened_at(folder), base)
    tensors, config = checkpoint.tensors, checkpoint.config
    for info in tensors.values():
        if info.dtype in FLOATS | INTEGERS:
            entries = checkpoint.read(info.name)
            assert entries.shape == (info.numel,)
            assert str(entries.dtype) == info.dtype
            for part in parts_of(info, config)[:50]:
                middle = checkpoint.read(info.name, part.start, part.stop)
                assert part.of(middle).shape == part.matrix_shape
        else:
            with pytest.raises(CheckpointError):
                checkpoint.read(info.name)
    assert all(isinstance(note, str) for note in checkpoint.notes)
    checkpoint.masters()
    pair_tensors(base if QKV in tensors else checkpoint, checkpoint)


def read(folder: Path, base: Checkpoint) -> str:
    return outcome(lambda: use(folder, base), work=WORK, refusal=CheckpointError)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    (tmp_path / "base").mkdir()
    write_plain(tmp_path / "base")
    return open_checkpoint(tmp_path / "base")


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with limits():
        yield


def test_mutated_checkpoints_are_read_or_refused(tmp_path: Path, base: Checkpoint) -> None:
    chance, seen, wrong = random.Random(SEED), Counter[str](), []
    for kind, (write, _) in KINDS.items():
        (tmp_path / kind).mkdir()
        write(tmp_path / kind)
        use(tmp_path / kind, base)
    for case in range(CASES):
        kind = list(KINDS)[case % len(KINDS)]
        path = tmp_path / kind / chance.choice(KINDS[kind][1])
        whole = path.read_bytes()
        path.write_bytes(mutated(path, chance))
        found = read(tmp_path / kind, base)
        seen[f"{kind} {found if found in ('used', 'refused') else 'wrong'}"] += 1
        if found not in ("used", "refused"):
            wrong.append(f"case {case}, {kind}/{path.name}: {found}\n{path.read_bytes()[:300]!r}")
        path.write_bytes(whole)
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:8])
    assert seen.total() >= 2000
    for kind in KINDS:
        assert min(seen[f"{kind} used"], seen[f"{kind} refused"]) >= 20, seen


def replacements(folder: Path) -> Iterator[tuple[str, Callable[[Path], None], set[str]]]:
    """What can stand in a file's place: name, how it is put there, what may come of it."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    yield "a link to a blob", lambda path: link_to_blob(path, elsewhere), {"used"}
    yield "a link to itself", lambda path: path.symlink_to(path), {"used", "refused"}
    yield "a link to nothing", lambda path: path.symlink_to(elsewhere / "none"), {"used", "refused"}
    yield "a link to a device", lambda path: path.symlink_to("/dev/zero"), {"used", "refused"}
    yield "a link to its folder", lambda path: path.symlink_to(path.parent), {"used", "refused"}
    yield "a folder", lambda path: path.mkdir(), {"used", "refused"}
    yield "a pipe", lambda path: os.mkfifo(path), {"used", "refused"}
    yield "nothing", lambda path: None, {"used", "refused"}
    yield "an empty file", lambda path: path.touch(), {"refused"}
    yield "a terabyte of zeros", lambda path: sparse(path, 1 << 40), {"refused"}
    yield "a header of a terabyte", lambda path: sparse(path, 1 << 40, (1 << 39).to_bytes(8, "little")), {"refused"}
    yield "a pickle", put_pickle, {"refused"}


def put_pickle(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(WEIGHTS, file)


def link_to_blob(path: Path, elsewhere: Path) -> None:
    blob = elsewhere / path.name
    shutil.copy(elsewhere.parent / "whole" / path.relative_to(elsewhere.parent / "folder"), blob)
    path.symlink_to(blob)


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, size)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_read_past_or_refused(tmp_path: Path, base: Checkpoint, kind: str) -> None:
    """A folder, a pipe, a device, a loop of links; a link to a blob is how the Hub's cache stores every file."""
    write, names = KINDS[kind]
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    whole.mkdir()
    write(whole)
    for what, put, allowed in replacements(folder):
        for name in sorted(set(names)):
            shutil.copytree(whole, folder)
            (folder / name).unlink()
            put(folder / name)
            fits = name in ("latest", "common.pt") or (what == "a pickle" and name.endswith(".bin"))
            assert read(folder, base) in allowed | ({"used"} if fits else set()), (what, name)
            shutil.rmtree(folder)
