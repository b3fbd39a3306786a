"""Fifty seeds of the differential fuzzer, and the fuzzer itself: what it must see, it sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from tests.stock.fuzz.known import RULES
from tests.stock.fuzz.run import run_seed

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[2]
BATCHES = [range(start, start + 10) for start in range(0, 50, 10)]
PAGES = [ROOT / "docs" / "differences.md", ROOT / "docs" / "zh-CN" / "differences.md"]


@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_stock_and_ours_differ_where_it_is_meant(seeds: range, tmp_path: Path) -> None:
    reports = [run_seed(seed, tmp_path) for seed in seeds]
    assert "\n".join(report.describe() for report in reports if report.unexplained) == ""


def test_a_seed_is_always_the_same(tmp_path: Path) -> None:
    assert len({run_seed(8, tmp_path).describe() for _ in range(2)}) == 1


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_rule_stands_in_the_page_with_its_test(page: Path) -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    told = {rule: re.findall(r"`([^`]+)`", tests) for rule, tests in rows if "`" in tests}
    assert RULES.keys() <= told.keys()
    known = "".join(each.read_text(encoding="utf-8") for each in (ROOT / "tests/stock/differences").glob("test_*.py"))
    for test in (test for tests in told.values() for test in tests):
        assert (ROOT / test).is_file() if "/" in test else f"def {test}(" in known, test


def _spoilt(name: str, after: Any) -> dict[str, Any]:
    real = getattr(ms_ckpt_ext, name)

    def spoilt(*args: Any, **named: Any) -> Any:
        result = real(*args, **named)
        after(args, named)
        return result

    return {name: spoilt}


def _equal_seed(call: str, root: Path) -> int:
    """The first seed of a call on which both sides are equal, and write something."""
    for seed in range(200):
        report = run_seed(seed, root, call)
        if not report.differences and report.ours.error is None and "installed" not in report.case.tags:
            return seed
    raise AssertionError(f"no seed of {call} is equal")


def test_one_flipped_byte_is_seen(tmp_path: Path) -> None:
    seed = _equal_seed("transform", tmp_path)

    def flip(args: Any, named: Any) -> None:
        path = next(Path(args[1]).rglob("*.ckpt"), None) or next(Path(args[1]).rglob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    spoilt = _spoilt("transform_checkpoints", flip)
    assert [each.right for each in run_seed(seed, tmp_path, "transform", spoilt).unexplained] == ["stock"]


def test_a_file_that_is_not_there_is_seen(tmp_path: Path) -> None:
    seed = _equal_seed("unify", tmp_path)
    spoilt = _spoilt("unified_safetensors", lambda args, named: (Path(args[2]) / "part0.safetensors").unlink())
    found = run_seed(seed, tmp_path, "unify", spoilt).unexplained
    assert {(each.kind, each.right) for each in found} == {("files", "stock")}


def test_another_answer_is_seen(tmp_path: Path) -> None:
    seed = _equal_seed("rank_list", tmp_path)
    other = {"rank_list_for_transform": lambda *args, **named: [99]}
    assert [each.kind for each in run_seed(seed, tmp_path, "rank_list", other).unexplained] == ["value"]


def test_an_error_that_stock_does_not_give_is_seen(tmp_path: Path) -> None:
    seed = _equal_seed("into_network", tmp_path)

    def refuse(*args: Any, **named: Any) -> None:
        raise ms_ckpt_ext.CheckpointError("no")

    other = {"load_distributed_checkpoint": refuse}
    (difference,) = run_seed(seed, tmp_path, "into_network", other).unexplained
    assert (difference.kind, difference.right) == ("refused", "stock")
