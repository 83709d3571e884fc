"""(b) The full comparison against two SVDs a matrix; (c) a second tuned model once the base is in the cache."""

from functools import partial
from itertools import product
from pathlib import Path

from alternatives import two_svds
from harness import SIDE_BY_SIDE, Cost, Table, cache_folder, in_turn, number, timed
from pairs import Pair

from offprincipal import compare

SVD = "`torch.linalg.svd(float32, full_matrices=False)` of base and tuned, all cores"
TURNED = {False: "as stored", True: "wide matrices transposed first, which is faster"}


def against_svd(pair: Pair, rounds: int) -> Table:
    """All metrics with their nulls and error bounds, in process."""
    names = pair.linear_matrices()

    def svds(tall: bool) -> Cost:
        return timed(lambda: two_svds(pair.base, pair.tuned, names, tall=tall))

    rows: list[tuple[str, ...]] = []
    with cache_folder() as cache:
        full(pair, cache)
        kinds = {"the base in the cache": partial(full, pair, cache), "nothing in the cache": partial(full, pair)}
        for (held, ours), (tall, turned) in product(kinds.items(), TURNED.items()):
            found = in_turn(ours, partial(svds, tall), rounds)
            rows.append((f"`compare(...)`, {held}", f"{SVD}, {turned}", *found.cells()))
    note = (
        f"{len(names)} linear matrices of a pair of {number(pair.parameters / 1e6)} M parameters, in process. The "
        "alternative decomposes them and measures nothing; ours measures every metric with its nulls, and scans the "
        "embedding too."
    )
    return Table("(b) Full comparison", note, SIDE_BY_SIDE, tuple(rows))


def second_tuned(first: Pair, second: Pair, rounds: int) -> Table:
    """Ours against ours: what the cache saves."""

    def cached() -> Cost:
        with cache_folder() as cache:
            full(first, cache)
            return full(second, cache)

    found = in_turn(cached, lambda: full(first), rounds, [lambda: full(first)])
    note = "The same base and another model tuned from it, in process, all metrics."
    row = ("`compare(...)` of the second, after the first", "`compare(...)` of the first, nothing in the cache")
    return Table("(c) Second tuned checkpoint", note, SIDE_BY_SIDE, ((*row, *found.cells()),))


def full(pair: Pair, cache: Path | None = None) -> Cost:
    with cache_folder(cache):
        return timed(lambda: compare(pair.base, {"tuned": pair.tuned}))
