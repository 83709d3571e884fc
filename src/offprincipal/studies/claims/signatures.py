"""C1–C6: what RLVR is said to leave in the weights, judged from one comparison."""

from collections.abc import Callable

from offprincipal.studies.claims.evidence import Evidence
from offprincipal.studies.claims.registry import claim
from offprincipal.studies.claims.rules import Judgement, judge_difference, judge_ratio, mean_of, nothing, percent


@claim(
    "C1",
    "sparsity",
    "RLVR leaves far more bfloat16 weights bit-identical than SFT",
    "step length: what a Gaussian update of equal length leaves unchanged",
)
def sparsity(evidence: Evidence) -> tuple[Judgement, Judgement]:
    share = {kind: evidence.mean(runs, "unchanged_fraction") for kind, runs in _kinds(evidence)}
    null = {kind: evidence.mean(runs, "unchanged_fraction_isotropic_null") for kind, runs in _kinds(evidence)}

    def beyond(run: str) -> str:
        gap = evidence.of(run, "unchanged_fraction") - evidence.of(run, "unchanged_fraction_isotropic_null")
        return f"{100 * gap.value:+.1f} points"

    return (
        judge_difference(
            share["rl"] - share["sft"],
            measure="unchanged fraction, RLVR minus SFT",
            sentence=(
                f"RLVR left {percent(share['rl'])} of the weights unchanged, SFT {percent(share['sft'])}. By run: "
                f"{_by_run(evidence, lambda run: percent(evidence.of(run, 'unchanged_fraction')))}."
            ),
        ),
        judge_difference(
            (share["rl"] - null["rl"]) - (share["sft"] - null["sft"]),
            measure="unchanged fraction beyond that of a Gaussian update of equal length, RLVR minus SFT",
            sentence=(
                f"Gaussian updates of the same lengths would leave {percent(null['rl'])} and {percent(null['sft'])} "
                f"unchanged. By run, measured minus that: {_by_run(evidence, beyond)}."
            ),
        ),
    )


@claim(
    "C2",
    "consistency",
    "RLVR updates the same locations across runs and data",
    "precision null: which weights rounding lets move",
    ("pairs",),
)
def consistency(evidence: Evidence) -> tuple[Judgement, Judgement]:
    measured, random, null = (evidence.jaccard(which) for which in ("measured", "random", "precision_null"))
    if measured is None or random is None or null is None:
        none = nothing("Jaccard of two RLVR runs", "There are not two RLVR runs to compare.")
        return none, none
    return (
        judge_difference(
            measured - random,
            measure="Jaccard of the changed locations of two RLVR runs, minus that of random locations",
            sentence=(
                f"The RLVR runs agree with a Jaccard of {measured.value:.3f}; random locations would give "
                f"{random.value:.3f}."
            ),
        ),
        judge_difference(
            measured - null,
            measure="Jaccard of the changed locations of two RLVR runs, minus that of the precision null",
            sentence=f"Rounding alone would give {null.value:.3f}.{_agreement_with_sft(evidence)}",
        ),
    )


def _agreement_with_sft(evidence: Evidence) -> str:
    """Whether what is left of the agreement is RLVR's own: the same figures between an RLVR and an SFT run."""
    measured, null = (evidence.jaccard(which, "rl and sft") for which in ("measured", "precision_null"))
    if measured is None or null is None:
        return ""
    return f" An RLVR run and an SFT run agree with {measured.value:.3f}, where rounding alone gives {null.value:.3f}."


@claim(
    "C3",
    "spectrum",
    "RLVR keeps the singular values, SFT shifts them",
    "step length and storage: the shift that a Gaussian update of equal length makes, stored alike",
)
def spectrum(evidence: Evidence) -> tuple[Judgement, Judgement]:
    return _judge_against_isotropic(evidence, ["spectral_shift"], "spectral shift")


@claim(
    "C4",
    "rotation",
    "RLVR hardly rotates the principal singular subspaces, SFT does",
    "step length and storage: the rotation that a Gaussian update of equal length makes, stored alike",
)
def rotation(evidence: Evidence) -> tuple[Judgement, Judgement]:
    sides = ["principal_angle_left_max_deg", "principal_angle_right_max_deg"]
    return _judge_against_isotropic(evidence, sides, "largest principal angle", unit="°")


