"""The terms of the page, each defined once; its words link to them.

The same definitions as in the documentation's glossary, for a page that is read without it.
"""

from markupsafe import Markup, escape

TERMS = {
    "bit-identical entries": "Entries whose bfloat16 value is the same before and after training.",
    "relative update norm": "‖ΔW‖ divided by ‖W‖, over the linear matrices: how long the update is beside the weights.",
    "null": "The value that a figure would take under a simpler explanation. The page shows it beside the figure.",
    "mask": "A set of a matrix's entries, chosen from the base's weights alone. Its density is the share of all "
    "entries that it holds; its overlap is the share of the changed entries that lie in it.",
    "principal subspace": "Spanned by the leading singular vectors of a matrix, an eighth of min(rows, columns) by "
    "default; there is a left and a right one.",
    "principal weights": "The largest entries of a matrix's projection on its principal subspaces, half of them by "
    "default.",
    "low-magnitude weights": "The smallest entries of a matrix, half of them by default.",
    "safe weights": "Weights that are low-magnitude, or not principal.",
    "masters": "The float32 weights that a trainer keeps in addition to the stored ones. With them, the steps that "
    "rounding hid are known.",
    "spectral shift": "The change of the leading singular values, relative to their norm.",
    "principal angle": "An angle between the principal subspaces of the base and of the tuned model.",
    "principal energy": "The share of the update's squared norm that lies inside the principal subspaces.",
    "Jaccard index": "Of two runs: the entries that both changed, divided by the entries that either changed.",
    "z": "The distance of the measured value from the margin null, in standard errors.",
    "KL to base": "The mean KL divergence per token of the trained policy from the base's, on held-out prompts.",
}


def anchor(term: str) -> str:
    """The address of a term on the page.

    >>> anchor("principal weights")
    'term-principal-weights'
    """
    return "term-" + term.lower().replace(" ", "-")


def linked(term: str, words: str | None = None) -> Markup:
    """A term, or words that stand for it, as a link to its definition.

    >>> linked("masters", "float32 masters")
    Markup('<a class="term" href="#term-masters">float32 masters</a>')
    """
    if term not in TERMS:
        raise KeyError(term)
    return Markup('<a class="term" href="#{}">{}</a>').format(anchor(term), words or term)


def defined(sentence: str, density: str) -> Markup:
    """A sentence whose first principal weights are linked to their definition, which stands behind them in a clause.

    Args:
        density: the share of the entries that are principal, as the page writes it.

    >>> print(defined("principal weights hold <half>", "50 %"))
    <a class="term" href="#term-principal-weights">principal weights</a> (of each matrix the 50 % of the entries that \
are largest in its projection on its leading singular vectors) hold &lt;half&gt;
    """
    before, term, after = sentence.partition("principal weights")
    if not term:
        return escape(sentence)
    largest = "of the entries that are largest in its projection on its leading singular vectors"
    clause = f" (of each matrix the {density} {largest})"
    return escape(before) + linked(term) + clause + after
