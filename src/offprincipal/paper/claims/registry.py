"""The claims by their ids, and one claim's entry in `study.json`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from offprincipal.paper.claims.evidence import Evidence
from offprincipal.paper.claims.rules import Judgement


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the function that judges it: as published, and controlled.

    Args:
        tables: of the comparison, that it rests on; needs: the sources beyond the comparison, of `SOURCES`.
        against_sft: whether RLVR is held against SFT, one contrast a kind of SFT.
        beyond: whether it speaks of what is not RLVR, one kind at a time.
        anatomy: the mask whose ladder of nulls stands beside the verdicts; `pairs` for that of the Jaccard.
    """

    id: str
    title: str
    statement: str
    control: str
    tables: tuple[str, ...]
    needs: tuple[str, ...]
    against_sft: bool
    beyond: bool
    anatomy: str | None
    judge: "Judge"

    def contrasts(self, evidence: Evidence) -> Iterator[Evidence]:
        """The evidence of each of its verdicts."""
        return evidence.contrasts(self.beyond) if self.against_sft else iter([evidence])


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
    beyond: bool = False,
    anatomy: str | None = None,
) -> Callable[[Judge], Judge]:
    """Enter a claim into `CLAIMS`."""

    def enter(judge: Judge) -> Judge:
        CLAIMS[id] = Claim(id, title, statement, control, tables, needs, against_sft, beyond, anatomy, judge)
        return judge

    return enter


def judge(id: str, evidence: Evidence) -> list[dict[str, Any]]:
    """One claim's entries in `study.json`: one, or one for each contrast."""
    found = CLAIMS[id]
    return [_entry(found, one) for one in found.contrasts(evidence)]


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
        "of": evidence.kind or None,
        "title": found.title,
        "statement": found.statement,
        "as_published": as_published.as_dict(),
        "controlled": {"control": found.control} | controlled.as_dict(),
        "anatomy": anatomy,
        "evidence": [f"{evidence.folder}/{table}.parquet" for table in found.tables] + evidence.files(found.needs),
    }
