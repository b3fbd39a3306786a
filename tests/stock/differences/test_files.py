"""Rows of docs/differences.md. Files: what is left out, missing, marked or of another format.

Every test tells what stock does, measured here, and what is right, which ours does.
"""

from __future__ import annotations

import glob
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.stock.differences.both import (
    COLUMNS,
    ROWS,
    WHOLE,
    arrays,
    by_stock,
    network,
    numbers,
    staged,
    transformed,
)
from tests.stock.fuzz.files import metadata_of
from tests.support.checkpoints import cut, read_file, strategy_of
from tests.support.parameters import held_by

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]


def test_files_that_stock_leaves_out(tmp_path: Path) -> None:
    """Stock's processes die without a word where device counts do not divide: no file, no error."""
    strategy = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    thirds = strategy_of({name: Layout((3,), ((0,), ())) for name in "ab"}, tmp_path / "d.ckpt")
    full = {name: numbers(6, 4) for name in "ab"}
    cut(strategy, full, tmp_path / "src")
    cut(thirds, full, tmp_path / "right")
    call = (tmp_path / "src", tmp_path / "stock", "n", tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    _, silent = by_stock("transform_checkpoints", *call, output_format="safetensors")
    assert [str(error) for error in silent] == ["Cannot transform device_num from 2 to 3"] * 2
    assert not list((tmp_path / "stock").rglob("*.safetensors"))
    ms_ckpt_ext.transform_checkpoints(*call[:1], tmp_path / "ours", *call[2:], output_format="safetensors")
    for rank in range(3):
        mine = read_file(tmp_path / f"ours/rank_{rank}/n{rank}.safetensors")
        assert mine == read_file(tmp_path / f"right/rank_{rank}/net.safetensors")


def test_files_that_are_missing(tmp_path: Path) -> None:
    """One stage's file alone for one device: stock writes what there is, as if it were all."""
    strategy = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    ms_ckpt_ext.convert(tmp_path / "src", tmp_path / "ckpt", to="ckpt")
    given = {rank: str(tmp_path / f"ckpt/rank_{rank}/net.ckpt") for rank in (0, 1)}
    (tmp_path / "stock").mkdir()
    by_stock("transform_checkpoint_by_rank", 0, given, tmp_path / "stock/net.ckpt", tmp_path / "s.ckpt")
    assert list(arrays(tmp_path / "stock/net.ckpt")) == ["a"]
    with pytest.raises(ms_ckpt_ext.CheckpointError, match="'b' .*should be in the files of ranks 2, 3"):
        ms_ckpt_ext.transform_checkpoint_by_rank(0, given, tmp_path / "ours/net.ckpt", tmp_path / "s.ckpt")


def test_total_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied parameter that stages cut differently is counted by the slice of the file that is listed first."""
    items = [("a", 0, WHOLE), ("emb", 0, WHOLE), ("emb", 1, ROWS)]
    cut(staged(items, tmp_path / "s.ckpt"), {"a": numbers(4, 2), "emb": numbers(4, 2)}, tmp_path / "src")
    sizes = []
    for backwards in (False, True):
        listed = SimpleNamespace(glob=lambda pattern: sorted(glob.glob(pattern), reverse=backwards))  # noqa: B023
        monkeypatch.setattr("mindspore.parallel.transform_safetensors.glob", listed)
        by_stock("unified_safetensors", tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "stock")
        sizes.append(json.loads((tmp_path / "stock/param_name_map.json").read_text())["metadata"]["total_size"])
    assert sizes == [64, 48]
    ms_ckpt_ext.unified_safetensors(tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "ours")
    assert json.loads((tmp_path / "ours/param_name_map.json").read_text())["metadata"]["total_size"] == 64


def test_safetensors_of_today(tmp_path: Path) -> None:
    """safetensors 0.8 takes an array's memory as it lies; stock hands it slices of columns, which lie in pieces.

    Python 3.9 has older ones, which put them in order.
    """
    strategy = strategy_of({"w": WHOLE}, tmp_path / "s.ckpt")
    strategy_of({"w": COLUMNS}, tmp_path / "d.ckpt")
    cut(strategy, {"w": numbers(2, 4)}, tmp_path / "src")
    theirs, mine = transformed(tmp_path, output_format="safetensors", helped=False)
    right = numbers(2, 4)[:, 2:]
    assert np.array_equal(mine["rank_1"]["w"], right)
    next_four = [[3, 4], [5, 6]]  # whoever they belong to
    assert theirs["rank_1"]["w"].tolist() == (next_four if hasattr(safetensors, "TensorSpec") else right.tolist())
    shutil.rmtree(tmp_path / "stock")
    shutil.rmtree(tmp_path / "ours")
    theirs, _ = transformed(tmp_path, output_format="safetensors")
    assert np.array_equal(theirs["rank_1"]["w"], right)


def test_the_int4_mark(tmp_path: Path) -> None:
    """Packed int4 is stored as int8, and the metadata says so: a re-cut of stock's loses that."""
    strategy_of({"q": ROWS}, tmp_path / "s.ckpt")
    strategy_of({"q": COLUMNS}, tmp_path / "d.ckpt")
    packed = np.arange(16, dtype=np.int8).reshape(4, 4)
    for rank in range(2):
        (tmp_path / f"src/rank_{rank}").mkdir(parents=True)
        slices = np.ascontiguousarray(packed[2 * rank : 2 * rank + 2])
        save_file({"q": slices}, tmp_path / f"src/rank_{rank}/net.safetensors", {"format": "ms", "q": "Int4"})
    transformed(tmp_path, output_format="safetensors")
    notes = {who: metadata_of(tmp_path / who / "rank_0/n0.safetensors") for who in ("stock", "ours")}
    assert notes == {"stock": {"format": "ms"}, "ours": {"format": "ms", "q": "Int4"}}


def test_a_checksum_under_encryption(ms: Any, tmp_path: Path) -> None:
    """What stock writes with both it does not read."""
    key = b"0123456789ABCDEF"
    data = [{"name": "a", "data": ms.Tensor(numbers(4))}]
    ms.save_checkpoint(data, str(tmp_path / "net.ckpt"), enc_key=key, crc_check=True)
    with pytest.raises(ValueError, match="may be encrypted or tempered with"):
        by_stock("load_checkpoint", tmp_path / "net.ckpt", dec_key=key, crc_check=True)
    found = ms_ckpt_ext.load_checkpoint(tmp_path / "net.ckpt", dec_key=key, crc_check=True)
    assert np.array_equal(found["a"].asnumpy(), numbers(4))


def test_strategies_in_json(tmp_path: Path) -> None:
    """Deduplicated slices under a strategy in JSON: stock reads it as protobuf."""
    strategy = strategy_of({"w": ROWS}, tmp_path / "s.json")
    call = (cut(strategy, {"w": numbers(4, 2)}, tmp_path / "src"), tmp_path / "s.json")
    with pytest.raises(Exception, match="wire type|end tag|[Pp]ars"):
        by_stock("unified_safetensors", *call, tmp_path / "stock", merge_with_redundancy=False)
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", merge_with_redundancy=False)
    assert np.array_equal(arrays(tmp_path / "ours/part0.safetensors")["w"], numbers(4, 2))


def test_no_strategy_for_one_file(ms: Any, tmp_path: Path) -> None:
    """One whole `.ckpt` file needs no strategy."""
    save_file({"w": numbers(4)}, tmp_path / "net.safetensors")
    ms_ckpt_ext.safetensors_to_ckpt(tmp_path / "net.safetensors")
    pair = [network(ms, {"w": (4,)}) for _ in range(2)]
    with pytest.raises(ValueError, match="no such strategy file"):
        by_stock("load_distributed_checkpoint", pair[0], [str(tmp_path / "net.ckpt")])
    ms_ckpt_ext.load_distributed_checkpoint(pair[1], [str(tmp_path / "net.ckpt")])
    assert np.array_equal(held_by(pair[1])["w"], numbers(4))


def test_the_note_remove_redundancy(tmp_path: Path) -> None:
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    call = (cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src"), tmp_path / "s.ckpt")
    for rank in range(2):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file(arrays(path), path, {"format": "ms", "remove_redundancy": "False"})
    by_stock("unified_safetensors", *call, tmp_path / "stock")
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours")
    notes = {who: metadata_of(tmp_path / who / "part0.safetensors") for who in ("stock", "ours")}
    assert notes == {"stock": {"format": "ms", "remove_redundancy": "False"}, "ours": {"format": "ms"}}
    assert read_file(tmp_path / "ours/part0.safetensors") == read_file(tmp_path / "stock/part0.safetensors")
