"""Nulls: the figures of an update that ignores the weights, rung by rung, each accounting for more than the last.

*Chance* accounts for the number of changed entries. *Rounding* uses the steps, shuffled over the weights and stored.
*Spacing* accounts for the number of changed entries of each spacing class, *margins* also for that of each row and
column. The rest is left to the entries themselves. Not on the ladder are the *scaled rounding null*, whose steps depend
on rows and columns, the *isotropic null*, a Gaussian update of equal norm, and the *stored null*, such an update
rounded as the tuned weights were; the drawn ones are in `offprincipal.geometry.gaussian`.
"""

from offprincipal.geometry.nulls.chance import bernoulli_overlap, jaccard
from offprincipal.geometry.nulls.margins import (
    MarginModel,
    ScoreTest,
    class_slots,
    expected_in_common,
    expected_rates,
    fit_margins,
    score_tests,
)
from offprincipal.geometry.nulls.rounding import RoundingNull, count_steps, rounding_intersection, rounding_null
from offprincipal.geometry.nulls.scaled import ScaledNull, scaled_null
from offprincipal.geometry.nulls.spacing import CountNull, intersection_null, overlap_null
from offprincipal.geometry.nulls.stored import gaussian_scale, unchanged_isotropic, unchanged_isotropic_off_grid
from offprincipal.geometry.nulls.stripes import dispersion, gini, line_null

__all__ = [
    "CountNull",
    "MarginModel",
    "RoundingNull",
    "ScaledNull",
    "ScoreTest",
    "bernoulli_overlap",
    "class_slots",
    "count_steps",
    "dispersion",
    "expected_in_common",
    "expected_rates",
    "fit_margins",
    "gaussian_scale",
    "gini",
    "intersection_null",
    "jaccard",
    "line_null",
    "overlap_null",
    "rounding_intersection",
    "rounding_null",
    "scaled_null",
    "score_tests",
    "unchanged_isotropic",
    "unchanged_isotropic_off_grid",
]
