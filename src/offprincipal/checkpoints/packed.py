"""Weights packed into a few bits, with scales beside them, as the numbers that they stand for, a slice at a time.

One record a format: the tensors that make up a weight, its shape, and the formula, each from the format's own
documentation or the library that runs it. Knows names, shapes and numbers; reads nothing.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import Array, TensorInfo

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # OCP microscaling
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where each of eight weights lies in its word
_MOST_ENTRIES = 1 << 40
_MOST_OF_STATE = 1 << 16

Parts = Mapping[str, Array]


@dataclass(frozen=True)
class Packed:
    """A weight that several tensors make up.

    Args:
        info: its name and shape; method: what it is packed by.
        members: part -> the tensor that holds it; stacked: those that have a slice for each of `info.shape[0]`.
        decode: from the parts of one slice, or of the whole, to its entries in float32; raises ValueError.
    """

    info: TensorInfo
    method: str
    members: Mapping[str, TensorInfo]
    decode: Callable[[Parts], Array]
    stacked: bool = False

    @property
    def slices(self) -> int:
        return self.info.shape[0] if self.stacked else 1


def packed_in(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Packed]:
    """The packed weights among some tensors, by the names that they would have unpacked.

    Args:
        config: the model's `config.json`.

    >>> shapes = {"a_blocks": (2, 6, 1, 16), "a_scales": (2, 6, 1)}
    >>> found = packed_in({n: TensorInfo(n, shape, "uint8") for n, shape in shapes.items()}, {})
    >>> found["a"].info.shape, found["a"].method
    ((2, 32, 6), 'MXFP4')
    """
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    found = {}
    for kind in (_mxfp4, _words, _compressed, _int8, _bitsandbytes_4, _bitsandbytes_8):
        for packed in kind(infos, settings):
            if 0 < packed.info.numel <= _MOST_ENTRIES and packed.info.name not in found:
                found[packed.info.name] = packed
    return found


def dequantised_notes(how: Iterable[str]) -> list[str]:
    """Warnings about tensors that were dequantised.

    Args:
        how: of each, how it was kept.

    >>> dequantised_notes(["packed by AWQ"])[0][:51]
    '1 tensors packed by AWQ were dequantised to float32'
    """
    return [
        f"{many} tensors {kept} were dequantised to float32: beside unpacked ones, what packing lost counts as a change"
        for kept, many in Counter(how).items()
    ]


def _with(infos: Mapping[str, TensorInfo], ending: str, *needed: str) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """Stem -> the tensors of these endings, if all that are needed are there."""
    for name in infos:
        if name.endswith(ending):
            stem = name.removesuffix(ending)
            if all(stem + other in infos for other in needed):
                yield stem, {other: infos[stem + other] for other in (ending, *needed)}


def _also(infos: Mapping[str, TensorInfo], stem: str, members: dict[str, TensorInfo], *endings: str) -> None:
    members |= {ending: infos[stem + ending] for ending in endings if stem + ending in infos}


def _mxfp4(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """gpt-oss: 32 numbers of four bits share a power of two; (experts, out, groups, 16) and (experts, out, groups).

    Source: OCP microscaling formats 1.0; transformers' `convert_moe_packed_tensors`, which gives (experts, in, out).
    """
    for stem, members in _with(infos, "_blocks", "_scales"):
        blocks, scales = members["_blocks"], members["_scales"]
        if len(blocks.shape) == 4 and blocks.shape == (*scales.shape, 16) and blocks.dtype == scales.dtype == "uint8":
            experts, outputs, groups, _ = blocks.shape
            info = TensorInfo(stem, (experts, groups * 32, outputs), "float32")
            yield Packed(info, "MXFP4", members, _decode_mxfp4, stacked=True)


def _decode_mxfp4(parts: Parts) -> Array:
    blocks, scales = parts["_blocks"], parts["_scales"]
    values = _FP4[_nibbles(blocks)].reshape(*scales.shape, 32)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return np.ascontiguousarray(values.reshape(len(blocks), -1).T)


def _words(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """GPTQ, packed along the inputs, and AWQ, along the outputs: (q − zero) · scale in groups of inputs.

    Source: AutoGPTQ (checkpoint format `gptq` keeps zero − 1, `gptq_v2` keeps zero) and AutoAWQ, whose words hold eight
        weights in an order of their own.
    """
    bits = settings.get("bits", settings.get("w_bit", 4))
    if type(bits) is not int or bits not in (2, 4, 8):
        return
    pack = 32 // bits
    for stem, members in _with(infos, ".qweight", ".qzeros", ".scales"):
        weight, zeros, scales = (members[part].shape for part in (".qweight", ".qzeros", ".scales"))
        if len(weight) != 2 or len(scales) != 2 or zeros != (scales[0], scales[1] // pack) or not scales[0]:
            continue
        name = f"{stem}.weight"
        if weight[1] == scales[1]:
            _also(infos, stem, members, ".g_idx")
            inputs, first = weight[0] * pack, 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
            info = TensorInfo(name, (scales[1], inputs), "float32")
            yield Packed(info, f"GPTQ, {bits} bits", members, partial(_decode_gptq, bits=bits, first=first))
        elif bits == 4 and weight[1] * pack == scales[1] and weight[0] % scales[0] == 0:
            yield Packed(TensorInfo(name, (scales[1], weight[0]), "float32"), "AWQ, 4 bits", members, _decode_awq)


def _decode_gptq(parts: Parts, bits: int, first: int) -> Array:
    weight = _unpacked(parts[".qweight"].T, bits)  # (out, in)
    zeros, scales = _unpacked(parts[".qzeros"], bits) + first, parts[".scales"].astype(np.float32)  # (groups, out)
    inputs = weight.shape[1]
    groups = parts.get(".g_idx", np.arange(inputs) // -(-inputs // len(scales)))
    if groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= len(scales):
        raise ValueError("its groups are none of its scales'")
    return np.asarray((weight - zeros.T[:, groups]) * scales.T[:, groups], np.float32)


def _decode_awq(parts: Parts) -> Array:
    weight, zeros = (
        _unpacked(parts[part], 4).reshape(len(parts[part]), -1, 8)[:, :, _AWQ_ORDER].reshape(len(parts[part]), -1)
        for part in (".qweight", ".qzeros")
    )  # (in, out), (groups, out)
    scales = parts[".scales"].astype(np.float32)
    groups = np.arange(len(weight)) // (len(weight) // len(scales))
    return np.ascontiguousarray(((weight - zeros[groups]) * scales[groups]).T.astype(np.float32))


def _compressed(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """compressed-tensors, packed: integers of 4 or 8 bits about zero, FP4 with float8 scales (NVFP4) or powers of two.

    Source: compressed-tensors' `pack-quantized`, `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.
    """
    for stem, members in _with(infos, ".weight_packed", ".weight_scale"):
        packed, scales = members[".weight_packed"], members[".weight_scale"]
        if len(packed.shape) != 2 or len(scales.shape) != 2 or scales.shape[0] != packed.shape[0] or not scales.numel:
            continue
        name, outputs = f"{stem}.weight", packed.shape[0]
        if packed.dtype == "uint8":
            _also(infos, stem, members, ".weight_global_scale")
            info = TensorInfo(name, (outputs, 2 * packed.shape[1]), "float32")
            method = "NVFP4" if ".weight_global_scale" in members else "MXFP4"
            yield Packed(info, method, members, _decode_fp4)
        elif packed.dtype == "int32":
            _also(infos, stem, members, ".weight_zero_point", ".weight_g_idx", ".weight_shape")
            for bits in (4, 8):
                width = packed.shape[1] * 32 // bits
                if bits == _bits_of(settings):
                    info = TensorInfo(name, (outputs, width), "float32")
                    yield Packed(info, f"compressed-tensors, {bits} bits", members, partial(_decode_ints, bits=bits))


def _bits_of(settings: Mapping[str, Any]) -> int | None:
    """Bits of the weights, by the first group of the configuration; 4 where it says nothing."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if type(bits) is int:
            return bits
    return 4


