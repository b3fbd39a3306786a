"""The API reference that scripts/docs.sh makes: every public name, every argument told, no link that leads nowhere."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors, rules

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"ms_ckpt_ext": ms_ckpt_ext, "ms_ckpt_ext/rules": rules, "ms_ckpt_ext/errors": errors}
SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):\n((?: .*\n|\n)+)", re.MULTILINE)
THERE = re.compile(r"\bthose of `(\w+)`")


class Page(HTMLParser):
    """What a page of the reference has: places, and links to such."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        held = dict(attrs)
        self.ids.add(held.get("id") or "")
        if tag == "a":
            self.links.append(held.get("href") or "")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pdoc", reason="pdoc is not installed: scripts/docs.sh installs it")
    pytest.importorskip("mindspore", reason="CheckpointRecorder is a callback of MindSpore's, which is not installed")
    out = tmp_path_factory.mktemp("api")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = subprocess.run(
        ["bash", ROOT / "scripts" / "docs.sh", out],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0 and "Warn" not in ran.stdout, ran.stdout
    return out


def test_every_public_name_has_its_place(reference: Path) -> None:
    for page, module in MODULES.items():
        kinds = {name for name, value in vars(module).items() if isinstance(value, type) and name.endswith("Error")}
        names = set(getattr(module, "__all__", kinds))
        assert len(names) > 10 and names - Page(reference / f"{page}.html").ids == set()


def test_links_of_the_reference_lead_somewhere(reference: Path) -> None:
    pages = {path: Page(path) for path in reference.rglob("*.html")}
    assert len(pages) == len(MODULES) + 1
    lost = []
    for path, page in pages.items():
        for link in page.links:
            file, _, place = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            inside = not re.match(r"\w+:", link)
            if inside and (target not in pages or (place and place not in pages[target].ids)):
                lost.append((path.name, link))
    assert lost == []


def public() -> list[tuple[str, Callable[..., Any]]]:
    """Functions and classes that users call, with the methods of the classes; errors have a page of their own."""
    found = []
    for name in ms_ckpt_ext.__all__:
        value = getattr(ms_ckpt_ext, name)
        if callable(value) and name != "CheckpointError":
            found.append((name, value))
        if inspect.isclass(value):
            found += [(f"{name}.{n}", m) for n, m in vars(value).items() if inspect.isfunction(m) and n[0] != "_"]
    return found


def sections(called: Callable[..., Any]) -> dict[str, str]:
    """What a docstring tells, with what it says is told by others ("those of `merge`")."""
    doc = inspect.cleandoc(called.__doc__ or "") + "\n"
    found = dict(SECTION.findall(doc))
    for name in filter(ms_ckpt_ext.__all__.__contains__, THERE.findall(doc)):
        for title, text in sections(getattr(ms_ckpt_ext, name)).items():
            found[title] = found.get(title, "") + text
    return found


PUBLIC = public() if importlib.util.find_spec("mindspore") else []


@pytest.mark.parametrize(("name", "called"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_docstrings_tell_arguments_results_and_errors(name: str, called: Callable[..., Any]) -> None:
    lines = (called.__doc__ or "").strip().splitlines()
    assert lines[0].endswith((".", "asks.")) and (len(lines) == 1 or lines[1] == ""), "a sentence, then an empty line"
    found, signature = sections(called), inspect.signature(called)
    given = [each for each in signature.parameters if each not in ("self", "run_context")]
    told = found.get("Args", found.get("Attributes", ""))
    assert [each for each in given if not re.search(rf"\b{each}\b", told)] == []
    if inspect.isfunction(called):
        assert "Returns" in found or signature.return_annotation in ("None", "bool")
        assert "Raises" in found or not given


@pytest.mark.parametrize("name", rules.__all__)
def test_rules_tell_their_arguments(name: str) -> None:
    """Sources and target are those of every rule."""
    doc = getattr(rules, name).__doc__ or ""
    own = set(inspect.signature(getattr(rules, name)).parameters) - {"sources", "target", "rules"}
    assert [each for each in own if f"`{each}`" not in doc] == []
