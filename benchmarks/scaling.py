"""(e) Peak memory and (f) time as models get deeper and wider."""

from collections.abc import Sequence
from dataclasses import dataclass

from harness import Cost, Table, compare_command, describe, middle, number
from pairs import Pair, PairFolder

ALL_METRICS = "changes,location,update,spectrum,subspace,bounds"


@dataclass(frozen=True)
class Point:
    """One pair under one set of metrics."""

    shape: str
    layers: int
    metrics: str
    pair: Pair
    cost: Cost

    @property
    def name(self) -> str:
        return f"{self.shape.partition(':')[0]}, {self.layers} layers"

    @property
    def what(self) -> str:
        return "all" if self.metrics == ALL_METRICS else self.metrics


def measure_scaling(folder: PairFolder, series: Sequence[tuple[str, str, Sequence[int]]], rounds: int) -> list[Point]:
    """`series` is of shape, metrics and depths, the shallowest first; nothing is in the cache."""
    points = []
    for shape, metrics, depths in series:
        pairs = [folder.pair(shape, layers) for layers in depths]
        compare_command(pairs[0].base, pairs[0].tuned, "--metrics", metrics)
        costs: list[list[Cost]] = [[] for _ in pairs]
        for _ in range(rounds):
            for pair, found in zip(pairs, costs, strict=True):
                found.append(compare_command(pair.base, pair.tuned, "--metrics", metrics))
        points += [
            Point(shape, layers, metrics, pair, middle(found))
            for layers, pair, found in zip(depths, pairs, costs, strict=True)
        ]
    return points


def memory_table(points: Sequence[Point]) -> Table:
    """Peak over the shallowest's: 1 where it does not grow with depth."""
    columns = ("pair", "metrics", "bytes of the pair", "peak over that of the shallowest", "peak over the pair", "here")
    rows = []
    for point in points:
        peak, first = peak_of(point), peak_of(shallowest(point, points))
        size = point.pair.stored_bytes
        rows.append(
            (
                point.name,
                point.what,
                f"{size / 1e9:.2f} GB",
                f"**{number(peak / first)}**",
                number(peak / size),
                describe(point.cost),
            )
        )
    note = (
        "`offprincipal compare --no-report`, the whole process; peak resident memory as the kernel counts it, pages of "
        "mapped files too."
    )
    return Table("(e) Memory", note, columns, tuple(rows))


def time_table(points: Sequence[Point]) -> Table:
    """What a parameter of a deeper model costs, start-up included."""
    columns = (
        "pair",
        "metrics",
        "parameters",
        "time a parameter over that of the shallowest",
        "seconds a 10⁹ parameters, here",
    )
    rows = []
    for point in points:
        rate, first = seconds_per_parameter(point), seconds_per_parameter(shallowest(point, points))
        rows.append(
            (
                point.name,
                point.what,
                f"{number(point.pair.parameters / 1e6)} M",
                f"**{number(rate / first)}**",
                number(1e9 * rate),
            )
        )
    note = "The same runs: wall time of the whole process over all parameters, embeddings counted."
    return Table("(f) Time against parameters", note, columns, tuple(rows))


def shallowest(point: Point, points: Sequence[Point]) -> Point:
    same = [other for other in points if (other.shape, other.metrics) == (point.shape, point.metrics)]
    return min(same, key=lambda other: other.layers)


def peak_of(point: Point) -> int:
    assert point.cost.peak_bytes is not None
    return point.cost.peak_bytes


def seconds_per_parameter(point: Point) -> float:
    return point.cost.seconds / point.pair.parameters
