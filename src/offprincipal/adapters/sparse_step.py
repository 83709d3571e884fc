"""One step of AdamW on some entries of a float32 or bfloat16 array, compiled: gathered, updated and put back in blocks.

Blocks of a hundred active entries stay in the nearest cache, so that memory is read and written once; what comes next
is fetched while they are computed; and all of it is vectorized. It rounds as torch's fused kernel for CPUs does on its
vectors: the moments by fused multiply-add, the square root as IEEE 754 has it. Compiled by numba at first use. Knows
nothing of parameters or optimizers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numpy.typing import NDArray

from offprincipal.geometry.compiled import compiled

Array = NDArray[Any]
Floats = NDArray[np.float32]
_intrinsic: Any = extending.intrinsic  # numba's types for it are those of another kind of function
_declared: Any = cgutils.get_or_insert_function
_BLOCK = 128  # active entries that are updated together, at most
_WORDS = 64  # of 64 entries that these are taken from, at most
_LANES = 16  # that are taken out or put back at once
_MOMENTS_AHEAD = 256  # entries by which moments are asked for before they are needed
_PLACES_AHEAD = 64  # and active entries by which weights and gradients are
_LEAST = 1 << 16  # entries for which another thread is worth its start


def coefficients(step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Floats:
    """What one step multiplies by, each rounded once from float64.

    Returns:
        1 − lr·decay, 1 − β1, 1 − β2, β2, √(1 − β2ᵗ), ε, −lr/(1 − β1ᵗ).

    Source: Loshchilov and Hutter, arXiv 1711.05101, in torch's order of operations.

    >>> coefficients(1, 0.5, (0.75, 0.75), 0.0, 0.5).tolist()
    [0.75, 0.25, 0.25, 0.75, 0.5, 0.0, -2.0]
    """
    one, two = betas
    scale, root = 1 - one**step, (1 - two**step) ** 0.5
    return np.array([1 - lr * weight_decay, 1 - one, 1 - two, two, root, eps, -lr / scale], np.float32)


def step_entries(
    index: Array | tuple[Array, Array],
    param: Array,
    grad: Array,
    master: Floats | None,
    m: Floats,
    v: Floats,
    c: Floats,
    threads: int,
) -> None:
    """Move the active entries of a parameter, in place.

    Args:
        index: all entries as bits, uint64, as `geometry.scan.pack` gives; or, for each stretch of 65536 entries, where
            its offsets stop, int64, and the offsets of the active entries within their stretches, rising, uint16.
        param, grad: flat and contiguous; float32, or the bits of bfloat16 as uint16 with `master` in float32.
        master, m, v: float32, one entry for each active one.
        c: from `coefficients`.
        threads: at most so many at once; the result does not depend on it.

    >>> param, m, v = np.ones(4, np.float32), np.zeros(2, np.float32), np.zeros(2, np.float32)
    >>> c = coefficients(1, 0.5, (0.9, 0.99), 0.0, 0.0)
    >>> step_entries(np.array([0b101], np.uint64), param, np.ones(4, np.float32), None, m, v, c, 1)
    >>> param.tolist()
    [0.5, 1.0, 0.5, 1.0]
    """
    run, pieces = (_step_by_bits, len(index)) if isinstance(index, np.ndarray) else (_step_by_offsets, len(index[0]))
    parts = min(threads, max(len(param) // _LEAST, 1))
    if parts == 1:
        run(index, 0, pieces, 0, param, grad, master, m, v, c)
        return
    cuts = [pieces * part // parts for part in range(parts + 1)]
    work: list[Callable[[], None]] = [
        partial(run, index, first, last, _active_before(index, first), param, grad, master, m, v, c)
        for first, last in pairwise(cuts)
    ]
    list(_pool(threads).map(lambda part: part(), work))


def _active_before(index: Array | tuple[Array, Array], piece: int) -> int:
    """How many active entries come before one of the words or stretches."""
    if isinstance(index, np.ndarray):
        return int(np.bitwise_count(index[:piece]).sum())
    return int(index[0][piece - 1]) if piece else 0


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="offprincipal-step")


@_intrinsic
def _ones(typing_context, word):  # type: ignore[no-untyped-def] # pragma: no cover
    """How many bits are set."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.intp(types.uint64), generate


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:  # pragma: no cover
    """A pointer to sixteen entries of an array, and the type of these."""
    data = context.make_array(array_type)(context, builder, array).data
    vector = ir.VectorType(context.get_data_type(array_type.dtype), _LANES)
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer()), vector


