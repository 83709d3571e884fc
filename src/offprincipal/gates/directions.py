"""Directions in the space of linear matrices: the parts of an update, and random ones of the same support.

`update_principal` = U_kU_kᵀ ΔW V_kV_kᵀ and `update_complement` = ΔW − that, with U_k, V_k the base's principal singular
vectors; `random_principal` and `random_complement` are Gaussian in the same two subspaces of the space of matrices;
`random_on_mask` and `random_off_mask` are Gaussian on the principal weights of density α and on all others. Knows
matrices and where they lie in a model's tensors; knows nothing of how a direction is measured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from offprincipal.checkpoints import Checkpoint, Part, parameter_of
from offprincipal.checkpoints.matrices import linear_parts
from offprincipal.geometry.draws import generator_of
from offprincipal.geometry.masks import entry_ranks, mask_size
from offprincipal.geometry.principal import PrincipalSubspace, principal_rank

UpdateDirection = Literal["update_principal", "update_complement"]
RandomDirection = Literal["random_principal", "random_complement", "random_on_mask", "random_off_mask"]
_NOISE = 16  # times the type's precision and the norm of an update: what its projection may be off
UPDATE_DIRECTIONS: tuple[UpdateDirection, ...] = ("update_principal", "update_complement")
RANDOM_DIRECTIONS: tuple[RandomDirection, ...] = (
    "random_principal",
    "random_complement",
    "random_on_mask",
    "random_off_mask",
)
PAIRS = (UPDATE_DIRECTIONS, RANDOM_DIRECTIONS[:2], RANDOM_DIRECTIONS[2:])


@dataclass(frozen=True)
class PrincipalSpace:
    """The principal subspace of one base matrix, and its principal weights.

    Args:
        U: (n, k), V: (m, k), orthonormal: the base's first singular vectors.
        mask: (n, m), bool: its principal weights.
    """

    U: Tensor
    V: Tensor
    mask: Tensor

    @staticmethod
    def of(W: Tensor, rank_fraction: float, density: float) -> "PrincipalSpace | None":
        """That of a matrix (n, m); None if it is not defined.

        >>> W = torch.diag(torch.tensor([4.0, 1.0]))
        >>> PrincipalSpace.of(W, 0.5, 0.25).mask
        tensor([[ True, False],
                [False, False]])
        """
        found = PrincipalSubspace.of(W, principal_rank(W.shape, rank_fraction))
        if found is None:
            return None
        mask = entry_ranks(found.scores()) < mask_size(W.numel(), density)
        return PrincipalSpace(found.U.to(W.dtype), found.V.to(W.dtype), mask)

    def principal(self, D: Tensor) -> Tensor:
        """U Uᵀ D V Vᵀ; (n, m).

        >>> space = PrincipalSpace(torch.eye(2)[:, :1], torch.eye(2)[:, :1], torch.ones(2, 2, dtype=torch.bool))
        >>> space.principal(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[1., 0.],
                [0., 0.]])
        """
        return self.U @ (self.U.T @ D @ self.V) @ self.V.T

    def part(self, D: Tensor, direction: UpdateDirection) -> Tensor:
        """The principal part of an update, or the rest of it; zero where it is no more than its own rounding."""
        principal = self.principal(D)
        found = principal if direction == "update_principal" else D - principal
        noise = _NOISE * torch.finfo(D.dtype).eps * torch.linalg.vector_norm(D)
        return found if torch.linalg.vector_norm(found) > noise else torch.zeros_like(D)

    def random(self, direction: RandomDirection, generator: torch.Generator) -> Tensor:
        """A Gaussian direction of unit Frobenius norm; zero where its support is empty."""
        G = torch.randn(self.mask.shape, generator=generator, dtype=torch.float64).to(self.U)
        match direction:
            case "random_principal":
                G = self.principal(G)
            case "random_complement":
                G = G - self.principal(G)
            case "random_on_mask":
                G = G * self.mask
            case "random_off_mask":
                G = G * ~self.mask
        norm = torch.linalg.vector_norm(G)
        return G / norm if norm > 0 else G


@dataclass(frozen=True)
class LinearMatrix:
    """One linear matrix of a base, and its principal subspace.

    Args:
        part: where it lies in the stored tensor.
        parameter: the model's name of that tensor; shape: of the whole of it.
    """

    part: Part
    parameter: str
    shape: torch.Size
    space: PrincipalSpace
    seed: int

    def update_part(self, update: Mapping[str, Tensor], direction: UpdateDirection) -> Tensor:
        """A part of the update of this matrix; zero where it did not move."""
        if self.parameter not in update:
            return self.space.U.new_zeros(self.part.matrix_shape)
        return self.space.part(self.part.cut(update[self.parameter]), direction)

    def random(self, direction: RandomDirection, draw: int) -> Tensor:
        """The random direction of a draw, of unit norm: the same for all runs."""
        return self.space.random(direction, generator_of(self.seed, self.part.name, direction, draw))

    def add_to(self, tensors: dict[str, Tensor], D: Tensor) -> None:
        """Put a direction of this matrix into directions by parameter name."""
        if self.parameter not in tensors:
            tensors[self.parameter] = D.new_zeros(self.shape)
        self.part.put(tensors[self.parameter], D)


def linear_matrices(
    model: Any, base: Checkpoint, rank_fraction: float, density: float, seed: int
) -> tuple[list[LinearMatrix], list[str]]:
    """The attention and MLP projections of a base, those that `compare` measures, with their principal subspaces.

    Args:
        model: the base as transformers opened it; base: the base as a checkpoint.

    Returns:
        the matrices, and the names of those that are left out: the model has another name or shape for them, or they
        have no principal subspace of that rank.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found, left_out = [], []
    for info, part in linear_parts(base):
        name = parameter_of(info.name, parameters, model.base_model_prefix)
        space = None
        if name is not None and parameters[name].shape == info.shape:
            space = PrincipalSpace.of(part.cut(parameters[name]), rank_fraction, density)
        if name is None or space is None:
            left_out.append(part.name)
        else:
            found.append(LinearMatrix(part, name, parameters[name].shape, space, seed))
    return found, left_out


def cells(matrices: Iterable[LinearMatrix]) -> dict[tuple[int | None, str], list[LinearMatrix]]:
    """(layer, role) -> its matrices: one, or several experts."""
    found: dict[tuple[int | None, str], list[LinearMatrix]] = {}
    for matrix in matrices:
        found.setdefault((matrix.part.place.layer, matrix.part.place.role), []).append(matrix)
    return found


def update_direction(
    matrices: Iterable[LinearMatrix], update: Mapping[str, Tensor], direction: UpdateDirection
) -> dict[str, Tensor]:
    """The principal part of an update of these matrices, or the rest of it: parameter name -> tensor."""
    tensors: dict[str, Tensor] = {}
    for matrix in matrices:
        if matrix.parameter in update:
            matrix.add_to(tensors, matrix.update_part(update, direction))
    return tensors


def random_direction(
    matrices: Iterable[LinearMatrix], direction: RandomDirection, draw: int, update: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A random direction of these matrices: parameter name -> tensor.

    Args:
        update: gives each matrix the norm of its update, so that a matrix that did not move is left out; without it
            each has norm 1.
    """
    tensors: dict[str, Tensor] = {}
    for matrix in matrices:
        if update is None:
            matrix.add_to(tensors, matrix.random(direction, draw))
        elif matrix.parameter in update:
            norm = torch.linalg.vector_norm(matrix.part.cut(update[matrix.parameter]))
            matrix.add_to(tensors, norm * matrix.random(direction, draw))
    return tensors
