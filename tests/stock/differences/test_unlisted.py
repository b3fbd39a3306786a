"""Rows of docs/differences.md. What a strategy does not list, on either side.

Every test tells what stock does, measured here, and what is right, which ours does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LayoutMismatchError
from tests.stock.differences.both import (
    COLUMNS,
    ROWS,
    arrays,
    by_stock,
    network,
    numbers,
    staged,
    transformed,
)
from tests.support.checkpoints import cut, strategy_of
from tests.support.parameters import held_by

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]


def test_frozen_parameters_of_later_stages(tmp_path: Path) -> None:
    """Outside the strategy, whole, on the ranks of stage 1: stock's merge looks into rank 0's file only."""
    strategy = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    for rank in (2, 3):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "frozen": numbers(3)}, path, {"format": "ms"})
    by_stock("unified_safetensors", tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "stock")
    ms_ckpt_ext.unified_safetensors(tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "ours")
    assert not (tmp_path / "stock/hyper_param.safetensors").exists()
    assert np.array_equal(arrays(tmp_path / "ours/hyper_param.safetensors")["frozen"], numbers(3))


def test_what_a_choice_leaves_out(tmp_path: Path) -> None:
    """Stock writes rank 0's slice of it to hyper_param.safetensors, as if it were whole."""
    strategy = strategy_of({"a": ROWS, "b": ROWS}, tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    call = (tmp_path / "src", tmp_path / "s.ckpt")
    by_stock("unified_safetensors", *call, tmp_path / "stock", choice_func=lambda name: name != "b")
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", choice_func=lambda name: name != "b")
    assert np.array_equal(arrays(tmp_path / "stock/hyper_param.safetensors")["b"], numbers(4, 2)[:2])
    assert not (tmp_path / "ours/hyper_param.safetensors").exists()


def test_listed_by_the_target_only(tmp_path: Path) -> None:
    """A parameter that was frozen, whole on every rank, and is trained under the target: stock leaves it uncut."""
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    strategy_of({"a": COLUMNS, "frozen": ROWS}, tmp_path / "d.ckpt")
    cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src", {"frozen": numbers(4, 2)})
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    assert np.array_equal(theirs["rank_1"]["frozen"], numbers(4, 2))
    assert np.array_equal(mine["rank_1"]["frozen"], numbers(4, 2)[2:])


def test_cut_outside_the_strategy(tmp_path: Path) -> None:
    """A frozen matrix that ranks hold in halves, and no strategy lists: stock merges rank 0's half as the whole."""
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src")
    for rank in range(2):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "frozen": numbers(4, 2)[2 * rank : 2 * rank + 2]}, path, {"format": "ms"})
    call = (tmp_path / "src", tmp_path / "s.ckpt")
    by_stock("unified_safetensors", *call, tmp_path / "stock")
    assert np.array_equal(arrays(tmp_path / "stock/hyper_param.safetensors")["frozen"], numbers(4, 2)[:2])
    with pytest.raises(LayoutMismatchError, match="'frozen' is not in .* the ranks' files differ in it"):
        ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_every_ranks_own(tmp_path: Path) -> None:
    """States of random numbers, under a strategy that changes nothing: stock gives stage 0 those of stage 1."""
    items = [("a", 0, ROWS), ("emb", 0, ROWS), ("emb", 1, ROWS), ("b", 1, ROWS)]
    strategy = staged(items, tmp_path / "s.ckpt")
    cut(strategy, {name: numbers(4, 2) for name in ("a", "b", "emb")}, tmp_path / "src")
    for rank in range(4):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "state": numbers(3) * (rank + 1)}, path, {"format": "ms"})
    ms_ckpt_ext.convert(tmp_path / "src", tmp_path / "ckpt", to="ckpt")
    given = {rank: str(tmp_path / f"ckpt/rank_{rank}/net.ckpt") for rank in range(4)}
    told = {"src_strategy_file": tmp_path / "s.ckpt", "dst_strategy_file": tmp_path / "s.ckpt"}
    (tmp_path / "stock").mkdir()
    by_stock("transform_checkpoint_by_rank", 0, given, tmp_path / "stock/net.ckpt", **told)
    ms_ckpt_ext.transform_checkpoint_by_rank(0, given, tmp_path / "ours/net.ckpt", **told)
    assert np.array_equal(arrays(tmp_path / "stock/net.ckpt")["state"], numbers(3) * 3)
    assert np.array_equal(arrays(tmp_path / "ours/net.ckpt")["state"], numbers(3))


def test_whole_parameters_that_the_target_does_not_list(tmp_path: Path) -> None:
    strategy_of({"a": ROWS}, tmp_path / "d.ckpt")
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4, 2), "frozen": numbers(3)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged", "rank_id": 1}
    call = (None, None, tmp_path / "d.ckpt")
    by_stock("load_distributed_checkpoint", *call, **told, dst_safetensors_dir=tmp_path / "stock")
    ms_ckpt_ext.load_distributed_checkpoint(*call, **told, dst_safetensors_dir=tmp_path / "ours")
    assert arrays(tmp_path / "stock/rank_1/net.safetensors").keys() == {"a"}
    mine = arrays(tmp_path / "ours/rank_1/net.safetensors")
    assert np.array_equal(mine["a"], numbers(4, 2)[2:]) and np.array_equal(mine["frozen"], numbers(3))


def test_loads_of_what_the_strategy_does_not_list(ms: Any, tmp_path: Path) -> None:
    """A frozen parameter in network and checkpoint, whole: stock leaves the network's value."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4), "frozen": numbers(4)}, tmp_path / "merged/part0.safetensors")
    strategy_of({"a": Layout((1,), ((),))}, tmp_path / "d.ckpt")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,), "frozen": (4,)}) for _ in range(2)]
    theirs, _ = by_stock("load_distributed_checkpoint", pair[0], None, tmp_path / "d.ckpt", **told)
    mine = ms_ckpt_ext.load_distributed_checkpoint(pair[1], None, tmp_path / "d.ckpt", **told)
    assert (theirs, mine) == ((["frozen"], []), ([], []))
    assert not held_by(pair[0])["frozen"].any()
    assert np.array_equal(held_by(pair[1])["frozen"], numbers(4))


def test_one_device_to_one_device(tmp_path: Path) -> None:
    """No strategy on either side: stock writes nothing."""
    (tmp_path / "src/rank_0").mkdir(parents=True)
    save_file({"a": numbers(4)}, tmp_path / "src/rank_0/net.safetensors")
    by_stock("transform_checkpoints", tmp_path / "src", tmp_path / "stock", "n", output_format="safetensors")
    ms_ckpt_ext.transform_checkpoints(tmp_path / "src", tmp_path / "ours", "n", output_format="safetensors")
    assert not list((tmp_path / "stock").rglob("*.safetensors"))
    assert np.array_equal(arrays(tmp_path / "ours/rank_0/n0.safetensors")["a"], numbers(4))
