"""Copies of one parameter that pipeline stages cut differently: `verify` compares what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import merge
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.integrity.compare import DifferingElement
from ms_ckpt_ext.engine.integrity.soundness import Unequal
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.engine.unlisted.tied import warn_unlike
from ms_ckpt_ext.engine.unlisted.whole_slices import Alone
from ms_ckpt_ext.formats.strategies.file import load_strategy, save_strategy
from tests.support.checkpoints import cut
from tests.support.command_line import as_json, run
from tests.support.verifying import checked, compared

EMBED = np.arange(96, dtype=np.float32).reshape(12, 8)
CUTS: Mapping[str, tuple[Layout, ...]] = {
    "rows, columns": (Layout((2,), ((0,), ())), Layout((2,), ((), (0,)))),
    "rows, whole": (Layout((2,), ((0,), ())), Layout((2,), ((), ()))),
    "2 rows, 4 rows": (Layout((2, 2), ((1,), ())), Layout((2, 2), ((1, 0), ()))),
    "whole, shards": (Layout((4,), ((), ())), Layout((4,), ((), ()), 1, 2)),
    "three stages": (Layout((2,), ((0,), ())), Layout((2,), ((), (0,))), Layout((2,), ((), ()))),
}


def tied(root: Path, cuts: tuple[Layout, ...]) -> tuple[Path, Path, int]:
    """`shards/` of a job whose stages hold `embed` in these cuts; the strategy's file; devices of a stage."""
    items = [LayoutItem("embed", stage, layout) for stage, layout in enumerate(cuts)]
    whole = Layout((cuts[0].devices,), ((),))
    items += [LayoutItem(f"norm{stage}", stage, whole) for stage in range(len(cuts))]
    strategy = Strategy.from_items(items, "s")
    full = {"embed": EMBED, **{f"norm{stage}": np.full(3, stage + 1.5, np.float32) for stage in range(len(cuts))}}
    save_strategy(strategy, root / "s.ckpt")
    return cut(strategy, full, root / "shards"), root / "s.ckpt", strategy.devices_per_stage


def change(shards: Path, rank: int, by: float = 1.0, at: tuple[int, int] = (-1, -1)) -> None:
    path = shards / f"rank_{rank}/net.safetensors"
    held = load_file(path)
    held["embed"][at] += by
    save_file(held, path, {"format": "ms"})


@pytest.mark.parametrize("cuts", CUTS)
def test_equal_copies_are_sound(cuts: str, tmp_path: Path) -> None:
    shards, strategy, devices = tied(tmp_path, CUTS[cuts])
    found = checked(shards, strategy=strategy)
    assert found.ok
    assert found.copies_compared == devices * len(CUTS[cuts]) * 2  # all of embed's, and all of the norms'
    merge(shards, tmp_path / "merged", strategy=strategy)
    assert compared(shards, tmp_path / "merged", strategy=strategy).ok


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("stage", [0, 1])
def test_one_copy_that_differs(cuts: str, stage: int, tmp_path: Path) -> None:
    """Whichever stage holds the difference, and whichever copy a merge takes."""
    shards, strategy, devices = tied(tmp_path, CUTS[cuts])
    merge(shards, tmp_path / "before", strategy=strategy)
    for rank in range(devices * stage, devices * (stage + 1)):
        if CUTS[cuts][stage].cells[rank % devices] == CUTS[cuts][stage].cells[-1]:
            change(shards, rank)
    found = checked(shards, strategy=strategy)
    assert not found.ok and {unequal.name for unequal in found.unequal} == {"embed"}
    merge(shards, tmp_path / "after", strategy=strategy)
    for target in ("before", "after"):
        result = compared(shards, tmp_path / target, strategy=strategy)
        assert not result.ok and {difference.name for difference in result.differences} == {"embed"}
        assert not compared(tmp_path / target, shards, strategy_b=strategy).ok


