"""Rows of docs/differences.md. Slices: optimizer shards, stages, replicas, and layouts of several device axes.

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
from tests.stock.differences.both import (
    COLUMNS,
    ROWS,
    WHOLE,
    arrays,
    by_stock,
    loaded,
    numbers,
    staged,
    transformed,
)
from tests.support.checkpoints import cut, strategy_of
from tests.support.parameters import held_by

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]


def test_optimizer_shards(tmp_path: Path) -> None:
    """Two tensor axes cut, the first one by the inner device axis, and replicas sharded: stock merges them in another
    order than ranks hold them, and says nothing."""
    strategy = strategy_of({"w": Layout((2, 2, 2), ((0,), (1,)), 4, -1)}, tmp_path / "s.ckpt")
    source = cut(strategy, {"w": numbers(8, 4)}, tmp_path / "src")
    by_stock("unified_safetensors", source, tmp_path / "s.ckpt", tmp_path / "stock")
    ms_ckpt_ext.unified_safetensors(source, tmp_path / "s.ckpt", tmp_path / "ours")
    theirs, mine = (arrays(tmp_path / who / "part0.safetensors")["w"] for who in ("stock", "ours"))
    assert sorted(theirs.ravel()) == sorted(mine.ravel()) and not np.array_equal(theirs, mine)
    assert np.array_equal(mine, numbers(8, 4))


def test_optimizer_shards_into_slices(tmp_path: Path) -> None:
    """The same in save mode: most ranks get another rank's slice."""
    strategy = strategy_of({"w": Layout((2, 2, 2), ((0,), (1,)), 4, -1)}, tmp_path / "s.ckpt")
    right = cut(strategy, {"w": numbers(8, 4)}, tmp_path / "right")
    (tmp_path / "merged").mkdir()
    save_file({"w": numbers(8, 4)}, tmp_path / "merged/part0.safetensors")
    wrong = 0
    for rank in range(8):
        told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged", "rank_id": rank}
        call = (None, None, tmp_path / "s.ckpt")
        by_stock("load_distributed_checkpoint", *call, **told, dst_safetensors_dir=tmp_path / "stock")
        ms_ckpt_ext.load_distributed_checkpoint(*call, **told, dst_safetensors_dir=tmp_path / "ours")
        name = f"rank_{rank}/net.safetensors"
        expected = arrays(right / name)["w"]
        assert np.array_equal(arrays(tmp_path / "ours" / name)["w"], expected)
        wrong += not np.array_equal(arrays(tmp_path / "stock" / name)["w"], expected)
    assert wrong == 4


def test_optimizer_shards_in_loads_of_ckpt(ms: Any, tmp_path: Path) -> None:
    """A cut between two device axes that hold an optimizer shard: stock fills the network with some rows twice, and
    others not at all."""
    stock, ours, files, told = loaded(Layout((2, 2, 2), ((), (1,)), 1, 4), ms, tmp_path)
    by_stock("load_distributed_checkpoint", stock, files, **told)
    ms_ckpt_ext.load_distributed_checkpoint(ours, files, **told)
    assert 0 < len(np.unique(held_by(stock)["w"])) < 16
    assert np.array_equal(held_by(ours)["w"], numbers(8, 2))


def test_several_device_axes_in_loads_of_ckpt(ms: Any, tmp_path: Path) -> None:
    stock, ours, files, told = loaded(Layout((2, 2), ((1, 0), ())), ms, tmp_path)
    with pytest.raises(TypeError, match="'>=' not supported between instances of 'list' and 'int'"):
        by_stock("load_distributed_checkpoint", stock, files, **told)
    ms_ckpt_ext.load_distributed_checkpoint(ours, files, **told)
    assert np.array_equal(held_by(ours)["w"], numbers(8, 2))


def test_parameters_tied_over_stages(tmp_path: Path) -> None:
    """Cut by rows in stage 1 and by columns in stage 2: stock gives ranks of stage 1 the columns."""
    items = [("a", 0, ROWS), ("emb", 1, ROWS), ("emb", 2, COLUMNS), ("b", 2, ROWS)]
    strategy = staged(items, tmp_path / "s.ckpt")
    staged(items, tmp_path / "d.ckpt")
    full = {"a": numbers(4, 4), "emb": numbers(4, 6), "b": numbers(2, 2)}
    cut(strategy, full, tmp_path / "src")
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    assert np.array_equal(mine["rank_2"]["emb"], full["emb"][:2])
    assert np.array_equal(theirs["rank_2"]["emb"], full["emb"][:, :3])


