"""The documentation: the tour runs as it stands there, but for sizes; no link leads nowhere, and no page is lost."""

import importlib
import json
import re
import runpy
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from documented import blocks, commands, made_small
from safetensors.torch import load_file, save_file
from test_cli import call

import offprincipal

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
IN_MENUS = (ROOT / "mkdocs.yml").read_text()


def test_the_tour_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = {"embedded": str(tiny_model)}
    for arguments in commands(DOCS / "tour.md"):
        small = ["--model", str(tiny_model), "--set", "batch=8"] if arguments[0] == "train" else []
        given = [*made_small(arguments, base), *small]
        assert call(monkeypatch, *given) == 0, shlex.join(given)
    assert (tmp_path / "tour" / "comparison" / "report.html").is_file()
    capsys.readouterr()
    (snippet,) = blocks(DOCS / "tour.md", "python")
    ready = snippet.replace('"embedded"', repr(str(tiny_model))).replace(
        "tour/rl", "tour/sft"
    )  # a random model earns nothing by RL
    exec(compile(ready, "tour.md", "exec"), {})
    assert "rows, one per run and matrix" in capsys.readouterr().out


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (page.parent / path).read_text(), re.MULTILINE)
                assert anchor in {slug(heading) for heading in headings}, target


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def test_every_page_is_in_the_menu() -> None:
    named = set(re.findall(r"[\w/]+\.md", str(yaml.safe_load(IN_MENUS)["nav"])))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES}


def test_the_readme_snippet_runs(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (snippet,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model)
    tuned = shutil.copytree(tiny_model, tmp_path / "rl_checkpoint") / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(tuned).items()}, tuned, {"format": "pt"})
    exec(compile(snippet, "README.md", "exec"), {})


SNIPPETS = ["adapters", "interventions", "monitor", "theory", "trajectories", "trl"]


def test_every_page_with_python_is_run() -> None:
    others = {"tour"}  # above
    assert {page.stem for page in PAGES if blocks(page, "python")} == {*SNIPPETS, *others}


