"""Write a synthetic pair, base and tuned, as two Hugging Face folders in bfloat16: for benchmarks and large tests.

    python scripts/make_synthetic.py --shape 0.5b --out /tmp/pair            # /tmp/pair/base and /tmp/pair/tuned
    python scripts/make_synthetic.py --shape tiny:64,160,2,4,2,512 --out /tmp/tiny

Shapes, names, config.json and shards are those of Qwen2-0.5B, Qwen2-1.5B and Qwen2.5-7B, so transformers loads the
folders. Nothing is trained; what the weights have in common with trained ones is this:

- A linear matrix is W = U diag(s) Vᵀ with s² = power² + bulk²: a power law i^-α with α drawn from [0.4, 0.8] for each
  matrix, above the singular values of a Gaussian matrix, with half of the energy each. Entries have a standard
  deviation of 0.02.
- The tuned matrix is W + D, where D is Gaussian but for a third of its energy, which is of rank 8, and the norm of D
  over that of W is drawn from [1e-3, 3e-3]. Rounding to bfloat16 then leaves 30 to 80 % of the entries as they were.

U and V are products of random signs, permutations and fast Hartley transforms. These are orthogonal, so the singular
values are exact before rounding, and cost n log n a row where two Haar bases would cost more than an SVD. A tensor
depends on `--seed` and its own name alone: with fewer `--layers` the remaining ones stay the same. One tensor of each
model is in memory at a time.
"""

import argparse
import json
import math
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

WEIGHT_STD = 0.02
POWER_LAW = (0.4, 0.8)
POWER_LAW_ENERGY = 0.5
STEP = (1e-3, 3e-3)
LOW_RANK = 8
LOW_RANK_ENERGY = 1 / 3
SHARD_BYTES = 4_000_000_000
BLOCK_ENTRIES = 1 << 25


@dataclass(frozen=True)
class Shape:
    """What decides the tensors of a Qwen2 model."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = True


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.5b", 896, 4864, 24, 14, 2, 151936),
        Shape("1.5b", 1536, 8960, 28, 12, 2, 151936),
        Shape("7b", 3584, 18944, 28, 28, 4, 152064, tied=False),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b", help="0.5b, 1.5b, 7b or NAME:hidden,ffn,layers,heads,kv,vocab")
    parser.add_argument("--out", type=Path, required=True, help="holds base/ and tuned/; replaced if they are there")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=0, help="of both models")
    parser.add_argument("--tuned-seed", type=int, help="of the update alone; default: --seed")
    parser.add_argument("--tuned-only", action="store_true", help="write tuned/ alone: another run from the same base")
    parser.add_argument("--device", default="cpu", help="where the transforms run; each device has its own numbers")
    arguments = parser.parse_args()
    shape = parse_shape(arguments.shape)
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    maker = TensorMaker(arguments.seed, arguments.seed if arguments.tuned_seed is None else arguments.tuned_seed)
    began = time.perf_counter()
    unchanged = write_pair(shape, arguments.out, maker, torch.device(arguments.device), not arguments.tuned_only)
    parameters = sum(math.prod(size) for size in tensor_shapes(shape).values())
    print(
        f"{arguments.out}: {parameters / 1e6:.0f} M parameters, {100 * unchanged:.0f} % of the entries unchanged,"
        f" {time.perf_counter() - began:.0f} s"
    )


def parse_shape(text: str) -> Shape:
    """A known shape, or NAME:hidden,ffn,layers,heads,kv,vocab.

    >>> parse_shape("tiny:64,160,2,4,2,512").ffn
    160
    """
    if text in SHAPES:
        return SHAPES[text]
    name, _, numbers = text.partition(":")
    try:
        hidden, ffn, layers, heads, key_value_heads, vocabulary = (int(number) for number in numbers.split(","))
    except ValueError:
        known = ", ".join(SHAPES)
        raise SystemExit(f"--shape {text}: want {known} or NAME:hidden,ffn,layers,heads,kv,vocab") from None
    return Shape(name, hidden, ffn, layers, heads, key_value_heads, vocabulary)


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of the file."""
    key_value = shape.hidden // shape.heads * shape.key_value_heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (shape.hidden,),
            "self_attn.q_proj.weight": (shape.hidden, shape.hidden),
            "self_attn.q_proj.bias": (shape.hidden,),
            "self_attn.k_proj.weight": (key_value, shape.hidden),
            "self_attn.k_proj.bias": (key_value,),
            "self_attn.v_proj.weight": (key_value, shape.hidden),
            "self_attn.v_proj.bias": (key_value,),
            "self_attn.o_proj.weight": (shape.hidden, shape.hidden),
            "post_attention_layernorm.weight": (shape.hidden,),
            "mlp.gate_proj.weight": (shape.ffn, shape.hidden),
            "mlp.up_proj.weight": (shape.ffn, shape.hidden),
            "mlp.down_proj.weight": (shape.hidden, shape.ffn),
        }
        tensors |= {f"model.layers.{layer}.{part}": size for part, size in parts.items()}
    tensors["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return tensors


def write_pair(shape: Shape, out: Path, maker: "TensorMaker", device: torch.device, with_base: bool) -> float:
    """Both folders, one tensor of each at a time; returns the share of entries that the update left unchanged."""
    folders = [out / "base", out / "tuned"] if with_base else [out / "tuned"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(model_config(shape), indent=1) + "\n")
    sizes = tensor_shapes(shape)
    shards = split_into_shards(sizes)
    same = total = 0
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        with ExitStack() as stack:
            files = [stack.enter_context((folder / file).open("wb")) for folder in folders]
            for opened in files:
                write_header(opened, {name: sizes[name] for name in names})
            for name in names:
                for base, tuned in maker.blocks(name, sizes[name], device):
                    same += int((base == tuned).sum())
                    total += base.numel()
                    for opened, block in zip(files, (base, tuned) if with_base else (tuned,), strict=True):
                        opened.write(block.cpu().contiguous().view(torch.uint8).numpy().data)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": 2 * total},
            "weight_map": {name: shard_name(i, len(shards)) for i, names in enumerate(shards, 1) for name in names},
        }
        for folder in folders:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return same / total


