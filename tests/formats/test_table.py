"""One table of formats: nothing else names a suffix, and a row and a module are all that a further format takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import inspect, merge
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.table import CKPT, FORMATS, SAFETENSORS, format_of

ROOT = Path(__file__).resolve().parents[2] / "ms_ckpt_ext"
NAMES = re.compile(r"\.(safetensors|ckpt)\b|^(safetensors|ckpt)$")
DELIBERATE = {
    "engine/files/overwrite.py",  # names of Hugging Face's files, in its format only
    "formats/discovery/rank_folders.py",
    "formats/discovery/torch_slices.py",
    "formats/discovery/whole_models.py",
    "formats/table.py",
    "storage/publishing.py",  # a file that stock loaders find
}


def literals(path: Path) -> Iterator[str]:
    """Strings that are neither documentation, nor prose, nor defaults of functions of MindSpore's."""
    text = path.read_text("utf-8")
    tree = ast.parse(text if re.search("safetensors|ckpt", text) else "")
    aside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            aside |= {id(each) for each in (*node.args.defaults, *node.args.kw_defaults)}
    for node in ast.walk(tree):
        found = node.value if isinstance(node, ast.Constant) and id(node) not in aside else None
        if isinstance(found, str) and NAMES.search(found) and " " not in found:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {found!r}"  # type: ignore[attr-defined]


def test_suffixes_are_named_in_the_table_only() -> None:
    paths = [path for path in ROOT.glob("**/*.py") if str(path.relative_to(ROOT)) not in DELIBERATE]
    assert [found for path in paths for found in literals(path)] == []


def test_a_row_is_all_that_a_suffix_takes(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "weights", SAFETENSORS._replace(name="weights"))
    merge(golden / "dp2_tp2/shards", tmp_path / "out", strategy=golden / "dp2_tp2/strategy.ckpt", to="weights")
    merge(golden / "dp2_tp2/shards", tmp_path / "known", strategy=golden / "dp2_tp2/strategy.ckpt")
    made = tmp_path / "out/part0.weights"
    assert made.read_bytes() == (tmp_path / "known/part0.safetensors").read_bytes()
    assert read_index(str(made)).tensors == read_index(str(tmp_path / "known/part0.safetensors")).tensors
    found: Any = inspect(made)
    assert (found.kind, len(found.parameters)) == ("file", len(read_index(str(made)).tensors))


@pytest.mark.parametrize(
    ("path", "form"),
    [("a/b.ckpt", CKPT), ("b.safetensors", SAFETENSORS), ("x.ckpt.bak", None), ("ckpt", None), ("a.ckpt/b", None)],
)
def test_a_suffix_names_the_format(path: str, form: Any) -> None:
    assert format_of(path) is form