def _chosen_lanes(builder: Any, word: Any) -> Any:  # pragma: no cover
    """The lowest sixteen bits of a word, one for each lane."""
    return builder.bitcast(builder.trunc(word, ir.IntType(_LANES)), ir.VectorType(ir.IntType(1), _LANES))


@_intrinsic
def _take_out(typing_context, source, at, word, target, to):  # type: ignore[no-untyped-def] # pragma: no cover
    """Of the sixteen entries from `at`, those whose bit is set, side by side from `to` on; sixteen are written.

    uint16 entries are taken for bfloat16, and become the bits of float32.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source_type, _, _, target_type, _ = signature.args
        pointer, vector = _lanes(context, builder, source_type, arguments[0], arguments[1])
        entries = builder.load(pointer, align=source_type.dtype.bitwidth // 8)
        if source_type.dtype == types.uint16:
            vector = ir.VectorType(ir.IntType(32), _LANES)
            entries = builder.shl(builder.zext(entries, vector), vector([16] * _LANES))
        chosen = _chosen_lanes(builder, arguments[2])
        name = f"llvm.experimental.vector.compress.v{_LANES}{'i32' if source_type.dtype == types.uint16 else 'f32'}"
        kind = ir.FunctionType(vector, [vector, chosen.type, vector])
        compress = _declared(builder.module, kind, name)
        found = builder.call(compress, [entries, chosen, ir.Constant(vector, ir.Undefined)])
        target_pointer, target_vector = _lanes(context, builder, target_type, arguments[3], arguments[4])
        builder.store(builder.bitcast(found, target_vector), target_pointer, align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.uint64, target, types.intp), generate


@_intrinsic
def _put_back(typing_context, source, at, word, target, to):  # type: ignore[no-untyped-def] # pragma: no cover
    """The entries from `at` on, in turn, to those of sixteen from `to` on whose bit is set; the others stay."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source_type, _, _, target_type, _ = signature.args
        if source_type.dtype != target_type.dtype:
            return context.get_dummy_value()  # in the branch for the other type of weights, which is never run
        pointer, vector = _lanes(context, builder, source_type, arguments[0], arguments[1])
        target_pointer, _ = _lanes(context, builder, target_type, arguments[3], arguments[4])
        size = source_type.dtype.bitwidth // 8
        chosen = _chosen_lanes(builder, arguments[2])
        name = f"llvm.masked.expandload.v{_LANES}{'i16' if source_type.dtype == types.uint16 else 'f32'}"
        element = vector.element.as_pointer()
        kind = ir.FunctionType(vector, [element, chosen.type, vector])
        expand = _declared(builder.module, kind, name)
        before = builder.load(target_pointer, align=size)
        after = builder.call(expand, [builder.bitcast(pointer, element), chosen, before])
        builder.store(after, target_pointer, align=size)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.uint64, target, types.intp), generate


