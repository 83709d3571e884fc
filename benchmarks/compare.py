"""Ratios against the alternatives, side by side in one run: `make bench`.

Both sides of a row run on the same files, in turn, in this process; a row says what each does and shows the median of
the ratios. Machines differ and are noisy, so no absolute time is a result. Writes `benchmarks/RESULTS.md`.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from offprincipal.assets import embedded_base
from offprincipal.comparison import CompareSettings, MatrixSettings, compare

ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One comparison: what ours does, what the alternative does, ours over the alternative in time."""

    ours: str
    alternative: str
    ratio: float
    low: float
    high: float


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = embedded_base()
        tuned = moved_copy(base, Path(folder))
        rows = [
            side_by_side(
                "full compare: five decompositions a matrix and all metrics, one thread",
                "two decompositions a matrix by torch.linalg.svd in float64, one thread",
                lambda: compare(base, [tuned], CompareSettings(matrix=MatrixSettings(null_draws=1)), threads=1),
                lambda: two_svds(base, tuned),
            ),
            side_by_side(
                f"full compare, {os.cpu_count()} threads",
                "full compare, one thread",
                lambda: compare(base, [tuned]),
                lambda: compare(base, [tuned], threads=1),
            ),
        ]
    text = render(rows)
    (Path(__file__).parent / "RESULTS.md").write_text(text)
    print(text)


def moved_copy(base: Path, folder: Path) -> Path:
    """The base after a small Gaussian update, as a folder."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        weights[name] = (weight.float() + 1e-4 * torch.randn(weight.shape, generator=generator)).bfloat16()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


def two_svds(base: Path, tuned: Path) -> None:
    """Base and tuned decomposed, matrix by matrix; embeddings are left out, as `compare` leaves them out."""
    for folder in (base, tuned):
        for name, weight in load_file(folder / "model.safetensors").items():
            if weight.ndim == 2 and "embed_tokens" not in name:
                torch.linalg.svd(weight.double(), full_matrices=False)


def side_by_side(ours: str, alternative: str, run_ours: Callable[[], object], run_other: Callable[[], object]) -> Row:
    """Time both in turn and keep the ratios."""
    run_ours(), run_other()
    ratios = [seconds(run_ours) / seconds(run_other) for _ in range(ROUNDS)]
    return Row(ours, alternative, statistics.median(ratios), min(ratios), max(ratios))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def render(rows: list[Row]) -> str:
    lines = [
        "# Benchmark",
        "",
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}; the embedded base",
        f"against a copy moved by a Gaussian update. Median of {ROUNDS} ratios of wall time, least and most in",
        "brackets; below 1, ours is faster. `make bench` makes this file.",
        "",
        "| ours | alternative | ours / alternative |",
        "|---|---|---|",
        *(f"| {r.ours} | {r.alternative} | {r.ratio:.2f} ({r.low:.2f}–{r.high:.2f}) |" for r in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
