"""An attempt to break every null: figures of `compare` against float64 code written from the definitions alone.

    python scripts/break_nulls.py --updates 400        # about 8 minutes on one core

Nothing of ours computes the other side: rounding, classes, masks, hypergeometric means, the logistic model by Newton's
method on a dense design, steps dealt out and stored again, Gaussian updates drawn and decomposed. Updates are products
of what a sceptic would try: scales of rows and columns, low rank, few rows, heavy tails, one step length, ties with the
rounding thresholds; on weights with scales, repeated rows, powers of two, zeros. None looks at the weights. Prints, for
each null, how many were tried, how many were beyond its limit, and the worst.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints import Part
from offprincipal.checkpoints.roles import Place
from offprincipal.comparison.measure import measure_matrix
from offprincipal.measures.columns import GROUPS
from offprincipal.measures.settings import MatrixSettings

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
DEALT, DRAWN = 40, 24
NAME = "layers.0.q_proj.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=400, help="(%(default)s)")
    options = parser.parse_args()
    found: dict[str, list[float]] = defaultdict(list)
    for seed in range(options.updates):
        for name, deviation in attack(np.random.default_rng(seed), small=seed % 2 == 0).items():
            found[name].append(deviation)
    print(f"{'null':42} {'tried':>6} {'beyond':>7}  limit, and the worst")
    for name, (limit, words) in LIMITS.items():
        values = np.abs(found[name])
        worst = f"{values.max():.3g}" if len(values) else "-"
        print(f"{name:42} {len(values):6} {int((values > limit).sum()):7}  {limit:g} {words}; {worst}")


LIMITS = {
    "changed entries": (0, "entries"),
    "spacing null, from the definition": (1e-9, "of the share"),
    "margin null, from the definition": (2e-3, "of the share"),
    "z of the margin null, from the definition": (0.05, "standard deviations"),
    "rounding null, against dealing": (4.5, "standard errors of dealing"),
    "isotropic unchanged, against drawing": (4.5, "standard errors of drawing"),
    "stored null of the shift, against drawing": (4.5, "standard errors of both"),
    "z of blind masks": (1.96, "standard deviations: 5 % are beyond by chance"),
    "measured beyond rounding, blind": (4.5, "standard errors; rows and columns are no part of this null"),
    "measured beyond scaled rounding, blind": (4.5, "standard errors"),
}


def attack(rng: np.random.Generator, small: bool) -> dict[str, float]:
    """One update and its deviations; the logistic model is solved on small matrices alone."""
    shape = (20, 28) if small else (64, 96)
    W = bf16(weights(rng, shape))
    D = update(rng, shape)
    D *= 10.0 ** rng.uniform(-3, -1) * np.linalg.norm(W) / max(np.linalg.norm(D), 1e-300)
    masters = (W + D).astype(np.float32).astype(np.float64)
    tuned = bf16(masters)
    part = Part(NAME, NAME, Place("q", 0), 0, shape)
    arrays = (x.astype(ml_dtypes.bfloat16) for x in (W, tuned))
    base, after = arrays
    settings = MatrixSettings(sweep_densities=(0.5,), null_draws=8)
    rows = measure_matrix(part, base, {"r": after}, {"r": masters.astype(np.float32)}, GROUPS, settings)
    (row,) = rows.matrices
    changed = tuned != W
    found: dict[str, float] = {"changed entries": float(row["changed_count"] - changed.sum())}
    if not 0 < changed.sum() < changed.size:
        return found
    low = first_half(-np.abs(W))
    measured = changed[low].sum() / changed.sum()
    classes = classes_of(W)
    expected = sum(changed[of].sum() * (of & low).sum() / of.sum() for of in (classes == c for c in np.unique(classes)))
    found["spacing null, from the definition"] = row["low_magnitude_overlap_spacing_null"] - expected / changed.sum()
    if small:
        share, z = logistic(changed, classes, low)
        found["margin null, from the definition"] = row["low_magnitude_overlap_margin_null"] - share
        if z is not None and row["low_magnitude_z"] is not None:
            found["z of the margin null, from the definition"] = row["low_magnitude_z"] - z
    else:
        found |= against_draws(rng, W, masters - W, row, low)
        error = np.sqrt(max(measured * (1 - measured), 1 / changed.sum()) / changed.sum())
        found["measured beyond rounding, blind"] = (measured - row["low_magnitude_overlap_rounding_null"]) / error
        found["measured beyond scaled rounding, blind"] = (measured - row["low_magnitude_overlap_scaled_null"]) / error
        if row["principal_z"] is not None:
            found["z of blind masks"] = row["principal_z"]
    return found


def against_draws(
    rng: np.random.Generator, W: Floats, D: Floats, row: dict[str, float], low: Bools
) -> dict[str, float]:
    """Nulls that are laws of something that can be drawn."""
    found = {}
    counts = []
    for _ in range(DEALT):
        dealt = rng.permutation(D.reshape(-1)).reshape(D.shape) * rng.choice([-1.0, 1.0], D.shape)
        moved = bf16(W + dealt) != W
        counts.append((moved[low].sum(), moved.sum()))
    inside, total = np.array(counts, float).T
    ratio = inside.sum() / total.sum()
    error = np.std(inside - ratio * total, ddof=1) / np.sqrt(DEALT) / total.mean()
    if error > 0:
        found["rounding null, against dealing"] = (row["low_magnitude_overlap_rounding_null"] - ratio) / error
    sigma = np.linalg.norm(D) / np.sqrt(D.size)
    k = row["k"]
    S = np.linalg.svd(W, compute_uv=False)[:k]
    unchanged, shifts = [], []
    for _ in range(DRAWN):
        stored = bf16(W + sigma * rng.standard_normal(W.shape))
        unchanged.append((stored == W).mean())
        shifts.append(np.linalg.norm(np.linalg.svd(stored, compute_uv=False)[:k] - S) / np.linalg.norm(S))
    for name, column, values, draws in (
        ("isotropic unchanged, against drawing", "unchanged_fraction_isotropic_null", unchanged, np.inf),
        ("stored null of the shift, against drawing", "spectral_shift_stored_null", shifts, 8),
    ):
        spread = np.std(values, ddof=1)
        if spread > 0 and row[column] is not None:
            found[name] = (row[column] - np.mean(values)) / (spread * np.sqrt(1 / DRAWN + 1 / draws))
    return found


def bf16(x: Floats) -> Floats:
    """Rounded to eight significant bits, ties to even, from the definition."""
    _, exponent = np.frexp(x)
    spacing = np.exp2(np.maximum(exponent - 1, -126) - 7.0)
    return np.rint(x / spacing) * spacing


def classes_of(W: Floats) -> NDArray[np.int64]:
    """Equal spacings: the exponent, powers of two apart, zeros apart."""
    mantissa, exponent = np.frexp(W)
    return np.where(W == 0, -10_000, 2 * np.maximum(exponent, -125) + (np.abs(mantissa) == 0.5) * (exponent > -125))


def first_half(scores: Floats) -> Bools:
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.reshape(-1), kind="stable")[: round(scores.size / 2)]] = True
    return mask.reshape(scores.shape)


def logistic(changed: Bools, classes: NDArray[np.int64], mask: Bools) -> tuple[float, float | None]:
    """The mask's share under logit p = class + row + column, and its score test, by Newton on a dense design."""
    n, m = changed.shape
    _, slots = np.unique(classes, return_inverse=True)
    lines = [np.repeat(np.arange(n), m), n + np.tile(np.arange(m), n), n + m + slots.reshape(-1)]
    size = int(lines[2].max()) + 1
    y, left = changed.reshape(-1).astype(float), np.ones(n * m, bool)
    while True:  # lines of which all or none changed are certain, and leave
        entries, hits = (sum(np.bincount(line[left], w, size) for line in lines) for w in (None, y[left]))
        certain = (hits == 0) | (hits == entries)
        kept = left & ~np.any([certain[line] for line in lines], axis=0)
        if (kept == left).all():
            break
        left = kept
    inside = mask.reshape(-1)
    p = y.copy()
    X = np.zeros((int(left.sum()), size))
    for line in lines:
        X[np.arange(len(X)), line[left]] = 1
    beta = np.zeros(size)
    for _ in range(200):
        q = 1 / (1 + np.exp(-np.clip(X @ beta, -30, 30)))
        step = np.linalg.lstsq(X.T @ (X * (q * (1 - q))[:, None]), X.T @ (y[left] - q), rcond=1e-10)[0]
        beta += step * min(1.0, 2 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    p[left] = 1 / (1 + np.exp(-np.clip(X @ beta, -30, 30)))
    share = p[inside].sum() / changed.sum()
    w = p[left] * (1 - p[left])
    M = inside[left].astype(float)
    rest = M - X @ np.linalg.lstsq(X.T @ (X * w[:, None]), X.T @ (w * M), rcond=1e-10)[0]
    V = (w * rest**2).sum()
    settled = np.abs(X.T @ (y[left] - p[left])).max(initial=0) < 1e-6
    return share, ((y[left] - p[left]) @ M) / np.sqrt(V) if V >= 1 and settled else None


def weights(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Weights with what a sceptic would give them."""
    W = 0.03 * rng.standard_normal(shape)
    if rng.random() < 0.5:
        W = W * np.exp(0.5 * rng.standard_normal((shape[0], 1))) * np.exp(0.3 * rng.standard_normal(shape[1]))
    if rng.random() < 0.3:
        W = W + 0.1 * rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1])) / 2
    if rng.random() < 0.2:
        W[rng.random(shape) < 0.1] = 0
    if rng.random() < 0.2:
        W = np.where(rng.random(shape) < 0.3, np.sign(W) * np.exp2(np.rint(np.log2(np.abs(W) + 1e-9))), W)
    if rng.random() < 0.2:
        W[: shape[0] // 3] = W[0]
    return W


def update(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """A product of what a sceptic would try, none of which looks at the weights."""
    n, m = shape
    kinds: list[Callable[[], Floats]] = [
        lambda: rng.standard_normal(shape),
        lambda: rng.choice([-1.0, 1.0], shape),
        lambda: rng.standard_t(2.5, shape),
        lambda: rng.standard_normal((n, 4)) @ rng.standard_normal((4, m)),
        lambda: np.exp2(rng.integers(-4, 1, shape).astype(float)) * rng.choice([-1.0, 1.0], shape),
    ]
    D = kinds[rng.integers(len(kinds))]()
    if rng.random() < 0.4:
        D = D * np.exp(0.7 * rng.standard_normal((n, 1)))
    if rng.random() < 0.4:
        D = D * np.exp(0.7 * rng.standard_normal(m))
    if rng.random() < 0.2:
        D = D * (rng.random((n, 1)) < 0.4)
    if rng.random() < 0.2:
        D = D * (rng.random(shape) < 0.5)
    if rng.random() < 0.2:
        D = np.exp2(np.rint(np.log2(np.abs(D) + 1e-12))) * np.sign(D)  # ties with thresholds
    return D


if __name__ == "__main__":
    main()
