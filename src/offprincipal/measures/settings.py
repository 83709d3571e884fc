"""Settings of the measurement of one matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from offprincipal.defaults import DENSITY, EXACT_UP_TO, NULL_DRAWS, RANK_FRACTION, TOLERANCE
from offprincipal.errors import ArgumentError
from offprincipal.geometry.cuts import ALPHAS

Solver = Literal["auto", "exact", "randomized"]
Device = Literal["cpu", "cuda", "auto"]


@dataclass(frozen=True)
class MatrixSettings:
    """Settings of the measurement of one matrix, n × m.

    Args:
        rank_fraction: sets the rank of the principal subspace, k = max(1, round(rank_fraction · min(n, m))).
        density: fraction of a matrix's entries in each mask of `matrices.parquet`; its column `alpha`.
        sweep_densities: the same of the masks in `masks.parquet`.
        null_draws: number of Gaussian updates averaged for each isotropic null of a matrix with up to 65,536 entries;
            proportionally fewer for a larger one, but at least one.
        seed: random seed of the random mask and of the Gaussian updates.
        solver: `exact` uses LAPACK in float64 for every matrix; `auto` does so up to min(n, m) = `exact_up_to`, and
            above it starts from a base that is decomposed once; `randomized` starts from random vectors above it.
        exact_up_to: min(n, m) up to which LAPACK is as fast as other solvers.
        float64_up_to: min(n, m) up to which the other solvers use float64 too.
        mask_tests: whether to test masks against the margin null.
        stored_null: whether to draw Gaussian and shuffled updates that are stored as the tuned weights are, which is
            most of the work apart from the measurement itself.
        tolerance: largest relative error bound of the singular values; a matrix that exceeds it is solved exactly. 0
            means exact everywhere.
        device: device that decomposes matrices; `auto` uses a CUDA device if there is one.

    Raises:
        ArgumentError: a number is out of range, or a name is unknown.

    >>> MatrixSettings(density=0.4).densities
    (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    """

    rank_fraction: float = RANK_FRACTION
    density: float = DENSITY
    sweep_densities: tuple[float, ...] = ALPHAS
    null_draws: int = NULL_DRAWS
    seed: int = 0
    solver: Solver = "auto"
    exact_up_to: int = EXACT_UP_TO
    float64_up_to: int = 0
    mask_tests: bool = True
    stored_null: bool = True
    tolerance: float = TOLERANCE
    device: Device = "cpu"

    def __post_init__(self) -> None:
        swept = [("sweep_densities", density) for density in self.sweep_densities]
        for name, value in (("rank_fraction", self.rank_fraction), ("density", self.density), *swept):
            if not 0 < value <= 1:
                raise ArgumentError(f"{name} is {value}: give a number above 0, at most 1")
        if self.null_draws < 1:
            raise ArgumentError(f"null_draws is {self.null_draws}: give at least 1")
        if not 0 <= self.tolerance < 1:
            raise ArgumentError(f"tolerance is {self.tolerance}: give a number from 0, below 1")
        for name, chosen, kinds in (("solver", self.solver, Solver), ("device", self.device, Device)):
            if chosen not in get_args(kinds):
                raise ArgumentError(f"no {name} '{chosen}': choose one of {', '.join(get_args(kinds))}")

    @property
    def densities(self) -> tuple[float, ...]:
        """`sweep_densities` and `density`, each once, in increasing order."""
        return tuple(sorted({*self.sweep_densities, self.density}))


IN_FILES = {"density": "alpha", "sweep_densities": "alphas"}  # settings -> what files call them
FROM_FILES = {name: setting for setting, name in IN_FILES.items()}


def as_in_files(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that `summary.json` and `gates.json` have for them.

    >>> as_in_files({"density": 0.5, "seed": 0})
    {'alpha': 0.5, 'seed': 0}
    """
    return {IN_FILES.get(name, name): value for name, value in settings.items()}
