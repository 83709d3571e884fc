"""What the margin null says of updates that know nothing: how often |z| exceeds 1.96, where 5 % is right.

    python scripts/check_nulls.py --draws 400
    python scripts/check_nulls.py --draws 200 --weights embedded
    python scripts/check_nulls.py --draws 400 --shape 384 512 --kinds both

Eight kinds of blind update on plain weights, on weights with scales of rows and columns, or on a model's own matrices;
the masks of principal and of small weights, and the changes of another such run. Beside it the spacing null's z.
"""

import argparse
import itertools

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints import open_checkpoint, parts_of
from offprincipal.geometry import bits, nulls, synthetic
from offprincipal.measures.pair import BaseMatrix, MatrixPair
from offprincipal.measures.settings import MatrixSettings
from offprincipal.models import model_name

MASKS = ("principal", "low_magnitude")
ALPHA = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="updates of each kind (%(default)s)")
    parser.add_argument("--step", type=float, default=0.003, help="relative norm of an update (%(default)s)")
    parser.add_argument("--shape", type=int, nargs=2, default=(192, 256), help="of made weights (192 256)")
    parser.add_argument("--kinds", default=",".join(synthetic.KINDS), help="of updates (all)")
    parser.add_argument("--weights", help="a checkpoint whose matrices are drawn from, in place of made ones")
    options = parser.parse_args()
    real = real_matrices(options.weights) if options.weights else {}
    print(f"{'weights':10} {'update':12} {'unchanged':>9}  share of |z| > 1.96: margin null (spacing null)")
    for weights, kind in itertools.product(["real"] if real else synthetic.WEIGHTS, options.kinds.split(",")):
        rows = []
        for draw in range(options.draws):
            rng = np.random.default_rng([draw, synthetic.KINDS.index(kind), len(weights)])
            W = (
                list(real.values())[draw % len(real)]
                if real
                else synthetic.example_weights(weights, options.shape, rng)
            )
            rows.append(scores(W, kind, options.step, rng, draw))
        said = []
        for column in ("principal", "low_magnitude", "jaccard"):
            pairs = [row[column] for row in rows]
            said.append(f"{column} {share([m for m, _ in pairs])} ({share([s for _, s in pairs])})")
        unchanged = np.mean([row["unchanged"][0] for row in rows])
        print(f"{weights:10} {kind:12} {unchanged:9.2f}  {', '.join(said)}", flush=True)


def scores(
    W: NDArray[np.float32], kind: str, step: float, rng: np.random.Generator, draw: int
) -> dict[str, tuple[float | None, float | None]]:
    """z against the margin null and against the spacing null, of masks and of another run."""
    base = BaseMatrix(str(draw), W, MatrixSettings(density=ALPHA, sweep_densities=(ALPHA,)))
    one, two = (MatrixPair(base, synthetic.stored(W, synthetic.example_update(kind, W, step, rng))) for _ in range(2))
    found: dict[str, tuple[float | None, float | None]] = {"unchanged": (1 - one.changed_count / one.numel, None)}
    overlaps = one.overlaps[ALPHA]
    (divided,) = base.mask_cells
    for (_, mask), inside in zip(divided.names, divided.entries, strict=True):
        if mask in MASKS:
            spacing = nulls.overlap_null(one.class_entries, one.class_changed, inside)
            overlap = overlaps[mask].overlap
            count = 0 if overlap is None else round(overlap * one.changed_count)
            found[mask] = (overlaps[mask].z, spacing.z(count))
    both = int((one.changed & two.changed).sum())
    (test,) = one.score_tests(two.changed.view(np.uint8), np.array([[False], [True]]))
    spacing = nulls.intersection_null(one.class_entries, one.class_changed, two.class_changed)
    return found | {"jaccard": (test.z, spacing.z(both))}


def share(z: list[float | None]) -> str:
    known = [value for value in z if value is not None]
    return f"{np.mean(np.abs(known) > 1.96):.3f} of {len(known)}" if known else "undefined"


def real_matrices(source: str) -> dict[str, NDArray[np.float32]]:
    checkpoint = open_checkpoint(model_name(source))
    parts = [part for info in checkpoint.tensors.values() for part in parts_of(info, checkpoint.config)]
    found = {
        part.name: part.of(checkpoint.read(part.tensor, part.start, part.stop)) for part in parts if part.is_linear
    }
    return {
        name: bits.values_of_codes(bits.bf16_codes(W.astype(np.float32))).reshape(W.shape) for name, W in found.items()
    }


if __name__ == "__main__":
    main()
