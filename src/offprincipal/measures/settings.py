"""What decides the numbers of one matrix."""

from dataclasses import dataclass
from typing import Literal, get_args

from offprincipal.defaults import DENSITY, NULL_DRAWS, RANK_FRACTION, TOLERANCE
from offprincipal.errors import ArgumentError
from offprincipal.geometry.cuts import ALPHAS

Solver = Literal["auto", "exact", "randomized"]
Device = Literal["cpu", "cuda", "auto"]


@dataclass(frozen=True)
class MatrixSettings:
    """What decides the numbers of one matrix.

    Args:
        rank_fraction: k = max(1, round(rank_fraction · min(n, m))).
        alpha: density of the masks in `matrices.parquet`.
        alphas: densities of the sweep in `masks.parquet`.
        null_draws: Gaussian updates behind each isotropic null of a matrix of up to 65,536 entries; a larger one
            averages over itself, and takes as many fewer.
        seed: of the random mask and of the Gaussian updates.
        solver: `exact` is LAPACK in float64 for every matrix; `auto` is that up to min(n, m) = `exact_up_to`, and above
            it warm starts from a base that is decomposed once; `randomized` starts cold for every matrix above.
        exact_up_to: where LAPACK is as fast as anything; float64_up_to: min(n, m) up to which the rest is worked on in
            float64 too.
        mask_tests: whether masks are held against the margin null.
        stored_null: whether to draw the updates that are stored as the tuned weights are, Gaussian ones and shuffled
            ones, which is most of the work beside the measuring itself.
        tolerance: on the singular values, relative, that the error bound of an approximation has to meet; a matrix
            that misses it is solved exactly. 0 means exact everywhere.
        device: where matrices are decomposed; `auto` takes a CUDA device where there is one.
    """

    rank_fraction: float = RANK_FRACTION
    alpha: float = DENSITY
    alphas: tuple[float, ...] = ALPHAS
    null_draws: int = NULL_DRAWS
    seed: int = 0
    solver: Solver = "auto"
    exact_up_to: int = 256  # as geometry.principal has it, which needs torch
    float64_up_to: int = 0
    mask_tests: bool = True
    stored_null: bool = True
    tolerance: float = TOLERANCE
    device: Device = "cpu"

    def __post_init__(self) -> None:
        densities = [("alphas", alpha) for alpha in self.alphas]
        for name, value in (("rank_fraction", self.rank_fraction), ("alpha", self.alpha), *densities):
            if not 0 < value <= 1:
                raise ArgumentError(f"{name} is {value}: give a number above 0, at most 1")
        if self.null_draws < 1:
            raise ArgumentError(f"null_draws is {self.null_draws}: give at least 1")
        if not 0 <= self.tolerance < 1:
            raise ArgumentError(f"tolerance is {self.tolerance}: give a number from 0, below 1")
        for name, chosen, kinds in (("solver", self.solver, Solver), ("device", self.device, Device)):
            if chosen not in get_args(kinds):
                raise ArgumentError(f"no {name} '{chosen}': choose of {', '.join(get_args(kinds))}")

    @property
    def densities(self) -> tuple[float, ...]:
        """The sweep and the default, each once, from the sparsest up."""
        return tuple(sorted({*self.alphas, self.alpha}))
