"""(a) Which weights changed: against loading both models, a plain safetensors loop, and a copy of as many bytes."""

import sys
from functools import partial
from pathlib import Path

import torch
from alternatives import MemoryCopy, safetensors_loop
from harness import SIDE_BY_SIDE, Cost, Table, cache_folder, compare_command, in_turn, number, process, timed
from pairs import Pair

from offprincipal import compare
from offprincipal.comparison import CompareSettings

PROGRAM = Path(__file__).with_name("alternatives.py")
COMMAND = "`offprincipal compare --metrics {} --no-report`, the whole process"

LOADED = (
    ("float32", "relative", "in float32, and compared to 1e-3 relative by torch"),
    ("auto", "relative", "as stored (bfloat16), and compared to 1e-3 relative by torch"),
    ("bfloat16", "by-tensor", "in bfloat16, and compared as by `check_sparsity.py` of `sparsity_in_rl`"),
    ("bfloat16", "gathered", "in bfloat16, and compared as by the first version of that script"),
)


def change_scan(pair: Pair, rounds: int, loaded: int = len(LOADED)) -> Table:
    """Every tensor of both models, embeddings too; against so many of LOADED."""
    rows = [*whole_processes(pair, rounds, loaded), *in_process(pair, rounds)]
    note = (
        f"A pair of {number(pair.parameters / 1e6)} M parameters, {pair.stored_bytes / 1e9:.2f} GB in bfloat16, in the "
        "page cache. `changes` counts exactly, with norms, the histogram of magnitudes and what a Gaussian update "
        "would leave; `location` adds the ladder of nulls; the alternatives count. The copy is from memory to memory, "
        "so its ratio is our share of the copy bandwidth."
    )
    return Table("(a) Change scan", note, SIDE_BY_SIDE, tuple(rows))


def whole_processes(pair: Pair, rounds: int, loaded: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metrics, against in (("changes", LOADED[:loaded]), ("location", LOADED[:1])):
        scan = partial(compare_command, pair.base, pair.tuned, "--metrics", metrics)
        scan()
        for dtype, count, meaning in against:
            found = in_turn(scan, partial(loading, pair, dtype, count), rounds)
            words = f"both loaded by transformers, {meaning}, the whole process"
            rows.append((COMMAND.format(metrics), words, *found.cells()))
    return rows


def loading(pair: Pair, dtype: str, count: str) -> Cost:
    options = ["--dtype", dtype, "--count", count]
    return process([sys.executable, PROGRAM, "load-and-compare", pair.base, pair.tuned, *options])


def in_process(pair: Pair, rounds: int) -> list[tuple[str, ...]]:
    settings = CompareSettings(metrics=("changes",))

    def ours() -> Cost:
        with cache_folder():
            return timed(lambda: compare(pair.base, {"tuned": pair.tuned}, settings))

    def loop() -> Cost:
        return timed(lambda: safetensors_loop(pair.base, pair.tuned))

    memory = MemoryCopy(pair.stored_bytes)

    def copy() -> Cost:
        return timed(memory.run)

    threads = torch.get_num_threads()
    call = '`compare(..., CompareSettings(metrics=("changes",)))`, in process'
    against_loop = in_turn(ours, loop, rounds, [ours, loop])
    against_copy = in_turn(ours, copy, rounds, [copy])
    return [
        (call, f"safetensors loop: `torch.ne` and a sum a tensor, {threads} threads", *against_loop.cells()),
        (call, f"memory copy of {pair.stored_bytes / 1e9:.2f} GB, a thread a core", *against_copy.cells()),
    ]
