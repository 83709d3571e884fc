"""Agreement: how the changes of two runs coincide, in place and in direction, beside the ladder of nulls."""

from collections.abc import Mapping

import numpy as np

from offprincipal.geometry import nulls, scan
from offprincipal.measures.pair import MatrixPair


def pair_row(run_a: str, run_b: str, pairs: Mapping[str, MatrixPair]) -> dict[str, float | int | str | None]:
    """How the changes of two runs agree, in place and in direction: a row of `pairs.parquet`.

    Args:
        pairs: run -> its matrix, all of one base.
    """
    a, b = pairs[run_a], pairs[run_b]
    counts = (a.changed_count, b.changed_count)
    both = int((a.changed & b.changed).sum())
    test, spacing, margins = nulls.ScoreTest(both, 0.0, 0.0), None, None
    if a.counts.on_grid and min(counts):  # off it, two runs share where in its rounding cell each weight lies
        (test,) = a.score_tests(b.changed.view(np.uint8), np.array([[False], [True]]))
        spacing = nulls.intersection_null(a.class_entries, a.class_changed, b.class_changed).expected
        margins = nulls.expected_in_common((a.margins, b.margins), a.base.slots, (a.changed, b.changed))
    rungs = {
        "rounding": nulls.rounding_intersection(a.class_entries, (a.rounding_null, b.rounding_null), counts),
        "spacing": spacing,
        "margin": margins,
    }
    norms = (a.update_norm, b.update_norm)
    product = scan.update_product(a.base.weight, a.tuned, b.tuned) if min(norms) > 0 else None
    return {
        "run_a": run_a,
        "run_b": run_b,
        "changed_a": counts[0],
        "changed_b": counts[1],
        "intersection": both,
        **{f"intersection_{rung}_null": expected for rung, expected in rungs.items()},
        "jaccard": nulls.jaccard(both, *counts),
        "jaccard_random": nulls.jaccard(counts[0] * counts[1] / a.numel, *counts),
        **{f"jaccard_{rung}_null": expected and nulls.jaccard(expected, *counts) for rung, expected in rungs.items()},
        "jaccard_log_odds": test.log_odds,
        "jaccard_log_odds_se": test.log_odds_se,
        "jaccard_z": test.z,
        "update_norm_a": norms[0],
        "update_norm_b": norms[1],
        "update_cosine": None if product is None else product / (norms[0] * norms[1]),
    }
