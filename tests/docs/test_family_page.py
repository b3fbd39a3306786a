"""docs/family.md lists every function of the installed MindSpore's checkpoint family, and says truly whose it is."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.api.mindspore import install as installer

pytestmark = pytest.mark.stock
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [DOCS / "family.md", DOCS / "zh-CN" / "family.md"]
FAMILY = [
    "mindspore.train.serialization",
    "mindspore.parallel.checkpoint_transform",
    "mindspore.parallel.checkpoint_convert",
    "mindspore.parallel.transform_safetensors",
    "mindspore.parallel.parameter_broadcast",
    "mindspore.parallel.strategy",
    "mindspore.safeguard.rewrite_obfuscation",
    "mindspore.train.callback._checkpoint",
    "mindspore.graph._utils.mindir_util",
]
"""Modules of MindSpore that define what has to do with checkpoints."""
WORDS = re.compile(r"ckpt|checkpoint|safetensors|strateg|mindir|sliced_parameter|group_info", re.IGNORECASE)


def tables(page: Path) -> list[list[str]]:
    """Names in the first column of every table."""
    parts = page.read_text(encoding="utf-8").split("\n## ")[1:]
    return [re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) for part in parts]


def defined() -> set[str]:
    """Public functions and classes of the family's modules."""
    found = set()
    for name in FAMILY:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue  # of another release
        held = vars(module).items()
        found |= {key for key, value in held if not key.startswith("_") and callable(value) and home(value) == name}
    return found


def home(value: Any) -> str:
    return str(getattr(value, "__module__", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_function_stands_on_the_page(page: Path) -> None:
    import mindspore

    ours, theirs = tables(page)
    listed = [*ours, *theirs]
    assert len(listed) == len(set(listed))
    assert defined() - set(listed) == set()
    if mindspore.__version__.startswith("2.10."):
        assert set(listed) - defined() == set()


def test_every_name_of_the_packages_stands_on_the_page() -> None:
    """By how it is called, wherever it comes from."""
    import mindspore
    import mindspore.parallel
    import mindspore.train

    packages = (mindspore, mindspore.parallel, mindspore.train)
    public = {name for package in packages for name in getattr(package, "__all__", dir(package))}
    found = {
        name
        for name in public
        if WORDS.search(name) and any(callable(getattr(package, name, None)) for package in packages)
    }
    assert found - {name for table in tables(PAGES[0]) for name in table} == set()
    assert len(found) > 20


def test_what_is_said_to_be_ours_is_ours() -> None:
    ours, theirs = tables(PAGES[0])
    assert set(ours) == set(installer.NAMES) == set(ours) & set(ms_ckpt_ext.__all__)
    assert set(theirs) & set(installer.NAMES) == set()
    assert tables(PAGES[1]) == [ours, theirs]
