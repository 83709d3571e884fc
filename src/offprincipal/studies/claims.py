"""The paper's claims, each judged twice by a fixed rule: as published, and against what could explain it away.

One function a claim. A rule reads tables, never a model, and its margins are constants here: they were fixed before the
first study ran. An interval is a bootstrap over matrices, paired between runs; it says nothing of other seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from offprincipal.comparison import read_table
from offprincipal.comparison.pooling import Estimate, jaccard_estimate, pool_column
from offprincipal.errors import StudyError

Verdict = Literal["supported", "contradicted", "no effect beyond the control", "inconclusive"]

SHARE_MARGIN = 0.02  # two points of a share or an overlap are the least that counts as an effect
LEAST_MATRICES = 8  # below, a bootstrap over matrices covers far less often than it says
RATIO_MARGIN = 1.25  # as is a quarter more, for quantities that are compared as ratios


@dataclass(frozen=True)
class Evidence:
    """The tables that claims are judged from, and which runs are RLVR and which SFT."""

    matrices: dict[str, list[dict[str, Any]]]
    pairs: list[dict[str, Any]]
    rl: tuple[str, ...]
    sft: tuple[str, ...]
    folder: str

    @classmethod
    def read(cls, comparison: Path, rl: Sequence[str], sft: Sequence[str], folder: str) -> "Evidence":
        """Read a comparison's tables.

        Args:
            folder: how the study's files name the comparison's folder.

        Raises:
            StudyError: the comparison has no such run.
        """
        runs: dict[str, list[dict[str, Any]]] = {}
        for row in read_table(comparison, "matrices"):
            runs.setdefault(row["run"], []).append(row)
        absent = [run for run in (*rl, *sft) if run not in runs]
        if absent:
            raise StudyError(f"{comparison} has no run '{absent[0]}': its runs are {', '.join(runs)}")
        return cls(runs, read_table(comparison, "pairs"), tuple(rl), tuple(sft), folder)

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(row["numel"] for row in next(iter(self.matrices.values())))

    def of(self, run: str, metric: str) -> Estimate:
        """A pooled metric of one run."""
        return pool_column(metric, self.matrices[run])

    def mean(self, runs: Sequence[str], metric: str) -> Estimate:
        """The mean over runs of a pooled metric."""
        return _mean([self.of(run, metric) for run in runs])

    def jaccard(
        self, which: Literal["measured", "random", "precision_null"], between: Literal["rl", "rl and sft"] = "rl"
    ) -> Estimate | None:
        """The mean over pairs of two RLVR runs, or of one RLVR and one SFT run; None where there is no such pair."""
        wanted = 2 if between == "rl" else 1
        couples: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.pairs:
            couple = (row["run_a"], row["run_b"])
            known = all(run in self.rl + self.sft for run in couple)
            if known and sum(run in self.rl for run in couple) == wanted:
                couples.setdefault(couple, []).append(row)
        return _mean([jaccard_estimate(rows, which) for rows in couples.values()]) if couples else None


@dataclass(frozen=True)
class Judgement:
    """One verdict, with the figure that it rests on.

    Args:
        measure: what `effect` is.
        rule: how the verdict follows from it.
        sentence: what was found, with the figures that stand behind it.
    """

    verdict: Verdict
    effect: float | None
    low: float | None
    high: float | None
    measure: str
    rule: str
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the function that judges it: as published, and controlled."""

    id: str
    title: str
    statement: str
    control: str
    tables: tuple[str, ...]
    judge: Callable[[Evidence], tuple[Judgement, Judgement]]


CLAIMS: dict[str, Claim] = {}

Judge = Callable[[Evidence], tuple[Judgement, Judgement]]


def claim(
    id: str, title: str, statement: str, control: str, tables: tuple[str, ...] = ("matrices",)
) -> Callable[[Judge], Judge]:
    """Enter a claim into `CLAIMS`."""

    def enter(judge: Judge) -> Judge:
        CLAIMS[id] = Claim(id, title, statement, control, tables, judge)
        return judge

    return enter


