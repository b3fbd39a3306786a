"""Integers of any kind wherever a number is accepted; anything else is refused by the argument's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import load_distributed_checkpoint, rank_list_for_transform, transform_checkpoint_by_rank
from ms_ckpt_ext.core.geometry.strategy import strategy_from_layout_dict
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.errors import ArgumentTypeError, StrategyError, UsageError, integer
from tests.support.checkpoints import read_file, source, tree


class Counts:
    """Anything that counts."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.int32, Counts, np.array], ids=lambda kind: kind.__name__)
def test_every_number_of_every_function(kind: Callable[[int], Any], tmp_path: Path) -> None:
    root = source(tmp_path / "run")
    shards, strategy = root / "shards", root / "strategy.ckpt"
    hashable = np.int64 if kind is np.array else kind
    files = {hashable(rank): shards / f"rank_{rank}" / "net.safetensors" for rank in range(4)}
    out = tmp_path / "out"
    transform_checkpoint_by_rank(kind(1), files, out / "one.safetensors", strategy, strategy, max_process_num=kind(2))
    expected = read_file(shards / "rank_1" / "net.safetensors")
    assert read_file(out / "one.safetensors") == expected
    assert rank_list_for_transform(kind(2), strategy, None) == [3, 2, 1, 0]
    common: dict[str, Any] = {"format": "safetensors", "unified_safetensors_dir": shards}
    load_distributed_checkpoint(
        None, None, strategy, strategy, **common, dst_safetensors_dir=out / "a", rank_id=kind(1)
    )
    ms_ckpt_ext.reshard(shards, out / "b", strategy=strategy, to_strategy=strategy, rank=kind(1))
    for name in ("a", "b"):
        assert read_file(out / name / "rank_1" / "net.safetensors") == expected
    for share in (1, 2):
        ms_ckpt_ext.unified_safetensors(
            shards,
            strategy,
            out / "c",
            max_process_num=kind(2),
            split_dst_file=(kind(share), kind(2)),
            part_bytes=kind(200),
            buffer_bytes=1 << 16,
        )
    assert (out / "c" / "param_name_map.json").exists()
    with ms_ckpt_ext.load(shards, strategy) as held:
        assert held["a.w"][kind(3)].tobytes() == held["a.w"][3].tobytes()
    assert LoadOptions(bucket_bytes=4096, prefetch=kind(0), threads=kind(2)).threads == 2


@pytest.mark.parametrize("bad", [True, 1.0, "1", None, [1], np.True_, np.float32(1)], ids=repr)
def test_what_is_no_integer(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"rank_id must be an int, got "):
        rank_list_for_transform(bad)
    with pytest.raises(ArgumentTypeError, match="a rank in checkpoint_files_map must be an int"):
        transform_checkpoint_by_rank(0, {tuple(bad) if isinstance(bad, list) else bad: "x"}, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match="split_dst_file must be .*two ints from 1"):
        ms_ckpt_ext.unified_safetensors(tmp_path, None, tmp_path / "out", split_dst_file=(bad, 2))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("bad", [None, "600", True, [600], 0, -1.5, float("nan")], ids=repr)
def test_what_is_no_timeout(bad: Any) -> None:
    with pytest.raises(UsageError, match="timeout must be"):
        LoadOptions(timeout=bad)


@pytest.mark.parametrize("good", [1, 0.5, 10**400, float("inf"), np.float64(3), np.float32(3), np.int8(3)], ids=repr)
def test_timeouts_of_any_kind(good: Any) -> None:
    assert LoadOptions(timeout=good).timeout == min(good, 1e300)


def test_bounds_are_told_by_name() -> None:
    assert integer(np.int8(3), "x", 3) == 3 and type(integer(np.int8(3), "x", 3)) is int
    with pytest.raises(UsageError, match="x must be at least 4, got 3"):
        integer(np.int8(3), "x", 4)
    with pytest.raises(UsageError, match="bucket_bytes must be at least 4096, got 1"):
        LoadOptions(bucket_bytes=1)


@pytest.mark.parametrize("kind", [np.int64, np.int32, Counts], ids=lambda kind: kind.__name__)
def test_layouts_of_numbers_that_are_not_pythons(kind: Callable[[int], Any]) -> None:
    plain = {"w": ([2, 2], [1, -1], [4, 8], 0), "v": ([2, 2], [[1, 0], [-1]], [4, 8], 0)}
    other = {
        name: ([*map(kind, matrix)], [row if isinstance(row, list) else kind(row) for row in cuts], [4, 8], 0)
        for name, (matrix, cuts, _, _) in plain.items()
    }
    assert strategy_from_layout_dict(other, 0, int).layouts == strategy_from_layout_dict(plain, 0, int).layouts
    with pytest.raises(StrategyError, match="'w' must hold numbers of devices and axes"):
        strategy_from_layout_dict({"w": ([2.5], [0], [4], 0)}, 0, int)


@pytest.mark.parametrize("number", [None, 0, 1, 100])
def test_numbers_of_processes_that_mindspore_does_not_look_at(number: Any, tmp_path: Path) -> None:
    root = source(tmp_path / "run")
    shards, strategy = root / "shards", root / "strategy.ckpt"
    ms_ckpt_ext.transform_checkpoints(shards, tmp_path / "a", "x", strategy, strategy, number, "safetensors")
    assert len(tree(tmp_path / "a")) == 4
    file = shards / "rank_0" / "net.safetensors"
    ms_ckpt_ext.safetensors_to_ckpt(file, tmp_path / "b", processes_num=number)
    assert (tmp_path / "b" / "net.ckpt").exists()
    common: dict[str, Any] = {"format": "safetensors", "unified_safetensors_dir": shards, "max_process_num": number}
    load_distributed_checkpoint(None, None, None, strategy, **common, dst_safetensors_dir=tmp_path / "c", rank_id=0)
    if number == 0:
        with pytest.raises(UsageError, match="max_process_num must be an int of at least 1"):
            load_distributed_checkpoint(None, None, strategy, strategy, **common, dst_safetensors_dir=tmp_path / "d")
        with pytest.raises(UsageError, match="processes_num must be an int of at least 1"):
            ms_ckpt_ext.safetensors_to_ckpt(shards, tmp_path / "d", processes_num=number)
    else:
        load_distributed_checkpoint(None, None, strategy, strategy, **common, dst_safetensors_dir=tmp_path / "d")
        assert len(list((tmp_path / "d").glob("rank_*"))) == 4


@pytest.mark.parametrize("empty", [{}, dict.fromkeys(()), None])
def test_no_layouts_are_one_device(empty: Any, tmp_path: Path) -> None:
    """`Cell.parameter_layout_dict` of a network that is not compiled."""
    assert ms_ckpt_ext.as_strategy(empty) is None
    root = source(tmp_path / "run")
    load_distributed_checkpoint(
        None,
        None,
        empty,
        root / "strategy.ckpt",
        format="safetensors",
        unified_safetensors_dir=root / "shards",
        dst_safetensors_dir=tmp_path / "out",
    )
    assert read_file(tmp_path / "out" / "rank_0" / "net.safetensors")["a.w"].shape == (64, 32)
