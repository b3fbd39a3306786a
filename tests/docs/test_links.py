"""Every link between pages leads to a file that is there, and to a heading of it where the link names one.

Headings get the anchors that Git hosts give them: lower case, without punctuation, `-` for a space, a number behind a
heading that is there twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/**/*.md"), *ROOT.glob("tests/**/*.md")]
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\]]|\](?!\())*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """A page without its code, in which a bracket is no link."""
    return re.sub(r"(`+).+?\1", lambda code: code[0].replace("](", "] ("), FENCED.sub("", text), flags=re.DOTALL)


def links(text: str) -> Iterator[tuple[str, str]]:
    """(file, anchor) of every link that stays in the project; "" for this page, or for no anchor."""
    for target in LINK.findall(prose(text)):
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(text: str) -> set[str]:
    """Of all headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", FENCED.sub("", text), re.MULTILINE):
        bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", bare.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    text = page.read_text(encoding="utf-8")
    lost = []
    for file, anchor in links(text):
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            lost.append(f"{file}#{anchor}" if anchor else file)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_pages_in_chinese_link_to_pages_in_chinese() -> None:
    """Where there is one: who reads Chinese is not sent to another language."""
    for page in [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh-CN").glob("*.md"))]:
        for file, _ in links(page.read_text(encoding="utf-8")):
            target = (page.parent / file).resolve() if file else page
            translated = ROOT / "docs" / "zh-CN" / target.name
            assert target.parent != ROOT / "docs" or not translated.exists(), f"{page.name} links to {file}"


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One: `two`, (three)\n## One\n## One\n```\n# no heading\n```\n")
    assert anchors(other.read_text()) == {"one-two-three", "one", "one-1"}
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#one-two-three) [`c[0]`](#here) [d](https://x.org/#y) `[e](no.md)`\n"
        "![f](no.png) [g](other.md#one-2) [h](#nowhere)\n```\n[i](no.md)\n```\n"
    )
    assert broken(page) == ["no.png", "other.md#one-2", "#nowhere"]
