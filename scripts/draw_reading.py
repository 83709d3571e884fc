"""Draw the figures of docs/reading.md: what each number is of updates whose making is known.

    python scripts/draw_reading.py

Every update is made here, from seeds: Gaussian ones that know nothing of the weights ("blind"), and some with one
property each. All are measured by `offprincipal.compare`; nothing is trained. Takes two minutes on two cores. The
pictures follow the reader's light or dark scheme, and load nothing.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors.torch import load_file, save_file
from torch import Tensor

import offprincipal
from offprincipal.assets import embedded_base

DOCS = Path(__file__).parents[1] / "docs"
PAPER, INK, FAINT, BLUE, GREY = "#ffffff", "#1f2733", "#c5ccd6", "#2f7fb8", "#8a94a1"
DARK = {PAPER: "#1e2129", INK: "#e3e7ee", FAINT: "#4a515e"}  # the other colours stand on both
STYLE: dict[str, Any] = {
    "font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 9, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER, "figure.facecolor": PAPER, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True, "font.family": "sans-serif",
    "svg.fonttype": "none", "svg.hashsalt": "reading",
}  # fmt: skip
SHORT, LONG = 1e-3, 3e-3  # of an update, relative to the weights
NULLS = {"random": "chance", "rounding": "rounding", "spacing": "spacing", "margin": "margins"}
Weights = dict[str, Tensor]


class Workbench:
    """The base, and the updates of it as models in a folder."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.weights = {name: weight.float() for name, weight in load_file(base / "model.safetensors").items()}

    def blind(self, seed: int, length: float) -> Weights:
        """A Gaussian step in every entry, of a length relative to each tensor's norm."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: torch.randn(weight.shape, generator=generator) for name, weight in self.weights.items()}
        return self.as_long_as(length, drawn)

    def as_long_as(self, length: float, steps: Weights) -> Weights:
        return {
            name: step * (length * self.weights[name].norm() / step.norm().clamp_min(1e-30))
            for name, step in steps.items()
        }

    def of_matrices(self, change: Callable[[Tensor, Tensor], Tensor], steps: Weights) -> Weights:
        """The steps, changed in every matrix by what is known of its weights."""
        return {name: change(self.weights[name], step) if step.ndim == 2 else step for name, step in steps.items()}

    def model(self, name: str, steps: Weights) -> str:
        """The base after the steps: stored in bfloat16, with its float32 masters."""
        folder = shutil.copytree(self.base, self.folder / name)
        masters = {name: weight + steps[name] for name, weight in self.weights.items()}
        (folder / "masters").mkdir()
        save_file(masters, folder / "masters" / "model.safetensors", {"format": "pt"})
        stored = {name: weight.bfloat16() for name, weight in masters.items()}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    def compare(self, metrics: str, **updates: Weights) -> offprincipal.Comparison:
        runs = {name: self.model(f"{metrics}-{name}", steps) for name, steps in updates.items()}
        return offprincipal.compare(self.base, runs, metrics=metrics)


def low_rank_part(weight: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def principal_rank(weight: Tensor) -> int:
    return max(1, round(min(weight.shape) / 8))


def shorter_on_principal(weight: Tensor, step: Tensor) -> Tensor:
    """Steps a third as long where the best low-rank approximation is large."""
    size = low_rank_part(weight, principal_rank(weight)).abs()
    return torch.where(size > size.median(), step / 3, step)


def grown(weight: Tensor, step: Tensor) -> Tensor:
    """Every weight grows in proportion, so every singular value does."""
    return weight


def inside(weight: Tensor, step: Tensor) -> Tensor:
    """A third of the step's length moved into the principal subspaces."""
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    k = principal_rank(weight)
    left, right = U[:, :k], Vh[:k]
    part = left @ (left.T @ step @ right.T) @ right
    return step + part * (step.norm() / part.norm() / 3)


def outside(weight: Tensor, step: Tensor) -> Tensor:
    """Nothing of the step inside the principal subspaces."""
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    k = principal_rank(weight)
    left, right = U[:, :k], Vh[:k]
    return step - left @ (left.T @ step) - (step - left @ (left.T @ step)) @ right.T @ right


def unchanged(bench: Workbench) -> Figure:
    """What is left unchanged, by length: a curve for blind updates, and one update that is off it."""
    lengths = [1e-4, 3e-4, SHORT, LONG, 1e-2]
    runs = {f"blind {length}": bench.blind(1, length) for length in lengths}
    few = bench.of_matrices(
        lambda _, step: step * (torch.arange(step.numel()).view_as(step) % 8 == 0), runs["blind 0.001"]
    )
    result = bench.compare("changes", **runs, few=bench.as_long_as(SHORT, few))
    figure, axis = panel(2.1)
    drawn = [result.runs[name].unchanged_fraction for name in runs]
    axis.plot(lengths, [100 * each.nulls["isotropic"] for each in drawn], color=GREY, linewidth=1.5)
    axis.plot(lengths, [100 * each.value for each in drawn], "o", color=BLUE)
    axis.plot(SHORT, 100 * result.runs["few"].unchanged_fraction.value, "D", color=BLUE)
    axis.annotate("an eighth of the weights\nstepped: off its null", (SHORT * 1.15, 93), va="center")
    axis.annotate("blind updates: on the line", (LONG * 1.2, 47), va="center")
    axis.set(xscale="log", xlabel="relative update norm", ylabel="unchanged, %", ylim=(0, 105), xlim=(7e-5, 2e-2))
    return figure


