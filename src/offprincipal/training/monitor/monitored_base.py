"""Figures of one matrix against its base during training: those metrics of a comparison that are fast enough.

The base is decomposed once; every observation starts from that. Knows nothing of models, steps or files.
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

_IN_FLOAT64_UP_TO = 1024  # min(n, m) up to which float64 is used, which resolves even the smallest first steps
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
    """One matrix before training, with its decomposition.

    Args:
        name: of the matrix; it seeds the Gaussian update of the nulls.
        weight: (n, m), in the trained dtype; if it is on the CPU, it is not copied and must not be changed later.
        rank_fraction: rank of the principal subspace over min(n, m).

    Raises:
        NonFiniteTensor: the matrix holds NaN or infinity.
    """

    def __init__(self, name: str, weight: Tensor, rank_fraction: float) -> None:
        settings = MatrixSettings(
            rank_fraction=rank_fraction,
            exact_up_to=0,  # warm starts at every size
            float64_up_to=_IN_FLOAT64_UP_TO,
            stored_null=False,
            device="cuda" if weight.is_cuda else "cpu",
        )
        array = as_array(weight.detach().cpu())
        bits.require_storable(array)
        self._dtype = weight.dtype
        self._base = pair.BaseMatrix(name, array, settings)
        self._base.spectral.svd  # noqa: B018  # decompose now, not during the first step

    def figures(self, weight: Tensor) -> Row:
        """The figures of the current matrix.

        Args:
            weight: (n, m), in the dtype of the base.

        Returns:
            Column -> value, None if undefined; empty if the matrix holds NaN or infinity.
        """
        now = as_array(weight.detach().cpu())
        matrices = pair.MatrixPair(self._base, now, now if weight.dtype in _MASTERS else None)
        try:
            matrices.scan  # noqa: B018  # raises if the matrix is not finite
        except NonFiniteTensor:
            return {}
        row: Row = {"k": matrices.spectral.k, "solver": matrices.spectral.svd.solver}
        for metric in _METRICS:
            values = zip(metric.columns, metric.measure(matrices), strict=True)
            row |= {column.name: value for column, value in values if column.name in _WATCHED}
        return row

    def rehearse(self) -> None:
        """Measure a small random update, to compile and load everything before training and to estimate the time."""
        values = self._base.spectral.values
        generator = self._base.spectral.generator("rehearsal")
        norm = _REHEARSED_STEP * torch.linalg.vector_norm(values).item()
        noise = gaussian.isotropic_update(values.shape, norm, generator, values.dtype)
        self.figures((values + noise.to(values.device)).to(self._dtype))