@claim(
    "C5",
    "off-principal",
    "RLVR's changed coordinates avoid principal weights",
    "precision null: which weights rounding lets move",
)
def off_principal(evidence: Evidence) -> tuple[Judgement, Judgement]:
    return _judge_overlap(evidence, "principal", expected_sign=-1)


@claim(
    "C6",
    "low-magnitude",
    "RLVR's changed coordinates prefer small weights",
    "precision null: which weights rounding lets move",
)
def low_magnitude(evidence: Evidence) -> tuple[Judgement, Judgement]:
    return _judge_overlap(evidence, "low_magnitude", expected_sign=1)


def _judge_overlap(evidence: Evidence, mask: str, expected_sign: int) -> tuple[Judgement, Judgement]:
    name, words = f"{mask}_overlap", mask.replace("_", "-")
    overlap = {kind: evidence.mean(runs, name) for kind, runs in _kinds(evidence)}
    random = {kind: evidence.mean(runs, f"{name}_random") for kind, runs in _kinds(evidence)}
    null = {kind: evidence.mean(runs, f"{name}_precision_null") for kind, runs in _kinds(evidence)}
    return (
        judge_difference(
            overlap["rl"] - random["rl"],
            expected_sign,
            measure=f"share of RLVR's changed weights in the {words} mask, minus the mask's density",
            sentence=(
                f"{percent(overlap['rl'])} of RLVR's changed weights are in the {words} mask, which holds "
                f"{percent(random['rl'])} of all weights; of SFT's, {percent(overlap['sft'])}."
            ),
        ),
        judge_difference(
            overlap["rl"] - null["rl"],
            expected_sign,
            measure=f"share of RLVR's changed weights in the {words} mask, minus that of the precision null",
            sentence=(
                f"Rounding alone would put {percent(null['rl'], 2)} there (measured {percent(overlap['rl'], 2)}); "
                f"for SFT {percent(null['sft'], 2)} (measured {percent(overlap['sft'], 2)})."
            ),
        ),
    )


def _judge_against_isotropic(
    evidence: Evidence, metrics: list[str], words: str, unit: str = ""
) -> tuple[Judgement, Judgement]:
    """SFT over RLVR, as measured, and each over what a Gaussian update of its own length does."""
    size = {kind: mean_of([evidence.mean(runs, m) for m in metrics]) for kind, runs in _kinds(evidence)}
    null = {
        kind: mean_of([evidence.mean(runs, f"{m}_stored_null") for m in metrics]) for kind, runs in _kinds(evidence)
    }
    step = {kind: evidence.mean(runs, "relative_update_norm") for kind, runs in _kinds(evidence)}
    beyond = {kind: size[kind] / null[kind] for kind in size}

    def beyond_of(run: str) -> str:
        measured, expected = (
            mean_of([evidence.of(run, f"{m}{suffix}") for m in metrics]) for suffix in ("", "_stored_null")
        )
        return f"{(measured / expected).value:.2f}"

    return (
        judge_ratio(
            size["sft"] / size["rl"],
            measure=f"{words}, SFT over RLVR",
            sentence=(
                f"The {words} is {size['rl'].value:.3g}{unit} for RLVR and {size['sft'].value:.3g}{unit} for SFT, "
                f"whose relative step lengths are {step['rl'].value:.2g} and {step['sft'].value:.2g}."
            ),
        ),
        judge_ratio(
            beyond["sft"] / beyond["rl"],
            measure=f"{words} over that of a Gaussian update of equal length, stored alike, SFT over RLVR",
            sentence=(
                f"Gaussian updates of equal length, stored alike, would make {null['rl'].value:.3g}{unit} and "
                f"{null['sft'].value:.3g}{unit}: RLVR is at {beyond['rl'].value:.2f} times its null, SFT at "
                f"{beyond['sft'].value:.2f} times. By run: {_by_run(evidence, beyond_of)}."
            ),
        ),
    )


def _kinds(evidence: Evidence) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ("rl", evidence.rl), ("sft", evidence.sft)


def _by_run(evidence: Evidence, text: Callable[[str], str]) -> str:
    """A figure for each run, so that a mean over unlike runs hides nothing."""
    return ", ".join(f"{run} {text(run)}" for run in evidence.rl + evidence.sft)