def where(bench: Workbench) -> Figure:
    """The nulls of the principal overlap and its value, for updates that know nothing and one that does."""
    short = bench.blind(1, SHORT)
    result = bench.compare(
        "location,subspace",
        blind=short,
        longer=bench.blind(3, LONG),
        avoids=bench.as_long_as(SHORT, bench.of_matrices(shorter_on_principal, short)),
    )
    names = {"blind": "blind", "longer": "blind, three times as long", "avoids": "shorter on principal weights"}
    figure, axis = panel(2.0)
    for row, name in enumerate(names):
        overlap = result.runs[name].principal_overlap
        steps = [100 * overlap.nulls[null] for null in NULLS]
        axis.plot([*steps, 100 * overlap.value], [row] * 5, color=FAINT, linewidth=1, zorder=0)
        for value, marker in zip(steps, "|so^", strict=True):
            axis.plot(value, row, marker, color=GREY, markerfacecolor="none", markersize=8, markeredgewidth=1.5)
        axis.plot(100 * overlap.value, row, "o", color=BLUE, markersize=5)
    for marker, label in zip("|so^", NULLS.values(), strict=True):
        axis.plot([], [], marker, color=GREY, markerfacecolor="none", markersize=8, markeredgewidth=1.5, label=label)
    axis.plot([], [], "o", color=BLUE, label="measured")
    rows(axis, names.values(), "of the changed entries, % on principal weights")
    figure.legend(loc="outside upper center", ncols=5)
    return figure


def spectrum(bench: Workbench) -> Figure:
    """Spectral shift of a short and a long update and of one that grows all weights, beside Gaussian ones as long."""
    short = bench.blind(1, SHORT)
    updates = {
        "blind": short,
        "blind, three times as long": bench.blind(3, LONG),
        "every weight grown, as long as the second": bench.as_long_as(LONG, bench.of_matrices(grown, short)),
    }
    return beside_null(bench, updates, "spectral_shift", "spectral shift", log=True)


def energy(bench: Workbench) -> Figure:
    """Principal energy of a blind update and of two that know the subspaces."""
    short = bench.blind(1, LONG)
    updates = {
        "blind": short,
        "drawn into the subspaces": bench.as_long_as(LONG, bench.of_matrices(inside, short)),
        "kept out of them": bench.as_long_as(LONG, bench.of_matrices(outside, short)),
    }
    return beside_null(bench, updates, "principal_energy", "principal energy, % of the update's squared norm", 100)