def model_config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": shape.layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocabulary,
    }


def split_into_shards(sizes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names in order, a new shard wherever the next tensor would make one too large."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        count = 2 * math.prod(size)
        if shards[-1] and filled + count > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += count
    return shards


def shard_name(number: int, shards: int) -> str:
    return "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"


def write_header(file: BinaryIO, sizes: dict[str, tuple[int, ...]]) -> None:
    """The head of a safetensors file, so that tensors can be appended as they are made."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


@dataclass(frozen=True)
class TensorMaker:
    """Base and tuned tensors by name."""

    seed: int
    tuned_seed: int

    def blocks(self, name: str, size: tuple[int, ...], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Base and tuned in bfloat16, in blocks of rows that follow each other; a linear matrix is one block."""
        drawn = generator(f"{self.seed}/{name}", device)
        moved = generator(f"{self.tuned_seed}/{name}/update", device)
        if len(size) == 2 and "proj" in name:
            base = power_law_matrix(size[0], size[1], drawn).bfloat16()
            yield base, (base.float() + update(base, moved)).bfloat16()
            return
        step = uniform(STEP, moved)
        rows = max(1, BLOCK_ENTRIES // math.prod(size[1:]))
        for first in range(0, size[0], rows):
            shape = (min(rows, size[0] - first), *size[1:])
            mean = 1.0 if "norm" in name else 0.0
            base = (mean + WEIGHT_STD * gaussian(shape, drawn)).bfloat16()
            yield base, (base.float() + step * WEIGHT_STD * gaussian(shape, moved)).bfloat16()


def generator(key: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(key.encode()))


def gaussian(size: tuple[int, ...], drawn: torch.Generator) -> Tensor:
    return torch.randn(size, generator=drawn, device=drawn.device)


def uniform(between: tuple[float, float], drawn: torch.Generator) -> float:
    low, high = between
    return low + (high - low) * float(torch.rand((), generator=drawn, device=drawn.device))


def power_law_matrix(rows: int, columns: int, drawn: torch.Generator) -> Tensor:
    """A float32 matrix with the singular values of `spectrum` and incoherent singular vectors."""
    n = min(rows, columns)
    diagonal = spectrum(rows, columns, uniform(POWER_LAW, drawn)).to(drawn.device)
    wide = torch.zeros(n, max(rows, columns), device=drawn.device)
    wide[:, :n] = torch.diag(diagonal)
    right = rotated_rows(wide, drawn)  # (n, max)
    both = rotated_rows(right.T.contiguous(), drawn)  # (max, n)
    return both if rows >= columns else both.T


def spectrum(rows: int, columns: int, alpha: float) -> Tensor:
    """Singular values, falling: a power law above a Gaussian bulk; entries have a standard deviation of WEIGHT_STD."""
    n = min(rows, columns)
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    power = rank**-alpha
    # Quantiles of a Gaussian matrix's singular values, to the accuracy that a benchmark needs.
    bulk = math.sqrt(max(rows, columns)) + math.sqrt(n) * torch.cos(math.pi * (rank - 0.5) / n)
    energy = rows * columns * WEIGHT_STD**2
    squared = POWER_LAW_ENERGY * power**2 / (power**2).sum() + (1 - POWER_LAW_ENERGY) * bulk**2 / (bulk**2).sum()
    return (energy * squared).sqrt().float()


def rotated_rows(matrix: Tensor, drawn: torch.Generator) -> Tensor:
    """Every row times one random orthogonal matrix: signs, Hartley, permutation, signs, Hartley."""
    columns = matrix.shape[1]
    for _ in range(2):
        signs = 2.0 * torch.randint(0, 2, (columns,), generator=drawn, device=drawn.device) - 1
        order = torch.randperm(columns, generator=drawn, device=drawn.device)
        matrix = hartley(matrix[:, order] * signs)
    return matrix


def hartley(matrix: Tensor) -> Tensor:
    """The discrete Hartley transform of every row, which is orthogonal and its own inverse.

    >>> rows = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    >>> torch.allclose(hartley(hartley(rows)), rows)
    True
    """
    columns = matrix.shape[1]
    half = torch.fft.rfft(matrix, norm="ortho")  # (rows, columns // 2 + 1)
    result = torch.empty_like(matrix)
    result[:, : half.shape[1]] = half.real - half.imag
    mirrored = half[:, 1 : (columns + 1) // 2].flip(1)  # the frequencies above columns / 2, which are conjugates
    result[:, half.shape[1] :] = mirrored.real + mirrored.imag
    return result


def update(base: Tensor, drawn: torch.Generator) -> Tensor:
    """A Gaussian and a low-rank part; its norm is a draw from STEP times that of the base."""
    rows, columns = base.shape
    size = uniform(STEP, drawn) * math.sqrt(rows * columns) * WEIGHT_STD
    full = gaussian((rows, columns), drawn)
    rank = min(LOW_RANK, rows, columns)
    low = gaussian((rows, rank), drawn) @ gaussian((rank, columns), drawn) / math.sqrt(rank)
    mixed = math.sqrt(1 - LOW_RANK_ENERGY) * full + math.sqrt(LOW_RANK_ENERGY) * low
    return mixed.mul_(size / float(torch.linalg.matrix_norm(mixed)))


if __name__ == "__main__":
    main()
