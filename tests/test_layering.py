"""Who may import whom. Read with `ast`, so nothing is imported and imports inside functions count as well."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "ms_ckpt_ext"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# Room -> what it may import besides itself and _version: rooms, or single modules of them.
# cli -> api -> {bridge, engine} -> {formats, storage, transport} -> core -> errors
MAY_IMPORT = {
    "cli": ["api", "bridge", "engine", "formats", "storage", "transport", "core", "errors", "log"],
    "api": ["bridge", "engine", "formats", "storage", "transport", "core", "errors", "log"],
    "bridge": ["engine", "formats", "storage", "transport", "core", "errors", "log"],
    "engine": ["formats", "storage", "transport", "rules", "core", "errors", "log"],
    "formats": ["storage.reader", "storage.linux", "storage.threads", "core", "errors", "log"],
    "storage": ["core", "errors", "log"],
    "transport": ["core", "errors"],
    "core": ["errors"],
    "errors": [],
    "log": ["errors"],
    "plugins": ["api", "bridge"],
    "rules": ["core", "errors"],
    "__main__": ["cli"],
    "_version": [],
    "": [],  # ms_ckpt_ext/__init__.py finds its names when they are asked for
}
MINDSPORE_ROOMS = ["bridge", "transport.mccl", "transport.hccl", "transport.ascend", "plugins.mindformers_plugin"]
# A machine without MindSpore can import these, and so merge. What they need of mindspore they import in functions.
WITHOUT_MINDSPORE = ["", "api", "cli"]


class Import(NamedTuple):
    """One imported name: `target` is dotted and absolute; `late` inside a function or for type checkers only."""

    line: int
    target: str
    late: bool


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module (dotted name inside the package, "" for the package itself)."""
    home = f"{PACKAGE}.{module}".rstrip(".").split(".")
    yield from _walk(ast.parse(source), home if is_package else home[:-1], late=False)


