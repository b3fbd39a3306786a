"""Rows of docs/differences.md. Calls: mistakes, errors, and arguments that are taken or refused.

Every test tells what stock does, measured here, and what is right, which ours does.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LayoutMismatchError
from tests.stock.differences.both import (
    COLUMNS,
    ROWS,
    WHOLE,
    arrays,
    by_stock,
    network,
    numbers,
    staged,
)
from tests.support.checkpoints import cut, read_file, strategy_of
from tests.support.parameters import held_by

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]


def test_a_network_after_an_error(ms: Any, tmp_path: Path) -> None:
    """The second parameter does not fit: stock has put the first one in place by then."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4), "b": numbers(4)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,), "b": (5,)}) for _ in range(2)]
    with pytest.raises(RuntimeError):
        by_stock("load_distributed_checkpoint", pair[0], **told)
    with pytest.raises(LayoutMismatchError):
        ms_ckpt_ext.load_distributed_checkpoint(pair[1], **told)
    assert np.array_equal(held_by(pair[0])["a"], numbers(4))
    assert not held_by(pair[1])["a"].any()


def test_errors_that_stock_did_not_mean(tmp_path: Path) -> None:
    """From stages of two devices to stages of one: stock asks for a device that the layout lacks."""
    source = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    single = Layout((1,), ((), ()))
    staged([("a", 0, single), ("b", 1, single), ("b", 2, single)], tmp_path / "d.ckpt")
    cut(source, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    call = (tmp_path / "src", tmp_path / "stock", "n", tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    with pytest.raises(RuntimeError, match="is not in the current stage"):
        by_stock("transform_checkpoints", *call, output_format="safetensors")
    ms_ckpt_ext.transform_checkpoints(*call[:1], tmp_path / "ours", *call[2:], output_format="safetensors")
    for rank, name in enumerate("abb"):
        found = arrays(tmp_path / f"ours/rank_{rank}/n{rank}.safetensors")
        assert list(found) == [name] and np.array_equal(found[name], numbers(4, 2))


def test_nothing_to_convert(tmp_path: Path) -> None:
    """A pattern that means no file: stock converts nothing, and says nothing."""
    (tmp_path / "src/rank_0").mkdir(parents=True)
    save_file({"a": numbers(4)}, tmp_path / "src/rank_0/net.safetensors")
    by_stock("safetensors_to_ckpt", tmp_path / "src", tmp_path / "stock", file_name_regex="other")
    with pytest.raises(
        ms_ckpt_ext.CheckpointError, match=r"no \.safetensors file to convert; check the path and file_name_regex"
    ):
        ms_ckpt_ext.safetensors_to_ckpt(tmp_path / "src", tmp_path / "ours", file_name_regex="other")


def test_shorter_lists_of_ranks(tmp_path: Path) -> None:
    """Of what every rank holds whole, one rank is enough."""
    source = [("a", 0, WHOLE), ("b", 1, ROWS)]
    staged(source, tmp_path / "s.ckpt")
    strategy_of({"a": ROWS, "b": COLUMNS}, tmp_path / "d.ckpt")
    theirs, _ = by_stock("rank_list_for_transform", 1, tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    mine = ms_ckpt_ext.rank_list_for_transform(1, tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    assert (theirs, mine) == ([3, 2, 1, 0], [3, 2, 1])


def test_no_number_of_processes(tmp_path: Path) -> None:
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    call = (cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src"), tmp_path / "s.ckpt")
    with pytest.raises(TypeError):
        by_stock("unified_safetensors", *call, tmp_path / "stock", max_process_num=None)
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", max_process_num=None)
    assert np.array_equal(arrays(tmp_path / "ours/part0.safetensors")["a"], numbers(4, 2))


def test_integers_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "s.ckpt"
    strategy_of({"a": ROWS}, path)
    with pytest.raises(TypeError, match="should be a int"):
        by_stock("rank_list_for_transform", np.int64(1), path, path)
    assert ms_ckpt_ext.rank_list_for_transform(np.int64(1), path, path) == [1]


def test_mistakes_that_stock_does_not_see(tmp_path: Path) -> None:
    """A format that is none, where the source is `.ckpt`."""
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2)}, tmp_path / "plain")
    ms_ckpt_ext.convert(tmp_path / "plain", tmp_path / "src", to="ckpt")
    call = (tmp_path / "src", tmp_path / "stock", "n", tmp_path / "s.ckpt", tmp_path / "s.ckpt")
    by_stock("transform_checkpoints", *call, output_format="npz")
    assert (tmp_path / "stock/rank_0/n0.ckpt").exists()
    with pytest.raises(ValueError, match="output_format must be one of"):
        ms_ckpt_ext.transform_checkpoints(*call[:1], tmp_path / "ours", *call[2:], output_format="npz")
    assert not (tmp_path / "ours").exists()


def test_arguments_of_a_wrong_type(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="True is not a directory"):
        by_stock("merge_pipeline_strategys", True, tmp_path / "s.ckpt")
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match="src_strategy_dirs must be a path, got bool"):
            ms_ckpt_ext.merge_pipeline_strategys(True, tmp_path / "s.ckpt")


def test_a_merge_and_a_full_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock sleeps after an output file while more than half of the memory is in use: three times here."""
    cut(strategy_of({"a": ROWS}, tmp_path / "s.ckpt"), {"a": numbers(4, 2)}, tmp_path / "src")
    asked = psutil.virtual_memory
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: asked()._replace(percent=50.1 if len(slept) < 3 else 50.0))
    ms_ckpt_ext.unified_safetensors(tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "ours")
    assert slept == []
    by_stock("unified_safetensors", tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "stock")
    assert slept == [1, 1, 1]
    assert [p.name for p in (tmp_path / "ours").glob("*.safetensors")] == ["part0.safetensors"]
    assert read_file(tmp_path / "ours/part0.safetensors") == read_file(tmp_path / "stock/part0.safetensors")
