"""Tests replace names of the package only where it has no seam for them; read with `ast`, so nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

ROOT = Path(__file__).resolve().parent
PACKAGE = "ms_ckpt_ext"
MOST = 9
# Place and what is replaced there -> why the package should have no seam for it.
LEFT = {
    ("support/machine.py", "linux._libc"): "the C library, which fails as the tests need it on no machine",
    ("api/mindspore/test_subsets.py", "?module"): "which functions are called, in the midst of stock ones",
    ("engine/files/test_many_tensors.py", "safetensors.MAX_HEADER"): "a header of 100 MB has a million tensors",
    (
        "engine/unlisted/test_live_outside_files.py",
        "dealt.Together",
    ): "what it reads of files that the load reads as well",
    ("live/fault_worker.py", "together._load"): "a file that vanishes between two looks at it",
    ("bridge/mindformers/folder_worker.py", "ours.list_checkpoint"): "how often a folder is listed, by MindFormers too",
    ("live/link_worker.py", "ParameterSink.place"): "a link that is cut while bytes land in a Parameter",
    ("live/sink_worker.py", "memory.mark_loaded"): "a bit that flips on the device while others are still loaded",
    ("live/fault_worker.py", "Sink.place"): "a device that is lost while bytes land in a Parameter",
}
_REPLACING = ("setattr", "delattr", "patch", "object")


def replaced(source: str) -> Iterator[str]:
    """What a module of tests replaces: `name.attribute` of the package, `?name` of what cannot be told."""
    tree = ast.parse(source)
    homes = {bound: home for node in ast.walk(tree) for bound, home in _imported(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _by_call(node, homes)
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Attribute) and _home(target.value, homes, "").startswith(PACKAGE):
                    yield ast.unparse(target)


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(name, what it is) of everything that an import brings."""
    if isinstance(node, ast.Import):
        yield from (
            (a.asname or a.name.split(".")[0], a.name if a.asname else a.name.split(".")[0]) for a in node.names
        )
    elif isinstance(node, ast.ImportFrom):
        yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def _by_call(node: ast.Call, homes: dict[str, str]) -> Iterator[str]:
    """`patch.setattr(owner, name, …)`, `setattr(owner, …)`, `mock.patch.object(owner, …)`, `mock.patch("path", …)`."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name not in _REPLACING or not node.args:
        return
    owner, named = node.args[0], node.args[1] if len(node.args) > 1 else None
    if isinstance(owner, ast.Constant) and isinstance(owner.value, str):
        if owner.value.startswith(PACKAGE):
            yield owner.value
    elif isinstance(owner, ast.JoinedStr):
        yield ast.unparse(owner)
    else:
        home = _home(owner, homes, "?")
        if home.startswith(PACKAGE):
            yield f"{ast.unparse(owner)}.{_text(named)}"
        elif home == "?" and isinstance(node.func, ast.Attribute):
            yield f"?{ast.unparse(owner)}"


def _home(owner: ast.expr, homes: dict[str, str], otherwise: str) -> str:
    """What an expression stands for, by the imports; a module of Python is itself, wherever it is reached."""
    attributes: list[str] = []
    while isinstance(owner, ast.Attribute):
        attributes.insert(0, owner.attr)
        owner = owner.value
    if not isinstance(owner, ast.Name) or owner.id not in homes:
        return otherwise
    first = next((name for name in attributes if name in sys.stdlib_module_names), None)
    return first or ".".join([homes[owner.id], *attributes])


def _text(named: Optional[ast.expr]) -> str:
    return str(named.value) if isinstance(named, ast.Constant) else ast.unparse(named) if named else ""


def test_few_names_of_the_package_are_replaced() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in ROOT.rglob("*.py")
        for name in replaced(path.read_text(encoding="utf-8"))
    }
    many = [f"{path}: {name}" for path, name in sorted(found) if (path, name) not in LEFT]
    assert not many, "use a seam, a file, or a function of the operating system (tests/support):\n" + "\n".join(many)
    assert found == LEFT.keys(), "an exception that is none any more"
    assert len(found) <= MOST


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("patch.setattr(linux, '_libc', 1)", ["linux._libc"]),
        ("patch.setattr(Sink, 'place', 1)", ["Sink.place"]),
        ("patch.setattr(linux.os, 'open', 1)", []),
        ("patch.setattr(os, 'open', 1)", []),
        ("patch.setattr('ms_ckpt_ext.log.info', 1)", ["ms_ckpt_ext.log.info"]),
        ("patch.setattr('os.open', 1)", []),
        ("with mock.patch.object(Sink, 'place', 1): ...", ["Sink.place"]),
        ("setattr(ms_ckpt_ext, 'load', 1)", ["ms_ckpt_ext.load"]),
        ("Sink.place = 1", ["Sink.place"]),
        ("for module in (linux,):\n    patch.setattr(module, 'x', 1)", ["?module"]),
        ("mine = Sink()\nmine.place = 1", []),
    ],
)
def test_what_counts_as_replaced(code: str, names: list[str]) -> None:
    imports = "import os\nimport ms_ckpt_ext\nfrom ms_ckpt_ext.storage import linux\nfrom ms_ckpt_ext.a import Sink\n"
    assert list(replaced(imports + code)) == names