def _walk(node: ast.AST, home: list[str], late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = True
        for target in _targets(child, home):
            yield Import(child.lineno, target, late)
        yield from _walk(child, home, inner)


def _targets(node: ast.AST, home: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = home[: len(home) + 1 - node.level] if node.level else []
        return [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def violations(sources: Mapping[str, str]) -> list[str]:
    """`sources`: path inside the package -> text. Messages name file, line and rule."""
    modules = {_module(path): path for path in sources}
    found = {m: list(imports(sources[p], m, p.endswith("__init__.py"))) for m, p in modules.items()}
    problems = [
        f"{PACKAGE}/{path}:{item.line}: {problem}"
        for module, path in modules.items()
        for item in found[module]
        for problem in _problems(module, item.target)
    ]
    starts = [module for module in modules if _within(module, WITHOUT_MINDSPORE) or module == ""]
    for module, trail in _loaded_with(starts, found).items():
        problems += [
            f"{PACKAGE}/{modules[module]}:{item.line}: mindspore must not be imported at module level here, because "
            f"`import {' -> '.join(trail)}` works without it: import it inside a function"
            for item in found[module]
            if not item.late and item.target.split(".")[0] == "mindspore"
        ]
    return problems


def _problems(module: str, target: str) -> Iterator[str]:
    top, _, inside = target.partition(".")
    if top == "mindspore" and not _within(module, MINDSPORE_ROOMS):
        yield f"only {', '.join(MINDSPORE_ROOMS)} may import mindspore ({target})"
    if top != PACKAGE:
        return
    room = module.split(".")[0]
    if room not in MAY_IMPORT:
        yield f"room {room!r} is not in the table of this test: decide what it may import"
    elif not _within(inside, [room or "_version", "_version", *MAY_IMPORT[room]]):
        allowed = ", ".join(MAY_IMPORT[room]) or "no other room"
        yield f"{room or PACKAGE} may not import {inside or PACKAGE}; it may import: {allowed}"


def _loaded_with(starts: list[str], found: Mapping[str, list[Import]]) -> dict[str, list[str]]:
    """Every module that importing `starts` loads -> the chain of imports that leads there."""
    trails = {module: [f"{PACKAGE}.{module}".rstrip(".")] for module in starts}
    queue = list(trails)
    for module in queue:
        for item in found[module]:
            inside = item.target.partition(f"{PACKAGE}.")[2].split(".") if item.target.startswith(PACKAGE) else []
            for loaded in (".".join(inside[:depth]) for depth in range(1, len(inside) + 1)):
                if not item.late and loaded in found and loaded not in trails:
                    trails[loaded] = [*trails[module], f"{PACKAGE}.{loaded}"]
                    queue.append(loaded)
    return trails


def _within(module: str, rooms: list[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms if room)


def _module(path: str) -> str:
    return path[: -len(".py")].replace("/", ".").removesuffix("__init__").rstrip(".")


def test_the_package_keeps_to_the_table() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    assert len(sources) > 10, f"found only {sorted(sources)} under {ROOT}"
    assert not (problems := violations(sources)), "\n" + "\n".join(problems)


# (path, text, the part of the message that tells the rule)
FORBIDDEN = [
    (
        "core/planning/pieces.py",
        "import os\nfrom ms_ckpt_ext.storage import reader",
        "pieces.py:2: core may not import storage.re",
    ),
    ("core/planning/pieces.py", "from ...engine.load import session", "core may not import engine.load.session"),
    ("core/planning/pieces.py", "from ... import formats", "core may not import formats"),
    ("core/__init__.py", "from ..api import load", "core may not import api.load"),
    (
        "core/planning/pieces.py",
        "def f():\n    import ms_ckpt_ext.engine.load.run_exchange",
        "pieces.py:2: core may not import engine.load.run_exchange",
    ),
    (
        "core/planning/pieces.py",
        "import importlib\nimportlib.import_module('ms_ckpt_ext.api')",
        "core may not import api",
    ),
    ("core/planning/pieces.py", "from ms_ckpt_ext import log", "core may not import log"),
    ("core/planning/pieces.py", "import ms_ckpt_ext", "core may not import ms_ckpt_ext; it may import: errors"),
    (
        "core/planning/pieces.py",
        "import mindspore",
        "pieces.py:1: only bridge, transport.mccl, transport.hccl, transport.ascend, plugins.mindformers_plugin may",
    ),
    ("core/planning/pieces.py", "if TYPE_CHECKING:\n    from mindspore import nn", "pieces.py:2: only bridge"),
    ("errors.py", "from ms_ckpt_ext.core import region", "it may import: no other room"),
    ("formats/ckpt.py", "from ms_ckpt_ext.storage.sink import Sink", "formats may not import storage.sink.Sink"),
    ("formats/ckpt.py", "from ms_ckpt_ext.storage import readers", "formats may not import storage.readers"),
    ("transport/local.py", "from ms_ckpt_ext.storage import reader", "transport may not import storage"),
    ("transport/local.py", "def f():\n    import mindspore.mint", "may import mindspore (mindspore.mint)"),
    ("transport/mccl.py", "from ms_ckpt_ext.bridge import world", "transport may not import bridge"),
    ("engine/load/run_exchange.py", "from ms_ckpt_ext.bridge import world", "engine may not import bridge"),
    ("bridge/world.py", "from ms_ckpt_ext.api.mindspore.load import load", "bridge may not import api"),
    ("api/mindspore/load.py", "from ms_ckpt_ext.cli import main", "api may not import cli"),
    ("__init__.py", "from ms_ckpt_ext.api.mindspore.load import load", "ms_ckpt_ext may not import api.mindspore.load"),
    ("extra/__init__.py", "from ms_ckpt_ext import errors", "room 'extra' is not in the table"),
]
ALLOWED = [
    (
        "core/planning/pieces.py",
        "from .schedule import schedule\nfrom ...errors import UsageError\nimport numpy, mindspore_like",
    ),
    ("core/__init__.py", "from .geometry.region import Region\nfrom ms_ckpt_ext._version import __version__"),
    ("formats/ckpt.py", "from ms_ckpt_ext.storage import reader\nfrom ms_ckpt_ext.storage.reader import ByteReader"),
    ("bridge/world.py", "import mindspore\nfrom ms_ckpt_ext.engine import load"),
    ("transport/hccl.py", "from mindspore import mint"),
    ("api/mindspore/load.py", "from ms_ckpt_ext import log\ndef f():\n    from ms_ckpt_ext.bridge import world"),
    ("cli/main.py", "from ms_ckpt_ext.api import load"),
    ("__init__.py", "from ms_ckpt_ext._version import __version__"),
]


@pytest.mark.parametrize(("path", "text", "message"), FORBIDDEN)
def test_what_is_forbidden_is_found(path: str, text: str, message: str) -> None:
    found = violations({path: text})
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_what_is_allowed_is_not(path: str, text: str) -> None:
    assert violations({path: text}) == []


WORLD = {"bridge/world.py": "import os\nimport mindspore"}
INDIRECT = {
    **WORLD,
    "bridge/__init__.py": "from . import world",
    "api/mindspore/load.py": "import ms_ckpt_ext.bridge.network",
}


@pytest.mark.parametrize(
    "sources",
    [
        {**WORLD, "api/mindspore/load.py": "from ms_ckpt_ext.bridge.world import rank"},
        {**WORLD, "api/mindspore/load.py": "from ms_ckpt_ext.bridge import world"},
        {
            **WORLD,
            "api/mindspore/load.py": "try:\n    from ...bridge import world\nexcept ImportError:\n    world = None",
        },
        INDIRECT,
    ],
)
def test_mindspore_at_module_level_is_found_through_others(sources: dict[str, str]) -> None:
    (found,) = violations(sources)
    assert found.startswith("ms_ckpt_ext/bridge/world.py:2: mindspore must not be imported at module level")
    assert "`import ms_ckpt_ext.api.mindspore.load -> ms_ckpt_ext.bridge" in found


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    from ms_ckpt_ext.bridge.world import rank",
        "class A:\n    async def f(self):\n        from ms_ckpt_ext.bridge import world",
        "if TYPE_CHECKING:\n    from ms_ckpt_ext.bridge import world",
    ],
)
def test_a_late_import_does_not_load(text: str) -> None:
    assert violations({**WORLD, "api/mindspore/load.py": text}) == []


ROOMS = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("**/__init__.py") if path.parent != ROOT)


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_names_what_is_behind_it(room: str) -> None:
    """A module that the docstring of its room does not name is not found by who comes after."""
    door = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text("utf-8"))) or ""
    inside = {path.stem if path.suffix else f"{path.name}/" for path in (ROOT / room).iterdir() if is_code(path)}
    assert sorted(name for name in inside if not re.search(rf"(?<!\w){name}(?!\w)", door)) == []


