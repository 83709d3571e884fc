"""The plan of an intervention: the operations on each tensor that leave a model's function unchanged. Reads no file.

Rotation of values: the values of a key-value head are written only by v and read only by o, so that a rotation in one
cancels in the other. Permutation: attention sums over heads and the MLP over neurons, so their order does not matter.
Rotation of the residual stream: RMSNorm divides by a norm, which rotations preserve; its gains are folded into the
matrices that read its output.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offprincipal.geometry.draws import generator_of
from offprincipal.interventions.architectures import EMBEDDING, HEAD, Architecture
from offprincipal.interventions.operations import (
    Operation,
    Permutation,
    Rotation,
    Scaling,
    Step,
    applied,
    by_heads,
    taken_back,
)
from offprincipal.interventions.orthogonal import random_orthogonal

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """The operations that are requested for a model.

    Args:
        rotate: layers whose values are rotated.
        permute: layers whose heads and neurons are reordered.
        residual: whether the residual stream is rotated.
        matrix: `haar` or `hadamard`.
        seed: of all random draws; each kind of operation and layer has its own generator.
    """

    rotate: tuple[int, ...] = ()
    permute: tuple[int, ...] = ()
    residual: bool = False
    matrix: str = "haar"
    seed: int = 0


@dataclass
class Plan:
    """The operations on each tensor.

    Args:
        steps: tensor name -> operations in order; other tensors are unchanged.
        readers: norm name -> names of the tensors into which its gain is folded.
        gain_offset: gain minus stored weight of a norm.
    """

    steps: dict[str, list[Step]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[str, list[str]] = field(default_factory=dict)
    gain_offset: float = 0.0

    def add(self, names: list[str], axis: int, operation: Operation) -> None:
        """Append an operation on an axis to the steps of tensors."""
        for name in names:
            self.steps[name].append(Step(axis, operation))

    def before(self, weights: Weights) -> Weights:
        """The weights before the intervention; a tied head is added if it will differ from the embedding."""
        return weights | {HEAD: weights[EMBEDDING]} if HEAD in self.steps and HEAD not in weights else weights

    def apply(self, weights: Weights) -> Weights:
        """The weights after the intervention: changed tensors in float64, unchanged ones without a copy."""
        given = self.before(weights)
        changed = {
            name: applied(self.steps[name], x.double()) if name in self.steps else x for name, x in given.items()
        }
        return changed | {norm: torch.full_like(weights[norm], 1 - self.gain_offset) for norm in self.readers}

    def take_back(self, name: str, x: Tensor) -> Tensor:
        """A tensor, or an update of it, in the coordinates before the intervention."""
        return taken_back(self.steps[name], x.double()) if name in self.steps else x

    def fold(self, weights: Weights) -> Weights:
        """Weights trained after the intervention, with trained changes of folded gains also folded into the readers."""
        folded = dict(weights)
        for norm, readers in self.readers.items():
            for name in readers:
                folded[name] = folded[name].double() * (weights[norm].double() + self.gain_offset)
            folded[norm] = torch.full_like(weights[norm], 1 - self.gain_offset)
        return folded


def plan_of(request: Request, architecture: Architecture, weights: Mapping[str, Tensor]) -> Plan:
    """The plan of a request for a model.

    Args:
        request: with layers in range.
        architecture: of the model.
        weights: of the model; the gains to be folded are read from them.

    Raises:
        InterventionError: the architecture does not allow it, or no Hadamard matrix of its size is constructed.
    """
    plan = Plan(gain_offset=architecture.gain_offset)
    for layer in request.permute:
        _permute(plan, request, architecture, layer)
    for layer in request.rotate:
        _rotate(plan, request, architecture, layer)
    if request.residual:
        _rotate_residual(plan, request, architecture, weights)
    return plan


def _permute(plan: Plan, request: Request, architecture: Architecture, layer: int) -> None:
    """Reorder key-value groups, the query heads within each, and the MLP's neurons."""
    generator = generator_of(request.seed, "permute", layer)
    share = architecture.heads // architecture.kv_heads  # query heads per key-value head
    groups = torch.randperm(architecture.kv_heads, generator=generator)
    within = torch.stack([torch.randperm(share, generator=generator) for _ in range(architecture.kv_heads)])
    heads = (groups[:, None] * share + within).flatten()  # (heads,)
    neurons = Permutation(torch.randperm(architecture.neurons, generator=generator))
    by_head, by_group = (by_heads(order, architecture.head_size) for order in (heads, groups))
    plan.add(architecture.rows(layer, "q"), 0, by_head)
    plan.add(architecture.rows(layer, "k"), 0, by_group)
    plan.add(architecture.rows(layer, "v"), 0, by_group)
    plan.add(architecture.columns(layer, "o"), 1, by_head)
    plan.add(architecture.rows(layer, "gate"), 0, neurons)
    plan.add(architecture.rows(layer, "up"), 0, neurons)
    plan.add(architecture.columns(layer, "down"), 1, neurons)


def _rotate(plan: Plan, request: Request, architecture: Architecture, layer: int) -> None:
    """Rotate the values of each key-value head, and the inputs of o from its query heads."""
    generator = generator_of(request.seed, "rotate", layer)
    size, share = architecture.head_size, architecture.heads // architecture.kv_heads
    drawn = [random_orthogonal(size, request.matrix, generator) for _ in range(architecture.kv_heads)]
    blocks = torch.stack(drawn)  # (kv_heads, d, d)
    plan.add(architecture.rows(layer, "v"), 0, Rotation(blocks))
    plan.add(architecture.columns(layer, "o"), 1, Rotation(blocks.repeat_interleave(share, 0)))


def _rotate_residual(plan: Plan, request: Request, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
    """Fold the gains of norms, and rotate all tensors that write to the residual stream or read from it."""
    plan.readers = architecture.readers()
    generator = generator_of(request.seed, "residual")
    rotation = Rotation(random_orthogonal(architecture.hidden, request.matrix, generator)[None])
    plan.add([EMBEDDING], 1, rotation)
    plan.add(architecture.writers(), 0, rotation)
    for norm, readers in plan.readers.items():
        plan.add(readers, 1, Scaling(weights[norm].double() + architecture.gain_offset))
        plan.add(readers, 1, rotation)
