"""The claims by their ids, and one claim's entry in `study.json`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offprincipal.studies.claims.evidence import Evidence
from offprincipal.studies.claims.rules import Judgement


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the function that judges it: as published, and controlled.

    Args:
        tables: of the comparison, that it rests on; needs: the sources beyond the comparison, of `SOURCES`.
        against_sft: whether RLVR is held against SFT, one contrast a kind of SFT.
        anatomy: the mask whose ladder of nulls stands beside the verdicts; `pairs` for that of the Jaccard.
    """

    id: str
    title: str
    statement: str
    control: str
    tables: tuple[str, ...]
    needs: tuple[str, ...]
    against_sft: bool
    anatomy: str | None
    judge: "Judge"


CLAIMS: dict[str, Claim] = {}

Judge = Callable[[Evidence], tuple[Judgement, Judgement]]


def claim(
    id: str,
    title: str,
    statement: str,
    control: str,
    tables: tuple[str, ...] = ("matrices",),
    needs: tuple[str, ...] = (),
    against_sft: bool = False,
    anatomy: str | None = None,
) -> Callable[[Judge], Judge]:
    """Enter a claim into `CLAIMS`."""

    def enter(judge: Judge) -> Judge:
        CLAIMS[id] = Claim(id, title, statement, control, tables, needs, against_sft, anatomy, judge)
        return judge

    return enter


def judge(id: str, evidence: Evidence) -> list[dict[str, Any]]:
    """One claim's entries in `study.json`: one, or one for each kind of SFT that RLVR is held against."""
    found = CLAIMS[id]
    return [_entry(found, one) for one in (evidence.contrasts() if found.against_sft else [evidence])]


def _entry(found: Claim, evidence: Evidence) -> dict[str, Any]:
    as_published, controlled = found.judge(evidence)
    runs = (*evidence.rl, *evidence.against)
    anatomy: dict[str, Any] = {}
    if found.anatomy == "pairs":
        anatomy = {" and ".join(pair): rungs for pair, rungs in evidence.pair_anatomies().items()}
    elif found.anatomy is not None:
        anatomy = evidence.anatomies(runs, found.anatomy)
    return {
        "id": found.id,
        "contrast": evidence.contrast or None,
        "title": found.title,
        "statement": found.statement,
        "as_published": as_published.as_dict(),
        "controlled": {"control": found.control} | controlled.as_dict(),
        "anatomy": anatomy,
        "evidence": [f"{evidence.folder}/{table}.parquet" for table in found.tables] + evidence.files(found.needs),
    }
