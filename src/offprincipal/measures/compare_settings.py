"""Settings of a comparison: metric groups, tensors, and what training is expected to have done."""

from dataclasses import dataclass, field, fields
from typing import Any

from offprincipal.errors import ArgumentError, meant
from offprincipal.measures.columns import GROUPS, Group
from offprincipal.measures.contract import Expectation, parse_expectations
from offprincipal.measures.settings import FROM_FILES, MatrixSettings


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison.

    Args:
        metrics: metric groups to measure, as a tuple or a text such as "location,update"; `changes` is always included.
            `location` decomposes nothing itself, so it has no principal and safe masks unless another group decomposes
            the base; `update` decomposes only the update.
        matrix: settings of the measurement of one matrix.
        include_embeddings: measure and pool embeddings and heads as linear matrices too.
        strict: treat a tensor that exists on only one side as an error.
        expect: expectations of what training did to which tensors, in the form of `measures.contract`.

    Raises:
        ArgumentError: a metric group or an expectation is invalid.

    >>> CompareSettings("location").metrics
    ('changes', 'location')
    """

    metrics: tuple[Group, ...] = GROUPS
    matrix: MatrixSettings = field(default_factory=MatrixSettings)
    include_embeddings: bool = False
    strict: bool = False
    expect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = [one.strip() for one in self.metrics.split(",")] if isinstance(self.metrics, str) else [*self.metrics]
        every = ", ".join(GROUPS)
        if not named:
            raise ArgumentError(f"no metric group is given: choose one of {every}")
        for group in named:
            if group not in GROUPS:
                raise ArgumentError(f"no metric group '{group}': {meant(group, GROUPS, f'choose one of {every}')}")
        object.__setattr__(self, "metrics", tuple(group for group in GROUPS if group in ("changes", *named)))
        parse_expectations(self.expect, self.metrics)  # refuses invalid ones

    @classmethod
    def of(cls, **options: Any) -> "CompareSettings":
        """Settings from keyword arguments, including those of `MatrixSettings`.

        Raises:
            ArgumentError: there is no such setting, or its value is out of range.

        >>> CompareSettings.of(metrics=("location",), density=0.3).matrix.density
        0.3
        """
        own, of_matrix = ({one.name for one in fields(kind)} - {"matrix"} for kind in (cls, MatrixSettings))
        if unknown := sorted(options.keys() - own - of_matrix):
            called = FROM_FILES.get(unknown[0])
            every = f"there are {', '.join(sorted(own | of_matrix))}"
            hint = f"it is called {called}" if called else meant(unknown[0], own | of_matrix, every)
            raise ArgumentError(f"a comparison has no setting '{unknown[0]}': {hint}")
        matrix = MatrixSettings(**{name: value for name, value in options.items() if name in of_matrix})
        return cls(matrix=matrix, **{name: value for name, value in options.items() if name in own})

    @property
    def contract(self) -> list[Expectation]:
        """The parsed expectations."""
        return parse_expectations(self.expect, self.metrics)
