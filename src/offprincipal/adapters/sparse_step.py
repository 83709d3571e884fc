"""One step of AdamW on some entries of a float32 or bfloat16 array, compiled: gathered, updated and put back in blocks.

Blocks of a thousand active entries stay in the nearest caches, so that memory is read and written once, and all of it
is vectorized. It rounds as torch's fused kernel for CPUs does on its vectors: the moments by fused multiply-add, the
square root as IEEE 754 has it. Compiled by numba at first use. Knows nothing of parameters or optimizers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
_intrinsic: Any = extending.intrinsic  # numba's types for it are those of another kind of function
_declared: Any = cgutils.get_or_insert_function
_BLOCK = 1024  # active entries that are updated together, at most
_WORDS = 64  # of 64 entries that these are taken from, at most
_LANES = 16  # that are taken out or put back at once
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
    index: Array, param: Array, grad: Array, master: Floats | None, m: Floats, v: Floats, c: Floats, threads: int
) -> None:
    """Move the active entries of a parameter, in place.

    Args:
        index: the active entries in rising order, uint32; or all entries as bits, uint64, as `geometry.scan.pack`
            gives.
        param, grad: flat and contiguous; float32, or the bits of bfloat16 as uint16 with `master` in float32.
        master, m, v: float32, one entry for each active one.
        c: from `coefficients`.
        threads: at most so many at once; the result does not depend on it.

    >>> param, m, v = np.ones(4, np.float32), np.zeros(2, np.float32), np.zeros(2, np.float32)
    >>> c = coefficients(1, 0.5, (0.9, 0.99), 0.0, 0.0)
    >>> step_entries(np.array([0, 2], np.uint32), param, np.ones(4, np.float32), None, m, v, c, 1)
    >>> param.tolist()
    [0.5, 1.0, 0.5, 1.0]
    """
    parts = min(threads, max(len(param) // _LEAST, 1))
    cuts = np.linspace(0, len(index), parts + 1).astype(np.int64)
    by_bits = index.dtype == np.uint64
    starts = [int(np.bitwise_count(index[:cut]).sum()) for cut in cuts] if by_bits and parts > 1 else cuts
    run = _step_by_bits if by_bits else _step_by_index
    work: list[Callable[[], None]] = [
        partial(run, index, first, last, slot, param, grad, master, m, v, c)
        for first, last, slot in zip(cuts[:-1], cuts[1:], starts[:-1], strict=True)
    ]
    if parts == 1:
        work[0]()
    else:
        list(_pool(threads).map(lambda part: part(), work))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="offprincipal-step")


@_intrinsic
def _fma(typing_context, a, b, c):  # type: ignore[no-untyped-def] # pragma: no cover
    """a·b + c, rounded once."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


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


@njit(nogil=True, cache=True, error_model="numpy")
def _advance(g, w, m, v, count, c):  # type: ignore[no-untyped-def] # pragma: no cover
    decay, one, two, beta, root, eps, size = c[0], c[1], c[2], c[3], c[4], c[5], c[6]
    near = one < np.float32(0.5)
    coefficient = one if near else one - np.float32(1)
    for i in range(count):
        x, y = g[i], m[i]
        moment = _fma(coefficient, x - y, y if near else x)
        square = _fma(two * x, x, beta * v[i])
        m[i], v[i] = moment, square
        w[i] = w[i] * decay + (size * moment) / (np.sqrt(square) / root + eps)


@njit(nogil=True, cache=True, error_model="numpy")
def _round(wide, count, narrow):  # type: ignore[no-untyped-def] # pragma: no cover
    """The bits of float32 numbers, rounded to bfloat16, ties to even."""
    for i in range(count):
        odd = (wide[i] >> np.uint32(16)) & np.uint32(1)
        narrow[i] = np.uint16((wide[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@njit(nogil=True, cache=True, error_model="numpy")
def _step_at(places, slot, param, grad, master, m, v, c, bits, w, narrow):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move the entries at some places, whose moments begin at `slot`, one by one."""
    count = len(places)
    g = bits.view(np.float32)
    in_m, in_v = m[slot : slot + count], v[slot : slot + count]
    if master is None:
        for i in range(count):
            g[i], w[i] = grad[places[i]], param[places[i]]
        _advance(g, w, in_m, in_v, count, c)
        for i in range(count):
            param[places[i]] = w[i]
    else:
        for i in range(count):
            bits[i] = np.uint32(grad[places[i]]) << np.uint32(16)
        own = master[slot : slot + count]
        _advance(g, own, in_m, in_v, count, c)
        _round(own.view(np.uint32), count, narrow)
        for i in range(count):
            param[places[i]] = narrow[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _step_by_index(index, first, last, slot, param, grad, master, m, v, c):  # type: ignore[no-untyped-def] # pragma: no cover
    bits, w, narrow = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.uint16)
    for start in range(first, last, _BLOCK):
        places = index[start : min(start + _BLOCK, last)]
        _step_at(places, slot + start - first, param, grad, master, m, v, c, bits, w, narrow)


@njit(nogil=True, cache=True, error_model="numpy")
def _step_by_bits(words, first, last, slot, param, grad, master, m, v, c):  # type: ignore[no-untyped-def] # pragma: no cover
    size = _BLOCK + _LANES
    bits, w, narrow = np.empty(size, np.uint32), np.empty(size, np.float32), np.empty(size, np.uint16)
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
        in_m, in_v = m[slot : slot + count], v[slot : slot + count]
        if master is None:
            _advance(g, w, in_m, in_v, count, c)
        else:
            own = master[slot : slot + count]
            _advance(g, own, in_m, in_v, count, c)
            _round(own.view(np.uint32), count, narrow)
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
        places, count = np.empty(64, np.uint32), 0
        for bit in range(64):
            if (words[whole] >> np.uint64(bit)) & np.uint64(1):
                places[count] = 64 * whole + bit
                count += 1
        _step_at(places[:count], slot, param, grad, master, m, v, c, bits, w, narrow)
