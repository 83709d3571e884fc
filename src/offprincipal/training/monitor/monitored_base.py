"""What one matrix shows against its base while it is trained: figures of a comparison, those that a look can afford.

The base is decomposed once; each later look starts from that. Knows nothing of models, steps or files.
"""

from typing import Any

import torch
from torch import Tensor

from offprincipal.checkpoints.torch_files import as_array
from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry import bits, gaussian
from offprincipal.measures import pair
from offprincipal.measures.columns import METRICS, Column
from offprincipal.measures.settings import MatrixSettings

_IN_FLOAT64_UP_TO = 1024  # min(n, m) up to which a matrix is worked on in float64, which tells the smallest first step
_REHEARSED_STEP = 1e-3
_MASTERS = (torch.float32, torch.float64)

Row = dict[str, Any]


def _is_watched(column: Column) -> bool:
    return column.name in _SINGLE or (column.name.startswith(_OF_SUBSPACES) and not column.name.endswith(_LEFT_OUT))


_SINGLE = frozenset(
    {
        *("base_norm", "update_norm", "relative_update_norm"),
        *("unchanged_fraction", "unchanged_fraction_isotropic_null", "hidden_fraction"),
        *("spectral_shift", "spectral_shift_per_norm", "spectral_shift_isotropic_null"),
        *("singular_value_error", "angle_error_deg"),
    }
)
_OF_SUBSPACES = ("principal_angle_", "principal_energy")
_LEFT_OUT = ("_stored_null", "_shuffled_null", "_sd")
COLUMNS = tuple(column for metric in METRICS for column in metric.columns if _is_watched(column))
_WATCHED = frozenset(column.name for column in COLUMNS)
_METRICS = tuple(metric for metric in METRICS if any(column.name in _WATCHED for column in metric.columns))


class MonitoredBase:
    """One matrix before training, decomposed.

    Args:
        name: of the matrix; it fixes the Gaussian update of the nulls.
        weight: (n, m), in the type that it is trained in; not to be changed where it is on the CPU.
        rank_fraction: rank of the principal subspace over min(n, m).

    Raises:
        NonFiniteTensor: the matrix holds NaN or infinity.
    """

    def __init__(self, name: str, weight: Tensor, rank_fraction: float) -> None:
        settings = MatrixSettings(
            rank_fraction=rank_fraction,
            exact_up_to=0,  # by warm starts, whatever the size
            float64_up_to=_IN_FLOAT64_UP_TO,
            stored_null=False,
            device="cuda" if weight.is_cuda else "cpu",
        )
        array = as_array(weight.detach().cpu())
        bits.require_storable(array)
        self._dtype = weight.dtype
        self._base = pair.BaseMatrix(name, array, settings)
        self._base.spectral.svd  # noqa: B018  # before the first step, not in it

    def figures(self, weight: Tensor) -> Row:
        """Every figure of the matrix as it is now; None where one is undefined, none at all where it is not finite.

        Args:
            weight: (n, m), in the type of the base.
        """
        now = as_array(weight.detach().cpu())
        found = pair.MatrixPair(self._base, now, now if weight.dtype in _MASTERS else None)
        try:
            found.scan  # noqa: B018  # finds what is not finite before anything else is done
        except NonFiniteTensor:
            return {}
        row: Row = {"k": found.spectral.k, "solver": found.spectral.svd.solver}
        for metric in _METRICS:
            values = zip(metric.columns, metric.measure(found), strict=True)
            row |= {column.name: value for column, value in values if column.name in _WATCHED}
        return row

    def rehearse(self) -> None:
        """Measure a small random update, so that what is compiled or loaded on first use is, and its time is known."""
        values = self._base.spectral.values
        generator = self._base.spectral.generator("rehearsal")
        norm = _REHEARSED_STEP * torch.linalg.vector_norm(values).item()
        noise = gaussian.isotropic_update(values.shape, norm, generator, values.dtype)
        self.figures((values + noise.to(values.device)).to(self._dtype))
