"""C1–C6: what RLVR is said to leave in the weights, judged from one comparison; the unit is the run."""

from collections.abc import Mapping

from offprincipal.paper.claims.evidence import Evidence
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    ClaimPart,
    Judgement,
    by_run,
    controlled_with,
    decided_alike,
    differences,
    judge_difference,
    judge_ratio,
    mean,
    nothing,
    over_units,
    percent,
    published_with,
    ratios,
)
from offprincipal.paper.claims.units import over_runs_of_pairs

Values = Mapping[str, float | None]
_SCALED = "the run's own steps, dealt out blindly with the lengths of its rows and columns"


@claim(
    "C1",
    "sparsity",
    "RLVR leaves far more bfloat16 weights bit-identical than SFT",
    "update norm, and its own steps dealt out blindly: what either leaves unchanged",
    against_sft=True,
)
def sparsity(evidence: Evidence) -> tuple[Judgement, Judgement]:
    runs = (*evidence.rl, *evidence.against)
    share = evidence.of(runs, "unchanged_fraction")
    null = evidence.of(runs, "unchanged_fraction_isotropic_null")
    linear, dealt = evidence.beside(runs, "unchanged_fraction", "unchanged_fraction_scaled_null")
    beyond, of_steps = differences(share, null), differences(linear, dealt)
    published = judge_difference(
        evidence.contrasted(share),
        measure="unchanged fraction, RLVR minus SFT",
        relative=evidence.contrasted(_inverse(share), ratio=True),
        sentence=(
            f"RLVR left {percent(_mean(share, evidence.rl))} of the weights unchanged, SFT "
            f"{percent(_mean(share, evidence.against))}. By run: {by_run(share, '{:.1%}')}."
        ),
    )
    controlled = judge_difference(
        evidence.contrasted(beyond),
        measure="unchanged fraction beyond that of a Gaussian update of equal norm, RLVR minus SFT",
        relative=evidence.contrasted(_inverse(ratios(share, null)), ratio=True),
        sentence=(
            f"Gaussian updates of the same lengths would leave {percent(_mean(null, evidence.rl))} and "
            f"{percent(_mean(null, evidence.against))} unchanged. By run, measured minus that: "
            f"{by_run(beyond, '{:+.1%}')}; minus what its own steps would leave, dealt out blindly: "
            f"{by_run(of_steps, '{:+.2%}')}."
        ),
    )
    stricter = judge_difference(
        evidence.contrasted(of_steps),
        measure=f"unchanged fraction beyond that of {_SCALED}, RLVR minus SFT",
        relative=evidence.contrasted(_inverse(ratios(linear, dealt)), ratio=True),
    )
    return published, decided_alike(controlled, stricter)


@claim(
    "C2",
    "consistency",
    "RLVR updates the same locations across runs and data",
    "margin null: as many changes of each spacing, row and column",
    ("pairs",),
    anatomy="pairs",
)
def consistency(evidence: Evidence) -> tuple[Judgement, Judgement]:
    measured = evidence.jaccards("measured")
    if not measured:
        none = nothing("Jaccard of two RLVR runs", "There are not two RLVR runs to compare.")
        return none, none
    found = []
    for null, words in (("random", "random locations"), ("margin_null", "the margin null")):
        expected = evidence.jaccards(null)
        pairs = [pair for pair in measured if pair in expected]
        found.append(
            judge_difference(
                over_runs_of_pairs({pair: measured[pair] - expected[pair] for pair in pairs}),
                measure=f"Jaccard of the changed locations of two RLVR runs, minus that of {words}",
                relative=over_runs_of_pairs(
                    {pair: measured[pair] / expected[pair] for pair in pairs if expected[pair] > 0}, geometric=True
                ),
                sentence=_agreement(evidence),
            )
        )
    return found[0], found[1]


def _agreement(evidence: Evidence) -> str:
    """Every rung beside what was measured, and whether what is left is RLVR's own: the same with an SFT run."""
    said = []
    for between, words in (("rl", "Two RLVR runs"), ("rl and sft", "An RLVR run and an SFT run")):
        which = ("measured", "random", "rounding_null", "margin_null")
        values = [mean(evidence.jaccards(name, between).values()) for name in which]  # type: ignore[arg-type]
        if values[0] is not None:
            shown = ["undefined" if value is None else f"{value:.3f}" for value in values]
            said.append(
                f"{words} agree with a Jaccard of {shown[0]}; chance gives {shown[1]}, rounding alone {shown[2]}, and "
                f"spacing and margins {shown[3]}."
            )
    return " ".join(said)


@claim(
    "C3",
    "spectrum",
    "RLVR keeps the singular values, SFT shifts them",
    "update norm and storage: the shift that a Gaussian update of equal norm makes, and its own steps shuffled",
    against_sft=True,
)
def spectrum(evidence: Evidence) -> tuple[Judgement, Judgement]:
    return _judge_against_stored(evidence, ["spectral_shift"], "spectral shift")


