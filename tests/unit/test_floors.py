"""The map of the house: which folder of opd/ may import which. Lazy and type-only imports count like any other.

Names in tables (families, stages, workers) are no imports: what is named there is loaded when it is asked for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CARRIED = {"requirements", "recipes", "deepspeed_configs"}  # links to what travels with the package
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in (ROOT / "opd").rglob("*.py")
}

# From the ground up. A file imports from its own folder and from lower floors, never from its own floor or above.
FLOORS = (
    ("settings", "types"),  # strict YAML, user errors; the records that travel from station to station
    ("storage", "endpoint"),  # files that outlive a process; an OpenAI-compatible endpoint
    ("scoring",),  # what an answer is worth
    ("config",),  # recipes
    ("objectives",),  # losses
    ("models",),  # speech LLM families, the module that is trained
    ("prompts", "inference", "plan", "report"),  # manifests to prompts; vLLM servers; memory and time; pages
    ("rollout", "teachers", "processes"),  # responses; their scores; what starts, watches and ends
    ("train", "study"),  # the loop; grids of runs
    ("doctor",),  # all that is checked before a run
    ("evaluate", "launch"),
    ("data",),
    ("cli",),
)


def names(tree: ast.AST) -> Iterator[str]:
    """Modules of opd that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "opd")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "opd":
                parts = [f"{node.module}.{a.name}" for a in node.names]
                yield from (p if p in FILES else node.module for p in parts)


EDGES = {module: set(names(ast.parse(path.read_text()))) - {module, "opd"} for module, path in FILES.items()}


def room(module: str) -> str:
    """The entry of opd/ that a module is in."""
    return module.split(".")[1]


def folder(module: str) -> str:
    """The folder that a module lies in. A package is its own, and so is a file that lies in opd/ itself."""
    return module if FILES[module].name == "__init__.py" or module.count(".") == 1 else module.rpartition(".")[0]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A way that ends where it began, if there is one."""
    done: set[str] = set()

    def walk(at: str, way: list[str]) -> list[str]:
        if at in way:
            return [*way[way.index(at) :], at]
        if at in done:
            return []
        for to in sorted(edges.get(at, ())):
            if found := walk(to, [*way, at]):
                return found
        done.add(at)
        return []

    return next((found for start in sorted(edges) if (found := walk(start, []))), [])


def between(of: dict[str, set[str]]) -> dict[str, set[str]]:
    """Edges between folders, from those between files."""
    edges: dict[str, set[str]] = {}
    for module, imported in of.items():
        edges.setdefault(folder(module), set()).update({folder(m) for m in imported} - {folder(module)})
    return edges


def test_every_entry_has_its_floor() -> None:
    entries = [p.name for p in (ROOT / "opd").iterdir() if p.name not in ("__pycache__", "__init__.py")]
    assert {e.removesuffix(".py") for e in entries} - CARRIED == {r for floor in FLOORS for r in floor}
    assert len(entries) <= 26


def test_imports_name_what_is_there() -> None:
    assert {m for imported in EDGES.values() for m in imported} <= FILES.keys()


def test_no_circle_between_files() -> None:
    assert circle(EDGES) == []


def test_no_circle_between_folders() -> None:
    assert circle(between(EDGES)) == []


def test_no_import_climbs() -> None:
    level = {r: i for i, floor in enumerate(FLOORS) for r in floor}
    climbing = [
        f"{module} imports {m}"
        for module, imported in EDGES.items()
        if module != "opd"
        for m in imported
        if room(m) != room(module) and level[room(m)] >= level[room(module)]
    ]
    assert not climbing


@pytest.mark.parametrize(
    ("edges", "found"),
    [({"a": {"b"}, "b": {"c"}, "c": set()}, []), ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"])],
)
def test_a_circle_is_found(edges: dict[str, set[str]], found: list[str]) -> None:
    assert circle(edges) == found


def test_lazy_and_type_only_imports_count() -> None:
    text = """
if TYPE_CHECKING:
    from opd.config.load import load_config
def f():
    from opd import settings
    import opd.types
"""
    assert list(names(ast.parse(text))) == ["opd.config.load", "opd.settings", "opd.types"]


def test_files_and_the_house_stay_small() -> None:
    tests = [p for folder in ("tests", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    lines = {p: len(p.read_text().splitlines()) for p in [*FILES.values(), *tests]}
    assert [str(p) for p, n in lines.items() if n > 400] == []
    assert sum(lines[p] for p in FILES.values()) <= 21_150


def test_no_function_takes_more_than_eight_arguments_by_position() -> None:
    found = [
        f"{module}: {node.name}"
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len([a for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]) > 8
    ]
    assert not found