@pytest.mark.parametrize("page", SNIPPETS)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands there, on a tiny model in place of the embedded one, which has fewer layers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model)
    for step in (1, 2):
        folder = shutil.copytree(tiny_model, tmp_path / "runs" / "grpo" / f"checkpoint-{step}")
        weights = load_file(folder / "model.safetensors")
        moved = {name: tensor.float() * (1 + 1e-3 * step) for name, tensor in weights.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
    trained = "turned" if page == "interventions" else "runs/grpo/checkpoint-1"
    (tmp_path / "run").symlink_to(trained)
    text = "\n".join(blocks(DOCS / f"{page}.md", "python")).replace("[2, 3]", "[0, 1]")
    exec(compile(text.replace('"embedded"', repr(str(tiny_model))), f"{page}.md", "exec"), {})


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")  # as a reader finds it
    linked = re.findall(r"\]\((\w+\.md)\)", str(cells))
    assert linked and all((DOCS / page).is_file() for page in linked)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in code:
        exec(compile(cell, "tutorial.ipynb", "exec"), names)
    assert list(names["result"].runs) == ["rl", "sft"] and len(names["frame"]) == len(names["result"].matrices)


def test_every_section_that_explains_a_figure_has_a_picture_of_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn by the script, loading nothing, in light and dark, and said in words for those who cannot see it."""
    sections = re.split(r"^## ", (DOCS / "reading.md").read_text(), flags=re.MULTILINE)[1:]
    explaining = [section for section in sections if "**What" in section]
    assert len(explaining) == 7 and all("**Null" in section and "**Trap" in section for section in explaining)
    shown = [re.findall(r"!\[([^\]]+)\]\((reading_\w+)\.svg\)", section) for section in explaining]
    assert [len(found) for found in shown] == [1] * 7 and all(len(alt) > 80 for ((alt, _),) in shown)
    script = ["draw_reading.py", "--base", str(tiny_model), "--out", str(tmp_path), "--only", "unchanged", "verdicts"]
    monkeypatch.setattr("sys.argv", script)
    figures = runpy.run_path(str(ROOT / "scripts" / "draw_reading.py"), run_name="__main__")["FIGURES"]
    assert [name for ((_, name),) in shown] == [f"reading_{name}" for name in figures]
    for drawn in [*tmp_path.glob("*.svg"), *(DOCS / f"reading_{name}.svg" for name in figures)]:
        text = drawn.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg") and "prefers-color-scheme: dark" in text
        links = re.findall(r"(?:href|src)=\"([^#][^\"]*)|url\(([^#][^)]*)", text)
        assert "<script" not in text and "@import" not in text and links == []
    assert len(list(tmp_path.glob("*.svg"))) == 2


def test_the_glossary_has_the_terms_of_every_table() -> None:
    """Of comparisons and pages, of the ladder of nulls, of trajectories and of verdicts."""
    from offprincipal.reports import nulls, trajectory

    titles = [title for each in nulls.FIGURES for title in (each.title, each.page) if title]
    titles += [*nulls.RUNG_TITLES.values(), *nulls.PARTS, nulls.NOT_TOLD_APART[0], *trajectory.FIGURES.values()]
    titles += ["gone back", "blind", "verdict", "stripes", "token entropy", "greedy", "pass@k", "drift", "role", "z"]
    glossary = (DOCS / "glossary.md").read_text()
    terms = re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)[1:]
    assert terms == sorted(terms, key=str.lower)
    words = {"largest principal angle": "principal angle", "angle left": "angle", "angle right": "angle"}
    assert [title for title in titles if words.get(title, title).lower() not in glossary.lower()] == []
    assert "step length" not in glossary


PRIVATE = (
    r"\b(masters|principal weights|safe (?:mask|weights)|low-magnitude|blind (?:updates?|stud(?:y|ies))|anatomy|ladder|"
    r"(?:rounding|spacing|margin|scaled|isotropic|stored|shuffled) null|nulls)\b"
)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_a_page_leads_to_the_glossary_where_it_first_uses_a_term_of_ours(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`|^#.*?$|!\[[^\]]*\]", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    first = re.search(PRIVATE, text)
    if first and page.stem not in ("glossary", "index"):  # the start page's table has it
        assert "glossary.md)" in text[: text.index("\n", first.end())], first[0]


LIBRARY = re.findall(r"^### (\w+)\n\n(.+)\n\n::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE)


def test_the_library_page_has_the_public_names_and_what_the_pages_use() -> None:
    """One heading, one sentence and one entry for each; nothing of a module's inside."""
    paths = [path for _, _, path in LIBRARY]
    assert (DOCS / "api.md").read_text().count(":::") == len(paths) == len(set(paths))
    assert [path for name, _, path in LIBRARY if path.rpartition(".")[2] != name] == []
    documented = [resolved(path) for path in paths]
    assert {name for name in offprincipal.__all__ if getattr(offprincipal, name) not in documented} == set()
    assert {name for name in imported_by_pages() if resolved(name) not in documented} == set()


def resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def imported_by_pages() -> set[str]:
    """What the snippets import or call, by its name with its package's."""
    text = "\n".join(block for page in [*PAGES, ROOT / "README.md"] for block in blocks(page, "python"))
    imports = re.findall(r"^from (offprincipal[\w.]*) import (.+)$", text, re.MULTILINE)
    named = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    return named | set(re.findall(r"\boffprincipal\.\w+(?=\()", text))


def test_every_command_is_in_the_documentation() -> None:
    from offprincipal.cli import app

    shown = [command for command in app.registered_commands if command.callback and not command.hidden]
    names = {command.name or command.callback.__name__ for command in shown if command.callback}
    text = "".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    assert {name for name in names if not re.search(rf"offprincipal {name}\b", text)} == set()


def test_the_changelog_has_each_kind_of_change_once_and_its_new_names_are_there() -> None:
    unreleased = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    kinds = re.findall(r"^### (.+)$", unreleased, re.MULTILINE)
    assert kinds == ["Added", "Changed", "Renamed", "Removed", "Fixed", "Security"]
    table = unreleased.partition("*modules of `offprincipal`*")[2].partition("*files, words, fields*")[0]
    new = [
        name
        for row in re.findall(r"^\| .+ \| (.+) \|$", table, re.MULTILINE)
        for name in re.findall(r"`([\w.]+)`", row)
    ]
    modules = [name for name in new if name != "offprincipal.preflight" and not name.startswith("c0")]
    assert len(modules) > 20 and [name for name in modules if not find_spec(f"offprincipal.{name}")] == []
