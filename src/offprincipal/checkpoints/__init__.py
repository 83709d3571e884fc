"""Open a checkpoint as a lazy mapping name -> tensor, pair checkpoints, and say what each tensor is for."""

from offprincipal.checkpoints.checkpoint import Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.opening import open_checkpoint
from offprincipal.checkpoints.pairing import Pairing, pair_tensors, parameter_of
from offprincipal.checkpoints.parts import Part, parts_of
from offprincipal.checkpoints.roles import Place, place_of

__all__ = [
    "Array",
    "Checkpoint",
    "Pairing",
    "Part",
    "Place",
    "TensorInfo",
    "open_checkpoint",
    "pair_tensors",
    "parameter_of",
    "parts_of",
    "place_of",
]