@claim(
    "C4",
    "rotation",
    "RLVR hardly rotates the principal singular subspaces, SFT does",
    "update norm and storage: the rotation that a Gaussian update of equal norm makes, and its own steps shuffled",
    against_sft=True,
)
def rotation(evidence: Evidence) -> tuple[Judgement, Judgement]:
    sides = ["principal_angle_left_rms_deg", "principal_angle_right_rms_deg"]
    return _judge_against_stored(evidence, sides, "root-mean-square principal angle", unit="°")


@claim(
    "C5",
    "off-principal",
    "RLVR's changed coordinates avoid principal weights, SFT's do not",
    "rounding null: steps that ignore the weights, stored; also with the rows' and columns' own lengths",
    against_sft=True,
    anatomy="principal",
)
def off_principal(evidence: Evidence) -> tuple[Judgement, Judgement]:
    return _judge_overlap(evidence, "principal", expected_sign=-1)


@claim(
    "C6",
    "low-magnitude",
    "RLVR's changed coordinates prefer small weights, more than SFT's",
    "rounding null: steps that ignore the weights, stored; also with the rows' and columns' own lengths",
    against_sft=True,
    anatomy="low_magnitude",
)
def low_magnitude(evidence: Evidence) -> tuple[Judgement, Judgement]:
    return _judge_overlap(evidence, "low_magnitude", expected_sign=1)


def _judge_overlap(evidence: Evidence, mask: str, expected_sign: int) -> tuple[Judgement, Judgement]:
    chance, rounding, scaled = (
        _beyond(evidence, mask, expected_sign, null, what)
        for null, what in (
            ("random", "the mask's density"),
            ("rounding_null", "that of the rounding null"),
            ("scaled_null", f"that of {_SCALED}"),
        )
    )
    return published_with(*chance), decided_alike(controlled_with(*rounding), scaled[0])


def _beyond(
    evidence: Evidence, mask: str, expected_sign: int, null: str, what: str
) -> tuple[Judgement, list[ClaimPart]]:
    """How far a mask's share of the changes lies beyond a null, and whether it does so more than in SFT."""
    name, words, runs = f"{mask}_overlap", mask.replace("_", "-"), (*evidence.rl, *evidence.against)
    overlap, expected = evidence.beside(runs, name, f"{name}_{null}")
    beyond, over = differences(overlap, expected), ratios(overlap, expected)
    headline = judge_difference(
        over_units({run: beyond[run] for run in evidence.rl}),
        expected_sign,
        measure=f"share of RLVR's changed weights in the {words} mask, minus {what}",
        relative=over_units({run: over[run] for run in evidence.rl}, geometric=True),
        sentence=(
            f"Measured {by_run(overlap, '{:.1%}')}; minus {what} {by_run(beyond, '{:+.2%}')}, which is "
            f"{percent(_mean(expected, evidence.rl))} for RLVR and {percent(_mean(expected, evidence.against))} "
            "for SFT."
        ),
    )
    more = judge_difference(
        evidence.contrasted(beyond), expected_sign, measure=f"the same of RLVR minus SFT, each minus {what}"
    )
    return headline, [ClaimPart("it is more so than in SFT", more)]


def _judge_against_stored(
    evidence: Evidence, metrics: list[str], words: str, unit: str = ""
) -> tuple[Judgement, Judgement]:
    """SFT over RLVR, as measured, and each over what a Gaussian update of its own length, and its own steps do."""
    runs = (*evidence.rl, *evidence.against)
    size = _means([evidence.of(runs, metric) for metric in metrics])
    step, beyond = evidence.of(runs, "relative_update_norm"), evidence.over_null(runs, metrics, "_stored_null")
    shuffled = evidence.over_null(runs, metrics, "_shuffled_null")
    controlled = judge_ratio(
        evidence.contrasted(beyond, ratio=True),
        measure=f"{words} over that of a Gaussian update of equal norm, matrix by matrix: SFT over RLVR",
        sentence=f"By run, over that of a Gaussian update of equal norm: {by_run(beyond, '{:.2f}')}; over that of "
        f"its own steps, shuffled: {by_run(shuffled, '{:.2f}')}.",
    )
    stricter = judge_ratio(
        evidence.contrasted(shuffled, ratio=True),
        measure=f"{words} over that of the run's own steps, shuffled over the matrix and stored alike: SFT over RLVR",
    )
    return (
        judge_ratio(
            evidence.contrasted(size, ratio=True),
            measure=f"{words}, SFT over RLVR",
            sentence=f"By run, {unit or 'as a share'}: {by_run(size)}; relative update norms {by_run(step, '{:.2g}')}.",
        ),
        decided_alike(controlled, stricter),
    )


def _means(tables: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Run by run; None if one is undefined."""
    runs = tables[0]
    return {run: None if any(table[run] is None for table in tables) else mean(t[run] for t in tables) for run in runs}


def _inverse(values: Values) -> dict[str, float | None]:
    return {run: 1 / value if value else None for run, value in values.items()}


def _mean(values: Values, runs: tuple[str, ...]) -> float | None:
    return mean(values[run] for run in runs)
