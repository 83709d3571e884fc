"""(g) A 7 B-shaped pair end to end on a CUDA GPU."""

import torch
from alternatives import two_svds
from harness import SIDE_BY_SIDE, Cost, NotMeasured, Table, compare_command, in_turn, timed
from pairs import PairFolder

SHAPE = "7b"
LAYERS = 28


def end_to_end(folder: PairFolder, rounds: int) -> Table:
    """The whole process, base uncached, against two SVDs a matrix on the same GPU.

    Raises:
        NotMeasured: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise NotMeasured("no CUDA GPU at hand")
    pair = folder.pair(SHAPE, device="cuda")
    names = [name for name in pair.linear_matrices() if ".layers.0." in name]

    def ours() -> Cost:
        return compare_command(pair.base, pair.tuned, "--device", "cuda")

    def svds() -> Cost:
        return Cost(LAYERS * timed(lambda: two_svds(pair.base, pair.tuned, names, "cuda")).seconds)

    found = in_turn(ours, svds, rounds, [ours])
    note = f"{torch.cuda.get_device_name()}; {pair.parameters / 1e9:.1f} B parameters, the files in the page cache."
    row = (
        "`offprincipal compare --device cuda`, all metrics, nothing in the cache, the whole process",
        f"`torch.linalg.svd` of base and tuned on the GPU, one layer's matrices times {LAYERS}",
    )
    return Table("(g) GPU", note, SIDE_BY_SIDE, ((*row, *found.cells()),))
