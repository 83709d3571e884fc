"""The changes between two tensors of the same shape and type, losslessly in few bits. Arrays in, bytes out.

The indices of changed entries are coded per class of weights with the same exponent: whether a short step can change a
weight depends on it, and it is known from the base, so it costs nothing. Within a class the gaps between changed
entries, or between unchanged ones if those are fewer, are coded by a Golomb–Rice code with the best parameter. The
change of an entry is the difference of its bits: its sign, and its size minus one, which Zstandard compresses.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array
from offprincipal.geometry.compiled import compiled

MANTISSA = {
    "float64": 52, "float32": 23, "float16": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2,
}  # fmt: skip
_MOST_CLASSES = 1 << 11
_PARAMETERS = 48  # of Rice's code
_LEVEL = 9  # of Zstandard
_DENSE_FROM, _SPARSE_TO = 0.1, 0.6  # shares of changed entries between which both ways are tried

Kind = Literal["same", "sparse", "dense", "whole"]
Words = NDArray[np.unsignedinteger]
Integers = NDArray[np.int64]


class DamagedDelta(ValueError):
    """The bytes are not those of a delta between these tensors."""


@dataclass(frozen=True)
class Encoded:
    """What leads from one tensor to another.

    Args:
        kind: `same`; `sparse`, by places and values; `dense`, the differences of all; `whole`, all entries.
        parts: name -> bytes.
        changed: how many entries changed; all of them if there is no base.
    """

    kind: Kind
    parts: dict[str, bytes]
    changed: int

    @property
    def size(self) -> int:
        return sum(map(len, self.parts.values()))


def encode(tuned: Array, base: Array | None, dtype: str) -> Encoded:
    """What leads from a base's entries to the tuned ones.

    Args:
        tuned: (N,), as stored; base: the same, or None if the base has no such tensor.
        dtype: the name of their type, which tells where the exponent is.

    >>> base = np.linspace(1, 2, 1000, dtype=np.float32)
    >>> tuned = base.copy()
    >>> tuned[7] += 0.5
    >>> found = encode(tuned, base, "float32")
    >>> found.kind, found.changed, bool((decode(found, base, "float32", 1000).view(np.float32) == tuned).all())
    ('sparse', 1, True)
    """
    after = _words(tuned)
    if base is None:
        return Encoded("whole", {"data": _compressed(after)}, len(after))
    before = _words(base)
    difference = after - before
    changed = int(np.count_nonzero(difference))
    if not changed:
        return Encoded("same", {}, 0)
    share, ways = changed / len(after), []
    if share > _DENSE_FROM:
        ways.append(Encoded("dense", {"data": _compressed(difference)}, changed))
    if share < _SPARSE_TO:
        ways.append(Encoded("sparse", _sparse(before, difference, dtype), changed))
    return min(ways, key=lambda way: way.size)


def decode(encoded: Encoded, base: Array | None, dtype: str, numel: int) -> Words:
    """The tuned entries as unsigned words, (numel,): view them as their type.

    Raises:
        DamagedDelta: the bytes do not lead there from this base.
    """
    word = np.dtype(f"u{_itemsize(base, dtype)}")
    if encoded.kind == "whole":
        return _expanded(encoded.parts["data"], numel, word)
    if base is None:
        raise DamagedDelta("the base has no such tensor")
    before = _words(base)
    if encoded.kind == "same":
        return before.copy()
    if encoded.kind == "dense":
        difference = _expanded(encoded.parts["data"], numel, word)
        if np.count_nonzero(difference) != encoded.changed:
            raise DamagedDelta("its counts are not those of this base")
        return before + difference
    if encoded.kind != "sparse":
        raise DamagedDelta(f"it is of an unknown kind, {encoded.kind[:20]!r}")
    return _applied(before, encoded.parts, dtype, encoded.changed)


def compressed(content: bytes) -> bytes:
    """By Zstandard."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(content)


def expanded(content: bytes, size: int) -> bytes:
    """What `compressed` made, of a size that is known.

    Raises:
        DamagedDelta: it is of another size, or no such bytes.
    """
    try:
        if zstandard.frame_content_size(content) != size:
            raise DamagedDelta("compressed bytes are of another size than is said")
        found = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(content, max_output_size=size)
    except zstandard.ZstdError as error:
        raise DamagedDelta(f"compressed bytes are damaged ({error})") from error
    if len(found) != size:
        raise DamagedDelta("compressed bytes are of another size than is said")
    return found