def _decode_ints(parts: Parts, bits: int) -> Array:
    weight, scales = _unpacked(parts[".weight_packed"], bits), parts[".weight_scale"].astype(np.float32)
    half = 1 << (bits - 1)
    inputs = weight.shape[1]
    if ".weight_shape" in parts and parts[".weight_shape"].tolist() != list(weight.shape):
        raise ValueError("its shape is not a multiple of what a word holds, which is not read")
    groups = parts.get(".weight_g_idx", np.arange(inputs) // -(-inputs // scales.shape[1]))
    if groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= scales.shape[1]:
        raise ValueError("its groups are none of its scales'")
    zeros = np.zeros(scales.shape, np.int64)
    if ".weight_zero_point" in parts:
        stored = parts[".weight_zero_point"]
        zeros = _unpacked(stored.T, bits).T - half if stored.dtype == np.int32 else stored.astype(np.int64)
        if zeros.shape != scales.shape:
            raise ValueError("its zero points are not as many as its scales")
    return ((weight - half - zeros[:, groups]) * scales[:, groups]).astype(np.float32)


def _decode_fp4(parts: Parts) -> Array:
    packed, scales = parts[".weight_packed"], parts[".weight_scale"]
    values = _FP4[_nibbles(packed)].reshape(len(packed), -1)
    if ".weight_global_scale" in parts:
        scaled = scales.astype(np.float32) / float(parts[".weight_global_scale"].reshape(-1)[0])
    else:
        scaled = np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - 127)
    if values.shape[1] % scaled.shape[1]:
        raise ValueError("its groups are none of its scales'")
    return (values * np.repeat(scaled, values.shape[1] // scaled.shape[1], axis=1)).astype(np.float32)


def _int8(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """compressed-tensors, `int-quantized`: int8 weights with a scale a row, a group of inputs, or one."""
    for stem, members in _with(infos, ".weight", ".weight_scale"):
        weight, scales = members[".weight"], members[".weight_scale"]
        if weight.dtype == "int8" and scales.floating and len(weight.shape) == 2 and scales.numel:
            _also(infos, stem, members, ".weight_zero_point")
            yield Packed(TensorInfo(weight.name, weight.shape, "float32"), "int8", members, _decode_int8)


def _decode_int8(parts: Parts) -> Array:
    weight, scales = parts[".weight"].astype(np.float32), parts[".weight_scale"].astype(np.float32)
    if ".weight_zero_point" in parts:
        weight = weight - _spread(parts[".weight_zero_point"].astype(np.float32), weight.shape)
    return np.asarray(weight * _spread(scales, weight.shape))


def _spread(scales: Array, shape: tuple[int, ...]) -> Array:
    """Scales of a matrix, of its rows, or of groups of its inputs, one an entry."""
    rows = scales.reshape(1, 1) if scales.size == 1 else scales.reshape(scales.shape[0], -1)
    if rows.shape[0] not in (1, shape[0]) or shape[1] % rows.shape[1]:
        raise ValueError("its scales do not fit its shape")
    return np.repeat(rows, shape[1] // rows.shape[1], axis=1)


def _bitsandbytes_4(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """NF4 and FP4 of bitsandbytes, with scales that are quantised again or not; their shape is in `config.json` alone.

    Source: bitsandbytes' `QuantState.as_dict` and `dequantize_4bit`.
    """
    for name in infos:
        match = re.fullmatch(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)", name)
        if match is None or not all(match[1] + part in infos for part in ("", ".absmax", ".quant_map")):
            continue
        members = {"": infos[match[1]], "state": infos[name]}
        _also(infos, match[1], members, ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
        if members[""].dtype == "uint8" and infos[name].numel <= 1 << 12:
            info = TensorInfo(match[1], (members[""].numel * 2,), "float32")
            yield Packed(info, f"{match[2].upper()} of bitsandbytes", members, _decode_4)


def state_shape(state: Array) -> tuple[int, ...]:
    """The shape of a weight that bitsandbytes packed, in what it keeps beside.

    Raises:
        ValueError: there is none.
    """
    shape = _state(state).get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape) or len(shape) > 8:
        raise ValueError("its quant_state has no shape")
    return tuple(shape)


def _state(state: Array) -> dict[str, Any]:
    if state.nbytes > _MOST_OF_STATE:
        raise ValueError("its quant_state is too large")
    content = json.loads(state.tobytes())
    if not isinstance(content, dict):
        raise ValueError("its quant_state is not an object")
    return content


def _decode_4(parts: Parts) -> Array:
    about, code = _state(parts["state"]), parts[".quant_map"].astype(np.float32)
    values = code[_nibbles(parts[""].reshape(-1), high_first=True)]
    scales = parts[".absmax"]
    if ".nested_absmax" in parts:
        outer = np.repeat(parts[".nested_absmax"].astype(np.float32), _whole(about, "nested_blocksize"))[: len(scales)]
        offset = about.get("nested_offset")
        if not isinstance(offset, float | int) or len(outer) != len(scales):
            raise ValueError("its scales of scales do not fit")
        scales = parts[".nested_quant_map"].astype(np.float32)[scales] * outer + np.float32(offset)
    spread = np.repeat(scales.astype(np.float32), _whole(about, "blocksize"))[: len(values)]
    if len(spread) != len(values) or len(values) < math.prod(state_shape(parts["state"])):
        raise ValueError("its scales do not fit its shape")
    return np.asarray(values * spread)


def _whole(about: Mapping[str, Any], name: str) -> int:
    value = about.get(name)
    if type(value) is not int or not 0 < value <= 1 << 16:
        raise ValueError(f"its quant_state has no {name}")
    return value


def _bitsandbytes_8(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """LLM.int8(): q · SCB/127, a scale a row."""
    for stem, members in _with(infos, ".weight", ".SCB"):
        weight, scales = members[".weight"], members[".SCB"]
        if weight.dtype == "int8" and len(weight.shape) == 2 and scales.shape == weight.shape[:1]:
            _also(infos, stem, members, ".weight_format")
            info = TensorInfo(weight.name, weight.shape, "float32")
            yield Packed(
                info,
                "int8 of bitsandbytes",
                members,
                _decode_scb,
            )


def _decode_scb(parts: Parts) -> Array:
    scales = parts[".SCB"].astype(np.float32) / np.float32(127)
    return np.asarray(parts[".weight"].astype(np.float32) * scales[:, None])


def _unpacked(words: Array, bits: int) -> Array:
    """Unsigned integers of so many bits along the last axis, the lowest of each word first; int64."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return values.astype(np.int64).reshape(*words.shape[:-1], -1)


def _nibbles(values: Array, high_first: bool = False) -> Array:
    """Two halves of each byte, in turn along the last axis."""
    halves = [values & 0x0F, values >> 4]
    return np.stack(halves[::-1] if high_first else halves, axis=-1).reshape(*values.shape[:-1], -1)
