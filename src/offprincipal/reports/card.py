"""A model card's section about what training did to the weights, for the README of a model on the Hugging Face Hub.

    CARD/README.md             the section, with metadata; inserted into an existing card, or in a new one
    CARD/offprincipal.svg      its figure: the anatomy of each run
    CARD/offprincipal.jsonl    one line per pair of base and run, in a fixed form, so that many can be collected

Names are untrusted: they are escaped in Markdown and in the figure. Paths of this machine are left out.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from offprincipal.errors import FileError
from offprincipal.files import require_folder, write_atomically
from offprincipal.plain_text import plain
from offprincipal.reports.figures import ANATOMY_PARTS, anatomy
from offprincipal.reports.nulls import caption
from offprincipal.reports.places import reproducing, without_paths
from offprincipal.reports.report import damage_reported
from offprincipal.reports.terminal import LADDER, LADDER_COLUMNS, anatomy_rows, figure_rows
from offprincipal.reports.words import decisions, warnings_of

README, FIGURE, PAIRS = "README.md", "offprincipal.svg", "offprincipal.jsonl"
PAIR_SCHEMA = 1
_BEGIN, _END = "<!-- offprincipal: begin -->", "<!-- offprincipal: end -->"
_LONGEST = 24  # characters of a name in the figure
_MARKED = re.compile(r"([\\`*_{}\[\]<>|~$&#])")
_TAG = "offprincipal"
_METADATA = re.compile(r"\ufeff?---[ \t]*\r?\n(|.*?\n)---[ \t]*(?:\r?\n|$)", re.DOTALL)
_LISTED_TAGS = re.compile(r"^tags:[ \t]*(?:#.*)?\r?\n((?:[ \t]*-[ \t].*\n)+)", re.MULTILINE)


def write_card(
    summary: Mapping[str, Any], out: Path, base_model: str | None = None, existing: str | None = None
) -> Path:
    """Write the section, its figure and its pairs into a folder.

    Args:
        summary: the content of `summary.json` of a comparison.
        out: the folder; created if absent. The rest of a README.md in it is kept.
        base_model: the base's id on the Hub; it replaces the name of the base, and is added to metadata without
            `base_model`.
        existing: the model card into which the section is inserted, "" for none; None: the one in the folder.

    Returns:
        The path of the README.

    Raises:
        FileError: the summary is damaged, or a file cannot be written.
    """
    require_folder(out)
    readme = out / README
    if existing is None:
        existing = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    with damage_reported(out):
        shared = without_paths(dict(summary)) | ({"base": base_model} if base_model else {})
        figure = anatomy_svg(shared)
        texts = {
            README: with_section(existing, section(shared, bool(figure)), base_model),
            FIGURE: figure,
            PAIRS: "".join(json.dumps(row, allow_nan=False, sort_keys=True) + "\n" for row in pair_rows(shared)),
        }
    for name, text in texts.items():
        if text:
            _write(out / name, text)
    return readme


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text, "utf-8", errors="replace"))


def push_card(summary: Mapping[str, Any], repo: str, out: Path, base_model: str | None = None) -> str:
    """Insert the section into a model's card on the Hub, as a pull request.

    Args:
        summary: the content of `summary.json` of a comparison.
        repo: the model, `org/name`. huggingface_hub must have a token that may open pull requests.
        out: the folder into which the files are written first.
        base_model: as in `write_card`.

    Returns:
        The URL of the pull request.

    Raises:
        FileError: the Hub refuses the pull request, or a file cannot be written.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        write_card(summary, out, base_model, _card_of(repo))
        files = [name for name in (README, FIGURE, PAIRS) if (out / name).is_file()]
        commit = HfApi().create_commit(
            repo,
            [CommitOperationAdd(name, str(out / name)) for name in files],
            commit_message="Describe what training did to the weights",
            commit_description="Measured with offprincipal, each figure with the null that would explain it away.",
            create_pr=True,
        )
    except FileError:
        raise
    except Exception as error:  # errors of the Hub or of the connection
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"cannot open a pull request for {repo}: {reason}. The section is in {out}; check that the model exists, "
            "and that `hf auth login` or HF_TOKEN has a token with write access to discussions"
        ) from error
    return str(commit.pr_url)


