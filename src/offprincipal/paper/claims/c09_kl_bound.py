"""C9: does each on-policy step move the policy by a small KL, and is that RLVR's doing; from monitors and gates."""

from collections.abc import Mapping, Sequence
from typing import Any

from offprincipal.paper.claims.evidence import Evidence, Row
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    RATIO_MARGIN,
    SHARE_MARGIN,
    ClaimPart,
    Judgement,
    by_run,
    controlled_with,
    judge_at_most,
    judge_bare_ratio,
    judge_difference,
    judge_positive,
    judge_ratio,
    mean,
    nothing,
    over_units,
    published_with,
)
from offprincipal.paper.claims.units import TwoSamples

Runs = Mapping[str, list[Row]]


@claim(
    "C9",
    "KL bound",
    "Each on-policy step moves the policy by a small KL even with beta = 0, and the weight step obeys the norm bound",
    "length: the KL of SFT over the squared length of its update",
    tables=(),
    needs=("watched_rl", "watched_sft", "gates"),
)
def kl_bound(evidence: Evidence) -> tuple[Judgement, Judgement]:
    rl, sft = evidence.watched("rl"), evidence.watched("sft")
    if any(len(_known(rows, "kl_cumulative")) < 4 for rows in (*rl.values(), *sft.values())):
        none = nothing("KL per step", "A monitor saw too few steps to tell.")
        return none, none
    gates = evidence.gates()
    ground = {
        kind: {run: found for run in runs if (found := _on_the_bases_ground(gates.get(run))) is not None}
        for kind, runs in (("rl", evidence.rl), ("sft", [run for of_kind in evidence.sft.values() for run in of_kind]))
    }
    return _published(rl, {run: gates[run] for run in evidence.rl if run in gates}), _controlled(rl, sft, ground)


def _published(rl: Runs, gates: Mapping[str, Any]) -> Judgement:
    steps = {run: _kl_per_step(rows) for run, rows in rl.items()}
    used = {run: entry["norm_bound"]["tightness"] for run, entry in gates.items()}
    known = {run: value for run, value in used.items() if value is not None}
    conditions = [
        ClaimPart(
            "each step's KL is small",
            judge_difference(
                over_units(steps), measure=f"nats a token and step, no effect being less than {SHARE_MARGIN:g}"
            ),
            wanted=("no effect beyond the control",),
        ),
        ClaimPart(
            "each step's KL is more than none", judge_positive(over_units(steps), measure="nats a token and step")
        ),
        ClaimPart(
            "the norm bound holds",
            judge_at_most(
                max(known.values(), default=None), RATIO_MARGIN, measure="Fisher norm of the update over √(2K)"
            ),
        ),
    ]
    ends = ", ".join(f"{_known(rows, 'kl_cumulative')[-1]:.3g} ({run})" for run, rows in rl.items())
    bound = ", ".join(f"{value:.2f} ({run})" for run, value in known.items()) or "undefined"
    headline = judge_ratio(
        over_units({run: _growth(rows) for run, rows in rl.items()}, geometric=True),
        measure="cumulative KL of RLVR, last quarter of the steps over the second quarter",
        sentence=(
            f"RLVR's steps move the policy by {by_run(steps, '{:.2g}')} nats a token each; its cumulative KL grows to "
            f"{ends}. "
            f"Fisher norm of the whole update over proposition 3.2's √(2K): {bound}; above 1 is what higher orders add."
        ),
    )
    return published_with(headline, conditions)


def _on_the_bases_ground(entry: Mapping[str, Any] | None) -> float | None:
    """KL of the whole update over its squared length, on continuations that the base samples."""
    if entry is None or not entry["norm_bound"]["update_norm"]:
        return None
    return float(entry["curve"][-1]["kl"] / entry["norm_bound"]["update_norm"] ** 2)


def _controlled(rl: Runs, sft: Runs, ground: Mapping[str, Mapping[str, float]]) -> Judgement:
    per_length = {run: _kl_per_squared_length(rows) for run, rows in {**rl, **sft}.items()}
    known = [[value for run in runs if (value := per_length[run]) is not None] for runs in (sft, rl)]
    steps = by_run({run: _kl_per_step(rows) for run, rows in sft.items()}, "{:.2g}")
    listed = by_run(per_length)
    on_base = ", ".join(f"{value:.3g} ({run})" for runs in ground.values() for run, value in runs.items())
    sides = [sum(runs.values()) / len(runs) if runs else None for runs in (ground["rl"], ground["sft"])]
    alike = judge_bare_ratio(
        sides[1] / sides[0] if sides[1] is not None and sides[0] else None,
        measure="the same on continuations that the base samples, at the whole updates",
    )
    headline = judge_ratio(
        TwoSamples(known[0], known[1], geometric=True),
        measure="cumulative KL over the squared length of the update, SFT over RLVR, over the watched steps",
        sentence=(
            f"SFT's steps move the policy by {steps} nats a token each. Nats over the squared length of the update, "
            f"each run on the tokens it was trained on: {listed}; on continuations that the base samples for the same "
            f"prompts: {on_base}."
        ),
    )
    return controlled_with(headline, [ClaimPart("it is so where both are measured on the same tokens", alike)])


def _known(rows: Sequence[Row], column: str) -> list[float]:
    return [row[column] for row in rows if row[column] is not None]


def _kl_per_step(rows: Sequence[Row]) -> float | None:
    return mean(_known(rows, "kl_step"))


def _kl_per_squared_length(rows: Sequence[Row]) -> float | None:
    known = [row for row in rows if row["kl_cumulative"] is not None and row["update_norm"]]
    squares = sum(row["update_norm"] ** 2 for row in known)
    return sum(row["kl_cumulative"] for row in known) / squares if squares else None


def _growth(rows: Sequence[Row]) -> float | None:
    """Mean cumulative KL over the last quarter of the steps that were seen, over that of the second quarter."""
    found = _known(rows, "kl_cumulative")
    quarter = len(found) // 4
    early = sum(found[quarter : 2 * quarter])
    return sum(found[-quarter:]) / early if early > 0 else None
