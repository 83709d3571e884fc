"""C13: do preference learning and distillation leave the signature said to be RLVR's, by the rules of C1 and C3–C6."""

from dataclasses import replace

from offprincipal.paper.claims import c01_c06_signatures as signatures
from offprincipal.paper.claims.evidence import Evidence
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    ClaimPart,
    Judgement,
    controlled_with,
    published_with,
)

_PARTS = (
    ("it is sparser than SFT", signatures.sparsity),
    ("it shifts singular values less", signatures.spectrum),
    ("it turns principal subspaces less", signatures.rotation),
    ("it prefers small weights", signatures.low_magnitude),
)


@claim(
    "C13",
    "beyond RLVR",
    "Preference learning and distillation leave the same signature: off-principal, sparse, and true to the spectrum",
    "as of C1 and C3 to C6: rounding for locations, update norm for the rest",
    against_sft=True,
    beyond=True,
    anatomy="principal",
)
def beyond_rlvr(evidence: Evidence) -> tuple[Judgement, Judgement]:
    parts = [(words, rule(evidence)) for words, rule in _PARTS]
    published, controlled = signatures.off_principal(evidence)
    found = (
        published_with(published, [ClaimPart(words, judged[0]) for words, judged in parts]),
        controlled_with(controlled, [ClaimPart(words, judged[1]) for words, judged in parts]),
    )
    return _named(found[0], evidence), _named(found[1], evidence)


def _named(judgement: Judgement, evidence: Evidence) -> Judgement:
    """The rules of C1 and C3–C6 speak of RLVR: here they are about these runs."""
    return replace(
        judgement,
        measure=_of_these(judgement.measure),
        rule=_of_these(judgement.rule),
        sentence=f"Of {', '.join(evidence.rl)}: {_of_these(judgement.sentence)}",
    )


def _of_these(text: str) -> str:
    return text.replace("RLVR's", "their").replace("RLVR", "these runs")
