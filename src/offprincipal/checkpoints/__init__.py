"""Open a checkpoint as a lazy mapping name -> tensor, pair checkpoints, and say what each tensor is for."""

from offprincipal.checkpoints.checkpoint import Checkpoint, TensorInfo, require_same_tensors
from offprincipal.checkpoints.opening import open_checkpoint
from offprincipal.checkpoints.roles import Place, place_of

__all__ = ["Checkpoint", "Place", "TensorInfo", "open_checkpoint", "place_of", "require_same_tensors"]