@pytest.mark.parametrize("cuts", CUTS)
def test_a_merge_warns_of_copies_that_differ(cuts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And of no others; 16 rows of what two cuts have in common are read of each, if there are so many."""
    shards, strategy, devices = tied(tmp_path, CUTS[cuts])
    merge(shards, tmp_path / "before", strategy=strategy)
    assert caplog.messages == []
    last = CUTS[cuts][1]
    for rank in range(devices, 2 * devices):
        if last.cells[rank % devices] == last.cells[0]:
            change(shards, rank, at=(0, 0))
    merge(shards, tmp_path / "after", strategy=strategy)
    assert [message for message in caplog.messages if "'embed'" in message and "not that of ranks" in message]
    look = Alone(open_catalog(str(shards), load_strategy(str(strategy))))
    warn_unlike(look._catalog, look)
    assert look.count.nbytes <= EMBED.nbytes * 2 * (3 if cuts == "three stages" else 1)


def test_what_is_told(tmp_path: Path) -> None:
    shards, strategy, _ = tied(tmp_path, CUTS["rows, columns"])
    merge(shards, tmp_path / "merged", strategy=strategy)
    change(shards, 3, 0.5, (2, 1))
    files = [str(shards / f"rank_{rank}/net.safetensors") for rank in (0, 3)]
    (unequal,) = checked(shards, strategy=strategy).unequal
    assert unequal == Unequal("embed", "[0:6, 4:8]", ((files[0],), (files[1],)))
    (difference,) = compared(shards, tmp_path / "merged", strategy=strategy).differences
    assert difference.of == "the copy of ranks 2, 3 in a"
    assert (difference.count, difference.total, difference.shape) == (1, 96, (12, 8))
    assert difference.first == (DifferingElement((2, 5), str(EMBED[2, 5] + np.float32(0.5)), str(EMBED[2, 5])),)
    words = ("verify", shards, tmp_path / "merged", "--strategy", strategy)
    ran = run(*words)
    assert ran.code == 1 and "embed, the copy of ranks 2, 3 in a" in ran.out
    assert as_json(*words, code=1)["differences"][0]["of"] == "the copy of ranks 2, 3 in a"


def test_both_sides_have_such_copies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, strategy_a, _ = tied(tmp_path / "a", CUTS["rows, columns"])
    b, strategy_b, _ = tied(tmp_path / "b", CUTS["three stages"])
    both = {"strategy": strategy_a, "strategy_b": strategy_b, "match": "embed"}
    assert compared(a, b, **both).ok
    change(b, 4)
    (difference,) = compared(a, b, **both).differences
    assert difference.of == "the copy of ranks 4, 5 in b"


def test_a_copy_with_gaps_is_compared_where_it_is(tmp_path: Path) -> None:
    """Of the second stage one file is left, and of the first both."""
    shards, strategy, _ = tied(tmp_path, CUTS["rows, columns"])
    (shards / "rank_3/net.safetensors").unlink()
    (shards / "rank_3").rmdir()
    merge(shards, tmp_path / "merged", strategy=strategy)
    assert compared(shards, tmp_path / "merged", strategy=strategy).ok
    assert checked(shards, strategy=strategy).unequal == ()
    change(shards, 2, at=(0, 0))
    assert [unequal.region for unequal in checked(shards, strategy=strategy).unequal] == ["[0:6, 0:4]"]
    assert not compared(shards, tmp_path / "merged", strategy=strategy).ok


@pytest.mark.parametrize("shape", [(0, 8), (12, 0)])
def test_without_elements_there_is_nothing_to_compare(shape: tuple[int, ...], tmp_path: Path) -> None:
    items = [LayoutItem("embed", stage, layout) for stage, layout in enumerate(CUTS["rows, columns"])]
    items.append(LayoutItem("w", 0, Layout((2,), ((0,), ()))))
    strategy = Strategy.from_items(items, "s")
    save_strategy(strategy, tmp_path / "s.ckpt")
    cut(strategy, {"embed": np.zeros(shape, np.float32), "w": EMBED}, tmp_path / "shards")
    assert checked(tmp_path / "shards", strategy=tmp_path / "s.ckpt").unequal == ()