def _sparse(before: Words, difference: Words, dtype: str) -> dict[str, bytes]:
    shift, count = _classes(dtype, before.dtype.itemsize)
    entries, hits = np.zeros(count, np.int64), np.zeros(count, np.int64)
    _count(before, difference, shift, count, entries, hits)
    inverted = 2 * hits > entries
    coded = np.where(inverted, entries - hits, hits)
    gaps = np.empty(int(coded.sum()), np.int64)
    values = np.empty(int(hits.sum()), before.dtype)
    _gather(before, difference, shift, count, inverted, _starts(coded), _starts(hits), gaps, values)
    parameters, bits = _best_parameters(gaps, coded)
    stream = np.zeros(-(-bits // 8), np.uint8)
    _write_rice(gaps, coded, parameters, stream)
    there = np.flatnonzero(entries)  # the base tells which
    table = np.stack([hits[there], parameters[there]]).astype("<i8")
    signed = values.view(f"i{before.dtype.itemsize}")
    sizes = np.where(signed < 0, -values.astype(np.uint64), values).astype(before.dtype) - before.dtype.type(1)
    return {
        "classes": _compressed(table.reshape(-1).view(np.uint64)),
        "gaps": stream.tobytes(),
        "signs": compressed(np.packbits(signed < 0).tobytes()),
        "sizes": _compressed(sizes),
    }


def _applied(before: Words, parts: dict[str, bytes], dtype: str, changed: int) -> Words:
    shift, count = _classes(dtype, before.dtype.itemsize)
    entries, nothing = np.zeros(count, np.int64), np.zeros(count, np.int64)
    _count(before, np.zeros_like(before), shift, count, entries, nothing)
    there = np.flatnonzero(entries)
    table = _expanded(parts["classes"], 2 * len(there), np.dtype(np.uint64)).view(np.int64).reshape(2, -1)
    hits, parameters = np.zeros(count, np.int64), np.zeros(count, np.int64)
    hits[there], parameters[there] = table
    sane = (hits >= 0) & (hits <= entries) & (parameters >= 0) & (parameters < _PARAMETERS)
    if not sane.all() or int(hits.sum()) != changed:
        raise DamagedDelta("its counts are not those of this base")
    inverted = 2 * hits > entries
    coded = np.where(inverted, entries - hits, hits)
    gaps = np.empty(int(coded.sum()), np.int64)
    if not _read_rice(np.frombuffer(parts["gaps"], np.uint8), coded, parameters, entries, gaps):
        raise DamagedDelta("its places end too early, or lie beyond the tensor")
    sizes = _expanded(parts["sizes"], changed, before.dtype)
    signs = np.frombuffer(expanded(parts["signs"], -(-changed // 8)), np.uint8)
    steps = sizes + before.dtype.type(1)
    values = np.where(np.unpackbits(signs)[:changed] == 1, before.dtype.type(0) - steps, steps)
    after = before.copy()
    if not _scatter(after, shift, count, inverted, _starts(coded), _starts(hits), coded, hits, gaps, values):
        raise DamagedDelta("its places are not those of this base")
    return after


def _classes(dtype: str, itemsize: int) -> tuple[int, int]:
    """By how many bits to shift a word for its class, and how many classes there are at most."""
    shift = MANTISSA.get(dtype)
    return (8 * itemsize, 1) if shift is None else (shift, min(1 << (8 * itemsize - 1 - shift), _MOST_CLASSES))


def _starts(counts: Integers) -> Integers:
    return np.cumsum(counts) - counts


def _words(values: Array) -> Words:
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")


def _itemsize(base: Array | None, dtype: str) -> int:
    return base.dtype.itemsize if base is not None else (FLOATS | INTEGERS)[dtype].itemsize


def _compressed(words: Words) -> bytes:
    """Byte by byte of all words, since the high bytes are alike."""
    planes = words.astype(words.dtype.newbyteorder("<")).view(np.uint8).reshape(len(words), words.itemsize).T
    return compressed(np.ascontiguousarray(planes).tobytes())


def _expanded(content: bytes, count: int, word: "np.dtype[np.generic]") -> Words:
    planes = np.frombuffer(expanded(content, count * word.itemsize), np.uint8).reshape(word.itemsize, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(word.newbyteorder("<")).astype(word)


def _best_parameters(gaps: Integers, coded: Integers) -> tuple[Integers, int]:
    """The parameter of each class's code, and how many bits all take."""
    parameters, bits, start = np.zeros(len(coded), np.int64), 0, 0
    for place, count in enumerate(coded.tolist()):
        some = gaps[start : start + count]
        start += count
        if not count:
            continue
        near = max(0, round(math.log2(max(float(some.mean()) * math.log(2), 1e-9))))
        tried = range(max(0, near - 1), min(near + 2, _PARAMETERS))
        lengths = {k: int((some >> k).sum()) + count * (k + 1) for k in tried}
        parameters[place] = min(lengths, key=lambda k: lengths[k])
        bits += lengths[int(parameters[place])]
    return parameters, bits


@compiled()
def _count(before, difference, shift, count, entries, hits):  # type: ignore[no-untyped-def] # pragma: no cover
    low = np.uint64((1 << (8 * before.itemsize - 1)) - 1)
    for i in range(len(before)):
        slot = np.int64((np.uint64(before[i]) & low) >> np.uint64(shift)) if count > 1 else np.int64(0)
        entries[slot] += 1
        if difference[i] != 0:
            hits[slot] += 1


@compiled()
def _gather(before, difference, shift, count, inverted, gap_at, value_at, gaps, values):  # type: ignore[no-untyped-def] # pragma: no cover # fmt: skip
    """Gaps and values, class by class; `gap_at` and `value_at` move on."""
    low = np.uint64((1 << (8 * before.itemsize - 1)) - 1)
    since = np.zeros(count, np.int64)
    for i in range(len(before)):
        slot = np.int64((np.uint64(before[i]) & low) >> np.uint64(shift)) if count > 1 else np.int64(0)
        changed = difference[i] != 0
        if changed:
            values[value_at[slot]] = difference[i]
            value_at[slot] += 1
        if changed != inverted[slot]:
            gaps[gap_at[slot]] = since[slot]
            gap_at[slot] += 1
            since[slot] = 0
        else:
            since[slot] += 1


@compiled()
def _scatter(after, shift, count, inverted, gap_at, value_at, coded, hits, gaps, values):  # type: ignore[no-untyped-def] # pragma: no cover # fmt: skip
    """Add the values at their places; whether all of them found one."""
    low = np.uint64((1 << (8 * after.itemsize - 1)) - 1)
    gap_end, value_end = gap_at + coded, value_at + hits
    left = np.full(count, -1, np.int64)
    for first in range(count):
        if gap_at[first] < gap_end[first]:
            left[first] = gaps[gap_at[first]]
    for i in range(len(after)):
        slot = np.int64((np.uint64(after[i]) & low) >> np.uint64(shift)) if count > 1 else np.int64(0)
        named = left[slot] == 0
        if named:
            gap_at[slot] += 1
            left[slot] = gaps[gap_at[slot]] if gap_at[slot] < gap_end[slot] else -1
        elif left[slot] > 0:
            left[slot] -= 1
        if named != inverted[slot]:
            if value_at[slot] >= value_end[slot]:
                return False
            after[i] += values[value_at[slot]]
            value_at[slot] += 1
    return np.array_equal(gap_at, gap_end) and np.array_equal(value_at, value_end)


@compiled()
def _write_rice(gaps, coded, parameters, stream):  # type: ignore[no-untyped-def] # pragma: no cover
    """As many ones as the gap over 2^k, a zero, and the k bits that are left."""
    bit, place = 0, 0
    for slot in range(len(coded)):
        k = parameters[slot]
        for _ in range(coded[slot]):
            gap = gaps[place]
            place += 1
            for _ in range(gap >> k):
                stream[bit >> 3] |= np.uint8(1 << (bit & 7))
                bit += 1
            bit += 1
            for j in range(k):
                if (gap >> j) & 1:
                    stream[bit >> 3] |= np.uint8(1 << (bit & 7))
                bit += 1


@compiled()
def _read_rice(stream, coded, parameters, entries, gaps):  # type: ignore[no-untyped-def] # pragma: no cover
    """Whether the stream holds all gaps, and none leads beyond its class."""
    end, bit, place = 8 * len(stream), 0, 0
    for slot in range(len(coded)):
        k, reached = np.int64(parameters[slot]), np.int64(0)
        for _ in range(coded[slot]):
            gap = np.int64(0)
            while True:
                if bit >= end or gap > entries[slot]:
                    return False
                one = (stream[bit >> 3] >> (bit & 7)) & 1
                bit += 1
                if one == 0:
                    break
                gap += 1
            if bit + k > end or gap > entries[slot] >> k:
                return False
            gap = gap << k
            for j in range(k):
                gap |= np.int64((stream[bit >> 3] >> (bit & 7)) & 1) << j
                bit += 1
            reached += gap + 1
            if reached > entries[slot]:
                return False
            gaps[place] = gap
            place += 1
    return True