def _card_of(repo: str) -> str:
    """The card of a model on the Hub; "" if the Hub reports that there is none. Other errors are raised."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, README)).read_text("utf-8", errors="replace")
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return ""


def section(summary: Mapping[str, Any], with_figure: bool) -> str:
    """The section in Markdown: figures, ladder of nulls, a sentence per run, notes, and the command to reproduce it.

    Args:
        summary: as from `without_paths`.
        with_figure: whether to link the figure.
    """
    parts = [
        "## What training did to the weights",
        f"Measured from `{_code(summary['base'])}` with offprincipal {summary['versions']['offprincipal']}; "
        f"{caption(summary)}.",
        _table(["", *summary["runs"]], figure_rows(summary)),
    ]
    if rungs := anatomy_rows(summary):
        parts.append(f"Of the changed entries, % in the mask: {LADDER}.")
        parts.append(_table(LADDER_COLUMNS, rungs))
    if with_figure:
        parts.append(f"![Where the change fell, and what explains it: points beyond chance]({FIGURE})")
    parts += [_text(sentence) for sentence in decisions(summary)]
    parts += [_text(f"Note: {warning}.") for warning in warnings_of(summary)]
    parts.append(f"```sh\n{plain(reproducing(summary)).replace('`', '')}\n```")
    return "\n\n".join([_BEGIN, *parts, _END]) + "\n"


def with_section(card: str, text: str, base_model: str | None = None) -> str:
    """A model card with the section: in place of an earlier one, otherwise at the end.

    The metadata get the tag `offprincipal`. Everything else is unchanged.

    Args:
        card: the card with its metadata; empty for none.
        text: as from `section`.
        base_model: added to the metadata if they have no `base_model`.
    """
    block = _METADATA.match(card)
    metadata = _mapping(block[1]) if block else None
    front, body = (block[1], card[block.end() :]) if block and metadata is not None else ("", card)
    begin, end = body.find(_BEGIN), body.find(_END)
    if 0 <= begin < end:
        body = body[:begin] + text.rstrip("\n") + body[end + len(_END) :]
    else:
        body = f"{body.rstrip()}\n\n{text}" if body.strip() else f"\n{text}"
    front = _tagged("" if front.strip() == "{}" else front, metadata or {})
    if base_model and not (metadata or {}).get("base_model"):
        front = _with_lines(front, {"base_model": base_model}, "base_model")
    gap = "" if metadata is not None or body.startswith("\n") else "\n"
    return f"---\n{front}---\n{gap}{body}"


def _mapping(text: str) -> dict[str, Any] | None:
    """Metadata as a dictionary; None if the text is not metadata, such as text between two horizontal rules."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return {} if content is None else content if isinstance(content, dict) else None


def _tagged(front: str, metadata: Mapping[str, Any]) -> str:
    """Metadata with our tag and all other lines unchanged; unchanged if the tags are in an unusual form."""
    tags = metadata.get("tags")
    own = [tags] if isinstance(tags, str) else list(tags) if isinstance(tags, list) else []
    if _TAG in own:
        return front
    wanted = {**metadata, "tags": [*own, _TAG]}
    listed = _LISTED_TAGS.search(front)
    candidates = [_with_lines(front, {"tags": wanted["tags"]}, "tags")]
    if listed:
        indent = re.match(r"[ \t]*", listed[1])
        candidates.insert(0, f"{front[: listed.end()]}{indent[0] if indent else ''}- {_TAG}\n{front[listed.end() :]}")
    return next((text for text in candidates if _mapping(text) == wanted), front)