def test_parameters_that_the_target_ties(tmp_path: Path) -> None:
    """Two stages of the target share an embedding, and all its ranks need the same files: stock's files of the second
    stage lack it."""
    source = strategy_of({"emb": ROWS, "a": ROWS, "b": ROWS}, tmp_path / "s.ckpt")
    items = [("emb", 0, COLUMNS), ("a", 0, COLUMNS), ("emb", 1, COLUMNS), ("b", 1, COLUMNS)]
    target = staged(items, tmp_path / "d.ckpt")
    full = {"a": numbers(4, 4), "emb": numbers(4, 6), "b": numbers(2, 2)}
    cut(source, full, tmp_path / "src")
    cut(target, full, tmp_path / "right")
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    for rank in range(4):
        right = arrays(tmp_path / f"right/rank_{rank}/net.safetensors")
        assert {n: a.tolist() for n, a in mine[f"rank_{rank}"].items()} == {n: a.tolist() for n, a in right.items()}
        assert theirs[f"rank_{rank}"].keys() == ({"b"} if rank > 1 else {"a", "emb"})


def test_deduplicated_slices(tmp_path: Path) -> None:
    """Two device axes on one tensor axis, and no replica in a file twice: stock takes the wrong files' slices."""
    layout = Layout((3, 2, 2), ((), (2, 0)))
    strategy = strategy_of({"w": layout}, tmp_path / "s.ckpt")
    source = cut(strategy, {"w": numbers(2, 12)}, tmp_path / "src")
    call = (source, tmp_path / "s.ckpt")
    by_stock("unified_safetensors", *call, tmp_path / "stock", merge_with_redundancy=False)
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", merge_with_redundancy=False)
    assert not np.array_equal(arrays(tmp_path / "stock/part0.safetensors")["w"], numbers(2, 12))
    assert np.array_equal(arrays(tmp_path / "ours/part0.safetensors")["w"], numbers(2, 12))


def test_slices_in_memory(ms: Any, tmp_path: Path) -> None:
    """`merge_sliced_parameter`: stock makes float32 of bfloat16, and leaves optimizer shards out."""
    layouts = {"w": Layout((2, 2), ((0,), ()), 2, -1), "b": ROWS}
    for name, layout in layouts.items():
        strategy_of({name: layout}, tmp_path / f"{name}.ckpt")
    shard = [np.array(numbers(8, 2)[2 * row : 2 * row + 2]) for row in (0, 2, 1, 3)]
    slices = {
        "w": [ms.Parameter(ms.Tensor(each), name="w") for each in shard],
        "b": [ms.Parameter(ms.Tensor(numbers(2, 2), ms.bfloat16), name="b") for _ in range(2)],
    }
    found = {}
    for name in layouts:
        strategy = ms_ckpt_ext.build_searched_strategy(tmp_path / f"{name}.ckpt")
        theirs, _ = by_stock("merge_sliced_parameter", slices[name], strategy)
        found[name] = theirs, ms_ckpt_ext.merge_sliced_parameter(slices[name], strategy)
    assert found["w"][0].shape == (4, 2)
    assert np.array_equal(found["w"][1].asnumpy(), numbers(8, 2))
    assert [each.dtype for each in found["b"]] == [ms.float32, ms.bfloat16]


def test_gradients_that_are_accumulated(tmp_path: Path) -> None:
    """They are zero when saved, and whole but for the weight's own cut, while the strategy gives them its optimizer
    shard as well: stock makes a tensor of twice the size of them, and ours leaves them out."""
    shard = Layout((2, 2), ((0,), ()), 2, -1)
    strategy = strategy_of({"w": shard}, tmp_path / "s.ckpt")
    cut(strategy, {"w": numbers(8, 2)}, tmp_path / "src")
    for rank in range(4):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "accu_grads.w": np.zeros((4, 2), np.float32)}, path, {"format": "ms"})
    strategy_of({"w": shard, "accu_grads.w": shard}, tmp_path / "s.ckpt")
    strategy_of({"w": WHOLE, "accu_grads.w": WHOLE}, tmp_path / "d.ckpt")
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    assert theirs["rank_0"]["accu_grads.w"].shape == (16, 2)
    assert mine["rank_0"].keys() == {"w"}


def test_empty_layouts(ms: Any, tmp_path: Path) -> None:
    """The layouts of a network that is not compiled are an empty dictionary: one device, in save mode too."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    with pytest.raises(TypeError, match="should be string, but got <class 'dict'>"):
        by_stock("load_distributed_checkpoint", None, None, {}, **told, dst_safetensors_dir=tmp_path / "stock")
    ms_ckpt_ext.load_distributed_checkpoint(None, None, {}, **told, dst_safetensors_dir=tmp_path / "ours")
    assert np.array_equal(arrays(tmp_path / "ours/rank_0/net.safetensors")["a"], numbers(4))
