"""C14: does RLVR move along one direction, nearly linearly in the step, beside the random walk of its own steps."""

from collections.abc import Mapping

from offprincipal.paper.claims.evidence import Evidence, Row
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    ClaimPart,
    Judgement,
    by_run,
    controlled_with,
    differences,
    judge_difference,
    over_units,
    published_with,
)

_MOST = 0.5  # of the displacements: what is more than a half of it


@claim(
    "C14",
    "linear motion",
    "RLVR moves the weights along one direction, nearly linearly in the step (Alpha-RL, RLVR-Linearity)",
    "random walk: independent steps of the same lengths; in float32, where storing hides no step",
    tables=(),
    needs=("trajectories",),
)
def linear_motion(evidence: Evidence) -> tuple[Judgement, Judgement]:
    return _published(evidence), _controlled(evidence)


def _published(evidence: Evidence) -> Judgement:
    """As it is reported: of stored checkpoints, beside nothing."""
    followed = evidence.followed("stored")
    rows = {run: followed.get(run, {}) for run in evidence.rl}
    share, line = (_of(rows, name) for name in ("rank1_share", "linearity_r2"))
    linear = judge_difference(
        over_units(_less(line, _MOST)), measure="share of the displacements that a line in the step explains, minus .5"
    )
    headline = judge_difference(
        over_units(_less(share, _MOST)),
        measure="share of the displacements along one direction, minus .5",
        sentence=(
            f"Of checkpoints as stored, one direction holds {by_run(share, '{:.1%}')}; a random walk of the same steps "
            f"has {by_run(_of(rows, 'rank1_share_random_walk_null'), '{:.1%}')} along one. A line in the step explains "
            f"{by_run(line, '{:.1%}')}; of the walk, {by_run(_of(rows, 'linearity_r2_random_walk_null'), '{:.1%}')}."
        ),
    )
    return published_with(headline, [ClaimPart("a line in the step explains most of them", linear)])


def _controlled(evidence: Evidence) -> Judgement:
    followed = evidence.followed("float32")
    rows = {run: followed.get(run, {}) for run in evidence.rl}
    beyond_walk = {
        name: differences(_of(rows, name), _of(rows, f"{name}_random_walk_null"))
        for name in ("rank1_share", "linearity_r2")
    }
    conditions = [
        ClaimPart(
            words,
            judge_difference(over_units(beyond_walk[name]), measure=f"{measure}, minus that of the random walk"),
        )
        for name, words, measure in (
            ("rank1_share", "one direction holds more than in the walk", "share along one direction"),
            ("linearity_r2", "a line explains more than of the walk", "share that a line in the step explains"),
        )
    ]
    others = {run: row for run, row in followed.items() if run not in evidence.rl}
    headline = judge_difference(
        over_units(_of(rows, "drift")),
        measure="mean cosine of float32 steps at least half of the run apart, 0 in a random walk",
        sentence=(
            f"In float32 the cosine of far steps is {by_run(_of(rows, 'drift'), '{:.2f}')}, and one direction holds "
            f"{by_run(_of(rows, 'rank1_share'), '{:.1%}')}, of a random walk "
            f"{by_run(_of(rows, 'rank1_share_random_walk_null'), '{:.1%}')}. Other runs: cosine "
            f"{by_run(_of(others, 'drift'), '{:.2f}') or 'none'}; one direction "
            f"{by_run(_of(others, 'rank1_share'), '{:.1%}') or 'none'}."
        ),
    )
    return controlled_with(headline, conditions)


def _of(rows: Mapping[str, Row], name: str) -> dict[str, float | None]:
    return {run: row.get(name) for run, row in rows.items()}


def _less(values: Mapping[str, float | None], by: float) -> dict[str, float | None]:
    return {run: None if value is None else value - by for run, value in values.items()}
