"""Weights stored in float8 with scales beside them: W = q · scale, one scale a tensor, a row, a column or a block.

Knows names, shapes and numbers; reads nothing.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints.checkpoint import Array, TensorInfo

Block = tuple[int, int]
_BLOCK: Block = (128, 128)
_WEIGHTS = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
_VALUES = {
    np.dtype(dtype): np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for dtype in _WEIGHTS.values()
}
_NOT_OF_WEIGHTS = re.compile(r"(?:^|[._])(?:input|activation|output|q|k|v)_scale$")


def scales_beside(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Float8 weight -> the tensor that holds its scales, if there is one.

    >>> named = ("a.weight", "float8_e4m3fn"), ("a.weight_scale_inv", "float32"), ("b.weight", "float8_e4m3fn")
    >>> scales_beside({name: TensorInfo(name, (2, 2), dtype) for name, dtype in named})
    {'a.weight': 'a.weight_scale_inv'}
    """
    return {
        name: scale
        for name, info in infos.items()
        if info.dtype in _WEIGHTS
        for scale in (f"{name}_scale_inv", f"{name}_scale")
        if scale in infos and infos[scale].floating
    }


def scales_of_activations(names: Iterable[str]) -> set[str]:
    """The names that hold scales of activations or of the cache, which are not part of a weight.

    >>> sorted(scales_of_activations(["mlp.input_scale", "mlp.weight_scale", "attn.k_scale"]))
    ['attn.k_scale', 'mlp.input_scale']
    """
    return {name for name in names if _NOT_OF_WEIGHTS.search(name)}


def block_in(config: Mapping[str, Any]) -> Block:
    """Rows and columns that share a scale, by the model's `config.json`; DeepSeek's 128 × 128 where it says nothing.

    >>> block_in({"quantization_config": {"weight_block_size": [64, 32]}})
    (64, 32)
    """
    nested = config.get("text_config")
    for settings in (config, nested if isinstance(nested, dict) else {}):
        block = _block_in(settings.get("quantization_config"))
        if block is not None:
            return block
    return _BLOCK


def _block_in(settings: object) -> Block | None:
    match settings:
        case {"weight_block_size": [int(rows), int(cols)]} if rows > 0 and cols > 0:
            return rows, cols
        case {"config_groups": {"group_0": {"weights": {"block_structure": [int(rows), int(cols)]}}}} if (
            rows > 0 and cols > 0
        ):
            return rows, cols
    return None


def fit_block(shape: tuple[int, ...], scales: tuple[int, ...], block: Block) -> Block | None:
    """Rows and columns that share one scale of a weight, None where scales of that shape do not fit it.

    >>> [fit_block((300, 200), scales, (128, 128)) for scales in ((), (300, 1), (300,), (3, 2), (7, 7))]
    [(300, 200), (1, 200), (1, 200), (128, 128), None]
    """
    stack, matrix = shape[:-2], (1, 1, *shape)[-2:]
    *stacked, rows, cols = _as_matrices(scales, len(shape))
    if tuple(stacked) not in (stack, (1,) * len(stack)):
        return None
    found = [
        size if count == 1 else 1 if count == size else shared if count == -(-size // shared) else 0
        for size, count, shared in zip(matrix, (rows, cols), block, strict=True)
    ]
    return (found[0], found[1]) if all(found) else None


def dequantise(entries: Array, start: int, shape: tuple[int, ...], scales: Array, block: Block) -> NDArray[np.float32]:
    """Float8 entries from `start` of a weight, flat, times their scales.

    Args:
        scales: all of the weight's scales, in their shape; `fit_block` gives the block.

    Source: DeepSeek-V3's `weight_dequant`; compressed-tensors' float-quantized format.
    """
    values: NDArray[np.float32] = _VALUES[entries.dtype][entries.view(np.uint8)]
    rows, cols = (1, 1, *shape)[-2:]
    stacked = _as_matrices(scales.shape, len(shape))
    table = np.broadcast_to(scales.astype(np.float32).reshape(stacked), (*shape[:-2], *stacked[-2:])).reshape(
        -1, *stacked[-2:]
    )  # (matrices, row blocks, column blocks)
    at = start
    while at < start + len(values):
        matrix, row = divmod(at // cols, rows)
        last = min((row // block[0] + 1) * block[0], rows)  # the first row that has other scales
        stop = min((matrix * rows + last) * cols, start + len(values))
        factors = np.repeat(table[matrix, row // block[0]], block[1])[:cols]
        with np.errstate(all="ignore"):
            _scale_rows(values[at - start : stop - start], at % cols, factors)
        at = stop
    return values


def _scale_rows(entries: Array, column: int, factors: Array) -> None:
    """Multiply rows by one factor a column, in place; the first begins at `column`, and the last may be cut off."""
    head = min(-column % len(factors), len(entries))
    entries[:head] *= factors[column : column + head]
    whole = (len(entries) - head) // len(factors) * len(factors)
    entries[head : head + whole].reshape(-1, len(factors))[:] *= factors
    tail = entries[head + whole :]
    tail *= factors[: len(tail)]


def _as_matrices(scales: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """The shape of scales with as many dimensions as their weight; one dimension is a scale a row."""
    if len(scales) == 1 and dimensions > 1:
        scales = (*scales, 1)
    return (1,) * (max(dimensions, 2) - len(scales)) + scales
