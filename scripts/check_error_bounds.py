"""Error bounds against LAPACK, over every matrix of a pair: are they kept, and how close is the fast answer?

    python scripts/check_error_bounds.py BASE TUNED [--exact-up-to 256]

Measures the pair twice, with the default solver and with `solver="exact"`, and prints for every metric the largest
difference over all matrices, beside what the error bounds allow. Exits 1 if a error bound does not hold. With
`--exact-up-to 1` even the smallest matrix is approximated, which is how a tiny model is checked.
"""

import argparse
import sys

import numpy as np

from offprincipal import CompareSettings, Comparison, MatrixSettings, compare

SHOWN = (
    "principal_angle_left_max_deg",
    "principal_angle_left_mean_deg",
    "principal_angle_right_max_deg",
    "principal_angle_right_mean_deg",
    "principal_energy",
    "principal_overlap",
    "safe_overlap",
    "update_norm_2",
    "update_stable_rank",
    "update_effective_rank",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("base")
    arguments.add_argument("tuned")
    arguments.add_argument("--exact-up-to", type=int, default=256)
    given = arguments.parse_args()
    fast = measured(given.base, given.tuned, MatrixSettings(null_draws=1, exact_up_to=given.exact_up_to))
    exact = measured(given.base, given.tuned, MatrixSettings(null_draws=1, solver="exact"))
    sys.exit(0 if report(fast, exact) else 1)


def measured(base: str, tuned: str, matrix: MatrixSettings) -> Comparison:
    return compare(base, {"tuned": tuned}, CompareSettings(matrix=matrix), cache=False)


def report(fast: Comparison, exact: Comparison) -> bool:
    """Print the table; whether every error bound held."""
    ours, truth = ({row["tensor"]: row for row in found.matrices if row["linear"]} for found in (fast, exact))
    names = [name for name, row in ours.items() if row["singular_value_error"] is not None]
    print(f"{len(names)} of {len(ours)} matrices approximated: {fast.summary['runs']['tuned']['solvers']}")
    if not names:
        return True
    spectra = [singular_values(found) for found in (fast, exact)]
    errors, allowed = [], []
    for name in names:
        k = ours[name]["k"]
        mine, theirs = (found[name][:k] for found in spectra)
        errors.append(np.abs(mine - theirs).max() / theirs[-1])
        allowed.append(ours[name]["singular_value_error"] / theirs[-1])
    held = all(error <= limit + 1e-12 for error, limit in zip(errors, allowed, strict=True))
    print(f"top singular values, relative: off by at most {max(errors):.1e}; error bounds up to {max(allowed):.1e}")
    shifts = [shift_of_top(name, ours[name]["k"], fast, exact) for name in names]
    print(f"spectral shift of the top k, relative: off by at most {max(shifts):.1e}")
    print("\nmetric | largest difference | largest value | largest error bound")
    for metric in SHOWN:
        both = [(ours[name][metric], truth[name][metric], ours[name]["angle_error_deg"]) for name in names]
        both = [found for found in both if found[0] is not None and found[1] is not None]
        if not both:
            print(f"{metric} | within its error everywhere | |")
            continue
        difference = max(abs(a - b) for a, b, _ in both)
        limits = [limit for *_, limit in both] if metric.endswith("_deg") else []
        held &= not limits or all(abs(a - b) <= limit + 1e-9 for a, b, limit in both)
        limit = f"{max(limits):.3g}" if limits else ""
        print(f"{metric} | {difference:.1e} | {max(abs(b) for _, b, _ in both):.4g} | {limit}")
    print("\nevery error bound held" if held else "\na error bound did NOT hold")
    return held


def singular_values(found: Comparison, run: str | None = "tuned") -> dict[str, np.ndarray]:
    curve = "singular_values" if run else "singular_values_base"
    return {row["tensor"]: np.asarray(row["values"]) for row in found.curves if row["curve"] == curve}


def shift_of_top(name: str, k: int, fast: Comparison, exact: Comparison) -> float:
    """How far the shift of the first k singular values is off, relatively."""
    shifts = []
    for found in (fast, exact):
        base, tuned = (singular_values(found, run)[name][:k] for run in (None, "tuned"))
        shifts.append(np.linalg.norm(tuned - base) / np.linalg.norm(base))
    return abs(shifts[0] - shifts[1]) / shifts[1]


if __name__ == "__main__":
    main()