@_intrinsic
def _fetch(typing_context, array, at):  # type: ignore[no-untyped-def] # pragma: no cover
    """Ask for the cache line of an entry, which may lie past the end: a hint, which changes nothing."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        hints = [ir.IntType(32)(hint) for hint in (0, 3, 1)]  # to read, into every cache, data
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, *(hint.type for hint in hints)])
        builder.call(_declared(builder.module, kind, "llvm.prefetch.p0"), [pointer, *hints])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_intrinsic
def _advance_lanes(typing_context, g, w, m, v, places, count, c):  # type: ignore[no-untyped-def] # pragma: no cover
    """AdamW on sixteen entries of `g`, `w`, and of `m` and `v`, from three places on; `count` of them are written."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vector = ir.VectorType(ir.FloatType(), _LANES)
        at = [builder.extract_value(arguments[4], i) for i in (0, 1, 2, 2)]
        pointers = [
            _lanes(context, builder, kind, array, place)[0]
            for kind, array, place in zip(signature.args[:4], arguments[:4], at, strict=True)
        ]
        whole = ir.VectorType(ir.IntType(64), _LANES)
        written = builder.icmp_signed("<", whole(list(range(_LANES))), _all_lanes(builder, arguments[5], whole))
        loaded = ir.FunctionType(vector, [vector.as_pointer(), ir.IntType(32), written.type, vector])
        load = _declared(builder.module, loaded, f"llvm.masked.load.v{_LANES}f32.p0")
        x, weight, y, square = (
            builder.call(load, [pointer, ir.IntType(32)(4), written, vector(None)]) for pointer in pointers
        )
        settings = [_all_lanes(builder, builder.extract_value(arguments[6], i), vector) for i in range(8)]
        decay, coefficient, near, two, beta, root, eps, size = settings
        fma = _declared(builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_LANES}f32")
        sqrt = _declared(builder.module, ir.FunctionType(vector, [vector]), f"llvm.sqrt.v{_LANES}f32")
        start = builder.select(builder.fcmp_ordered("!=", near, vector([0.0] * _LANES)), y, x)
        moment = builder.call(fma, [coefficient, builder.fsub(x, y), start])
        square = builder.call(fma, [builder.fmul(two, x), x, builder.fmul(beta, square)])
        divisor = builder.fadd(builder.fdiv(builder.call(sqrt, [square]), root), eps)
        weight = builder.fadd(builder.fmul(weight, decay), builder.fdiv(builder.fmul(size, moment), divisor))
        stored = ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), ir.IntType(32), written.type])
        store = _declared(builder.module, stored, f"llvm.masked.store.v{_LANES}f32.p0")
        for value, pointer in zip((weight, moment, square), pointers[1:], strict=True):
            builder.call(store, [value, pointer, ir.IntType(32)(4), written])
        return context.get_dummy_value()

    return types.void(g, w, m, v, places, types.intp, c), generate


def _all_lanes(builder: Any, value: Any, vector: Any) -> Any:  # pragma: no cover
    """One number in every lane."""
    lane = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.VectorType(ir.IntType(32), _LANES)(None)
    return builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), zeros)


@compiled(error_model="numpy")
def _advance(g, w, own, m, v, slot, count, c, param, grad, ahead, stride):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move `count` entries whose moments begin at `slot`; of `w`, those from `own` on.

    Meanwhile their successors' moments, and `stride` entries of both arrays from `ahead` on for every sixteen, come in.
    """
    one = c[1]
    near = one < np.float32(0.5)
    settings = (c[0], one if near else one - np.float32(1), np.float32(near), c[2], c[3], c[4], c[5], c[6])
    for i in range(0, count, _LANES):
        _fetch(m, slot + i + _MOMENTS_AHEAD)
        _fetch(v, slot + i + _MOMENTS_AHEAD)
        for at in range(ahead, ahead + stride, _LANES):
            _fetch(param, at)
            _fetch(grad, at)
        ahead += stride
        _advance_lanes(g, w, m, v, (i, own + i, slot + i), count - i, settings)


@compiled(error_model="numpy")
def _round(wide, slot, count, narrow):  # type: ignore[no-untyped-def] # pragma: no cover
    """The bits of float32 numbers, from `slot` on, rounded to bfloat16, ties to even."""
    for i in range(count):
        bits = wide[slot + i]
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        narrow[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled(error_model="numpy")
def _step_at(places, origin, slot, param, grad, master, m, v, c, buffers):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move the entries at some places after `origin`, whose moments begin at `slot`, one by one."""
    bits, w, narrow = buffers
    g = bits.view(np.float32)
    for start in range(0, len(places), _BLOCK):
        count = min(_BLOCK, len(places) - start)
        for i in range(start, start + count):
            next_place = origin + np.int64(places[min(i + _PLACES_AHEAD, len(places) - 1)])
            _fetch(param, next_place)
            _fetch(grad, next_place)
            place = origin + np.int64(places[i])
            if master is None:
                g[i - start], w[i - start] = grad[place], param[place]
            else:
                bits[i - start] = np.uint32(grad[place]) << np.uint32(16)
        if master is None:
            _advance(g, w, 0, m, v, slot, count, c, param, grad, 0, 0)
            for i in range(count):
                param[origin + np.int64(places[start + i])] = w[i]
        else:
            _advance(g, master, slot, m, v, slot, count, c, param, grad, 0, 0)
            _round(master.view(np.uint32), slot, count, narrow)
            for i in range(count):
                param[origin + np.int64(places[start + i])] = narrow[i]
        slot += count


