"""docs/troubleshooting.md quotes messages that the package has, with the kinds of errors there are.

A message on the page is a text in which `…` stands for a value. It is true when one text of the source, its values and
line breaks aside, has all of its words in their order.
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


def rows(page: Path) -> list[tuple[str, str]]:
    """The message and the kind of error of every row."""
    cell = r"^\| (?:`` (.*?) ``|`(.*?)`) \| `(\w+)` \|"
    return [(a or b, kind) for a, b, kind in re.findall(cell, page.read_text(encoding="utf-8"), re.MULTILINE)]


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
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(english) == sum(line.startswith("| `") for line in lines), "a row that is not read"
