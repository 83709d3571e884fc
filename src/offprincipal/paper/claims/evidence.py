"""What claims are judged from: a comparison's tables, and what the theory's stages left behind."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from offprincipal.errors import StudyError
from offprincipal.file_names import GATES, MONITOR
from offprincipal.files import read_json
from offprincipal.measures.columns import RUNGS
from offprincipal.measures.pooling import STEPS, anatomy, jaccard_estimate, pool_column
from offprincipal.paper.claims.rules import differences, over_units, ratios
from offprincipal.paper.claims.units import Effect, TwoSamples
from offprincipal.studies.experiments import AGREEMENT, PRECISION_TABLE
from offprincipal.studies.fine_tuning import CURVES_TABLE, OUTCOMES_TABLE
from offprincipal.studies.trajectories import TABLE as TRAJECTORIES
from offprincipal.tables import read_table

SOURCES = {
    "agreement": AGREEMENT,
    "precision": PRECISION_TABLE,
    "bounds": "matrices.parquet",
    "gates": GATES,
    "watched_rl": MONITOR,
    "watched_sft": MONITOR,
    "outcomes": OUTCOMES_TABLE,
    "kl_curves": CURVES_TABLE,
    "trajectories": TRAJECTORIES,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """The tables that claims are judged from, and which runs are RLVR and which SFT.

    Args:
        sft: SFT runs by their kind; kinds are not mixed, since a teacher's traces and own answers are different data.
        matches: kind of SFT -> another run -> the SFT run that shares its seed and tasks.
        sources: further sources of the theory's claims: from `SOURCES` -> the folders that contain them.
        gaussian: run -> its Gaussian update of equal norm in the source `bounds`.
        beyond: runs that learn from preferences or a teacher, by their kind.
        contrast: the kind of SFT that RLVR is compared with; kind: the kind of `beyond` that replaces RLVR, as `rl`;
            set by `contrasts`.
        draw: index of the blind walk that replaces each run in the source `trajectories`; None for the run itself.
    """

    matrices: Mapping[str, list[Row]]
    pairs: Sequence[Row]
    rl: tuple[str, ...]
    sft: Mapping[str, tuple[str, ...]]
    folder: str
    matches: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    sources: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    gaussian: Mapping[str, str] = field(default_factory=dict)
    beyond: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    contrast: str = ""
    kind: str = ""
    draw: int | None = None

    @classmethod
    def read(
        cls, comparison: Path, rl: Sequence[str], sft: Mapping[str, Sequence[str]], folder: str, **more: Any
    ) -> "Evidence":
        """Read a comparison's tables.

        Args:
            folder: how the study's files name the comparison's folder.
            more: what else the evidence has.

        Raises:
            StudyError: the comparison has no such run.
        """
        runs: dict[str, list[Row]] = {}
        for row in read_table(comparison, "matrices"):
            runs.setdefault(row["run"], []).append(row)
        kinds = {kind: tuple(of_kind) for kind, of_kind in sft.items()}
        named = (*rl, *chain(*kinds.values(), *more.get("beyond", {}).values()))
        absent = [run for run in named if run not in runs]
        if absent:
            raise StudyError(f"{comparison} has no run '{absent[0]}': its runs are {', '.join(runs)}")
        return cls(runs, read_table(comparison, "pairs"), tuple(rl), kinds, folder, **more)

    def contrasts(self, beyond: bool = False) -> Iterator["Evidence"]:
        """The same, one for each kind of SFT that RLVR is held against, or that each kind of `beyond` is."""
        subjects = self.beyond if beyond else {"": self.rl}
        for kind, runs in subjects.items():
            for sft in self.sft:
                yield replace(self, rl=runs, kind=kind, contrast=sft)

    @property
    def against(self) -> tuple[str, ...]:
        """The SFT runs of this contrast."""
        return self.sft.get(self.contrast, ())

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(row["numel"] for row in next(iter(self.matrices.values())))

    def of(self, runs: Sequence[str], metric: str) -> dict[str, float | None]:
        """Run -> a metric, pooled over its matrices; None if it is undefined."""
        found = {run: pool_column(metric, self.matrices[run]).value for run in runs}
        return {run: value if math.isfinite(value) else None for run, value in found.items()}

    def beside(
        self, runs: Sequence[str], metric: str, null: str
    ) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Run -> a metric and its null, pooled over the linear matrices if both are known; None if none has."""
        found: tuple[dict[str, float | None], dict[str, float | None]] = {}, {}
        for run in runs:
            known = [row for row in self.matrices[run] if row["linear"]]
            known = [row for row in known if row.get(metric) is not None and row.get(null) is not None]
            for name, values in zip((metric, null), found, strict=True):
                values[run] = pool_column(name, known).value if known else None
        return found

    def over_null(self, runs: Sequence[str], metrics: Sequence[str], null: str) -> dict[str, float | None]:
        """Run -> how many times its null a run is, matrix by matrix; None if that is defined nowhere.

        The parameter-weighted geometric mean over matrices and metrics: a mean of sizes would be that of the one matrix
        whose principal subspace is hardly defined.

        Args:
            null: what the null's column is named beyond the metric's.
        """
        found: dict[str, float | None] = {}
        for run in runs:
            known = [
                (row["numel"], math.log(row[metric] / row[f"{metric}{null}"]))
                for row in self.matrices[run]
                if row["linear"]
                for metric in metrics
                if row[metric] and row[f"{metric}{null}"]
            ]
            total = sum(weight for weight, _ in known)
            found[run] = math.exp(sum(weight * log for weight, log in known) / total) if total else None
        return found

    def anatomies(self, runs: Sequence[str], mask: str) -> dict[str, dict[str, float]]:
        """Run -> what each rung of the ladder of nulls puts into a mask, up to what was measured."""
        found = {run: anatomy(self.matrices[run]).get(mask) for run in runs}
        return {run: rungs for run, rungs in found.items() if rungs is not None}

    def contrasted(self, values: Mapping[str, float | None], ratio: bool = False) -> Effect:
        """RLVR minus SFT, or SFT over RLVR: match by match where enough runs have one, else as two samples.

        Args:
            values: run -> what is compared, of the runs of both kinds.
        """
        couples = {rl: sft for rl, sft in self.matches.get(self.contrast, {}).items() if rl in self.rl}
        if len(couples) == len(self.rl) == len(self.against):
            ours = {f"{rl} and {sft}": values[rl] for rl, sft in couples.items()}
            theirs = {f"{rl} and {sft}": values[sft] for rl, sft in couples.items()}
            joint = ratios(theirs, ours) if ratio else differences(ours, theirs)
            return over_units(joint, ratio, "matched pairs of runs")
        rl, sft = ([v for run in runs if (v := values[run]) is not None] for runs in (self.rl, self.against))
        return TwoSamples(sft, rl, geometric=True) if ratio else TwoSamples(rl, sft)

    def jaccards(self, which: str, between: Literal["rl", "rl and sft"] = "rl") -> dict[tuple[str, str], float]:
        """Pairs of two RLVR runs, or of one RLVR and one SFT run -> their Jaccard, as measured or under a null."""
        wanted = 2 if between == "rl" else 1
        sft = [run for runs in self.sft.values() for run in runs]
        couples: dict[tuple[str, str], list[Row]] = {}
        for row in self.pairs:
            couple = (row["run_a"], row["run_b"])
            if all(run in (*self.rl, *sft) for run in couple) and sum(run in self.rl for run in couple) == wanted:
                couples.setdefault(couple, []).append(row)
        found = {couple: jaccard_estimate(rows, which).value for couple, rows in couples.items()}
        return {couple: value for couple, value in found.items() if math.isfinite(value)}

    def pair_anatomies(self) -> dict[tuple[str, str], dict[str, float]]:
        """Pairs of two RLVR runs -> their Jaccard under each rung of the ladder of nulls, up to what was measured."""
        rungs = {step: self.jaccards(null) for step, null in zip(STEPS, (*RUNGS, "measured"), strict=True)}
        return {
            pair: {step: values[pair] for step, values in rungs.items() if pair in values} for pair in rungs["measured"]
        }

    def rows(self, source: str) -> list[Row]:
        """The rows of a table that a stage of the theory left, of all its folders."""
        table = SOURCES[source].removesuffix(".parquet")
        return [row for folder in self.sources[source] for row in read_table(folder, table)]

    def by_run(self, source: str) -> dict[str, list[Row]]:
        """The same, by run."""
        runs: dict[str, list[Row]] = {}
        for row in self.rows(source):
            runs.setdefault(row["run"], []).append(row)
        return runs

    def followed(self, weights: Literal["stored", "float32"]) -> dict[str, Row]:
        """Run -> how it moved over its checkpoints, or how the blind walk did that stands in its place."""
        rows = self.rows("trajectories")
        return {row["run"]: row for row in rows if row["weights"] == weights and row["draw"] == self.draw}

    def watched(self, kind: Literal["rl", "sft"]) -> dict[str, list[Row]]:
        """Run -> the pooled row of each step that a monitor saw, in order."""
        folders = self.sources[f"watched_{kind}"]
        return {
            folder.name: [row for row in read_table(folder, "monitor") if row["tensor"] is None and row["step"] > 0]
            for folder in folders
        }

    def gates(self) -> dict[str, Row]:
        """Run -> its entry of `gates.json`."""
        entries: dict[str, Row] = {}
        for folder in self.sources["gates"]:
            entries |= read_json(folder / SOURCES["gates"])["runs"]
        return entries

    def files(self, sources: Sequence[str]) -> list[str]:
        """The files behind sources, as `study.json` names them."""
        return [f"{folder.name}/{SOURCES[source]}" for source in sources for folder in self.sources[source]]
