"""docs/troubleshooting.md quotes messages that the package has, with the kinds of errors there are.

A message on the page is a text in which `…` stands for a value. It is true when one text of the source, its values and
line breaks aside, has all of its words in their order. What is not quoted is told by the page's last section, which has
every kind of error and every room of the package.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [DOCS / "troubleshooting.md", DOCS / "zh-CN" / "troubleshooting.md"]
PACKAGE = Path(ms_ckpt_ext.__file__).parent
VALUE = "\0"
"""Where a text of the source takes a value: no word of a page crosses it."""


def halves(page: Path) -> tuple[str, str]:
    """What a page says of messages, and its last section: of kinds and rooms."""
    quoted, _, general = page.read_text(encoding="utf-8").rpartition("\n## ")
    return quoted, general


def rows(page: Path) -> list[tuple[str, str]]:
    """The message and the kind of error of every row."""
    cell = r"^\| (?:`` (.*?) ``|`(.*?)`) \| `(\w+)` \|"
    return [(a or b, kind) for a, b, kind in re.findall(cell, halves(page)[0], re.MULTILINE)]


def generally(page: Path) -> list[str]:
    """Kinds of errors and rooms of the package that the last section has, in its order."""
    firsts = re.findall(r"^\| (`.*?`) \|", halves(page)[1], re.MULTILINE)
    return [name for first in firsts for name in re.findall(r"`([\w/]+)`", first)]


def raised(source: str) -> set[str]:
    """Names of our errors that a module makes."""
    called = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {node.id for node in called if isinstance(node, ast.Name)} | {
        node.attr for node in called if isinstance(node, ast.Attribute)
    }
    return {name for name in names if name in KINDS}


KINDS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.CheckpointError) and value not in errors._BOTH.values()
} - {"CheckpointError"}
"""Every class of the tree, but its root and those that are a built-in error as well, which nobody names."""


def written(node: ast.AST) -> Optional[str]:
    """What a text in the source says; None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) or VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = written(node.left), written(node.right)
        return None if left is None and right is None else (left or VALUE) + (right or VALUE)
    return None


def texts(source: str) -> Iterator[str]:
    """All texts of a module but its docstrings."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = None if id(node) in told else written(node)
        if text and " " in text:
            yield text


@functools.lru_cache(maxsize=1)
def messages() -> list[str]:
    return [text for path in sorted(PACKAGE.rglob("*.py")) for text in texts(path.read_text(encoding="utf-8"))]


def is_said(message: str, among: list[str]) -> bool:
    words = re.compile(".*".join(re.escape(part) for part in message.strip("…").split("…")), re.DOTALL)
    return any(words.search(text) for text in among)


@pytest.mark.parametrize(("message", "kind"), rows(PAGES[0]), ids=lambda value: value[:40])
def test_every_message_is_in_the_package(message: str, kind: str) -> None:
    assert len(re.sub(r"[^a-zA-Z]", "", message)) >= 12, "too short to be found by"
    assert is_said(message, messages())
    assert issubclass(getattr(errors, kind), errors.CheckpointError)


def test_a_message_that_nobody_raises_is_found() -> None:
    source = "def f(a):\n    'told here'\n    raise E(f'the file {a!r} has '\n        f'{a} bytes' + ' too many')\n"
    said = list(texts(source))
    assert is_said("the file … has … bytes too many", said)
    assert not is_said("the file … has … words too many", said)
    assert not is_said("told here", said)
    assert not is_said("the file x has", said)


def test_both_pages_have_the_same_rows() -> None:
    english = rows(PAGES[0])
    assert rows(PAGES[1]) == english
    assert len(english) == len(set(english)) >= 40
    lines = halves(PAGES[0])[0].splitlines()
    assert len(english) == sum(line.startswith("| `") for line in lines), "a row that is not read"


def test_every_kind_of_error_is_told_and_every_room_that_raises() -> None:
    listed = generally(PAGES[0])
    assert listed == generally(PAGES[1]) and len(listed) == len(set(listed))
    assert {name for name in listed if "/" not in name} == KINDS
    rooms = [name for name in listed if "/" in name]
    assert all((PACKAGE.parent / room).is_dir() for room in rooms)
    for path in PACKAGE.rglob("*.py"):
        if raised(path.read_text(encoding="utf-8")) and path.parent != PACKAGE:
            name = path.relative_to(PACKAGE.parent).as_posix()
            assert any(name.startswith(f"{room}/") for room in rooms), f"{name} raises, and no room of the page has it"


def test_every_kind_is_raised_somewhere() -> None:
    made = {name for path in PACKAGE.rglob("*.py") for name in raised(path.read_text(encoding="utf-8"))}
    handed = {"ReadError"}  # to `storage_error`
    assert KINDS - made <= handed


def test_lines_of_the_log_and_errors_on_the_operators_page_are_in_the_package() -> None:
    pages = [DOCS / "operations.md", DOCS / "zh-CN" / "operations.md"]
    said = [re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE) for part in map(_logs_and_faults, pages)]
    assert said[0] == said[1] and len(said[0]) > 10
    assert [line for line in said[0] if not is_said(line, messages()) and line not in KINDS] == []


def _logs_and_faults(page: Path) -> str:
    return "".join(page.read_text(encoding="utf-8").split("\n## ")[-2:])


def test_the_operators_page_has_every_variable() -> None:
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    used = {
        name for path in PACKAGE.rglob("*.py") for name in re.findall(r"MS_CKPT_EXT_[A-Z_]*[A-Z]", path.read_text())
    }
    assert {name for name in used if f"`{name}`" not in page} == set()


def test_every_advice_about_the_system_is_told() -> None:
    """What is said of an errno stands in a row: the message is made of it."""
    said = [message for message, kind in rows(PAGES[0]) if kind == "StorageError"]
    assert [
        text for text in errors._ADVICE.values() if not any(is_said(message, [text, "; " + text]) for message in said)
    ] == []
