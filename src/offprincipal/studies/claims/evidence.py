"""What claims are judged from: a comparison's tables, and what the theory's stages left behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offprincipal.comparison import read_table
from offprincipal.comparison.pooling import Estimate, jaccard_estimate, pool_column
from offprincipal.errors import StudyError
from offprincipal.files import read_json
from offprincipal.studies.claims.rules import mean_of

SOURCES = {
    "agreement": "agreement.parquet",
    "precision": "precision.parquet",
    "bounds": "matrices.parquet",
    "gates": "gates.json",
    "watched_rl": "monitor.parquet",
    "watched_sft": "monitor.parquet",
    "outcomes": "outcomes.parquet",
    "kl_curves": "kl_curves.parquet",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """The tables that claims are judged from, and which runs are RLVR and which SFT.

    Args:
        sources: what the theory's claims read beside the comparison: of `SOURCES`, each to the folders that hold it.
        gaussian: run -> the Gaussian update of equal length that stands beside it in the source `bounds`.
        beyond: runs that learn from preferences or a teacher.
    """

    matrices: dict[str, list[dict[str, Any]]]
    pairs: list[dict[str, Any]]
    rl: tuple[str, ...]
    sft: tuple[str, ...]
    folder: str
    sources: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    gaussian: Mapping[str, str] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        comparison: Path,
        rl: Sequence[str],
        sft: Sequence[str],
        folder: str,
        sources: Mapping[str, Sequence[Path]] | None = None,
        gaussian: Mapping[str, str] | None = None,
        beyond: Sequence[str] = (),
    ) -> "Evidence":
        """Read a comparison's tables.

        Args:
            folder: how the study's files name the comparison's folder.

        Raises:
            StudyError: the comparison has no such run.
        """
        runs: dict[str, list[dict[str, Any]]] = {}
        for row in read_table(comparison, "matrices"):
            runs.setdefault(row["run"], []).append(row)
        absent = [run for run in (*rl, *sft, *beyond) if run not in runs]
        if absent:
            raise StudyError(f"{comparison} has no run '{absent[0]}': its runs are {', '.join(runs)}")
        pairs = read_table(comparison, "pairs")
        return cls(runs, pairs, tuple(rl), tuple(sft), folder, sources or {}, gaussian or {}, tuple(beyond))

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(row["numel"] for row in next(iter(self.matrices.values())))

    def of(self, run: str, metric: str) -> Estimate:
        """A pooled metric of one run."""
        return pool_column(metric, self.matrices[run])

    def mean(self, runs: Sequence[str], metric: str) -> Estimate:
        """The mean over runs of a pooled metric."""
        return mean_of([self.of(run, metric) for run in runs])

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
        return mean_of([jaccard_estimate(rows, which) for rows in couples.values()]) if couples else None

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
