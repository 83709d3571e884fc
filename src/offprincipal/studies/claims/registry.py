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
    """

    id: str
    title: str
    statement: str
    control: str
    tables: tuple[str, ...]
    needs: tuple[str, ...]
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
) -> Callable[[Judge], Judge]:
    """Enter a claim into `CLAIMS`."""

    def enter(judge: Judge) -> Judge:
        CLAIMS[id] = Claim(id, title, statement, control, tables, needs, judge)
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
        "evidence": [f"{evidence.folder}/{table}.parquet" for table in found.tables] + evidence.files(found.needs),
    }