def is_code(path: Path) -> bool:
    if path.is_dir():
        return (path / "__init__.py").exists()
    return path.suffix == ".py" and not path.stem.startswith("__")


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_a_room_is_small(room: str) -> None:
    assert len([path for path in (ROOT / room).iterdir() if is_code(path)]) <= 16


def test_what_tests_and_scripts_import_is_there() -> None:
    """Of the package: what was renamed or moved is missed here, not in the middle of a worker that a test starts."""
    home = ROOT.parent
    paths = {_module(path.relative_to(ROOT).as_posix()): path for path in ROOT.rglob("*.py")}
    known: dict[str, set[str]] = {}
    missing = []
    for path in sorted(path for folder in ("tests", "scripts") for path in (home / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(f"{PACKAGE}."):
                continue
            module = (node.module or "").partition(".")[2]
            if module in paths and module not in known:
                known[module] = set(_bound(ast.parse(paths[module].read_text(encoding="utf-8")).body))
            inside = known.get(module, set())
            missing += [
                f"{path.relative_to(home)}:{node.lineno}: {node.module}.{alias.name}"
                for alias in node.names
                if alias.name not in inside and f"{module}.{alias.name}" not in paths
            ]
    assert missing == []


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements of a module bind."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Try, ast.If)):
            yield from _bound([*node.body, *node.orelse])
        else:
            yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))


def test_text_is_utf8() -> None:
    """Python has that codec from its start. It looks for others in its own files, which a job that has become another
    user may not be allowed to read."""
    others = re.compile(r"""encoding=["'](?!utf-8["'])""")
    assert [path.name for path in sorted(ROOT.rglob("*.py")) if others.search(path.read_text(encoding="utf-8"))] == []


def test_named_tuples_have_one_base() -> None:
    """A generic one is an error in Python 3.9 and 3.10, when its module is imported; no checker tells."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases) and len(node.bases) > 1
    ]
    assert wrong == []
