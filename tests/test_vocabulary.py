"""A public name means one thing: it is defined in one module only. Read with `ast`, so nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "ms_ckpt_ext"

# Commands define `register` and `run`, each its own: `cli` is entered through its table of commands.
OWN_WORDS = "cli/"
# Public name -> why several modules define it.
SHARED = {
    "read_index": "the reader of a format, and the one in front of them that chooses by suffix",
    "stored_checksum": "as read_index",
    "layout": "the writer of a format: where every byte of a file goes",
    "load_checkpoint": "MindSpore's function, and MindFormers' of the same name",
    "install": "replaces MindSpore's functions, MindFormers' functions, and those of older MindFormers",
    "uninstall": "undoes install",
}


def definitions(source: str) -> Iterator[str]:
    """Public names that a module defines at its top level: functions, classes and variables."""
    for node in ast.parse(source).body:
        for name in _names(node):
            if not name.startswith("_"):
                yield name


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


def defined_twice(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Name -> the modules (paths inside the package) that define it, where they are several."""
    homes: dict[str, list[str]] = {}
    for path, source in sorted(sources.items()):
        if not path.startswith(OWN_WORDS):
            for name in dict.fromkeys(definitions(source)):
                homes.setdefault(name, []).append(path)
    return {name: paths for name, paths in homes.items() if len(paths) > 1}


def test_a_public_name_is_defined_in_one_module() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    assert len(sources) > 10, f"found only {sorted(sources)} under {ROOT}"
    found = defined_twice(sources)
    many = [f"{name}: {', '.join(paths)}" for name, paths in found.items() if name not in SHARED]
    assert not many, "make it private, import it, or name it for what it is:\n" + "\n".join(many)
    assert found.keys() == SHARED.keys(), "an exception that is none any more"


@pytest.mark.parametrize(
    ("first", "second", "twice"),
    [
        ("class Tally: ...", "class Tally: ...", ["Tally"]),
        ("def check() -> None: ...", "async def check() -> None: ...", ["check"]),
        ("PIECE = 1", "PIECE: int = 2", ["PIECE"]),
        ("A, B = 1, 2", "B = 3", ["B"]),
        ("class Tally: ...", "from a import Tally", []),
        ("_T = 1", "_T = 2", []),
        ("def f():\n    x = 1", "def g():\n    x = 1", []),
        ("log = 1\nlog = 2", "", []),
    ],
)
def test_what_counts_as_defined_twice(first: str, second: str, twice: list[str]) -> None:
    assert defined_twice({"core/a.py": first, "core/b.py": second}) == {
        name: ["core/a.py", "core/b.py"] for name in twice
    }
    assert not defined_twice({"core/a.py": first, "cli/b.py": second})