def beside_null(
    bench: Workbench, updates: dict[str, Weights], figure_name: str, label: str, factor: float = 1, log: bool = False
) -> Figure:
    runs = {f"run{row}": steps for row, steps in enumerate(updates.values())}
    result = bench.compare("spectrum,subspace", **runs)
    figure, axis = panel(1.9)
    for row, name in enumerate(runs):
        measured = getattr(result.runs[name], figure_name)
        null = measured.nulls["stored"]
        axis.plot(factor * null, row, "o", color=GREY, markerfacecolor="none", markersize=9, markeredgewidth=1.5)
        axis.plot(factor * measured.value, row, "o", color=BLUE, markersize=5)
        times = f"{measured.value / null:.1f} times its null"
        axis.annotate(times, (1.02, row), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    if log:
        axis.set_xscale("log")
    axis.plot([], [], "o", color=GREY, markerfacecolor="none", markersize=9, label="a Gaussian update of its length")
    axis.plot([], [], "o", color=BLUE, label="measured")
    rows(axis, updates, label)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def agreement(bench: Workbench) -> Figure:
    """The Jaccard index of two blind updates, and of two that share a part of their steps."""
    one, other = bench.blind(1, SHORT), bench.blind(2, SHORT)
    shares = {name: 0.8 * one[name] + 0.6 * step for name, step in other.items()}
    result = bench.compare("location", one=one, other=other, shares=shares)
    pairs = {(pair["run_a"], pair["run_b"]): pair for pair in result.summary["pairs"]}
    names = {("one", "other"): "two blind updates", ("one", "shares"): "two that share steps"}
    figure, axis = panel(1.6)
    for row, pair in enumerate(names):
        found = pairs[pair]
        axis.plot(found["jaccard_random"], row, "|", color=GREY, markersize=10, markeredgewidth=1.5)
        axis.plot(found["jaccard_rounding_null"], row, "s", color=GREY, markerfacecolor="none", markersize=8)
        axis.plot(found["jaccard"], row, "o", color=BLUE, markersize=5)
    axis.plot([], [], "|", color=GREY, markersize=10, markeredgewidth=1.5, label="chance")
    axis.plot([], [], "s", color=GREY, markerfacecolor="none", markersize=8, label="rounding")
    axis.plot([], [], "o", color=BLUE, label="measured")
    rows(axis, names.values(), "Jaccard index of the changed entries")
    axis.set_xlim(0, 1)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def verdicts(bench: Workbench) -> Figure:
    """A drawing: three intervals against the margin, and how often the same rule decides a blind study."""
    cases = [
        ("supported", 0.6, 0.25, 19),
        ("supported", 0.55, 0.2, 1),
        ("inconclusive", 0.25, 0.35, 0),
        ("no effect", 0.0, 0.12, 0),
    ]
    figure, (left, right) = panels(2.0, [3, 2])
    left.axvspan(-0.2, 0.2, color=FAINT, alpha=0.5, linewidth=0)
    left.annotate("within the margin", (0, -0.75), ha="center", fontsize=8)
    for row, (_, middle, half, blind) in enumerate(cases):
        left.plot([middle - half, middle + half], [row, row], color=BLUE, linewidth=2)
        left.plot(middle, row, "o", color=BLUE)
        for column in range(20):
            shade = BLUE if column < blind else "none"
            square = Rectangle((column, row - 0.35), 0.7, 0.7, facecolor=shade, edgecolor=GREY, linewidth=0.7)
            right.add_patch(square)
        right.annotate(f"{blind} of 20", (20.5, row), va="center", annotation_clip=False)
    rows(left, [verdict for verdict, *_ in cases], "effect of RL over SFT, with its interval over runs")
    left.set(ylim=(3.6, -1.1), xticks=[0], xticklabels=["none"])
    right.set(xlim=(0, 24), ylim=(3.6, -1.1), yticks=[], xticks=[], xlabel="blind studies that the same rule decides")
    right.spines[:].set_visible(False)
    return figure


def way(bench: Workbench) -> Figure:
    """Distance from the start against the way walked: a straight line, the same stored in bfloat16, a random walk."""
    flat = torch.cat([weight.flatten() for weight in bench.weights.values()])[:200_000]
    generator = torch.Generator().manual_seed(4)
    direction = 3e-5 * flat.norm() * torch.nn.functional.normalize(torch.randn(flat.shape, generator=generator), dim=0)
    walk = [flat]
    for _ in range(16):
        step = torch.randn(flat.shape, generator=generator)
        walk.append(walk[-1] + direction.norm() * step / step.norm())
    straight = [flat + step * direction for step in range(17)]
    stored = [weights.bfloat16().float() for weights in straight]
    figure, axis = panel(2.1)
    for points, label, colour, line in (
        (straight, "a straight line: {:.2f}", INK, "-"),
        (stored, "the same, stored in bfloat16: {:.2f}", BLUE, "-"),
        (walk, "a random walk of 16 steps: {:.2f}", GREY, "--"),
    ):
        steps = [float((after - before).norm()) for before, after in pairwise(points)]
        walked = torch.tensor([0.0, *steps]).cumsum(0) / sum(steps)
        reached = torch.tensor([float((point - points[0]).norm()) for point in points]) / sum(steps)
        axis.plot(walked, reached, line, color=colour, label=label.format(reached[-1]))
    axis.set(
        xlabel="way walked", ylabel="distance from start", xlim=(0, 1), ylim=(0, 1.05), xticks=[0, 1], yticks=[0, 1]
    )
    axis.legend(loc="upper left", title="straightness", alignment="left")
    return figure


def panel(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.6, height))
    return figure, figure.subplots()


def panels(height: float, widths: Sequence[float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.6, height))
    return figure, figure.subplots(1, len(widths), width_ratios=widths)


def rows(axis: Any, names: Iterable[str], label: str) -> None:
    named = list(names)
    axis.set(yticks=range(len(named)), yticklabels=named, ylim=(len(named) - 0.5, -0.5), xlabel=label)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


FIGURES: dict[str, Callable[[Workbench], Figure]] = {
    draw.__name__: draw for draw in (unchanged, where, spectrum, energy, agreement, verdicts, way)
}


def as_svg(figure: Figure) -> str:
    """The figure, the same whenever it is drawn; its paper and ink follow the reader's scheme."""
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue().decode()
    swaps = "".join(
        f'[style*="fill: {light}"]{{fill:{dark}!important}}[style*="stroke: {light}"]{{stroke:{dark}!important}}'
        for light, dark in DARK.items()
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{swaps}}}</style>"
    start = text.index("<svg")
    end = text.index(">", start) + 1
    return "\n".join(line.rstrip() for line in (text[start:end] + style + text[end:]).splitlines()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path(embedded_base()), help="a model's folder, in bfloat16")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the figures")
    parser.add_argument("--only", nargs="*", choices=list(FIGURES), default=list(FIGURES))
    given = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        for name in given.only:
            with tempfile.TemporaryDirectory() as folder:
                (given.out / f"reading_{name}.svg").write_text(
                    as_svg(FIGURES[name](Workbench(given.base, Path(folder))))
                )


if __name__ == "__main__":
    main()
