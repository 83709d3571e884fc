"""The house: arrows between files, and between rooms, point one way."""

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import offprincipal
from offprincipal.recipes import RECIPES

SRC = Path(offprincipal.__file__).parent
FILES = {".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__"): path
         for path in SRC.rglob("*.py")}  # fmt: skip


def arrows() -> Iterator[tuple[str, str]]:
    """Module -> module that it imports, at its top, in a function, or for its types alone."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offprincipal"):
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    yield name, module if module in FILES else str(node.module)


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("place", [str, room])
def test_no_circle(place: Callable[[str], str]) -> None:
    graph = defaultdict(set)
    for importer, imported in arrows():
        top = "offprincipal"  # names what is public, and has the version
        if place(importer) != place(imported) and top not in (importer, imported):
            graph[place(importer)].add(place(imported))
    assert len(graph) > 20
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_geometry_imports_nothing_of_ours_but_errors() -> None:
    imported = {room(b) for a, b in arrows() if room(a) == "offprincipal.geometry"} - {"offprincipal.geometry"}
    assert imported <= {"offprincipal.errors", "offprincipal.defaults"}


@pytest.mark.parametrize("recipe", ["dr_grpo", "rloo", "dpo", "kto", "distill"])
def test_a_recipe_is_named_in_its_record_and_its_code_alone(recipe: str) -> None:
    """What is its own stands in the record; other files ask that."""
    named = {name for name, path in FILES.items() if re.search(rf"\b{recipe}\b", path.read_text("utf-8"))}
    module = RECIPES[recipe].build.partition(".")[0]  # type: ignore[index]
    assert named == {"offprincipal.recipes", f"offprincipal.training.recipes.{module}"}