def _with_lines(front: str, values: Mapping[str, Any], key: str) -> str:
    """Metadata in which the line of a key is replaced, or added at the end."""
    lines = yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False)
    changed, count = re.subn(rf"^{key}:.*\n", lambda _: lines, front, count=1, flags=re.MULTILINE)
    return changed if count else front + lines


def pair_rows(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per run: base, tuned model, versions, arguments, and every pooled figure.

    Fields: `schema`, `base` and `tuned` (folders, or ids with `@` and a revision if one was given), `run`, `arguments`,
    `versions`, and `metrics`: name -> `value`, `low`, `high`, as docs/metrics.md defines them.
    """
    for name, run in summary["runs"].items():
        yield {
            "schema": PAIR_SCHEMA,
            "base": summary["base"],
            "tuned": run["source"],
            "run": name,
            "arguments": summary["arguments"],
            "versions": summary["versions"],
            "metrics": run["metrics"],
        }


def anatomy_svg(summary: Mapping[str, Any]) -> str:
    """The anatomy of each run as bars, as in the report; an empty string if location was not measured."""
    masks = anatomy(summary)
    if not masks:
        return ""
    runs, panel, left, bar, top = list(summary["runs"]), 300, 170, 26, 66
    width, height = left + len(masks) * (panel + 60), top + bar * len(runs) + 34
    reach = max(1.0, *(_reach(run) for mask in masks for run in mask["runs"]))
    shapes = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for place, (part, colour) in enumerate(ANATOMY_PARTS):
        x = 12 + 132 * place
        shapes += [f'<rect x="{x}" y="12" width="12" height="12" rx="3" fill="{colour}"/>', _label(x + 18, 22, part)]
    for row, name in enumerate(runs):
        shown = plain(name) if len(name) <= _LONGEST else plain(f"{name[:14]}…{name[-9:]}")
        shapes.append(_label(left - 10, top + bar * row + 17, shown, "end"))
    for place, mask in enumerate(masks):
        middle, scale = left + place * (panel + 60) + panel / 2, panel / 2 / (1.05 * reach)
        shapes.append(_label(middle, top - 14, mask["title"], "middle"))
        shapes.append(f'<path d="M{middle} {top - 4}V{height - 28}" stroke="#c5ccd6"/>')
        for at in (-reach, 0, reach):
            shapes.append(_label(middle + scale * at, height - 10, f"{at:+.1f}" if at else "chance", "middle"))
        for row, run in enumerate(mask["runs"]):
            shapes += _bar(run, middle, scale, top + bar * row + 4)
    font = "font-family='system-ui, sans-serif' font-size='12' fill='#1f2733'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {font}>"
        f"<title>Points beyond chance, and what explains them</title>{''.join(shapes)}</svg>\n"
    )


def _reach(run: Mapping[str, Any]) -> float:
    known: list[float] = [part for part in run["parts"] if part is not None]
    return max(sum(p for p in known if p > 0), -sum(p for p in known if p < 0))


def _bar(run: Mapping[str, Any], middle: float, scale: float, y: float) -> Iterator[str]:
    """The bar of a run: positive parts to the right of chance, negative ones to the left, and a line at their sum."""
    ends = {True: middle, False: middle}
    for part, (_, colour) in zip(run["parts"], ANATOMY_PARTS, strict=True):
        if part:
            length, right = abs(part) * scale, part > 0
            x = ends[right] if right else ends[right] - length
            ends[right] = x + length if right else x
            yield f'<rect x="{x:.2f}" y="{y}" width="{length:.2f}" height="16" fill="{colour}"/>'
    if run["measured"] is not None:
        yield f'<rect x="{middle + scale * run["measured"] - 1:.2f}" y="{y - 2}" width="2" height="20"/>'


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---" if place == 0 else "---:" for place in range(len(head))], *rows]
    shown = ([cell if row == 1 else _text(cell) for cell in line] for row, line in enumerate(lines))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def _text(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    return _MARKED.sub(r"\\\1", plain(text).replace("\n", " "))


def _code(text: str) -> str:
    return plain(text).replace("`", "'").replace("\n", " ")