@compiled(error_model="numpy")
def _buffers():  # type: ignore[no-untyped-def] # pragma: no cover
    """Gradients, weights and rounded weights of a block, with room for lanes that are written past it."""
    size = _BLOCK + _LANES
    return np.empty(size, np.uint32), np.empty(size, np.float32), np.empty(size, np.uint16)


@compiled(error_model="numpy")
def _step_by_offsets(index, first, last, slot, param, grad, master, m, v, c):  # type: ignore[no-untyped-def] # pragma: no cover
    stops, offsets = index
    buffers = _buffers()
    for stretch in range(first, last):
        stop = stops[stretch]
        places = offsets[slot:stop]
        _step_at(places, stretch << 16, slot, param, grad, master, m, v, c, buffers)
        slot = stop


@compiled(error_model="numpy")
def _step_by_bits(words, first, last, slot, param, grad, master, m, v, c):  # type: ignore[no-untyped-def] # pragma: no cover
    buffers = _buffers()
    bits, w, narrow = buffers
    g = bits.view(np.float32)
    whole = min(last, len(param) // 64)
    stop = first
    while stop < whole:
        start, count = stop, 0
        while stop < whole and count <= _BLOCK - 64 and stop - start < _WORDS:
            word = words[stop]
            for at in range(64 * stop, 64 * stop + 64, _LANES):
                if master is None:
                    _take_out(grad, at, word, g, count)
                    _take_out(param, at, word, w, count)
                else:
                    _take_out(grad, at, word, bits, count)
                count += _ones(word & np.uint64(0xFFFF))
                word >>= np.uint64(_LANES)
            stop += 1
        stride = 64 * (stop - start) * _LANES // max(count, 1)
        if master is None:
            _advance(g, w, 0, m, v, slot, count, c, param, grad, 64 * stop, stride)
        else:
            _advance(g, master, slot, m, v, slot, count, c, param, grad, 64 * stop, stride)
            _round(master.view(np.uint32), slot, count, narrow)
        slot += count
        count = 0
        for k in range(start, stop):
            word = words[k]
            for at in range(64 * k, 64 * k + 64, _LANES):
                if master is None:
                    _put_back(w, count, word, param, at)
                else:
                    _put_back(narrow, count, word, param, at)
                count += _ones(word & np.uint64(0xFFFF))
                word >>= np.uint64(_LANES)
    if whole < last:  # the last word, where the array ends within it
        places, count = np.empty(64, np.uint16), 0
        for bit in range(64):
            if (words[whole] >> np.uint64(bit)) & np.uint64(1):
                places[count] = bit
                count += 1
        _step_at(places[:count], 64 * whole, slot, param, grad, master, m, v, c, buffers)