def judge(id: str, evidence: Evidence) -> dict[str, Any]:
    """One claim's entry in `study.json`."""
    found = CLAIMS[id]
    as_published, controlled = found.judge(evidence)
    return {
        "id": id,
        "title": found.title,
        "statement": found.statement,
        "as_published": as_published.as_dict(),
        "controlled": {"control": found.control} | controlled.as_dict(),
        "evidence": [f"{evidence.folder}/{table}.parquet" for table in found.tables],
    }


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
        _judge_difference(
            share["rl"] - share["sft"],
            measure="unchanged fraction, RLVR minus SFT",
            sentence=(
                f"RLVR left {_percent(share['rl'])} of the weights unchanged, SFT {_percent(share['sft'])}. By run: "
                f"{_by_run(evidence, lambda run: _percent(evidence.of(run, 'unchanged_fraction')))}."
            ),
        ),
        _judge_difference(
            (share["rl"] - null["rl"]) - (share["sft"] - null["sft"]),
            measure="unchanged fraction beyond that of a Gaussian update of equal length, RLVR minus SFT",
            sentence=(
                f"Gaussian updates of the same lengths would leave {_percent(null['rl'])} and {_percent(null['sft'])} "
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
        nothing = _nothing("Jaccard of two RLVR runs", "There are not two RLVR runs to compare.")
        return nothing, nothing
    return (
        _judge_difference(
            measured - random,
            measure="Jaccard of the changed locations of two RLVR runs, minus that of random locations",
            sentence=(
                f"The RLVR runs agree with a Jaccard of {measured.value:.3f}; random locations would give "
                f"{random.value:.3f}."
            ),
        ),
        _judge_difference(
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
        _judge_difference(
            overlap["rl"] - random["rl"],
            expected_sign,
            measure=f"share of RLVR's changed weights in the {words} mask, minus the mask's density",
            sentence=(
                f"{_percent(overlap['rl'])} of RLVR's changed weights are in the {words} mask, which holds "
                f"{_percent(random['rl'])} of all weights; of SFT's, {_percent(overlap['sft'])}."
            ),
        ),
        _judge_difference(
            overlap["rl"] - null["rl"],
            expected_sign,
            measure=f"share of RLVR's changed weights in the {words} mask, minus that of the precision null",
            sentence=(
                f"Rounding alone would put {_percent(null['rl'], 2)} there (measured {_percent(overlap['rl'], 2)}); "
                f"for SFT {_percent(null['sft'], 2)} (measured {_percent(overlap['sft'], 2)})."
            ),
        ),
    )


def _judge_against_isotropic(
    evidence: Evidence, metrics: list[str], words: str, unit: str = ""
) -> tuple[Judgement, Judgement]:
    """SFT over RLVR, as measured, and each over what a Gaussian update of its own length does."""
    size = {kind: _mean([evidence.mean(runs, m) for m in metrics]) for kind, runs in _kinds(evidence)}
    null = {kind: _mean([evidence.mean(runs, f"{m}_stored_null") for m in metrics]) for kind, runs in _kinds(evidence)}
    step = {kind: evidence.mean(runs, "relative_update_norm") for kind, runs in _kinds(evidence)}
    beyond = {kind: size[kind] / null[kind] for kind in size}

    def beyond_of(run: str) -> str:
        measured, expected = (
            _mean([evidence.of(run, f"{m}{suffix}") for m in metrics]) for suffix in ("", "_stored_null")
        )
        return f"{(measured / expected).value:.2f}"

    return (
        _judge_ratio(
            size["sft"] / size["rl"],
            measure=f"{words}, SFT over RLVR",
            sentence=(
                f"The {words} is {size['rl'].value:.3g}{unit} for RLVR and {size['sft'].value:.3g}{unit} for SFT, "
                f"whose relative step lengths are {step['rl'].value:.2g} and {step['sft'].value:.2g}."
            ),
        ),
        _judge_ratio(
            beyond["sft"] / beyond["rl"],
            measure=f"{words} over that of a Gaussian update of equal length, stored alike, SFT over RLVR",
            sentence=(
                f"Gaussian updates of equal length, stored alike, would make {null['rl'].value:.3g}{unit} and "
                f"{null['sft'].value:.3g}{unit}: RLVR is at {beyond['rl'].value:.2f} times its null, SFT at "
                f"{beyond['sft'].value:.2f} times. By run: {_by_run(evidence, beyond_of)}."
            ),
        ),
    )


def _judge_difference(effect: Estimate, expected_sign: int = 1, *, measure: str, sentence: str) -> Judgement:
    side = "above" if expected_sign > 0 else "below"
    rule = (
        f"supported: interval wholly {side} 0 and the effect at least {SHARE_MARGIN:g} in size; contradicted: the same "
        f"on the other side; no effect: an interval wholly within ±{SHARE_MARGIN:g}; else, and with fewer than "
        f"{LEAST_MATRICES} matrices, inconclusive"
    )
    return _judgement(effect, 0.0, -SHARE_MARGIN, SHARE_MARGIN, expected_sign, measure, rule, sentence)


def _judge_ratio(effect: Estimate, *, measure: str, sentence: str) -> Judgement:
    rule = (
        f"supported: interval wholly above 1 and the ratio at least {RATIO_MARGIN:g}; contradicted: wholly below 1 and "
        f"at most 1/{RATIO_MARGIN:g}; no effect: an interval wholly between the two; else, and with fewer than "
        f"{LEAST_MATRICES} matrices, inconclusive"
    )
    return _judgement(effect, 1.0, 1 / RATIO_MARGIN, RATIO_MARGIN, 1, measure, rule, sentence)


def _judgement(
    effect: Estimate, none: float, least: float, most: float, expected_sign: int, measure: str, rule: str, sentence: str
) -> Judgement:
    pooled = effect.pooled()
    if pooled.value is None or pooled.low is None or pooled.high is None:
        return _nothing(measure, "The figures that this rests on are undefined: too little changed.")
    if effect.matrices < LEAST_MATRICES:
        sentence = f"{sentence} There are only {effect.matrices} matrices: too few for an interval to be trusted."
        return Judgement("inconclusive", pooled.value, pooled.low, pooled.high, measure, rule, sentence)
    verdict = decide(pooled.value, pooled.low, pooled.high, none, least, most, expected_sign)
    return Judgement(verdict, pooled.value, pooled.low, pooled.high, measure, rule, sentence)


def decide(
    value: float, low: float, high: float, none: float, least: float, most: float, expected_sign: int
) -> Verdict:
    """The verdict on an effect.

    Args:
        value, low, high: the effect and its interval.
        none: the effect's value where there is none; least, most: the range in which it is too small to count.
        expected_sign: +1 if the claim says above `none`, −1 if below.

    >>> decide(0.2, 0.1, 0.3, 0.0, -0.02, 0.02, 1), decide(0.001, -0.01, 0.01, 0.0, -0.02, 0.02, 1)
    ('supported', 'no effect beyond the control')
    >>> decide(-0.2, -0.3, -0.1, 0.0, -0.02, 0.02, 1), decide(0.2, -0.1, 0.3, 0.0, -0.02, 0.02, 1)
    ('contradicted', 'inconclusive')
    """
    if least <= low and high <= most:
        return "no effect beyond the control"
    one_sided = low > none or high < none
    if least < value < most or not one_sided:
        return "inconclusive"
    return "supported" if (value > none) == (expected_sign > 0) else "contradicted"


def _nothing(measure: str, sentence: str) -> Judgement:
    return Judgement("inconclusive", None, None, None, measure, "inconclusive where the effect is undefined", sentence)


def _kinds(evidence: Evidence) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ("rl", evidence.rl), ("sft", evidence.sft)


def _by_run(evidence: Evidence, text: Callable[[str], str]) -> str:
    """A figure for each run, so that a mean over unlike runs hides nothing."""
    return ", ".join(f"{run} {text(run)}" for run in evidence.rl + evidence.sft)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    return reduce(Estimate.__add__, estimates).scaled(1 / len(estimates))


def _percent(estimate: Estimate, digits: int = 1) -> str:
    return f"{100 * estimate.value:.{digits}f} %"
