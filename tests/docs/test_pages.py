"""What the pages say can be run is run; what they say can be called exists; the Chinese pages say the same.

Every ```bash block of the pages below runs in the project's folder, with a TMPDIR of its own. Of ```python blocks every
call of this package is bound to the signature of what it calls.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ms_ckpt_ext

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["docs/training-resume.md", "docs/inference.md"]
CALLING = [
    *PAGES,
    "docs/tutorial.md",
    "docs/encryption.md",
    "docs/mindformers.md",
    "docs/hugging-face.md",
    "docs/transfer.md",
    "docs/family.md",
    "docs/outside-the-strategy.md",
]
"""Pages with Python; the commands of the last are run by tests/bridge/mindformers, which has what they need."""
TRANSLATIONS = {"README.zh-CN.md": "README.md"} | {
    str(page.relative_to(ROOT)): f"docs/{page.name}" for page in sorted((ROOT / "docs" / "zh-CN").glob("*.md"))
}


class Block(NamedTuple):
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(page: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(page), re.MULTILINE)]


def cells(page: str) -> list[int]:
    """How many cells each row of a table has."""
    return [row.count("|") for row in re.findall(r"^\|.*$", prose(page), re.MULTILINE)]


def items(page: str) -> int:
    """Items of lists."""
    return len(re.findall(r"^ *(?:-|\d+\.) ", prose(page), re.MULTILINE))


def indented(page: str) -> list[str]:
    """Lines of code that are indented instead of fenced, without their comments."""
    return [_bare(line) for line in re.findall(r"^    (\S.*)$", prose(page), re.MULTILINE)]


COMMANDS = [(page, block.text) for page in PAGES for block in blocks(page) if block.language == "bash"]


@pytest.mark.msrun
@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{Path(p).stem}-{n}" for n, (p, _) in enumerate(COMMANDS)]
)
def test_commands_run(page: str, command: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "RANK_"))}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment.update(TMPDIR=str(tmp_path), PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    if "configs/" in command and "--log-dir" in command:
        logs = "\n".join(path.read_text() for path in tmp_path.rglob("worker_*.log"))
        assert logs.count("all equal") == 4, logs[-4000:]
        if "resume" in command:
            assert logs.count("epoch 3, step 1200, loss scale") == 4, logs[-4000:]
    if "ms-ckpt merge" in command:
        assert len(list(tmp_path.rglob("merged/model.safetensors.index.json"))) == 1


@pytest.mark.parametrize("page", CALLING)
def test_python_calls_what_there_is(page: str) -> None:
    calls = 0
    for block in blocks(page):
        if block.language == "python":
            tree = ast.parse(block.text)
            known = _imported(tree)
            for node in ast.walk(tree):
                first, *rest = ast.unparse(node.func).split(".") if isinstance(node, ast.Call) else [""]
                if isinstance(node, ast.Call) and first in known:
                    called = functools.reduce(getattr, rest, known[first])
                    inspect.signature(called).bind(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})
                    calls += 1
    assert calls


def _imported(tree: ast.Module) -> dict[str, Any]:
    """What a block may call of this package: itself, and what the block imports from it, by the names it has there."""
    found: dict[str, Any] = {"ms_ckpt_ext": ms_ckpt_ext}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ms_ckpt_ext"):
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                found[alias.asname or alias.name] = pkgutil.resolve_name(path)
    return found


@pytest.mark.parametrize("page", [page for page in TRANSLATIONS if (ROOT / page).exists()])
def test_chinese_pages_say_the_same(page: str) -> None:
    """The same blocks, and the same headings, tables and lists in number and form. Comments may be translated."""
    english = TRANSLATIONS[page]
    assert headings(page) == headings(english)
    assert cells(page) == cells(english)
    assert items(page) == items(english)
    assert [_code(block) for block in blocks(page)] == [_code(block) for block in blocks(english)]
    assert indented(page) == indented(english)


def _code(block: Block) -> Block:
    bare = map(_bare, block.text.splitlines())
    return Block(block.language, "\n".join(line for line in bare if line))


def _bare(line: str) -> str:
    return re.sub(r"\s*(?<!\S)#.*$", "", line).rstrip()


def test_every_page_is_translated() -> None:
    names = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert names == {page.name for page in (ROOT / "docs" / "zh-CN").glob("*.md")}
    assert {f"docs/{name}" for name in names} >= set(CALLING)
